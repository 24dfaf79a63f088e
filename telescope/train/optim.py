"""From width rules to torch settings: parameter groups, optimizers, the learning-rate schedule.

One `Group` per (role, shape) holds drop-in settings for a bare torch optimizer. The program's own
training loop is built from the same groups that a transfer hands over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from telescope.records import Point
from telescope.train.config import OptimizerConfig, TrainConfig
from telescope.train.muon import NS_EPS, Muon, quintics
from telescope.train.parametrization import RMS_MATCH, Role, Tag, scaling


@dataclass(frozen=True, slots=True)
class Group:
    """All parameters of one role and shape, with the settings of the optimizer that trains them."""

    role: Role
    shape: tuple[int, ...]
    names: tuple[str, ...]
    is_muon: bool
    lr: float
    """Peak learning rate as the torch optimizer takes it."""
    weight_decay: float
    """Weight decay as the torch optimizer takes it: a step decays by lr · weight_decay."""
    kwargs: dict[str, Any]
    """Further keyword arguments of the torch optimizer's class."""
    init_std: float
    """Standard deviation at the start, the point's init_scale in it; 0 is zeros (gains: ones)."""
    multiplier: float


def parameter_groups(tags: dict[str, Tag], point: Point, config: OptimizerConfig) -> list[Group]:
    """Turn a point into settings, one group per (role, shape).

    torch scales a Muon step by 0.2·√max(out, in) of its own; a group's lr carries what the rule
    asks for beyond that, and its weight_decay is converted so that lr · weight_decay is the
    decay that the rule asks for. At r = 4, for a square matrix under `mup`, that is lr/2 and wd·2.

    Args:
        tags: name → tag of every parameter.
        point: the hyperparameters in base-width units.
        config: the spec's optimizer.
    """
    members: dict[tuple[Role, tuple[int, ...], tuple[int, ...], float], list[str]] = {}
    for tag in tags.values():
        key = (tag.role, tag.shape, tag.base_shape, tag.output_mult)
        members.setdefault(key, []).append(tag.name)
    groups = []
    for (role, shape, base_shape, output_mult), names in members.items():
        rule = scaling(role, shape, base_shape, optimizer=config.name, rule=config.rule)
        is_muon = config.name == "muon" and role.is_hidden
        ratio = 1.0 if is_muon else point.get("adamw_lr_ratio", config.adamw_lr_ratio)
        torch_scale = RMS_MATCH * math.sqrt(max(shape[-2:])) if is_muon else 1.0
        lr = ratio * point.lr * (rule.lr / torch_scale)
        decay_per_step = ratio * point.lr * rule.decay * point.weight_decay
        groups.append(
            Group(
                role=role,
                shape=shape,
                names=tuple(names),
                is_muon=is_muon,
                lr=lr,
                weight_decay=decay_per_step / lr,
                kwargs=_muon_kwargs(config) if is_muon else _adamw_kwargs(config),
                init_std=rule.init_std * point.get("init_scale", 1.0),
                multiplier=rule.multiplier * output_mult,
            )
        )
    return groups


def _muon_kwargs(config: OptimizerConfig) -> dict[str, Any]:
    per_step = tuple(quintics(config.ns, config.ns_steps))
    return {
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "ns_coefficients": per_step[0] if config.ns == "jordan" else per_step,
        "eps": NS_EPS,
        "ns_steps": config.ns_steps,
        "adjust_lr_fn": "match_rms_adamw",
    }


def _adamw_kwargs(config: OptimizerConfig) -> dict[str, Any]:
    return {"betas": config.betas, "eps": config.eps}


def build_optimizers(
    model: nn.Module, groups: list[Group], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Make the optimizers of `groups`; each torch group remembers its ``peak_lr``."""
    parameters = dict(model.named_parameters())
    muon, adamw = [], []
    for group in groups:
        settings = {
            "params": [parameters[name] for name in group.names],
            "lr": group.lr,
            "peak_lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        if group.is_muon:
            momentum = {key: group.kwargs[key] for key in ("momentum", "nesterov", "ns_steps")}
            muon.append({**settings, **momentum})
        else:
            adamw.append({**settings, **group.kwargs})
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        defaults = {key: muon[0][key] for key in ("momentum", "nesterov", "ns_steps")}
        optimizers.append(Muon(muon, ns_dtype=config.ns_dtype, ns=config.ns, **defaults))
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw))
    return optimizers


def schedule(step: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of its peak.

    Linear warm-up that reaches the peak at its last step, then: cosine to `final_lr`, reached at
    the last step; or constant; or constant and a linear decay to `final_lr` over the last `decay`.

    Args:
        step: from 0 to config.steps − 1.

    >>> config = TrainConfig(steps=11, batch_size=1, sequence_length=1, warmup=0.0)
    >>> [round(schedule(step, config), 3) for step in (0, 5, 10)]
    [1.0, 0.55, 0.1]
    """
    warmup_steps = round(config.warmup * config.steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    last = config.steps - 1
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            start = max(warmup_steps - 1, 0)
            progress = (step - start) / max(last - start, 1)
            return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
        case "wsd":
            start = max(last - round(config.decay * config.steps), warmup_steps - 1)
            progress = max(step - start, 0) / max(last - start, 1)
            return 1 - (1 - config.final_lr) * progress


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
