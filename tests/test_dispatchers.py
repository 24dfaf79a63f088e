"""The promises of a dispatcher, kept by each: inline, on Ray, and on workers that join.

A sweep costs Ray some seconds, so there are few, on one Ray: one of trials that end in every way,
one of packs, one whose trainer cannot work, and one of trials that hang or kill.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import left_over
from joiners import run_on_workers
from stages import Recorded

from telescope.dispatch import inline
from telescope.dispatch.inline import run_inline
from telescope.dispatch.joining import driver
from telescope.dispatch.packs import Packs
from telescope.dispatch.queue import Queue, Trainer
from telescope.records import Result, Status, Trial

RAY = [pytest.mark.ray, pytest.mark.xdist_group("ray")]
EACH = ["inline", pytest.param("ray", marks=RAY), "workers"]


class Dispatcher(NamedTuple):
    """One of the dispatchers, ready to run a sweep."""

    name: str
    run: Callable[..., None]
    """Takes a source, a trainer, and the options that all dispatchers have."""
    workers: int
    module: Any
    """Its module, in which its queue can be replaced."""


@pytest.fixture(scope="module", params=EACH)
def dispatcher(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dispatcher]:
    """Each dispatcher; that of Ray has one Ray for all sweeps of this file."""
    if request.param == "inline":
        yield Dispatcher("inline", run_inline, 1, inline)
        return
    if request.param == "workers":
        folder = tmp_path_factory.mktemp("board")
        spawn = multiprocessing.get_context("spawn")
        run = partial(run_on_workers, folder=folder, context=spawn)
        yield Dispatcher("workers", run, 2, driver)
        return
    ray_tune = pytest.importorskip("telescope.dispatch.ray.tune")
    with ray_tune.opened(ray_tune.Size(2)) as session:
        run = partial(ray_tune.run_ray, session=session)
        yield Dispatcher("ray", run, 2, ray_tune)


class Mixed(NamedTuple):
    """A sweep of trials that end in every way, when it is over."""

    source: Recorded
    kinds: dict[Trial, str]
    """Trial → how it ends; trials that are not here complete."""
    known: list[Trial]
    """Those that had a result before."""


@pytest.fixture(scope="module")
def mixed(dispatcher: Dispatcher, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """A sweep of two stages, of the first of which two trials have been trained before."""
    source, place = Recorded(9, 3), tmp_path_factory.mktemp("mixed")
    names = ["raises", "heals", "diverges", "garbage", "leaves", "says so", "numpy"]
    kinds = dict(zip(source.stages[0], names, strict=False))
    known = source.stages[0][7:]
    source.results |= {trial: Result(trial, Status.COMPLETE, loss=9.0) for trial in known}

    # Inside, so that Ray pickles it by value: the workers cannot import this file.
    def train(trial: Trial) -> Any:
        kind = kinds.get(trial)
        if kind == "raises":
            raise ValueError("no such\ncorpus")
        if kind == "heals":
            tries = sorted(place.iterdir())
            if len(tries) < 2:
                (place / str(len(tries))).touch()
                raise OSError("disk")
        if kind == "diverges":
            return Result(trial, Status.DIVERGED, reason="loss rose")
        if kind == "leaves":
            raise SystemExit(3)
        if kind == "says so":
            return Result(trial, Status.FAILED, reason="no memory")
        if kind == "numpy":
            import numpy as np

            numbers: Any = {"loss": np.float32(0.5), "flops": np.int64(2)}
            return Result(trial, Status.COMPLETE, **numbers)
        return None if kind == "garbage" else Result(trial, Status.COMPLETE, loss=trial.lr)

    dispatcher.run(source, train)
    return Mixed(source, kinds, known)


def of(mixed: Mixed, kind: str) -> Result:
    """The result of the trial that ends so."""
    return next(mixed.source.results[t] for t, name in mixed.kinds.items() if name == kind)


def test_every_trial_is_told_once(mixed: Mixed) -> None:
    told = Counter(result.trial for results in mixed.source.told for result in results)
    asked = {trial for stage in mixed.source.stages for trial in stage} - set(mixed.known)
    assert told == Counter(asked)


def test_what_has_a_result_is_not_trained_again(mixed: Mixed) -> None:
    assert not set(mixed.known) & set(mixed.source.started)
    assert all(mixed.source.results[trial].loss == 9.0 for trial in mixed.known)


FAILURES = {
    "raises": "ValueError: no such corpus",
    "garbage": "TrialError: the trainer returned NoneType, must be a Result",
    "leaves": "SystemExit: 3",
    "says so": "no memory",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_tried_three_times_and_never_ranked(mixed: Mixed, kind: str) -> None:
    failed = of(mixed, kind)
    assert (failed.status, failed.loss) == (Status.FAILED, None)
    assert failed.reason.splitlines()[0] == f"failed 3 times; last: {FAILURES[kind]}"
    assert ("in train" in failed.reason) == (kind in ("raises", "leaves")), "where it was raised"
    assert mixed.source.started.count(failed.trial) == 3


def test_a_failure_that_heals_is_complete(mixed: Mixed) -> None:
    healed = of(mixed, "heals")
    assert (healed.status, healed.loss, healed.reason) == (Status.COMPLETE, healed.trial.lr, "")
    assert mixed.source.started.count(healed.trial) == 3


def test_a_divergence_is_never_tried_again(mixed: Mixed) -> None:
    diverged = of(mixed, "diverges")
    assert (diverged.status, diverged.loss) == (Status.DIVERGED, None)
    assert diverged.reason == "loss rose"
    assert mixed.source.started.count(diverged.trial) == 1


def test_a_failure_is_tried_again_after_what_has_not_been_tried(mixed: Mixed) -> None:
    """Trouble that heals with time, a full disk say, is given some."""
    first = [trial for trial in mixed.source.stages[0] if trial not in mixed.known]
    assert mixed.source.started[: len(first)] == first


def test_a_stage_begins_when_the_one_before_is_told(mixed: Mixed) -> None:
    assert mixed.source.started[-3:] == mixed.source.stages[1]
    widths = [result.trial.width for results in mixed.source.told for result in results]
    assert widths == sorted(widths)


def test_numbers_are_pythons_and_losses_exact(mixed: Mixed) -> None:
    numbers = of(mixed, "numpy")
    assert (numbers.loss, numbers.flops) == (0.5, 2.0)
    assert {type(numbers.loss), type(numbers.flops)} == {float}
    assert [mixed.source.results[t].loss for t in mixed.source.stages[1]] == [0.01, 0.02, 0.03]


def test_a_result_says_which_process_it_comes_from(mixed: Mixed, dispatcher: Dispatcher) -> None:
    workers = {result.worker for results in mixed.source.told for result in results}
    assert all(":" in worker for worker in workers)
    is_here = f":{os.getpid()}" in {worker[worker.index(":") :] for worker in workers}
    assert is_here == (dispatcher.name == "inline")
    assert not mixed.source.released


@pytest.fixture(scope="module")
def hopeless(dispatcher: Dispatcher) -> Recorded:
    """A sweep whose trainer works at the first width and at no other; its source goes on."""
    source = Recorded(2, 5)

    def train(trial: Trial) -> Result:
        if trial.width > 32:
            raise RuntimeError(f"out of memory at step {trial.lr}")
        return Result(trial, Status.COMPLETE, loss=trial.lr)

    dispatcher.run(source, train)
    return source


def test_a_trainer_that_cannot_work_is_tried_a_few_times_in_all(hopeless: Recorded) -> None:
    """A trial that fails as the first three of its width did is tried once; widths are apart."""
    assert Counter(hopeless.started) == Counter(hopeless.stages[0] + hopeless.stages[1])
    reasons = [hopeless.results[trial].reason for trial in hopeless.stages[1]]
    why = "failed as the first {} trials of width 64 did, so tried once: RuntimeError: out of"
    numbers = Counter(
        number for number in (3, 4, 5) for r in reasons if r.startswith(why.format(number))
    )
    assert numbers[3] == 3, "those that showed it"
    assert numbers.total() == 5, "and those on their way"


def test_a_pack_is_told_together_and_gives_back_what_it_has_not_trained(
    dispatcher: Dispatcher,
) -> None:
    """The fault of one costs the others nothing: they are trained alone."""
    source, lines = Recorded(6, 6), list[Any]()
    bad, fatal = source.stages[0][1], source.stages[1][0] if dispatcher.name != "inline" else None

    class Fake:
        def __call__(self, trial: Trial) -> Result:
            if trial == bad:
                raise ValueError("this point's fault")
            return Result(trial, Status.COMPLETE, loss=trial.lr, reason="alone")

        def train_pack(self, members: Sequence[Trial]) -> Iterator[Result]:
            if fatal in members:
                os._exit(3)
            for trial in members:
                if trial == bad:
                    raise ValueError("this point's fault")
                yield Result(trial, Status.COMPLETE, loss=trial.lr, reason=f"of {len(members)}")

        def obstacle(self, trial: Trial) -> str:
            return ""

        def probe_pack(self, members: Sequence[Trial]) -> None:
            return None

    dispatcher.run(source, Fake(), packs=Packs(3, note=lines.append))
    first, second = source.stages
    told = Counter(result.trial for results in source.told for result in results)
    assert told == Counter(first + second)
    reasons = [source.results[trial].reason.partition(" times")[0] for trial in first]
    assert reasons == ["of 3", "failed 3", "alone", "of 3", "of 3", "of 3"]
    assert source.released == [tuple(first[1:3])]
    assert Counter(source.started[: source.started.index(second[0])]) == Counter(
        {**dict.fromkeys(first, 1), first[1]: 4, first[2]: 2}
    )
    assert [result.trial for result in next(r for r in source.told if len(r) > 1)] == first[3:]
    assert next(line["ended"] for line in lines if "ended" in line) == [str(first[0])]
    alone = [line["alone"] for line in lines if line.get("alone")]
    assert alone[0] == [str(trial) for trial in first[1:3]]
    assert "this point's fault" in next(line["why"] for line in lines if line.get("alone"))

    if fatal:  # the others of a pack whose process dies have failed, and are tried again alone
        assert [source.results[t].reason for t in second] == ["alone"] * 3 + ["of 3"] * 3
        assert [source.started.count(trial) for trial in second] == [2] * 3 + [1] * 3
        assert alone[1] == [str(trial) for trial in second[:3]]
    else:
        assert {source.results[trial].reason for trial in second} == {"of 3"}


def bad_trainer(bad: dict[Trial, str]) -> Trainer:
    """Each of the bad trials does not come back, in its own way."""

    def train(trial: Trial) -> Result:
        kind = bad.get(trial)
        if kind:
            print("last words of", trial)
        if kind == "exits":
            os._exit(7)
        if kind == "is killed":  # as the kernel does to what has eaten the memory
            eaten: list[bytes] = []
            while len(eaten) < 20:
                eaten.append(bytes(10_000_000))
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hangs in C":
            sum(range(10**13))  # no signal interrupts it, for hours
        if kind == "hangs":
            time.sleep(600)
        return Result(trial, Status.COMPLETE, loss=trial.lr)

    return train


def test_what_does_not_come_back_is_no_harm_to_the_others(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial hangs; where it has a process of its own, it may also be fatal to that."""
    monkeypatch.setattr(dispatcher.module, "Queue", partial(Queue, retries=0))
    source = Recorded(8, 2)
    fatal = ["exits", "is killed", "hangs in C"] if dispatcher.name != "inline" else []
    bad = dict(zip(source.stages[0], [*fatal, "hangs"], strict=False))
    start = time.monotonic()
    dispatcher.run(source, bad_trainer(bad), timeout=1.5)
    assert 1.5 <= time.monotonic() - start < 300
    good = [trial for stage in source.stages for trial in stage if trial not in bad]
    assert [source.results[trial].loss for trial in good] == [trial.lr for trial in good]
    found = {bad[trial]: source.results[trial] for trial in bad}
    assert {result.status for result in found.values()} == {Status.FAILED}
    assert "no end after 1.5 s (the spec's timeout)" in found["hangs"].reason
    for kind in fatal[:2]:
        assert f"last words of {found[kind].trial}" in found[kind].reason
    if fatal:
        assert "Timeout (0:00:11" in found["hangs in C"].reason, "the stack of what hung is kept"
        assert "in train" in found["hangs in C"].reason


