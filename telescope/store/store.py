"""The results of a sweep in an Optuna storage: one study per stage, one transaction per trial.

The driver is the only writer; there may be many readers. optuna-dashboard opens the storage as it
is: complete trials are COMPLETE with their loss, diverged ones PRUNED without a value, failed ones
FAIL. Curves are in files of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from telescope.errors import ResumeError, StoreError
from telescope.records import Axis, Point, Result, Status, Trial
from telescope.store.database import (
    engine_options,
    is_file,
    opening_advice,
    reason_of,
    without_password,
)

STATES = {
    Status.COMPLETE: TrialState.COMPLETE,
    Status.DIVERGED: TrialState.PRUNED,
    Status.FAILED: TrialState.FAIL,
}
SQLITE_HEADER = 100
"""Least size of an SQLite file, bytes; SQLite takes a shorter one for a new, empty database."""
CONNECTION_PATIENCE = 60.0
"""Seconds to wait for a database server that is lost during a sweep."""


class Store:
    """Reads and adds the results of one sweep.

    Args:
        url: an Optuna RDB URL.
        sweep: the sweep's name, the first part of its studies' names.
        axes: the spec's axes, for the ranges that a dashboard shows.
        fingerprint: hash of everything that makes results comparable; stored with each study.

    Raises:
        ResumeError: the storage cannot be opened.
    """

    def __init__(self, url: str, sweep: str, axes: tuple[Axis, ...], fingerprint: str) -> None:
        """Open the storage; create its tables if it is new."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # we raise or retry what it warns of
        self._is_file = is_file(url)
        self._name = without_password(url)
        try:
            self._storage = RDBStorage(url, engine_kwargs=engine_options(url))
        except Exception as error:
            raise ResumeError(
                f"--storage {self._name}: cannot be opened: {reason_of(error)}; "
                f"{opening_advice(error)}"
            ) from error
        self._sweep = sweep
        self._axes = axes
        self._fingerprint = fingerprint
        self._studies: dict[int, optuna.Study] = {}
        self._scales: dict[int, dict[str, bool]] = {}  # width → axis → True if it is log-spaced

    def add(self, result: Result) -> None:
        """Store one finished trial in one transaction; wait for a lost server.

        Raises:
            StoreError: the disk is full, the file is locked or missing, or the server stays away.
        """
        deadline = time.monotonic() + CONNECTION_PATIENCE
        while True:
            try:
                return self._add(result)
            except (SQLAlchemyError, OptunaError) as error:
                if self._is_file or time.monotonic() > deadline:
                    raise self._error("cannot keep a result", error) from error
                # If the first transaction did succeed, the second one makes a duplicate, which
                # `results` drops.
                time.sleep(1.0)

    def _add(self, result: Result) -> None:
        trial = result.trial
        axes, study = {axis.name: axis for axis in self._axes}, self._study(trial.width)
        is_log = {name: self._is_log(trial.width, name, v) for name, v in trial.point.items()}
        # An axis that is log-spaced in this study, but fixed at 0 now, cannot be a parameter there.
        shown = {name: v for name, v in trial.point.items() if v > 0 or not is_log[name]}
        study.add_trial(
            create_trial(
                state=STATES[result.status],
                value=result.loss,
                params=shown,
                # The point's own axes: an interrupted pack may have had other axes than the spec.
                distributions={
                    name: _range(axes.get(name), value, is_log=is_log[name])
                    for name, value in shown.items()
                },
                user_attrs=_attributes(
                    result, {n: v for n, v in trial.point.items() if n not in shown}
                ),
            )
        )

    def _is_log(self, width: int, axis: str, value: float) -> bool:
        """Tell whether an axis is log-spaced in a width's study; its first trial decides.

        Optuna refuses a study in which a parameter is log-spaced in some trials only.
        """
        kept = self._scales.setdefault(width, {})
        if not kept:
            for trial in self._study(width).get_trials(deepcopy=False):
                for name, found in trial.distributions.items():
                    kept.setdefault(name, bool(getattr(found, "log", False)))
        return kept.setdefault(axis, value > 0)

    def results(self) -> list[Result]:
        """Return all stored results of this sweep, in the order of storing within each width.

        Raises:
            ResumeError: the studies of that name belong to another sweep, not comparable to this.
            StoreError: the database cannot be read, or has content that telescope did not write.
        """
        with self._reading():
            return self._results()

    def _results(self) -> list[Result]:
        prefix = f"{self._sweep}/width-"
        summaries = optuna.get_all_study_names(self._storage)
        names = sorted(name for name in summaries if name.startswith(prefix))
        studies = [optuna.load_study(study_name=name, storage=self._storage) for name in names]
        for study in studies:
            self._check(study)
        trials = (trial for study in studies for trial in study.get_trials(deepcopy=False))
        results = (
            _as_result(trial, self._axes) for trial in trials if "status" in trial.user_attrs
        )
        return list(dict.fromkeys(results))  # a lost connection may have stored one twice

    def close(self) -> None:
        """Close the database's connections."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn the exceptions of a locked, damaged or lost database into a one-line error."""
        try:
            yield
        except (SQLAlchemyError, OptunaError) as error:
            raise self._error("cannot be read", error) from error
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            message = f"{type(error).__name__}: {error}"
            raise self._error("holds what telescope did not write", message) from error

    def _error(self, problem: str, error: Exception | str) -> StoreError:
        reason = error if isinstance(error, str) else reason_of(error)
        return StoreError(
            f"{self._name}: {problem}: {reason}; results stored before are kept: mend it, or put "
            "back a copy, and the same command goes on"
        )

    def _study(self, width: int) -> optuna.Study:
        if width not in self._studies:
            study = optuna.create_study(
                study_name=f"{self._sweep}/width-{width}",
                storage=self._storage,
                direction="minimize",
                load_if_exists=True,
            )
            study.set_user_attr("fingerprint", self._fingerprint)
            self._studies[width] = study
        return self._studies[width]

    def _check(self, study: optuna.Study) -> None:
        """Refuse results of a training that is not comparable."""
        found = study.user_attrs.get("fingerprint", self._fingerprint)
        if found != self._fingerprint:
            raise ResumeError(
                f"--storage: holds another sweep named {self._sweep!r} whose results are not "
                f"comparable (fingerprint {found}, this spec's is {self._fingerprint}); use --name"
            )


