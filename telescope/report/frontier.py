"""A frontier for people: its plan and its answer on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
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
    about = describe_seconds(seconds["estimate"])
    print_item(console, "time", f"about {about} ({seconds['basis']})")
    if plan["refused"]:
        console.print(f"`frontier` would refuse: {plan['refused']}", style="yellow")


def print_frontier(console: Console, found: Mapping[str, Any]) -> None:
    """Print what a frontier has found.

    Args:
        console: the console to print on.
        found: the keys of `frontier --json`.
    """
    arms = found["arms"]
    ends = [arm["envelope"] for arm in arms]
    columns = {
        "optimizer": [arm["optimizer"] for arm in arms],
        "batch": [f"{arm['batch_size']:,}" for arm in arms],
        "tokens": [f"{arm['batch_tokens']:,}" for arm in arms],
        "trials": [f"{arm['trials']} + {arm['repeats']}" for arm in arms],
        "lr": [f"{arm['point']['lr']:.3g}" if arm["point"] else "–" for arm in arms],
        "loss": [
            f"{end['losses'][-1]:.4f} ± {end['errors'][-1]:.4f}" if end else "–" for end in ends
        ],
        "after": [f"{end['tokens'][-1]:,}" if end else "–" for end in ends],
    }
    print_table(console, columns)
    for stuck in found["stuck"]:
        print_item(console, "stuck", f"{stuck['arm']}: {stuck['reason']}", "yellow")
