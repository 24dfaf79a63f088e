"""Megatron-LM and Megatron-Bridge: one set of numbers in two spellings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from telescope.export.handover import (
    Group,
    Handover,
    check_effect,
    comment,
    decay_of,
    head,
    is_muon,
    longest,
    mean,
    odd_by_hand,
    odd_matrices,
    other_eps,
    refuse_unless,
    start_by_hand,
    step_of,
    without_schedule,
)
from telescope.rules.scaling import Role

WRITTEN_FOR = (
    "Megatron-LM main of August 2026, with Muon under muP (pull request 3715); megatron-core "
    "0.16.1 has no muP"
)
BRIDGE = (
    "Megatron-Bridge main of August 2026 on a Megatron-LM with Muon under muP (pull request 3715)"
)
TABLES = ("embedding", "readout", "tied")
"""Roles that ``--decoupled-lr`` is for, and that muP leaves at the base lr."""
NEVER_DECAYS = ("vector", "finite")
"""Roles with one side: Megatron sets their weight decay to 0."""


@dataclass(frozen=True)
class Numbers:
    """The numbers passed to Megatron; see `numbers`."""

    lr: float
    tables_lr: float | None
    """Of embedding and output alone; None where it is `lr`."""
    weight_decay: float
    extra_scale: float
    """Factor of √max(out,in) in Muon's step."""
    hidden_lr: float
    """Learning rate to which muP scales `lr`, for hidden matrices that AdamW trains."""
    use_mup: bool


def megatron(handover: Handover) -> str:
    """Write the arguments, a line for each, with comments that a shell passes over."""
    told = numbers(handover, "megatron")
    off = check_effect(handover, "megatron", lambda group: effect(group, told))
    rows = [*_optimizer(handover, told), *_schedule(handover, told), *_mup(handover, told)]
    text = "".join(
        f"--{flag}\n" if value is True else f"--{flag} {value}\n"
        for flag, value in rows
        if value is not False
    )
    use = ["pass them as $(grep -v '^#' FILE)"]
    return comment([*_head(handover, told, WRITTEN_FOR, off), *use]) + text


def megatron_bridge(handover: Handover) -> str:
    """Write the overrides, a line for each; the scheduler's decay wins over the optimizer's."""
    told = numbers(handover, "megatron-bridge")
    off = check_effect(handover, "megatron-bridge", lambda group: effect(group, told))
    rows = [
        *_in_bridge("optimizer", _optimizer(handover, told)),
        # Written to every group at every step, over optimizer.weight_decay; recipes preset them.
        ("scheduler.start_weight_decay", told.weight_decay),
        ("scheduler.end_weight_decay", told.weight_decay),
        ("scheduler.weight_decay_incr_style", "constant"),
        *_in_bridge("scheduler", _schedule(handover, told)),
        *_in_bridge("model", _mup(handover, told)),
    ]
    text = "".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}\n" for key, value in rows
    )
    use = ["pass them as $(grep -v '^#' FILE)"]
    return comment([*_head(handover, told, BRIDGE, off), *use]) + text


def numbers(handover: Handover, format: str) -> Numbers:
    """The numbers that say the most.

    Weight decay is one for all, so it is that of embedding and output. Muon's decay per step, lr ·
    weight_decay, then gives lr, and its step the extra scale factor; ``--decoupled-lr`` lets
    embedding and output have theirs. Norms have no lr of their own.
    """
    config = handover.optimizer
    tables = [g for g in handover.adamw if g["role"] in TABLES]
    others = [g for g in handover.adamw if g["role"] not in TABLES and not _is_hidden(g)]
    use_mup = config.rule != "standard" and not math.isclose(handover.r, 1)
    use_mup = use_mup and (handover.multiplier != 1 or not handover.muon)
    if not handover.muon:
        lr = mean(g["lr"] for g in [*tables, *others] or handover.groups)
        by = 1 / handover.r if use_mup else 1.0
        decays = [
            decay_of(g) / (lr * (by if _is_hidden(g) else 1))
            for g in handover.groups
            if g["role"] not in NEVER_DECAYS
        ]
        return Numbers(lr, None, mean(decays or [0.0]), 1.0, lr * by, use_mup)
    refuse_unless(
        handover,
        format,
        (len({g["kwargs"]["momentum"] for g in handover.muon}) == 1, "it has one momentum"),
    )
    tables_lr = mean(g["lr"] for g in tables or others or handover.muon)
    weight_decay = mean(g["weight_decay"] for g in tables or others or handover.muon)
    by_decay = [decay_of(g) / weight_decay for g in handover.muon] if weight_decay else [tables_lr]
    lr = mean(by_decay)
    lr = tables_lr if math.isclose(lr, tables_lr) else lr
    extra = mean(step_of(g) / longest(g) / lr for g in handover.muon)
    own = tables_lr if tables and tables_lr != lr else None
    return Numbers(lr, own, weight_decay, extra, lr, use_mup)


