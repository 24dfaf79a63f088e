"""Foreign trainers: what a command or a function may do, and that nothing of it is left running.

Real processes throughout. What a trainer may say is a table; what it may do to itself, a script.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import attempt, left_over
from functions import TRIAL, function, place, repository

from telescope.errors import SpecError
from telescope.foreign import command as command_trainer
from telescope.foreign import guard
from telescope.foreign.command import CommandTrainer
from telescope.foreign.function import FunctionTrainer, accepted, check_signature
from telescope.foreign.loading import load_function
from telescope.foreign.outcome import (
    MOST_ROWS,
    CurveRows,
    Prices,
    as_result,
    latest_row,
    parse_line,
)
from telescope.records import CurvePoint, Result, Status
from telescope.spec.placeholders import filled, names_in

SAYS = "echo '{{\"loss\": 1.5}}'"


def command(folder: Path, *parts: str, prices: Prices | None = None, **options: Any) -> Result:
    """Run a command once; of one part, in a shell."""
    trainer = CommandTrainer(
        command=parts if len(parts) > 1 else ("sh", "-c", *parts),
        folder=str(folder),
        logs=str(folder / "logs"),
        place=place(folder, prices=prices or Prices(), steps=7),
        **options,
    )
    return attempt(trainer, TRIAL)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that a test starts has it in its environment."""
    monkeypatch.setenv("TELESCOPE_TEST_MARK", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("script", "loss"),
    [
        (SAYS, 1.5),
        ("echo hello; echo '[1, 2]'; echo '{{broken'; " + SAYS + "; echo bye", 1.5),
        ("echo '{{\"loss\": 9}}'; " + SAYS, 1.5),
        (SAYS + "; echo '{{\"wandb\": 3}}'", 1.5),
        (SAYS + "; echo '{{\"loss\": 9}}' >&2", 1.5),
        ("printf '{{\"loss\": 3}}'", 3.0),
        ("printf '  {{\"loss\": 3e0}}\\r\\n'", 3.0),
    ],
)
def test_the_last_json_line_with_a_loss_is_the_result(
    script: str, loss: float, tmp_path: Path
) -> None:
    result = command(tmp_path, script)
    assert (result.status, result.loss, result.reason) == (Status.COMPLETE, loss, "")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('{{"loss": NaN}}', "loss nan"),
        ('{{"loss": -Infinity}}', "loss -inf"),
        ('{{"loss": null}}', "loss null"),
        ('{{"status": "diverged", "reason": "rose"}}', "rose"),
        ('{{"status": "diverged", "loss": 3}}', "the trainer says so"),
    ],
)
def test_a_divergence_is_the_points_fault(script: str, reason: str, tmp_path: Path) -> None:
    result = command(tmp_path, f"echo '{script}'")
    assert (result.status, result.loss, result.reason) == (Status.DIVERGED, None, reason)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"{SAYS}; exit 3", "exit code 3"),
        ("exit 137", "exit code 137, as after signal 9 (SIGKILL)"),
        ("kill -SEGV $$", "killed by signal 11 (SIGSEGV)"),
        ("true", 'no result: stdout has no JSON line; expected {"loss": 2.31}, or'),
        ("echo '{{\"acc\": 1}}'", "no result: stdout has JSON, but no line such as"),
        ('echo \'{{"loss": "low"}}\'', "has loss 'low', must be a number"),
        ("echo '{{\"loss\": true}}'", "has loss True, must be a number"),
        ('echo \'{{"status": "done"}}\'', "no result: stdout has JSON, but no line such as"),
        ('echo \'{{"status": "failed", "reason": "GPU"}}\'', "says status 'failed' (GPU); expect"),
        ('echo \'{{"loss": 1, "status": "failed"}}\'', "says status 'failed'; expected"),
        ("echo one >&2; echo two >&2; exit 1", "exit code 1\none\ntwo"),
        ("echo only here; exit 1", "exit code 1\nonly here"),
    ],
)
def test_a_failure_says_why_with_the_end_of_its_log(
    script: str, reason: str, tmp_path: Path
) -> None:
    result = command(tmp_path, script)
    assert result.status is Status.FAILED
    assert reason in result.reason
    assert "Traceback" not in result.reason


