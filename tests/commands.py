"""The command line, run in this process, and the surface of it that must stay."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from telescope.cli import main

STABLE_OPTIONS = {
    # The surface that others' scripts use: additions are fine, removals are not.
    "init": set(),
    "plan": {"--set", "--probe", "--json"},
    "check": {"--set", "--json"},
    "run": {
        "--results",
        "--name",
        "--workers",
        "--dispatcher",
        "--ray-address",
        "--storage",
        "--set",
        "--no-check",
    },
    "worker": {"--storage", "--results", "--wait"},
    "status": {"--json", "--watch"},
    "show": {"--json", "--csv"},
    "transfer": {"--width", "--steps", "--json", "--out", "--format", "--approximate"},
    "launch": {"--width", "--steps", "--workers", "--gpus-per-worker", "--ray-address", "--run"},
    "audit": {"--trials", "--results", "--workers", "--dispatcher", "--ray-address", "--json"},
    "frontier": {"--results", "--name", "--workers", "--set", "--plan", "--json", "--out"},
    "scaling": {"--results", "--name", "--workers", "--set", "--plan", "--json", "--out"},
    "ls": {"--results", "--json"},
    "compare": {"--results", "--json"},
    "report": {"--out", "--open"},
    "export-model": {"--to", "--out", "--step", "--tokenizer", "--results"},
    "slurm": {"--ray", "--launch", "--storage", "--workers", "--nodes", "--partition", "--account"}
    | {"--time", "--cpus-per-task", "--gpus-per-task", "--sbatch", "--setup", "--out"},
    "tokenize": {"--vocab-size", "--out", "--shards"},
}


class Done(NamedTuple):
    """The end of a command."""

    returncode: int
    stdout: str
    stderr: str


def telescope(*arguments: str | Path, cwd: Path, columns: int = 200) -> Done:
    """Run the command line in this process, which has torch loaded already."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(mock.patch.object(sys, "argv", ["telescope", *map(str, arguments)]))
        stack.enter_context(mock.patch.dict(os.environ, COLUMNS=str(columns)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(errors))
        stopped = stack.enter_context(pytest.raises(SystemExit))
        main()
    return Done(int(stopped.value.code or 0), out.getvalue(), errors.getvalue())


def from_json(*arguments: str | Path, cwd: Path) -> dict[str, Any]:
    """Run a command that succeeds, and read the JSON that it prints."""
    done = telescope(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def output(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run a command that ends with this code: its stdout, or, where it fails, its stderr."""
    done = telescope(*arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr
