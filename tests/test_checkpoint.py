"""A killed trial goes on from its last whole checkpoint, bit for bit, in another process."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet, trial_config, with_dropout
from faults import answers, finish, spec_of, start

from telescope import Spec
from telescope.config import OptimizerConfig, TrialConfig
from telescope.records import Point, Result, Trial
from telescope.sweep.run import Options, run
from telescope.train import checkpoint, loop

STEPS, EVERY = 12, 3
TRIAL = Trial(32, Point.of(lr=0.02, weight_decay=0.1), 3)


class Killed(BaseException):
    """Ends a trial in this process as a kill would: nothing of it is cleaned up."""


def config_in(folder: Path, corpus: Path, **parts: Any) -> TrialConfig:
    config = trial_config(corpus, steps=STEPS, evals=4, checkpoint_every=EVERY, **parts)
    return replace(config, checkpoint_folder=str(folder))


def facts(result: Result) -> tuple[Any, ...]:
    """All of a result that a resume must not change, the curve's every digit included."""
    return (result.status, result.loss, result.reason, result.flops, result.curve)


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are really taken; `kill_before` in it ends the process there."""
    taken: list[int] = []
    take_step = loop.take_step

    def counting(*arguments: Any) -> Any:
        taken.append(arguments[4])
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", counting)
    return taken


def train_until(config: TrialConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = loop.take_step

    def stopping(*arguments: Any) -> Any:
        if arguments[4] == step:
            raise Killed
        return take_step(*arguments)

    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(loop, "take_step", stopping)
        loop.train(config, TRIAL)


def checkpoints(folder: Path, suffix: str = ".json") -> list[Path]:
    return sorted((folder / str(TRIAL)).glob(f"*{suffix}"))


@pytest.mark.parametrize(
    "parts",
    [{}, {"optimizer": OptimizerConfig(name="adamw")}, {"model": with_dropout()}],
    ids=["muon", "adamw", "dropout"],
)
def test_stopped_before_any_step_it_ends_bit_equal(
    parts: dict[str, Any],
    tmp_path: Path,
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps_taken: list[int],
) -> None:
    plain = trial_config(corpus_file, steps=STEPS, evals=4, **parts)
    expected = facts(loop.train(plain, TRIAL))
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        train_until(config_in(folder, corpus_file, **parts), step, monkeypatch)
        steps_taken.clear()
        result = loop.train(config_in(folder, corpus_file, **parts), TRIAL)
        assert steps_taken == list(range(step // EVERY * EVERY, STEPS))
        assert facts(result) == expected, step


def test_the_random_state_is_what_makes_dropout_bit_equal(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the test above must fail, or it would prove nothing."""
    config = config_in(tmp_path, corpus_file, model=with_dropout())
    expected = facts(loop.train(replace(config, checkpoint_folder=None), TRIAL))
    train_until(config, 7, monkeypatch)
    monkeypatch.setattr("telescope.train.checkpoint.put_random", lambda *_: None)
    assert facts(loop.train(config, TRIAL)) != expected


def test_the_random_state_is_the_devices_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two accelerators, the first of which is torch's current one."""

    class Accelerators:
        def __init__(self) -> None:
            self.states = {"cuda:0": torch.tensor([1]), "cuda:1": torch.tensor([2])}

        def get_rng_state(self, device: str = "cuda:0") -> torch.Tensor:
            return self.states[device]

        def set_rng_state(self, state: torch.Tensor, device: str = "cuda:0") -> None:
            self.states[device] = state

    own = Accelerators()
    monkeypatch.setattr(torch, "get_device_module", lambda device: own)
    kept = checkpoint.random_states("cuda:1")
    assert kept["random.device"] == 2
    own.states = {"cuda:0": torch.tensor([3]), "cuda:1": torch.tensor([4])}
    checkpoint.put_random("cuda:1", kept)
    assert own.states == {"cuda:0": torch.tensor([3]), "cuda:1": torch.tensor([2])}


def test_only_the_last_two_are_kept(tmp_path: Path, corpus_file: Path) -> None:
    loop.train(config_in(tmp_path, corpus_file), TRIAL)
    names = [path.name for path in sorted((tmp_path / str(TRIAL)).iterdir())]
    assert names == [
        f"step-{step:09d}{suffix}" for step in (6, 9) for suffix in (".json", ".safetensors")
    ]


