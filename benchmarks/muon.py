"""A step of the program's Muon against `torch.optim.Muon` and against AdamW on the same matrices.

    python benchmarks/muon.py [--widths 32 64 128 256] [--layers 2 8] [--rounds 30] [--device cpu]

The matrices are those of `models/gpt.py`: per layer four (width, width), two (4 width, width) and
one (width, 4 width). All start equal and get the same gradients; before anything is timed the
program's and torch's Muon, both in bf16, must agree. Then all take their steps in turns, one thread
on a CPU, and the median times are compared: a ratio above 1 is how many times faster the program's
Muon is. CUDA is measured where there is one, unless --device says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from machine import clock, describe
from torch import Tensor, nn

from telescope.train.device import resolve_device
from telescope.train.muon import Muon

SETTINGS = {"lr": 0.02, "weight_decay": 0.1}
TOLERANCE = 0.03
"""Largest difference after five steps, as a share of what the steps have moved: bf16 is
2–3 % off the exact iteration, and its rounding depends on how the products are grouped."""


def shapes(width: int, layers: int) -> list[tuple[int, int]]:
    """Of the hidden matrices."""
    square, tall, wide = (width, width), (4 * width, width), (width, 4 * width)
    return [*([square] * 4 * layers), *([tall] * 2 * layers), *([wide] * layers)]


def groups_of(params: Sequence[nn.Parameter]) -> list[dict[str, object]]:
    """One per shape, as the program has them."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    return [{"params": members, **SETTINGS} for members in by_shape.values()]


def optimizers(
    starts: Sequence[Tensor],
) -> dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]]:
    """Name → parameters and what steps them."""
    arms: dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]] = {}
    for name in ("program", "torch", "program, fp32", "AdamW"):
        params = [nn.Parameter(start.clone()) for start in starts]
        groups = groups_of(params)
        if name == "torch":
            settings = {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.95, "nesterov": True}
            arms[name] = (params, torch.optim.Muon(groups, **settings))  # type: ignore[arg-type]
        elif name == "AdamW":
            arms[name] = (params, torch.optim.AdamW(groups))
        else:
            dtype = "fp32" if name.endswith("fp32") else "bf16"
            how = {"momentum": 0.95, "nesterov": True, "ns_steps": 5}
            arms[name] = (params, Muon(groups, ns_dtype=dtype, **how))  # type: ignore[arg-type]
    return arms


def check_agreement(
    arms: dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]], starts: Sequence[Tensor]
) -> None:
    """Five steps on the same gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        grads = [torch.randn(s.shape, generator=generator) for s in starts]
        for params, optimizer in arms.values():
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.to(p.device)
            optimizer.step()
    for ours, theirs, start in zip(arms["program"][0], arms["torch"][0], starts, strict=True):
        apart = float((ours - theirs).detach().norm() / (theirs.detach() - start).norm())
        assert apart < TOLERANCE, f"{tuple(start.shape)}: {apart:.3f} apart"


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds of one step."""
    start = clock(device)
    step()
    return clock(device) - start


def main() -> None:
    """Print a table row per width and number of layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = resolve_device(arguments.device)
    print(f"{describe(device)}; {arguments.rounds} rounds in turns, one thread\n")
    print("| width | layers | program ms | torch / program | fp32 / program | AdamW / program |")
    print("|---|---|---|---|---|---|")
    for width in arguments.widths:
        for layers in arguments.layers:
            generator = torch.Generator().manual_seed(0)
            starts = [
                torch.randn(shape, generator=generator).to(device)
                for shape in shapes(width, layers)
            ]
            arms = optimizers(starts)
            check_agreement(arms, starts)
            times: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(arguments.rounds):
                for name, (_, optimizer) in arms.items():
                    times[name].append(timed(optimizer.step, device))
            ms = {name: statistics.median(column) * 1e3 for name, column in times.items()}
            ours = ms["program"]
            ratios = (f"{ms[name] / ours:.2f}" for name in ("torch", "program, fp32", "AdamW"))
            print(f"| {width} | {layers} | {ours:.2f} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
