"""optax: a Python file that makes one gradient transformation of labelled parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from telescope.export import python_source as source
from telescope.export.handover import (
    Handover,
    comment,
    decay_of,
    head,
    is_muon,
    logits_by_hand,
    longest,
    start_by_hand,
    step_of,
    without_schedule,
)

WRITTEN_FOR = "optax 0.2.8 (optax.contrib.muon)"

OPTIMIZER = '''\
def label_of(path):
    """The settings of a parameter; rename in NAMES what your tree calls otherwise."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    found = [label for label, names in NAMES.items() if name in names]
    if not found:
        raise ValueError(f"{name}: no settings; rename it in NAMES")
    return found[0]


def make_optimizer(params):
    """Transformation of a tree of parameters, with the schedule in it."""
    transforms = {}
    for label, (kind, settings) in SETTINGS.items():
        settings = dict(settings)
        peak = settings.pop("learning_rate")
        rate = lambda count, peak=peak: peak * share_of_peak(count)  # noqa: E731
        make = {"muon": optax.contrib.muon, "adamw": optax.adamw}[kind]
        transforms[label] = make(learning_rate=rate, **settings)
    labels = jax.tree_util.tree_map_with_path(lambda path, _: label_of(path), params)
    return optax.partition(transforms, labels)
'''


def optax(handover: Handover) -> str:
    """Write a module with `make_optimizer(params)`."""
    settings, names = labelled(handover)
    factors = sorted({s["consistent_rms"] for kind, s in settings.values() if kind == "muon"})
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor="consistent_rms " + (", ".join(f"{f:.6g}" for f in factors) or "none"),
        schedule=f"{_name(handover)}: share_of_peak has it, in optax's own schedules",
        not_expressed=[
            start_by_hand(handover),
            *logits_by_hand(handover),
            "the names of your tree: NAMES has those of the swept model, joined by dots",
            "stacks of layers (scan): optax.contrib.muon takes each leaf as one matrix",
            "the first steps as torch takes them: optax corrects Muon's momentum for its start",
        ],
    )
    parts = [
        comment(lines) + "import jax\nimport optax\nimport optax.contrib\n",
        source.literal("SETTINGS", settings) + "\n" + source.literal("NAMES", names),
        *(_share(handover), OPTIMIZER),
    ]
    return "\n\n".join(parts)


def labelled(
    handover: Handover,
) -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, list[str]]]:
    """Label → class and settings, and label → names; groups with the same settings share one."""
    lr = handover.transfer.point.lr
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    names: dict[str, list[str]] = {}
    for group in handover.groups:
        kind = "muon" if is_muon(group) else "adamw"
        of = _muon(group, lr) if is_muon(group) else _adamw(group)
        known = next((label for label, entry in settings.items() if entry == (kind, of)), None)
        if known is None:
            taken = sum(entry[0] == kind for entry in settings.values())
            known = f"{kind}_{taken + 1}" if taken else kind
            settings[known] = (kind, of)
        names.setdefault(known, []).extend(group["names"])
    return settings, names


def _muon(group: Mapping[str, Any], lr: float) -> dict[str, Any]:
    kwargs = group["kwargs"]
    return {
        "learning_rate": lr,
        # Rounded, so that shapes whose numbers differ by rounding alone share their settings.
        "consistent_rms": _rounded(step_of(group) / longest(group) / lr),
        "weight_decay": _rounded(decay_of(group) / lr),
        "beta": kwargs["momentum"],
        "nesterov": kwargs["nesterov"],
        "ns_steps": kwargs["ns_steps"],
        "eps": kwargs["eps"],
    }


def _adamw(group: Mapping[str, Any]) -> dict[str, Any]:
    b1, b2 = group["kwargs"]["betas"]
    return {
        "learning_rate": group["lr"],
        "weight_decay": _rounded(group["weight_decay"]),
        "b1": b1,
        "b2": b2,
        "eps": group["kwargs"]["eps"],
        "nesterov": False,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def _name(handover: Handover) -> str:
    schedule = handover.transfer.schedule
    return str(schedule["name"]) if schedule else without_schedule()


def _share(handover: Handover) -> str:
    """Source of the schedule, from the count of steps to the share of the peak."""
    schedule, steps = handover.transfer.schedule, handover.transfer.steps
    if schedule is None or steps is None:
        return source.share_of_peak(None, None)
    warmup, final = schedule["warmup_steps"], schedule["final_lr"]
    start = max(warmup - 1, 0)
    left = max(steps - 1 - start, 1)
    parts, ends = [], []
    if warmup > 1:
        parts.append(f"optax.linear_schedule({1 / warmup!r}, 1.0, {start})")
        ends.append(start)
    match schedule["name"]:
        case "constant":
            parts.append("optax.constant_schedule(1.0)")
        case "cosine":
            parts.append(f"optax.cosine_decay_schedule(1.0, {left}, alpha={final!r})")
        case _:
            begin = max(steps - 1 - schedule["decay_steps"], warmup - 1)
            decay = max(steps - 1 - begin, 1)
            parts.append(f"optax.linear_schedule(1.0, {final!r}, {decay}, {begin - start})")
    lines = ["share_of_peak = optax.join_schedules(", "    ["]
    lines += [f"        {part}," for part in parts]
    return "\n".join([*lines, "    ],", f"    {ends},", ")", ""])
