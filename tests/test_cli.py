"""The command line as people and scripts meet it: keys, exit codes, one-line errors.

One sweep is run for the whole file. What concerns processes is tested with processes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from commands import STABLE_OPTIONS, from_json, telescope
from conftest import as_toml, tiny_spec

from telescope import __version__


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A user's folder with a spec and a finished sweep."""
    path = tmp_path_factory.mktemp("place")
    (path / "tiny.toml").write_text(as_toml(tiny_spec(corpus_file)))
    done = telescope("run", "tiny.toml", "--dispatcher", "inline", cwd=path)
    assert done.returncode == 0, done.stderr
    (path / "stdout").write_text(done.stdout)
    return path


@pytest.mark.parametrize("verb", STABLE_OPTIONS)
def test_the_surface_is_there(verb: str, tmp_path: Path) -> None:
    done = telescope(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0
    missing = {option for option in STABLE_OPTIONS[verb] if option not in done.stdout}
    assert not missing


def test_run_ends_with_choices_answer_cost_and_place(place: Path) -> None:
    out = (place / "stdout").read_text()
    assert "tiny: coordinate check PASS in " in out
    assert "[9/9] width 32" in out
    assert "width 16: chose lr" in out
    assert "answer     width 64: lr" in out
    assert "not proven" in out
    assert "target runs" in out
    assert "results/tiny" in out


def test_plan_keys(place: Path) -> None:
    plan = from_json("plan", "tiny.toml", "--set", "axes.lr.points=5", cwd=place)
    assert list(plan) == [
        *("name", "policy", "stages", "target", "sweep_flops", "sweep_over_target"),
        *("sweep_over_target_parameters", "range", "data", "seconds", "arithmetic", "refused"),
    ]
    stage = plan["stages"][0]
    counts = ["parameters", "parameters_without_embeddings", "active_parameters"]
    assert list(stage) == ["width", *counts, "points", "trials", "tokens", "flops"]
    assert list(stage["flops"]) == ["model", "attention", "optimizer", "total"]
    assert [s["trials"] for s in plan["stages"]] == [10, 3]
    assert list(plan["target"]) == ["width", *counts, "tokens", "flops"]
    target = plan["target"]
    assert target["active_parameters"] == target["parameters_without_embeddings"]
    assert target["parameters"] - target["active_parameters"] == 2 * 256 * 64
    total = sum(s["flops"]["total"] for s in plan["stages"])
    assert plan["sweep_flops"] == pytest.approx(total)
    assert plan["sweep_over_target"] == pytest.approx(total / plan["target"]["flops"])
    assert list(plan["range"]) == ["best", "expected", "worst"]
    assert plan["seconds"]["estimate"] > 0
    assert "assumed" in plan["seconds"]["basis"]


def test_check_keys_table_and_figure(place: Path) -> None:
    arguments = ("check", "tiny.toml", "--results", "checks")
    checked = from_json(*arguments, cwd=place)
    assert list(checked)[:5] == ["verdict", "rule", "widths", "threshold", "slopes"]
    assert (checked["verdict"], checked["rule"]) == ("PASS", "mup")
    assert checked["widths"] == [16, 32, 64, 128]
    assert checked["slopes"].keys() == checked["sizes"].keys()
    assert (place / "checks" / "tiny" / "coordcheck.png").read_bytes().startswith(b"\x89PNG")
    failed = telescope(*arguments, "--set", "optimizer.rule=paper", cwd=place)
    assert failed.returncode == 1
    assert "verdict    FAIL: " in failed.stdout
    assert "hidden update" in failed.stdout
    assert failed.stderr == ""


def test_probe_measures(place: Path) -> None:
    seconds = from_json("plan", "tiny.toml", "--probe", cwd=place)["seconds"]
    assert seconds["basis"].startswith("measured")
    assert 0 < seconds["estimate"] < 60
    assert not (place / "results" / "tiny-probe").exists()


def test_status_keys_of_a_finished_sweep(place: Path) -> None:
    status = from_json("status", "tiny", cwd=place)
    expected = {
        "name": "tiny",
        "state": "finished",
        "stage": 1,
        "done": 9,
        "total": 9,
        "running": 0,
    }
    assert expected.items() <= status.items()
    assert "eta_seconds" in status
    assert telescope("status", "tiny", cwd=place).stdout == "tiny: finished, 9 of 9 trials\n"


def test_show_keys(place: Path) -> None:
    show = from_json("show", "tiny", cwd=place)
    assert {"name", "policy", "rule", "choices", "skipped", "target", "cost"} <= show.keys()
    assert [choice["width"] for choice in show["choices"]] == [16, 32]
    choice = show["choices"][0]
    assert {
        *(
            "width",
            "point",
            "lr",
            "weight_decay",
            "loss",
            "intervals",
            "at_edge",
            "reason",
            "trials",
        )
    } <= choice.keys()
    assert choice["point"] == {"lr": choice["lr"], "weight_decay": choice["weight_decay"]}
    assert choice["intervals"] == {"lr": None, "weight_decay": None}
    assert choice["trials"] == {"complete": 6, "diverged": 0, "failed": 0}
    last = show["choices"][-1]
    assert show["target"] == {
        **{"width": 64, "point": last["point"], "lr": last["lr"]},
        **{"weight_decay": last["weight_decay"], "certificate": None},
    }
    plan = from_json("plan", "tiny.toml", cwd=place)
    assert show["cost"]["over_target"] == pytest.approx(plan["sweep_over_target"])


def test_show_csv_is_trials_csv(place: Path) -> None:
    done = telescope("show", "tiny", "--csv", cwd=place)
    assert done.stdout == (place / "results" / "tiny" / "trials.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 9
    assert {row["status"] for row in rows} == {"complete"}


def test_show_by_path_and_from_elsewhere(place: Path, tmp_path: Path) -> None:
    path = place / "results" / "tiny"
    assert from_json("show", path, cwd=tmp_path) == from_json("show", "tiny", cwd=place)


def test_transfer_keys_and_out(place: Path) -> None:
    done = telescope(
        "transfer", "tiny", "--width", "128", "--steps", "8", "--out", "t.json", cwd=place
    )
    assert done.stdout == "wrote t.json\n"
    transfer = json.loads((place / "t.json").read_text())
    assert {
        "width",
        "point",
        "lr",
        "weight_decay",
        "steps",
        "groups",
        "certificate",
    } <= transfer.keys()
    assert (transfer["width"], transfer["steps"], transfer["certificate"]) == (128, 8, None)
    assert {
        *("role", "shape", "names", "count", "optimizer", "kwargs"),
        *("lr", "weight_decay", "init_std", "multiplier", "note"),
    } <= transfer["groups"][0].keys()
    plain = from_json("transfer", "tiny", cwd=place)
    assert plain["weight_decay"] == pytest.approx(2 * transfer["weight_decay"])
    human = telescope("transfer", "tiny", cwd=place)
    assert "not proven" in human.stdout
    assert "residual" in human.stdout


def test_running_again_under_another_name_is_another_sweep(place: Path) -> None:
    override = ("--set", "ladder.widths=[16]")
    done = telescope(
        "run",
        "tiny.toml",
        "--name",
        "again",
        "--no-check",
        "--dispatcher",
        "inline",
        *override,
        cwd=place,
    )
    assert done.returncode == 0
    assert from_json("status", "again", cwd=place)["total"] == 6


def test_init_writes_a_spec_that_plans(tmp_path: Path) -> None:
    assert telescope("init", "mine/first.toml", cwd=tmp_path).returncode == 0
    plan = from_json("plan", "mine/first.toml", cwd=tmp_path)
    assert plan["name"] == "first"
    again = telescope("init", "mine/first.toml", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nothing"], 2, "nothing: no such file, nor a bundled sweep"),
        (["run", "tiny.toml", "--set", "train.stepz=3"], 2, "train.stepz: unknown key"),
        (
            ["run", "tiny.toml", "--set", "model.deep=3"],
            2,
            "model.deep: gpt.py takes no such keyword",
        ),
        (["run", "tiny.toml", "--set", "data.source='none.txt'"], 2, "no file matches"),
        (["run", "tiny.toml", "--set", "data.eval_tokens=99999"], 2, "data.held_out: "),
        (["run", "tiny.toml", "--set", "train.steps=5"], 2, "train.steps was 4, now 5"),
        (["run", "tiny.toml", "--dispatcher", "slurm"], 2, "--dispatcher: got 'slurm'"),
        (["run", "tiny.toml", "--name", "x", "--storage", "foo"], 2, "--storage foo: cannot be"),
        (["plan", "."], 2, ".: is a folder; name a TOML file"),
        (["run", "tiny.toml", "--set", "compute.device=tpuu"], 2, "compute.device: got 'tpuu'"),
        (["plan", "tiny.toml", "--set", "compute.device=tpuu"], 2, "compute.device: got 'tpuu'"),
        (["run", "tiny.toml", "--set", "budget.max_over_target=0.1"], 1, "any of these would fit"),
        (["run"], 2, "Missing argument 'SPEC'"),
        (["run", "tiny.toml", "--workers", "0"], 2, "--workers"),
        (["fly"], 2, "No such command 'fly'"),
        (["shwo", "tiny"], 2, "Did you mean 'show'?; see telescope --help"),
        (["run", "--wrkers", "2", "tiny.toml"], 2, "--workers); see telescope run --help"),
        (["show", "tinny"], 2, "did you mean tiny?"),
        (["plan", "tinny.toml"], 2, "did you mean tiny.toml?"),
        (["plan", "tiny.toml", "--set", "steps=7"], 2, "or train.steps or trainer.steps"),
        (["plan", "tiny.toml", "--set", "axes.lr=0.1"], 2, "for one value: axes.lr.value = 0.1"),
        (
            ["plan", "tiny.toml", "--set", "axes.weight_deacy.value=1"],
            2,
            "did you mean weight_decay?",
        ),
        (["init", "new"], 2, "new: must end in .toml"),
        (["compare", "tiny"], 2, "compare: got tiny alone"),
        (["plan", "tiny.toml", "--set", "model.vocab_size=100"], 2, "model.vocab_size: got 100"),
        (["show", "nothing"], 2, "nothing: no sweep of that name under results (there: "),
        (["status", "nothing"], 2, "nothing: no sweep"),
        (["transfer", "tiny", "--width", "60"], 2, "width 60"),
    ],
)
def test_errors_are_one_line(place: Path, arguments: list[str], code: int, message: str) -> None:
    done = telescope(*arguments, cwd=place)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("telescope: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_ls_has_the_answer_of_a_sweep_and_what_is_wrong_with_another(place: Path) -> None:
    damaged = place / "results" / "damaged"
    shutil.copytree(place / "results" / "tiny", damaged)
    try:
        (damaged / "trials.db").unlink()
        listed = json.loads(telescope("ls", "--json", cwd=place).stdout)
        rows = {Path(row["path"]).name: row for row in listed}
        assert "missing" in rows["damaged"]["problem"]
        shown, good = from_json("show", "tiny", cwd=place), rows["tiny"]
        assert good["state"] == "finished"
        assert good["answer"] == shown["target"]["point"]
        assert good["over_target"] == shown["cost"]["over_target"]
        assert good["age_seconds"] >= 0
        text = telescope("ls", cwd=place).stdout
        assert "tiny" in text
        assert "missing" in text
    finally:
        shutil.rmtree(damaged)


def test_run_goes_on_with_a_sweep_by_its_name(place: Path) -> None:
    for name in ("tiny", "results/tiny"):
        done = telescope("run", name, "--dispatcher", "inline", cwd=place)
        assert done.returncode == 0, done.stderr
        assert "are stored already" in done.stdout
    changed = telescope("run", "tiny", "--set", "train.steps=5", cwd=place)
    assert "train.steps was 4, now 5" in changed.stderr


def test_compare_says_what_differs_and_refuses_other_data(place: Path) -> None:
    other = place / "results" / "renamed"
    shutil.copytree(place / "results" / "tiny", other)
    try:
        same = from_json("compare", "tiny", "renamed", cwd=place)
        assert [row["name"] for row in same["sweeps"]] == ["tiny", "renamed"]
        assert same["differing"] == {}
        aside = place / "results" / "aside" / "tiny"
        shutil.copytree(other, aside)
        rows = telescope("compare", "tiny", "results/aside/tiny", cwd=place).stdout
        assert re.findall(r"^results\S+", rows, re.MULTILINE) == [
            "results/tiny",
            "results/aside/tiny",
        ]
        shutil.rmtree(aside.parent)
        record = json.loads((other / "spec.json").read_text())
        record["comparable_if_equal"]["optimizer.momentum"] = 0.5
        (other / "spec.json").write_text(json.dumps(record))
        assert "optimizer.momentum" in telescope("compare", "tiny", "renamed", cwd=place).stdout
        record["comparable_if_equal"]["data (hash)"] = "another"
        (other / "spec.json").write_text(json.dumps(record))
        refused = telescope("compare", "tiny", "renamed", cwd=place)
        assert refused.returncode == 1
        assert "losses cannot be compared: data (hash) is " in refused.stderr
    finally:
        shutil.rmtree(other)


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert telescope("--version", cwd=tmp_path).stdout == f"telescope {__version__}\n"


def test_watching_ends_with_the_sweep(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [
        {"name": "tiny", "state": state, "stage": 0, "stages": 2, "width": 16, "done": done}
        | {"total": 9, "running": 1, "eta_seconds": 5.0}
        for state, done in (("running", 3), ("running", 3), ("running", 4), ("finished", 9))
    ]
    left = iter(states)
    monkeypatch.setattr("telescope.report.status.read_status", lambda *_: next(left))
    monkeypatch.setattr("telescope.cli.WATCH_SECONDS", 0.0)
    lines = telescope("status", "tiny", "--watch", cwd=place).stdout.splitlines()
    assert [re.search(r"\d of 9", line)[0] for line in lines] == ["3 of 9", "4 of 9", "9 of 9"]  # type: ignore[index]


def test_init_for_a_script_of_ones_own_writes_what_runs(tmp_path: Path) -> None:
    made = telescope("init", "--command", "mine.toml", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    script = (tmp_path / "train.py").read_text()
    assert len([line for line in script.splitlines() if line.strip()]) <= 12
    changes = ["--set", "ladder.policy=paper", "--set", "ladder.widths=[32]"]
    done = telescope("run", "mine.toml", "--dispatcher", "inline", *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "answer     width 256: lr 0.04472, weight_decay 0.1 (not tuned)" in done.stdout
    plan = telescope("plan", "mine.toml", "--set", "optimizer.rule=standard", cwd=tmp_path)
    assert "will not be confirmed: optimizer.rule is standard" in plan.stdout


def test_debug_shows_the_traceback(place: Path) -> None:
    command = [sys.executable, "-m", "telescope", "run", "nothing", "--debug"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_no_arguments_show_the_help(tmp_path: Path) -> None:
    done = telescope(cwd=tmp_path)
    assert "Commands" in done.stdout
    assert done.stderr == ""


def test_a_folder_that_cannot_be_written_is_a_line(place: Path) -> None:
    """As root no permission is refused, so a folder stands where the lock file would be."""
    (place / "results" / "locked" / "lock").mkdir(parents=True)
    done = telescope("run", "tiny.toml", "--name", "locked", "--dispatcher", "inline", cwd=place)
    assert done.returncode == 2
    assert "lock: Is a directory" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unfinished_sweep_says_so(place: Path) -> None:
    """One stage of two is stored: what a second terminal sees in the middle of a run."""
    first = (
        "--name",
        "half",
        "--set",
        "ladder.widths=[16]",
        "--dispatcher",
        "inline",
        "--no-check",
    )
    assert telescope("run", "tiny.toml", *first, cwd=place).returncode == 0
    record = place / "results" / "half" / "spec.json"
    data = json.loads(record.read_text())
    data["spec"]["ladder"]["widths"] = [16, 32]
    record.write_text(json.dumps(data))
    done = telescope("transfer", "half", cwd=place)
    assert done.returncode == 0
    assert "NOT finished: this is the choice of width 16 alone" in done.stdout
    shown = " ".join(telescope("show", "half", cwd=place).stdout.split())
    assert "the sweep has not finished" in shown


def test_a_stuck_sweep_transfers_nothing(place: Path) -> None:
    high = ("--set", "axes.lr={ low = 1e4, high = 1e5, points = 2 }", "--name", "stuck")
    done = telescope("run", "tiny.toml", *high, "--dispatcher", "inline", "--no-check", cwd=place)
    assert done.returncode == 1
    assert "lower axes.lr.low" in done.stderr
    refused = telescope("transfer", "stuck", cwd=place)
    assert refused.returncode == 1
    assert "nothing to transfer: width 16: every point diverged" in refused.stderr
    assert "stuck" in telescope("status", "stuck", cwd=place).stdout


def test_plan_over_budget_is_still_a_plan(place: Path) -> None:
    done = telescope("plan", "tiny.toml", "--set", "budget.max_over_target=0.1", cwd=place)
    assert done.returncode == 0
    assert "`run` would refuse" in done.stdout


def test_status_sees_a_running_sweep_and_ctrl_c_keeps_what_finished(place: Path) -> None:
    """Another process watches a sweep; SIGINT ends it with 130 within seconds."""
    long = ("--set", "train.steps=300", "--name", "long", "--dispatcher", "inline", "--no-check")
    command = [sys.executable, "-m", "telescope", "run", "tiny.toml", *long]
    driver = subprocess.Popen(
        command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    heartbeat = place / "results" / "long" / "status.json"
    state: dict[str, Any] = {"done": 0}
    deadline = time.monotonic() + 90
    while state["done"] < 1 and time.monotonic() < deadline:
        time.sleep(0.2)
        if heartbeat.exists():
            state = from_json("status", "long", cwd=place)
    assert {"state": "running", "running": 1}.items() <= state.items()
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=10)
    assert driver.returncode == 130
    assert errors == "long: interrupted; the same command goes on where it stopped\n"
    after = from_json("status", "long", cwd=place)
    assert after["state"] == "interrupted"
    assert after["done"] >= state["done"]
    assert len(from_json("show", "long", cwd=place)["choices"]) <= 1


@pytest.mark.parametrize(
    ("arguments", "given", "threads"),
    [
        (["show", "nothing"], None, 1),
        (["run", "nothing", "--dispatcher=inline"], None, None),
        (["show", "nothing"], "2", 2),
    ],
)
def test_a_fit_computes_with_one_thread_and_what_is_started_with_its_own(
    tmp_path: Path, arguments: list[str], given: str | None, threads: int | None
) -> None:
    """As OpenBLAS itself says; a trainer in this process, or a user's own number, is left alone."""
    program = textwrap.dedent(
        """
        import json, os, sys
        from contextlib import suppress
        from telescope.cli import main
        with suppress(SystemExit):
            main()
        import numpy
        from threadpoolctl import threadpool_info
        pools = [p["num_threads"] for p in threadpool_info() if p["internal_api"] == "openblas"]
        print(json.dumps([pools, os.environ.get("OPENBLAS_NUM_THREADS")]))
        """
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    environment |= {"OPENBLAS_NUM_THREADS": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    pools, left = json.loads(done.stdout.splitlines()[-1])
    all_of_them = min(len(os.sched_getaffinity(0)), 64)
    assert set(pools) == {threads or all_of_them}
    assert left == given
