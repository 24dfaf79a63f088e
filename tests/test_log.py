"""Experiment trackers, behind their queue: deliveries, resumption, and trackers that misbehave.

The tracker is TensorBoard, or a stand-in for wandb that fails, hangs or ends its process. The other
libraries themselves are in test_trackers.py.
"""

from __future__ import annotations

import io
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bowls import BOWL, bowl_spec
from commands import output, telescope
from conftest import ROOT, as_toml, attempt, tiny_spec
from foreign_specs import foreign_spec
from rich.console import Console
from tracked import AXES, PAPER, SPOILT, read_events, run_logged

from telescope import Spec
from telescope.errors import SpecError
from telescope.log import sending
from telescope.log.__main__ import Service
from telescope.log.ledger import SPARE, Ledger
from telescope.log.names import PACKAGES, check_installed
from telescope.log.records import End, Ended, Row, Run, Started, as_line, from_line
from telescope.log.rows import MOST_BEHIND, MOST_BYTES, MOST_ROWS, Follower, read_curve, rising
from telescope.log.sending import Sender
from telescope.log.tracker import Tracker
from telescope.records import Point, Trial
from telescope.report.live import PlainScreen
from telescope.store.folder import Folder
from telescope.sweep.prepare import prepare
from telescope.sweep.run import Options, run


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for wandb that Python finds; return the file of its calls."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text((ROOT / "tests" / "fake_wandb.py").read_text())
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.jsonl"))
    return tmp_path / "calls.jsonl"


def calls(file: Path, call: str = "") -> list[dict[str, Any]]:
    """The calls so far, of one kind if it is named."""
    if not file.exists():
        return []
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [one for one in found if call in ("", one["call"])]


OWN_WARNING = "ignore:.use_.* is deprecated"
"""Of Ray, about its own defaults."""
COMMAND = ["{python}", "train.py", "{width}", "{lr}", "{weight_decay}", "{steps}"]

TRAINER = """
import json, sys
width, lr, decay, steps = sys.argv[1:]
for step in range(int(steps)):
    print(json.dumps({"step": step + 1, "train_loss": 3 - step / int(steps)}), flush=True)
print(json.dumps({"loss": 1 + abs(float(lr) - 0.04) + 1 / int(width), "step": int(steps)}))
"""


