"""MaxText: keys of its YAML configuration."""

from __future__ import annotations

import math
from typing import Any

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
    odd_by_hand,
    other_eps,
    refuse_unless,
    share_of_run,
    start_by_hand,
    step_of,
    without_schedule,
    yaml_rows,
)

WRITTEN_FOR = "MaxText of August 2026 (src/maxtext/configs/base.yml), with optax 0.2.8"
OPTAXS_EPS = 1e-8
"""MaxText does not pass adam_eps to optax.contrib.muon."""


def maxtext(handover: Handover) -> str:
    """Write the YAML keys of optimizer and schedule."""
    keys = settings(handover)
    off = check_effect(handover, "maxtext", lambda group: effect(group, keys))
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor=f"muon_consistent_rms {keys['muon_consistent_rms']:.6g}"
        if handover.muon
        else "none: AdamW alone",
        schedule=_schedule_line(handover),
        not_expressed=[
            start_by_hand(handover),
            *logits_by_hand(handover),
            *odd_by_hand(handover),
            *_traps(handover),
            *other_eps(handover),
        ],
        off=off,
    )
    return comment(lines) + yaml_rows(keys) + _schedule(handover)


def settings(handover: Handover) -> dict[str, Any]:
    """The optimizer's keys: one lr for both optimizers, a decay for each."""
    config = handover.optimizer
    lr = mean(g["lr"] for g in handover.adamw) if handover.adamw else handover.transfer.point.lr
    keys: dict[str, Any] = {"opt_type": "muon" if handover.muon else "adamw", "learning_rate": lr}
    if handover.muon:
        refuse_unless(
            handover,
            "maxtext",
            (config.nesterov, "its Muon always uses Nesterov momentum; optimizer.nesterov is off"),
            (config.ns_steps == 5, f"its Muon takes 5 Newton–Schulz steps, not {config.ns_steps}"),
        )
        keys["muon_consistent_rms"] = mean(step_of(g) / longest(g) / lr for g in handover.muon)
        keys["muon_weight_decay"] = mean(decay_of(g) / lr for g in handover.muon)
        keys["muon_beta"] = config.momentum
    keys["adam_b1"], keys["adam_b2"] = config.betas
    keys["adam_eps"] = config.eps
    decays = [decay_of(group) / lr for group in handover.adamw] or [0.0]
    return {**keys, "adam_weight_decay": mean(decays)}


def effect(group: Group, keys: dict[str, Any]) -> tuple[float, float]:
    """Step and decay of a group by MaxText's formula."""
    lr = keys["learning_rate"]
    if is_muon(group):
        step = keys["muon_consistent_rms"] * longest(group) * lr
        return step, lr * keys["muon_weight_decay"]
    return lr, lr * keys["adam_weight_decay"]


def _traps(handover: Handover) -> list[str]:
    """List MaxText's deviations, if Muon trains."""
    if not handover.muon:
        return []
    lines = [
        "AdamW as it was swept: MaxText runs it with Nesterov momentum (NAdamW) beside Muon",
        "models other than DeepSeek, Qwen3, Gemma3 and Llama2, whose matrices its Muon knows",
    ]
    if not math.isclose(handover.optimizer.eps, OPTAXS_EPS):
        lines.append(f"adam_eps: it is not passed on beside Muon; it gets {OPTAXS_EPS:g}")
    return lines


def _schedule_line(handover: Handover) -> str:
    schedule = handover.transfer.schedule
    if schedule is None:
        return without_schedule()
    how = "cosine with final fraction 1" if schedule["name"] == "constant" else schedule["name"]
    return f"{schedule['name']}: {how}, below; its warm-up starts from 0"


def _schedule(handover: Handover) -> str:
    schedule, steps = handover.transfer.schedule, handover.transfer.steps
    if schedule is None or steps is None:
        return ""
    keys: dict[str, Any] = {
        "gradient_clipping_threshold": 0.0,
        "steps": steps,
        "learning_rate_schedule_steps": steps,
        "lr_schedule_type": "wsd" if schedule["name"] == "wsd" else "cosine",
        "warmup_steps_fraction": share_of_run(schedule["warmup_steps"], steps),
        "learning_rate_final_fraction": float(schedule["final_lr"]),
    }
    if schedule["name"] == "wsd":
        keys |= {"wsd_decay_steps_fraction": share_of_run(schedule["decay_steps"], steps)}
        keys |= {"wsd_decay_style": "linear"}
    return yaml_rows(keys)
