"""Sweeps of a bowl that are logged, and TensorBoard's reader of its own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bowls import bowl_spec
from rich.console import Console

from telescope import Spec
from telescope.report.live import PlainScreen
from telescope.sweep.run import Options, run

PAPER = {"policy": "paper"}
AXES = {"lr": {"low": 0.01, "high": 1.0, "points": 3}}
SPOILT = """
if lr < 0.02:
    print(json.dumps({"status": "diverged", "reason": "too slow"})); sys.exit()
"""


class Lines:
    """A stream that keeps what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        return


def run_logged(place: Path, **tables: Any) -> tuple[Any, str]:
    """Run a bowl with the stand-in as its tracker; return the sweep and what was printed."""
    few = {"log": {"to": ["wandb"]}, "ladder": PAPER, "axes": AXES}
    spec = Spec.from_dict(bowl_spec(place, **{**few, **tables}))
    printed = Lines()
    screen = PlainScreen(Console(file=printed, width=200))  # type: ignore[arg-type]
    options = Options(place / "results", dispatcher="inline")
    return run(spec, options, lambda: screen), printed.text


def read_events(folder: Path) -> dict[str, Any]:
    """Run's folder → tag → [(step, value)], or a text, read by TensorBoard itself."""
    reason = "reads event files back; pip install tensorboard"
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=reason
    )
    found: dict[str, Any] = {}
    for place in {path.parent for path in folder.rglob("events.*")}:
        read = events.EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 0})
        read.Reload()
        tags: dict[str, Any] = {
            tag: [(event.step, event.value) for event in read.Scalars(tag)]
            for tag in read.Tags()["scalars"]
        }
        for tag in read.Tags()["tensors"]:
            (*_, last) = read.Tensors(tag)
            text = last.tensor_proto.string_val[0].decode()
            tags[tag.removesuffix("/text_summary")] = text
        tags["images"] = read.Tags()["images"]
        tags["plugins"] = set(read.summary_metadata)
        found[place.relative_to(folder).as_posix()] = tags
    return found
