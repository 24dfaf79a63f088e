"""A sweep's answer trained at the target: the run's folder is made, its ranks are started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from telescope.answer.finished import Finished
from telescope.config import TrialConfig
from telescope.data.corpus import check_vocabulary, load_corpus
from telescope.errors import ResumeError, SpecError
from telescope.records import Trial
from telescope.sweep import launching_foreign
from telescope.sweep.counting import check_corpus, required_tables, target_train
from telescope.sweep.launch_asked import Launch, check_proven, run_folder
from telescope.sweep.machine import check_device, check_usable
from telescope.sweep.versions import versions
from telescope.target.folder import RunFolder
from telescope.target.ranks import Ranks
from telescope.target.record import TargetRun
from telescope.target.train import read_run
from telescope.train.device import resolve_device
from telescope.train.flops import step_cost


def prepare(finished: Finished, asked: Launch) -> RunFolder:
    """Make the run's folder with its `run.json`, or check that it holds the same run.

    Raises:
        RefusedError: there is no answer, or it is not to be relied on.
        ResumeError: the folder holds another run.
        SpecError, ModelError, DataError: as `run`.
    """
    if finished.spec.trainer:
        return launching_foreign.prepare(finished, asked)
    folder = run_folder(finished, asked)
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
        versions=versions(),
    )


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
    if finished.spec.trainer:
        return launching_foreign.launch(folder, finished, asked, show)
    ranks, gpus = ranks_of(finished, asked)
    from telescope.target.launcher import Place
    from telescope.target.launcher import launch as launch_ranks

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
