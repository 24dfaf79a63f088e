"""Speed and memory of a wide target run on one device, by arithmetic and options.

    python benchmarks/target_speed.py [--width 2048] [--depth 8] [--head-dim 32]
        [--sequence-length 1024] [--batch 32] [--steps 40] [--device cuda] [--only 0 1 2]

The quickstart's model and corpus, in a process of its own each time. Tokens per second are from the
run's result: the first steps, which compile, do not count, the measurements of the held-out loss
do. MFU refers to the device's peak in that arithmetic, by the FLOPs of model and attention.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass, replace
from typing import Literal

from target import quickstart, target_run, trained

from telescope.config import OptimizerConfig
from telescope.target.record import TargetRun


@dataclass(frozen=True)
class Way:
    """One way of training the target."""

    precision: Literal["fp32", "bf16"]
    compile: bool = False
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As it is printed."""
        words = ["compiled"] if self.compile else []
        return ", ".join([self.precision, *words, *(o.removeprefix("--") for o in self.options)])


WAYS = (
    Way("fp32"),
    Way("bf16"),
    Way("bf16", compile=True),
    Way("bf16", options=("--activation-checkpointing",)),
    Way("bf16", compile=True, options=("--activation-checkpointing",)),
)


def main() -> None:
    """Print a row per way of training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(WAYS)))
    given = parser.parse_args()
    print("tokens/s  MFU %  peak GB  loss    parameters  way")
    for way in (WAYS[n] for n in given.only):
        print(row(way, given), flush=True)


def row(way: Way, given: argparse.Namespace) -> str:
    """Train in one way, and return its row, or the end of what went wrong."""
    try:
        result = trained(target(way, given), "--device", given.device, *way.options, ranks=1)
    except subprocess.CalledProcessError as error:
        return f"{way}: failed\n{error.stderr[-2000:]}"
    mfu, memory = 100 * (result["mfu"] or 0), (result["peak_memory_bytes"] or 0) / 1e9
    return (
        f"{result['tokens_per_second']:8,.0f}  {mfu:5.1f}  {memory:7.2f}  {result['loss']:.4f}  "
        f"{result['parameters']:10,}  {way}"
    )


def target(way: Way, given: argparse.Namespace) -> TargetRun:
    """Return the run: the quickstart's target, deeper, with longer sequences."""
    config = quickstart(OptimizerConfig(), given.steps)
    changed = {"depth": given.depth, "head_dim": given.head_dim}
    model = replace(config.model, kwargs={**config.model.kwargs, **changed})
    train = replace(
        config.train,
        batch_size=given.batch,
        sequence_length=given.sequence_length,
        precision=way.precision,
        compile=way.compile,
        evals=1,
    )
    data = replace(config.data, eval_tokens=8 * given.sequence_length)
    return target_run(replace(config, model=model, train=train, data=data), given.width)


if __name__ == "__main__":
    main()
