"""One trial: it learns, a seed means the same everywhere, divergence is no number."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt_config, trial_config

from telescope.config import (
    ADAMW_AXES,
    CARE_KEYS,
    TRAINER_AXES,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from telescope.errors import DataError
from telescope.packs.fused import train_pack
from telescope.packs.probe import pack_probe
from telescope.packs.trainer import PackedTrainer
from telescope.records import Point, Result, Status, Trial
from telescope.train import loop
from telescope.train.loop import TelescopeTrainer, held_out_loss, set_up, train
from telescope.train.probe import arithmetic_seconds, seconds_per_trial

GOOD = Point.of(lr=0.05, weight_decay=0.1)


def run(
    corpus: Path, point: Point = GOOD, *, width: int = 16, seed: int = 0, steps: int = 6
) -> Result:
    return train(trial_config(corpus, steps=steps), Trial(width, point, seed))


def test_a_model_learns(corpus_file: Path) -> None:
    result = run(corpus_file, steps=60)
    assert result.status is Status.COMPLETE
    assert result.loss is not None
    assert result.loss < 2.0 < math.log(256)
    assert result.curve[0].train_loss == pytest.approx(math.log(256), rel=0.05)  # a zero readout
    assert result.curve[-1].held_out_loss == result.loss


def test_a_trial_is_bit_equal_to_itself(corpus_file: Path) -> None:
    one, other = run(corpus_file), run(corpus_file)
    assert one.loss == other.loss
    assert one.curve == other.curve
    assert run(corpus_file, seed=1).loss != one.loss


def test_a_seed_gives_every_point_the_same_start(corpus_file: Path) -> None:
    other = Point.of(lr=0.01, weight_decay=0.3)
    assert run(corpus_file).curve[0].train_loss == run(corpus_file, other).curve[0].train_loss


def test_weight_decay_and_lr_reach_the_training(corpus_file: Path) -> None:
    losses = {
        run(corpus_file, Point.of(lr=lr, weight_decay=decay), steps=20).loss
        for lr in (0.01, 0.05)
        for decay in (0.0, 0.5)
    }
    assert len(losses) == 4


def test_a_swept_warmup_is_used(corpus_file: Path) -> None:
    plain = run(corpus_file, steps=20).loss
    longer = run(corpus_file, Point.of({**GOOD, "warmup": 0.5}), steps=20).loss
    whole = run(corpus_file, Point.of({**GOOD, "warmup": 3.0}), steps=20).loss
    assert len({plain, longer, whole}) == 3


def test_divergence_ends_early_with_its_reason(corpus_file: Path) -> None:
    result = run(corpus_file, Point.of(lr=1e4, weight_decay=0.1), steps=50)
    assert result.status is Status.DIVERGED
    assert result.loss is None
    assert len(result.curve) < 20
    assert "at step" in result.reason


@pytest.mark.parametrize("lr", [0.05, 300.0])
def test_losses_read_late_give_the_same_result(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float
) -> None:
    """As on an accelerator: a few at a time, checkpoints and evaluations between them."""
    config = trial_config(corpus_file, steps=30, evals=3, checkpoint_every=7)
    config = replace(config, checkpoint_folder=str(tmp_path))
    trial = Trial(16, Point.of(lr=lr, weight_decay=0.1), 0)
    at_once = replace(train(config, trial), seconds=0.0)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    monkeypatch.setattr(loop, "reads_every", lambda device: 4)
    assert replace(train(config, trial), seconds=0.0) == at_once
    assert (at_once.status is Status.DIVERGED) == (lr > 1)


def test_nan_is_divergence(corpus_file: Path) -> None:
    text = gpt_config().text.replace(
        "return self.readout(self.norm(x_BTD))", "return self.readout(self.norm(x_BTD)) / 0 * 0"
    )
    config = trial_config(
        corpus_file, model=ModelConfig(name="nan.py", text=text, kwargs=gpt_config().kwargs)
    )
    result = train(config, Trial(16, GOOD, 0))
    assert result.status is Status.DIVERGED
    assert "nan at step 1 " in result.reason
    assert result.curve[-1].train_loss is None


def test_a_held_out_loss_of_nan_is_divergence_at_once(corpus_file: Path, tmp_path: Path) -> None:
    """And not a failure: a checkpoint of the same step could not be written."""
    out = "return self.readout(self.norm(x_BTD))"
    text = gpt_config().text.replace(out, f"{out} * (1.0 if self.training else float('nan'))")
    model = ModelConfig(name="nan.py", text=text, kwargs=gpt_config().kwargs)
    plain = trial_config(corpus_file, model=model, steps=12, evals=3, checkpoint_every=4)
    config = replace(plain, checkpoint_folder=str(tmp_path))
    result = train(config, Trial(16, GOOD, 0))
    assert (result.status, result.loss) == (Status.DIVERGED, None)
    assert result.reason == "held-out loss nan after 4 steps"
    assert result.curve[-1].step == 4
    assert result.curve[-1].train_loss is not None
    assert result.curve[-1].held_out_loss is None
    (fused,) = train_pack(config, [Trial(16, GOOD, 0)])
    assert fused.reason == result.reason


def test_held_out_losses_are_measured_along_the_way(corpus_file: Path) -> None:
    config = trial_config(corpus_file, steps=12, evals=3)
    curve = train(config, Trial(16, GOOD, 0)).curve
    assert [row.step for row in curve if row.held_out_loss is not None] == [4, 8, 12]


def test_the_held_out_loss_is_plain_cross_entropy(corpus_file: Path) -> None:
    setup = set_up(trial_config(corpus_file), Trial(16, GOOD, 0))
    with torch.no_grad():
        for parameter in setup.model.parameters():
            parameter.normal_(std=0.3)
        inputs, targets = setup.held_out
        log_p = torch.log_softmax(setup.model(inputs), dim=-1)
        by_hand = -log_p.gather(-1, targets[..., None]).mean().item()
    assert held_out_loss(setup.model, setup.held_out, batch_size=3) == pytest.approx(
        by_hand, rel=1e-5
    )


def test_another_corpus_is_refused(corpus_file: Path) -> None:
    config = replace(trial_config(corpus_file), corpus_digest="0" * 64)
    with pytest.raises(DataError, match="the driver's is 000000000000"):
        train(config, Trial(16, GOOD, 0))


def test_flops_are_those_of_the_steps_taken(corpus_file: Path) -> None:
    config = replace(trial_config(corpus_file), flops_per_step={16: 1e6})
    assert train(config, Trial(16, GOOD, 0)).flops == 6e6
    early = train(config, Trial(16, Point.of(lr=1e4, weight_decay=0.1), 0))
    assert early.flops == len(early.curve) * 1e6


def test_the_trainer_computes_with_its_threads(corpus_file: Path) -> None:
    try:
        TelescopeTrainer(replace(trial_config(corpus_file), threads=2))(Trial(16, GOOD, 0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "work",
    [
        lambda trainer, trial: trainer(trial),
        lambda trainer, trial: list(trainer.train_pack([trial])),
        lambda trainer, trial: trainer.obstacle(trial),
        lambda trainer, trial: pack_probe(trainer.config, [trial]),
        lambda trainer, trial: seconds_per_trial(trainer.config, trial),
        lambda trainer, trial: arithmetic_seconds(trainer.config, trial),
    ],
    ids=["trial", "pack", "obstacle", "pack probe", "plan probe", "arithmetic"],
)
def test_whatever_is_trained_or_timed_has_its_widths_threads(
    corpus_file: Path,
    work: Callable[[PackedTrainer, Trial], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    config = replace(trial_config(corpus_file, steps=1), threads=1, threads_at={32: 2})
    work(PackedTrainer(config), Trial(32, GOOD, 0))
    assert set(given) == {2}


def test_the_held_out_part_is_never_trained_on(tmp_path: Path) -> None:
    """Training text is all 'a', the held-out end all 'b': what the model sees tells."""
    path = tmp_path / "ab.txt"
    path.write_text("a" * 9_500 + "b" * 500)
    setup = set_up(trial_config(path), Trial(16, GOOD, 0))
    seen = {
        int(t) for step in range(300) for part in setup.batches.at(step) for t in part.flatten()
    }
    assert seen == {ord("a")}
    assert {int(t) for part in setup.held_out for t in part.flatten()} == {ord("b")}


def test_a_trial_runs_on_the_device_that_it_is_given(corpus_file: Path) -> None:
    config = replace(trial_config(corpus_file), device="meta")
    setup = set_up(config, Trial(16, GOOD, 0))
    assert {p.device.type for p in setup.model.parameters()} == {"meta"}
    assert {t.device.type for t in setup.held_out} == {"meta"}


OTHER_OPTIMIZER: dict[str, Any] = {
    "name": "adamw",
    "rule": "paper",
    "adamw_lr_ratio": 0.5,
    "momentum": 0.5,
    "nesterov": False,
    "ns": "polar-express",
    "ns_steps": 3,
    "ns_dtype": "fp32",
    "betas": (0.8, 0.9),
    "eps": 1e-3,
}
OTHER_TRAIN: dict[str, Any] = {
    "steps": 9,
    "batch_size": 8,
    "sequence_length": 8,
    "schedule": "constant",
    "warmup": 0.5,
    "final_lr": 0.9,
    "decay": 0.9,
    "evals": 2,
    "precision": "bf16",
}
OTHER_AXES = {
    "lr": 0.01,
    "weight_decay": 0.5,
    "warmup": 0.5,
    "init_scale": 0.5,
    "adamw_lr_ratio": 0.5,
}
ELSEWHERE = (*CARE_KEYS, "compile")
"""CARE_KEYS change how a trial survives, not what comes out: see test_checkpoint, test_queue.
What compiling changes is a rounding, and takes a C++ compiler: see test_compile."""


@pytest.mark.parametrize("key", [item.name for item in fields(OptimizerConfig)])
def test_every_key_of_the_optimizer_changes_the_training(corpus_file: Path, key: str) -> None:
    assert _trained(corpus_file) != _trained(
        corpus_file, optimizer=replace(OptimizerConfig(), **{key: OTHER_OPTIMIZER[key]})
    )


@pytest.mark.parametrize(
    "key", [item.name for item in fields(TrainConfig) if item.name not in ELSEWHERE]
)
def test_every_key_of_the_training_changes_it(corpus_file: Path, key: str) -> None:
    plain: dict[str, Any] = {"steps": 8, "schedule": "wsd" if key == "decay" else "cosine"}
    assert _trained(corpus_file, **plain) != _trained(
        corpus_file, **{**plain, key: OTHER_TRAIN[key]}
    )


@pytest.mark.parametrize(
    ("name", "axis"),
    [("muon", axis) for axis in TRAINER_AXES] + [("adamw", axis) for axis in ADAMW_AXES],
)
def test_every_axis_changes_the_training(corpus_file: Path, name: Any, axis: str) -> None:
    optimizer, point = OptimizerConfig(name=name), Point.of({**GOOD, axis: OTHER_AXES[axis]})
    curve = _trained(corpus_file, optimizer)
    other = _trained(corpus_file, optimizer, point)
    assert curve[-1].held_out_loss != other[-1].held_out_loss


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_init_scale_of_1_is_bit_equal_to_none(corpus_file: Path, name: Any, tied: bool) -> None:
    config = trial_config(
        corpus_file, model=gpt_config(tied=tied), optimizer=OptimizerConfig(name=name)
    )
    none, one, two = (
        train(config, Trial(32, Point.of({**GOOD, **axis}), 0)).curve
        for axis in ({}, {"init_scale": 1.0}, {"init_scale": 2.0})
    )
    assert none == one
    assert none != two


def _trained(
    corpus: Path,
    optimizer: OptimizerConfig | None = None,
    point: Point = GOOD,
    **settings: Any,
) -> Any:
    """The curve of a trial at twice the base width, where every rule is at work."""
    config = trial_config(corpus, optimizer=optimizer, **{"steps": 8, **settings})
    return train(config, Trial(32, point, 0)).curve
