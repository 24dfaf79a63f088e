"""The same training on a CUDA device; skipped without one. The CPU is the reference."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trial_config

from telescope.config import OptimizerConfig, TrialConfig
from telescope.dispatch.device import check_device, free_memory, is_out_of_memory
from telescope.packs.graph import Recorder
from telescope.packs.trainer import PackedTrainer
from telescope.records import Point, Result, Status, Trial
from telescope.train.loop import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

EXACT = OptimizerConfig(ns_dtype="fp32")
TRIALS = [Trial(64, Point.of(lr=0.01 * (n + 1), weight_decay=0.1), n % 2) for n in range(4)]
LOST = """
import torch
from telescope.dispatch.device import check_device
from telescope.errors import LostError

try:
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].sum().item()
except Exception as error:
    try:
        check_device(error)
    except LostError as lost:
        print(lost)
"""


def configs(corpus: Path, **train: Any) -> tuple[TrialConfig, TrialConfig]:
    """The same training on the CPU and on the device."""
    config = trial_config(corpus, steps=20, optimizer=EXACT, **train)
    return replace(config, device="cpu"), replace(config, device="cuda")


def loss_of(result: Result) -> float:
    assert result.loss is not None, result.reason
    return result.loss


def packed(config: TrialConfig) -> dict[Trial, float]:
    return {r.trial: loss_of(r) for r in PackedTrainer(config).train_pack(TRIALS)}


def test_a_trial_has_the_loss_that_it_has_on_a_cpu(corpus_file: Path) -> None:
    cpu, cuda = configs(corpus_file)
    for trial in TRIALS[:2]:
        assert loss_of(train(cuda, trial)) == pytest.approx(loss_of(train(cpu, trial)), rel=1e-3)


def test_a_pack_has_the_losses_of_its_trials_alone(corpus_file: Path) -> None:
    _, cuda = configs(corpus_file)
    for trial, loss in packed(cuda).items():
        assert loss == pytest.approx(loss_of(train(cuda, trial)), rel=1e-3)


@pytest.mark.parametrize("how", [{"precision": "bf16"}, {"compile": True}])
def test_other_arithmetic_is_near(corpus_file: Path, how: dict[str, Any]) -> None:
    _, cuda = configs(corpus_file)
    other = replace(cuda, train=replace(cuda.train, **how))
    found = loss_of(train(other, TRIALS[0]))
    assert found == pytest.approx(loss_of(train(cuda, TRIALS[0])), rel=0.02)


def test_muon_in_bf16_is_near(corpus_file: Path) -> None:
    _, cuda = configs(corpus_file)
    other = replace(cuda, optimizer=replace(cuda.optimizer, ns_dtype="bf16"))
    for trial, loss in packed(other).items():
        assert loss == pytest.approx(loss_of(train(cuda, trial)), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_recorded_and_replayed(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The kernels are the same, so the losses are; one step in 21 is recorded."""
    _, cuda = configs(corpus_file, precision=precision)
    recorded = packed(cuda)
    replayed = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    assert packed(cuda) == pytest.approx(recorded, rel=1e-5)
    assert len(replayed) >= 19
    monkeypatch.setattr(Recorder, "_record", lambda *given: None)
    assert packed(cuda) == pytest.approx(recorded, rel=1e-5)


def test_a_computation_that_looks_at_values_runs_as_it_is() -> None:
    def compute(values: torch.Tensor) -> torch.Tensor:
        return values * values.sum().item()

    recorder, values = Recorder(compute), torch.arange(4.0, device="cuda")
    for _ in range(4):
        assert recorder(values).tolist() == [0.0, 6.0, 12.0, 18.0]
    check_device(RuntimeError("none"))


def test_a_trial_that_diverges_leaves_the_pack(corpus_file: Path) -> None:
    _, cuda = configs(corpus_file)
    wild = Trial(64, Point.of(lr=1e30, weight_decay=0.1), 0)
    found = {r.trial: r for r in PackedTrainer(cuda).train_pack([*TRIALS, wild])}
    assert found.pop(wild).status is Status.DIVERGED
    assert {r.status for r in found.values()} == {Status.COMPLETE}


def test_a_trial_goes_on_at_its_checkpoint(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cuda = configs(corpus_file, checkpoint_every=5)
    wanted = loss_of(train(cuda, TRIALS[0]))
    kept = replace(cuda, checkpoint_folder=str(tmp_path))
    take_step, taken = sys.modules["telescope.train.loop"].take_step, 0

    def dying(*arguments: object) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 13:
            raise KeyboardInterrupt
        loss: torch.Tensor = take_step(*arguments)
        return loss

    monkeypatch.setattr("telescope.train.loop.take_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(kept, TRIALS[0])
    assert loss_of(train(kept, TRIALS[0])) == pytest.approx(wanted, rel=1e-3)
    assert taken < 13 + 20  # it did not begin anew


def test_a_pack_is_measured_before_it_is_used(corpus_file: Path) -> None:
    _, cuda = configs(corpus_file)
    probe = PackedTrainer(cuda).probe_pack(TRIALS)
    assert probe is not None
    assert 0 < probe.bytes_used < probe.bytes_free <= probe.bytes_total
    assert probe.gain > 1
    assert probe.most(0.5) > len(TRIALS)


def test_no_memory_is_told_from_a_lost_device() -> None:
    free, _ = torch.cuda.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2 * free, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(error.value)
    free_memory()
    check_device(error.value)  # raises nothing: the device is well


def test_a_lost_device_is_noticed() -> None:
    """In a process of its own: a failed assertion on the device is for good."""
    done = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, timeout=120, check=True
    )
    assert "refuses every call of process" in done.stdout
