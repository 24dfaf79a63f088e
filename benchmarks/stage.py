"""A whole stage against plain Ray Tune that drives the same training function.

    python benchmarks/stage.py [--width 32] [--trials 16] [--workers 2] [--gpus 0] [--pack auto]

Plain Tune gets its defaults: a function trainable, one trial per process, a grid search. The
program runs the same trials with as many workers, in packs of --pack (on a CPU auto is one). Each
has a process and a local Ray of its own, whose start is part of neither clock. Both clocks run from
when the first trial is asked for, the start of its worker included, to the end of the last one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from fusion import describe
from ray import tune

from telescope.dispatch.ray_tune import run_ray
from telescope.prepare import prepare
from telescope.records import Point, Result, Trial
from telescope.spec import Spec
from telescope.train.config import TrialConfig
from telescope.train.loop import TelescopeTrainer, resolve_device


class Stage:
    """The trials of one stage, and when the first was started and the last one ended."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        """Nothing has been started."""
        self.trials, self.results = list(trials), dict[Trial, Result]()
        self.first = self.last = 0.0

    def ask(self) -> Sequence[Trial]:
        """Those without a result."""
        return [trial for trial in self.trials if trial not in self.results]

    def tell(self, result: Result) -> None:
        """Take a result."""
        assert result.loss is not None, result.reason
        self.results[result.trial] = result
        self.last = time.time()

    def on_start(self, trial: Trial) -> None:
        """Start the clock."""
        self.first = self.first or time.time()


def ours(config: TrialConfig, trials: Sequence[Trial], options: Any) -> float:
    """Seconds of the stage on this program's dispatcher."""
    stage = Stage(trials)
    run_ray(
        stage,
        TelescopeTrainer(config),
        workers=options.workers,
        gpus=options.gpus,
        pack=options.pack,
        on_start=stage.on_start,
    )
    return stage.last - stage.first


def plain(config: TrialConfig, trials: Sequence[Trial], options: Any) -> float:
    """Seconds of the stage on Tune as it comes."""

    def trainable(given: dict[str, Any], config: TrialConfig, trials: Sequence[Trial]) -> None:
        result = TelescopeTrainer(config)(trials[given["number"]])
        tune.report({"loss": result.loss, "end": time.time()})

    folder = tempfile.mkdtemp(prefix="stage-")
    ray.init(
        address="local",
        num_cpus=options.workers,
        include_dashboard=False,
        log_to_driver=False,
    )
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(partial(trainable), config=config, trials=list(trials)),
            {"cpu": 1, "gpu": options.gpus},
        ),
        param_space={"number": tune.grid_search(list(range(len(trials))))},
        run_config=tune.RunConfig(verbose=0, storage_path=folder),
    )
    begun = time.time()
    results = tuner.fit()
    assert not results.errors, results.errors
    metrics: list[dict[str, float]] = [dict(result.metrics or {}) for result in results]
    ray.shutdown()
    shutil.rmtree(folder)
    return max(m["end"] for m in metrics) - begun


def apart(way: Callable[..., float], *arguments: Any) -> float:
    """Run one way in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(way, *arguments).result()


def main() -> None:
    """Run the stage both ways and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of one trial or pack")
    parser.add_argument("--pack", type=lambda t: t if t == "auto" else int(t), default="auto")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    prepared = prepare(Spec.load("quickstart", options.overrides))
    config = replace(prepared.trial_config, threads=1)
    if resolve_device(config.device) == "cpu" and options.pack == "auto":
        options.pack = 1
    points = [Point.of(lr=0.01 * 1.1**n, weight_decay=0.1) for n in range(options.trials)]
    trials = [Trial(options.width, point, 0) for point in points]
    print(describe(resolve_device(config.device)), f"ray {ray.__version__}", sep="; ")
    mine, theirs = (apart(way, config, trials, options) for way in (ours, plain))
    print(
        f"{options.trials} trials of width {options.width}, {options.workers} workers, pack "
        f"{options.pack}: {mine:.1f} s, plain Tune {theirs:.1f} s: {theirs / mine:.2f}x as fast"
    )


if __name__ == "__main__":
    main()
