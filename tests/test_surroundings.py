"""Surroundings other than a developer's shell: odd encodings, closed streams, no home, and files
of the user's that have the names of libraries.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from bowls import bowl_spec
from commands import telescope
from conftest import ROOT, as_toml

from telescope import Ladder, Spec
from telescope.cli import main
from telescope.data.cache import cache_folder
from telescope.files import can_write, is_private, private_folder, stand_in
from telescope.records import Point
from telescope.streams import ERRORS, SPELLED
from telescope.transfer.settings import horizon_note

SCRIPT = "import sys; del sys.path[0]; from telescope.cli import main; main()"
"""As the installed command does: the current folder is not imported from."""
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
MOVING = """
import json, math, sys
width, lr = int(sys.argv[1]), float(sys.argv[2])
print(json.dumps({"loss": 2 + math.log2(lr / 0.4 * (width / 8) ** 2) ** 2 / 5}))
"""


def shell(script: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which $T is the program."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    line = f"set -o pipefail; T() {{ '{sys.executable}' -c '{SCRIPT}' \"$@\"; }}; {script}"
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, timeout=240
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished sweeps: a bowl, and one whose optimum runs away."""
    folder = tmp_path_factory.mktemp("surroundings")
    (folder / "moving.py").write_text(MOVING)
    command = ["{python}", "-S", "moving.py", "{width}", "{lr}", "{seed}"]
    moving = {"trainer": {"command": command, "folder": str(folder), "steps": 100}}
    bowl = bowl_spec(folder)
    (folder / "bowl.toml").write_text(as_toml(bowl))
    (folder / "moving.toml").write_text(as_toml({**bowl, "name": "moving", **moving}))
    for name in ("bowl", "moving"):
        done = telescope("run", f"{name}.toml", "--dispatcher", "inline", cwd=folder)
        assert done.returncode == 0, done.stderr  # whatever the certificate says
    return folder


def test_what_an_encoding_lacks_is_spelled() -> None:
    for character, spelled in SPELLED.items():
        assert f"a{character}b".encode("ascii", ERRORS) == f"a{spelled}b".encode()
    assert "×√é".encode("latin-1", ERRORS) == b"\xd7sqrt \xe9"
    assert "é✓".encode("ascii", ERRORS) == b"\\xe9\\u2713"
    name = b"gr\xf6\xdfe"
    assert os.fsdecode(name).encode("utf-8", ERRORS) == name


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("verb", ["run bowl.toml", "show bowl", "transfer bowl"])
def test_any_encoding_can_print_an_answer(
    encoding: str, verb: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding=encoding, errors=ERRORS)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["telescope", *verb.split()])
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as stopped:
        main()
    stdout.flush()
    assert stopped.value.code == 0
    assert "1/sqrt width" in written.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"no sweeps under Gr\\xf6\\xdfe \\u2713;"),
        ({"PYTHONIOENCODING": "latin-1"}, b"no sweeps under Gr\xf6\xdfe \\u2713;"),
        (C_LOCALE, b"no sweeps under Gr\\xf6\\xdfe \\u2713;"),
        ({"PYTHONIOENCODING": "utf-8"}, "no sweeps under Größe ✓;".encode()),
    ],
    ids=["ascii", "latin-1", "C", "utf-8"],
)
def test_a_process_spells(variables: dict[str, str], said: bytes, tmp_path: Path) -> None:
    done = shell("T ls --results 'Größe ✓'; T 'ü' 2>&1", tmp_path, **variables)
    assert said in done.stdout
    assert b"No such command" in done.stdout
    assert done.stderr == b""


def test_a_c_locale_and_a_folder_with_another_alphabet(tmp_path: Path) -> None:
    folder = tmp_path / "Größe ✓"
    folder.mkdir()
    (folder / "bowl.toml").write_text(as_toml(bowl_spec(folder)), encoding="utf-8")
    done = shell('T run bowl.toml --dispatcher inline --results "$PWD/results"', folder, **C_LOCALE)
    assert done.returncode == 0, done.stderr
    assert b"Gr\\xf6\\xdfe \\u2713/results/bowl" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize("verb", ["ls", "status bowl --json", "run --help"])
