"""The SLURM jobs of a sweep: its commands, and the resources that `[compute]` asks for."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from telescope.errors import SpecError
from telescope.slurm.script import Asked, Job
from telescope.spec.spec import Spec
from telescope.store.board import check_shareable
from telescope.store.database import has_password
from telescope.sweep.launch_asked import Launch, run_name
from telescope.target.folder import TARGETS

PYTHON = (sys.executable,)
Kind = Literal["workers", "ray", "launch"]
WAIT = 3600
"""Seconds that workers of an array wait for a driver that is queued again."""
MANNER = ("micro_batch", "checkpoint_every", "keep_every", "activation_checkpointing", "shard")
"""Options of `launch` that each rank gets; the others are in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A sweep or its target run as it is asked for; `--` and what follows are `more`."""

    kind: Kind
    spec: Spec
    given: str
    """The sweep as the command line names it, a path made absolute."""
    results: Path
    overrides: Sequence[str] = ()
    storage: str | None = None
    workers: int | None = None
    nodes: int = 1
    asked: Asked = field(default_factory=Asked)
    more: Sequence[str] = ()
    python: Sequence[str] = PYTHON
    """Python in the job: the same environment, on a file system that all nodes see."""

    @property
    def program(self) -> list[str]:
        """The command line's beginning."""
        return [*self.python, "-m", "telescope"]

    def run(self, *options: str) -> list[str]:
        """Return the command of the driver."""
        overrides = [word for text in self.overrides for word in ("--set", text)]
        named = ["--name", self.spec.name, "--results", str(self.results)]
        return [*self.program, "run", self.given, *named, *overrides, *options, *self.more]


def make_job(batch: Batch, options: Mapping[str, Any]) -> Job:
    """Return the job that is asked for.

    Args:
        batch: what is asked for.
        options: `more`, parsed: name → value.

    Raises:
        SpecError: a line per fault.
    """
    _check_used(batch)
    if batch.kind == "launch":
        return _launch_job(batch, options)
    return _ray_job(batch) if batch.kind == "ray" else _workers_job(batch)


def _check_used(batch: Batch) -> None:
    """Refuse options that the script would not use.

    Raises:
        SpecError: a line per option.
    """
    if batch.kind == "launch":
        why = "is of a sweep; --launch trains the target of one that is finished"
        given = {"--storage": batch.storage, "--workers": batch.workers, "--set": batch.overrides}
    else:
        why = "is of --ray and --launch; an array has as many tasks as --workers says"
        given = {"--nodes": batch.kind == "workers" and batch.nodes > 1}
    if faults := [f"{option}: {why}" for option, value in given.items() if value]:
        raise SpecError(*faults)


def _workers_job(batch: Batch) -> Job:
    """An array of workers that join, with the driver in its first task.

    Raises:
        SpecError: no storage, one with a password or that workers cannot share, or an unknown
            number of workers.
    """
    storage = _checked_storage(batch.storage)
    number = _number_of_workers(batch)
    join = ["worker", batch.spec.name, "--storage", storage, "--results", str(batch.results)]
    join += ["--wait", str(WAIT)]
    run = batch.run("--dispatcher", "workers", "--storage", storage, "--workers", str(number))
    return Job(
        name=batch.spec.name,
        kind="workers",
        size=number,
        cpus=batch.asked.cpus_per_task or _cpus(batch.spec),
        gpus=_gpus_of_a_worker(batch),
        folder=Path.cwd(),
        variables={"run": run, "worker": [*batch.program, *join]},
        asked=batch.asked,
    )


def _ray_job(batch: Batch) -> Job:
    """A Ray cluster over the nodes of one allocation, with the driver on the first.

    Raises:
        SpecError: an unknown number of workers.
    """
    number = _number_of_workers(batch)
    a_node = math.ceil(number / batch.nodes)
    cpus = batch.asked.cpus_per_task or a_node * _cpus(batch.spec)
    gpus = batch.asked.gpus_per_task
    if gpus is None:
        gpus = math.ceil(a_node * _gpus(batch.spec))
    storage = ["--storage", _without_secret(batch.storage)] if batch.storage else []
    start = [*batch.python, "-m", "ray.scripts.scripts", "start", "--block"]
    return Job(
        name=batch.spec.name,
        kind="ray",
        size=batch.nodes,
        cpus=cpus,
        gpus=gpus,
        folder=Path.cwd(),
        variables={
            "python": batch.python,
            "ray_start": [*start, f"--num-cpus={cpus}", f"--num-gpus={gpus}"],
            "run": batch.run("--workers", str(number), *storage),
        },
        asked=batch.asked,
    )


def _launch_job(batch: Batch, launch: Mapping[str, Any]) -> Job:
    """The target run: torchrun on every node, or the command of a trainer of one's own.

    Raises:
        SpecError: several nodes for a trainer that is started once.
    """
    asked = Launch(width=launch["width"], steps=launch["steps"], run=launch["run"])
    run = run_name(batch.spec, asked)
    own = batch.spec.trainer is not None
    if own and batch.nodes > 1:
        raise SpecError(
            f"--nodes: got {batch.nodes}, but the spec's [trainer] is started once, on one node; "
            "let its own command start the others: --sbatch=--nodes=N"
        )
    gpus = batch.asked.gpus_per_task or 0
    sweep = batch.results / batch.spec.name
    command = [*batch.program, "launch", batch.spec.name, "--results", str(batch.results)]
    named = [] if launch["run"] else ["--run", run]  # the folder's name is known here
    manner = [word for name in MANNER for word in _option(name, launch[name])]
    return Job(
        name=f"{batch.spec.name}-{run}",
        kind="launch",
        size=batch.nodes,
        cpus=batch.asked.cpus_per_task or max(1, gpus),
        gpus=gpus,
        folder=Path.cwd(),
        variables={
            "python": batch.python,
            "launch": [*command, *named, *batch.more],
            "folder": "" if own else str(sweep / TARGETS / run),
            "ranks": str(max(1, gpus)),
            "manner": manner,
        },
        asked=batch.asked,
    )


def _number_of_workers(batch: Batch) -> int:
    number = batch.workers or batch.spec.compute.workers
    if number == "auto":
        raise SpecError("compute.workers: got 'auto', must be a number for SLURM; use --workers")
    return number


def _cpus(spec: Spec) -> int:
    """Return the CPUs of the trial that needs most."""
    return max(map(spec.compute.cpus_at, spec.ladder.widths))


def _gpus(spec: Spec) -> float:
    """Return the GPUs of the trial that needs most."""
    return max(map(spec.compute.gpus_at, spec.ladder.widths))


def _gpus_of_a_worker(batch: Batch) -> int:
    """Return whole GPUs: a worker that joins trains one pack at a time, and shares none."""
    if batch.asked.gpus_per_task is not None:
        return batch.asked.gpus_per_task
    return math.ceil(_gpus(batch.spec))


def _checked_storage(url: str | None) -> str:
    if url is None:
        raise SpecError(
            "--storage: is left out, but workers on other nodes share a database; give the URL of "
            "a PostgreSQL server, or use --ray, which needs none"
        )
    check_shareable(_without_secret(url))
    return url


def _without_secret(url: str) -> str:
    if has_password(url):
        raise SpecError(
            "--storage: has a password, which others could read in the script; leave it out, and "
            "export PGPASSWORD before sbatch"
        )
    return url


def _option(name: str, value: Any) -> list[str]:
    """Return an option of the ranks as words; none where it has its default."""
    if not value:
        return []
    words = [f"--{name.replace('_', '-')}"]
    return words if value is True else [*words, str(value)]
