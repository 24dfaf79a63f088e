"""One training step of the program against a hand-written minimal loop of the same model.

    python benchmarks/step.py [--widths 32 64 128 256] [--steps 20] [--rounds 7] [--compile]

Both train `models/gpt.py` at the quickstart's sizes, from the same start on the same batches, one
thread, in turns; the minimal loop uses `torch.optim.Muon` and `torch.optim.AdamW` as they are.
Printed are the thread's seconds in the median round, and the ratio: above 1 the program is slower.
With --compile the other one is the program's own step under `train.compile`, and the wall time of
its first step, which compiles, is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from telescope.prepare import prepare
from telescope.records import Point, Trial
from telescope.spec import Spec
from telescope.train.config import TrialConfig
from telescope.train.loop import set_up, take_step
from telescope.train.model import build_meta
from telescope.train.optim import parameter_groups

POINT = Point.of(lr=0.02, weight_decay=0.1)


def program_step(config: TrialConfig, width: int) -> Callable[[int], None]:
    """The program's own step."""
    setup = set_up(config, Trial(width, POINT, 0))

    def step(number: int) -> None:
        parts = (setup.model, setup.optimizers, setup.batches, setup.train)
        float(take_step(*parts, number, setup.device))

    return step


def minimal_step(config: TrialConfig, width: int) -> Callable[[int], None]:
    """What one would write for a single run: no schedule object, no groups, no checks."""
    setup = set_up(config, Trial(width, POINT, 0))
    parameters = dict(setup.model.named_parameters())
    tags = build_meta(config.model, width=width, base_width=config.base_width).tags
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in parameter_groups(tags, POINT, config.optimizer):
        members = [parameters[name] for name in group.names]
        settings = {"params": members, "lr": group.lr, "weight_decay": group.weight_decay}
        (matrices if group.is_muon else rest).append(settings)
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, betas=config.optimizer.betas)

    def step(number: int) -> None:
        inputs, targets = setup.batches.at(number)
        logits = setup.model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
        muon.zero_grad()
        adamw.zero_grad()
        loss.item()

    return step


def compiled_step(config: TrialConfig, width: int) -> Callable[[int], None]:
    """The program's own step, compiled; says how long that took."""
    step = program_step(replace(config, train=replace(config.train, compile=True)), width)
    start = time.perf_counter()
    step(0)
    print(f"width {width}: compiled in {time.perf_counter() - start:.1f} s")
    return step


def seconds(step: Callable[[int], None], steps: int) -> float:
    """CPU time per step: others on the machine count less than in wall time."""
    start = time.thread_time()
    for number in range(steps):
        step(number)
    return (time.thread_time() - start) / steps


def main() -> None:
    """Time both in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = prepare(Spec.load("quickstart")).trial_config
    for width in arguments.widths:
        program = program_step(config, width)
        minimal = (compiled_step if arguments.compile else minimal_step)(config, width)
        seconds(program, 3), seconds(minimal, 3)
        times = [
            (seconds(program, arguments.steps), seconds(minimal, arguments.steps))
            for _ in range(arguments.rounds)
        ]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"width {width}: {ours * 1e3:.2f} ms per step, "
            f"{'compiled' if arguments.compile else 'minimal loop'} {theirs * 1e3:.2f} ms, "
            f"ratio {ours / theirs:.3f}"
        )


if __name__ == "__main__":
    main()
