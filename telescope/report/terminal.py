"""The tables on the terminal, and the same facts with the keys of `show --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from telescope.records import Certificate, Choice, Status, as_json
from telescope.report.live import describe_seconds
from telescope.report.status import describe_targets, targets_of
from telescope.report.verdict import (
    WORDS,
    caveat,
    confirming,
    describe_certificate,
    describe_judgement,
    describe_loss,
    percent,
)

if TYPE_CHECKING:
    from telescope.answer.finished import Finished
    from telescope.check.verdict import CoordCheck
    from telescope.ladder.audit import Audit
    from telescope.spec.spec import Spec
    from telescope.transfer.settings import Transfer


LEFT = ("why", "point", "role", "grid", "trials", "quantity", "verdict", "sweep", "state", "answer")
"""Columns of words; the others are numbers, which never break over two lines."""
WRAPPED = ("why", "grid")
"""Columns of sentences, which may break and get at least `SENTENCE` characters."""
ANSWER = "answer"
"""The column of points; in a table that is still too wide, each axis gets a line of its own."""
SENTENCE = 24


def print_table(
    console: Console,
    columns: Mapping[str, Sequence[str]],
    *,
    expendable: Sequence[str] = (),
    styles: Sequence[str | None] = (),
) -> None:
    """Print a table; leave out columns for which the screen is too narrow.

    Args:
        console: the console to print on.
        columns: heading → cells.
        expendable: headings that may be left out, the least important first.
        styles: the style of each row; by default none.
    """
    kept, dropped = dict(columns), []
    for name in expendable:
        if _width_of(kept) > console.width and name in kept:
            del kept[name]
            dropped.append(name)
    if _width_of(kept) > console.width and ANSWER in kept:
        kept[ANSWER] = [cell.replace(", ", ",\n") for cell in kept[ANSWER]]
    fits = _width_of(kept) <= console.width  # if not, break words, or rich would cut them silently
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in kept:
        wraps = name in WRAPPED
        justify: Literal["left", "right"] = "left" if name in LEFT else "right"
        table.add_column(name, justify=justify, no_wrap=fits and not wraps, overflow="fold")
    for number, row in enumerate(zip(*kept.values(), strict=True)):
        table.add_row(*row, style=styles[number] if styles else None)
    console.print()
    console.print(table)
    if dropped:
        console.print(f"not shown at this width: {', '.join(dropped)}", style="dim")
    console.print()


def _width_of(columns: Mapping[str, Sequence[str]]) -> int:
    """Return the number of characters that a table needs."""
    each = (
        min(longest, SENTENCE) if name in WRAPPED else longest
        for name, cells in columns.items()
        for longest in [max(len(line) for cell in (name, *cells) for line in cell.split("\n"))]
    )
    return sum(each) + 2 * (len(columns) - 1)


def print_plan(console: Console, plan: Mapping[str, Any], warning: str | None) -> None:
    """Print the plan of a sweep with its cost.

    Args:
        console: the console to print on.
        plan: the keys of `plan --json`.
        warning: the reason that `run` would refuse it, or None.
    """
    columns = _stage_columns(plan["stages"])
    print_table(console, columns, expendable=("of which optimizer", "tokens"))
    target, seconds = plan["target"], plan["seconds"]
    print_item(console, "target", f"width {target['width']}, {_target_facts(target)}")
    _print_planned_cost(console, plan)
    about = "" if seconds["estimate"] is None else "about "
    time = f"{about}{describe_seconds(seconds['estimate'])} ({seconds['basis']})"
    print_item(console, "time", time)
    if devices := plan.get("devices"):
        _print_devices(console, devices)
    for key, seconds in (plan.get("arithmetic") or {}).items():
        print_item(console, "probe", f"{key}, ms per step: {_in_both(seconds)}")
    if note := plan.get("data", {}).get("note"):
        print_item(console, "data", note, "yellow")
    for note in plan.get("notes", ()):
        print_item(console, "note", note, "yellow")
    if warning:
        console.print(f"`run` would refuse: {warning}", style="yellow")


def _print_devices(console: Console, devices: Mapping[str, Any]) -> None:
    """Print the memory of a device of the target run, and the run's time."""
    size = {key: f"{value / 1e9:.3g} GB" for key, value in devices["bytes"].items() if value}
    number, precision = devices["number"], devices["precision"]
    casts = f", {size['casts']} of bf16 copies" if precision == "bf16" else ""
    recomputed = size.get("per_sequence_recomputed")
    twice = f", {recomputed} with --activation-checkpointing" if recomputed else ""
    held = (
        f"{size['parameters']} of parameters, {size['gradients']} of gradients, "
        f"{size['optimizer_state']} of optimizer state{casts}; and {size['per_sequence']} for "
        f"each sequence of a micro-batch{twice}"
    )
    print_item(console, "devices", f"each of {number} in {precision}: {held}")
    divided = sum(devices["bytes"][key] for key in ("parameters", "gradients")) / number
    if number > 1:
        print_item(console, "", f"with --shard {divided / 1e9:.3g} GB of the first two")
    time = describe_seconds(devices["seconds"])
    print_item(console, "", f"the target run takes {time} ({devices['basis']})")


