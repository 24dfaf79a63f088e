"""DeepSpeed: a Python file with groups and configuration, or the JSON alone if it says enough."""

from __future__ import annotations

import json
import math
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
    mean,
    other_eps,
    refuse_unless,
    start_by_hand,
    step_of,
    without_schedule,
)
from telescope.export.torch_file import described_schedule

WRITTEN_FOR = "DeepSpeed 0.19.8 and later (runtime/zero/muon); earlier ones drop the groups' own lr"
TO_ADAM = ("embed", "lm_head")
"""Parts of a name by which DeepSpeed's configuration gives a matrix to Adam."""

MUON = '''\
def make_optimizer(model):
    """deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=CONFIG, ...)

    Named in the configuration instead, Muon would be given to matrices by their names.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    tensors = claim(model)
    groups = []
    for group in GROUPS:
        params = [tensors[name] for name in group["names"]]
        for tensor in params:
            tensor.use_muon = group["use_muon"]  # ZeRO reads it
        groups.append({"params": params, "use_muon": group["use_muon"], **group["settings"]})
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
'''
ADAMW = '''\
def make_optimizer(model):
    """deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=CONFIG, ...)"""
    tensors = claim(model)
    return torch.optim.AdamW(
        [
            {"params": [tensors[name] for name in group["names"]], **group["settings"]}
            for group in GROUPS
        ]
    )
'''
SCHEDULER = '''\
def make_scheduler(optimizer):
    """deepspeed.initialize(..., lr_scheduler=make_scheduler); DeepSpeed steps it."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
'''


def scale(group: Group) -> float:
    """DeepSpeed's own scale of O: √max(1, out/in)."""
    out, in_ = group["shape"][-2:]
    return math.sqrt(max(1.0, out / in_))


def deepspeed(handover: Handover) -> str:
    """Write a module with groups, schedule and the rest of the configuration."""
    _check_muon(handover, "deepspeed")
    config: dict[str, Any] = {"gradient_clipping": 0.0} if handover.transfer.schedule else {}
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor="each group's own: lr is that of √max(1, out/in), weight_decay keeps lr · decay",
        schedule=described_schedule(handover),
        not_expressed=[
            *logits_by_hand(handover),
            "the rest of the configuration: batch size, precision, zero_optimization (stage 3 with "
            "Muon needs reduce_scatter false)",
            "the eps 1e-7 of Newton–Schulz, and its arithmetic where bf16 is not supported",
        ],
    )
    schedule = source.share_of_peak(handover.transfer.schedule, handover.transfer.steps)
    groups = [_group(group) for group in handover.groups]
    parts = [
        comment(lines) + source.imports(schedule),
        source.literal("CONFIG", config) + "\n" + source.literal("GROUPS", groups),
        *(source.CLAIM, source.START, MUON if handover.muon else ADAMW, schedule, SCHEDULER),
    ]
    return "\n\n".join(parts)


def _group(group: Group) -> dict[str, Any]:
    """A group in the words of `MuonWithAuxAdam`."""
    settings: dict[str, Any] = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    if is_muon(group):
        lr = step_of(group) / scale(group)
        settings = {"lr": lr, "weight_decay": decay_of(group) / lr}
        settings |= {"momentum": group["kwargs"]["momentum"], "ns_method": "standard"}
    else:
        settings |= group["kwargs"]
    keys = ("role", "shape", "init", "init_std", "names")
    return {
        **{key: group[key] for key in keys},
        "use_muon": is_muon(group),
        "settings": settings,
    }


def _check_muon(handover: Handover, format: str) -> None:
    """Refuse what DeepSpeed's Muon has no word for."""
    config = handover.optimizer
    if handover.muon:
        refuse_unless(
            handover,
            format,
            (config.nesterov, "its Muon always uses Nesterov momentum; optimizer.nesterov is off"),
            (config.ns_steps == 5, f"its Muon takes 5 Newton–Schulz steps, not {config.ns_steps}"),
        )


