"""`TelescopeSearch` in Tuners as people write them: small functions and classes, trained by Ray.

The answers are checked against the ladder asked and told by hand on the same losses.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("telescope.dispatch.ray.tune")  # before Ray, so that it listens on loopback

import ray
from ray import cloudpickle, tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from telescope import Ladder, Spec
from telescope.answer.finished import open_result
from telescope.errors import RefusedError, ResumeError, SpecError, StoreError
from telescope.records import Choice
from telescope.tune import GATE, TelescopeSearch, _Gate

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


def spec(**tables: Any) -> dict[str, Any]:
    """Two widths, six trials and then two; an axis that the program does not know."""
    return {
        "name": "tuner",
        "ladder": {"widths": [16, 32], "policy": "paper"},
        "target": {"width": 64},
        "axes": {
            "lr": {"low": 0.01, "high": 0.04, "points": 3},
            "temperature": {"low": 0.5, "high": 2.0, "points": 2},
        },
        "cost": {"flops": {"16": 1e6, "32": 4e6, "64": 16e6}},
        "budget": {"max_over_target": 20.0},
        **tables,
    }


def loss_at(config: dict[str, Any]) -> float:
    """A bowl around lr 0.02, temperature 1."""
    away = math.log2(config["lr"] / 0.02) ** 2 + math.log2(config["temperature"] / 0.9) ** 2
    return float(1 + 0.1 * away + 1 / config["width"])


def by_hand(data: dict[str, Any]) -> tuple[Choice, ...]:
    ladder = Ladder(Spec.from_dict(data))
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(trial, loss=loss_at({"width": trial.width, **trial.point}))
    return ladder.choices


def train(config: dict[str, Any]) -> None:
    """Reports three times, of which the last counts; one trial's process dies at first."""
    mark = Path(config["marks"]) / "died"
    if (config["lr"], config["temperature"]) == (0.01, 2.0) and not mark.exists():
        mark.touch()
        os._exit(1)
    for loss in (9.0, 8.0, loss_at(config)):
        tune.report({"loss": loss})


