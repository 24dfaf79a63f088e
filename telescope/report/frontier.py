"""A frontier for people: its plan and its answer on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from telescope.report.live import describe_seconds
from telescope.report.terminal import print_item, print_table


def print_frontier_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Print the plan of a frontier.

    Args:
        console: the console to print on.
        plan: the keys of `frontier --plan --json`.
    """
    arms = plan["arms"]
    columns = {
        "optimizer": [arm["optimizer"] for arm in arms],
        "batch": [f"{arm['batch_size']:,}" for arm in arms],
        "tokens": [f"{arm['batch_tokens']:,}" for arm in arms],
        "steps": [f"{arm['steps']:,}" for arm in arms],
        "tokens in all": [f"{arm['tokens']:,}" for arm in arms],
        "trials": [f"{arm['trials']['expected']} + {arm['repeats']}" for arm in arms],
        "cost of all": [f"{arm['cost']['expected']:.3g}" for arm in arms],
    }
    print_table(console, columns, expendable=("tokens in all",))
    over = plan["over_target"]
    most = "" if over["most"] <= over["expected"] else f", at most {over['most']:.3g}"
    print_item(console, "cost", f"{over['expected']:.3g} target runs{most}")
    seconds = plan["seconds"]
    about = "" if seconds["estimate"] is None else "about "
    time = f"{about}{describe_seconds(seconds['estimate'])} ({seconds['basis']})"
    print_item(console, "time", time)
    if plan["refused"]:
        console.print(f"`frontier` would refuse: {plan['refused']}", style="yellow")


def print_frontier(console: Console, found: Mapping[str, Any]) -> None:
    """Print what a frontier has found.

    Args:
        console: the console to print on.
        found: the keys of `frontier --json`.
    """
    _print_arms(console, found["arms"])
    if found["losses"]:
        _print_tokens(console, found)
    for critical in found["critical"]:
        print_item(console, "critical", describe_critical(critical))
    for trend in found["trends"]:
        print_item(console, "ratio", describe_trend(trend, found["ratios"]))
    if found["devices"]["times"]:
        _print_devices(console, found)
    elif found["losses"]:
        print_item(console, "time", found["devices"]["basis"])
    for stuck in found["stuck"]:
        print_item(console, "stuck", f"{stuck['arm']}: {stuck['reason']}", "yellow")
    console.print(f"{found['name']}: " + found["sentence"], style="bold", soft_wrap=True)


