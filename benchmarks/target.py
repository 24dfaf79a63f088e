"""Traffic and optimizer state of a target run on several ranks of this machine, Muon beside AdamW.

    unshare --net python benchmarks/target.py

In a network of its own, which needs root, the loopback device carries the ranks' words alone. The
bytes of a step are the difference between a longer and a shorter run, divided by the steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from telescope import Spec
from telescope.config import OptimizerConfig, TrialConfig
from telescope.data.corpus import load_corpus
from telescope.records import Point, Trial
from telescope.sweep.counting import required_tables
from telescope.target.folder import RunFolder
from telescope.target.record import TargetRun
from telescope.train.flops import step_cost

SHORT, LONG = 5, 25


def main() -> None:
    """Print a row per optimizer and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    given = parser.parse_args()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    print("optimizer  ranks  MB per step  over parameters  state per rank / fair part")
    for name in ("muon", "adamw"):
        for ranks in given.ranks:
            short, _ = traffic(name, given.width, ranks, SHORT)
            long, result = traffic(name, given.width, ranks, LONG)
            step = (long - short) / (LONG - SHORT)
            state = result["optimizer_state"]
            fair = max(state) * len(state) / sum(state)
            over = step / (4 * result["parameters"])
            print(
                f"{name:9}  {ranks:5}  {step / 1e6:11.1f}  {over:15.2f}  {fair:26.2f}", flush=True
            )


def traffic(name: Any, width: int, ranks: int, steps: int) -> tuple[int, dict[str, Any]]:
    """Run the quickstart's target for some steps; return the loopback's bytes and the result."""
    run = target_run(quickstart(OptimizerConfig(name=name), steps), width)
    before = loopback()
    result = trained(run, "--device", "cpu", "--threads", "1", ranks=ranks)
    return loopback() - before, result


def quickstart(optimizer: OptimizerConfig, steps: int) -> TrialConfig:
    """Return the quickstart's training with another optimizer and number of steps."""
    spec = Spec.load("quickstart")
    model, train = required_tables(spec)
    data = replace(spec.data, eval_tokens=4096)
    return TrialConfig(
        model=model,
        optimizer=optimizer,
        train=replace(train, steps=steps),
        data=data,
        base_width=spec.base_width,
        corpus_digest=load_corpus(data).digest,
    )


def target_run(config: TrialConfig, width: int) -> TargetRun:
    """Return the target run of a training, with its FLOPs and parameters."""
    trial = Trial(width, Point.of(lr=0.03, weight_decay=0.1), 0)
    widths = {"width": width, "base_width": config.base_width}
    cost = step_cost(config.model, config.train, config.optimizer, **widths)
    flops = {"model": cost.model, "attention": cost.attention, "optimizer": cost.optimizer}
    return TargetRun(
        sweep="quickstart", trial=trial, config=config, flops=flops, parameters=cost.parameters
    )


def trained(run: TargetRun, *options: str, ranks: int) -> dict[str, Any]:
    """Train a run by torchrun, with a checkpoint at its end; return its result.

    Raises:
        CalledProcessError: a rank failed; `stderr` has its words.
    """
    with tempfile.TemporaryDirectory() as place:
        RunFolder(Path(place)).write_run(run.as_dict())
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "telescope.target", place, "--checkpoint-every", str(run.steps)]
        subprocess.run(
            [sys.executable, *command, *options], check=True, capture_output=True, text=True
        )
        result: dict[str, Any] = json.loads((Path(place) / "result.json").read_text())
        return result


def loopback() -> int:
    """Return the bytes that the loopback device has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise SystemExit("no loopback device")


if __name__ == "__main__":
    main()