class Warm(tune.Trainable):  # type: ignore[misc]
    def setup(self, config: dict[str, Any]) -> None:
        self.settings = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.settings = new_config
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(0.1)
        return {"loss": loss_at(self.settings), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "lr").write_text(str(self.settings["lr"]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray for all Tuners of this file; the searcher alone needs none."""
    with patch.dict(os.environ, RAY_worker_niceness="0"):  # the other tests would starve them
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()


def on_ray(test: Any) -> Any:
    """Mark a test that fits a Tuner: it gets the cluster, and the others their own worker."""
    marks = (pytest.mark.ray, pytest.mark.xdist_group("ray-tuner"))
    for mark in (*marks, pytest.mark.usefixtures("cluster")):
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def fit(search: Any, trainable: Any, folder: Path, **settings: Any) -> Any:
    """A Tuner with what a user would give it."""
    run = {"max_failures": settings.pop("max_failures", 0)}
    callbacks = settings.pop("callbacks", None)
    tuner = tune.Tuner(
        trainable,
        param_space=settings.pop("param_space", None),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, **settings),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            name="experiment",
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(**run),
        ),
    )
    return tuner.fit()


@on_ray
def test_a_function_ends_in_the_ladders_answer(tmp_path: Path) -> None:
    """With constants beside the axes, stage by stage; what dies is Tune's to try again."""
    search, space = TelescopeSearch(spec()), {"marks": str(tmp_path)}
    settings = {"reuse_actors": True, "max_failures": 1}
    results = fit(search, train, tmp_path, param_space=space, **settings)
    assert (tmp_path / "died").exists()
    assert search.ladder.choices == by_hand(spec())
    configs = [result.config for result in results]
    assert len(configs) == len(search.ladder.results)
    assert all(config["marks"] == str(tmp_path) and config["seed"] == 0 for config in configs)
    narrow = {r.trial for r in search.ladder.results if r.trial.width == 16}
    assert len(narrow) == 6


@on_ray
def test_warm_workers_are_kept_over_the_stages(tmp_path: Path) -> None:
    search = TelescopeSearch(spec())
    settings = {"max_concurrent_trials": 2, "reuse_actors": True}
    results = fit(search, search.warm(Warm), tmp_path, **settings)
    assert search.ladder.choices == by_hand(spec())
    trained = [r for r in results if GATE not in r.config]
    assert len(trained) == len(search.ladder.results) < len(results)
    assert len({result.metrics["pid"] for result in trained}) <= 2
    best = results.get_best_result("loss", "min").config
    assert (best["width"], best["lr"]) == (32, 0.02)


def test_a_function_can_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr("telescope.tune._wait", waited.append)
    wrapped = TelescopeSearch(spec()).warm(loss_at)
    assert wrapped({GATE: "name:3"}) is None
    assert waited == ["name:3"]
    assert wrapped({"width": 1, "lr": 0.02, "temperature": 0.9}) == 2.0


class Interrupt(tune.Callback):  # type: ignore[misc]
    """Interrupt as Ctrl-C does, once, after some trials."""

    def __init__(self, mark: Path, after: int = 3) -> None:
        self.mark, self.after = mark, after

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        ended = sum(trial.status == "TERMINATED" for trial in trials)
        if ended >= self.after and not self.mark.exists():
            self.mark.touch()
            raise InterruptedError


def ends_as_by_hand(folder: Path, space: dict[str, str]) -> None:
    """Restore an experiment and fit it to its end; nothing is trained twice."""
    results = tune.Tuner.restore(str(folder), trainable=train, param_space=space).fit()
    restored = TelescopeSearch(spec())
    restored.restore_from_dir(str(folder))
    assert restored.ladder.choices == by_hand(spec())
    assert len(results) == len(restored.ladder.results)


@on_ray
def test_tuner_restore_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that Tune knows to have ended are not run again."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    search, space = TelescopeSearch(spec()), {"marks": str(tmp_path)}
    (tmp_path / "died").touch()
    settings = {"reuse_actors": True, "callbacks": [Interrupt(tmp_path / "interrupted")]}
    with pytest.raises(InterruptedError):
        fit(search, train, tmp_path, param_space=space, **settings)
    ends_as_by_hand(tmp_path / "experiment", space)


@on_ray
def test_a_restored_search_asks_again_for_what_tune_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a kill between the two files that Tune writes: one names a trial of its own."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    (tmp_path / "died").touch()
    search, space = TelescopeSearch(spec()), {"marks": str(tmp_path)}
    callbacks = [Interrupt(tmp_path / "interrupted", after=1)]  # some are still to be asked for
    with pytest.raises(InterruptedError):
        fit(search, train, tmp_path, param_space=space, callbacks=callbacks, reuse_actors=True)
    (file,) = (tmp_path / "experiment").glob("searcher-state-*.json")
    state = json.loads(file.read_text())
    known = [row for row in [*state["results"], *state["running"].values()] if row["seed"] == 0]
    lost = next(
        t
        for t in Ladder(Spec.from_dict(spec())).ask()
        if not any((row["width"], row["point"]) == (t.width, dict(t.point)) for row in known)
    )
    state["running"]["unknown"] = lost.as_dict()
    file.write_text(json.dumps(state))
    ends_as_by_hand(tmp_path / "experiment", space)
    assert f"Tune does not run {lost} any more" in caplog.text


# Without Ray from here on: the searcher as Tune calls it.


def drive(search: Searcher, report: Any, limit: int = 100) -> int:
    """Call the searcher as Tune does, two at once; returns how many trials it gave."""
    running: dict[str, Any] = {}
    for number in range(limit):
        while len(running) < 2:
            given = search.suggest(str(number * 10 + len(running)))
            if given in (None, Searcher.FINISHED):
                break
            running[str(number * 10 + len(running))] = given
        if not running:
            return number
        key, config = running.popitem()
        search.on_trial_complete(key, result=report(config))
    raise AssertionError("no end")


def test_a_wrong_metric_ends_the_experiment_in_words() -> None:
    """An exception of `suggest` comes out of `Tuner.fit` unchanged."""
    search = TelescopeSearch(spec())
    search.suggest("a")
    search.on_trial_complete("a", result={"val": 1.0, "accuracy": 0.5, "pid": 3, "config/lr": 1.0})
    message = r"reported no 'loss', but accuracy, val; report it, or name the right one"
    for _ in range(2):
        with pytest.raises(SpecError, match=message):
            search.suggest("b")
    with pytest.raises(SpecError, match=message):
        search.ladder  # noqa: B018


def test_what_fails_leaves_the_sweep_stuck_in_words(caplog: pytest.LogCaptureFixture) -> None:
    search = TelescopeSearch(spec())
    for key in "abcdef":
        search.suggest(key)
    for key in "abcdef":
        search.on_trial_complete(key, error=True)
    assert search.suggest("g") == Searcher.FINISHED
    assert "trials failed, at most a tenth may" in str(search.ladder.stuck)
    assert "see error.txt of its trial a" in str(search.ladder.stuck)
    assert any("tuner: stuck: width 16" in message for message in caplog.messages)
    with pytest.raises(RefusedError, match="nothing to transfer"):
        search.ladder.transfer()


def test_what_is_kept_can_be_shown_and_gone_on_with(tmp_path: Path) -> None:
    """One search ends after three trials; none of the three is asked for by the next."""
    first = TelescopeSearch(spec(), results=tmp_path)
    for key in "abc":
        config = first.suggest(key)
        first.on_trial_complete(key, result={"loss": loss_at(config)})  # type: ignore[arg-type]

    def state() -> Any:
        return (open_result("tuner", tmp_path).folder.read_status() or {})["state"]

    assert state() == "running"
    with pytest.raises(ResumeError, match="in use by"):
        TelescopeSearch(spec(), results=tmp_path).suggest("a")
    first.close()
    assert state() == "interrupted"
    second = TelescopeSearch(spec(), results=tmp_path)
    given = drive(second, lambda config: {"loss": loss_at(config)})
    finished = open_result("tuner", tmp_path)
    assert given == len(finished.results) - 3
    assert tuple(finished.ladder.choices) == second.ladder.choices == by_hand(spec())
    narrow = [result for result in finished.results if result.trial.width == 16]
    wide = len(finished.results) - len(narrow)
    assert finished.cost()["over_target"] == pytest.approx((len(narrow) + 4 * wide) / 16)
    assert state() == "finished"
    assert (tmp_path / "tuner" / "loss.png").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"status": "diverged"},
        {"status": "diverged", "loss": 2},
        {"loss": None},
        {"loss": "-Infinity"},
        {"loss": 10**400},
    ],
)
def test_a_divergence_is_the_points_fault(bad: dict[str, Any]) -> None:
    search = TelescopeSearch(spec())
    drive(search, lambda c: bad if c["lr"] == 0.04 else {"loss": loss_at(c)})
    base = search.ladder.choices[0]
    assert base.counts == {"complete": 4, "diverged": 2}
    assert all(r.reason != "" for r in search.ladder.results if r.loss is None)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"loss": "two"}, "'loss' is a str, must be a number"),
        ({"loss": True}, "'loss' is a bool, must be a number"),
        ({"loss": [1.9, 2]}, "'loss' is a list, must be a number"),
        ({"status": "failed", "reason": "GPU lost"}, "GPU lost"),
        ({"other": 1}, "reported no 'loss'"),
    ],
)
def test_a_failure_is_never_a_number(bad: dict[str, Any], reason: str) -> None:
    search = TelescopeSearch(spec())
    seen = []

    def report(config: dict[str, Any]) -> dict[str, Any]:
        seen.append(config)
        return bad if len(seen) == 2 else {"loss": loss_at(config)}

    drive(search, report)
    (failed,) = [result for result in search.ladder.results if result.status == "failed"]
    assert reason in failed.reason