@pytest.mark.parametrize(
    ("lines", "status", "note"),
    [
        (['{"loss": 1.5}', '{"event": "upload", "status": "ok"}'], Status.COMPLETE, ""),
        (['{"loss": 1.5}', '{"status": ["a"]}', '{"status": null}'], Status.COMPLETE, ""),
        (['{"loss": 1.5, "status": "complete"}'], Status.COMPLETE, ""),
        (['{"loss": 1.5, "status": "completed"}'], Status.COMPLETE, "status 'completed', may be"),
        (['{"loss": 1.5, "flops": "1e12"}'], Status.COMPLETE, "flops '1e12', must be a number"),
        (['{"loss": 1.5, "flops": -1}'], Status.COMPLETE, "flops -1, must be a number >= 0"),
        (['{"loss": 1.5, "tokens": NaN}'], Status.COMPLETE, "tokens nan, must be a number >= 0"),
        (['{"loss": 1.5, "step": "last"}'], Status.COMPLETE, "step 'last', must be a whole"),
        (['{"status": "diverged", "flops": NaN}'], Status.DIVERGED, "flops nan, must be a"),
        ([f'{{"step": 1, "loss": 1{"0" * 400}}}', '{"loss": 1.5}'], Status.COMPLETE, ""),
    ],
)
def test_a_log_line_or_a_wrong_extra_costs_no_result(
    lines: list[str], status: Status, note: str, tmp_path: Path
) -> None:
    (tmp_path / "said").write_text("\n".join(lines))
    prices = Prices(flops={32: 7.0}, parameters={32: 3.0})
    result = command(tmp_path, "cat", "said", prices=prices)
    assert (result.status, result.flops) == (status, 7.0), result.reason
    assert result.loss == (1.5 if status is Status.COMPLETE else None)
    log = (tmp_path / "logs" / f"{TRIAL}.err").read_text()
    assert (note in log and log.count("\n") == 1) if note else log == ""


@pytest.mark.parametrize(
    ("said", "steps", "is_final"),
    [
        ({"step": 10, "loss": 5.0}, 100, False),
        ({"step": 98, "loss": 5.0}, 100, False),
        ({"step": 99, "loss": 5.0}, 100, True),  # counted from 0
        ({"step": 100, "loss": 5.0}, 100, True),
        ({"step": 10, "loss": 5.0}, None, True),
        ({"loss": 5.0}, 100, True),
    ],
)
def test_a_loss_from_the_middle_of_a_training_is_no_result(
    said: dict[str, Any], steps: int | None, is_final: bool, tmp_path: Path
) -> None:
    (tmp_path / "said").write_text(json.dumps(said))
    (tmp_path / "training.py").write_text(f"def train(**all): return {said!r}")
    where = place(tmp_path, steps=steps)
    for trainer in (
        CommandTrainer(("cat", "said"), str(tmp_path), str(tmp_path / "logs"), where),
        FunctionTrainer("training:train", (str(tmp_path),), where),
    ):
        result = attempt(trainer, TRIAL)
        assert result.status is (Status.COMPLETE if is_final else Status.FAILED)
        assert is_final or f"ended at step {said['step']} of 100" in result.reason


def test_a_divergence_may_end_early(tmp_path: Path) -> None:
    for said in ('{{"step": 1, "loss": NaN}}', '{{"step": 1, "status": "diverged"}}'):
        assert command(tmp_path, f"echo '{said}'").status is Status.DIVERGED


def test_what_cannot_be_started_is_a_failure(tmp_path: Path) -> None:
    result = command(tmp_path, "no-such-program", "x")
    assert result.status is Status.FAILED
    reason = f"cannot start 'no-such-program' in {tmp_path}: No such file or directory"
    assert result.reason == reason


def test_placeholders_environment_and_folder(tmp_path: Path) -> None:
    script = (
        "import json, os, sys\nprint(json.dumps(dict(loss=1.0, said=sys.argv[1:], "
        "a=os.environ['A'], threads=os.environ['OMP_NUM_THREADS'], here=os.getcwd())))"
    ).replace("{", "{{")
    told = ("{width}", "{lr}{weight_decay}", "{seed}", "{base_width}", "{steps}", "{{x}}")
    result = command(
        tmp_path,
        *("{python}", "-c", script, *told),
        environment={"A": "w{width}"},
        threads={32: 3},
    )
    assert result.loss == 1.0
    said = json.loads((tmp_path / "logs" / f"{TRIAL}.out").read_text())
    assert said["said"] == ["32", "0.10.25", "3", "16", "7", "{x}"]
    assert (said["a"], said["threads"], said["here"]) == ("w32", "3", str(tmp_path))


