"""torchtitan: a function for ``config_registry`` that gives optimizers and schedule."""

from __future__ import annotations

import re
from typing import Any

from telescope.export import python_source as source
from telescope.export.handover import (
    Group,
    Handover,
    check_effect,
    comment,
    decay_of,
    head,
    is_muon,
    logits_by_hand,
    longest,
    mean,
    start_by_hand,
    without_schedule,
)
from telescope.rules.scaling import RMS_MATCH

WRITTEN_FOR = "torchtitan 0.3.0 (components/optimizer, distributed/flex_shard/dist_muon.py)"

OPTIMIZERS = '''\
def optimizers({arguments}):
    """Trainer.Config(optimizer=optimizers({given}), ...)"""
    return OptimizersContainer.Config(
        implementation="foreach",
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=dict(settings))
            for pattern, name, settings in GROUPS
        ],{factory}
    )
'''
FACTORY = """
        optimizer_factory_kwargs_by_name={
            "DistMuon": {
                "bucket_configs": bucket_configs,
                "compute_sharding_by_fqn": compute_sharding_by_fqn,
            }
        },"""
SCHEDULE = '''\
def lr_scheduler():
    """Trainer.Config(lr_scheduler=lr_scheduler(), ...)"""
    return LRSchedulersContainer.Config(**SCHEDULE)
'''


def torchtitan(handover: Handover) -> str:
    """Write a module for config_registry."""
    lr = mean(g["lr"] for g in handover.muon) if handover.muon else 0.0
    decay = mean(decay_of(g) / lr for g in handover.muon) if handover.muon else 0.0
    off = check_effect(handover, "torchtitan", lambda group: effect(group, lr, decay))
    groups = param_groups(handover, lr, decay)
    schedule = scheduler(handover)
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor=f"{lr / handover.transfer.point.lr:.6g} in the lr of DistMuon, its inverse in "
        "weight_decay (match_rms_adamw)"
        if handover.muon
        else "none: AdamW alone",
        schedule=_schedule_line(handover),
        not_expressed=[
            start_by_hand(handover),
            *logits_by_hand(handover),
            "names: the patterns match those of the swept model; torchtitan refuses one that "
            "matches nothing",
            *_of_muon(handover),
            "clipping: set training.max_norm, by default 1; the sweep's trials had none",
        ],
        off=off,
    )
    muon = bool(handover.muon)
    optimizers = OPTIMIZERS.format(
        arguments="bucket_configs, compute_sharding_by_fqn" if muon else "",
        given="..." if muon else "",
        factory=FACTORY if muon else "",
    )
    imports = "from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig\n"
    parts = [comment(lines), source.literal("GROUPS", groups), optimizers]
    if schedule:
        imports = "from torchtitan.components.optimizer import (\n" + "".join(
            f"    {name},\n"
            for name in ("LRSchedulersContainer", "OptimizersContainer", "ParamGroupConfig")
        )
        imports += ")\n"
        parts += [source.literal("SCHEDULE", schedule) + "\n\n" + SCHEDULE]
    return "\n\n".join([parts[0] + imports, *parts[1:]])


def _of_muon(handover: Handover) -> list[str]:
    if not handover.muon:
        return []
    return [
        "bucket_configs and compute_sharding_by_fqn of DistMuon: see torchtitan's "
        "models/kimi_k2_7/config_registry.py; no tensor or pipeline parallelism there"
    ]


def effect(group: Group, lr: float, decay: float) -> tuple[float, float]:
    """Step and decay of a group: DistMuon has one group for all, AdamW as many as there are."""
    if is_muon(group):
        return RMS_MATCH * longest(group) * lr, lr * decay
    return group["lr"], decay_of(group)


def param_groups(handover: Handover, lr: float, decay: float) -> list[tuple[str, str, Any]]:
    """(pattern, optimizer, keyword arguments), the first that matches counts."""
    entries = []
    every = [name for group in handover.groups for name in group["names"]]
    if handover.muon:
        kwargs = handover.muon[0]["kwargs"]
        settings = {
            "lr": lr,
            "weight_decay": decay,
            "momentum": kwargs["momentum"],
            "nesterov": kwargs["nesterov"],
            "ns_coefficients": tuple(kwargs["ns_coefficients"]),
            "eps": kwargs["eps"],
            "ns_steps": kwargs["ns_steps"],
            "adjust_lr_fn": "match_rms_adamw",
            "foreach": False,
        }
        names = [name for group in handover.muon for name in group["names"]]
        entries.append((pattern(names, every), "DistMuon", settings))
    merged: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for group in handover.adamw:
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], **group["kwargs"]}
        merged.setdefault(repr(settings), (settings, []))[1].extend(group["names"])
    return [*entries, *((pattern(n, every), "AdamW", s) for s, n in merged.values())]


def pattern(names: list[str], every: list[str]) -> str:
    r"""A regular expression that matches these names and none of the others.

    The number of a layer is any number, so that the pattern serves a deeper model, unless that
    would take names from others.

    >>> pattern(["a.0.w", "a.1.w"], ["a.0.w", "a.1.w", "a.0.b"])
    '^(?:a\\.\\d+\\.w)$'
    >>> pattern(["a.0.w"], ["a.0.w", "a.1.w"])
    '^(?:a\\.0\\.w)$'
    """
    others = set(every) - set(names)
    parts = []
    for name in names:
        exact = re.escape(name)
        loose = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", exact)
        taken = any(re.fullmatch(loose, other) for other in others)
        parts.append(exact if taken else loose)
    return f"^(?:{'|'.join(dict.fromkeys(parts))})$"


def scheduler(handover: Handover) -> dict[str, Any]:
    """Keyword arguments of LRSchedulersContainer.Config; empty where the schedule is unknown."""
    schedule, steps = handover.transfer.schedule, handover.transfer.steps
    if schedule is None or steps is None:
        return {}
    words: dict[str, Any] = {"warmup_steps": schedule["warmup_steps"], "total_steps": steps}
    match schedule["name"]:
        case "wsd":
            words |= {"decay_ratio": schedule["decay_steps"] / steps, "decay_type": "linear"}
        case "cosine":
            words |= {"decay_ratio": None, "decay_type": "cosine"}
        case _:
            words |= {"decay_ratio": None, "decay_type": "linear"}
    return {**words, "min_lr_factor": schedule["final_lr"]}


def _schedule_line(handover: Handover) -> str:
    schedule = handover.transfer.schedule
    if schedule is None:
        return without_schedule()
    late = "" if schedule["name"] == "constant" else "; its decay begins a step later"
    return f"{schedule['name']}: SCHEDULE has it{late}"
