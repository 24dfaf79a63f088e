"""Packs against one process per trial and against one trial after the other, by width and size.

    python benchmarks/fusion.py [--widths 32 64 128 256] [--packs 2 4 8] [--processes 1 2 4]
        [--cpus 1] [--device auto] [--steps 20] [--rounds 3] [--json FILE]

All train the quickstart's model and data with the same steps, in fresh processes, in turns; the
best of the rounds counts. Compared are trials per second once everything runs, evaluation left
out: of one process that trains one trial at a time, of as many processes at once as are fastest
(each with one trial; --processes says which numbers are tried), and of one process with a pack. On
a CPU all of them have the same --cpus cores, and it is the time on those that counts, so that other
work on the machine hardly does; on an accelerator it is wall time. Start-up, until a process has
taken its first steps, and memory per trial are given apart: on CUDA all that is in use on the
device, contexts included, on a CPU the largest resident size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from telescope.prepare import prepare
from telescope.records import Point, Trial
from telescope.spec import Spec
from telescope.train.config import TrialConfig
from telescope.train.fused import Pack, obstacle
from telescope.train.loop import reads_every, resolve_device, set_up, take_step

WARM_UP = 5
"""Steps before the clock starts."""
POINTS = [Point.of(lr=1e-4 * (n + 1), weight_decay=0.1) for n in range(1024)]
"""No two trials of a pack are alike, and none diverges."""


@dataclass(frozen=True)
class Figures:
    """What one way of training has shown."""

    trials_per_second: float
    startup_seconds: float
    bytes_per_trial: float


def steps_of(config: TrialConfig, width: int, size: int) -> Callable[[int], None]:
    """A function that takes so many steps of a pack, or of one trial, and waits for their end."""
    trials = [Trial(width, point, 0) for point in POINTS[:size]]
    if size > 1:
        pack = Pack(config, trials)

        def step_pack(number: int) -> None:
            for _ in range(number):
                pack.step()
            pack.read()

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
    """One process: start up, wait for the others, train, wait, say what was seen."""
    torch.set_num_threads(config.threads)
    take = steps_of(config, width, size)
    take(WARM_UP)
    startup = time.time() - born
    barrier.wait()
    start, start_cpu = time.time(), time.process_time()
    take(steps)
    end, cpu = time.time(), time.process_time() - start_cpu
    barrier.wait()  # the memory of all is in use
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if resolve_device(config.device).startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        used = total - free
    found.put((start, end, cpu, startup, used))
    barrier.wait()


def measure(
    config: TrialConfig, width: int, *, size: int, processes: int, steps: int, trial_steps: int
) -> Figures:
    """So many processes at once, each with a pack of `size`, or with one trial."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(processes), context.Queue()
    own = replace(config, threads=max(1, config.threads // processes))
    workers = [
        context.Process(target=work, args=(own, width, size, steps, time.time(), barrier, found))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    seen = [found.get() for _ in workers]
    for worker in workers:
        worker.join()
    starts, ends, cpu, startups, used = zip(*seen, strict=True)
    trials = size * processes
    on_device = resolve_device(config.device) != "cpu"
    seconds = max(ends) - min(starts) if on_device else sum(cpu) / config.threads
    seconds *= trial_steps / steps
    return Figures(
        trials_per_second=trials / seconds,
        startup_seconds=max(startups),
        bytes_per_trial=(max(used) if on_device else sum(used)) / trials,
    )


def best_of_rounds(config: TrialConfig, width: int, options: Any) -> dict[tuple[int, int], Figures]:
    """(size, processes) → the fastest of the rounds, in each of which every way has its turn."""
    ways = [(1, p) for p in sorted({1, *options.processes})] + [(k, 1) for k in options.packs]
    found: dict[tuple[int, int], Figures] = {}
    for _ in range(options.rounds):
        for way in ways:
            seen = measure(
                config,
                width,
                size=way[0],
                processes=way[1],
                steps=options.steps,
                trial_steps=options.trial_steps,
            )
            fastest = max(seen, found.get(way, seen), key=lambda f: f.trials_per_second)
            found[way] = fastest
    return found


def describe(device: str) -> str:
    """The hardware and the versions, for whoever reads the figures."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    return f"{device}: {name}; torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    """Measure every width and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--packs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    if device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
    config = prepare(Spec.load("quickstart", options.overrides)).trial_config
    options.trial_steps = config.train.steps
    config = replace(
        config,
        device=device,
        threads=options.cpus,
        train=replace(config.train, steps=10**6, evals=1, warmup=0.0, schedule="constant"),
    )
    if why := obstacle(config, Trial(options.widths[0], POINTS[0], 0)):
        parser.error(f"this model cannot be packed: {why}")
    print(describe(device))
    print(
        f"trials of {options.trial_steps} steps per second; MB per trial; s until the first steps"
    )
    rows = []
    for width in options.widths:
        found = best_of_rounds(config, width, options)
        alone = found[1, 1]
        ones = {p: figures for (size, p), figures in found.items() if size == 1}
        processes = max(ones, key=lambda p: ones[p].trials_per_second)
        many = ones[processes]
        for size in options.packs:
            pack = found[size, 1]
            rows.append(
                {"device": describe(device), "width": width, "size": size, "processes": processes}
                | {"sequential": asdict(alone), "process_per_trial": asdict(many)}
                | {"pack": asdict(pack)}
            )
            print(
                f"width {width:4}, pack of {size:3}: "
                f"{pack.trials_per_second / many.trials_per_second:5.2f}x one process per trial "
                f"(fastest: {processes} at once), "
                f"{pack.trials_per_second / alone.trials_per_second:5.2f}x one after the other; "
                + "; ".join(
                    f"{name} {f.trials_per_second:.3g}/s {f.bytes_per_trial / 1e6:.0f} MB "
                    f"{f.startup_seconds:.1f} s"
                    for name, f in (("pack", pack), ("processes", many), ("sequential", alone))
                ),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