def is_running(place: Path) -> bool:
    """Tell whether a tracker's process of this place is still there."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"telescope.log" in words and str(place).encode() in words:
            return True
    return False


# What a tracker is given.


def test_a_trial_is_a_run_with_its_point_curve_and_loss(tmp_path: Path, fake: Path) -> None:
    finished, said = run_logged(tmp_path)
    assert "wandb" not in said, said
    results = {str(r.trial): r for r in finished.results}
    begun = {call["name"]: call for call in calls(fake, "init")}
    assert begun.keys() == {*results, "bowl"}
    ends = {call["run"]: call for call in calls(fake, "finish")}
    for name, result in results.items():
        init = begun[name]
        assert (init["group"], init["job_type"]) == ("bowl", f"width-{result.trial.width}")
        assert init["resume"] == "allow"
        config = init["config"]
        assert (config["width"], config["seed"]) == (result.trial.width, 0)
        assert config["lr"] == result.trial.point["lr"]
        rows = [c for c in calls(fake, "log") if c["run"] == init["run"]]
        curve = finished.folder.read_curve(result.trial)
        assert [row["step"] for row in rows] == [row.step for row in curve] == [1, 2]
        assert rows[-1]["data"]["held_out_loss"] == result.loss
        summary = ends[init["run"]]["summary"]
        assert summary["loss"] == result.loss
        assert summary["status"] == "complete"
        assert ends[init["run"]]["code"] == 0
    assert not is_running(tmp_path)
    assert not (finished.folder.path / "rows").exists()


def test_the_answer_is_a_run_with_certificate_choices_and_figure(
    tmp_path: Path, fake: Path
) -> None:
    finished, _ = run_logged(tmp_path, ladder={"policy": "adaptive"})
    (init,) = [call for call in calls(fake, "init") if call["name"] == "bowl"]
    assert init["job_type"] == "answer"
    rows = [c for c in calls(fake, "log") if c["run"] == init["run"] and "choice/lr" in c["data"]]
    chosen = {choice.width: choice.point["lr"] for choice in finished.ladder.choices}
    assert {row["step"]: row["data"]["choice/lr"] for row in rows} == chosen
    (end,) = [call for call in calls(fake, "finish") if call["run"] == init["run"]]
    certificate = finished.certificate
    assert certificate is not None
    assert end["summary"]["certificate"] == certificate.verdict
    assert end["summary"]["target/lr"] == finished.target_point()["lr"]
    assert end["summary"]["predicted_excess_loss"] == certificate.predicted_excess_loss
    (artifact,) = calls(fake, "artifact")
    assert artifact["files"] == ["answer.json", "loss.png"]
    kept = json.loads((finished.folder.path / "trackers" / "answer.json").read_text())
    assert kept == json.loads(output(tmp_path, "show", "bowl", "--json"))


def test_a_diverged_trial_has_a_status_and_no_loss(tmp_path: Path, fake: Path) -> None:
    (tmp_path / "bowl.py").write_text(BOWL.replace("noise =", f"{SPOILT}\nnoise ="))
    finished, _ = run_logged(tmp_path)
    diverged = [str(r.trial) for r in finished.results if r.status == "diverged"]
    assert diverged
    ids = {call["name"]: call["run"] for call in calls(fake, "init")}
    ends = {call["run"]: call for call in calls(fake, "finish")}
    for name in diverged:
        summary = ends[ids[name]]["summary"]
        assert (summary["status"], summary["reason"]) == ("diverged", "too slow")
        assert "loss" not in summary


def test_a_failed_trial_is_marked_and_goes_on_in_its_run(tmp_path: Path, fake: Path) -> None:
    broken = BOWL.replace("noise =", "\nif width == 16: sys.exit('no space')\nnoise =")
    (tmp_path / "bowl.py").write_text(broken)
    finished, _ = run_logged(tmp_path)
    assert finished.ladder.stuck
    failed = {str(r.trial) for r in finished.results if r.status == "failed"}
    ids = {call["name"]: call["run"] for call in calls(fake, "init")}
    ends = {call["run"]: call for call in calls(fake, "finish")}
    for name in failed:
        assert ends[ids[name]]["summary"]["status"] == "failed"
        assert ends[ids[name]]["code"] == 1
        assert "loss" not in ends[ids[name]]["summary"]
    assert ends[ids["bowl"]]["summary"]["status"] == "stuck"
    (tmp_path / "bowl.py").write_text(BOWL)
    spec = Spec.from_dict(bowl_spec(tmp_path, log={"to": ["wandb"]}, axes=AXES, ladder=PAPER))
    options = Options(tmp_path / "results", dispatcher="inline", accept_trainer=True)
    again = run(spec, options, lambda: PlainScreen(Console(quiet=True)))
    assert again.ladder.is_finished
    assert {call["name"]: call["run"] for call in calls(fake, "init")}.items() >= ids.items()
    ends = {call["run"]: call for call in calls(fake, "finish")}
    for name in (*failed, "bowl"):
        assert ends[ids[name]]["summary"]["status"] in ("complete", "finished")


# Resumption.


def test_a_sweep_that_goes_on_continues_its_runs_and_logs_nothing_twice(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bowl.py"
    stop = tmp_path / "stop"
    wait = f"\nif lr > 0.4 and os.path.exists({str(stop)!r}): time.sleep(30)\n"
    head = 'print(json.dumps({"step": 0, "train_loss": 9.0}), flush=True)\n'
    head += 'print(json.dumps({"step": 1, "train_loss": 8.0}), flush=True)\n'
    ends = '\nprint(json.dumps({"loss": loss, "step": 2}))\n'
    script.write_text(BOWL.split("print(")[0] + head + wait + ends)
    stop.touch()
    (tmp_path / "sweep.toml").write_text(
        as_toml(bowl_spec(tmp_path, log={"to": ["wandb"]}, axes=AXES, ladder=PAPER))
    )
    command = [sys.executable, "-m", "telescope", "run", "sweep.toml", "--dispatcher", "inline"]
    path = os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE
    ) as driver:

        def is_following() -> bool:
            """Tell whether a row of the trial that waits has been delivered."""
            high = {c["run"] for c in calls(fake, "init") if c["config"].get("lr", 0) > 0.4}
            return any(c["run"] in high for c in calls(fake, "log"))

        deadline = time.monotonic() + 60
        while not is_following() and time.monotonic() < deadline:
            time.sleep(0.1)
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 130, errors
    assert calls(fake, "preempting"), "the trial that had not ended"
    stop.unlink()
    done = telescope("run", "sweep.toml", "--dispatcher", "inline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ids = {(call["name"], call["run"]) for call in calls(fake, "init")}
    assert len({name for name, _ in ids}) == len(ids), "one id per trial"
    logged = Counter((c["run"], c["step"]) for c in calls(fake, "log"))
    summary = next(run for name, run in ids if name == "bowl")
    assert {n for (run, _), n in logged.items() if run != summary} == {1}
    trials = {run for name, run in ids if name != "bowl"}
    for one in trials:
        assert [step for run, step in sorted(logged) if run == one] == [0, 1, 2]
    before = len(calls(fake))
    assert telescope("run", "bowl", "--dispatcher", "inline", cwd=tmp_path).returncode == 0
    assert len(calls(fake)) == before, "a finished sweep has nothing to add"


def test_a_finished_sweep_is_logged_afterwards(tmp_path: Path, fake: Path) -> None:
    finished, _ = run_logged(tmp_path, log={"to": []})
    assert not calls(fake)
    assert not (finished.folder.path / "trackers").exists()
    assert "log" not in finished.folder.read_spec()["spec"]
    finished, _ = run_logged(tmp_path)
    assert len(calls(fake, "finish")) == len(finished.results) + 1
    steps = Counter(call["run"] for call in calls(fake, "log"))
    assert sorted(set(steps.values())) == [2, 3], "curves of two rows; two choices and the figure"


def test_two_folders_of_one_sweep_are_two_sets_of_runs(tmp_path: Path, fake: Path) -> None:
    run_logged(tmp_path)
    (tmp_path / "results").rename(tmp_path / "mine")
    run_logged(tmp_path)
    names = Counter(call["name"] for call in calls(fake, "init"))
    assert set(names.values()) == {2}
    assert len({call["run"] for call in calls(fake, "init")}) == 2 * len(names)


def test_what_was_not_delivered_is_delivered_by_the_next_run(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DOES", "fail")
    finished, said = run_logged(tmp_path)
    runs = len(finished.results) + 1
    assert said.count("no route to host") == 2, "one warning, and the line at the end"
    assert "wandb: OSError: no route to host; trials go on without it" in said
    assert f"wandb: {runs} of {runs} runs not delivered: OSError: no route to host" in said
    assert finished.ladder.is_finished
    monkeypatch.delenv("FAKE_DOES")
    _, said = run_logged(tmp_path)
    assert "not delivered" not in said
    assert len(calls(fake, "finish")) == runs


def test_a_failure_that_passes_is_made_good_in_the_same_run(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DOES", "once")
    finished, said = run_logged(tmp_path)
    assert "not delivered" not in said
    assert len(calls(fake, "finish")) == len(finished.results) + 1


# Trackers that misbehave.


def test_a_tracker_that_hangs_holds_up_only_the_end_and_only_for_a_bounded_time(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(sending, "START_SECONDS", 2.0)
    monkeypatch.setenv("FAKE_DOES", "hang")
    took: list[float] = []
    close = Sender.close

    def timed(sender: Sender, **given: bool) -> None:
        start = time.monotonic()
        close(sender, **given)
        took.append(time.monotonic() - start)

    monkeypatch.setattr(Sender, "close", timed)
    finished, said = run_logged(tmp_path)
    runs = len(finished.results) + 1
    assert f"wandb: {runs} of {runs} runs not delivered: it does not answer" in said
    assert len(took) == 1
    assert took[0] < 2.0 + 1.0 + 2.0
    assert not is_running(tmp_path)
    read = json.loads((finished.folder.path / "status.json").read_text())
    assert read["state"] == "finished", "known before the tracker is waited for"


def test_a_tracker_whose_process_ends_is_reported_once(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DOES", "exit")
    finished, said = run_logged(tmp_path)
    assert said.count("its process has ended by itself with code 3; trials go on") <= 1
    assert said.count("ended by itself with code 3; the same command delivers them") == 1
    assert finished.ladder.is_finished


def test_a_secret_in_an_address_is_neither_shown_nor_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def connect() -> tuple[Tracker, Ledger]:
        raise OSError("API request to http://me:secret@host:80/?write_token=secret failed")

    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    messages.put(None)
    said = io.StringIO()
    Service(connect, said).serve(messages)
    for text in (said.getvalue(), capsys.readouterr().err):
        assert "http://me@host:80/?write_token=" in text
        assert "secret" not in text


def a_run(number: int = 0) -> Run:
    return Run(f"{number:016x}", "trial", f"run-{number}", "sweep", "width-8", {"lr": 0.1})


def test_a_flood_neither_waits_nor_grows(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(sending, "START_SECONDS", 1.0)
    monkeypatch.setattr(sending, "MOST_WAITING", 100)
    monkeypatch.setenv("FAKE_DOES", "hang")
    said: list[str] = []
    sender = Sender("wandb", tmp_path, "sweep", said.append)
    reason = {"reason": "x" * 1000}  # megabytes: more than a pipe holds
    start = time.monotonic()
    for number in range(5000):
        sender.send(Ended(a_run(number), End("complete", {"loss": 1.0}, reason)))
    assert time.monotonic() - start < 2.0
    assert sender._queue.qsize() <= 100
    sender.close()
    assert time.monotonic() - start < 10.0
    assert said == [
        "wandb: 5000 of 5000 runs not delivered: it does not answer; the same command delivers "
        f"them (log: {tmp_path / 'trackers' / 'wandb.log'})"
    ]


def test_a_slow_tracker_gets_everything_within_its_time(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SILENT_SECONDS", 5.0)
    monkeypatch.setenv("FAKE_DOES", "slow")
    said: list[str] = []
    ends = [Ended(a_run(n), End("complete", {"loss": 1.0})) for n in range(20)]
    sender = Sender("wandb", tmp_path, "sweep", said.append, ends[:10])
    for end in ends[10:]:
        sender.send(end)
    sender.close()
    assert said == []
    assert len(calls(fake, "finish")) == 20


DRIVER = """
import os, sys, time
from pathlib import Path
from telescope.log.records import Run, End, Ended, Started
from telescope.log.sending import Sender
from telescope.log.tracker import Tracker
place = Path(sys.argv[1])
sender = Sender("wandb", place, "sweep", print)
run = Run("0" * 16, "trial", "one", "sweep", "width-8")
other = Run("1" * 16, "trial", "two", "sweep", "width-8")
sender.send(Started(other, (str(place / "rows.jsonl"),)))
sender.send(Ended(run, End("complete", {"loss": 1.0})))
while not (place / "calls.jsonl").exists():
    time.sleep(0.05)