def test_a_result_file_and_a_folder_of_the_trials_own(tmp_path: Path) -> None:
    lines = "printf '{{\\n\"loss\":\\n 2.5}}' > {trial_folder}/r.json; echo '{{\"loss\": 9}}'"
    file = "{trial_folder}/r.json"
    assert command(tmp_path, lines, result=file).loss == 2.5
    kept = tmp_path / "trials" / str(TRIAL) / "r.json"
    assert kept.is_file()
    # The next try writes none: the old one must not count.
    result = command(tmp_path, SAYS, result=file)
    assert result.status is Status.FAILED
    assert f"no result: {kept} (trainer.result): No such file" in result.reason


def test_the_curve_and_what_was_spent(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "train_loss": 4.0, "val_loss": 4.5},
        {"step": 3, "train_loss": math.nan},
        {"lr": 0.1},
        {"step": 7, "loss": 3.0, "tokens": 100},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines).replace("{", "{{").replace("}", "}}")
    script = f"cat <<'E'\n{text}E"
    result = command(tmp_path, script, prices=Prices(parameters={32: 10.0}))
    assert result.curve == (
        CurvePoint(1, 5.0, None),
        CurvePoint(2, 4.0, 4.5),
        CurvePoint(7, None, 3.0),
    )
    assert result.flops == 6 * 10 * 100
    planned, said = Prices(flops={32: 7.0}), {"loss": 1.0, "flops": 5}
    assert as_result(TRIAL, said, planned, seconds=1.0, curve=CurveRows()).flops == 5
    assert as_result(TRIAL, {"loss": 1}, planned, seconds=1.0, curve=CurveRows()).flops == 7


def test_where_a_running_trial_is(tmp_path: Path) -> None:
    log = tmp_path / "x.out"
    assert latest_row(log) is None
    log.write_text(
        '{"step": 1, "loss": 9}\n' + "x" * 100_000 + '\n{"step": 7, "loss": 2}\nnow {"ste'
    )
    assert latest_row(log) == CurvePoint(7, 2.0, None)
    log.write_text('{"step": 1, "loss": 9}\n' + "x" * 100_000)
    assert latest_row(log) is None


def test_a_long_curve_is_thinned_not_cut() -> None:
    curve = CurveRows()
    for step in range(5 * MOST_ROWS):
        curve.add({"step": step, "loss": 1.0})
    assert MOST_ROWS / 2 < len(curve.rows) <= MOST_ROWS
    assert curve.rows[0].step == 0
    assert curve.rows[-1].step > 4.9 * MOST_ROWS


