"""The text of a SLURM script: directives and settings, before a bash file that is the same for all.

Nothing is written into the middle of bash code: what differs from job to job is a variable, quoted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from telescope.errors import SpecError

NOTICE = 120
"""Seconds before its time limit at which a job gets USR1. Assumption: a trial is given back at
once, and a target run writes its checkpoint in that time."""
WORD = re.compile(r"[\w.,:@%+=/-]+")
"""The values of directives: nothing that ends a line, a comment or a quotation."""
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
"""SLURM's forms: minutes, m:ss, h:mm:ss, d-h, d-h:mm, d-h:mm:ss."""
MEMORY = re.compile(r"\d+[KMGT]?")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The part of a job that the user gives: SLURM's own options, by their names."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None
    gpus_per_task: int | None = None
    sbatch: Sequence[str] = ()
    """Further options as sbatch takes them, each with its dashes; they come last and win."""
    setup: Sequence[str] = ()
    """Lines of bash that come first, such as ``module load cuda``."""

    def __post_init__(self) -> None:
        """Check all that goes into a line of its own.

        Raises:
            SpecError: a line per fault.
        """
        forms = (
            ("--partition", self.partition, WORD, "a word without spaces"),
            ("--account", self.account, WORD, "a word without spaces"),
            ("--time", self.time, TIME, "minutes, h:mm:ss or d-h:mm:ss"),
            ("--mem", self.mem, MEMORY, "a number of megabytes, or a number with K, M, G or T"),
        )
        faults = [
            f"{name}: got {value!r}, must be {allowed}"
            for name, value, form, allowed in forms
            if value is not None and not form.fullmatch(value)
        ]
        faults += [
            f"--sbatch: got {text!r}, must be an option of sbatch on one line, as --qos=high"
            for text in self.sbatch
            if not re.fullmatch(r"-\S.*", text)
        ]
        faults += [
            f"--setup: got {text!r}, must be one line; repeat the option for more"
            for text in self.setup
            if len(text.splitlines()) != 1
        ]
        if faults:
            raise SpecError(*faults)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job. Its variables are what the bash file of its kind reads."""

    name: str
    kind: Literal["workers", "ray", "launch"]
    size: int
    """Tasks of the array, or nodes."""
    cpus: int
    """Of a task; a node has one."""
    gpus: int
    folder: Path
    """The current folder of all its programs."""
    variables: Mapping[str, str | Sequence[str]]
    asked: Asked = field(default_factory=Asked)


def script(job: Job) -> str:
    """Return the text of the script, ready for sbatch."""
    here = Path(__file__).parent
    signals, body = ((here / f"{name}.sh").read_text("utf-8") for name in ("signals", job.kind))
    settings = [
        "# This job",
        *job.asked.setup,
        "set -u",  # after the user's lines, which may not bear it
        f"cd {shlex.quote(str(job.folder))} || exit 2",
        *(f"{name}={_quoted(value)}" for name, value in job.variables.items()),
    ]
    header = ["#!/bin/bash", *_directives(job)]
    # Signals first: a notice may come during a slow line of the user's.
    return "\n".join([*header, "", signals, *settings, "", body])


def _directives(job: Job) -> list[str]:
    """Return the lines for sbatch, the user's own last."""
    asked = job.asked
    is_array = job.kind == "workers"
    options: dict[str, object] = {
        "job-name": job.name,
        "output": "%x-%A_%a.out" if is_array else "%x-%j.out",
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{NOTICE}",
    }
    if is_array:
        options |= {"array": f"0-{job.size - 1}", "ntasks": 1}
    else:
        options |= {"nodes": job.size, "ntasks-per-node": 1}
    options["cpus-per-task"] = job.cpus
    if job.gpus:
        options["gpus-per-task" if is_array else "gpus-per-node"] = job.gpus
    options |= {
        name: value
        for name in ("partition", "account", "time", "mem")
        if (value := getattr(asked, name)) is not None
    }
    made = [f"--{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
    return [f"#SBATCH {option}" for option in (*made, *asked.sbatch)]


def _quoted(value: str | Sequence[str]) -> str:
    """Return a value of bash: a word, or an array."""
    return shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