os.kill(os.getpid(), 9)
"""


def test_a_killed_driver_leaves_no_process_and_no_run_half_delivered(
    tmp_path: Path, fake: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"step": 1, "train_loss": 3.0}\n' * 2)
    path = os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while is_running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(tmp_path)
    ends = {call["run"]: call["code"] for call in calls(fake, "finish")}
    assert ends == {"0" * 16: 0, "1" * 16: 1}
    assert [call["run"] for call in calls(fake, "preempting")] == ["1" * 16]


def test_the_process_is_no_part_of_a_ray_that_is_tidied_up(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from telescope.dispatch.ray.session import MARK, reap

    monkeypatch.setenv(MARK, str(tmp_path))
    said: list[str] = []
    sender = Sender("wandb", tmp_path, "sweep", said.append, [Started(a_run())])
    while not calls(fake):
        time.sleep(0.05)
    reap(str(tmp_path))
    sender.send(Ended(a_run(), End("complete", {"loss": 1.0})))
    sender.close()
    assert said == []


# Names.


def test_trackers_that_are_not_installed_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(PACKAGES, name, replace(PACKAGES[name], module=f"no_{name}"))
    (tmp_path / "sweep.toml").write_text(as_toml(bowl_spec(tmp_path)))
    said = output(tmp_path, "run", "sweep.toml", "--log", "wandb", "--log", "mlflow", code=2)
    assert said.splitlines() == [
        "telescope: log.to: got 'wandb', whose package is not installed: pip install wandb",
        "telescope: log.to: got 'mlflow', whose package is not installed: "
        "pip install mlflow-skinny",
    ]
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_folder_that_a_tracker_leaves_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb leaves a folder of its name where it has run, which Python would import."""
    monkeypatch.setitem(PACKAGES, "wandb", replace(PACKAGES["wandb"], module="wandb_left"))
    (tmp_path / "wandb_left").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError, match="pip install wandb"):
        check_installed(["wandb"])