def print_variants(console: Console, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print several frontiers side by side: the ratio at every batch size, to each lowest loss.

    Args:
        console: the console to print on.
        found: name of a variant → the keys of its `frontier --json`.
    """
    of: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, answer in found.items():
        lowest = answer["losses"][0] if answer["losses"] else None
        of[name] = {one["batch_size"]: one for one in answer["ratios"] if one["loss"] == lowest}
    sizes = sorted({size for ratios in of.values() for size in ratios})
    columns = {"batch": [f"{size:,}" for size in sizes]}
    for name, ratios in of.items():
        lowest = found[name]["losses"][0] if found[name]["losses"] else math.nan
        title = f"{name}, to loss {lowest:g}"
        columns[title] = [describe_ratio(ratios.get(size)) for size in sizes]
    console.print("tokens of AdamW over tokens of Muon", style="bold")
    print_table(console, columns)
    for name, answer in found.items():
        print_item(console, name, answer["sentence"])


def _print_arms(console: Console, arms: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per arm: its trials, its choice and its loss at the end."""
    ends = [arm["envelope"] for arm in arms]
    columns = {
        "optimizer": [arm["optimizer"] for arm in arms],
        "batch": [f"{arm['batch_size']:,}" for arm in arms],
        "tokens": [f"{arm['batch_tokens']:,}" for arm in arms],
        "trials": [f"{arm['trials']} + {arm['repeats']}" for arm in arms],
        "lr": [f"{arm['point']['lr']:.3g}" if _has_lr(arm) else "–" for arm in arms],
        "loss": [
            f"{end['losses'][-1]:.4f} ± {end['errors'][-1]:.4f}" if end else "–" for end in ends
        ],
        "after": [f"{end['tokens'][-1]:,}" if end else "–" for end in ends],
    }
    print_table(console, columns, expendable=("after", "trials"))


def _has_lr(arm: Mapping[str, Any]) -> bool:
    return "lr" in (arm["point"] or {})


def _print_tokens(console: Console, found: Mapping[str, Any]) -> None:
    """Print the tokens to every loss, a row per batch size, and the ratio."""
    names, rows, cells, ratios = named_losses(found)
    columns = {
        "to loss": [f"{loss:g}" for loss, _ in rows],
        "batch": [f"{size:,}" for _, size in rows],
        **{
            f"{name} tokens": [
                describe_tokens(cells.get((name, size, loss))) for loss, size in rows
            ]
            for name in names
        },
    }
    if ratios:
        columns["ratio"] = [describe_ratio(ratios.get((size, loss))) for loss, size in rows]
    print_table(console, columns)


def named_losses(
    found: Mapping[str, Any],
) -> tuple[list[str], list[tuple[float, int]], dict[Any, Any], dict[Any, Any]]:
    """Return what a table of tokens has.

    Returns:
        The optimizers; (loss, batch size) of every row; (optimizer, batch size, loss) → its tokens;
        (batch size, loss) → its ratio.
    """
    names = list(dict.fromkeys(one["optimizer"] for one in found["reached"]))
    rows = list(dict.fromkeys((one["loss"], one["batch_size"]) for one in found["reached"]))
    cells = {(o["optimizer"], o["batch_size"], o["loss"]): o for o in found["reached"]}
    ratios = {(one["batch_size"], one["loss"]): one for one in found["ratios"]}
    return names, rows, cells, ratios


def describe_tokens(one: Mapping[str, Any] | None) -> str:
    """Describe the tokens to a loss: ``451 k (430 to 470 k)``, or that it was not reached."""
    if one is None:
        return "–"
    if one["tokens"] is None:
        return "not reached" if one["reason"].startswith("not") else "before the first"
    return f"{_amount(one['tokens'])} ({_range(one['interval'], _amount)})"


def describe_ratio(one: Mapping[str, Any] | None) -> str:
    """Describe a ratio with its interval: ``1.13 (1.05 to 1.21)``."""
    if one is None or one["ratio"] is None:
        return "–"
    return f"{one['ratio']:.2f} ({_range(one['interval'], '{:.2f}'.format)})"


def _amount(tokens: float) -> str:
    """Format a number of tokens with three digits.

    >>> _amount(451_072), _amount(6_946_816), _amount(900)
    ('451k', '6.95M', '900')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.3g}"


def _range(interval: Sequence[float | None], form: Callable[[float], str]) -> str:
    """Format an interval, of which an end may be unknown.

    >>> _range((None, 2.0), str), _range((1.0, None), str)
    ('at most 2.0', 'at least 1.0')
    """
    low, high = interval
    if low is None and high is None:
        return "unknown"
    if low is None or high is None:
        return f"at most {form(high)}" if high is not None else f"at least {form(low or 0.0)}"
    return f"{form(low)} to {form(high)}"


def describe_critical(one: Mapping[str, Any]) -> str:
    """Describe the critical batch of one optimizer, to one loss."""
    to = f"{one['optimizer']} to loss {one['loss']:g}: "
    misfit = "" if one["misfit"] is None else f"; arms off the curve by {100 * one['misfit']:.0f} %"
    if one["tokens"] is None:
        return f"{to}{one['reason']}{misfit}"
    return f"{to}{_amount(one['tokens'])} tokens ({_range(one['interval'], _amount)}){misfit}"


def describe_trend(trend: Mapping[str, Any], ratios: Sequence[Mapping[str, Any]]) -> str:
    """Describe the ratio over all batch sizes, to one loss: above 1, and whether it falls."""
    known = [one for one in ratios if one["loss"] == trend["loss"] and one["ratio"] is not None]
    count = {verdict: sum(one["verdict"] == verdict for one in known) for verdict in RATIO_WORDS}
    said = [
        f"{words} at {count[v]} of {len(known)}" for v, words in RATIO_WORDS.items() if count[v]
    ]
    text = f"AdamW over Muon to loss {trend['loss']:g}: {', '.join(said) or 'not known'}"
    if trend["slope"] is None:
        return f"{text}; too few batch sizes to say whether it changes with the batch"
    change = f"{100 * (2 ** trend['slope'] - 1):+.1f} % per doubling of the batch"
    ends = _range(trend["interval"], lambda slope: f"{100 * (2**slope - 1):+.1f} %")
    return f"{text}; it {TREND_WORDS[trend['verdict']]}: {change} ({ends})"


RATIO_WORDS = {"above": "above 1", "inside": "inside the noise", "below": "below 1"}
"""Verdict on a ratio → its words."""
TREND_WORDS = {"rises": "rises", "falls": "falls", "inside": "changes by no more than the noise"}
"""Verdict on a ratio's change with the batch → its words."""


def _describe_time(seconds: float) -> str:
    """Format a duration that may be far below a second.

    >>> _describe_time(0.0432), _describe_time(75.4)
    ('0.0432 s', '1 min 15 s')
    """
    return f"{seconds:.3g} s" if seconds < 10 else describe_seconds(seconds)


def _print_devices(console: Console, found: Mapping[str, Any]) -> None:
    """Print the time to the lowest loss for every number of devices."""
    loss = found["losses"][0]
    times = [one for one in found["devices"]["times"] if one["loss"] == loss]
    cells = {(one["optimizer"], one["devices"]): one for one in times}
    counts = list(dict.fromkeys(one["devices"] for one in times))
    columns = {"devices": [f"{count:,}" for count in counts]}
    for name in dict.fromkeys(one["optimizer"] for one in times):
        its = [cells.get((name, count)) for count in counts]
        columns[f"{name}, time"] = [_describe_time(one["seconds"]) if one else "–" for one in its]
        columns[f"{name}, batch"] = [f"{one['batch_size']:,}" if one else "–" for one in its]
    print_table(console, columns)
    print_item(console, "time", f"to loss {loss:g}; {found['devices']['basis']}")
