"""A target run on one rank: a trial bit for bit, checkpoints, and what a later start may change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from conftest import with_dropout
from safetensors import safe_open
from targets import STEPS, TRIAL, curve, made, model_of, result_of, tiny_run, trained

from telescope.config import OptimizerConfig
from telescope.errors import ModelError, ResumeError, SpecError, StoreError
from telescope.records import Status
from telescope.target import checkpoint, layers, train
from telescope.target.folder import RunFolder, describe_run, summary
from telescope.target.ranks import Ranks
from telescope.target.record import Manner, TargetRun
from telescope.target.sharding import ShardedOptimizers
from telescope.target.train import read_run, train_target
from telescope.train.loop import TelescopeTrainer, token_loss


class Killed(BaseException):
    """Ends a run in this process as a kill would: nothing of it is cleaned up."""


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, start: Callable[[], Any]) -> None:
    """Start a run that is killed before it takes a step."""
    take_step = train._Training._take_step

    def stopping(self: Any, number: int) -> Any:
        if number == step:
            raise Killed
        return take_step(self, number)

    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(train._Training, "_take_step", stopping)
        start()
        raise AssertionError("it was not killed")


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_one_rank_is_a_trial_bit_for_bit(
    name: Any, schedule: str, corpus_file: Path, tmp_path: Path
) -> None:
    run = tiny_run(corpus_file, optimizer=OptimizerConfig(name=name), schedule=schedule)
    trial = TelescopeTrainer(run.config)(TRIAL)
    result = trained(tmp_path / "run", run)
    assert result["loss"] == trial.loss
    assert not result["diverged"]
    mine = [row["loss"] for row in curve(tmp_path / "run")]
    assert mine == [str(point.train_loss) for point in trial.curve]


def test_a_swept_warm_up_counts(corpus_file: Path, tmp_path: Path) -> None:
    run = tiny_run(corpus_file)
    trial = replace(TRIAL, point=type(TRIAL.point).of({**TRIAL.point, "warmup": 0.5}))
    wanted = TelescopeTrainer(run.config)(trial).loss
    assert trained(tmp_path / "run", replace(run, trial=trial))["loss"] == wanted
    assert trained(tmp_path / "other", run)["loss"] != wanted


def test_a_divergence_is_an_end_without_a_loss(corpus_file: Path, tmp_path: Path) -> None:
    run = tiny_run(corpus_file)
    trial = replace(TRIAL, point=type(TRIAL.point).of(lr=1e4, weight_decay=0.1))
    wanted = TelescopeTrainer(run.config)(trial)
    assert wanted.status is Status.DIVERGED
    result = trained(tmp_path / "run", replace(run, trial=trial))
    assert (result["diverged"], result["loss"]) == (True, None)
    assert result["reason"] == wanted.reason
    run_folder = RunFolder(tmp_path / "run")
    assert run_folder.state == "diverged"
    assert describe_run(summary(run_folder)).startswith("target run: diverged at step")


@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_a_killed_run_goes_on_bit_for_bit(
    step: int, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(corpus_file, model=with_dropout())
    trained(tmp_path / "whole", run, checkpoint_every=3)
    folder = made(tmp_path / "killed", run)
    manner = Manner(checkpoint_every=3)
    stopped_at(step, monkeypatch, lambda: train_target(folder.path, manner, Ranks()))
    assert folder.state == "interrupted"
    taken: list[int] = []
    take_step = train._Training._take_step

    def noting(self: Any, number: int) -> Any:
        taken.append(number)
        return take_step(self, number)

    monkeypatch.setattr(train._Training, "_take_step", noting)
    train_target(folder.path, manner, Ranks())
    assert taken == list(range(step // 3 * 3, STEPS)), "only the steps since the last checkpoint"
    assert result_of(folder.path) == result_of(tmp_path / "whole")
    assert curve(folder.path) == curve(tmp_path / "whole")
    for name, tensor in model_of(tmp_path / "whole", STEPS).items():
        assert torch.equal(tensor, model_of(folder.path, STEPS)[name]), name


def test_the_random_state_matters_in_that_test(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, manner = tiny_run(corpus_file, model=with_dropout()), Manner(checkpoint_every=3)
    trained(tmp_path / "whole", run)
    folder = made(tmp_path / "killed", run)
    stopped_at(6, monkeypatch, lambda: train_target(folder.path, manner, Ranks()))
    monkeypatch.setattr(checkpoint, "put_random", lambda *_: None)
    train_target(folder.path, manner, Ranks())
    assert result_of(folder.path) != result_of(tmp_path / "whole")


def test_the_last_two_checkpoints_are_kept_and_those_asked_for(
    corpus_file: Path, tmp_path: Path
) -> None:
    trained(tmp_path / "run", tiny_run(corpus_file), checkpoint_every=2, keep_every=4)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-10", "step-12", "step-4", "step-8"]
    with safe_open(tmp_path / "run/checkpoints/step-12/model.safetensors", "pt") as saved:
        names = set(saved.keys())
    assert "blocks.0.attention.query.weight" in names
    assert "frequencies_F" not in names, "tables that the model rebuilds are not its state"


@pytest.mark.parametrize("damage", ["no state", "cut model", "cut optimizer", "no optimizer"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, manner = tiny_run(corpus_file), Manner(checkpoint_every=3)
    trained(tmp_path / "whole", run)
    folder = made(tmp_path / "killed", run)
    stopped_at(8, monkeypatch, lambda: train_target(folder.path, manner, Ranks()))
    last = folder.checkpoints / "step-6"
    what, file = damage.split()
    path = last / {"state": "state.json", "model": "model.safetensors"}.get(
        file, "optimizer-0-of-1.safetensors"
    )
    if what == "no":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    train_target(folder.path, manner, Ranks())
    assert result_of(folder.path) == result_of(tmp_path / "whole")


def test_a_full_disk_is_said_and_nothing_is_lost(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, manner = tiny_run(corpus_file), Manner(checkpoint_every=3)
    trained(tmp_path / "whole", run)
    folder = made(tmp_path / "full", run)
    write = checkpoint._write_tensors

    def full(path: Path, tensors: Any) -> None:
        if "step-6" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write_tensors", full)
        with pytest.raises(StoreError, match="No space left"):
            train_target(folder.path, manner, Ranks())
    assert [path.name for path in folder.checkpoints.glob("step-*")] == ["step-3"]
    train_target(folder.path, manner, Ranks())
    assert result_of(folder.path) == result_of(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(corpus_file: Path, tmp_path: Path) -> None:
    result = trained(tmp_path / "run", tiny_run(corpus_file))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train_target(tmp_path / "run", Manner(), Ranks()) == result


def test_run_json_says_all_that_the_losses_depend_on(corpus_file: Path, tmp_path: Path) -> None:
    run = tiny_run(corpus_file)
    folder = made(tmp_path / "run", run)
    again = read_run(folder)
    assert again.identity == run.identity
    assert again.fingerprint == run.fingerprint
    assert again.config == run.config
    train_table = replace(run.config.train, steps=99, evals=3, timeout=5.0)
    changed = replace(run, clip=1.0, config=replace(run.config, train=train_table))
    assert sorted(run.differences(changed)) == ["clip: 0.0, now 1.0", "train.steps: 12, now 99"]
    text = replace(run.config.model, text=run.config.model.text + "# another\n")
    (line,) = run.differences(replace(run, config=replace(run.config, model=text)))
    assert line.startswith("model.text: hash ")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"schema": 99}'])
def test_a_damaged_run_json_is_said_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ResumeError, match=r"run\.json.*cannot be read") as error:
        read_run(RunFolder(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(ResumeError, match=r"holds no run\.json"):
        train_target(tmp_path / "elsewhere", Manner(), Ranks())


def test_micro_batches_give_the_same_losses_within_rounding(
    corpus_file: Path, tmp_path: Path
) -> None:
    run = tiny_run(corpus_file)
    whole = trained(tmp_path / "whole", run)
    for size in (1, 3):
        parts = trained(tmp_path / f"by-{size}", run, micro_batch=size)
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_clipping_holds_the_norm(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = ShardedOptimizers.step

    def watching(self: Any, share: float) -> None:
        grads = [p.grad for p in self._parameters.values()]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        step(self, share)

    monkeypatch.setattr(ShardedOptimizers, "step", watching)
    trained(tmp_path / "free", tiny_run(corpus_file))
    free, most = norms.copy(), sorted(norms)[STEPS // 2]
    norms.clear()
    trained(tmp_path / "clipped", tiny_run(corpus_file, clip=most))
    assert max(norms) == pytest.approx(most, rel=1e-5)
    assert norms[0] == pytest.approx(min(free[0], most), rel=1e-5)


def test_only_one_launcher_holds_a_run(corpus_file: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "run", tiny_run(corpus_file))
    with folder.held():
        assert folder.state == "running"
        with pytest.raises(ResumeError, match=f"in use by process {os.getpid()}"), folder.held():
            pass
    assert folder.state == "prepared"


def test_a_run_of_another_schema_is_not_guessed_at(corpus_file: Path, tmp_path: Path) -> None:
    data = tiny_run(corpus_file).as_dict()
    assert TargetRun.from_dict(json.loads(json.dumps(data))).as_dict() == data
    with pytest.raises(ValueError, match="schema 2"):
        TargetRun.from_dict({**data, "schema": 2})


def test_bf16_is_a_trials_and_the_weights_stay_in_fp32(corpus_file: Path, tmp_path: Path) -> None:
    run = tiny_run(corpus_file, precision="bf16")
    wanted = TelescopeTrainer(run.config)(TRIAL).loss
    assert trained(tmp_path / "run", run)["loss"] == wanted
    assert trained(tmp_path / "exact", tiny_run(corpus_file))["loss"] != wanted
    assert {t.dtype for t in model_of(tmp_path / "run", STEPS).values()} == {torch.float32}


def test_layers_that_are_computed_twice_give_the_same_losses(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(corpus_file, model=with_dropout())
    trained(tmp_path / "kept", run)
    called: list[int] = []
    recompute = torch.utils.checkpoint.checkpoint

    def counting(*arguments: Any, **keywords: Any) -> Any:
        called.append(1)
        return recompute(*arguments, **keywords)

    monkeypatch.setattr(layers, "checkpoint", counting)
    trained(tmp_path / "twice", run, activation_checkpointing=True)
    assert len(called) > STEPS
    assert curve(tmp_path / "twice") == curve(tmp_path / "kept")
    for name, tensor in model_of(tmp_path / "kept", STEPS).items():
        assert torch.equal(tensor, model_of(tmp_path / "twice", STEPS)[name]), name


def test_a_model_without_layers_says_so(corpus_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--activation-checkpointing: .* no nn.ModuleList"):
        layers.recompute_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(SpecError, match="--shard: got 1 rank, must be 2 or more"):
        trained(tmp_path / "run", tiny_run(corpus_file), shard=True)


def test_compiled_where_the_run_says_so(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for torch's compiler, which takes half a minute."""
    asked: list[int] = []

    def compiled() -> Any:
        asked.append(1)
        return token_loss

    monkeypatch.setattr(train, "compiled_token_loss", compiled)
    trained(tmp_path / "plain", tiny_run(corpus_file))
    assert not asked
    trained(tmp_path / "compiled", tiny_run(corpus_file, compile=True))
    assert len(asked) == STEPS
