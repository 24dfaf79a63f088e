"""The machine of a benchmark: its name, clock and memory, and a fresh process.

The parent of a benchmark that measures memory must not compute on a GPU itself: its context would
be part of every figure. Whatever it wants to know it asks a child.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a fresh process; return its value or raise its exception."""
    with _process() as process:
        return process.submit(function, *args, **kwargs).result()


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def describe(device: str) -> str:
    """The hardware and the versions, for whoever reads the figures; opens a CUDA context."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.startswith("cuda"):
        name, number = torch.cuda.get_device_name(device), torch.cuda.device_count()
        # Without NVIDIA's MPS the processes on one GPU take turns, with it their kernels overlap.
        pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
        mps = "MPS found" if (pipes / "control").exists() else "no MPS"
        return f"{device}: {name}, 1 of {number}, {mps}; CUDA {torch.version.cuda}, {versions}"
    name = platform.processor() or platform.machine()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    return f"{device}: {name}; {versions}"


def clock(device: str) -> float:
    """Seconds, to be subtracted: of this thread on a CPU, so that others on it count less.

    On an accelerator it is wall time, read when all that was launched is done.
    """
    if device == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize(torch.device(device))
    return time.perf_counter()


def bytes_in_use(device: str) -> int:
    """Memory in use on a CUDA device, by whomever; opens a context, which is part of it."""
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return total - free


def bytes_in_use_before(device: str) -> int:
    """Memory that others use on a CUDA device; 0 on other devices.

    Who asks has a context, of a size that nobody tells: so one process asks, and then a second one
    beside it, whose answer is larger by one context.
    """
    if not device.startswith("cuda"):
        return 0
    with _process() as first, _process() as second:
        with_one = first.submit(bytes_in_use, device).result()
        with_two = second.submit(bytes_in_use, device).result()
    return 2 * with_one - with_two