def _in_both(seconds: Mapping[str, Mapping[int, float]]) -> str:
    """Describe the time of a step in each arithmetic at each width."""
    return "; ".join(
        f"{arithmetic} "
        + ", ".join(f"{1000 * taken:.3g} at width {width}" for width, taken in by_width.items())
        for arithmetic, by_width in seconds.items()
    )


def _stage_columns(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the columns of the plan's table, with one row per width."""
    flops = [stage["flops"] for stage in stages]
    return {
        "width": [str(stage["width"]) for stage in stages],
        "parameters": [_number(stage["parameters"], ",.0f") for stage in stages],
        "grid": [
            " × ".join(f"{count} {axis}" for axis, count in stage["points"].items() if count > 1)
            or "1"
            for stage in stages
        ],
        "trials": [str(stage["trials"]) for stage in stages],
        "tokens": [_number(stage["tokens"]) for stage in stages],
        "FLOPs": [_number(cost["total"]) for cost in flops],
        "of which optimizer": [
            f"{cost['optimizer'] / cost['total']:.0%}" if cost["optimizer"] else "–"
            for cost in flops
        ],
    }


def _target_facts(target: Mapping[str, Any]) -> str:
    """Describe the known facts of the target run: parameters, tokens, FLOPs."""
    known = [
        _number(target["parameters"], ",.0f", " parameters"),
        _number(target["tokens"], unit=" tokens"),
        _number(target["flops"], unit=" FLOPs"),
    ]
    whole, active = target["parameters_without_embeddings"], target["active_parameters"]
    if active != whole:
        known.insert(1, f"{whole:,.0f} without embeddings, {active:,.0f} of these for each token")
    return ", ".join(fact for fact in known if fact != "–")


def _print_planned_cost(console: Console, plan: Mapping[str, Any]) -> None:
    """Print the sweep's cost as a multiple of the target run's, with its range."""
    adaptive = plan["policy"] == "adaptive"
    flops = _number(plan["sweep_flops"], unit=" FLOPs: ") if plan["sweep_flops"] else ""
    expected = " expected" if adaptive else ""
    print_item(console, "cost", f"{flops}{plan['sweep_over_target']:.2f} target runs{expected}")
    if adaptive:
        low, high = plan["range"]["best"], plan["range"]["worst"]
        print_item(
            console,
            "",
            f"{low:.2f} at best, {high:.2f} at worst; what is expected is the middle of three "
            "simulated sweeps",
        )


def _number(value: float | None, form: str = ".3g", unit: str = "") -> str:
    """Format a number with its unit; an unknown one is a dash."""
    return "–" if value is None else f"{value:{form}}{unit}"


def print_check(console: Console, check: CoordCheck, title: str) -> None:
    """Print the slopes of the coordinate check, each with the sizes that it was fitted to."""
    steps = ", ".join(map(str, check.steps))
    console.print(f"{title}, {check.point}: {len(check.seeds)} seeds, after steps {steps}")
    shown = check.shown()
    rows = {name: check.sizes[name][check.slope_steps[name]] for name in shown}
    columns = {
        "quantity": list(shown),
        "step": [str(check.slope_steps[name]) for name in shown],
        **{
            f"width {width}": [f"{sizes[number]:.3g}" for sizes in rows.values()]
            for number, width in enumerate(check.widths)
        },
        "slope": [_slope_of(check, name) for name in shown],
        "verdict": [_verdict_on(check, name) for name in shown],
    }
    inner = [f"width {width}" for width in check.widths[1:-1]]
    print_table(
        console,
        columns,
        expendable=("step", *inner, f"width {check.widths[0]}", f"width {check.widths[-1]}"),
        styles=["red" if name in check.problems else None for name in shown],
    )
    if len(shown) < len(check.slopes):
        console.print(
            f"the steepest of each kind of {len(check.slopes)} quantities; --json has all"
        )
    print_item(
        console,
        "slope",
        "of log2 size against log2 width ± its standard error, after the surest step; FAIL where "
        f"it is beyond ±{check.threshold:g} by two errors, uncertain where those reach across it",
    )
    if check.unwatched:
        console.print(
            f"not watched one by one: {', '.join(check.unwatched)}: no module around them gives "
            "a tensor every time",
            soft_wrap=True,
        )

    if check.blind_spot:
        print_item(console, "warning", check.blind_spot)


def _slope_of(check: CoordCheck, name: str) -> str:
    slope = check.slopes[name]
    # Rounded first and added to 0.0, so that none is shown as -0.00.
    return "–" if slope is None else f"{round(slope, 2) + 0.0:+.2f} ± {check.errors[name]:.2f}"


def _verdict_on(check: CoordCheck, name: str) -> str:
    """Return the check's verdict on one quantity; "" if its slope is flat."""
    if name in check.problems:
        return "FAIL"
    if check.slopes[name] is None:
        return "not moved"
    return "uncertain" if name in check.uncertain else ""


def print_answer(console: Console, finished: Finished, settings: Transfer | None = None) -> None:
    """Print the choice per width, the answer for the target, and the sweep's cost.

    Args:
        console: the console to print on.
        finished: the sweep.
        settings: the answer as torch settings, printed too if given.
    """
    choices = finished.ladder.choices
    columns = {
        "width": [str(choice.width) for choice in choices],
        "trials": [_counts(choice) for choice in choices],
        **{
            axis.name: [f"{choice.point[axis.name]:.4g}" for choice in choices]
            for axis in finished.spec.ladder_spec.axes
        },
        "loss": [f"{choice.loss:.4f}" for choice in choices],
        "why": [choice.reason for choice in choices],
    }
    fixed = [axis.name for axis in finished.spec.ladder_spec.axes if axis.is_fixed]
    print_table(console, columns, expendable=(*fixed, "trials"))
    if settings and settings.groups is not None:
        console.print(f"for torch.optim at width {settings.width}:")
        _print_groups(console, settings.groups, settings.starts)
    facts = show_as_json(finished)
    for skipped in finished.ladder.skipped:
        print_item(console, "skipped", f"width {skipped.width}: {skipped.reason}")
    print_item(console, "answer", _answer(finished, facts))
    if finished.certificate:
        print_certificate(console, finished.certificate, finished.spec, confirming(finished))
    for judgement in finished.judgements:
        print_item(console, "judged", describe_judgement(judgement))
    cost = facts["cost"]
    flops = _number(cost["flops"], unit=" FLOPs, ") if cost["flops"] is not None else ""
    print_item(
        console,
        "cost",
        f"{flops}{cost['over_target']:.2f} target runs{_planned(cost['planned'])}; "
        f"{describe_seconds(cost['seconds'])} of training, all workers together",
    )
    folder = finished.folder.path
    console.print(f"results    {folder}{_files_in(folder)}", soft_wrap=True)
    for line in describe_targets(facts.get("targets", ())):
        console.print(f"{'target':{LABEL}} {line.removeprefix('target ')}", soft_wrap=True)
    if finished.ladder.is_finished:
        console.print(f"next       telescope transfer {folder}", soft_wrap=True)


def _files_in(folder: Path) -> str:
    """Name the files for people in a results folder; a killed driver has written none."""
    there = [name for name in ("loss.png", "trials.csv") if (folder / name).is_file()]
    if any((folder / "curves").glob("*.csv")):
        there.append("curves/")
    return f" ({', '.join(there)})" if there else ""


def _answer(finished: Finished, facts: Mapping[str, Any]) -> str:
    """State the answer for the target in a sentence, with its caveat."""
    ladder, target, but = finished.ladder, facts["target"], caveat(finished)
    if ladder.stuck:
        return f"{but}: {ladder.stuck}"
    if not ladder.choices:
        return but
    tuned = {axis.name for axis in finished.spec.ladder_spec.swept}
    values = ", ".join(
        f"{axis} {value:.4g}{'' if axis in tuned else ' (not tuned)'}"
        for axis, value in target["point"].items()
    )
    text = f"width {target['width']}: {values} (base-width units)"
    return f"{text}, {but}" if but else text


def _planned(planned: Mapping[str, float] | None) -> str:
    """Describe the planned cost, if the plan gave a range."""
    if planned is None or planned["best"] == planned["worst"]:
        return ""
    low, expected, high = planned["best"], planned["expected"], planned["worst"]
    return f" (planned {low:.2f} to {high:.2f}, {expected:.2f} expected)"


STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}


