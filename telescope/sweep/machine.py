"""This machine: whether it has what trials need, how many workers there are, and what each gets.

torch is imported inside the functions that need it: it takes seconds, and the CPU needs none of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Literal

from telescope.errors import SpecError
from telescope.spec.spec import Spec
from telescope.train.device import resolve_device

FRACTION_STEPS = 10_000
"""Ray counts GPUs in ten-thousandths, and rounds: six of 1/6 would be more than one."""


def workers(spec: Spec, asked: int | None, *, is_cluster: bool) -> dict[int, int]:
    """Width → how many trials run at once; by width, as many as fit of the number asked for.

    "auto" is one per accelerator where our own trials take one, whether compute.gpus is given or
    not: a worker packs its trials, and a second one beside it would only share the device.

    Args:
        spec: the sweep.
        asked: the command line's number, which wins; None if not given.
        is_cluster: whether the trials run on another machine than this, so that "auto" cannot be
            read off it.

    Raises:
        SpecError: "auto" on a cluster.
    """
    number, compute = asked or spec.compute.workers, spec.compute
    if number != "auto" and (is_cluster or not compute.is_by_width):
        return dict.fromkeys(spec.ladder.widths, number)
    if number == "auto" and is_cluster:
        raise SpecError("compute.workers: got 'auto', must be a number on a cluster; use --workers")
    most = math.inf if number == "auto" else number
    devices = _devices(spec) if number == "auto" else 0
    return {
        width: int(min(most, _room(compute.cpus_at(width), compute.gpus_at(width), devices)))
        for width in spec.ladder.widths
    }


def gpus(spec: Spec, at_once: Mapping[int, int], *, is_cluster: bool) -> dict[int, float]:
    """Width → GPUs that a worker reserves: what the spec says, or else an even share.

    Nothing hides a GPU from a worker that reserves none, so that all would compute on the first.
    A device with a number ("cuda:1") is taken at its word: all share it, and none is reserved.

    Args:
        spec: the sweep.
        at_once: width → workers.
        is_cluster: whether the trials run on other machines, whose GPUs are not known here.
    """
    compute, here = spec.compute, not is_cluster and takes_any_gpu(spec)
    number = _devices(spec) if here and resolved(spec) == ("cuda", None) else 0
    return {
        width: compute.gpus_at(width) or (_share(workers, number) if number else 0.0)
        for width, workers in at_once.items()
    }


def takes_any_gpu(spec: Spec) -> bool:
    """Tell whether workers use the first GPU they see; foreign trainers choose their own."""
    return spec.trainer is None and spec.compute.device in ("auto", "cuda")


def resolved(spec: Spec) -> tuple[str, int | None]:
    """The device that trials compute on, if they run on this machine: its type, and its number.

    As its name has them, without torch: whether there is such a type, `check_device` tells.
    """
    kind, _, number = resolve_device(spec.compute.device).partition(":")
    return kind, int(number) if number.isdecimal() else None


def check_numbered_device(spec: Spec) -> None:
    """Check that a worker will see the device that the spec names by its number.

    Raises:
        SpecError: it reserves GPUs, and sees those alone, counted from 0.
    """
    if spec.trainer is not None:
        return
    index = resolved(spec)[1] or 0
    for width in spec.ladder.widths:
        reserved = spec.compute.gpus_at(width)
        if reserved and index >= max(1, math.floor(reserved)):
            raise SpecError(
                f"compute.device: got {spec.compute.device!r} beside compute.gpus = {reserved:g}: "
                "a worker sees the GPUs that it reserves, counted from 0; use device = 'cuda', or "
                "leave gpus out"
            )


def pack_size(spec: Spec, *, is_cluster: bool) -> int | Literal["auto"]:
    """Return the pack size of a worker; "auto" only if workers may have accelerators.

    On a CPU "auto" is 1, without a probe: runs stay equal bit for bit, and the workers already use
    the cores from which a pack would gain.

    Args:
        spec: the sweep.
        is_cluster: the trials run on other machines than this.
    """
    compute = spec.compute
    if compute.pack != "auto":
        return compute.pack
    if is_cluster:
        on_cpu = compute.device == "cpu" or (compute.device == "auto" and not _any_gpus(spec))
    else:
        on_cpu = resolved(spec)[0] == "cpu"
    return 1 if on_cpu else "auto"


def _any_gpus(spec: Spec) -> bool:
    return any(map(spec.compute.gpus_at, spec.ladder.widths))


def _devices(spec: Spec) -> int:
    """Count this machine's accelerators for the built-in trainer; 0 if none is used."""
    if spec.trainer is not None:
        return 0
    kind, number = resolved(spec)
    if kind == "cpu":
        return 0
    if kind != "cuda" or number is not None:
        return 1  # all workers are on it
    return max(1, _cuda_devices())


def _cuda_devices() -> int:
    """Count the CUDA devices that this process sees."""
    import torch

    return torch.cuda.device_count()


def _share(workers: int, devices: int) -> float:
    """Return the share of a device per worker if workers spread evenly, at most 1."""
    per_device = math.ceil(workers / devices)
    return math.floor(FRACTION_STEPS / per_device) / FRACTION_STEPS


def _room(cpus: int, gpus: float, devices: int) -> int:
    """Return the number of trials of a size that fit this machine at once, at least 1."""
    if gpus:
        return max(1, math.floor(_cuda_devices() / gpus))
    return devices or max(1, len(os.sched_getaffinity(0)) // cpus)


def check_device(device: str) -> None:
    """Check that torch knows the device's name; whether a worker has it, it finds out itself."""
    if resolve_device(device) == "cpu":
        return
    import torch

    try:
        torch.device(resolve_device(device))
    except RuntimeError as error:
        raise SpecError(
            f"compute.device: got {device!r}, must be a torch device such as cpu, cuda, or auto"
        ) from error


def check_machines(spec: Spec, *, is_cluster: bool) -> None:
    """Check that the machines have what trials ask for, as far as is known here.

    Args:
        spec: the sweep.
        is_cluster: whether the trials run on other machines, which are not looked at.

    Raises:
        SpecError: naming the key and what there is.
    """
    if not is_cluster:
        check_this_machine(spec)
        check_compiler(spec)
    check_numbered_device(spec)


def check_this_machine(spec: Spec) -> None:
    """Check that this machine has what a trial asks for; a cluster's machines may differ.

    Raises:
        SpecError: naming the key and what there is.
    """
    cpus = len(os.sched_getaffinity(0))
    most = max(map(spec.compute.cpus_at, spec.ladder.widths))
    if most > cpus:
        raise SpecError(f"compute.cpus: got {most}, this machine has {cpus}; lower it")
    if spec.trainer is None:
        check_usable(spec.compute.device)


def check_usable(device: str) -> None:
    """Check that this machine can compute on a device.

    Raises:
        SpecError: it cannot.
    """
    if resolve_device(device) == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=torch.device(resolve_device(device)))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(
            f"compute.device: got {device!r}, which this machine cannot use ({reason}); use auto "
            "or cpu"
        ) from error


def check_compiler(spec: Spec) -> None:
    """Check that torch can compile on this machine, where the spec wants it; takes seconds.

    Raises:
        SpecError: it cannot.
    """
    if spec.train is None or not spec.train.compile:
        return
    import torch

    number = torch.zeros(1, device=torch.device(resolve_device(spec.compute.device)))
    try:
        torch.compile(lambda x: x + 1)(number)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(
            f"train.compile: got true, but torch.compile fails on this machine ({reason}); install "
            "a C++ compiler, or leave it false"
        ) from error