def test_a_hundred_megabytes_of_output_take_no_memory(tmp_path: Path) -> None:
    script = (
        "import sys\nfor _ in range(50): sys.stdout.write('x' * 1_000_000)\nprint()\n"
        "for _ in range(50): print('y' * 999_999)\nprint('{{\"loss\": 2}}')"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert command(tmp_path, "{python}", "-c", script).loss == 2
    assert (tmp_path / "logs" / f"{TRIAL}.out").stat().st_size > 100e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


FAMILY = """
    (trap '' TERM; sleep 60; sleep 60) &
    setsid sh -c 'sleep 60' &
    trap '' TERM
"""


def test_a_timeout_ends_the_whole_family(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_trainer, "GRACE", 0.3)
    result = command(tmp_path, f"{FAMILY} sleep 60; sleep 60", timeout=0.7)
    assert result.status is Status.FAILED
    assert result.reason == "no end after 0.7 s (trainer.timeout)"
    assert not left_over(mark)


def test_what_a_finished_trial_leaves_running_is_ended(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_trainer, "GRACE", 0.3)
    assert command(tmp_path, f"{FAMILY} {SAYS}").loss == 1.5
    assert not left_over(mark)


def test_where_processes_cannot_be_looked_at_the_group_is_ended(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(guard.__file__).read_text()
    found = 'HAS_PROC = os.path.isdir("/proc/self")'
    assert found in text
    blind = tmp_path / "guard.py"
    blind.write_text(text.replace(found, "HAS_PROC = False"))
    monkeypatch.setattr(guard, "__file__", str(blind))
    monkeypatch.setattr(command_trainer, "GRACE", 0.3)
    assert command(tmp_path, f"(trap '' TERM; sleep 60; sleep 60) & {SAYS}").loss == 1.5
    assert not left_over(mark)


def test_sigterm_lets_a_launcher_clean_up(tmp_path: Path) -> None:
    script = "trap 'echo cleaned; exit 0' TERM; while true; do sleep 0.05; done"
    assert command(tmp_path, script, timeout=0.7).status is Status.FAILED
    assert (tmp_path / "logs" / f"{TRIAL}.out").read_text() == "cleaned\n"


def driver(folder: Path, script: str, mark: str) -> subprocess.Popen[str]:
    """A process that runs one command trial, and says when it is on."""
    code = f"""
    import sys, threading, time
    from pathlib import Path
    from telescope.foreign.command import CommandTrainer
    from telescope.foreign.place import Place
    from telescope.records import Point, Trial
    trainer = CommandTrainer(
        command=("sh", "-c", {script!r}), folder={str(folder)!r}, logs={str(folder / "logs")!r},
        place=Place(base_width=16, trial_folders=""))
    trainer(Trial(32, Point.of(lr=0.1), 0))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TELESCOPE_TEST_MARK": mark},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_ends_leaves_nothing_running(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C reaches the terminal's group, kill -9 the process alone."""
    with driver(tmp_path, "touch on; setsid sleep 60 & sleep 60", str(tmp_path)) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "on").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        assert process.wait(timeout=30) != 0
    assert not left_over(str(tmp_path), patience=20)


# Functions.

REPOSITORY = {
    "training.py": "from models import net\nfrom sweeps.value import VALUE\n"
    "def train(width, seed, lr, weight_decay):\n    import utils\n"
    "    return net.loss(width) + VALUE + utils.ZERO\n",
    "models/__init__.py": "",
    "models/net.py": "def loss(width): return 1.0 / width\n",
    "sweeps/__init__.py": "",
    "sweeps/value.py": "VALUE = 1.0\n",
    "utils.py": "ZERO = 0.0\n",
}


def test_functions_of_two_repositories_with_the_same_names(tmp_path: Path) -> None:
    one = repository(tmp_path / "one", REPOSITORY)
    two = repository(tmp_path / "two", {**REPOSITORY, "sweeps/value.py": "VALUE = 2.0\n"})
    before, path = set(sys.modules), list(sys.path)
    for _ in range(2):  # in turns, the imports inside the function too
        for folder, value in ((one, 1.0), (two, 2.0)):
            trainer = FunctionTrainer("training:train", (folder,), place(tmp_path))
            assert attempt(trainer, TRIAL).loss == value + 1 / 32
    assert not {"training", "models.net", "utils"} & (set(sys.modules) - before)
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("def train(width, seed, lr, weight_decay): return lr", 0.1),
        ("def train(*, lr, **rest): return {'loss': len(rest)}", 3),
        ("import numpy\ndef train(**all): return numpy.float32(2)", 2),
        ("import torch\ndef train(**all): return torch.tensor(2.0)", 2),
        ("def train(width, seed, lr, weight_decay, base_width): return base_width", 16),
        ("class train:\n  def __new__(cls, **all): return 4.0", 4),
        ("import torch\ndef train(**all): return {'loss': torch.ones(1).cumsum(0)}", 1),
        ("def train(**all): return '2.5'", 2.5),
        (
            "from telescope import Point, Result, Status, Trial\n"
            "def train(width, seed, **point):\n"
            "    trial = Trial(width, Point.of(point), seed)\n"
            "    return Result(trial, Status.COMPLETE, loss=3.5)",
            3.5,
        ),
    ],
)
def test_a_function_returns_a_loss(text: str, loss: float, tmp_path: Path) -> None:
    result = function(tmp_path, text)
    assert result.status is Status.COMPLETE, result.reason
    assert result.loss == pytest.approx(loss)


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("return float('nan')", Status.DIVERGED, "loss nan"),
        ("return {'status': 'diverged'}", Status.DIVERGED, "the trainer says so"),
        ("return {'loss': None}", Status.DIVERGED, "loss null"),
        ("return '-inf'", Status.DIVERGED, "loss -inf"),
        ("import torch; return torch.tensor(float('nan'))", Status.DIVERGED, "loss nan"),
        ("import torch; return torch.ones(2)", Status.FAILED, "must be a number"),
        ("return True", Status.FAILED, "has loss True, must be a number"),
        ("return 1.9, {}", Status.FAILED, "has loss (1.9, {}), must be a number"),
        ("raise ValueError('out of memory')", Status.FAILED, "ValueError: out of memory"),
        ("return None", Status.FAILED, "has loss None, must be a number"),
        ("return 'low'", Status.FAILED, "has loss 'low', must be a number"),
        ("return {'acc': 1}", Status.FAILED, "has neither loss nor status"),
        ("raise SystemExit(3)", Status.FAILED, "SystemExit: 3"),
    ],
)
def test_a_function_that_does_not(text: str, status: Status, reason: str, tmp_path: Path) -> None:
    result = function(tmp_path, f"def train(**all): {text}")
    assert result.status is status
    assert reason in result.reason


