"""A sweep whose trials another program or a function trains: priced by [cost], and checked.

What can be known before a trial runs is looked at here: the program is there, the function can be
imported and takes what it will be called with. `plan` looks at nothing that would run user code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from telescope.answer.derive import UNCONFIRMED, rule_problem
from telescope.dispatch.queue import Trainer
from telescope.errors import SpecError
from telescope.foreign.command import CommandTrainer
from telescope.foreign.function import FunctionTrainer, check_signature
from telescope.foreign.loading import forget, load_function, module_file
from telescope.foreign.outcome import Prices
from telescope.foreign.place import Place
from telescope.foreign.program import ProgramText, read_program
from telescope.spec.placeholders import OWN, names_in
from telescope.spec.spec import Spec
from telescope.spec.tables import TrainerTable
from telescope.store.folder import Folder
from telescope.sweep.runnable import (
    Trainable,
    WithCosts,
    describe_workers,
    estimate_seconds,
)

LARGEST_PROGRAM = 1 << 20
"""Bytes of the program that a command names by a relative path up to which it counts as the user's
own; a larger one is an interpreter in an environment, which differs between machines."""
SCRIPT_SUFFIXES = {".py", ".sh", ".bash", ".zsh", ".jl", ".r", ".pl", ".rb", ".lua", ".js", ".ts"}
"""Names of files that are scripts; so is a file that begins with #!."""


@dataclass(frozen=True)
class Foreign(WithCosts, Trainable):
    """A spec with [cost] and [trainer]."""

    trainer: TrainerTable

    @classmethod
    def of(cls, spec: Spec) -> Foreign:
        """Take the two tables from a spec that has them."""
        assert spec.trainer is not None
        assert spec.cost is not None
        return cls(spec, spec.cost, spec.trainer)

    @property
    def notes(self) -> tuple[str, ...]:
        """The reason that the answer will not be confirmed, if one is known already."""
        problem = rule_problem(self.spec)
        return (UNCONFIRMED.format(problem),) if problem else ()

    @property
    def prints_steps(self) -> bool:
        """True: a trial's log may have its steps."""
        return True

    @property
    def worker_prints(self) -> bool:
        """True for a function, because a command's output has files of its own."""
        return self.trainer.function is not None

    @property
    def timeout(self) -> float:
        """The table's for a function; a command's trainer ends it itself, with what it started."""
        return self.trainer.timeout if self.trainer.function else 0.0

    @property
    def folder(self) -> Path:
        """Working directory of a command, and where a function is looked for first."""
        return Path(self.trainer.folder or ".")

    @property
    def directories(self) -> tuple[str, ...]:
        """Directories from which a function is imported, in the order of the search."""
        return tuple(dict.fromkeys((str(self.folder.resolve()), str(Path.cwd()))))

    @property
    def comparable(self) -> dict[str, Any]:
        """Dotted key → value of all that makes losses incomparable when it differs.

        With the text of the script that a command names, or of a function's module; what those
        import or read is not seen.
        """
        hashes = {key: source.text for key, _, source in self._sources}
        return {**self.spec.strict_fields(""), **hashes}

    @property
    def program_texts(self) -> dict[str, ProgramText]:
        """Key in `comparable` → digests of a file whose text is part of the trainer."""
        return {key: source for key, _, source in self._sources}

    @cached_property
    def _sources(self) -> list[tuple[str, Path, ProgramText]]:
        """Key, place and digests of the files whose text is part of the trainer, read once."""
        if self.trainer.function:
            module = module_file(self.trainer.function, self.directories)
            files = {"function": module} if module else {}
        else:
            files = {part: self.folder / part for part in self._scripts()}
        return [
            (f"trainer.{name} (hash)", path, read_program(path)) for name, path in files.items()
        ]

    def _scripts(self) -> list[str]:
        """The parts of the command that are the trainer: no file that it may read or write.

        These are the program, if it is a script or given by a relative path, and the first script
        after it, which an interpreter or a launcher runs.
        """
        program, *arguments = self.trainer.command or ("",)
        found = [program] if not names_in(program) and _is_own(self.folder, program) else []
        scripts = (p for p in arguments if not names_in(p) and _is_script(self.folder / p))
        return [*found, *[script for script in scripts if script not in found][:1]]

    def make_trainer(self, results: Folder) -> Trainer:
        """The trainer, whose trials leave their logs and files in a sweep's results folder."""
        is_flops = self.cost.flops is not None
        place = Place(
            base_width=self.spec.base_width,
            trial_folders=str(results.trial_folders.absolute()),
            steps=self.trainer.steps,
            arguments=self.trainer.arguments,
            prices=Prices(
                flops=self.cost_per_trial if is_flops else {},
                parameters={} if is_flops else self.cost_per_trial,
            ),
        )
        sources = {str(path): source.code for _, path, source in self._sources}
        if self.trainer.function:
            return FunctionTrainer(self.trainer.function, self.directories, place, sources)
        assert self.trainer.command is not None
        return CommandTrainer(
            command=self.trainer.command,
            folder=str(self.folder),
            logs=str(results.logs.absolute()),
            place=place,
            environment=self.trainer.environment,
            result=self.trainer.result,
            timeout=self.trainer.timeout,
            threads={width: self.spec.compute.cpus_at(width) for width in self.spec.ladder.widths},
            sources=sources,
        )

    def check_inputs(self, *, is_cluster: bool) -> None:
        """Check what the trials will need of this machine; a cluster's machines may differ.

        Raises:
            SpecError: no such folder or program, or a function that cannot be called.
        """
        if self.trainer.function:
            self._check_function(self.trainer.function)
        elif not is_cluster:
            self._check_command()

    def as_plan(self, at_once: Mapping[int, int], *, probe: bool) -> dict[str, Any]:
        """The plan in the keys of `telescope plan --json`; see `Trainable.as_plan`."""
        if probe:
            raise SpecError(
                "--probe: times the built-in trainer; with [trainer] give compute.flop_rate, and "
                "flops in [cost]"
            )
        rate = self.spec.compute.flop_rate
        if rate and self.cost.flops:
            seconds = {width: cost / rate for width, cost in self.cost_per_trial.items()}
            timed = {
                "estimate": estimate_seconds(self, seconds, at_once),
                "basis": f"{rate:.3g} FLOP/s per worker (compute.flop_rate); "
                f"{describe_workers(at_once)}, start-up not counted",
            }
        else:
            timed = {
                "estimate": None,
                "basis": "needs flops in [cost] and compute.flop_rate; `run` says when trials are "
                "done",
            }
        return {**_as_json(self), "seconds": timed, "notes": list(self.notes)}

    def _check_command(self) -> None:
        command = self.trainer.command
        assert command is not None
        if not self.folder.is_dir():
            raise SpecError(f"trainer.folder: got {str(self.folder)!r}, which is no folder")
        program = command[0]
        if names_in(program):  # {python}, or one program per width: known when it is started
            return
        if "/" in program:
            found = shutil.which(self.folder / program)
            where = f"no program {self.folder / program}"
        else:
            path = self.trainer.environment.get("PATH", os.environ.get("PATH", os.defpath))
            found, where = shutil.which(program, path=path), f"no program {program} on PATH"
        if found is None:
            hint = " ({python} is the one that runs telescope)" if "python" in program else ""
            raise SpecError(f"trainer.command: got {program!r}: {where}{hint}")

    def _check_function(self, name: str) -> None:
        forget(self.directories)
        function = load_function(name, self.directories)
        needed = {"width", *self.spec.axes, *self.trainer.arguments}
        needed |= {"seed"} if self.spec.repeats else set()
        mute = {"python"} | (set() if self.trainer.steps else {"steps"})
        check_signature(name, function, needed, set(OWN) - mute)