def deepspeed_json(handover: Handover) -> str:
    """Write the configuration alone: one weight decay for all, and Muon by names."""
    format = "deepspeed-json"
    _check_muon(handover, format)
    if handover.muon:
        wrong = [
            name
            for group in handover.groups
            for name in group["names"]
            if is_muon(group) != _goes_to_muon(name, group)
        ]
        reason = (
            f"by their names it gives {', '.join(wrong)} to the wrong optimizer: AdamW gets "
            f"vectors and names with {' or '.join(TO_ADAM)}; rename them, or use --format deepspeed"
        )
        refuse_unless(handover, format, (not wrong, reason))
    params = _params(handover)
    off = check_effect(handover, format, lambda group: effect(group, params))
    schedule = handover.transfer.schedule
    by_hand = [start_by_hand(handover), *logits_by_hand(handover), *other_eps(handover)]
    if schedule and schedule["name"] == "wsd":
        by_hand.append("schedule wsd: no scheduler of DeepSpeed's has it; --format deepspeed does")
    lines = head(
        handover,
        written_for=WRITTEN_FOR,
        factor=f"muon_lr {params['muon_lr']:.6g} for √max(1, out/in)"
        if handover.muon
        else "none: AdamW alone",
        schedule=_schedule_line(handover),
        not_expressed=by_hand,
        off=off,
    )
    whole: dict[str, Any] = {
        "telescope": lines,
        "optimizer": {"type": "Muon" if handover.muon else "AdamW", "params": params},
    }
    return json.dumps({**whole, **_schedule(handover)}, indent=2, ensure_ascii=False) + "\n"


def _goes_to_muon(name: str, group: Group) -> bool:
    return len(group["shape"]) >= 2 and not any(part in name.lower() for part in TO_ADAM)


def _params(handover: Handover) -> dict[str, Any]:
    """The optimizer's keys of the configuration."""
    config = handover.optimizer
    lr = mean(g["lr"] for g in handover.adamw or handover.groups)
    params: dict[str, Any] = {"lr": lr, "betas": list(config.betas), "eps": config.eps}
    decays = [decay_of(g) / lr for g in handover.adamw]
    if handover.muon:
        muon_lr = mean(step_of(g) / scale(g) for g in handover.muon)
        decays += [decay_of(g) / muon_lr for g in handover.muon]
        params |= {"muon_lr": muon_lr, "adam_lr": lr}
        params |= {"momentum": config.momentum, "ns_method": "standard"}
    return {**params, "weight_decay": mean(decays)}


def effect(group: Group, params: dict[str, Any]) -> tuple[float, float]:
    """Step and decay of a group by DeepSpeed's formula."""
    lr = params["muon_lr"] if is_muon(group) else params["lr"]
    return lr * (scale(group) if is_muon(group) else 1.0), lr * params["weight_decay"]


def _schedule_line(handover: Handover) -> str:
    schedule = handover.transfer.schedule
    if schedule is None:
        return without_schedule()
    if schedule["name"] == "wsd":
        return "wsd: not expressed"
    return f"{schedule['name']}: WarmupCosineLR to {schedule['final_lr']:g} of the peak"


def _schedule(handover: Handover) -> dict[str, Any]:
    """The scheduler's table. WarmupCosineLR alone leaves the groups' own lr as they are."""
    schedule, steps = handover.transfer.schedule, handover.transfer.steps
    if schedule is None:
        return {}
    table: dict[str, Any] = {"gradient_clipping": 0.0}
    if schedule["name"] != "wsd":
        table["scheduler"] = {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": steps,
                "warmup_num_steps": max(schedule["warmup_steps"], 1),
                "warmup_min_ratio": 0.0,
                "warmup_type": "linear",
                "cos_min_ratio": schedule["final_lr"],
            },
        }
    return table