def effect(group: Group, told: Numbers) -> tuple[float, float | None]:
    """Step and decay of a group by Megatron's formula."""
    if is_muon(group):
        return told.extra_scale * longest(group) * told.lr, told.lr * told.weight_decay
    if group["role"] in NEVER_DECAYS:
        return told.lr, None
    lr = told.lr
    if group["role"] in TABLES and told.tables_lr is not None:
        lr = told.tables_lr
    elif _is_hidden(group):
        lr = told.hidden_lr
    return lr, lr * told.weight_decay


def _is_hidden(group: Group) -> bool:
    return Role(group["role"]).is_hidden


Rows = list[tuple[str, Any]]
"""Flag, without its dashes, and value."""


def _optimizer(handover: Handover, told: Numbers) -> Rows:
    config, schedule = handover.optimizer, handover.transfer.schedule
    final = schedule["final_lr"] if schedule else None
    rows: Rows = [("optimizer", "muon" if handover.muon else "adam"), ("lr", told.lr)]
    if final is not None:
        rows.append(("min-lr", told.lr * final))
    if told.tables_lr is not None:
        rows.append(("decoupled-lr", told.tables_lr))
        rows += [("decoupled-min-lr", told.tables_lr * final)] if final is not None else []
    rows.append(("weight-decay", told.weight_decay))
    if handover.muon:
        rows += [
            ("muon-scale-mode", "spectral"),
            ("muon-extra-scale-factor", told.extra_scale),
            ("muon-momentum", config.momentum),
            ("muon-nesterov", config.nesterov),
            ("muon-num-ns-steps", config.ns_steps),
            ("muon-coefficient-type", "quintic"),
            ("muon-scalar-optimizer", "adam"),
        ]
    (b1, b2), eps = config.betas, config.eps
    rows += [("adam-beta1", b1), ("adam-beta2", b2), ("adam-eps", eps)]
    return [*rows, ("clip-grad", 0.0)] if schedule else rows


def _schedule(handover: Handover, told: Numbers) -> Rows:
    schedule, steps = handover.transfer.schedule, handover.transfer.steps
    if schedule is None:
        return []
    style = {"wsd": "WSD"}.get(schedule["name"], schedule["name"])
    rows: Rows = [
        ("train-iters", steps),
        ("lr-decay-style", style),
        ("lr-warmup-iters", schedule["warmup_steps"]),
        # Megatron wants it above the warm-up; a run that only warms up never gets there.
        ("lr-decay-iters", max(steps, schedule["warmup_steps"] + 1)),
    ]
    if style == "WSD":
        rows += [("lr-wsd-decay-style", "linear")]
        rows += [("lr-wsd-decay-iters", schedule["decay_steps"])]
    return rows


def _mup(handover: Handover, told: Numbers) -> Rows:
    if not told.use_mup:
        return []
    return [
        ("use-mup", True),
        ("mup-base-hidden-size", handover.base_width),
        ("mup-attn-scale-power", 0.5),
    ]


def _in_bridge(section: str, rows: Rows) -> Rows:
    """Megatron's flags as fields of a section of Megatron-Bridge's configuration."""
    moved = {"train-iters": "train.train_iters"}
    return [(moved.get(flag, f"{section}.{flag.replace('-', '_')}"), value) for flag, value in rows]


def _head(handover: Handover, told: Numbers, written_for: str, off: list[str]) -> list[str]:
    """The lines above the settings."""
    m, has_mup = handover.multiplier, told.use_mup
    by_hand = [
        start_by_hand(handover),
        "decay on norm gains and biases: Megatron does not decay them",
        *odd_by_hand(handover),
        *other_eps(handover),
    ]
    if handover.muon:
        by_hand.append(
            "Muon on the fused QKV: Megatron splits it into query, key and value, which are the "
            "shapes here; Torch- and Megatron-FSDP do not go with its Muon"
        )
    if m != 1 and not (has_mup and math.isclose(m, 1 / handover.r)):
        own = 1 / handover.r if has_mup else 1
        by_hand.append(f"the logits × {m:.6g}: Megatron's own factor is {own:g}")
    if has_mup and not handover.muon:
        by_hand.append("adam_eps of hidden matrices: Megatron's muP divides it by r")
        if names := odd_matrices(handover):
            by_hand.append(f"the lr of {', '.join(names)}: Megatron's muP may divide it by r")
    return head(
        handover,
        written_for=written_for,
        factor=f"muon-extra-scale-factor {told.extra_scale:.6g}"
        if handover.muon
        else f"{told.hidden_lr / told.lr:g} in the lr of hidden matrices, by Megatron's muP",
        schedule=_schedule_line(handover.transfer.schedule),
        not_expressed=by_hand,
        off=off,
    )


def _schedule_line(schedule: Mapping[str, Any] | None) -> str:
    if schedule is None:
        return without_schedule()
    return f"{schedule['name']}: lr-decay-style and what goes with it; its warm-up starts from 0"