def print_certificate(
    console: Console, certificate: Certificate, spec: Spec, confirm: str | None = None
) -> None:
    """Print the verdict on an answer, the intervals, and what speaks for and against it.

    Args:
        console: the console to print on.
        certificate: the verdict.
        spec: the sweep's spec, for the goal and the axes that were not tuned.
        confirm: the command that would confirm the answer, from `confirming`.
    """
    style = STYLES[certificate.verdict]
    print_item(console, "verdict", describe_certificate(certificate, spec.ladder.tolerance), style)
    if certificate.verdict == "FAIL":
        print_item(console, "advice", certificate.advice)
    for problem in certificate.problems:
        print_item(console, "against" if certificate.verdict == "FAIL" else "to confirm", problem)
    if confirm:
        console.print(f"{'':{LABEL}} {confirm}", soft_wrap=True)
    for axis, interval in certificate.intervals.items():
        if interval:
            print_item(console, "90 %", f"{axis} between {interval[0]:.4g} and {interval[1]:.4g}")
        elif spec.axes[axis].value is not None:
            print_item(console, "not tuned", f"{axis} is fixed at {spec.axes[axis].value:.4g}")
    if loss := describe_loss(certificate):
        print_item(console, "loss", loss)
    for text in certificate.evidence:
        print_item(console, "evidence", text)


