"""torch optimizers from the groups of the width rules, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from telescope.config import OptimizerConfig, TrainConfig
from telescope.rules.groups import Group
from telescope.rules.schedule import share_of_peak
from telescope.train.muon import Muon


def build_optimizers(
    model: nn.Module, groups: list[Group], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Build the optimizers for `groups`; each torch group stores its ``peak_lr``."""
    return optimizers_of(dict(model.named_parameters()), groups, config)


def optimizers_of(
    parameters: Mapping[str, Tensor], groups: Iterable[Group], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Build the optimizers for `groups` of parameters by name; see `build_optimizers`."""
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
    """Return the learning rate of a step as a share of its peak.

    A linear warm-up reaches the peak at its last step. Then the rate follows a cosine to `final_lr`
    at the last step ("cosine"), stays constant ("constant"), or stays constant and then falls
    linearly to `final_lr` over the last share `decay` of the steps ("wsd").

    Args:
        step: from 0 to config.steps − 1.

    >>> config = TrainConfig(steps=11, batch_size=1, sequence_length=1, warmup=0.0)
    >>> [round(schedule(step, config), 3) for step in (0, 5, 10)]
    [1.0, 0.55, 0.1]
    """
    return share_of_peak(
        step,
        name=config.schedule,
        steps=config.steps,
        warmup_steps=round(config.warmup * config.steps),
        final_lr=config.final_lr,
        decay_steps=round(config.decay * config.steps),
    )


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
