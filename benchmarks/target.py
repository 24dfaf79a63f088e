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
    run = quickstart(OptimizerConfig(name=name), width, steps)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        folder.write_run(run.as_dict())
        before = loopback()
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "telescope.target", place, "--device", "cpu", "--threads", "1"]
        command += ["--checkpoint-every", str(steps)]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads((Path(place) / "result.json").read_text())
        return loopback() - before, result


def quickstart(optimizer: OptimizerConfig, width: int, steps: int) -> TargetRun:
    """Return the quickstart's target with another optimizer and number of steps."""
    spec = Spec.load("quickstart")
    model, train = required_tables(spec)
    data = replace(spec.data, eval_tokens=4096)
    config = TrialConfig(
        model=model,
        optimizer=optimizer,
        train=replace(train, steps=steps),
        data=data,
        base_width=spec.base_width,
        corpus_digest=load_corpus(data).digest,
    )
    trial = Trial(width, Point.of(lr=0.03, weight_decay=0.1), 0)
    widths = {"width": width, "base_width": spec.base_width}
    parameters = step_cost(model, config.train, optimizer, **widths).parameters
    return TargetRun(sweep="quickstart", trial=trial, config=config, parameters=parameters)


def loopback() -> int:
    """Return the bytes that the loopback device has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise SystemExit("no loopback device")


if __name__ == "__main__":
    main()
