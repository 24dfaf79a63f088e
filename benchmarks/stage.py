"""A whole stage against plain Ray Tune that drives the same training function.

    python benchmarks/stage.py [--width 32] [--trials 16] [--gpus G] [--workers W] [--pack auto]
        [--at-once 1 4 16] [--compile off on] [--precision fp32 bf16]

The program runs the stage with --workers in packs of --pack (on a CPU auto is one), in each
--precision. On a GPU, --gpus, those of one worker, is 1 unless it is said, and there are as many
workers as that makes on this machine; on a CPU there are two. Plain Tune runs the same trials on as
many devices, by grid search, one trial per process: once with its defaults, --workers at once, and
then with its processes kept (`reuse_actors`), with so many trials --at-once per GPU (by fractions),
on a CPU in all, with and without `train.compile`, in each --precision. The fastest counts.

Each run has a process and a local Ray of its own, whose start is part of no clock. Two times are
given: the whole one, from when the first trial is asked for to the end of the last one, and the one
without the start-up, from when the first worker has its trainer. What the program probes before it
packs, and what a process compiles, is part of both.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from machine import describe, in_child
from ray import tune

from telescope.config import TrialConfig
from telescope.dispatch.packs import Packs
from telescope.dispatch.ray.tune import Size, opened, run_ray
from telescope.packs.trainer import PackedTrainer
from telescope.records import Point, Result, Trial, TrialSource
from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.train.device import resolve_device

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Times:
    """Seconds of a stage."""

    whole: float
    without_start: float

    def __str__(self) -> str:
        """As it is printed."""
        return f"{self.whole:.1f} s, {self.without_start:.1f} s without the start-up"


@dataclass(frozen=True)
class Setting:
    """Settings of plain Tune."""

    at_once: int
    gpus: float
    compile: bool = False
    precision: Precision = "fp32"
    reuse: bool = True

    def __str__(self) -> str:
        """As it is printed."""
        gpus = f" with {self.gpus:g} GPU each" if self.gpus else ""
        compiled = ", compiled" if self.compile else ""
        return f"{self.at_once} at once{gpus}, {self.precision}{compiled}"


class Stage(TrialSource):
    """The trials of one stage, and when the first was asked for and the last one ended."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        """Nothing has been started."""
        self.trials, self.results = list(trials), dict[Trial, Result]()
        self.first = self.last = 0.0

    def ask(self) -> Sequence[Trial]:
        """Those without a result."""
        return [trial for trial in self.trials if trial not in self.results]

    def tell(self, *results: Result) -> None:
        """Take results."""
        for result in results:
            assert result.loss is not None, result.reason
            self.results[result.trial] = result
        self.last = time.time()

    def on_start(self, trial: Trial) -> None:
        """Start the clock."""
        self.first = self.first or time.time()


def ours(config: TrialConfig, trials: Sequence[Trial], options: argparse.Namespace) -> Times:
    """The stage on this program's dispatcher."""

    class Noting(PackedTrainer):  # local, so that it is sent to the workers by value
        """The built-in trainer, which notes when a worker first uses it."""

        def __call__(self, trial: Trial) -> Result:
            """Train one trial."""
            note(folder)
            return super().__call__(trial)

        def obstacle(self, trial: Trial) -> str:
            """Look at a pack's first trial."""
            note(folder)
            return super().obstacle(trial)

        def train_pack(self, trials: Sequence[Trial]) -> Iterator[Result]:
            """Train a pack."""
            note(folder)
            return super().train_pack(trials)

    def note(folder: str) -> None:
        begun = Path(folder) / f"{os.getpid()}.begun"
        if not begun.exists():
            begun.write_text(str(time.time()))

    stage = Stage(trials)
    with tempfile.TemporaryDirectory(prefix="stage-") as folder:
        with opened(Size(options.workers, gpus=options.gpus)) as session:
            run_ray(stage, Noting(config), session, packs=Packs(options.pack))
        begun = min(float(path.read_text()) for path in Path(folder).glob("*.begun"))
    return Times(stage.last - stage.first, stage.last - begun)


def plain(config: TrialConfig, trials: Sequence[Trial], setting: Setting, devices: int) -> Times:
    """The stage on Tune alone."""

    def trainable(given: dict[str, Any], config: TrialConfig, trials: Sequence[Trial]) -> None:
        begun = time.time()
        result = PackedTrainer(config)(trials[given["number"]])
        tune.report({"loss": result.loss, "begun": begun, "end": time.time()})

    train = replace(config.train, compile=setting.compile, precision=setting.precision)
    config = replace(config, train=train)
    try:
        ray.init(
            address="local",
            num_cpus=setting.at_once,
            num_gpus=devices,
            include_dashboard=False,
            log_to_driver=False,
        )
        with tempfile.TemporaryDirectory(prefix="stage-") as folder:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(partial(trainable), config=config, trials=list(trials)),
                    {"cpu": 1, "gpu": setting.gpus},
                ),
                param_space={"number": tune.grid_search(list(range(len(trials))))},
                tune_config=tune.TuneConfig(reuse_actors=setting.reuse),
                run_config=tune.RunConfig(verbose=0, storage_path=folder),
            )
            asked = time.time()
            results = tuner.fit()
            assert not results.errors, results.errors
            metrics: list[dict[str, float]] = [dict(result.metrics or {}) for result in results]
    finally:
        ray.shutdown()  # a child of multiprocessing leaves without Ray's own hook
    assert all(math.isfinite(m["loss"]) for m in metrics)
    end = max(m["end"] for m in metrics)
    return Times(end - asked, end - min(m["begun"] for m in metrics))