def test_unknown_and_repeated_names_are_errors_that_name_those_allowed(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(as_toml(bowl_spec(tmp_path)))
    said = output(tmp_path, "run", "sweep.toml", "--log", "wandbb", code=2)
    assert said == (
        "telescope: sweep.toml: log.to.0: got 'wandbb', must be 'tensorboard', 'wandb', 'mlflow' "
        "or 'trackio'\n"
    )
    twice = {"log": {"to": ["wandb", "wandb"]}}
    with pytest.raises(SpecError, match=r"log\.to: .*must be trackers, each once"):
        Spec.from_dict(bowl_spec(tmp_path, **twice))


def test_trackers_are_no_part_of_the_fingerprint(tmp_path: Path, corpus_file: Path) -> None:
    plain = Spec.from_dict(tiny_spec(corpus_file))
    logged = Spec.from_dict(tiny_spec(corpus_file, log={"to": ["wandb", "mlflow"]}))
    assert logged.strict_fields("x") == plain.strict_fields("x")
    assert "log" not in plain.as_dict()
    assert Spec.from_dict(logged.as_dict()).log == logged.log


def test_no_tracker_is_imported_by_a_driver(tmp_path: Path) -> None:
    code = "import sys, telescope.sweep.run; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "telescope.log.sending" in loaded
    assert not {"wandb", "mlflow", "trackio", "tensorboardX", "telescope.log.tracker"} & {*loaded}


# Rows of running trials.


def test_the_built_in_trainer_writes_its_curve_while_somebody_follows(
    tmp_path: Path, corpus_file: Path
) -> None:
    spec = Spec.from_dict(tiny_spec(corpus_file, train={"steps": 6, "evals": 2}))
    folder = Folder(tmp_path)
    trainer = prepare(spec).make_trainer(folder)
    trial = Trial(16, Point.of(lr=0.04, weight_decay=0.1), 0)
    before = attempt(trainer, trial)
    assert not folder.rows.exists(), "nobody follows"
    folder.rows.mkdir()
    file = folder.rows / f"{trial}.jsonl"
    file.write_text("of an earlier attempt\n")
    result = attempt(trainer, trial)
    assert (result.loss, result.curve) == (before.loss, before.curve), "no number moves"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["step"], r["train_loss"], r["held_out_loss"]) for r in rows] == [
        (row.step, row.train_loss, row.held_out_loss) for row in result.curve
    ]
    other = replace(trial, seed=1)
    (packed, _) = trainer.train_pack([trial, other])  # type: ignore[attr-defined]
    for one in (trial, other):
        lines = (folder.rows / f"{one}.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == [row.step for row in packed.curve]


def test_a_disk_that_is_full_ends_the_rows_and_not_the_trial(
    tmp_path: Path, corpus_file: Path
) -> None:
    folder = Folder(tmp_path)
    trainer = prepare(Spec.from_dict(tiny_spec(corpus_file))).make_trainer(folder)
    trial = Trial(16, Point.of(lr=0.04, weight_decay=0.1), 0)
    (folder.rows / f"{trial}.jsonl").mkdir(parents=True)  # cannot be opened for writing
    assert attempt(trainer, trial).status == "complete"


def steps_of(rows: list[Row]) -> list[int]:
    return [row.step for row in rows]


def test_rows_are_followed_one_behind_the_newest(tmp_path: Path) -> None:
    """The newest may be the trial's last word, whose loss is no training loss."""
    out = tmp_path / "trial.out"
    follower = Follower([str(tmp_path / "none.jsonl"), str(out)])
    assert follower.look(-1) == []
    with out.open("w") as file:
        for text in ("noise\n", '{"step": 1, "loss": 3.0}\n', '{"step": 2, "lo'):
            file.write(text)
        file.flush()
        assert follower.look(-1) == []
        file.write('ss": 2.5, "lr": 7}\r{"step": 3, "val_loss": 2.4}\n')
        file.flush()
        assert follower.look(-1) == [
            Row(1, {"train_loss": 3.0}),
            Row(2, {"train_loss": 2.5}),
        ]
        file.write('{"step": 4, "loss": NaN}\n{"step": 4, "loss": 2.2}\n')
        file.flush()
        assert follower.look(2) == [Row(3, {"held_out_loss": 2.4})]
    out.write_text('{"step": 1, "loss": 9.0}\n{"step": 4, "loss": 2.0}\n{"step": 5, "loss": 1}\n')
    assert follower.look(3) == [Row(4, {"train_loss": 2.0})], "begun again, in a file as new"


def test_a_trial_that_prints_faster_than_it_is_followed_is_thinned(tmp_path: Path) -> None:
    out = tmp_path / "trial.out"
    with out.open("w") as file:
        for step in range(1000):
            file.write(json.dumps({"step": step, "loss": 2.0}) + "\n")
    rows = Follower([str(out)]).look(-1)
    assert MOST_ROWS / 2 < len(rows) <= MOST_ROWS
    assert rows[-1].step == 998
    out.write_text("x" * (MOST_BYTES + 5) + "\n" + '{"step": 7, "loss": 2.0}\n' * 2)
    follower = Follower([str(out)])
    assert steps_of([*follower.look(-1), *follower.look(-1)]) == [7]
    line = '{"step": 1, "loss": 2.0}\n'
    out.write_text(line * (MOST_BEHIND // len(line) + 9) + '{"step": 8, "loss": 2.0}\n' * 2)
    start = time.monotonic()
    assert steps_of(Follower([str(out)]).look(0)) == [1, 8]
    assert time.monotonic() - start < 5


def test_a_curve_file_is_followed_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    head = "step,tokens,loss,val_loss,lr,seconds\n"
    path.write_text(head + "10,1000,3.0,,0.1,2.0\n20,3000,2.5,2.6,0.1,4.0\n")
    assert Follower([str(path)]).look(-1) == read_curve(path)[:1]
    last = {"tokens": 3000, "train_loss": 2.5, "held_out_loss": 2.6, "lr": 0.1, "seconds": 4.0}
    assert read_curve(path) == [
        Row(
            10,
            {"tokens": 1000, "train_loss": 3.0, "lr": 0.1, "seconds": 2.0}
            | {"tokens_per_second": 500.0},
        ),
        Row(20, last | {"tokens_per_second": 1000.0}),
    ]
    path.write_text("step,loss\nten,2\n")
    assert read_curve(path) == []
    assert rising([Row(2, {"a": 1.0}), Row(1, {"a": 1.0}), Row(3, {}), Row(4, {"a": 0.0})], 0) == [
        Row(2, {"a": 1.0}),
        Row(4, {"a": 0.0}),
    ]


def test_messages_survive_the_way(tmp_path: Path) -> None:
    end = End("complete", {"loss": 1.5}, {"reason": "ä\n"}, {"f": "/x"}, [Row(1, {"a": 2.0})])
    for message in (Started(a_run(), ("/a", "/b")), Ended(a_run(), end)):
        line = as_line(message)
        assert line.count(b"\n") == 1
        assert from_line(line) == message
    assert end.digest != End("complete", {"loss": 1.6}).digest


def test_the_ledger_outlives_kills_and_stays_small(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "wandb", "here")
    assert (ledger.step("a"), ledger.end("a"), ledger.knows("a")) == (-1, "", False)
    for step in range(SPARE + 10):
        ledger.note("a", step)
    ledger.note("b", 5, "digest")
    (path,) = tmp_path.glob("wandb-*.jsonl")
    assert len(path.read_text().splitlines()) < 20
    with path.open("a") as file:
        file.write('{"run": "a", "st')
    again = Ledger(tmp_path, "wandb", "here")
    assert (again.step("a"), again.step("b"), again.end("b")) == (SPARE + 9, 5, "digest")
    again.note("b", 6)
    assert Ledger(tmp_path, "wandb", "here").end("b") == "", "it goes on"
    assert not Ledger(tmp_path, "wandb", "elsewhere").knows("a")


# TensorBoard, and the target run.


def test_tensorboard_reads_every_curve_the_losses_and_the_answer(tmp_path: Path) -> None:
    finished, said = run_logged(tmp_path, log={"to": ["tensorboard"]})
    assert "not delivered" not in said
    folder = finished.folder.path / "tensorboard"
    for _ in range(2):  # the second time nothing is added
        found = read_events(folder)
        for result in finished.results:
            tags = found[f"width-{result.trial.width}/{result.trial}"]
            assert tags["loss"] == [(2, pytest.approx(result.loss))]
            assert [step for step, _ in tags["train_loss"]] == [1]
            assert tags["held_out_loss"] == [(2, pytest.approx(result.loss))]
            assert tags["status"] == "complete"
            assert f"| lr | {result.trial.point['lr']} |" in tags["config"]
            assert "_hparams_/session_start_info" in tags["plugins"]
        answer = found["answer/bowl"]
        assert [step for step, _ in answer["choice/lr"]] == [8, 16]
        assert answer["images"] == ["loss_figure"]
        files = sorted(folder.rglob("events.*"))
        run_logged(tmp_path, log={"to": ["tensorboard"]})
        assert sorted(folder.rglob("events.*")) == files
    import shutil

    shutil.rmtree(folder)
    run_logged(tmp_path, log={"to": ["tensorboard"]})
    assert read_events(folder).keys() == found.keys(), "made again where they were removed"


def test_a_target_run_of_another_trainer_is_logged(tmp_path: Path, fake: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINER)
    spec = foreign_spec(
        trainer={"command": COMMAND, "steps": 10},
        cost={"parameters": {"16": 100, "32": 400, "64": 1600}},
        budget={"max_over_target": 99},
    )
    (tmp_path / "sweep.toml").write_text(as_toml(spec))
    assert telescope("run", "sweep.toml", "--dispatcher", "inline", cwd=tmp_path).returncode == 0
    assert not calls(fake)
    assert "wandbb" in output(tmp_path, "launch", "foreign", "--log", "wandbb", code=2)
    output(tmp_path, "launch", "foreign", "--log", "wandb")
    (init,) = calls(fake, "init")
    assert (init["group"], init["job_type"], init["name"]) == ("foreign", "target", "width-64")
    result = json.loads((tmp_path / "results/foreign/target/width-64/result.json").read_text())
    (end,) = calls(fake, "finish")
    assert end["summary"]["loss"] == result["loss"]
    assert [call["step"] for call in calls(fake, "log")] == list(range(1, 11))
    output(tmp_path, "launch", "foreign", "--log", "wandb")
    assert len(calls(fake, "finish")) == 1


@pytest.mark.ray
@pytest.mark.filterwarnings(OWN_WARNING)
def test_a_target_run_of_ours_is_logged_with_its_speed(
    tmp_path: Path, corpus_file: Path, fake: Path
) -> None:
    spec = tiny_spec(corpus_file, target={"steps": 6}, log={"to": ["wandb"]})
    (tmp_path / "sweep.toml").write_text(as_toml(spec))
    run_it = ("run", "sweep.toml", "--dispatcher", "inline", "--no-check")
    assert telescope(*run_it, cwd=tmp_path).returncode == 0
    output(tmp_path, "launch", "tiny", "--unproven")
    ids = {call["name"]: call["run"] for call in calls(fake, "init")}
    rows = [call for call in calls(fake, "log") if call["run"] == ids["width-64"]]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"train_loss", "tokens_per_second", "lr"} <= rows[0]["data"].keys()
    ends = {call["run"]: call for call in calls(fake, "finish")}
    assert ends[ids["width-64"]]["summary"]["loss"] == rows[-1]["data"]["held_out_loss"]


@pytest.mark.ray
def test_trials_on_ray_are_followed_while_they_train(tmp_path: Path, fake: Path) -> None:
    head, tail = BOWL.split("noise =")
    early = "".join(
        f'print(json.dumps({{"step": {step}, "train_loss": 9.0}}), flush=True)\n' for step in (0, 1)
    )
    (tmp_path / "bowl.py").write_text(f"{head}{early}time.sleep(4)\nnoise ={tail}")
    spec = bowl_spec(tmp_path, log={"to": ["wandb"]}, ladder={"widths": [8], "policy": "paper"})
    spec["axes"]["lr"]["points"] = 2
    options = Options(tmp_path / "results", workers=2)
    finished = run(Spec.from_dict(spec), options, lambda: PlainScreen(Console(quiet=True)))
    assert finished.ladder.is_finished
    begun = {c["name"]: (c["run"], c["time"]) for c in calls(fake, "init")}
    ends = {c["run"]: c["time"] for c in calls(fake, "finish")}
    for result in finished.results:
        run_id, _ = begun[str(result.trial)]
        first = min(c["time"] for c in calls(fake, "log") if c["run"] == run_id)
        assert ends[run_id] - first > 0.8, "its first row came while it was training"
