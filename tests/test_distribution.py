"""Wheel and sdist as `make dist` builds them, and the wheel installed where no checkout is near."""

from __future__ import annotations

import ast
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import telescope

COPIED = (
    *("telescope", "models", "sweeps", "tests", "benchmarks", "docs", "examples"),
    *(
        "Dockerfile",
        ".dockerignore",
        "environment.yml",
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        ".gitignore",
    ),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
)
UNWANTED = shutil.ignore_patterns("__pycache__", "results")


class Built(NamedTuple):
    """The two archives: the wheel is made from the sdist."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Wheel and sdist of a copy of the tree, so that nothing is left in it."""
    place = tmp_path_factory.mktemp("distribution")
    tree, out = place / "tree", place / "dist"
    tree.mkdir()
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=UNWANTED)
        else:
            shutil.copyfile(path, tree / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and with this one's libraries beside it.

    A path in a .pth file adds the libraries without their own .pth files, so that a checkout that
    is installed as editable stays out.
    """
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (libraries,) = (place / "lib").glob("python*/site-packages")
    (libraries / "beside.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python")]
    install = ["install", "--quiet", "--no-deps", "--no-index", str(built.wheel)]
    done = subprocess.run([*pip, *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place / "bin"


def run(program: Path, *arguments: str, cwd: Path) -> str:
    """Run a program of the environment without this test's own paths; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(folder: Path, prefix: str) -> set[str]:
    """The files below a folder, named as in an archive."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    kept = (path for path in paths if "__pycache__" not in path.parts)
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in kept}


def test_the_wheel_has_every_file_of_the_package_and_both_folders(built: Built) -> None:
    """The page's style and script, the starters, sweeps and models too; and nothing else."""
    with zipfile.ZipFile(built.wheel) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    folders = {"telescope": "telescope", "models": "telescope/bundled/models"}
    folders["sweeps"] = "telescope/bundled/sweeps"
    wanted = set().union(*(files_of(ROOT / name, into) for name, into in folders.items()))
    assert found == wanted
    assert {"telescope/report/page.css", "telescope/report/page.js", "telescope/py.typed"} <= found


def test_the_sdist_has_what_the_tests_need(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in COPIED if not (ROOT / name).is_dir()} <= names
    for folder in ("tests", "docs", "benchmarks"):
        assert files_of(ROOT / folder, folder) <= names


def test_the_metadata_agree(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("telescope-mup", telescope.__version__)
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert all(one.specifier for one in needed if not one.marker), "each has a lowest version"
    assert "telescope" not in {one.name for one in needed}
    extras = {one.name: one.extras for one in needed if one.name == "telescope-mup"}
    assert set().union(*extras.values()) <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["License-Expression"] == "Apache-2.0"


def imported(folder: Path) -> dict[str, str]:
    """Library → a file below a folder that imports it, at any depth."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0]: path.relative_to(ROOT).as_posix() for name in names}
    return found


def test_every_library_that_is_imported_is_a_dependency(built: Built) -> None:
    """Of the program itself or of an extra that a user may want, not of the tests alone."""
    brought = {"pydantic_core": "pydantic", "PIL": "matplotlib", "mlflow": "mlflow-skinny"}
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist", [])
    offered = [one for one in map(Requirement, lines) if 'extra == "test"' not in str(one.marker)]
    declared = {one.name.lower() for one in offered}
    used = imported(ROOT / "telescope") | imported(ROOT / "models")
    assert {"torch", "scipy", "wandb"} <= used.keys()
    foreign = used.keys() - sys.stdlib_module_names - {"telescope"}
    by = {name: brought.get(name, name).lower() for name in foreign}
    assert not {name: used[name] for name in foreign if by[name] not in declared}


def test_an_installed_wheel_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    program = installed / "telescope"
    assert "transfer" in run(program, "--help", cwd=tmp_path)
    version = run(installed / "python", "-m", "telescope", "--version", cwd=tmp_path)
    assert version == f"telescope {telescope.__version__}\n"
    assert "target     width 256" in run(program, "plan", "quickstart", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    run(program, "init", "sweep.toml", cwd=tmp_path)
    assert (tmp_path / "gpt.py").read_bytes() == (ROOT / "models" / "gpt.py").read_bytes()
    where = "import telescope; print(telescope.__file__)"
    assert run(installed / "python", "-c", where, cwd=tmp_path).startswith(str(installed.parent))
