"""Nothing imports upward, and what must start at once stays light.

Imports are read from the source with `ast`, those inside functions too: a late import hides a
direction, it does not change it.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, as_toml, tiny_spec
from rooms import GROUND, PUBLIC, ROOMS

from telescope.train.device import is_built_for_cpu_alone

PACKAGE = ROOT / "telescope"
MOST_MODULES = 10
"""Modules at the top level, beside `__init__` and `__main__`."""
LIBRARIES = {
    # library: the only files that may import it
    "ray": {f"dispatch/ray/{part}.py" for part in ("connect", "tune", "worker")}
    | {"target/launcher.py", "tune.py"},
    "optuna": {"store/store.py"},
    "sqlalchemy": {"store/store.py", "store/board.py", "store/database.py"},
    "pydantic": {f"spec/{part}.py" for part in ("spec", "tables", "optimizers", "frontier")}
    | {"spec/scaling.py"}
    | {"store/memory.py"},
    "pydantic_core": {"store/memory.py"},
    "typer": {"cli.py"},
    "pandas": {"report/frames.py"},
    "matplotlib": {"report/figures.py", "report/frontier_figures.py"},
    "mup": {"rules/parametrization.py"},
    "safetensors": {"train/checkpoint.py", "target/checkpoint.py"}
    | {"export/hf_model.py", "target/export.py"},
    "tokenizers": {"data/tokenizer.py"},
    "pyarrow": {"data/sources.py"},
    "tensorboardX": {"log/to_tensorboard.py"},
    "wandb": {"log/to_wandb.py"},
    "mlflow": {"log/to_mlflow.py"},
    "trackio": {"log/to_trackio.py"},
}
HEAVY = {"torch", "mup", "ray", "optuna", "sqlalchemy", "pandas", "matplotlib", "scipy", "numpy"}
"""Libraries that take a tenth of a second or more to import."""
TRAINS = {"modelcheck", "launching", "devices"}
"""Modules of `sweep/` that import torch: whatever they are called for builds or trains a model."""
QUESTION_WORDS = {"What", "Whether", "How", "Where", "Why", "Which"}
"""First words of sentences that describe by a question; a verb or a noun says it plainly."""
STANDARD_ONLY = [
    *("records.py", "losses.py", "errors.py", "streams.py", "files.py", "markup.py", "config.py"),
    *("store/folder.py", "spec/catalog.py", "report/status.py", "report/toml.py"),
    "target/folder.py",
]


def imports(path: Path, *, members: bool = False, typing_too: bool = False) -> set[str]:
    """Dotted names that a file imports; those under TYPE_CHECKING only when asked.

    `members` gives `telescope.files.write_json`, which otherwise is `telescope.files`.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_typing and not typing_too:
            node.body = []  # type: ignore[attr-defined]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {
                f"{module}.{alias.name}" if members or module == "telescope" else module
                for alias in node.names
            }
    return names


def inner(path: Path) -> set[str]:
    """The first part below telescope of everything a file imports from it, for typing too."""
    names = imports(path, typing_too=True)
    return {name.split(".")[1] for name in names if name.startswith("telescope.")}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_house_has_these_rooms_and_few_modules_beside_them() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    own = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert own == {*GROUND, *PUBLIC}
    assert len(own) <= MOST_MODULES


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downward(room: str) -> None:
    below = list(ROOMS)[: list(ROOMS).index(room)]
    assert set(below) >= ROOMS[room], f"{room} is below a room that it may import"
    for path in (PACKAGE / room).rglob("*.py"):
        upward = inner(path) - set(GROUND) - ROOMS[room] - {room}
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_the_modules_beside_the_rooms_import_downward() -> None:
    for modules, rooms in ((GROUND, set[str]()), (PUBLIC, {*GROUND, *ROOMS})):
        for height, name in enumerate(modules):
            upward = inner(PACKAGE / f"{name}.py") - rooms - set(modules[:height])
            assert not upward, f"{name}.py imports {upward}"


def modules_of(path: Path) -> set[str]:
    """The modules of telescope that a file imports, by their whole names."""
    found = set()
    for name in imports(path, members=True):
        parts = name.split(".")
        if parts[0] == "telescope":
            while not (is_module := PACKAGE.joinpath(*parts[1:]).with_suffix(".py")).exists():
                if len(parts) == 1:
                    break
                parts.pop()
            found |= {".".join(parts)} if is_module.exists() and len(parts) > 1 else set()
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Those that are imported inside a function count too."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in FILES
        if path.stem not in ("__init__", "__main__")
    }
    above = {name: modules_of(path) for name, path in names.items()}
    assert sum(map(len, above.values())) > 300, "imports are read"
    while free := [name for name, below in above.items() if not below & above.keys()]:
        for name in free:
            del above[name]
    assert not above, f"in a circle, or above one: {sorted(above)}"


