"""A sweep's answer trained at the target: the run's folder is made, its ranks are started."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from telescope.answer.finished import Finished
from telescope.config import TrialConfig
from telescope.data.corpus import check_vocabulary, load_corpus
from telescope.errors import RefusedError, ResumeError, SpecError
from telescope.records import Trial
from telescope.sweep.counting import check_corpus, required_tables, target_train
from telescope.sweep.machine import check_device, check_usable
from telescope.target.folder import TARGETS, RunFolder
from telescope.target.record import Manner, TargetRun
from telescope.target.train import read_run
from telescope.train.flops import step_cost
from telescope.train.loop import resolve_device

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PACKAGES = ("telescope", "torch", "mup", "ray", "numpy")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The target run that is asked for; what is None or 0 is the sweep's own."""

    width: int | None = None
    steps: int | None = None
    seed: int = 0
    run: str | None = None
    """Name of the run's folder; by default from width and steps."""
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    ray_address: str | None = None
    precision: Literal["fp32", "bf16"] | None = None
    compile: bool | None = None
    clip: float = 0.0
    unproven: bool = False
    """Launch although the certificate says FAIL, or the sweep has not finished."""
    manner: Manner = field(default_factory=Manner)

    @property
    def name(self) -> str:
        """The run's name without the width, which `named` adds."""
        return "" if self.steps is None else f"-steps-{self.steps}"


def run_name(finished: Finished, asked: Launch) -> str:
    """Return the name of the run's folder.

    Raises:
        SpecError: the name asked for is no plain name.
    """
    if asked.run is None:
        return f"width-{asked.width or finished.spec.target.width}{asked.name}"
    if not RUN_NAME.fullmatch(asked.run):
        raise SpecError(
            f"--run: got {asked.run!r}, must be letters, digits, '.', '_' and '-', no path"
        )
    return asked.run


def prepare(finished: Finished, asked: Launch) -> RunFolder:
    """Make the run's folder with its `run.json`, or check that it holds the same run.

    Raises:
        RefusedError: there is no answer, or it is not to be relied on.
        ResumeError: the folder holds another run.
        SpecError, ModelError, DataError: as `run`.
    """
    folder = RunFolder(finished.folder.path / TARGETS / run_name(finished, asked))
    run = target_run(finished, asked)
    if folder.read_run() is None:
        folder.write_run(run.as_dict())
    elif differing := read_run(folder).differences(run):
        raise ResumeError(
            f"{folder.path}: holds another run: {'; '.join(differing)}; launch under another --run"
        )
    return folder


def target_run(finished: Finished, asked: Launch) -> TargetRun:
    """Return the run with the sweep's answer at the target.

    Raises:
        TelescopeError: see `prepare`.
    """
    spec = finished.spec
    settings = finished.transfer(width=asked.width, steps=asked.steps)
    check_proven(finished, settings.certificate, asked)
    model, train = required_tables(spec)
    train = replace(target_train(spec, train), steps=settings.steps or train.steps)
    if asked.precision:
        train = replace(train, precision=asked.precision)
    if asked.compile is not None:
        train = replace(train, compile=asked.compile)
    corpus = load_corpus(spec.data)
    check_vocabulary(corpus, model.kwargs["vocab_size"])
    config = TrialConfig(
        model=model,
        optimizer=spec.optimizer,
        train=train,
        data=spec.data,
        base_width=spec.base_width,
        corpus_digest=corpus.digest,
    )
    check_corpus(config)
    cost = step_cost(model, train, spec.optimizer, width=settings.width, base_width=spec.base_width)
    return TargetRun(
        sweep=spec.name,
        trial=Trial(settings.width, settings.point, asked.seed),
        config=config,
        clip=asked.clip,
        flops={key: getattr(cost, key) for key in ("model", "attention", "optimizer")},
        parameters=cost.parameters,
        groups=settings.groups or (),
        versions=_versions(),
    )


def check_proven(finished: Finished, certificate: Any, asked: Launch) -> None:
    """Refuse to train the large run with an answer that is not to be relied on.

    Raises:
        RefusedError: the certificate says FAIL, or the sweep has not finished.
    """
    if asked.unproven:
        return
    name, problem = finished.spec.name, ""
    if not finished.ladder.is_finished:
        problem = "the sweep has not finished; go on with `telescope run`"
    elif certificate and certificate.verdict == "FAIL":
        problem = f"certificate FAIL: {'; '.join(certificate.problems)}"
    if problem:
        raise RefusedError(f"{name}: {problem}; --unproven launches all the same")


def launch(
    folder: RunFolder, finished: Finished, asked: Launch, show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train a prepared run to its end, or go on with it.

    Args:
        folder: from `prepare`.
        finished: the sweep.
        asked: the same as there.
        show: called with the latest progress a few times per second.

    Returns:
        The content of its `result.json`.

    Raises:
        TelescopeError, KeyboardInterrupt: see `telescope.target.launcher.launch`.
    """
    if result := folder.read_result():
        return result
    ranks, gpus = ranks_of(finished, asked)
    from telescope.target.launcher import Place
    from telescope.target.launcher import launch as launch_ranks
    from telescope.target.ranks import Ranks
    from telescope.target.train import read_run

    batch_size = read_run(folder).config.train.batch_size
    Ranks(0, ranks).rows(batch_size)  # refuses too many before any starts
    cpus = asked.cpus_per_worker
    if cpus is None:
        cpus = 1 if asked.ray_address else max(1, len(os.sched_getaffinity(0)) // ranks)
    manner = replace(asked.manner, threads=cpus)
    with folder.held():
        return launch_ranks(folder.path, manner, Place(ranks, cpus, gpus, asked.ray_address), show)


def ranks_of(finished: Finished, asked: Launch) -> tuple[int, float]:
    """Return the number of ranks and the GPUs of each: by default all GPUs here, else one CPU rank.

    Raises:
        SpecError: a cluster's number is not given, or a device that is not there.
    """
    device = finished.spec.compute.device
    if asked.ray_address:
        if asked.workers is None:
            raise SpecError("--workers: must be given on a cluster")
        has_gpus = bool(finished.spec.compute.gpus_at(finished.spec.ladder.widths[-1]))
        gpus = float(has_gpus) if asked.gpus_per_worker is None else asked.gpus_per_worker
        return asked.workers, gpus
    check_device(device)
    check_usable(device)
    has_gpus = torch.device(resolve_device(device)).type == "cuda"
    gpus = float(has_gpus) if asked.gpus_per_worker is None else asked.gpus_per_worker
    return asked.workers or (torch.cuda.device_count() if gpus else 1), gpus


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
