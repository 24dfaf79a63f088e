"""bf16 by autocast; and what `plan --probe` says of either arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import telescope
from conftest import as_toml, tiny_spec, trial_config
from torch import nn

from telescope.config import OptimizerConfig
from telescope.errors import SpecError
from telescope.records import Point, Trial
from telescope.spec.spec import Spec
from telescope.train import probe
from telescope.train.loop import held_out_loss_of, set_up, take_step, train

TRIAL = Trial(16, Point.of(lr=0.05, weight_decay=0.1), 0)


def test_bf16_is_in_the_model_alone(corpus_file: Path) -> None:
    setup = set_up(trial_config(corpus_file, precision="bf16"), TRIAL)
    seen: list[torch.dtype] = []
    for module in setup.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    parts = (setup.model, setup.optimizers, setup.batches, setup.train)
    loss = take_step(*parts, 0, "cpu")
    held_out_loss_of(setup)
    assert set(seen) == {torch.bfloat16}
    assert loss.dtype is torch.float32
    assert {p.dtype for p in setup.model.parameters()} == {torch.float32}
    states = [value for o in setup.optimizers for s in o.state.values() for value in s.values()]
    assert {value.dtype for value in states} == {torch.float32}


def test_bf16_trains_as_fp32_to_its_rounding(corpus_file: Path) -> None:
    losses = [
        train(trial_config(corpus_file, steps=20, precision=precision), TRIAL).loss
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(("table", "key"), [("train", "precision"), ("optimizer", "ns_dtype")])
def test_auto_is_no_arithmetic(corpus_file: Path, table: str, key: str) -> None:
    with pytest.raises(SpecError, match=rf"{table}\.{key}: got 'auto', must be .*p?f?32") as told:
        Spec.from_dict(tiny_spec(corpus_file, **{table: {key: "auto"}}))
    assert "\n" not in str(told.value)


def test_either_arithmetic_is_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each call of bf16 moves by 1 s, but its last by 0.5 s, and of fp32 by 2 s."""
    now, calls = [0.0], list[str]()

    def work(arithmetic: str) -> None:
        calls.append(arithmetic)
        is_last = calls.count("bf16") == 1 + probe.ROUNDS
        now[0] += 2.0 if arithmetic == "fp32" else 0.5 if is_last else 1.0

    monkeypatch.setattr("telescope.train.probe.time.perf_counter", lambda: now[0])
    assert probe._fastest(work, "cpu") == {"fp32": 2.0, "bf16": 0.5}
    assert calls == ["fp32", "bf16"] * (1 + probe.ROUNDS)


def test_both_parts_are_really_timed(corpus_file: Path) -> None:
    timed = probe.arithmetic_seconds(trial_config(corpus_file), TRIAL)
    assert list(timed) == ["train.precision", "optimizer.ns_dtype"]
    for seconds in timed.values():
        assert list(seconds) == ["fp32", "bf16"]
        assert all(0 < taken < 10 for taken in seconds.values())
    adamw = replace(trial_config(corpus_file), optimizer=OptimizerConfig(name="adamw"))
    assert list(probe.arithmetic_seconds(adamw, TRIAL)) == ["train.precision"]


def test_the_clock_waits_for_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: waited.append(device))
    probe._fastest(lambda arithmetic: None, "cuda:1")
    assert set(waited) == {"cuda:1"}


def test_a_probed_plan_says_both(corpus_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(as_toml(tiny_spec(corpus_file)))
    done = telescope("plan", "tiny.toml", "--probe", cwd=tmp_path)
    words = " ".join(done.stdout.split())
    for key in ("train.precision", "optimizer.ns_dtype"):
        assert f"{key}, ms per step: fp32 " in words
    assert "at width 16, " in words
    plan = json.loads(telescope("plan", "tiny.toml", "--probe", "--json", cwd=tmp_path).stdout)
    assert plan["arithmetic"]["train.precision"]["bf16"].keys() == {"16", "32"}
    plan = json.loads(telescope("plan", "tiny.toml", "--json", cwd=tmp_path).stdout)
    assert plan["arithmetic"] is None
