"""Optimizer settings by the width rules: one `Group` per (role, shape), for plain torch optimizers.

The program's own training loop uses the same groups that a transfer hands over. Nothing here
imports torch, so a trainer of any framework can ask for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from telescope.config import OptimizerConfig
from telescope.records import Point
from telescope.rules.quintics import NS_EPS, quintics
from telescope.rules.scaling import RMS_MATCH, Role, Start, Tag, scaling


@dataclass(frozen=True, slots=True)
class Group:
    """All parameters of one role, shape and start, and what to train them with."""

    role: Role
    shape: tuple[int, ...]
    """As the model has it."""
    names: tuple[str, ...]
    is_muon: bool
    lr: float
    """Peak learning rate as the torch optimizer takes it."""
    weight_decay: float
    """Weight decay as the torch optimizer takes it: a step decays by lr · weight_decay."""
    kwargs: dict[str, Any]
    """Further keyword arguments of the torch optimizer's class."""
    init_std: float
    """Standard deviation at initialisation, including the point's init_scale. 0 means zeros, or,
    for vectors, as the model's own code initialises them."""
    multiplier: float
    """Factor of the module's output; 1 except for readouts."""
    start: Start | None
    """Kind of initialisation; None for vectors if it is unknown."""
    is_transposed: bool = False
    """True if the model stores the matrix as (…, in, out)."""


def parameter_groups(tags: Mapping[str, Tag], point: Point, config: OptimizerConfig) -> list[Group]:
    """Turn a point into settings, one group per role, shape and initialisation.

    torch itself scales a Muon step by 0.2·√max(out, in). So a group's lr is the rule's step length
    divided by that, and its weight_decay is converted so that lr · weight_decay is the rule's
    decay per step. For a square matrix at r = 4 under `mup` this gives lr/2 and weight_decay·2.

    Args:
        tags: name → tag of every parameter.
        point: the hyperparameters in base-width units.
        config: the spec's optimizer.
    """
    members: dict[Tag, list[str]] = {}
    for tag in tags.values():
        members.setdefault(replace(tag, name=""), []).append(tag.name)
    groups = []
    for tag, names in members.items():
        role, shape, base_shape = tag.role, tag.shape, tag.base_shape
        rule = scaling(role, shape, base_shape, optimizer=config.name, rule=config.rule)
        is_muon = config.name == "muon" and role.is_hidden
        ratio = 1.0 if is_muon else point.get("adamw_lr_ratio", config.adamw_lr_ratio)
        torch_scale = RMS_MATCH * math.sqrt(max(shape[-2:])) if is_muon else 1.0
        lr = ratio * point.lr * (rule.lr / torch_scale)
        decay_per_step = ratio * point.lr * rule.decay * point.weight_decay
        groups.append(
            Group(
                role=role,
                shape=tag.stored_shape,
                names=tuple(names),
                is_muon=is_muon,
                lr=lr,
                weight_decay=decay_per_step / lr,
                kwargs=_muon_kwargs(config) if is_muon else _adamw_kwargs(config),
                init_std=rule.init_std * point.get("init_scale", 1.0),
                multiplier=rule.multiplier * tag.output_mult,
                start=tag.start if role.is_vector else _matrix_start(rule.init_std),
                is_transposed=tag.is_transposed,
            )
        )
    return groups


def _matrix_start(std: float) -> Start:
    return Start.NORMAL if std else Start.ZEROS


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