def _is_own(folder: Path, program: str) -> bool:
    """Tell whether a program is part of the trainer, not an installed tool."""
    path = folder / program
    if "/" not in program:  # found on PATH
        return False
    try:
        is_small = path.is_file() and path.stat().st_size <= LARGEST_PROGRAM
    except (OSError, ValueError):
        return False
    return _is_script(path) or (is_small and not Path(program).is_absolute())


def _is_script(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix.lower() in SCRIPT_SUFFIXES or file.read(2) == b"#!"
    except (OSError, ValueError):  # too long a name, or one that cannot be
        return False


def _as_json(foreign: Foreign) -> dict[str, Any]:
    """The plan in the keys of `telescope plan --json`; null what only the trainer knows."""
    spec, plan = foreign.spec, foreign.plan
    is_flops = foreign.cost.flops is not None
    parameters = foreign.cost.parameters or {}

    def flops(cost: float) -> float | None:
        return cost if is_flops else None

    return {
        "name": spec.name,
        "policy": spec.ladder.policy,
        "stages": [
            {
                "width": stage.width,
                "parameters": parameters.get(stage.width),
                **dict.fromkeys(("parameters_without_embeddings", "active_parameters")),
                "points": dict(stage.points),
                "trials": stage.trials,
                "tokens": None,
                "flops": {
                    **dict.fromkeys(("model", "attention", "optimizer")),
                    "total": flops(stage.trials * foreign.cost_per_trial[stage.width]),
                },
            }
            for stage in plan.stages
        ],
        "target": {
            "width": spec.target.width,
            "parameters": parameters.get(spec.target.width),
            **dict.fromkeys(("parameters_without_embeddings", "active_parameters")),
            "tokens": None,
            "flops": flops(foreign.target_flops),
        },
        "sweep_flops": flops(plan.expected),
        "sweep_over_target": foreign.planned["expected"],
        "sweep_over_target_parameters": None if is_flops else foreign.planned["expected"],
        "range": foreign.planned,
    }
