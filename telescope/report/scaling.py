"""A scaling law for people: its plan and its answer on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from telescope.markup import table
from telescope.report.live import describe_seconds
from telescope.report.terminal import print_item, print_table
from telescope.scaling.answer import percent

FOLDER = "scaling"
"""The folder of a family in its sweep's."""
ANSWER_FILE = "scaling.json"
"""The answer of a family, in that folder."""
TITLES = {"muon": "Muon", "adamw": "AdamW"}
Number = Mapping[str, Any]
"""A fitted number, {"value", "interval"}."""


def read_scaling(folder: Path) -> dict[str, Any] | None:
    """Return the answer that a sweep's folder holds; None without one, or with a damaged one."""
    try:
        found = json.loads((folder / FOLDER / ANSWER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"laws", "sizes"} <= found.keys() else None


def laws_table(found: Mapping[str, Any]) -> str:
    """Return the laws of every form as an HTML table, with their intervals.

    Args:
        found: an answer, the keys of `scaling --json`.
    """
    laws = found["laws"]
    names = laws["optimizers"]
    forms = {
        "E, one exponent": laws["shared"],
        "E, own exponents": laws["separate"],
        "no E, one exponent": laws["power_shared"],
        "no E, own exponents": laws["power_separate"],
    }
    if laws["power_shared"] is None:
        forms = {"no E, one exponent": laws["shared"], "no E, own exponents": laws["separate"]}
    rows = [
        [
            title,
            _within(of["constant"]),
            *(_within(of["exponent"][name]) for name in names),
            *(f"{of['factor'][name]['value']:.3g}" for name in names),
            f"{100 * of['unexplained']:.2f}",
        ]
        for title, of in forms.items()
        if of
    ]
    head = [f"α of {TITLES[name]}" for name in names] + [f"A of {TITLES[name]}" for name in names]
    return table(["law", "E", *head, "% unexplained"], rows)


def ratios_table(found: Mapping[str, Any]) -> str:
    """Return the sizes, their losses and the FLOP ratios as an HTML table."""
    names, sizes = found["laws"]["optimizers"], found["sizes"]
    ratios = _ratios(sizes, found["laws"]["ratios"]) if len(names) == 2 else []
    rows = [
        [
            size["width"],
            size["depth"] or "–",
            _count(size["tokens"]),
            *(_mean(size["runs"][name]["losses"]) for name in names),
            *ratios[number : number + 1],
        ]
        for number, size in enumerate(sizes)
    ]
    losses = [f"loss of {TITLES[name]}" for name in names]
    return table(["width", "depth", "tokens", *losses, *(["FLOP ratio"] if ratios else [])], rows)


def print_scaling_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Print the plan of a family, and of its variants.

    Args:
        console: the console to print on.
        plan: the keys of `scaling --plan --json`.
    """
    for one in (plan, *plan.get("variants", {}).values()):
        _print_plan(console, one)


def _print_plan(console: Console, plan: Mapping[str, Any]) -> None:
    sizes, names = plan["sizes"], plan["optimizers"]
    columns = {
        "width": [str(size["width"]) for size in sizes],
        "depth": [str(size["depth"] or "–") for size in sizes],
        "parameters": [_count(size["parameters_without_embeddings"]) for size in sizes],
        "tokens": [_count(size["tokens"]) for size in sizes],
        "steps": [f"{size['steps']:,}" for size in sizes],
        "batch": [f"{size['batch_size']:,}" for size in sizes],
        **{f"FLOPs {TITLES[n]}": [f"{size['flops'][n]:.3g}" for size in sizes] for n in names},
        "6ND": [f"{size['flops_6nd']:.3g}" for size in sizes],
    }
    print_table(console, columns, expendable=("batch", "6ND"))
    print_item(console, "parameters", "without embedding and readout")
    seeds = ", ".join(map(str, plan["seeds"]))
    print_item(console, "runs", f"{len(sizes) * len(names) * len(plan['seeds'])}: seeds {seeds}")
    for name, cost in plan["ladders"].items():
        print_item(
            console,
            "ladder",
            f"{TITLES[name]}: {cost['expected']:.3g} target runs, at most {cost['worst']:.3g}",
        )
    over = plan["over_target"]
    print_item(console, "cost", f"{over['expected']:.3g} target runs, at most {over['worst']:.3g}")
    seconds = plan["seconds"]
    about = describe_seconds(seconds["estimate"])
    print_item(console, "time", f"about {about} ({seconds['basis']})")
    if plan["refused"]:
        console.print(f"`scaling` would refuse: {plan['refused']}", style="yellow")


def print_scaling(console: Console, found: Mapping[str, Any]) -> None:
    """Print what a family has found, its variants side by side at the end.

    Args:
        console: the console to print on.
        found: the keys of `scaling --json`.
    """
    variants: Mapping[str, Any] = found.get("variants", {})
    for one in (found, *variants.values()):
        _print_answer(console, one)
    if variants:
        _print_variants(console, {"plain": found, **variants})


def _print_answer(console: Console, found: Mapping[str, Any]) -> None:
    sizes, laws = found["sizes"], found["laws"]
    names = laws["optimizers"]
    columns = {
        "width": [str(size["width"]) for size in sizes],
        "depth": [str(size["depth"] or "–") for size in sizes],
        "tokens": [_count(size["tokens"]) for size in sizes],
        "seeds": [str(len(size["seeds"])) for size in sizes],
        **{
            f"loss {TITLES[n]}": [_mean(size["runs"][n]["losses"]) for size in sizes] for n in names
        },
        **{f"FLOPs {TITLES[n]}": [f"{size['flops'][n]:.3g}" for size in sizes] for n in names},
    }
    if len(names) == 2:
        columns["ratio"] = _ratios(sizes, laws["ratios"])
    print_table(console, columns, expendable=("depth", "seeds", "tokens"))
    for key, title in (("shared", "one α"), ("separate", "own α")):
        print_item(console, title, _law(laws[key], names))
    if laws["power_separate"]:
        print_item(console, "no E", _law(laws["power_separate"], names))
    for note in laws["notes"]:
        print_item(console, "note", note)
    for missing in found["missing"]:
        print_item(console, "missing", missing, "yellow")
    for name, tuning in found["tuning"].items():
        verdict = f", {tuning['verdict']}" if tuning["verdict"] else ""
        print_item(
            console,
            "tuned",
            f"{TITLES[name]} by {tuning['trials']} trials, {tuning['over_target']:.2f} target "
            f"runs{verdict}",
        )
    if len(names) == 2:
        last = found["laws_6nd"]["ratios"][-1]
        print_item(console, "by 6ND", f"{percent(last)} of the FLOPs, without the optimizer's own")
    print_item(console, "answer", found["sentence"])


def _print_variants(console: Console, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the answers of the spec and its variants side by side."""
    of = [one["laws"] for one in found.values()]
    if any(len(laws["optimizers"]) < 2 for laws in of):
        return
    columns = {
        "variant": list(found),
        "loss reached": [f"{laws['ratios'][-1]['loss']:.4f}" for laws in of],
        f"FLOPs of {TITLES[of[0]['optimizers'][0]]}": [percent(laws["ratios"][-1]) for laws in of],
        "α differs by": [_signed(laws["separate"]["exponent_difference"]) for laws in of],
    }
    print_table(console, columns)


def _law(laws: Mapping[str, Any], names: Sequence[str]) -> str:
    """Describe laws: ``E 1.31 (1.2 to 1.4); Muon α 0.12 (0.1 to 0.13), A 0.3; ...``."""
    constant = laws["constant"]
    parts = [f"E {_within(constant)}"] if constant["value"] > 0 else []
    parts += [
        f"{TITLES[name]} α {_within(laws['exponent'][name])}, A {laws['factor'][name]['value']:.3g}"
        for name in names
    ]
    return f"{'; '.join(parts)}; {100 * laws['unexplained']:.2f} % unexplained"


def _within(number: Number) -> str:
    """Describe a number and its interval."""
    if number["interval"] is None:
        return f"{number['value']:.3g}"
    low, high = number["interval"]
    return f"{number['value']:.3g} ({low:.3g} to {high:.3g})"


def _signed(number: Number | None) -> str:
    if number is None:
        return "–"
    if number["interval"] is None:
        return f"{number['value']:+.3f}"
    low, high = number["interval"]
    return f"{number['value']:+.3f} ({low:+.3f} to {high:+.3f})"


def _ratios(sizes: Sequence[Mapping[str, Any]], ratios: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe each size's ratio; a star marks a law beyond its sizes."""
    left = list(ratios)
    shown = []
    for size in sizes:
        ratio = left.pop(0) if size["seeds"] else None
        star = " *" if ratio and ratio["extrapolated"] else ""
        shown.append(percent(ratio) + star if ratio else "–")
    return shown


def _mean(losses: Mapping[str, float | None]) -> str:
    there = [loss for loss in losses.values() if loss is not None]
    return f"{fmean(there):.4f}" if there else "–"


def _count(number: float) -> str:
    """Format a large count: ``8.92B``.

    >>> _count(8_919_000_000), _count(339_700_000), _count(53_248), _count(512)
    ('8.92B', '339.7M', '53.2k', '512')
    """
    for unit, digits, letter in ((1e9, 2, "B"), (1e6, 1, "M"), (1e3, 1, "k")):
        if number >= unit:
            return f"{number / unit:.{digits}f}{letter}"
    return f"{number:.0f}"