def test_nested_metrics_numpy_and_limits() -> None:
    numpy = pytest.importorskip("numpy")
    search = TelescopeSearch(spec(), metric="eval/loss")
    given = drive(
        ConcurrencyLimiter(search, max_concurrent=1),
        lambda c: {"eval/loss": numpy.float32(loss_at(c))},
    )
    assert given == len(search.ladder.results)
    assert search.ladder.choices[-1].point == by_hand(spec())[-1].point


def test_what_the_tuner_says_is_checked() -> None:
    search = TelescopeSearch(spec())
    with pytest.raises(SpecError, match="a ladder minimises"):
        search.set_search_properties("loss", "max", {"a": 1})
    with pytest.raises(SpecError, match=r"TelescopeSearch\(\.\.\., metric='val'\)"):
        search.set_search_properties("val", "min", {"a": 1})
    with pytest.raises(SpecError, match="temperature is set by the ladder"):
        search.set_search_properties("loss", "min", {"temperature": 1})
    assert search.set_search_properties("loss", "min", {"a": 1}, num_samples=3) is False
    data = spec()
    del data["cost"]
    with pytest.raises(SpecError, match=r"cost: missing; with results="):
        TelescopeSearch(data, results="results")
    with pytest.raises(RefusedError, match=r"would cost 1\.12 target runs"):
        TelescopeSearch(spec(budget={"max_over_target": 0.5}))
    with pytest.raises(SpecError, match="warm: got int"):
        search.warm(3)


