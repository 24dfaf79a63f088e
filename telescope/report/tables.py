"""The tables that people read, and the same facts in the keys of `show --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from telescope.records import Certificate, Choice, Point, Status, as_json
from telescope.report.live import describe_seconds

if TYPE_CHECKING:
    from telescope.finished import Finished
    from telescope.train.coordcheck_verdict import CoordCheck
    from telescope.transfer.settings import Transfer


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        left = column in ("why", "role", "grid", "trials", "quantity", "verdict")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def print_plan(console: Console, plan: Mapping[str, Any], warning: str | None) -> None:
    """Print what a sweep will cost.

    Args:
        console: where to.
        plan: the keys of `plan --json`.
        warning: why `run` would refuse it, or None.
    """
    console.print(_stages_table(plan["stages"]))
    target, seconds = plan["target"], plan["seconds"]
    console.print(f"target   width {target['width']}, {_target_facts(target)}", highlight=False)
    _print_planned_cost(console, plan)
    about = "" if seconds["estimate"] is None else "about "
    console.print(
        f"time     {about}{describe_seconds(seconds['estimate'])} ({seconds['basis']})",
        highlight=False,
    )
    for key, value in plan.get("auto", {}).items():
        console.print(f"auto     {key}: {value}", highlight=False)
    if note := plan.get("data", {}).get("note"):
        console.print(f"data     {note}", style="yellow", soft_wrap=True)
    if warning:
        console.print(f"`run` would refuse: {warning}", style="yellow")


def _stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """One row per width that the plan trains."""
    table = _table("width", "parameters", "grid", "trials", "tokens", "FLOPs", "of which optimizer")
    for stage in stages:
        flops = stage["flops"]
        table.add_row(
            str(stage["width"]),
            _number(stage["parameters"], ",.0f"),
            " × ".join(f"{count} {axis}" for axis, count in stage["points"].items() if count > 1)
            or "1",
            str(stage["trials"]),
            _number(stage["tokens"]),
            _number(flops["total"]),
            f"{flops['optimizer'] / flops['total']:.0%}" if flops["optimizer"] else "–",
        )
    return table


def _target_facts(target: Mapping[str, Any]) -> str:
    """What is known of the target run: parameters, tokens, FLOPs."""
    known = [
        _number(target["parameters"], ",.0f", " parameters"),
        _number(target["tokens"], unit=" tokens"),
        _number(target["flops"], unit=" FLOPs"),
    ]
    return ", ".join(fact for fact in known if fact != "–")


def _print_planned_cost(console: Console, plan: Mapping[str, Any]) -> None:
    """Print the sweep's cost next to the target run's, and between what it may lie."""
    adaptive = plan["policy"] == "adaptive"
    flops = _number(plan["sweep_flops"], unit=" FLOPs: ") if plan["sweep_flops"] else ""
    console.print(
        f"cost     {flops}{plan['sweep_over_target']:.2f} target runs"
        + (" expected" if adaptive else "")
    )
    if adaptive:
        low, high = plan["range"]["best"], plan["range"]["worst"]
        console.print(
            f"         {low:.2f} at best, {high:.2f} at worst; what is expected assumes a plain "
            "bowl and little noise"
        )


def _number(value: float | None, form: str = ".3g", unit: str = "") -> str:
    """A number with its unit, or a dash for what is not known."""
    return "–" if value is None else f"{value:{form}}{unit}"


def print_check(console: Console, check: CoordCheck, title: str) -> None:
    """Print the slopes of the coordinate check, each with the sizes that it is the slope of."""
    steps = ", ".join(map(str, check.steps))
    console.print(f"{title}, {check.point}: {len(check.seeds)} seeds, after steps {steps}")
    widths = (f"width {width}" for width in check.widths)
    table = _table("quantity", "step", *widths, "slope", "verdict")
    shown = check.shown()
    for name in shown:
        slope, step = check.slopes[name], check.slope_steps[name]
        table.add_row(
            name,
            str(step),
            *(f"{size:.3g}" for size in check.sizes[name][step]),
            "–" if slope is None else f"{slope:+.2f} ± {check.errors[name]:.2f}",
            _verdict_on(check, name),
            style="red" if name in check.problems else None,
        )
    console.print(table)
    if len(shown) < len(check.slopes):
        console.print(
            f"the steepest of each kind of {len(check.slopes)} quantities; --json has all"
        )
    console.print(
        "slope    of log2 size against log2 width ± its standard error, after the surest step; "
        f"FAIL where it is beyond ±{check.threshold:g} by two errors, uncertain where those reach "
        "across it"
    )
    if check.unwatched:
        console.print(
            f"not watched one by one: {', '.join(check.unwatched)}: no module around them gives "
            "a tensor every time",
            soft_wrap=True,
        )

    if check.blind_spot:
        console.print(f"warning  {check.blind_spot}", soft_wrap=True)


def _verdict_on(check: CoordCheck, name: str) -> str:
    """What the check says of one quantity; nothing where it is flat."""
    if name in check.problems:
        return "FAIL"
    if check.slopes[name] is None:
        return "not moved"
    return "uncertain" if name in check.uncertain else ""


def print_answer(console: Console, finished: Finished, settings: Transfer | None = None) -> None:
    """Print the choice per width, the answer for the target, and what it cost.

    Args:
        console: where to.
        finished: the sweep.
        settings: the answer as torch settings, printed too when given.
    """
    axes = [axis.name for axis in finished.spec.ladder_spec.axes]
    table = _table("width", "trials", *axes, "loss", "why")
    for choice in finished.ladder.choices:
        values = [f"{choice.point[axis]:.4g}" for axis in axes]
        table.add_row(
            str(choice.width), _counts(choice), *values, f"{choice.loss:.4f}", choice.reason
        )
    console.print(table)
    if settings and settings.groups is not None:
        console.print(f"for torch.optim at width {settings.width}:")
        console.print(_groups_table(settings.groups))
    facts = show_as_json(finished)
    for skipped in finished.ladder.skipped:
        console.print(f"skipped  width {skipped.width}: {skipped.reason}")
    console.print(f"answer   {_answer(finished, facts)}")
    if finished.certificate:
        print_certificate(console, finished.certificate)
    cost = facts["cost"]
    console.print(
        f"cost     {_number(cost['flops'], unit=' FLOPs, ') if cost['flops'] is not None else ''}"
        f"{cost['over_target']:.2f} target runs"
        f"{_planned(cost['planned'])}; {describe_seconds(cost['seconds'])} of training, all "
        "workers together"
    )
    folder = finished.folder.path
    console.print(f"results  {folder}{_files_in(folder)}", soft_wrap=True)
    if finished.ladder.is_finished:
        console.print(f"next     telescope transfer {folder}", soft_wrap=True)


def _files_in(folder: Path) -> str:
    """The files for people that a results folder has; a driver that was killed wrote none."""
    there = [name for name in ("loss.png", "trials.csv") if (folder / name).is_file()]
    if any((folder / "curves").glob("*.csv")):
        there.append("curves/")
    return f" ({', '.join(there)})" if there else ""


def _answer(finished: Finished, facts: Mapping[str, Any]) -> str:
    """The answer for the target in a sentence, as sure as it is."""
    ladder, target = finished.ladder, facts["target"]
    if ladder.stuck:
        return f"none: stuck: {ladder.stuck}"
    if not ladder.choices:
        return "none yet: no stage has finished"
    text = f"width {target['width']}: {Point.of(target['point'])} (base-width units)"
    if not ladder.is_finished:
        width = ladder.choices[-1].width
        return f"{text}, from width {width} alone so far: the sweep has not finished"
    if finished.certificate is None:
        return f"{text}, not proven: policy {finished.spec.ladder.policy} gives no interval"
    return text if finished.certificate.verdict == "PASS" else f"{text}, not proven"


def _planned(planned: Mapping[str, float] | None) -> str:
    """What the plan had said, where it left room."""
    if planned is None or planned["best"] == planned["worst"]:
        return ""
    low, expected, high = planned["best"], planned["expected"], planned["worst"]
    return f" (planned {low:.2f} to {high:.2f}, {expected:.2f} expected)"


def print_certificate(console: Console, certificate: Certificate) -> None:
    """Print the verdict on an answer, the intervals, and what speaks for and against it."""
    excess, bound = certificate.predicted_excess_loss, certificate.excess_bound
    console.print(
        f"verdict  {certificate.verdict}: predicted excess loss at width {certificate.width} "
        f"{excess:.2%}, at most {bound:.2%} with 90 %",
        style={"PASS": "green", "WARN": "yellow", "FAIL": "red"}[certificate.verdict],
    )
    _print_item(console, "advice", certificate.advice)
    for problem in certificate.problems:
        _print_item(console, "missing" if certificate.verdict != "FAIL" else "against", problem)
    for axis, interval in certificate.intervals.items():
        if interval:
            _print_item(console, "90 %", f"{axis} between {interval[0]:.4g} and {interval[1]:.4g}")
    for text in certificate.evidence:
        _print_item(console, "evidence", text)


def _print_item(console: Console, label: str, text: str) -> None:
    """A labelled line, its continuation indented under the text."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8)
    grid.add_column(overflow="fold")
    grid.add_row(label, text)
    console.print(grid)


