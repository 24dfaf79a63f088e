"""A results folder is read as data only: no pickle is loaded, and no name leads out of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import telescope
from conftest import ROOT, as_toml
from faults import run_fast, spec_of

LOADERS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
ALLOWED = {f"dispatch/ray/{part}.py": {"cloudpickle"} for part in ("tune", "worker")}
"""Ray sends the trainer from the driver to its own workers; nothing of it is kept in a file."""


def test_the_program_names_no_unpickler() -> None:
    for path in (ROOT / "telescope").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in {"torch.load", "numpy.load", "np.load"}, path
        allowed = ALLOWED.get(path.relative_to(ROOT / "telescope").as_posix(), set())
        assert not names & LOADERS - allowed, path


READER = """
import sys
from pathlib import Path
found = []
def watch(event, arguments):
    if event == "pickle.find_class":
        found.append(arguments)
from telescope.api import transfer
from telescope.answer.finished import open_result
from telescope.train import checkpoint, loop  # everything is imported; now nothing may be unpickled
import safetensors.torch
sys.addaudithook(watch)
sweep = open_result("tiny", Path(sys.argv[1]))
transfer(sweep.spec, sweep.ladder, width=None, steps=None)
list(checkpoint.Checkpoints(Path(sys.argv[2]), "x")._whole())
assert not found, found
import pickle, collections
pickle.loads(pickle.dumps(collections.OrderedDict()))
assert found, "the watch sees nothing"
"""


def test_reading_results_and_checkpoints_unpickles_nothing(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from telescope.train.checkpoint import Checkpoints, Position

    run_fast(tmp_path, {})
    model = nn.Linear(2, 2)
    Checkpoints(tmp_path / "kept", "x").save(
        model, [torch.optim.AdamW(model.parameters())], "cpu", Position(step=1)
    )
    command = [sys.executable, "-c", READER, str(tmp_path / "results"), str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["../up", "..", "/tmp/x", "a/b", ".hidden", "a\\b", "~", "a\n"])
def test_a_name_cannot_leave_the_results_folder(name: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "tiny.toml").write_text(as_toml(spec_of(place)))
    before = sorted(tmp_path.rglob("*"))
    for verb in ("run", "check"):
        done = telescope(verb, "tiny.toml", "--name", name, cwd=place)
        assert done.returncode == 2
        assert "name: got" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_of_one_sweep(tmp_path: Path) -> None:
    """The second says who holds it; status and show are read meanwhile; a dead one's is taken."""
    tables: dict[str, Any] = {"train": {"steps": 200}, "ladder": {"widths": [16]}}
    tables["axes"] = {"weight_decay": {"low": 0.05, "high": 0.1, "points": 2}}
    (tmp_path / "tiny.toml").write_text(as_toml(spec_of(tmp_path, **tables)))
    command = ["run", "tiny.toml", "--dispatcher", "inline", "--no-check"]
    first = subprocess.Popen(
        [sys.executable, "-m", "telescope", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    while "[1/6]" not in first.stdout.readline():
        assert first.poll() is None
    second = telescope(*command, cwd=tmp_path)
    assert second.returncode == 2
    assert f"in use by process {first.pid} on " in second.stderr
    assert second.stderr.count("\n") == 1
    assert "running" in telescope("status", "tiny", cwd=tmp_path).stdout
    assert telescope("show", "tiny", cwd=tmp_path).returncode == 0
    first.kill()
    first.wait()
    first.stdout.close()
    assert "interrupted" in telescope("status", "tiny", cwd=tmp_path).stdout
    done = telescope(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
