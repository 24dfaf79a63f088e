"""Packs against one process per trial and against one trial after the other, by width and size.

    python benchmarks/fusion.py [--widths 32 64 128 256] [--packs 2 4 8] [--processes 1 2 4]
        [--compile off on] [--precision fp32 bf16] [--cpus 1] [--device auto] [--steps 20]
        [--rounds 3] [--json FILE]

All train the quickstart's model and data with the same steps, in fresh processes, on one device.
Compared are trials per second once everything runs, evaluation left out: of one process that trains
one trial at a time, of several processes at once (each with one trial), and of one process with a
pack. Each has its own best settings: all --processes, with and without `train.compile`, in each
--precision are tried for single trials, each --precision for packs (which cannot be compiled). The
first round tries all, the others repeat, in turns, what was fastest; the best round counts.

On a CPU all have the same --cpus cores, and it is the time on those that counts, so that other work
on the machine hardly does; on an accelerator it is wall time. Start-up, until a process has taken
its first steps, compiling included, is given apart. So is memory per trial: on CUDA all that the
processes have taken of the device, their contexts and the allocator's cache included, above what
was in use before; on a CPU the largest resident size of each process, libraries included. The JSON
has every way that was tried.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from threading import BrokenBarrierError
from typing import Any, Literal

import torch
from machine import bytes_in_use, bytes_in_use_before, describe, in_child

from telescope.config import TrialConfig
from telescope.packs.fused import Pack
from telescope.packs.trainer import PackedTrainer
from telescope.records import Point, Trial
from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.train.device import resolve_device
from telescope.train.loop import reads_every, set_up, take_step

Precision = Literal["fp32", "bf16"]
WARM_UP = 5
"""Steps before the clock starts."""
POINTS = [Point.of(lr=1e-4 * (n + 1), weight_decay=0.1) for n in range(1024)]
"""No two trials of a pack are alike, and none diverges."""
STOPPED = "another process failed"
"""Message of a process that has stopped because of another one."""


@dataclass(frozen=True)
class Way:
    """One way of training: so many processes at once, each with a pack of `size` or one trial."""

    size: int
    processes: int
    compile: bool
    precision: Precision

    def __str__(self) -> str:
        """As it is printed."""
        compiled = ", compiled" if self.compile else ""
        return f"{self.processes} at once, {self.precision}{compiled}"


@dataclass(frozen=True)
class Figures:
    """The measurements of one way of training."""

    trials_per_second: float
    startup_seconds: float
    bytes_per_trial: float

    def __str__(self) -> str:
        """As it is printed."""
        memory = f"{self.bytes_per_trial / 1e6:.0f} MB"
        return f"{self.trials_per_second:.3g}/s, {memory}, {self.startup_seconds:.1f} s"


@dataclass(frozen=True)
class Seen:
    """The measurements of one process."""

    start: float
    end: float
    cpu: float
    startup: float
    bytes_used: int


class WayError(Exception):
    """A way of training did not run to its end."""


def steps_of(config: TrialConfig, width: int, size: int) -> Callable[[int], None]:
    """A function that takes so many steps of a pack, or of one trial, and waits for their end."""
    trials = [Trial(width, point, 0) for point in POINTS[:size]]
    if size > 1:
        pack = Pack(config, trials)

        def step_pack(number: int) -> None:
            for _ in range(number):
                pack.step()
            pack.read()
            if len(pack.members) < size:
                raise WayError("a trial of the pack has diverged, the others became faster")

        return step_pack
    setup, taken = set_up(config, trials[0]), 0

    def step_alone(number: int) -> None:
        nonlocal taken
        losses = []
        for _ in range(number):
            losses.append(
                take_step(
                    setup.model, setup.optimizers, setup.batches, setup.train, taken, setup.device
                )
            )
            taken += 1
            if len(losses) == reads_every(setup.device):
                torch.stack(losses).tolist()
                losses = []
        if losses:
            torch.stack(losses).tolist()

    return step_alone


def work(
    config: TrialConfig, width: int, size: int, steps: int, born: float, barrier: Any, found: Any
) -> None:
    """One process: say what was seen, or, in words, why nothing was; then the others stop too."""
    try:
        found.put(_train(config, width, size, steps, born, barrier))
    except BrokenBarrierError:
        found.put(STOPPED)
    except Exception as error:
        found.put(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        barrier.abort()


def _train(
    config: TrialConfig, width: int, size: int, steps: int, born: float, barrier: Any
) -> Seen:
    """Start up, wait for the others, train, wait, look at the memory while all have theirs."""
    torch.set_num_threads(config.threads)
    take = steps_of(config, width, size)
    take(WARM_UP)
    startup = time.time() - born
    barrier.wait()
    start, start_cpu = time.time(), time.process_time()
    take(steps)
    end, cpu = time.time(), time.process_time() - start_cpu
    barrier.wait()
    if config.device.startswith("cuda"):
        used = bytes_in_use(config.device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    barrier.wait()
    return Seen(start, end, cpu, startup, used)


def _collect(workers: Sequence[BaseProcess], found: Any) -> list[Seen]:
    """Collect the measurements of all processes, once all have ended.

    Raises:
        WayError: one of them failed, or was killed.
    """
    seen: list[Seen | str] = []
    while len(seen) < len(workers):
        try:
            seen.append(found.get(timeout=1.0))
        except Empty:
            if killed := [worker.exitcode for worker in workers if worker.exitcode]:
                for worker in workers:
                    worker.terminate()
                seen = [f"a process ended with code {killed[0]}"]
                break
    for worker in workers:
        worker.join()
    if errors := [one for one in seen if isinstance(one, str)]:
        raise WayError(next((error for error in errors if error != STOPPED), STOPPED))
    return [one for one in seen if isinstance(one, Seen)]


def measure(
    config: TrialConfig, width: int, way: Way, *, steps: int, trial_steps: int, before: int
) -> Figures:
    """Train one way in fresh processes.

    Args:
        config: the training; its threads are for all processes together.
        width: of the trials.
        way: how.
        steps: that are timed.
        trial_steps: of a whole trial.
        before: bytes in use on the device, by others.

    Raises:
        WayError: it did not run.
    """
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(way.processes), context.Queue()
    own = replace(
        config,
        threads=max(1, config.threads // way.processes),
        train=replace(config.train, compile=way.compile, precision=way.precision),
    )
    workers = [
        context.Process(
            target=work, args=(own, width, way.size, steps, time.time(), barrier, found)
        )
        for _ in range(way.processes)
    ]
    for worker in workers:
        worker.start()
    seen = _collect(workers, found)
    trials = way.size * way.processes
    if config.device == "cpu":
        seconds = sum(one.cpu for one in seen) / config.threads
    else:
        seconds = max(one.end for one in seen) - min(one.start for one in seen)
    used = [one.bytes_used for one in seen]
    on_cuda = config.device.startswith("cuda")
    return Figures(
        trials_per_second=trials / (seconds * trial_steps / steps),
        startup_seconds=max(one.startup for one in seen),
        bytes_per_trial=((max(used) - before) if on_cuda else sum(used)) / trials,
    )


def ways_of(options: argparse.Namespace) -> list[Way]:
    """Every way that is tried."""
    alone = [
        Way(1, processes, compiled == "on", precision)
        for processes in sorted({1, *options.processes})
        for compiled in options.compile
        for precision in options.precision
    ]
    return alone + [Way(k, 1, False, p) for k in options.packs for p in options.precision]


def fastest(found: Mapping[Way, Figures], ways: Iterable[Way]) -> Way | None:
    """Of those that ran; None where none did."""
    ran = [way for way in ways if way in found]
    return max(ran, key=lambda way: found[way].trials_per_second, default=None)


def contenders(found: Mapping[Way, Figures]) -> tuple[Way | None, Way | None, dict[int, Way]]:
    """The fastest: one trial after the other, one process per trial, and of each size of pack."""
    ones = [way for way in found if way.size == 1]
    sizes = sorted({way.size for way in found} - {1})
    packs = {size: fastest(found, (way for way in found if way.size == size)) for size in sizes}
    return (
        fastest(found, (way for way in ones if way.processes == 1)),
        fastest(found, ones),
        {size: way for size, way in packs.items() if way},
    )


def measure_all(
    config: TrialConfig, width: int, options: argparse.Namespace
) -> tuple[dict[Way, Figures], dict[Way, str]]:
    """Every way that ran with the best of its rounds, and the others with the reason."""
    found: dict[Way, Figures] = {}
    failed: dict[Way, str] = {}
    settings = {"steps": options.steps, "trial_steps": options.trial_steps}
    before = bytes_in_use_before(config.device)
    for number in range(options.rounds):
        alone, many, packs = contenders(found)
        best = list(dict.fromkeys(way for way in (alone, many, *packs.values()) if way))
        for way in best if number else ways_of(options):
            try:
                seen = measure(config, width, way, before=before, **settings)
            except WayError as error:
                failed[way] = str(error)
                continue
            found[way] = max(seen, found.get(way, seen), key=lambda f: f.trials_per_second)
    return found, failed


def report(width: int, found: Mapping[Way, Figures], failed: Mapping[Way, str]) -> None:
    """Print a width's lines."""
    for way, reason in failed.items():
        print(f"width {width:4}: size {way.size}, {way}, did not run: {reason}", flush=True)
    alone, many, packs = contenders(found)
    if not (alone and many):
        return
    print(f"width {width:4}: one after the other ({alone}) {found[alone]}")
    print(f"width {width:4}: one process per trial ({many}) {found[many]}", flush=True)
    for size, way in packs.items():
        speed = found[way].trials_per_second
        print(
            f"width {width:4}: pack of {size:3} ({way.precision}) {found[way]}: "
            f"{speed / found[many].trials_per_second:5.2f}x one process per trial, "
            f"{speed / found[alone].trials_per_second:5.2f}x one after the other",
            flush=True,
        )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--packs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    choices = ["off", "on"]
    parser.add_argument("--compile", nargs="+", choices=choices, default=choices)
    precisions = ["fp32", "bf16"]
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--cpus", type=int, default=1, help="for all processes, on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure every width and print its lines."""
    options = parsed()
    device = resolve_device(options.device)
    if device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
    config = BuiltIn.of(Spec.load("quickstart", options.overrides)).trial_config
    options.trial_steps = config.train.steps
    config = replace(
        config,
        device=device,
        threads=options.cpus,
        train=replace(
            config.train, steps=10**6, evals=1, warmup=0.0, schedule="constant", compile=False
        ),
    )
    trial = Trial(options.widths[0], POINTS[0], 0)
    if why := in_child(PackedTrainer(config).obstacle, trial):
        raise SystemExit(f"this model cannot be packed: {why}")
    where = in_child(describe, device)
    print(where)
    print(f"trials of {options.trial_steps} steps per second, MB per trial, s until first steps")
    rows: list[dict[str, Any]] = []
    for width in options.widths:
        found, failed = measure_all(config, width, options)
        report(width, found, failed)
        given = {"device": where, "width": width, "trial_steps": options.trial_steps}
        rows += [given | asdict(way) | asdict(figures) for way, figures in found.items()]
        rows += [given | asdict(way) | {"failed": reason} for way, reason in failed.items()]
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
