"""The store keeps what it was given, states what Optuna can read, and never a non-finite value."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from telescope.errors import ResumeError
from telescope.records import Axis, Point, Result, Status, Trial
from telescope.store.database import sqlite_url, without_password
from telescope.store.store import Store

AXES = (Axis("lr", 0.01, 1.0, 7), Axis("weight_decay", 0.0, 0.0, 1), Axis("warmup", 0.1, 0.4, 3))


def trial(width: int = 32, lr: float = 0.1, seed: int = 0) -> Trial:
    return Trial(width, Point.of(lr=lr, weight_decay=0.0, warmup=0.1), seed)


RESULTS = [
    Result(trial(), Status.COMPLETE, loss=2.5, flops=1e9, seconds=1.5, worker="host:1"),
    Result(trial(lr=1 / 3), Status.DIVERGED, reason="loss nan at step 3"),
    Result(trial(lr=0.2), Status.FAILED, reason="OSError: disk\n  line 2"),
    Result(trial(width=64, lr=5.0, seed=2), Status.COMPLETE, loss=2.25),  # outside the first range
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(sqlite_url(tmp_path), "sweep", AXES, "f")


def test_what_is_stored_comes_back_in_another_process(tmp_path: Path, store: Store) -> None:
    for result in RESULTS:
        store.add(result)
    store.close()
    again = Store(sqlite_url(tmp_path), "sweep", AXES, "f")
    assert again.results() == RESULTS
    assert again.results()[0].worker == "host:1"
    again.close()


def test_optuna_sees_one_study_per_stage_and_plain_states(tmp_path: Path, store: Store) -> None:
    for result in RESULTS:
        store.add(result)
    store.close()
    url = sqlite_url(tmp_path)
    assert optuna.get_all_study_names(url) == ["sweep/width-32", "sweep/width-64"]
    study = optuna.load_study(study_name="sweep/width-32", storage=url)
    states = [t.state for t in study.trials]
    assert [state.name for state in states] == ["COMPLETE", "PRUNED", "FAIL"]
    assert [t.value for t in study.trials] == [2.5, None, None]
    assert study.best_trial.params == {"lr": 0.1, "weight_decay": 0.0, "warmup": 0.1}
    assert study.trials[1].user_attrs["reason"] == "loss nan at step 3"
    assert all(t.value is None or math.isfinite(t.value) for t in study.trials)


def test_sweeps_in_one_storage_do_not_mix(tmp_path: Path, store: Store) -> None:
    other = Store(sqlite_url(tmp_path), "sweep-2", AXES, "f")
    store.add(RESULTS[0])
    other.add(RESULTS[3])
    assert store.results() == [RESULTS[0]]
    assert other.results() == [RESULTS[3]]
    store.close()
    other.close()


def test_a_storage_that_cannot_be_opened_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "trials.db").write_text("this is no database, whatever its name says")
    with pytest.raises(ResumeError, match=r"trials\.db: cannot be opened: ") as caught:
        Store(sqlite_url(tmp_path), "sweep", AXES, "f")
    assert "\n" not in str(caught.value)


def test_passwords_are_not_written_down() -> None:
    assert without_password("postgresql://me:secret@host/db") == "postgresql://me@host/db"
    assert without_password("postgresql://me@host/db?password=secret") == "postgresql://me@host/db"


def test_an_axis_may_become_a_range_and_a_range_fixed(tmp_path: Path) -> None:
    for axis in (Axis("lr", 0.0, 0.0, 1), Axis("lr", 0.01, 1.0, 3), Axis("lr", 0.1, 0.1, 1)):
        store = Store(sqlite_url(tmp_path), "sweep", (axis,), "f")
        store.add(Result(Trial(32, Point.of(lr=axis.low), 0), Status.COMPLETE, loss=1.0))
        store.close()
    store = Store(sqlite_url(tmp_path), "sweep", (axis,), "f")
    assert [result.trial.lr for result in store.results()] == [0.0, 0.01, 0.1]
    store.close()


def test_odd_folder_names_hold_their_own_database(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c d"
    folder.mkdir()
    Store(sqlite_url(folder), "sweep", AXES, "f").close()
    assert (folder / "trials.db").is_file()


def test_another_sweeps_results_are_refused(store: Store, tmp_path: Path) -> None:
    store.add(RESULTS[0])
    store.close()
    other = Store(sqlite_url(tmp_path), "sweep", AXES, "g")
    with pytest.raises(ResumeError, match="holds another sweep named 'sweep'"):
        other.results()
    other.close()


def test_a_dashboard_sees_log_axes_and_width_and_seed(tmp_path: Path) -> None:
    axes = (Axis("lr", 0.01, 1.0, 5), Axis("weight_decay", 0.0, 0.0, 1))
    with closing(Store(sqlite_url(tmp_path), "demo", axes, "f")) as store:
        point = Point.of(lr=0.1, weight_decay=0.0)
        store.add(Result(Trial(32, point, 3), Status.COMPLETE, loss=2.0))
    (study,) = optuna.get_all_study_names(sqlite_url(tmp_path))
    (trial,) = optuna.load_study(study_name=study, storage=sqlite_url(tmp_path)).trials
    assert {name: getattr(r, "log", None) for name, r in trial.distributions.items()} == {
        "lr": True,
        "weight_decay": False,
    }
    assert (trial.user_attrs["width"], trial.user_attrs["seed"]) == (32, 3)


@pytest.mark.parametrize(("first", "then"), [(0.1, 0.0), (0.0, 0.1)])
def test_an_axis_that_is_fixed_at_zero_later_is_kept(
    first: float, then: float, tmp_path: Path
) -> None:
    written = []
    for value in (first, then):  # another process each time, under a spec that has changed
        axes = (Axis("lr", 0.01, 1.0, 5), Axis("weight_decay", value, value, 1))
        with closing(Store(sqlite_url(tmp_path), "demo", axes, "f")) as store:
            trial = Trial(32, Point.of(lr=0.1, weight_decay=value), 0)
            written.append(Result(trial, Status.COMPLETE, loss=2.0))
            store.add(written[-1])
            assert store.results() == written