def test_no_module_of_tests_is_a_library_of_others() -> None:
    """Code that several tests share is in conftest.py or in a module of its own."""
    files = [*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = {path.name: names for path in files if (names := modules_of_tests(imports(path)))}
    assert len(files) > 70
    assert modules_of_tests({"conftest", "test_cli", "x.test_y"}) == {"test_cli", "x.test_y"}
    assert not found


def modules_of_tests(names: set[str]) -> set[str]:
    """Those names that are of modules of tests."""
    return {name for name in names if any(part.startswith("test_") for part in name.split("."))}


def test_each_library_has_its_place() -> None:
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        for library in {n.split(".")[0] for n in imports(path)} & LIBRARIES.keys():
            assert name in LIBRARIES[library], f"{name} imports {library}"


@pytest.mark.parametrize("room", ["rules", "data", "train", "check", "packs", "target", "transfer"])
def test_training_needs_torch_numpy_and_mup_alone(room: str) -> None:
    allowed = {"torch", "numpy", "mup", "telescope"} | set(sys.stdlib_module_names)
    inside_a_function = {"safetensors", "pyarrow", "tokenizers"}
    for path in (PACKAGE / room).glob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in LIBRARIES["ray"]:
            continue
        names = {name.split(".")[0] for name in imports(path)}
        assert names <= allowed | inside_a_function, path
        at_import = {
            name.split(".")[0]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None) or node.names[0].name]
        }
        assert at_import <= allowed, path


@pytest.mark.parametrize("room", ["ladder", "scaling"])
def test_what_decides_is_pure(room: str) -> None:
    impure = {"os", "time", "random", "pathlib", "io", "socket", "datetime", "subprocess"}
    allowed = {"numpy", "scipy", "telescope"} | set(sys.stdlib_module_names) - impure
    for path in (PACKAGE / room).rglob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_the_coordinate_checks_judge_is_pure() -> None:
    """It judges sizes, whoever measured them."""
    allowed = {"records", "check.verdict"}
    for name in ("judge", "verdict"):
        names = imports(PACKAGE / "check" / f"{name}.py")
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
        f"print(*{HEAVY} & sys.modules.keys(), file=sys.stderr)"
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


def test_a_plan_and_a_finished_run_load_no_torch(tmp_path: Path, corpus_file: Path) -> None:
    """Their model file has been looked at before, and nothing is left to train."""
    spec = tiny_spec(corpus_file, compute={"device": "cpu"})
    (tmp_path / "tiny.toml").write_text(as_toml(spec))
    run = ["run", "tiny.toml", "--dispatcher", "inline"]
    assert "torch" in loaded_by(run, tmp_path), "it trains"
    trains = {"torch", "mup", "ray", "pandas", "matplotlib", "scipy"}
    assert not loaded_by(run, tmp_path) & trains, "it reads the database, this once"
    for again in (["run", "tiny.toml"], ["plan", "tiny.toml"]):
        assert loaded_by(again, tmp_path) == {"numpy"}, again
    auto = ["plan", "tiny.toml", "--set", "compute.device=auto"]
    assert ("torch" in loaded_by(auto, tmp_path)) == (not is_built_for_cpu_alone())


def test_what_need_not_train_is_imported_without_torch() -> None:
    """A plan and what is finished train nothing, of a sweep as of a family or a frontier."""
    own = PACKAGE / "sweep"
    paths = sorted({*own.glob("[a-z]*.py")} - {own / f"{name}.py" for name in TRAINS})
    assert len(paths) > 20
    names = ", ".join(f"telescope.sweep.{path.stem}" for path in paths)
    code = f"import sys, {names}\nassert not {{'torch', 'ray'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_a_contract() -> None:
    import telescope

    names = ["Choice", "Ladder", "Point", "Result", "Shapes", "Spec", "Status", "Trial"]
    assert telescope.__all__ == names
    for name in telescope.__all__:
        assert getattr(telescope, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        telescope.__getattr__("Nothing")


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    folders = ("telescope", "tests", "benchmarks", "examples", "models", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    texts = [(path, *found) for path in paths for found in docstrings(ast.parse(path.read_text()))]
    assert len(texts) > 3000, "docstrings are found"
    sample = 'A = 1\n"""How many."""\ndef f():\n    """Why, in words."""\n    return """What."""'
    assert [asks(text) for _, text in docstrings(ast.parse(sample))] == [True, True]
    assert not asks("Return the number.\n\nWhat follows is prose.")
    assert not asks("Whatever the order, sort.")
    wrong = [f"{path.relative_to(ROOT)}:{line}" for path, line, text in texts if asks(text)]
    assert not wrong, "begin with a verb ('Return …', 'Tell whether …') or a noun"


def docstrings(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of the docstrings of modules, classes, functions and attributes."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners)]
    return [
        (statement.lineno, statement.value.value)
        for body in bodies
        for statement in body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]


def asks(text: str) -> bool:
    """Tell whether a text begins with one of the question words."""
    return re.split(r"\W", text.strip(), maxsplit=1)[0] in QUESTION_WORDS
