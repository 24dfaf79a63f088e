"""The target run that `telescope launch` is asked for, and the check of its certificate."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from telescope.answer.finished import Finished
from telescope.errors import RefusedError, SpecError
from telescope.spec.spec import Spec
from telescope.target.folder import TARGETS, RunFolder
from telescope.target.record import Manner

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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


def run_folder(finished: Finished, asked: Launch) -> RunFolder:
    """Return the folder of the run that is asked for.

    Raises:
        SpecError: the name asked for is no plain name.
    """
    return RunFolder(finished.folder.path / TARGETS / run_name(finished.spec, asked))


def run_name(spec: Spec, asked: Launch) -> str:
    """Return the name of the run that is asked for.

    Raises:
        SpecError: the name asked for is no plain name.
    """
    steps = f"-steps-{asked.steps}" if asked.steps else ""
    name = f"width-{asked.width or spec.target.width}{steps}"
    if asked.run is not None:
        name = asked.run
    if not RUN_NAME.fullmatch(name):
        raise SpecError(f"--run: got {name!r}, must be letters, digits, '.', '_' and '-', no path")
    return name


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
