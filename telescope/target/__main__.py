"""One rank of a target run, for clusters without Ray: ``torchrun -m telescope.target RUN_FOLDER``.

It needs torch, numpy, mup and safetensors alone. `telescope launch --prepare` writes the folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from telescope.errors import TelescopeError
from telescope.target.folder import RunFolder, describe_progress
from telescope.target.ranks import Ranks
from telescope.target.record import Manner
from telescope.target.train import train_target
from telescope.train.device import resolve_device


def main() -> None:
    """Train on this rank; leave with 0, 1 for a divergence, 2 for an error, 130 interrupted."""
    given = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun ends its ranks with it
    ranks = join(given.device)
    folder = RunFolder(given.run)
    show = Lines(folder.path.name)
    manner = Manner(
        threads=given.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks()),
        micro_batch=given.micro_batch,
        checkpoint_every=given.checkpoint_every,
        keep_every=given.keep_every,
        activation_checkpointing=given.activation_checkpointing,
        shard=given.shard,
    )
    try:
        with folder.held() if ranks.is_first else nullcontext():
            result = train_target(folder.path, manner, ranks, show)
    except TelescopeError as error:
        if ranks.is_first:
            print(f"telescope: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if ranks.is_first:
            print(f"{folder.path.name}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if ranks.is_first:
        end = result["reason"] if result["diverged"] else f"held-out loss {result['loss']:.4f}"
        print(f"{folder.path.name}: {end} after {result['step']} steps", flush=True)
    sys.exit(1 if result["diverged"] else 0)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose words are those of `telescope launch`."""
    made = argparse.ArgumentParser(prog="torchrun -m telescope.target", description=__doc__)
    made.add_argument("run", type=Path, help="the run's folder, which has a run.json")
    made.add_argument("--device", default="auto", help="cpu, cuda or auto")
    made.add_argument("--threads", type=int, default=0, help="of a rank on a CPU; 0: its share")
    made.add_argument("--micro-batch", type=int, default=0)
    made.add_argument("--checkpoint-every", type=int, default=0)
    made.add_argument("--keep-every", type=int, default=0)
    made.add_argument("--activation-checkpointing", action="store_true")
    made.add_argument("--shard", action="store_true")
    return made


def join(device: str) -> Ranks:
    """Join the other ranks that torchrun has started, if there are any, each on its device."""
    kind = torch.device(resolve_device(device)).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        kind = f"cuda:{torch.cuda.current_device()}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    return Ranks.of_group(kind)


def local_ranks() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Lines:
    """Prints the progress, a line for each twentieth of the run."""

    def __init__(self, name: str) -> None:
        """Begin before the first step."""
        self._name = name
        self._shown = 0

    def __call__(self, status: dict[str, Any]) -> None:
        """Print a line, if it is time."""
        if status["step"] - self._shown >= status["steps"] / 20:
            self._shown = status["step"]
            print(f"{self._name}: {describe_progress(status)}", flush=True)


if __name__ == "__main__":
    main()