def settings_of(options: argparse.Namespace, devices: int) -> list[Setting]:
    """Return the settings of plain Tune: its defaults, then all that may be its best."""
    found = [Setting(options.workers, options.gpus, precision=options.precision[0], reuse=False)]
    for number, compiled, precision in itertools.product(
        options.at_once, options.compile, options.precision
    ):
        gpus = math.floor(1e4 / number) / 1e4 if devices else 0.0  # Ray counts in ten-thousandths
        found.append(Setting(number * max(1, devices), gpus, compiled == "on", precision))
    return found


def run_all(
    config: TrialConfig, trials: Sequence[Trial], options: argparse.Namespace, devices: int
) -> tuple[dict[str, Times], dict[Setting, Times]]:
    """Precision → times of the program, and setting → times of plain Tune, where it ran."""
    mine = {}
    for precision in options.precision:
        own = replace(config, train=replace(config.train, compile=False, precision=precision))
        mine[precision] = in_child(ours, own, trials, options)
        print(f"telescope, {precision}: {mine[precision]}", flush=True)
    theirs = {}
    for setting in settings_of(options, devices):
        name = "plain Tune" if setting.reuse else "plain Tune with its defaults"
        try:
            theirs[setting] = in_child(plain, config, trials, setting, devices)
        except Exception as error:  # no compiler, no memory: another setting is the best then
            reason = " ".join(str(error).split())[:300]
            print(f"{name}, {setting}: did not run: {type(error).__name__}: {reason}", flush=True)
            continue
        print(f"{name}, {setting}: {theirs[setting]}", flush=True)
    return mine, theirs


def best(found: Iterable[Times]) -> Times:
    """The shortest of each, wherever they come from."""
    times = list(found)
    return Times(min(t.whole for t in times), min(t.without_start for t in times))


def report(mine: Mapping[str, Times], theirs: Mapping[Setting, Times]) -> None:
    """Print how many times faster the program is."""
    own = best(mine.values())
    for name, found in (
        ("defaults", [t for setting, t in theirs.items() if not setting.reuse]),
        ("best settings", list(theirs.values())),
    ):
        if found:
            other = best(found)
            print(
                f"against plain Tune with its {name}: {other.whole / own.whole:.2f}x as fast, "
                f"{other.without_start / own.without_start:.2f}x without the start-up"
            )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--gpus", type=float, help="GPUs of one worker")
    parser.add_argument("--pack", type=lambda t: t if t == "auto" else int(t), default="auto")
    parser.add_argument("--at-once", type=int, nargs="+", help="trials of plain Tune")
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off", "on"])
    choices = ["fp32", "bf16"]
    parser.add_argument("--precision", nargs="+", choices=choices, default=choices)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    return parser.parse_args()


def main() -> None:
    """Run the stage both ways and print the ratios."""
    options = parsed()
    prepared = BuiltIn.of(Spec.load("quickstart", options.overrides))
    config = replace(prepared.trial_config, threads=1, threads_at={})
    device = resolve_device(config.device)
    on_gpu = device.startswith("cuda")
    if options.gpus is None:
        options.gpus = 1.0 if on_gpu else 0.0
    if bool(options.gpus) != on_gpu:
        sys.exit(f"--gpus: got {options.gpus:g}, and trials run on {device}; leave it out")
    there = torch.cuda.device_count() if on_gpu else 0
    options.workers = options.workers or (int(there / options.gpus) if on_gpu else 2)
    devices = math.ceil(options.workers * options.gpus)  # as many for both
    if not options.workers or devices > there:
        sys.exit(f"--gpus: got {options.gpus:g} for each worker, this machine has {there}")
    options.at_once = options.at_once or ([1, 4, 16] if on_gpu else [options.workers])
    if not on_gpu and options.pack == "auto":
        options.pack = 1
    lrs = (0.01 * 4 ** (n / options.trials) for n in range(options.trials))
    trials = [Trial(options.width, Point.of(lr=lr, weight_decay=0.1), 0) for lr in lrs]
    print(in_child(describe, device), f"ray {ray.__version__}", sep="; ")
    print(
        f"{options.trials} trials of width {options.width}; telescope: {options.workers} workers"
        f"{f' with {options.gpus:g} GPU each' if on_gpu else ''}, pack {options.pack}"
    )
    report(*run_all(config, trials, options, devices))


if __name__ == "__main__":
    main()