def _counts(choice: Choice) -> str:
    """How a stage's trials ended; what did not happen is not said."""
    counts = [
        f"{choice.counts.get(status, 0)} {status}" for status in Status if choice.counts.get(status)
    ]
    return ", ".join(counts)


def show_as_json(finished: Finished) -> dict[str, Any]:
    """The keys of `telescope show --json`."""
    spec, ladder = finished.spec, finished.ladder
    answer = finished.target_point()
    return {
        "name": spec.name,
        "policy": spec.ladder.policy,
        "rule": spec.rule,
        "state": "stuck" if ladder.stuck else "finished" if ladder.is_finished else "unfinished",
        "stuck": ladder.stuck,
        "choices": [_choice_as_json(choice) for choice in ladder.choices],
        "skipped": [{"width": s.width, "reason": s.reason} for s in ladder.skipped],
        "target": {
            "width": spec.target.width,
            "point": answer and dict(answer),
            "lr": answer and answer.get("lr"),
            "weight_decay": answer and answer.get("weight_decay"),
            "certificate": finished.certificate and finished.certificate.as_dict(),
        },
        "cost": finished.cost(),
    }


def _choice_as_json(choice: Choice) -> dict[str, Any]:
    return {
        "width": choice.width,
        "point": dict(choice.point),
        "lr": choice.point.get("lr"),
        "weight_decay": choice.point.get("weight_decay"),
        "loss": choice.loss,
        "intervals": as_json(choice.intervals),
        "at_edge": list(choice.at_edge),
        "reason": choice.reason,
        "trials": {str(status): choice.counts.get(status, 0) for status in Status},
    }