@pytest.mark.parametrize("how", ["| true", "2>&1 | true", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_nobody_needs_to_read(verb: str, how: str, place: Path) -> None:
    """A reader that has left, or none from the start, is no fault; the exit code is the verb's."""
    done = shell(f"T {verb} {how}", place)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_no_stays_a_no_without_a_reader(place: Path) -> None:
    done = shell("T transfer moving | head -0", place)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert shell("T nonsense 2>&-", place).returncode == 2
    full = shell("T ls > /dev/full", place)
    assert full.returncode == 2
    assert full.stderr == b"telescope: stdout: No space left on device; --debug shows where\n"


def test_a_run_without_streams_keeps_its_store(place: Path) -> None:
    """The database does not get the number of a closed stream, nor what is printed."""
    done = shell("T run bowl.toml --name quiet --dispatcher inline <&- >&- 2>&-", place)
    assert done.returncode == 0
    assert telescope("show", "quiet", "--csv", cwd=place).stdout.count("complete") >= 8


def test_a_run_whose_reader_leaves_ends_as_interrupted(place: Path) -> None:
    start = "run bowl.toml --name left --dispatcher inline"
    done = shell(f"T {start} | head -3; exit ${{PIPESTATUS[0]}}", place, NAP="0.1")
    assert done.returncode == 130
    assert done.stderr == b"left: interrupted; the same command goes on where it stopped\n"
    assert "going on after" in telescope(*start.split(), cwd=place).stdout


def test_only_files_that_are_there_are_named(place: Path) -> None:
    folder = place / "results" / "bowl"
    shown = telescope("show", "bowl", cwd=place).stdout
    assert "results/bowl (loss.png, trials.csv, curves/)\n" in shown
    (folder / "loss.png").rename(folder / "elsewhere.png")
    try:
        assert "results/bowl (trials.csv, curves/)\n" in telescope("show", "bowl", cwd=place).stdout
    finally:
        (folder / "elsewhere.png").rename(folder / "loss.png")


@pytest.mark.parametrize("options", [[], ["--json"], ["--out", "t.json"]], ids=" ".join)
def test_a_failed_certificate_says_why(options: list[str], place: Path) -> None:
    done = telescope("transfer", "moving", *options, cwd=place)
    assert done.returncode == 1
    assert done.stderr.startswith("telescope: moving: certificate FAIL at width 32: ")
    assert done.stderr.count("\n") == 1
    given = (place / "t.json").read_text() if "--out" in options else done.stdout
    if options:
        answer = json.loads(given)
        assert answer["certificate"]["problems"][0] in done.stderr
        assert answer["lr"] > 0
    else:
        assert "verdict    DO NOT USE" in given


def test_a_run_of_another_length_is_assumed_to_be_no_other(place: Path) -> None:
    def assumed(*options: str) -> list[str]:
        answer = json.loads(telescope("transfer", "moving", "--json", *options, cwd=place).stdout)
        return list(answer["certificate"]["assumptions"])

    same, *others = assumed()
    assert "steps, data" in same
    assert assumed("--steps", "100") == [same, *others]
    lr_alone = assumed("--steps", "400")
    assert lr_alone[0] == same.replace("steps, ", "")
    assert lr_alone[1].startswith("lr is kept for a run of another length")
    assert lr_alone[2:] == others


@pytest.mark.parametrize("in_spec", [True, False])
def test_python_and_the_spec_assume_the_same_of_the_steps(in_spec: bool, tmp_path: Path) -> None:
    table = bowl_spec(tmp_path, axes={"weight_decay": {"value": 0.1}})
    table["trainer"] |= {"steps": 100, "command": [*table["trainer"]["command"], "{weight_decay}"]}
    table["target"] |= {"steps": 400} if in_spec else {}
    ladder = Ladder(Spec.from_dict(table))
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(trial, loss=2 + abs(trial.lr - 0.1))
    answer = ladder.transfer() if in_spec else ladder.transfer(steps=400)
    assert answer.certificate is not None
    assert answer.certificate.assumptions[1] == horizon_note(Point.of(weight_decay=0.1), 100, 400)
    assert "to 0.025 in base-width units" in answer.certificate.assumptions[1]
    assert "it would be 0.05191" in answer.certificate.assumptions[1]  # 0.025 · 4^0.527
    assert not any("steps, data" in text for text in answer.certificate.assumptions)
    assert answer.weight_decay == pytest.approx(0.025)


def _no_entry(number: int) -> None:
    raise KeyError(f"uid not found: {number}")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, no HOME, and no variables that name another place."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("TELESCOPE_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return tmp_path


def test_a_private_folder_stands_in_for_home(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = private_folder()
    assert folder.parent == temporary
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_folder() == folder
    assert is_private(cache_folder())
    folder.chmod(0o777)  # others could have put something there
    assert private_folder() != folder
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700
    folder.chmod(0o700)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", _no_entry)
    stand_in()
    assert os.environ["HOME"] == str(folder)


def test_a_home_that_is_there_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages and settings may be read from it; what is written goes elsewhere."""
    own = temporary / "home"
    own.mkdir()
    monkeypatch.setenv("HOME", str(own))
    stand_in()
    assert cache_folder() == own / ".cache" / "telescope"
    assert "MPLCONFIGDIR" not in os.environ
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not can_write(own / ".cache" / "telescope")
    stand_in()
    assert os.environ["HOME"] == str(own)
    assert is_private(Path(os.environ["MPLCONFIGDIR"]))
    assert is_private(cache_folder())


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_workers_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    """But the user's function does, from its own; and it finds itself where the driver is."""
    (tmp_path / "data.txt").write_text("0.5")
    beside = "def offset():\n    return float(open('data.txt').read())\n"
    (tmp_path / "beside.py").write_text(beside)
    (tmp_path / "mine.py").write_text(
        "import beside\n\n"
        "def train(width, lr, seed):\n    return beside.offset() + abs(lr - 0.1) + 1 / width\n"
    )
    for name in ("telescope", "numpy", "ray", "torch", "json", "types", "queue", "records"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('of the user')\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise ImportError('of the user')\n")
    spec = bowl_spec(tmp_path)
    spec["trainer"] = {"function": "mine:train", "folder": str(tmp_path)}
    spec["ladder"] = {"widths": [8]}
    (tmp_path / "bowl.toml").write_text(as_toml(spec))
    done = shell("T run bowl.toml", tmp_path, HOME="/nonexistent", TMPDIR="/tmp")
    assert done.returncode == 0, done.stderr
    assert b"failed" not in done.stdout
    assert not Path("/nonexistent").exists()
