"""The driver's bookkeeping per trial: curve file, store, ladder, heartbeat, screen.

    python benchmarks/bookkeeping.py [--trials 200]

A sweep of as many trials is answered at once by a fake trainer, through the real recorder into a
real results folder on this disk. For scale, the same rows go through plain `sqlite3` commits, one
each, in the same run: what the disk and its file system cost anyone.
"""

from __future__ import annotations

import argparse
import itertools
import sqlite3
import tempfile
import time
from pathlib import Path
from unittest import mock

from rich.console import Console

from telescope.config import TrialConfig
from telescope.records import CurvePoint, Result, Status, Trial
from telescope.report.live import make_screen
from telescope.spec.spec import Spec
from telescope.sweep.run import Options, run
from telescope.train import loop

CURVE = tuple(CurvePoint(step, 3.0, None) for step in range(50))


def sweep_seconds(folder: Path, trials: int) -> list[float]:
    """Seconds from one answer to the next of a sweep whose trainer takes no time."""
    stamps: list[float] = []

    def instant(_: TrialConfig, trial: Trial) -> Result:
        stamps.append(time.perf_counter())
        return Result(trial, Status.COMPLETE, loss=2.0 + trial.lr, curve=CURVE)

    overrides = ["ladder.widths=[32]", f"axes.lr.points={trials}", "axes.weight_decay.points=2"]
    spec = Spec.load("quickstart", [*overrides, "budget.max_over_target=1e9"])
    view = make_screen(Console(file=(folder / "log").open("w")))
    with mock.patch.object(loop, "train", instant):
        run(spec, Options(results=folder, dispatcher="inline", check=False), lambda: view)
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def sqlite_seconds(folder: Path, trials: int) -> list[float]:
    """Seconds of a bare commit of one row."""
    times = []
    with sqlite3.connect(folder / "bare.db") as database:
        database.execute("create table trials (lr real, loss real)")
        for number in range(trials):
            start = time.perf_counter()
            database.execute("insert into trials values (?, ?)", (0.1, float(number)))
            database.commit()
            times.append(time.perf_counter() - start)
    return times


def median(times: list[float]) -> float:
    """The middle one, in milliseconds."""
    return sorted(times)[len(times) // 2] * 1e3


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory(dir=".") as name:
        ours = sweep_seconds(Path(name), trials // 2)
        bare = sqlite_seconds(Path(name), trials)
    print(
        f"{len(ours) + 1} trials: {median(ours):.1f} ms of bookkeeping per trial in the median, "
        f"{median(ours[-20:]):.1f} ms over the last 20; a bare SQLite commit takes "
        f"{median(bare):.1f} ms, ratio {median(ours) / median(bare):.1f}"
    )


if __name__ == "__main__":
    main()