def test_a_trial_that_tune_takes_back_is_asked_for_again() -> None:
    search = TelescopeSearch(spec())
    first = search.suggest("a")
    search.on_trial_complete("a")
    assert search.suggest("b") == first


def test_state_is_json_and_a_replay(tmp_path: Path) -> None:
    search = TelescopeSearch(spec())
    given = {key: search.suggest(key) for key in "abc"}
    search.on_trial_complete("b", result={"loss": 1.5})
    search.save(str(tmp_path / "state"))
    assert json.loads((tmp_path / "state").read_text())["running"].keys() == {"a", "c"}
    again = pickle.loads(pickle.dumps(search))  # as Tune does before it starts
    assert again.ladder.results == ()
    again.restore(str(tmp_path / "state"))
    assert again.ladder.results == search.ladder.results
    assert again.suggest("d") == search.suggest("d")
    again.on_trial_complete("a", result={"loss": 1.25})
    assert again.ladder.results[0].loss == 1.25
    assert given["a"] is not None


@pytest.mark.parametrize("answered", [2, 7])
def test_what_ends_after_a_restore_before_tune_asks_is_kept(answered: int, tmp_path: Path) -> None:
    """Two trials were running; one is answered in the store, but not in Tune's older state."""
    results = tmp_path / "results"
    first = TelescopeSearch(spec(), results=results)
    for number in range(answered):
        config = first.suggest(str(number))
        assert isinstance(config, dict)
        first.on_trial_complete(str(number), result={"loss": loss_at(config)})
    one, two = first.suggest("one"), first.suggest("two")
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    assert two["width"] == (16 if answered == 2 else 32)
    first.save(str(tmp_path / "state"))
    first.on_trial_complete("one", result={"loss": loss_at(one)})
    first.close()

    second = pickle.loads(pickle.dumps(first))
    second.restore(str(tmp_path / "state"))
    assert len(second.ladder.results) == answered
    for key, config in (("one", one), ("two", two)):
        second.on_trial_complete(key, result={"loss": loss_at(config)})
    assert len(second.ladder.results) == answered + 2
    given = drive(second, lambda config: {"loss": loss_at(config)})
    trials = [result.trial for result in open_result("tuner", results).results]
    assert len(trials) == len(set(trials)) == answered + 2 + given
    assert second.ladder.choices == by_hand(spec())


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize(("pause", "is_idle"), [(1.0, True), (0.1, False)])
def test_an_idle_tune_does_not_run_what_was_believed_to(
    pause: float, is_idle: bool, is_warm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Tuner restored with ``resume_unfinished=False`` drops what ran, and asks once a second."""
    first = TelescopeSearch(spec())
    given = {str(number): first.suggest(str(number)) for number in range(6)}
    first.save(str(tmp_path / "state"))
    again = TelescopeSearch(spec())
    if is_warm:
        again.warm(loss_at)
        monkeypatch.setattr("telescope.tune._GateKeeper.ticket", lambda self: "gate:0")
    again.restore(str(tmp_path / "state"))
    again.on_trial_result("5", {"loss": 9.0})  # this one runs
    clock = iter(number * pause for number in range(100))
    monkeypatch.setattr("telescope.tune.time.monotonic", lambda: next(clock))
    asked = [again.suggest(f"new {number}") for number in range(40)]
    handed = [config for config in asked if config is not None]
    expected = [given[key] for key in "01234"] if is_idle else []
    assert handed[: len(expected)] == expected
    # The sixth runs; while it does, and no sooner, free workers wait for it in their process.
    rest = handed[len(expected) :]
    assert all(config == {"telescope_gate": "gate:0"} for config in rest)
    assert bool(rest) == (is_warm and is_idle)


def test_a_changed_spec_trains_nothing_twice(tmp_path: Path) -> None:
    """There and back again, with a results folder and with Tune's own state."""
    longer = {"ladder": {"widths": [16, 32, 64], "policy": "adaptive"}, "target": {"width": 128}}
    cost = {"flops": {"16": 1e6, "32": 4e6, "64": 16e6, "128": 64e6}}
    seen: list[Any] = []

    def report(config: dict[str, Any]) -> dict[str, Any]:
        assert config not in seen
        seen.append(config)
        return {"loss": loss_at(config)}

    for tables in ({}, longer, {}):
        search = TelescopeSearch(spec(cost=cost, **tables), results=tmp_path / "results")
        drive(search, report)
        assert not search.ladder.stuck
    assert len(open_result("tuner", tmp_path / "results").results) == len(seen)
    seen.clear()
    search = TelescopeSearch(spec(cost=cost))
    for tables in (longer, longer, {}):
        drive(search, report)
        search.save(str(tmp_path / "state"))
        search = TelescopeSearch(spec(cost=cost, **tables))
        search.restore(str(tmp_path / "state"))
    assert len(search.ladder.results) == len(seen)


def test_nobody_waits_at_the_gate_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telescope.tune.GATE_SECONDS", 0.05)

    async def wait() -> None:
        gate = _Gate()
        await asyncio.wait_for(gate.wait_beyond(0), 10)  # never opened
        waiting = asyncio.create_task(gate.wait_beyond(1))
        await gate.open(2)
        await waiting

    asyncio.run(wait())


def test_an_import_leaves_the_users_ray_as_it_is() -> None:
    """Settings for the program's own Ray do not change the user's Ray."""
    code = "import os, telescope.tune; print('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER' in os.environ)"
    names = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], env=names, capture_output=True, check=True)
    assert done.stdout == b"False\n"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 9, "sweep": "tuner"}', '{"format": 1, "sweep": "other"}']
)
def test_a_state_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "state").write_text(text)
    with pytest.raises(ResumeError, match="cannot be read"):
        TelescopeSearch(spec()).restore(str(tmp_path / "state"))


def test_results_that_cannot_be_kept_end_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = TelescopeSearch(spec(), results=tmp_path)
    assert search.suggest("a")
    assert search._recorder is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "trials.csv")

    monkeypatch.setattr(search._recorder, "tell", full)
    search.on_trial_complete("a", result={"loss": 1.0})
    with pytest.raises(StoreError, match=r"trials.csv: No space left on device"):
        search.suggest("b")
    status = open_result("tuner", tmp_path).folder.read_status()
    assert status is not None
    assert status["state"] == "interrupted"