@pytest.fixture
def stopped(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> tuple[TrialConfig, Path, tuple[Any, ...]]:
    """A trial stopped at step 11, with checkpoints at 6 and 9; and what it should end in."""
    config = config_in(tmp_path / "kept", corpus_file)
    expected = facts(loop.train(replace(config, checkpoint_folder=None), TRIAL))
    train_until(config, 11, monkeypatch)
    steps_taken.clear()
    return config, tmp_path, expected


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_cut_off_anywhere_the_one_before_is_used(
    suffix: str, stopped: tuple[TrialConfig, Path, tuple[Any, ...]], steps_taken: list[int]
) -> None:
    config, place, expected = stopped
    size = checkpoints(place / "kept", suffix)[-1].stat().st_size
    for length in sorted({0, 1, size // 3, size // 2, size - 2}):
        damaged = place / f"{suffix}-{length}"
        shutil.copytree(place / "kept", damaged)
        os.truncate(checkpoints(damaged, suffix)[-1], length)
        steps_taken.clear()
        result = loop.train(replace(config, checkpoint_folder=str(damaged)), TRIAL)
        assert steps_taken[0] == 6, length
        assert facts(result) == expected


def test_flipped_missing_and_foreign_ones_are_ignored(
    stopped: tuple[TrialConfig, Path, tuple[Any, ...]], corpus_file: Path, steps_taken: list[int]
) -> None:
    config, place, expected = stopped
    last = checkpoints(place / "kept", ".safetensors")[-1]
    data = bytearray(last.read_bytes())
    data[-5] ^= 1
    last.write_bytes(data)  # one bit of one weight
    checkpoints(place / "kept", ".safetensors")[0].unlink()
    assert facts(loop.train(config, TRIAL)) == expected
    assert steps_taken[0] == 0
    steps_taken.clear()
    other = replace(config, train=replace(config.train, final_lr=0.5))
    alone = facts(loop.train(replace(other, checkpoint_folder=None), TRIAL))
    steps_taken.clear()
    assert facts(loop.train(other, TRIAL)) == alone  # beside whole ones of the first training
    assert steps_taken[0] == 0


def test_a_checkpoint_is_plain_data(
    stopped: tuple[TrialConfig, Path, tuple[Any, ...]],
) -> None:
    from safetensors import safe_open

    _, place, _ = stopped
    facts = json.loads(checkpoints(place / "kept")[-1].read_text())
    assert facts["position"]["step"] == 9
    with safe_open(checkpoints(place / "kept", ".safetensors")[-1], framework="pt") as file:
        names = set(file.keys())
    assert {"random.cpu", "optimizer.0.0.momentum_buffer", "optimizer.1.0.exp_avg"} <= names


# -- a whole sweep, killed for real -------------------------------------------------------------

TABLES: dict[str, Any] = {
    "ladder": {"widths": [16], "policy": "paper"},
    "axes": {"lr": {"low": 0.01, "high": 0.04, "points": 2}, "weight_decay": {"value": 0.1}},
    "train": {"steps": 40, "evals": 4},
}


def run_with_checkpoints(place: Path, every: int) -> None:
    """One `telescope run` with the real trainer; each step is written down and takes 20 ms."""
    take_step = loop.take_step

    def slow(*arguments: Any) -> Any:
        with (place / "steps.log").open("a") as log:
            log.write(f"{os.getpid()} {arguments[4]}\n")
        time.sleep(0.02)
        return take_step(*arguments)

    loop.take_step = slow  # type: ignore[assignment]
    train = {**TABLES["train"], "checkpoint_every": every}
    spec = Spec.from_dict(spec_of(place, **{**TABLES, "train": train}))
    run(spec, Options(place / "results", dispatcher="inline", check=False), quiet)


def steps_by_process(place: Path) -> list[list[int]]:
    """The steps that each driver took, in order."""
    runs: dict[str, list[int]] = {}
    for line in (place / "steps.log").read_text().splitlines():
        pid, step = line.split()
        runs.setdefault(pid, []).append(int(step))
    return list(runs.values())


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def test_a_killed_sweep_goes_on_in_the_middle_of_a_trial(tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for place in (plain, killed):
        place.mkdir()
    assert finish(start(run_with_checkpoints, plain, 0)) == 0
    kept = killed / "results" / "tiny" / "checkpoints"
    driver = start(run_with_checkpoints, killed, 4)
    wait_for(lambda: list(kept.glob("*/step-000000016.json")))
    driver.kill()
    finish(driver)
    driver = start(run_with_checkpoints, killed, 4)
    wait_for(lambda: len(steps_by_process(killed)) == 2)
    assert finish(driver) == 0
    first, second = steps_by_process(killed)
    assert max(first) >= 15  # the sixteenth
    assert second[0] >= 16
    assert len(first) + len(second) <= 2 * 40 + 4, "more than a checkpoint's steps again"
    expected, found = answers(plain), answers(killed)
    assert found["curves"] == expected["curves"]
    assert found == expected
    assert not kept.exists()
