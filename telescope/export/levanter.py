"""Levanter: the tables ``optimizer`` and ``trainer`` of its YAML configuration."""

from __future__ import annotations

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
    share_of_run,
    start_by_hand,
    without_schedule,
    yaml_rows,
)
from telescope.rules.scaling import RMS_MATCH

WRITTEN_FOR = "Levanter in marin, August 2026 (lib/levanter/src/levanter/optim/muon.py)"


def levanter(handover: Handover) -> str:
    """Write the YAML tables."""
    keys = settings(handover)
    off = check_effect(handover, "levanter", lambda group: effect(group, keys))
    factor = keys["learning_rate"] / handover.transfer.point.lr
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor=f"{factor:.6g} in learning_rate, its inverse in weight_decay (use_kimi_scaling)"
        if handover.muon
        else "none: AdamW alone",
        schedule=_schedule_line(handover),
        not_expressed=[
            start_by_hand(handover),
            *logits_by_hand(handover),
            *odd_by_hand(handover),
            *other_eps(handover),
            "Muon for parameters other than haliax Linears, and AdamW for Linears other than "
            "Embedding and lm_head: Levanter goes by these names",
        ],
        off=off,
    )
    rows = yaml_rows(keys, indent="  ")
    return f"{comment(lines)}optimizer:\n{rows}{_schedule(handover)}"


def settings(handover: Handover) -> dict[str, Any]:
    """The optimizer's keys. Not ``lr``, which Levanter's Muon does not read."""
    config, adamw = handover.optimizer, handover.adamw
    keys: dict[str, Any] = {"type": "muon" if handover.muon else "adam"}
    main = handover.muon or adamw
    keys["learning_rate"] = mean(g["lr"] for g in main)
    keys["weight_decay"] = mean(decay_of(g) / keys["learning_rate"] for g in main)
    if handover.muon:
        keys["use_kimi_scaling"] = True
        keys["adam_lr"] = mean(g["lr"] for g in adamw) if adamw else handover.transfer.point.lr
        keys["adam_weight_decay"] = mean(decay_of(g) / keys["adam_lr"] for g in adamw or main)
        keys |= {"momentum": config.momentum, "nesterov": config.nesterov}
        keys |= {"backend_steps": config.ns_steps, "muon_epsilon": main[0]["kwargs"]["eps"]}
    keys["beta1"], keys["beta2"] = config.betas
    # Left out, norms, biases and embeddings would not decay.
    return {**keys, "epsilon": config.eps, "default_weight_decay_mask": False}


def effect(group: Group, keys: dict[str, Any]) -> tuple[float, float]:
    """Step and decay of a group by Levanter's formula."""
    if is_muon(group):
        lr = keys["learning_rate"]
        return RMS_MATCH * longest(group) * lr, lr * keys["weight_decay"]
    ours = "adam_" if "adam_lr" in keys else ""
    lr = keys["adam_lr"] if ours else keys["learning_rate"]
    return lr, lr * keys[f"{ours}weight_decay"]


def _schedule_line(handover: Handover) -> str:
    schedule = handover.transfer.schedule
    if schedule is None:
        return without_schedule()
    how = "linear over the last steps" if schedule["name"] == "wsd" else schedule["name"]
    return f"{schedule['name']}: lr_schedule {how}; its warm-up starts from 0"


def _schedule(handover: Handover) -> str:
    schedule, steps = handover.transfer.schedule, handover.transfer.steps
    if schedule is None or steps is None:
        return ""
    # As shares of the run: a whole number of steps below 2 would be read as a share.
    keys: dict[str, Any] = {
        "max_grad_norm": 0.0,
        "lr_schedule": "linear" if schedule["name"] == "wsd" else schedule["name"],
        "warmup": share_of_run(schedule["warmup_steps"], steps),
        "min_lr_ratio": float(schedule["final_lr"]),
    }
    if schedule["name"] == "wsd":
        keys["decay"] = share_of_run(schedule["decay_steps"], steps)
    return f"{yaml_rows(keys, indent='  ')}trainer:\n  num_train_steps: {steps}\n"
