"""A trial that hangs, is killed, exits, raises or returns garbage fails, with reason and log."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import attempt, quiet
from faults import formula, spec_of

from telescope import Spec
from telescope.answer.finished import open_result
from telescope.dispatch.queue import LINE_LENGTH, Trainer
from telescope.records import CurvePoint, Point, Result, Status, Trial
from telescope.sweep.run import Options, run
from telescope.train import loop

TRIAL = Trial(32, Point.of(lr=0.01), 0)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class Rude(BaseException):
    pass


def complete(trial: Trial = TRIAL, **changes: Any) -> Result:
    return dataclasses.replace(Result(trial, Status.COMPLETE, loss=1.0), **changes)


def forged(**values: Any) -> Result:
    """A result that its own checks would refuse."""
    result = complete()
    for name, value in values.items():
        object.__setattr__(result, name, value)
    return result


GARBAGE: dict[str, Any] = {
    "None": None,
    "a number": 1.0,
    "a string": "0.5",
    "a class": Result,
    "another trial's": complete(Trial(64, TRIAL.point, 0)),
    "nan": forged(loss=math.nan),
    "no loss": forged(loss=None, status="complete"),
    "loss of text": forged(loss="1.0"),
    "flops of None": forged(flops=None),
    "infinite seconds": forged(seconds=math.inf),
    "a reason of bytes": forged(reason=b"x"),
    "a curve of numbers": forged(curve=(1.0, 2.0)),
    "a curve that is endless": forged(curve=iter(lambda: 1, 2)),
    "status of text": forged(status="complete"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_a_failure(kind: str) -> None:
    result = attempt(lambda trial: GARBAGE[kind], TRIAL)
    assert (result.status, result.loss) == (Status.FAILED, None)
    assert result.reason.startswith("TrialError: the trainer")


def raising(error: BaseException) -> Trainer:
    def train(trial: Trial) -> Result:
        raise error

    return train


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such\ncorpus"), "ValueError: no such corpus"),
        (Unprintable(), "Unprintable: its message cannot be printed"),
        (Rude("out"), "Rude: out"),
        (SystemExit(3), "SystemExit: 3"),
        (MemoryError(), "MemoryError: no message"),
        (GeneratorExit(), "GeneratorExit: no message"),
        (RuntimeError("bad \udcff byte"), "RuntimeError: bad \\udcff byte"),
        (RuntimeError("zero\0"), "RuntimeError: zero\\0"),
    ],
)
def test_whatever_is_raised_is_a_failure(error: BaseException, message: str) -> None:
    result = attempt(raising(error), TRIAL)
    assert result.status is Status.FAILED
    assert result.reason.split("\n")[0] == message
    assert "in train" in result.reason, "the tail of the traceback is kept"
    result.reason.encode()


def test_ctrl_c_is_no_failure() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(raising(KeyboardInterrupt()), TRIAL)


def test_a_long_message_is_cut() -> None:
    result = attempt(raising(ValueError("x" * 10_000_000)), TRIAL)
    assert max(map(len, result.reason.splitlines())) <= LINE_LENGTH + 2


def test_numbers_of_other_libraries_are_taken_as_plain_ones() -> None:
    result = attempt(lambda trial: complete(flops=np.float32(2.0), seconds=3), TRIAL)
    assert (result.status, type(result.flops), type(result.seconds)) == (
        *(Status.COMPLETE, float, float),
    )


def test_what_hangs_is_interrupted_even_if_it_catches_everything() -> None:
    def train(trial: Trial) -> Result:
        while True:
            try:
                time.sleep(60)
            except Exception:
                continue

    handler = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    result = attempt(train, TRIAL, timeout=0.2)
    assert time.monotonic() - start < 5
    assert result.reason.startswith("Hung: no end after 0.2 s (the spec's timeout)")
    assert "time.sleep(60)" in result.reason
    assert attempt(lambda trial: complete(), TRIAL, timeout=0.2).status is Status.COMPLETE
    time.sleep(0.3)  # no alarm is left behind
    assert signal.getsignal(signal.SIGALRM) is handler


def test_one_bad_trial_of_many_does_not_stop_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage closes with a tenth of failures that are not beside the optimum."""
    seen: list[Trial] = []

    def train(config: Any, trial: Trial) -> Result:
        if trial.lr > 0.9:
            seen.append(trial)
            return None  # type: ignore[return-value]
        return complete(trial, loss=formula(trial), curve=(CurvePoint(1, 1.0, 1.0),))

    monkeypatch.setattr(loop, "train", train)
    lr = {"low": 0.001, "high": 1.0, "points": 12}
    tables = {"ladder": {"widths": [16]}, "axes": {"lr": lr, "weight_decay": {"value": 0.1}}}
    spec = Spec.from_dict(spec_of(tmp_path, **tables))
    options = Options(tmp_path / "results", dispatcher="inline", check=False)
    ladder = run(spec, options, quiet).ladder
    assert ladder.is_finished
    assert len(seen) == 3
    (failed,) = [r for r in open_result("tiny", options.results).results if r.loss is None]
    assert failed.status is Status.FAILED
    assert failed.reason.startswith("failed 3 times; last: TrialError: the trainer returned None")


def test_the_timeout_of_the_spec_reaches_the_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any, trial: Trial) -> Result:
        time.sleep(60)
        return complete(trial)

    monkeypatch.setattr(loop, "train", train)
    spec = Spec.from_dict(spec_of(tmp_path, train={"timeout": 0.05}))
    ladder = run(spec, Options(tmp_path, dispatcher="inline", check=False), quiet).ladder
    assert ladder.stuck is not None
    assert "no end after 0.05 s" in ladder.stuck
