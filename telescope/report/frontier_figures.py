"""The figures of a frontier, from the keys of its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from telescope.report.figures import MARKERS, MUTED, WIDTH_COLOURS, styled, write_png

COLOURS = {"muon": WIDTH_COLOURS[0], "adamw": WIDTH_COLOURS[1]}
STYLES = ("-", "--", ":")
"""Lines of the target losses, the lowest first; further ones repeat them."""


def draw_tokens(panel: Axes, found: Mapping[str, Any]) -> None:
    """Draw the tokens to every loss against the batch, with the fitted curves of equal loss."""
    losses = found["losses"]
    for optimizer, colour in COLOURS.items():
        for number, loss in enumerate(losses):
            its = [
                one
                for one in found["reached"]
                if (one["optimizer"], one["loss"]) == (optimizer, loss) and one["tokens"]
            ]
            label = f"{optimizer}, loss {loss:g}"
            _points(panel, its, "tokens", colour, number, label)
            fit = _critical(found, optimizer, loss)
            if fit and its:
                ends = (its[0]["batch_tokens"], its[-1]["batch_tokens"])
                batches = np.geomspace(min(ends), max(ends), 50)
                tokens = fit["fewest_tokens"] + fit["fewest_steps"] * batches
                panel.plot(batches, tokens, color=colour, ls=STYLES[number % len(STYLES)], lw=1)
    _logarithmic(panel, "tokens to the loss")


def draw_ratios(panel: Axes, found: Mapping[str, Any]) -> None:
    """Draw the tokens of AdamW over those of Muon against the batch."""
    panel.axhline(1.0, color=MUTED, lw=0.8)
    for number, loss in enumerate(found["losses"]):
        its = [one for one in found["ratios"] if one["loss"] == loss and one["ratio"]]
        colour = WIDTH_COLOURS[2 + number % (len(WIDTH_COLOURS) - 2)]
        _points(panel, its, "ratio", colour, number, f"loss {loss:g}", joined=True)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("batch, tokens")
    panel.set_ylabel("tokens of AdamW / tokens of Muon")


def draw_times(panel: Axes, found: Mapping[str, Any]) -> None:
    """Draw the time to the lowest loss against the number of devices."""
    lowest = found["losses"][0] if found["losses"] else None
    for number, (optimizer, colour) in enumerate(COLOURS.items()):
        its = [
            {**one, "batch_tokens": one["devices"]}
            for one in found["devices"]["times"]
            if (one["optimizer"], one["loss"]) == (optimizer, lowest)
        ]
        _points(panel, its, "seconds", colour, number, optimizer, joined=True)
    _logarithmic(panel, "seconds to the lowest loss")
    panel.set_xlabel("devices")


PANELS: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
    "tokens to a loss": draw_tokens,
    "AdamW over Muon": draw_ratios,
    "time to a loss": draw_times,
}
"""Title → the function that draws a panel."""


def _points(
    panel: Axes,
    its: Sequence[Mapping[str, Any]],
    key: str,
    colour: str,
    number: int,
    label: str,
    *,
    joined: bool = False,
) -> None:
    """Draw values with their intervals; an open end has no cap, and reaches the value."""
    if not its:
        return
    values = np.array([one[key] for one in its], dtype=float)
    ends = [
        [value if end is None else end for end in one["interval"]]
        for one, value in zip(its, values, strict=True)
    ]
    low, high = np.abs(np.array(ends).T - values)
    panel.errorbar(
        [one["batch_tokens"] for one in its],
        values,
        (low, high),
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        ms=4,
        capsize=2,
        lw=1,
        ls=STYLES[number % len(STYLES)] if joined else "none",
        label=label,
    )


def _critical(found: Mapping[str, Any], optimizer: str, loss: float) -> Mapping[str, Any] | None:
    its = (
        one
        for one in found["critical"]
        if (one["optimizer"], one["loss"]) == (optimizer, loss) and one["fewest_tokens"] is not None
    )
    return next(its, None)


def _logarithmic(panel: Axes, label: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("batch, tokens")
    panel.set_ylabel(label)


@styled
def frontier_figure(found: Mapping[str, Any]) -> Figure:
    """Draw the three panels side by side.

    Args:
        found: the keys of `frontier --json`.
    """
    figure = Figure(figsize=(13.0, 4.2), layout="constrained", facecolor="white")
    figure.suptitle(f"{found['name']}: {found['sentence']}", fontsize=10, wrap=True)
    for panel, (title, draw) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        draw(panel, found)
        panel.set_title(title)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    return figure


def write_frontier_figure(path: Path, found: Mapping[str, Any]) -> None:
    """Write the figure as a PNG, whole or not at all."""
    write_png(path, frontier_figure(found))
