"""One training step of the program against a hand-written minimal loop of the same model.

    python benchmarks/step.py [--widths 32 64 128 256] [--steps 20] [--rounds 7] [--compile]
        [--device auto]

Both train `models/gpt.py` at the quickstart's sizes, from the same start on the same batches, one
thread, in turns; the minimal loop uses `torch.optim.Muon` and `torch.optim.AdamW` as they are. Both
read the loss after every step. Printed are the seconds in the median round, on a CPU the thread's,
on an accelerator wall time, and the ratio: above 1 the program is slower.
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
from machine import clock, describe
from torch.nn import functional

from telescope.config import TrialConfig
from telescope.records import Point, Trial
from telescope.rules.groups import parameter_groups
from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.train.device import resolve_device
from telescope.train.loop import moved, set_up, take_step
from telescope.train.model import build_meta

POINT = Point.of(lr=0.02, weight_decay=0.1)


def program_step(config: TrialConfig, width: int) -> Callable[[int], None]:
    """The program's own step."""
    setup = set_up(config, Trial(width, POINT, 0))

    def step(number: int) -> None:
        parts = (setup.model, setup.optimizers, setup.batches, setup.train)
        float(take_step(*parts, number, setup.device))

    return step


def minimal_step(config: TrialConfig, width: int) -> Callable[[int], None]:
    """Take a step as code for a single run would: no schedule object, no groups, no checks."""
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
        inputs, targets = (moved(tokens, setup.device) for tokens in setup.batches.at(number))
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


def seconds(step: Callable[[int], None], steps: int, device: str) -> float:
    """Seconds per step."""
    start = clock(device)
    for number in range(steps):
        step(number)
    return (clock(device) - start) / steps


def main() -> None:
    """Time both in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = resolve_device(arguments.device)
    config = replace(BuiltIn.of(Spec.load("quickstart")).trial_config, device=device)
    print(describe(device))
    for width in arguments.widths:
        program = program_step(config, width)
        minimal = (compiled_step if arguments.compile else minimal_step)(config, width)
        seconds(program, 3, device), seconds(minimal, 3, device)
        times = [
            tuple(seconds(step, arguments.steps, device) for step in (program, minimal))
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