def test_a_function_gives_its_curve(tmp_path: Path) -> None:
    text = "def train(**a): return dict(loss=1, step=9, curve=[dict(step=3, loss=2.0)])"
    assert function(tmp_path, text).curve == (CurvePoint(3, 2.0, None), CurvePoint(9, None, 1.0))


@pytest.mark.parametrize(
    ("curve", "row", "note"),
    [
        ("[dict(step=3, loss=numpy.float32(2))]", CurvePoint(3, 2.0, None), ""),
        ("[dict(step=numpy.int64(3), loss=torch.tensor(2.0))]", CurvePoint(3, 2.0, None), ""),
        ("[dict(step=3, loss='low', val_loss=10**400), 7]", None, ""),
        ("None", None, ""),
        ("3.0", None, "curve is a float, must be a list"),
    ],
)
def test_a_curve_of_any_librarys_numbers_or_none_that_can_be_read(
    curve: str, row: CurvePoint | None, note: str, tmp_path: Path, capfd: Any
) -> None:
    text = f"import numpy, torch\ndef train(**a): return dict(loss=1, curve={curve})"
    result = function(tmp_path, text)
    assert result.status is Status.COMPLETE, result.reason
    assert result.curve == ((row,) if row else ())
    said = capfd.readouterr().err
    assert note in said if note else not said


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("nowhere:train", {}, "no module nowhere in"),
        ("a.nowhere:train", {"a/__init__.py": ""}, r"no module a\.nowhere in"),
        ("a:train", {"a.py": ""}, r"a has no train \(.*a\.py\)"),
        ("a:train", {"a.py": "train = 3"}, "a:train is no function"),
        ("a:train", {"a.py": "import nix"}, "importing it raises ModuleNotFoundError: No module"),
        ("a:train", {"a.py": "1 / 0"}, "importing it raises ZeroDivisionError"),
        ("a:train", {"a.py": "x ="}, "importing it raises SyntaxError"),
        ("telescope.x:train", {"telescope/x.py": ""}, "hides behind this program; rename it"),
    ],
)
def test_a_function_that_is_not_there(
    name: str, files: dict[str, str], message: str, tmp_path: Path
) -> None:
    repository(tmp_path, files)
    with pytest.raises(SpecError, match=rf"^trainer\.function: got '{name}': .*{message}"):
        load_function(name, (str(tmp_path),))


def test_a_signature_is_checked_before_anything_runs() -> None:
    def check(function: Any) -> None:
        check_signature("f", function, {"width", "lr"}, {"seed", "base_width"})

    check(lambda width, lr: 0)
    check(lambda width, lr, seed, depth=3: 0)
    check(lambda **all: 0)
    check(dict)  # written in C
    for wrong, message in (
        (lambda width: 0, "takes no lr"),
        (lambda width, lr, depth: 0, "needs depth, which is not given"),
        (eval("lambda width, lr, x, /: 0"), "takes no lr"),
    ):
        with pytest.raises(SpecError, match=message):
            check(wrong)
    assert accepted(lambda width, seed: 0, {"width", "lr"}, {"seed", "steps"}) == {"width", "seed"}


@pytest.mark.parametrize("text", ["{", "}", "{}", "{0}", "{lr:.3f}", "{lr!r}", "{a.b}", '{"x": 1}'])
def test_only_plain_placeholders(text: str) -> None:
    with pytest.raises(ValueError, match=r"plain name|format string|expected"):
        names_in(text)


def test_numbers_keep_all_their_digits() -> None:
    values = {"lr": 0.1 + 0.2, "width": 32, "tiny": 1e-7}
    assert filled("{lr} {width} {tiny}", values) == "0.30000000000000004 32 1e-07"
    assert parse_line("{" * 100_000) is None
    assert threading.active_count() >= 1
