"""Settings per group and schedules, against hand numbers, mup.MuAdamW and torch's schedulers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mup
import pytest
import torch
from conftest import gpt_config
from torch import nn

from telescope.config import OptimizerConfig, TrainConfig
from telescope.records import Point
from telescope.rules.groups import Group, parameter_groups
from telescope.rules.scaling import Role
from telescope.train.loop import token_loss
from telescope.train.model import build_meta, build_model
from telescope.train.optim import build_optimizers, schedule, set_lr

POINT = Point.of(lr=0.08, weight_decay=0.1)


def groups_at(
    width: int, point: Point = POINT, **optimizer: Any
) -> dict[tuple[Role, tuple[int, ...]], Group]:
    tags = build_meta(gpt_config(), width=width, base_width=16).tags
    groups = parameter_groups(tags, point, OptimizerConfig(**optimizer))
    return {(group.role, group.shape): group for group in groups}


def test_every_parameter_is_in_one_group() -> None:
    tags = build_meta(gpt_config(depth=2), width=32, base_width=16).tags
    names = [name for g in parameter_groups(tags, POINT, OptimizerConfig()) for name in g.names]
    assert sorted(names) == sorted(tags)


def test_mup_at_r_4_is_half_the_lr_and_twice_the_decay_for_torch() -> None:
    """The literature's worked check: lr/√r and wd·√r for torch's match_rms_adamw."""
    group = groups_at(64)[Role.HIDDEN, (64, 64)]
    assert group.is_muon
    assert group.lr == pytest.approx(0.08 / 4**0.5)
    assert group.weight_decay == pytest.approx(0.1 * 4**0.5)


@pytest.mark.parametrize(
    ("rule", "lr", "decay"), [("paper", 0.08 / 4, 0.1), ("moonlight", 0.08, 0.1)]
)
def test_other_rules_at_r_4(rule: str, lr: float, decay: float) -> None:
    group = groups_at(64, rule=rule)[Role.HIDDEN, (64, 64)]
    assert (group.lr, group.weight_decay) == pytest.approx((lr, decay))


def test_all_else_is_adamw_and_constant_in_width() -> None:
    for (role, _), group in groups_at(64, adamw_lr_ratio=0.5).items():
        if not role.is_hidden:
            assert not group.is_muon
            assert (group.lr, group.weight_decay) == pytest.approx((0.04, 0.1))


def test_an_axis_replaces_its_key() -> None:
    swept = groups_at(64, Point.of(lr=0.08, weight_decay=0.1, adamw_lr_ratio=0.25))
    assert swept[Role.VECTOR, (64,)].lr == pytest.approx(0.02)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize(("width", "hidden"), [(16, 2 / 4), (64, 2 / 8)])  # r = 1, 4
def test_init_scale_is_in_every_groups_start(name: str, width: int, hidden: float) -> None:
    scaled = groups_at(width, Point.of({**POINT, "init_scale": 2.0}), name=name)
    starts = {role: group.init_std for (role, _), group in scaled.items()}
    assert starts == {
        Role.EMBEDDING: 2.0,
        Role.HIDDEN: hidden,
        Role.RESIDUAL: 0.0,
        Role.READOUT: 0.0,
        Role.VECTOR: 0.0,
        Role.FINITE: 0.0,
    }
    plain = groups_at(width, name=name)
    assert scaled == {key: replace(g, init_std=2 * g.init_std) for key, g in plain.items()}


def train_adamw(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(256, (2, 9), generator=generator)
        token_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_adamw_under_mup_is_mups_own() -> None:
    def built() -> Any:
        return build_model(
            gpt_config(),
            width=64,
            base_width=16,
            seed=0,
            optimizer="adamw",
            rule="mup",
            device="cpu",
        )

    ours, theirs = built(), built()
    start = [p.detach().clone() for p in ours.module.parameters()]
    config = OptimizerConfig(name="adamw")
    point = Point.of(lr=0.01, weight_decay=0.1)
    train_adamw(
        ours.module,
        build_optimizers(ours.module, parameter_groups(ours.tags, point, config), config),
    )
    muadamw = mup.MuAdamW(
        theirs.module.parameters(), lr=0.01, weight_decay=0.1, betas=(0.95, 0.95), eps=1e-8
    )
    train_adamw(theirs.module, [muadamw])
    for before, p, q in zip(
        start, ours.module.parameters(), theirs.module.parameters(), strict=True
    ):
        # The decay was converted and back.
        assert (p - q).norm() <= 1e-5 * (p - before).norm()


def config_for(name: Any, **keys: Any) -> TrainConfig:
    return TrainConfig(steps=20, batch_size=1, sequence_length=1, schedule=name, **keys)


def shares(config: TrainConfig) -> list[float]:
    return [schedule(step, config) for step in range(config.steps)]


def test_cosine_agrees_with_torch() -> None:
    """torch's LinearLR then CosineAnnealingLR, an independent implementation."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=0.1)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])
    theirs = []
    for _ in range(20):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert shares(config_for("cosine", warmup=0.25)) == pytest.approx(theirs)


def test_constant_and_wsd_by_hand() -> None:
    warm = [0.25, 0.5, 0.75, 1.0]
    assert shares(config_for("constant", warmup=0.2)) == pytest.approx(warm + [1.0] * 16)
    down = [1 - 0.9 * i / 4 for i in (1, 2, 3, 4)]
    assert shares(config_for("wsd", warmup=0.2, decay=0.2)) == pytest.approx(
        warm + [1.0] * 12 + down
    )


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_schedules_stay_between_zero_and_the_peak(
    name: Any, warmup: float, decay: float, steps: int
) -> None:
    config = TrainConfig(
        steps=steps,
        batch_size=1,
        sequence_length=1,
        schedule=name,
        warmup=warmup,
        decay=decay,
    )
    assert all(0 < share <= 1 for share in shares(config))


def test_set_lr_scales_every_peak() -> None:
    tagged = build_model(
        gpt_config(), width=32, base_width=16, seed=0, optimizer="muon", rule="mup", device="cpu"
    )
    config = OptimizerConfig()
    optimizers = build_optimizers(
        tagged.module, parameter_groups(tagged.tags, POINT, config), config
    )
    set_lr(optimizers, 0.5)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert groups
    assert all(group["lr"] == 0.5 * group["peak_lr"] for group in groups)