def test_a_source_that_asks_for_nothing_ends_at_once(dispatcher: Dispatcher) -> None:
    source = Recorded(0)
    dispatcher.run(source, bad_trainer({}))
    assert not source.started


SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
from telescope.records import Point, Result, Status, Trial, TrialSource

class Source(TrialSource):
    trials = [Trial(32, Point.of(lr=lr), 0) for lr in (0.1, 100.0, 200.0)]
    def ask(self):
        return self.trials
    def tell(self, result):
        if is_full:
            raise OSError("disk full")
        self.trials = [t for t in self.trials if t != result.trial]
        print("told", flush=True)

def train(trial):
    time.sleep(trial.lr)
    return Result(trial, Status.COMPLETE, loss=1.0)

def run():
    if sys.argv[1] == "inline":
        from telescope.dispatch.inline import run_inline
        run_inline(Source(), train)
    elif sys.argv[1] == "workers":
        from joiners import run_on_workers
        folder, context = Path(sys.argv[0]).parent, multiprocessing.get_context("fork")
        run_on_workers(Source(), train, folder=folder, context=context)
    else:
        from telescope.dispatch.ray.tune import Size, opened, run_ray
        with opened(Size(2)) as session:
            run_ray(Source(), train, session)

is_full = True
try:
    run()
except OSError as error:
    print(error, flush=True)
is_full = False
try:
    run()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("name", EACH)
def test_what_the_source_raises_and_ctrl_c_end_a_run_within_seconds(
    name: str, tmp_path: Path
) -> None:
    """The trials that have ended are told, running ones are not, and nothing is left running."""
    if name == "ray":
        pytest.importorskip("telescope.dispatch.ray.tune")
    script, mark = tmp_path / "sweep.py", str(tmp_path)
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TELESCOPE_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as sweep:
        assert sweep.stdout is not None
        first = [sweep.stdout.readline(), sweep.stdout.readline()]
        assert first == ["disk full\n", "told\n"], "".join(first) + sweep.stdout.read()
        time.sleep(0.5)
        start = time.monotonic()
        os.killpg(sweep.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
        assert sweep.stdout.read() == "interrupted\n"
    assert sweep.wait() == 0
    assert time.monotonic() - start < 6
    assert not left_over(mark, patience=3)
