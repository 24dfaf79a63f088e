"""Whole sweeps that another program trains: every verb, inline and on Ray, refused and resumed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bowls import BOWL, COMMAND, bowl_spec, run_bowl
from commands import output
from conftest import as_toml, left_over, one_line, quiet
from rich.console import Console

from telescope import Ladder, Spec
from telescope.answer.finished import open_result
from telescope.errors import ResumeError, SpecError
from telescope.foreign.program import read_program
from telescope.records import Status
from telescope.report.terminal import print_transfer
from telescope.sweep.foreign import Foreign
from telescope.sweep.planning import make_plan
from telescope.sweep.run import Options, run

TELESCOPE = [sys.executable, "-m", "telescope"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"trainer": {"command": ["x", "{widht}"]}}, "unknown placeholder {widht}.*mean {width}"),
    ({"trainer": {"command": ["x", "{lr}", "{seed}"]}}, "trainer.command: {width} is not used"),
    ({"trainer": {"command": ["x", "{width}", "{seed}"]}}, "{lr} is not used.*take axes.lr out"),
    ({"trainer": {"command": ["x", "{width}", "{lr}"]}}, "trainer.command: {seed} is not used"),
    ({"trainer": {"command": [*COMMAND, "{steps}"]}}, "placeholder {steps}.*give trainer.steps"),
    ({"trainer": {"command": [*COMMAND, "{lr:.3f}"]}}, "{lr:.3f} is no plain name"),
    ({"trainer": {"command": [*COMMAND, '{"a": 1}']}}, "literal braces are {{ and }}"),
    ({"trainer": {"command": []}}, "trainer.command: got \\[\\], must be a program"),
    ({"trainer": {"command": "python x"}}, "trainer.command: got 'python x', must be a list"),
    ({"trainer": {"function": "a:b"}}, "trainer.command: got .*one of the two"),
    ({"trainer": {"command": None}}, "trainer.command: got .*one of the two"),
    ({"trainer": {"command": None, "function": "a.b"}}, "must be package.module:name"),
    ({"trainer": {"command": None, "function": "a:b", "result": "r"}}, "result: .*left out with"),
    ({"trainer": {"timeout": -1}}, "trainer.timeout: got -1"),
    ({"trainer": {"result": "r.json"}}, "trainer.result: got 'r.json', must be another"),
    ({"trainer": {"result": "{width}.json"}}, "trainer.result: .*another file for every trial"),
    ({"trainer": {"environment": {"A": 3}}}, "trainer.environment.A: got 3, must be a string"),
    ({"trainer": {"comand": 3}}, "trainer.comand: unknown key.*did you mean command"),
    ({"cost": None}, r"cost: missing; with \[trainer\] give parameters"),
    ({"cost": {"parameters": {"8": 1, "16": 2}}}, "for width 32.*the target's"),
    ({"cost": {"parameters": {"8": 1, "16": 2, "x": 3}}}, "cost.parameters.x: got 'x'"),
    ({"cost": {"parameters": {"8": 1, "16": 2, "32": 0}}}, "cost.parameters.32: got 0"),
    ({"cost": {"flops": {"8": 1}}}, "cost.parameters: got .*one of the two"),
    ({"data": {"source": "x"}}, r"data: .*left out beside \[trainer\]"),
    ({"target": {"width": 32, "steps": 5}}, "target.steps: got 5, must be left out, or"),
    ({"axes": {"loss": {"value": 1.0}}}, "axes.loss: got 'loss', must be another name"),
    ({"axes": {"python": {"value": 1.0}}}, "axes.python: got 'python', must be another name"),
    ({"compute": {"cpus": {"8": 1}}}, "compute.cpus: .*for width 16"),
    ({"compute": {"cpus": {"8": 1, "16": 0}}}, "compute.cpus.16: got 0, must be >= 1"),
    ({"compute": {"gpus": {"8": 0.5, "16": -1}}}, "compute.gpus.16: got -1, must be >= 0"),
    ({"compute": {"gpus": 1.5}}, "compute.gpus: got 1.5, must be at most 1, or a whole number"),
    ({"compute": {"gpus": {"8": 2, "16": 2.5}}}, "compute.gpus.16: got 2.5, must be at most 1"),
    ({"trainer": {"environment": {"A=B": "1"}}}, "trainer.environment: got 'A=B', must be names"),
    ({"trainer": {"environment": {"": "1"}}}, "trainer.environment: got '', must be names"),
    (
        {"trainer": {"environment": {"A": "1\0"}}},
        "trainer.environment.A: got .*must be without NUL",
    ),
]


@pytest.mark.parametrize(("tables", "message"), WRONG, ids=[w[1][:40] for w in WRONG])
def test_wrong_specs_are_one_line(tables: dict[str, Any], message: str, tmp_path: Path) -> None:
    pattern = message.replace("{", r"\{").replace("}", r"\}")
    with pytest.raises(SpecError, match=pattern) as caught:
        Spec.from_dict(_without_none(bowl_spec(tmp_path, **tables)))
    one_line(caught.value)


def _without_none(spec: dict[str, Any]) -> dict[str, Any]:
    given = {}
    for name, table in spec.items():
        is_table = isinstance(table, dict)
        given[name] = {k: v for k, v in table.items() if v is not None} if is_table else table
    return given


def test_what_needs_no_seed_and_what_is_passed_by_the_environment(tmp_path: Path) -> None:
    paper = {"ladder": {"policy": "paper"}, "trainer": {"command": ["x", "{width}", "{lr}"]}}
    Spec.from_dict(bowl_spec(tmp_path, **paper))
    told = {"command": ["x"], "environment": {"A": "{width} {lr}", "SEED": "{seed}"}}
    Spec.from_dict(bowl_spec(tmp_path, trainer=told))


def test_every_verb(tmp_path: Path) -> None:
    (tmp_path / "bowl.toml").write_text(as_toml(bowl_spec(tmp_path)))
    plan = json.loads(output(tmp_path, "plan", "bowl.toml", "--json"))
    assert [stage["parameters"] for stage in plan["stages"]] == [10, 30]
    assert plan["target"] == {
        "width": 32,
        "parameters": 100,
        **dict.fromkeys(["parameters_without_embeddings", "active_parameters", "tokens", "flops"]),
    }
    assert plan["seconds"]["estimate"] is None
    assert 0 < plan["sweep_over_target"] == plan["sweep_over_target_parameters"]
    assert plan["refused"] is None
    assert "cost" in output(tmp_path, "plan", "bowl.toml")
    line = output(tmp_path, "check", "bowl.toml", code=2)
    assert line.startswith("telescope: bowl: no coordinate check: [trainer] trains it")
    assert "--probe" in output(tmp_path, "plan", "bowl.toml", "--probe", code=2)

    shown = output(tmp_path, "run", "bowl.toml", "--dispatcher", "inline")
    assert "no coordinate check" in shown
    folder = tmp_path / "results" / "bowl"
    show = json.loads(output(tmp_path, "show", "bowl", "--json"))
    spent = show["cost"]
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    cost = sum({8: 10, 16: 30}[one["width"]] for one in runs)
    assert spent["flops"] is None
    assert spent["over_target"] == pytest.approx(cost / 100)
    assert show["rule"] == "mup"
    assert show["target"]["weight_decay"] is None
    assert show["choices"][0]["weight_decay"] is None
    assert show["target"]["lr"] == pytest.approx(0.1, rel=0.2)
    transfer = json.loads(output(tmp_path, "transfer", "bowl", "--json"))
    assert transfer["groups"] is None
    assert transfer["weight_decay"] is None
    assert transfer["certificate"]["verdict"] in ("PASS", "WARN")
    assert any("does not see it" in text for text in transfer["certificate"]["assumptions"])
    assert "finished" in output(tmp_path, "status", "bowl")
    assert ["bowl", "finished"] in [row.split()[:2] for row in output(tmp_path, "ls").splitlines()]
    assert len(list((folder / "logs").glob("*.out"))) == len(runs)
    assert not (folder / "model.py").exists()
    curve = next((folder / "curves").iterdir()).read_text().splitlines()
    assert curve[0] == "step,train_loss,held_out_loss"
    assert len(curve) == 3


def test_what_differs_is_refused(tmp_path: Path) -> None:
    run_bowl(tmp_path)
    run_bowl(tmp_path, trainer={"timeout": 9.0, "steps": 3}, optimizer={"rule": "standard"})
    for tables, key in (
        ({"trainer": {"command": [*COMMAND, "x"]}}, "trainer.command was"),
        ({"trainer": {"environment": {"A": "1"}}}, "trainer.environment was"),
        ({"trainer": {"command": [*COMMAND, "{steps}"], "steps": 3}}, "steps was None, now 3"),
    ):
        with pytest.raises(ResumeError, match=key):
            run_bowl(tmp_path, **tables)
    (tmp_path / "bowl.py").write_text(BOWL + "pass\n")
    with pytest.raises(ResumeError, match=r"trainer\.bowl\.py \(hash\) was"):
        run_bowl(tmp_path)


EDITS = {
    "a comment": (f"# a comment\n{BOWL}# and one more\n", True),
    "line ends": (BOWL.replace("\n", "\r\n"), True),
    "layout": (BOWL.replace("start = time.time()", "\n\nstart=( time.time( ) )  # now"), True),
    "quotes": (BOWL.replace('"a"', "'a'"), True),
    "a statement": (f"{BOWL}pass\n", False),
    "a text": (BOWL.replace('"cpus"', '"# cpus"'), False),
    "no Python": (f"{BOWL}(", False),
    "an interpreter": (f"#!/usr/bin/python3 -O\n{BOWL}", False),
    "packages": (f"# /// script\n# dependencies = ['torch']\n# ///\n{BOWL}", False),
}


@pytest.mark.parametrize("name", EDITS)
def test_of_a_python_script_its_code_counts(name: str, tmp_path: Path) -> None:
    edited, is_same = EDITS[name]
    first, second = (read_program(script(tmp_path, text)) for text in (BOWL, edited))
    assert (second.code == first.code) == is_same
    assert second.text != first.text
    for other in ("x.sh", "x"):  # of any other file its bytes
        (tmp_path / other).write_text(edited)
        assert read_program(tmp_path / other).code == read_program(tmp_path / other).text


def script(folder: Path, text: str) -> Path:
    (folder / "bowl.py").write_bytes(text.encode())
    return folder / "bowl.py"


def accepting(folder: Path, **tables: Any) -> Any:
    spec = Spec.from_dict(bowl_spec(folder, **tables))
    options = Options(folder / "results", dispatcher="inline", accept_trainer=True)
    ran = run(spec, options, quiet)
    return ran.folder, ran.ladder


def record_of(folder: Path) -> dict[str, Any]:
    text = (folder / "results" / "bowl" / "spec.json").read_text()
    return json.loads(text)  # type: ignore[no-any-return]


def test_an_edited_trainer_can_be_accepted(tmp_path: Path) -> None:
    """Stored results still count then, whichever of the accepted texts is there."""
    _, ladder = run_bowl(tmp_path)
    runs, first = (tmp_path / "runs.jsonl").read_text(), record_of(tmp_path)
    script(tmp_path, f"# a comment\n{BOWL}")
    run_bowl(tmp_path)
    assert record_of(tmp_path)["trainer_texts"] == first["trainer_texts"]
    script(tmp_path, f"{BOWL}pass\n")
    with pytest.raises(ResumeError, match=r"now \w+; undo .*, or say --accept-trainer if it tra"):
        run_bowl(tmp_path)
    with pytest.raises(ResumeError, match=r"environment was .*; undo the change, or start another"):
        accepting(tmp_path, trainer={"environment": {"A": "1"}})
    assert record_of(tmp_path) == first
    assert accepting(tmp_path)[1].choices == ladder.choices
    for text in (BOWL, f"{BOWL}pass  # again\n"):
        script(tmp_path, text)
        assert run_bowl(tmp_path)[1].choices == ladder.choices
    second = record_of(tmp_path)
    (listed,) = second["trainer_texts"].values()
    assert [text["accepted"] for text in listed] == [False, True]
    assert all(text["since"] and text["text"] and text["code"] for text in listed)
    for key in ("fingerprint", "comparable_if_equal"):
        assert second[key] == first[key]
    assert (tmp_path / "runs.jsonl").read_text() == runs
    assert open_result("bowl", tmp_path / "results").ladder.choices == ladder.choices
    assert "finished" in output(tmp_path, "status", "bowl")
    script(tmp_path, f"{BOWL}pass\npass\n")
    with pytest.raises(ResumeError, match="--accept-trainer"):
        run_bowl(tmp_path)


def test_a_folder_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """It knows the first text alone, by the same digest."""
    _, ladder = run_bowl(tmp_path)
    path, runs = tmp_path / "results" / "bowl" / "spec.json", (tmp_path / "runs.jsonl").read_text()
    old = {key: value for key, value in record_of(tmp_path).items() if key != "trainer_texts"}
    digest = hashlib.sha256((tmp_path / "bowl.py").read_bytes()).hexdigest()[:16]
    assert old["comparable_if_equal"]["trainer.bowl.py (hash)"] == digest
    for other in (old, {**old, "trainer_texts": 3}, {**old, "trainer_texts": {"a": [1]}}):
        path.write_text(json.dumps(other))
        assert run_bowl(tmp_path)[1].choices == ladder.choices
    script(tmp_path, f"{BOWL}# a comment\n")
    run_bowl(tmp_path)  # what its code was is known by now
    path.write_text(json.dumps(old))
    with pytest.raises(ResumeError, match="--accept-trainer"):
        run_bowl(tmp_path)
    accepting(tmp_path)
    assert record_of(tmp_path)["fingerprint"] == old["fingerprint"]
    assert (tmp_path / "runs.jsonl").read_text() == runs


def test_there_must_be_a_trainer_to_accept(tmp_path: Path) -> None:
    message = "--accept-trainer: is for the script or function"
    assert message in output(tmp_path, "run", "quickstart", "--accept-trainer", code=2)


def test_a_comment_in_the_middle_of_a_sweep_changes_nothing(tmp_path: Path) -> None:
    edit = "if len(open('runs.jsonl').readlines()) == 2: open('bowl.py', 'a').write('# ok')"
    script(tmp_path, f"{BOWL}{edit}\n")
    assert run_bowl(tmp_path)[1].is_finished


def test_a_loss_on_the_way_does_not_stand_for_one_that_became_nan(tmp_path: Path) -> None:
    """Every lr beyond 0.3 has the best loss half way, and ends with NaN, which is no JSON."""
    last = '\'[rank0]: 100%%|##|\\r{"step": 100, "loss": %s},\' % ("nan" if lr > 0.3 else loss)'
    says = f'print(\'{{"step": 50, "loss": 1.9}}\')\nprint({last})\n'
    script(tmp_path, BOWL.partition("print(")[0] + says)
    _, ladder = run_bowl(tmp_path)
    assert ladder.choices[-1].point.lr == pytest.approx(0.1, rel=0.2)
    results = open_result("bowl", tmp_path / "results").results
    assert all((r.status is Status.DIVERGED) == (r.trial.lr > 0.3) for r in results)
    assert any(r.status is Status.DIVERGED for r in results)


def test_a_trainer_that_cannot_work_stops_the_sweep_at_once(tmp_path: Path) -> None:
    is_mended = "import os\nis_mended = os.path.exists('mended')\n"
    script(tmp_path, is_mended + BOWL.replace("print(", "is_mended and print("))
    (tmp_path / "bowl.toml").write_text(as_toml(bowl_spec(tmp_path)))
    line = output(tmp_path, "run", "bowl.toml", "--dispatcher", "inline", code=1)
    assert "bowl: stuck: width 8: " in line
    assert "failed as the first 3 trials of width 8 did, so tried once: no result: stdout" in line
    assert "run again to retry them" in line
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    assert "stuck" in output(tmp_path, "status", "bowl")
    (tmp_path / "mended").touch()
    output(tmp_path, "run", "bowl.toml", "--dispatcher", "inline")


@pytest.mark.parametrize(
    ("command", "hashed"),
    [
        (["{python}", "-S", "bowl.py", "--log", "log.txt"], ["bowl.py"]),
        (["torchrun", "--nproc=2", "bowl.py", "other.py"], ["bowl.py"]),
        (["./run", "--log", "log.txt"], ["./run"]),
        (["./run", "bowl.py"], ["./run", "bowl.py"]),
        (["./compiled", "log.txt"], ["./compiled"]),
        (["/bin/sh", "run"], ["run"]),
        (["sh", "-c", "bowl.py"], ["bowl.py"]),
        (["sh", "-c", "python bowl.py"], []),
        (["bowl.py", "log.txt"], []),  # a program of that name on PATH
        (["{python}", "-m", "module", "log.txt", "log.jsonl", "x\ty" * 2000], []),
    ],
)
def test_only_the_script_of_a_command_is_the_trainer(
    command: list[str], hashed: list[str], tmp_path: Path
) -> None:
    texts = {"run": "#!/bin/sh", "other.py": "", "log.txt": "a", "log.jsonl": "", "compiled": "x"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    told = {"command": [*command, "{width}", "{lr}", "{seed}"]}
    comparable = Foreign.of(Spec.from_dict(bowl_spec(tmp_path, trainer=told))).comparable
    found = [key for key in comparable if key.endswith("(hash)")]
    assert found == [f"trainer.{name} (hash)" for name in hashed]


def test_a_file_that_the_trainer_writes_refuses_no_resume(tmp_path: Path) -> None:
    told = {"command": [*COMMAND, "runs.jsonl"]}  # which every run makes longer
    (tmp_path / "runs.jsonl").touch()
    for _ in range(2):
        _, ladder = run_bowl(tmp_path, trainer=told)
        assert ladder.is_finished


@pytest.mark.parametrize("after", [0, 3])
def test_a_script_edited_in_the_middle_makes_no_ladder_of_two_trainers(
    after: int, tmp_path: Path
) -> None:
    """Before a trial starts, or while the fourth runs; the first text goes on with what it has."""
    edit = (
        f"if len(open('runs.jsonl').readlines()) == {after + 1}: open('bowl.py', 'a').write('pass')"
    )
    (tmp_path / "bowl.py").write_text(f"{BOWL}{edit}\n")
    text = (tmp_path / "bowl.py").read_text()
    _, ladder = run_bowl(tmp_path)
    assert "bowl.py has changed since the sweep began; undo the change" in str(ladder.stuck)
    kept = [r for r in open_result("bowl", tmp_path / "results").results if r.loss is not None]
    assert len(kept) == after
    (tmp_path / "bowl.py").write_text(text)
    _, ladder = run_bowl(tmp_path)
    assert ladder.is_finished
    results = open_result("bowl", tmp_path / "results").results
    assert set(kept) <= set(results)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"command": ["nix", *COMMAND]}, "no program nix on PATH"),
        ({"command": ["./nix", *COMMAND]}, "no program .*/nix"),
        ({"folder": "/nowhere"}, "trainer.folder: got '/nowhere', which is no folder"),
    ],
)
def test_a_missing_program_is_said_before_anything_runs(
    trainer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spec = Spec.from_dict(bowl_spec(tmp_path, trainer=trainer))
    with pytest.raises(SpecError, match=message):
        run(spec, Options(tmp_path / "results", dispatcher="inline"), quiet)
    assert not (tmp_path / "results").exists()
    make_plan(spec, probe=False)


def test_a_function_is_imported_for_run_and_not_for_plan(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("OFFSET = 2.0\n")
    module = tmp_path / "mine.py"
    module.write_text("raise RuntimeError('imported')\n")
    trainer = {"command": None, "function": "mine:train", "folder": str(tmp_path)}
    spec = Spec.from_dict(_without_none(bowl_spec(tmp_path, trainer=trainer)))
    options = Options(tmp_path / "results", dispatcher="inline")
    make_plan(spec, probe=False)
    with pytest.raises(SpecError, match="importing it raises RuntimeError: imported"):
        run(spec, options, quiet)
    module.write_text("def train(width, lr): return 1.0\n")
    with pytest.raises(SpecError, match="takes no seed"):
        run(spec, options, quiet)
    module.write_text(
        "import math\nfrom models import OFFSET\n"
        "def train(width, seed, lr):\n    return OFFSET + math.log2(lr / 0.1) ** 2 / 50\n"
    )
    ladder = run(spec, options, quiet).ladder
    assert ladder.is_finished
    module.write_text(module.read_text() + "pass\n")
    with pytest.raises(ResumeError, match=r"trainer\.function \(hash\) was"):
        run(spec, options, quiet)


def test_costs_by_flops_and_a_longer_target(tmp_path: Path) -> None:
    longer = {"trainer": {"steps": 100}, "target": {"width": 32, "steps": 300}}
    assert Foreign.of(Spec.from_dict(bowl_spec(tmp_path, **longer))).target_flops == 300
    by_flops = {"parameters": None, "flops": {"8": 1e9, "16": 4e9, "32": 9e9}}
    given = bowl_spec(tmp_path, **longer, cost=by_flops, compute={"flop_rate": 1e9})
    spec = Spec.from_dict(_without_none(given))
    assert Foreign.of(spec).target_flops == 9e9
    plan, _ = make_plan(spec, probe=False)
    assert plan["target"]["flops"] == 9e9
    assert plan["seconds"]["estimate"] > 1
    assert Ladder(spec).ask()
    refused = Spec.from_dict(bowl_spec(tmp_path, budget={"max_over_target": 0.5}))
    assert "would cost at least" in (make_plan(refused, probe=False)[1] or "")


def test_a_longer_target_rescales_the_decay(tmp_path: Path) -> None:
    decay = {"weight_decay": {"value": 0.3}}
    told = {"command": [*COMMAND, "{weight_decay}"], "steps": 100}
    spec = Spec.from_dict(bowl_spec(tmp_path, axes=decay, trainer=told, target={"steps": 300}))
    ladder = Ladder(spec)
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(trial, loss=2 + (trial.lr - 0.1) ** 2)
    answer = ladder.transfer()
    assert answer.steps == 300
    assert answer.weight_decay == pytest.approx(0.1)
    assert ladder.transfer(steps=100).weight_decay == pytest.approx(0.3)


def test_another_length_of_unknown_steps_is_a_note(tmp_path: Path) -> None:
    ladder = Ladder(Spec.from_dict(bowl_spec(tmp_path)))
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(trial, loss=2 + (trial.lr - 0.1) ** 2)
    plain = ladder.transfer()
    assert not plain.notes
    screen = io.StringIO()
    print_transfer(Console(width=80, file=screen), plain, ladder.spec)
    shown = " ".join(screen.getvalue().split())
    assert "groups none, as the shapes of the parameters are not known" in shown
    assert "--json" not in shown, "which has no groups either"
    assert "trainer.steps does not say" in ladder.transfer(steps=100).notes[0]


def test_a_killed_driver_leaves_nothing_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bowl.toml").write_text(as_toml(bowl_spec(tmp_path)))
    command = [*TELESCOPE, "run", "bowl.toml", "--dispatcher", "inline"]
    runs = tmp_path / "runs.jsonl"
    environment = {**os.environ, "NAP": "0.4", "TELESCOPE_TEST_MARK": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as one:
        deadline = time.monotonic() + 120
        while not runs.exists() or len(runs.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)  # in the middle of the fourth
        one.kill()
    assert not left_over(str(tmp_path), patience=20)
    before = len(runs.read_text().splitlines())
    output(tmp_path, *command[3:])
    trials = open_result("bowl", tmp_path / "results").results
    assert all(result.status is Status.COMPLETE for result in trials)
    assert len(runs.read_text().splitlines()) in (len(trials), len(trials) + 1)
    assert before >= 3


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_cpus_by_width_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 8 on one CPU each, two at once; width 16 on both; the same answer as inline."""
    pytest.importorskip("telescope.dispatch.ray.tune")
    monkeypatch.setenv("NAP", "0.5")
    by_width = {"compute": {"cpus": {"8": 1, "16": 2}, "workers": 2}}
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    spec = Spec.from_dict(bowl_spec(tmp_path, **by_width))
    ran = run(spec, Options(tmp_path / "results"), quiet)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    told = {width: {one["cpus"] for one in runs if one["width"] == width} for width in (8, 16)}
    assert told == {8: {"1"}, 16: {"2"}}
    for width, most in ((8, 2), (16, 1)):
        mine = [one for one in runs if one["width"] == width]
        at_once = max(sum(b["start"] < a["end"] <= b["end"] for b in mine) for a in mine)
        assert at_once == most
        assert len({one["parent"] for one in mine}) <= most, "workers did not stay warm"
    monkeypatch.setenv("NAP", "0")
    other = tmp_path / "other"
    other.mkdir()
    _, reference = run_bowl(other)
    assert ran.ladder.choices == reference.choices
    assert all(r.worker for r in open_result(ran.folder.path, tmp_path / "results").results)


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_ctrl_c_on_ray_leaves_no_command_running(tmp_path: Path) -> None:
    pytest.importorskip("telescope.dispatch.ray.tune")
    (tmp_path / "bowl.toml").write_text(as_toml(bowl_spec(tmp_path)))
    mark = str(tmp_path)
    environment = {**os.environ, "NAP": "100", "TELESCOPE_TEST_MARK": mark}
    with subprocess.Popen(
        [*TELESCOPE, "run", "bowl.toml", "--workers", "1"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    ) as sweep:
        deadline = time.monotonic() + 180
        while not list(tmp_path.glob("results/bowl/logs/*.out")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(sweep.pid, signal.SIGINT)
        assert sweep.stderr is not None
        assert "interrupted; the same command goes on" in sweep.stderr.read()
    assert sweep.returncode == 130
    assert not left_over(mark, patience=20)
