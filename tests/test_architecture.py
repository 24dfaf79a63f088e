"""Nothing imports upward, and what must start at once stays light.

Imports are read from the source with `ast`, those inside functions too: a late import hides a
direction, it does not change it.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "telescope"
COMMON = {"records", "errors"}
ROOMS = {
    # room: what of telescope it may import besides itself
    "ladder": COMMON,
    "train": COMMON | {"files", "home"},
    "dispatch": COMMON | {"losses", "streams", "home", "files", "catalog", "train"},
    "transfer": COMMON | {"files", "markup", "train"},
    "report": COMMON | {"files", "catalog", "markup", "ladder", "dispatch"},
}
LIBRARIES = {
    # library: the only files that may import it
    "ray": {f"dispatch/ray_{part}.py" for part in ("connect", "tune", "worker")} | {"tune.py"},
    "optuna": {"dispatch/store.py"},
    "sqlalchemy": {"dispatch/store.py"},
    "pydantic": {"spec.py", "tables.py", "memory.py"},
    "pydantic_core": {"memory.py"},
    "typer": {"cli.py"},
    "pandas": {"report/frames.py"},
    "matplotlib": {"report/figures.py"},
    "mup": {"train/parametrization.py"},
    "safetensors": {"train/checkpoint.py"},
    "tokenizers": {"train/tokenizer.py"},
    "pyarrow": {"train/sources.py"},
}
STANDARD_ONLY = [
    *("records.py", "losses.py", "errors.py", "home.py", "streams.py", "files.py"),
    *("markup.py", "dispatch/folder.py", "report/status.py", "report/toml.py"),
]


def imports(path: Path, *, typing_too: bool = False) -> set[str]:
    """Dotted names that a file imports; those under TYPE_CHECKING only when asked."""
    tree = ast.parse(path.read_text())
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {
                f"{module}.{alias.name}" if module == "telescope" else module
                for alias in node.names
            }
    return names


def inner(path: Path) -> set[str]:
    """The first part below telescope of everything a file imports from it."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("telescope.")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downward(room: str) -> None:
    for path in (PACKAGE / room).glob("*.py"):
        upward = inner(path) - ROOMS[room] - {room}
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


LAYERS = [
    # below the rooms, bottom up; above them, bottom up
    *("errors", "home", "streams", "records", "losses", "files", "markup", "catalog", "memory"),
    *("tables", "spec", "machine", "prepare", "settle", "foreign", "comparing", "checking"),
    *("answer", "planning", "tokenizing", "finished", "sweep", "reporting", "api", "tune", "cli"),
]


def test_the_modules_beside_the_rooms_import_downward() -> None:
    template = "starter_trainer"  # what `init --command` writes; nothing imports it
    own = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", template}
    assert own == set(LAYERS)
    for height, name in enumerate(LAYERS):
        upward = inner(PACKAGE / f"{name}.py") & set(LAYERS[height:])
        assert not upward, f"{name}.py imports {upward}"


def test_each_library_has_its_place() -> None:
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        for library in {n.split(".")[0] for n in imports(path)} & LIBRARIES.keys():
            assert name in LIBRARIES[library], f"{name} imports {library}"


def test_train_needs_torch_numpy_and_mup_alone() -> None:
    allowed = {"torch", "numpy", "mup", "telescope"} | set(sys.stdlib_module_names)
    inside_a_function = {"safetensors", "pyarrow", "tokenizers"}
    for path in (PACKAGE / "train").glob("*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert names <= allowed | inside_a_function, path
        at_import = {
            name.split(".")[0]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None) or node.names[0].name]
        }
        assert at_import <= allowed, path


def test_the_ladder_is_pure() -> None:
    impure = {"os", "time", "random", "pathlib", "io", "socket", "datetime", "subprocess"}
    allowed = {"numpy", "scipy", "telescope"} | set(sys.stdlib_module_names) - impure
    for path in (PACKAGE / "ladder").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_the_coordinate_checks_judge_is_pure() -> None:
    """It judges sizes, whoever measured them."""
    allowed = {"records", "train.coordcheck_verdict"}
    for name in ("judge", "verdict"):
        names = imports(PACKAGE / "train" / f"coordcheck_{name}.py")
        own = {n.removeprefix("telescope.") for n in names if n.startswith("telescope.")}
        assert own <= allowed, name
        assert {n.split(".")[0] for n in names} & {"torch", "mup", "os", "pathlib"} == set(), name


@pytest.mark.parametrize("name", STANDARD_ONLY)
def test_what_starts_at_once_is_standard_library(name: str) -> None:
    allowed = {"telescope"} | set(sys.stdlib_module_names)
    assert {n.split(".")[0] for n in imports(PACKAGE / name)} <= allowed


def loaded_by(command: list[str], place: Path) -> set[str]:
    """The heavy libraries that a command loads."""
    code = (
        "import sys; from telescope.cli import main; sys.argv[1:] = sys.argv[2:]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'optuna', 'pandas', 'matplotlib', 'numpy'} & sys.modules.keys()\n"
        "print(*heavy, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "x", *command], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("command", [["--help"], ["ls"], ["run", "--help"]])
def test_the_light_verbs_load_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    assert loaded_by(command, tmp_path) == set()


def test_what_has_been_shown_once_is_shown_without_anything_heavy(tmp_path: Path) -> None:
    kept = tmp_path / "results" / "quickstart"
    reference = ROOT / "results" / "reference" / "quickstart"
    shutil.copytree(reference, kept, ignore=shutil.ignore_patterns("fits.json"))
    first = loaded_by(["show", "quickstart"], tmp_path)
    assert not first & {"torch", "ray", "pandas", "matplotlib"}
    assert {"optuna", "numpy"} <= first, "a first look reads the database, and fits"
    for command in (["show", "quickstart"], ["show", "quickstart", "--json"], ["ls"]):
        assert loaded_by(command, tmp_path) == set(), command
    database = kept / "trials.db"
    database.write_bytes(database.read_bytes() + b"\0" * 4096)  # another content, of unknown kind
    assert "optuna" in loaded_by(["show", "quickstart"], tmp_path)


def test_public_names_are_a_contract() -> None:
    import telescope

    names = ["Choice", "Ladder", "Point", "Result", "Shapes", "Spec", "Status", "Trial"]
    assert telescope.__all__ == names
    for name in telescope.__all__:
        assert getattr(telescope, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        telescope.__getattr__("Nothing")