def print_transfer(console: Console, settings: Transfer) -> None:
    """Print the settings for the target run, with what to know about them."""
    steps = f", {settings.steps} steps" if settings.steps else ""
    console.print(f"width {settings.width}{steps}: {settings.point} (base-width units)")
    if settings.groups is not None:
        console.print(_groups_table(settings.groups))
        notes = {g["note"]: g["role"] for g in settings.groups if g["optimizer"] is None}
        for note, role in notes.items():
            console.print(f"{role}: {note}", soft_wrap=True)
    for note in settings.notes:
        console.print(f"note  {note}", soft_wrap=True)
    if settings.certificate is None:
        console.print("note  not proven: no certificate")
    else:
        print_certificate(console, settings.certificate)
        for assumption in settings.certificate.assumptions:
            _print_item(console, "assumed", assumption)
    console.print("`--json` has the names and all keyword arguments")


def _groups_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """One row per (role, shape)."""
    table = _table(
        "role", "shape", "count", "optimizer", "lr", "weight_decay", "init std", "output ×"
    )
    for group in groups:
        table.add_row(
            group["role"],
            "×".join(map(str, group["shape"])),
            str(group["count"]),
            group["optimizer"] or "see note",
            f"{group['lr']:.6g}",
            f"{group['weight_decay']:.6g}",
            "as built" if group["role"] in ("vector", "finite") else f"{group['init_std']:.4g}",
            f"{group['multiplier']:.4g}",
        )
    return table