LABEL = 10
"""Width of the label at the start of a line of an answer, characters."""
GLUE = "\ue000"
"""Keeps a number and its per cent on one line; rich would break at a no-break space."""


def print_item(console: Console, label: str, text: str, style: str | None = None) -> None:
    """Print a labelled line, with its continuation indented under the text."""
    whole = Text(text.replace(" %", f"{GLUE}%"))
    first, *rest = whole.wrap(console, max(console.width - LABEL - 1, SENTENCE))
    for start, line in [(label, first), *(("", line) for line in rest)]:
        shown = line.plain.rstrip().replace(GLUE, " ")
        console.print(f"{start:{LABEL}} {shown}", style=style, soft_wrap=True)


def _counts(choice: Choice) -> str:
    """Count a stage's trials by outcome, without outcomes that did not occur."""
    counts = [
        f"{choice.counts.get(status, 0)} {status}" for status in Status if choice.counts.get(status)
    ]
    return ", ".join(counts)


def show_as_json(finished: Finished) -> dict[str, Any]:
    """Return the keys of `telescope show --json`."""
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
        **targets_of(finished.folder.path),
        **({"judged": [run.as_dict() for run in runs]} if (runs := finished.judgements) else {}),
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


def print_audit(console: Console, audit: Audit, folder: Path) -> None:
    """Print the finding of an audit.

    Args:
        console: the console to print on.
        audit: the finding.
        folder: where its trials are.
    """
    points = [audit.point, *(neighbour.point for neighbour in audit.neighbours)]
    rows = audit.neighbours
    columns = {
        "point": ["answer", *map(str, rows)],
        **{axis: [f"{point[axis]:.4g}" for point in points] for axis in audit.point},
        "trials": [str(audit.answered), *(str(row.trials) for row in rows)],
        "loss above the answer's": ["0", *(row.costs for row in rows)],
    }
    print_table(console, columns)
    print_item(console, "audit", audit.sentence, AUDIT_STYLES.get(audit.verdict))
    if audit.loss is not None:
        seeds = ", ".join(map(str, audit.seeds))
        noise = "" if audit.noise is None else f"; noise {percent(audit.noise)} of a paired trial"
        print_item(console, "measured", f"seeds {seeds}: the answer has {audit.loss:.4f}{noise}")
    if failed := audit.counts.get(Status.FAILED):
        print_item(console, "failed", f"{failed} trials; the same command tries them again", "red")
    console.print(f"results    {folder} (trials.csv, curves/)", soft_wrap=True)


AUDIT_STYLES = {"held": "green", "broken": "red", "open": "yellow"}


def print_transfer(console: Console, settings: Transfer, spec: Spec) -> None:
    """Print the settings for the target run, with notes, verdict and assumptions."""
    steps = f", {settings.steps} steps" if settings.steps else ""
    console.print(f"width {settings.width}{steps}: {settings.point} (base-width units)")
    if settings.groups is not None:
        _print_groups(console, settings.groups, settings.starts)
        notes = {g["note"]: g["role"] for g in settings.groups if g["optimizer"] is None}
        for note, role in notes.items():
            print_item(console, role, note)
    else:
        print_item(
            console,
            "groups",
            "none, as the shapes of the parameters are not known. Give the values above to the "
            "trainer as its trials got them: it converts them to the width; or give the shapes "
            "with --shapes FILE, and get what torch.optim takes",
        )
    for note in settings.notes:
        print_item(console, "note", note)
    if settings.certificate is None:
        print_item(console, "note", "not proven: no certificate")
    else:
        print_certificate(console, settings.certificate, spec)
        for assumption in settings.certificate.assumptions:
            print_item(console, "assumed", assumption)
    if settings.groups is not None:
        console.print("`--json` has the names and all keyword arguments")