def _range(axis: Axis | None, value: float, *, is_log: bool) -> FloatDistribution:
    """Return the axis's range, widened to include `value`; ranges may differ within a study."""
    low, high = (axis.low, axis.high) if axis else (value, value)
    least = min(low, value) if low > 0 or not is_log else value
    return FloatDistribution(least, max(high, value), log=is_log)


def _attributes(result: Result, unshown: Mapping[str, float]) -> dict[str, Any]:
    """Return a result's remaining fields. There are few, because each costs several queries.

    Args:
        result: the result.
        unshown: axes of its point that are not parameters of its study.
    """
    width, seed = result.trial.width, result.trial.seed
    run: dict[str, Any] = {"width": width, "seed": seed, "worker": result.worker}
    run |= {"flops": result.flops, "seconds": result.seconds}
    run |= {"point": dict(unshown)} if unshown else {}
    reason = {"reason": result.reason} if result.reason else {}
    # Width and seed are repeated outside `run`, so that a dashboard can sort and filter by them.
    return {"status": str(result.status), **reason, "width": width, "seed": seed, "run": run}


def _as_result(trial: FrozenTrial, axes: tuple[Axis, ...]) -> Result:
    """Turn a stored trial into a result, with its axes in the spec's order."""
    run: dict[str, Any] = trial.user_attrs["run"]
    point = {**trial.params, **run.get("point", {})}
    order = [axis.name for axis in axes if axis.name in point]
    order += sorted(point.keys() - set(order))
    return Result(
        Trial(
            run["width"],
            Point.of({name: point[name] for name in order}),
            run["seed"],
        ),
        Status(trial.user_attrs["status"]),
        loss=trial.value if trial.state is TrialState.COMPLETE else None,
        reason=trial.user_attrs.get("reason", ""),
        flops=run["flops"],
        seconds=run["seconds"],
        worker=run["worker"],
    )


def check_exists(url: str) -> None:
    """Check that an existing sweep's SQLite file exists; opening it would create an empty one.

    Raises:
        ResumeError: it is missing, or too short to be an SQLite database.
    """
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError as error:
        raise ResumeError(f"{url!r}: is no storage's URL; restore spec.json") from error
    if not parsed.drivername.startswith("sqlite"):
        return
    path = Path(parsed.database or "")
    if not path.is_file() or path.stat().st_size < SQLITE_HEADER:
        raise ResumeError(
            f"{path}: the sweep's results are missing; put the file back, or remove the whole "
            "results folder to start anew"
        )