def _print_groups(
    console: Console, groups: Sequence[Mapping[str, Any]], starts: Sequence[str]
) -> None:
    """One row per group."""
    columns = {
        "role": [group["role"] for group in groups],
        "shape": ["×".join(map(str, group["shape"])) for group in groups],
        "count": [str(group["count"]) for group in groups],
        "optimizer": [group["optimizer"] or "see note" for group in groups],
        "lr": [f"{group['lr']:.6g}" for group in groups],
        "weight_decay": [f"{group['weight_decay']:.6g}" for group in groups],
        "init std": list(starts),
        "output ×": [f"{group['multiplier']:.4g}" for group in groups],
    }
    print_table(console, columns, expendable=("count", "output ×", "init std"))


def print_sweeps(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of `ls`, with one row per sweep."""
    ages = [row["age_seconds"] for row in rows]
    columns = {
        "sweep": [row["name"] for row in rows],
        "state": [_state(row) for row in rows],
        "answer": [_point(row) for row in rows],
        "verdict": [WORDS.get(row["verdict"], "–") for row in rows],
        "cost": [_number(row["over_target"], ".2f", " target runs") for row in rows],
        "age": ["–" if age is None else describe_seconds(max(age, 0.0)) for age in ages],
    }
    print_table(console, columns, expendable=("cost", "age", "state", "verdict"))
    for row in rows:
        if row["problem"]:
            console.print(f"{row['name']}: {row['problem']}", style="red", soft_wrap=True)


def _state(row: Mapping[str, Any]) -> str:
    if row["state"] in ("finished", "stuck") or row["done"] is None:
        return str(row["state"])
    return f"{row['state']}, {row['done']} of {row['total']}"


def _point(row: Mapping[str, Any]) -> str:
    if not row["answer"]:
        return "–"
    values = ", ".join(f"{axis} {value:.4g}" for axis, value in row["answer"].items())
    return f"{values} at {row['width']}"


def print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """Print the table of `compare`, one row per sweep, and the settings that differ."""
    rows = comparison["sweeps"]
    names = [row["name"] for row in rows]
    labels = [row["name"] if names.count(row["name"]) == 1 else row["path"] for row in rows]
    widths = sorted({int(width) for row in rows for width in row["losses"]})
    excess = [row["predicted_excess_loss"] for row in rows]
    columns = {
        "sweep": labels,
        **{
            f"loss at {width}": [_number(row["losses"].get(str(width)), ".4f") for row in rows]
            for width in widths
        },
        "answer": [_point(row) for row in rows],
        "verdict": [WORDS.get(row["verdict"], "–") for row in rows],
        "expected excess": ["–" if share is None else percent(share) for share in excess],
        "cost": [_number(row["over_target"], ".2f") for row in rows],
    }
    narrow = [f"loss at {width}" for width in widths[:-1]]
    print_table(console, columns, expendable=("cost", "expected excess", *narrow, "verdict"))
    for key, values in comparison["differing"].items():
        shown = ", ".join(f"{name} {v}" for name, v in zip(labels, values, strict=True))
        print_item(console, "differs", f"{key}: {shown}")
    if not comparison["data_seen"]:
        print_item(
            console, "note", "whether other trainers measure on the same data is not known here"
        )


def print_result(console: Console, result: Mapping[str, Any], folder: Path) -> None:
    """Print the end of a target run.

    Args:
        console: the console to print on.
        result: the content of its `result.json`.
        folder: the run's.
    """
    if result["diverged"]:
        print_item(console, "diverged", result["reason"], "red")
    else:
        after = f" after {result['steps']} steps" if result["steps"] else ""
        loss = f"held-out loss {result['loss']:.4f}{after}"
        print_item(console, "target", f"width {result['width']}: {loss}")
    speed = _number(result["tokens_per_second"], ",.0f", " tokens/s")
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    took = describe_seconds(result["seconds"])
    if result["ranks"]:
        ranks = "1 rank" if result["ranks"] == 1 else f"{result['ranks']} ranks"
        took += f" on {ranks} of {result['device']}: {speed}{mfu}"
    print_item(console, "time", took)
    console.print(f"{'results':{LABEL}} {folder} (curve.csv, checkpoints/)", soft_wrap=True)
