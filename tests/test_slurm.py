"""Scripts for SLURM, run by a stand-in that gives its variables and signals on this machine."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import typer
from batch_system import Task, directives, sbatch
from bowls import bowl_spec
from commands import output, telescope
from conftest import ROOT, as_toml, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from telescope import Spec, cli
from telescope.errors import SpecError
from telescope.slurm.script import Asked, Job, script
from telescope.sweep import batch

FILES = ROOT / "telescope" / "slurm"
URL = "postgresql+psycopg://me@db/sweeps"
PROGRAM = """
# Stands for Python: says what it is started as, and ends as LASTS and CODE tell it to.
case "$1 $2" in
  -c*get_node_ip_address*) echo 127.0.0.1; exit ;;
  -c*) exit ;;
  *ray.scripts.scripts) verb=ray ;;
  *torch.distributed.run) verb=torchrun ;;
  *) verb=$3 ;;
esac
trap 'trap "" TERM; echo "$verb stopped"; exit 130' TERM
echo "$verb begins: $*"
[[ $* != *--prepare* ]] || exit "${PREPARED:-0}"
for ((tenths = 0; tenths < ${LASTS:-600}; tenths++)); do sleep 0.1; done
echo "$verb ends"
[ "$verb" = worker ] || exit "${CODE:-0}"
"""


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "bowl.toml"
    path.write_text(as_toml(bowl_spec(tmp_path)))
    return path


def written(*options: str, cwd: Path) -> str:
    """The script of `telescope slurm bowl.toml`."""
    output(cwd, "slurm", "bowl.toml", "--out", "job.sbatch", *options)
    return (cwd / "job.sbatch").read_text()


def variable(text: str, name: str, cwd: Path) -> list[str]:
    """A variable of the script as bash reads it."""
    (body,) = (body for path in FILES.glob("[!s]*.sh") if text.endswith(body := path.read_text()))
    show = f"{text.removesuffix(body)}\nprintf '%s\\0' \"${{{name}[@]}}\""
    done = subprocess.run(["bash", "-c", show], cwd=cwd, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


STOPPED = {130, 143}
"""Codes of what a notice has stopped: the program's own, or where bash has missed it, SIGTERM's."""
KINDS = {
    "workers": ("--storage", URL, "--workers", "4"),
    "ray": ("--ray", "--nodes", "2", "--workers", "4"),
    "launch": ("--launch", "--nodes", "2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_script_is_sound_bash(kind: str, spec_file: Path) -> None:
    if kind == "launch":  # a built-in model: the bowl's trainer is started once
        spec_file.write_text((ROOT / "sweeps" / "quickstart.toml").read_text())
        shutil.copytree(ROOT / "models", spec_file.parent.parent / "models", dirs_exist_ok=True)
    written(*KINDS[kind], "--setup", "true", cwd=spec_file.parent)
    path = str(spec_file.parent / "job.sbatch")
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the test extra, not on the path
    checked = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert checked.stdout == ""


def test_every_bash_file_is_of_some_job() -> None:
    assert {path.stem for path in FILES.glob("*.sh")} == {"signals", *KINDS}


def test_the_directives_are_what_was_asked_for(spec_file: Path) -> None:
    options = ("--partition", "gpu", "--account", "team-7", "--time", "1-12:00:00", "--mem", "64G")
    last = ("--sbatch=--qos=high", "--sbatch=--signal=B:USR1@600")
    text = written(*KINDS["workers"], *options, *last, cwd=spec_file.parent)
    assert directives(text) == {
        "job-name": "bowl",
        "output": "%x-%A_%a.out",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@600",
        "array": "0-3",
        "ntasks": "1",
        "cpus-per-task": "1",
        "partition": "gpu",
        "account": "team-7",
        "time": "1-12:00:00",
        "mem": "64G",
        "qos": "high",
    }


def test_resources_are_those_of_the_spec(tmp_path: Path) -> None:
    spec = bowl_spec(tmp_path)
    spec["compute"] = {"workers": 6, "cpus": {8: 2, 16: 4, 32: 4}, "gpus": 0.5}
    (tmp_path / "bowl.toml").write_text(as_toml(spec))
    widths = spec["ladder"]["widths"]
    assert set(widths) <= {8, 16, 32}
    array = directives(written("--storage", URL, cwd=tmp_path))
    assert (array["array"], array["cpus-per-task"]) == ("0-5", str(4 if 16 in widths else 2))
    assert array["gpus-per-task"] == "1", "a worker that joins has whole GPUs"
    (tmp_path / "job.sbatch").unlink()
    text = written("--ray", "--nodes", "2", cwd=tmp_path)
    ray = directives(text)
    cpus = 3 * int(array["cpus-per-task"])  # six trials at once, three on a node
    assert (ray["nodes"], ray["ntasks-per-node"]) == ("2", "1")
    assert (ray["cpus-per-task"], ray["gpus-per-node"]) == (str(cpus), "2")
    start = variable(text, "ray_start", tmp_path)
    assert start[-2:] == [f"--num-cpus={cpus}", "--num-gpus=2"]


def test_the_commands_are_those_of_the_same_environment_and_sweep(spec_file: Path) -> None:
    place = spec_file.parent
    overrides = ("--set", "ladder.seeds=[1]", "--name", "other")
    text = written(*KINDS["workers"], *overrides, "--", "--no-check", cwd=place)
    results, program = str(place / "results"), [sys.executable, "-m", "telescope"]
    assert variable(text, "run", place) == [
        *program,
        *("run", str(spec_file), "--name", "other", "--results", results),
        *("--set", "ladder.seeds=[1]", "--dispatcher", "workers", "--storage", URL),
        *("--workers", "4", "--no-check"),
    ]
    join = ["worker", "other", "--storage", URL, "--results", results, "--wait", "3600"]
    assert variable(text, "worker", place) == [*program, *join]


def test_the_ranks_get_the_manner_and_the_run_the_rest(tmp_path: Path) -> None:
    more = ("--precision", "bf16", "--micro-batch", "4", "--shard", "--steps", "300")
    asked = ("--launch", "--nodes", "2", "--gpus-per-task", "8", "--out", "job.sbatch")
    output(tmp_path, "slurm", "quickstart", *asked, "--", *more)
    text = (tmp_path / "job.sbatch").read_text()
    assert variable(text, "manner", tmp_path) == ["--micro-batch", "4", "--shard"]
    folder = tmp_path / "results" / "quickstart" / "target" / "width-256-steps-300"
    assert variable(text, "folder", tmp_path) == [str(folder)]
    launch = variable(text, "launch", tmp_path)
    assert launch[3:] == [
        *("launch", "quickstart", "--results", str(tmp_path / "results")),
        *("--run", "width-256-steps-300", *more),
    ]
    assert variable(text, "ranks", tmp_path) == ["8"]
    assert directives(text)["gpus-per-node"] == "8"


def test_every_command_is_one_that_telescope_knows(spec_file: Path) -> None:
    """The parser of each verb reads what the script says, to the last option."""
    place, app = spec_file.parent, cast(Any, typer.main.get_command(cli.app))
    for kind, names in (("workers", ["run", "worker"]), ("ray", ["run"]), ("launch", ["launch"])):
        options = KINDS[kind] if kind != "launch" else ("--launch",)
        text = written(*options, cwd=place)
        (place / "job.sbatch").unlink()
        for name in names:
            python, flag, module, verb, *rest = variable(text, name, place)
            assert (python, flag, module, verb) == (sys.executable, "-m", "telescope", name)
            parsed = app.commands[verb].make_context(verb, rest).params
            assert parsed["results"] == place / "results"


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(deadline=None, max_examples=50)
@given(st.lists(words, min_size=1), words.filter(bool))
def test_no_word_is_anything_but_a_word_to_bash(command: list[str], folder: str) -> None:
    job = Job(
        name="x", kind="workers", size=1, cpus=1, gpus=0, folder=Path("/"), variables={"v": command}
    )
    assert variable(script(job), "v", Path("/")) == command
    text = script(Job(**{**vars(job), "folder": Path("/") / folder.replace("/", "_")}))
    assert subprocess.run(["bash", "-n"], input=text.encode(), capture_output=True).stderr == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--storage: is left out"),
        (["--storage", "postgresql://me:secret@db/x", "--workers", "2"], "export PGPASSWORD"),
        (["--ray", "--storage", "postgresql://me:secret@db/x", "--workers", "2"], "has a password"),
        (["--storage", "postgresql://me@db/x?password=secret"], "has a password"),
        (["--storage", "postgresql://me:se/cret@db/x"], "has a password"),
        (["--ray", "--storage", "postgresql://me:a/secret@db:x/y", "--workers", "2"], "a password"),
        (["--storage", "no url", "--workers", "2"], "--storage no url: cannot be opened"),
        (["--storage", "mysql://db/x", "--workers", "2"], "--storage mysql://db/x: "),
        ([*KINDS["workers"], "--nodes", "2"], "--nodes: is of --ray and --launch"),
        (["--launch", "--storage", URL], "--storage: is of a sweep"),
        (["--launch", "--workers", "2"], "--workers: is of a sweep"),
        (["--launch", "--set", "ladder.seeds=[1]"], "--set: is of a sweep"),
        (["--storage", URL], "must be a number for SLURM; use --workers"),
        (["--ray"], "must be a number for SLURM; use --workers"),
        (["--ray", "--launch"], "--ray: is given with --launch"),
        (["--launch", "--nodes", "2"], "the spec's [trainer] is started once, on one node"),
        ([*KINDS["workers"], "--partition", "a b"], "--partition: got 'a b', must be a word"),
        ([*KINDS["workers"], "--time", "4h"], "--time: got '4h', must be minutes, h:mm:ss"),
        ([*KINDS["workers"], "--mem", "much"], "--mem: got 'much'"),
        ([*KINDS["workers"], "--sbatch", "qos"], "must be an option of sbatch on one line"),
        ([*KINDS["workers"], "--setup", "a\nb"], "must be one line; repeat"),
        ([*KINDS["workers"], "--", "--storage", "x"], "--storage: must not be after --"),
        ([*KINDS["workers"], "--", "--precision", "bf16"], "No such option: --precision"),
        (["--launch", "--", "--no-check"], "No such option: --no-check"),
        (["--launch", "--", "--run", "a/b"], "--run: got 'a/b'"),
    ],
)
def test_errors_are_one_line(options: list[str], message: str, spec_file: Path) -> None:
    done = telescope("slurm", "bowl.toml", *options, cwd=spec_file.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert not list(spec_file.parent.glob("*.sbatch"))


def test_all_faults_are_said_at_once_and_an_edited_script_is_kept(spec_file: Path) -> None:
    with pytest.raises(SpecError) as refused:
        Asked(partition="a b", time="soon", mem="much", sbatch=["qos"], setup=[""])
    assert len(refused.value.faults) == 5
    place = spec_file.parent
    said = output(place, "slurm", "bowl.toml", *KINDS["workers"])
    assert said == "wrote bowl.sbatch; next: sbatch bowl.sbatch\n"
    assert output(place, "slurm", "bowl.toml", *KINDS["workers"]) == said, "the same again"
    (place / "bowl.sbatch").write_text("mine")
    again = output(place, "slurm", "bowl.toml", *KINDS["workers"], code=2)
    assert "is there already and is another file" in again
    assert (place / "bowl.sbatch").read_text() == "mine"


@pytest.fixture
def submitted() -> Iterator[list[Task]]:
    """A list of tasks; none of their processes outlives the test."""
    tasks: list[Task] = []
    yield tasks
    for task in tasks:
        task.kill()


@pytest.fixture
def queue(tmp_path: Path, submitted: list[Task]) -> Queue:
    return Queue(tmp_path, submitted)


class Queue:
    """Jobs whose `python` is a bash program, so that they start at once."""

    def __init__(self, place: Path, submitted: list[Task]) -> None:
        self.place, self._submitted = place, submitted

    def submit(self, *setup: str, kind: batch.Kind = "workers", **options: Any) -> list[Task]:
        (self.place / "program").write_text(PROGRAM)
        bowl, built_in = Spec.from_dict(bowl_spec(self.place)), Spec.load("quickstart")
        asked = batch.Batch(
            kind=kind,
            spec=built_in if kind == "launch" else bowl,
            given="bowl",
            results=self.place / "results",
            storage=URL if kind == "workers" else None,
            workers=None if kind == "launch" else 2,
            nodes=1 if kind == "workers" else 2,
            asked=Asked(setup=setup),
            python=("bash", str(self.place / "program")),
        )
        (self.place / "job.sbatch").write_text(script(batch.make_job(asked, options)))
        tasks = sbatch(self.place / "job.sbatch", self.place)
        self._submitted += tasks
        return tasks


def test_near_the_time_limit_a_job_stops_and_asks_for_another_turn(queue: Queue) -> None:
    first, second = queue.submit()
    for task, verbs in ((first.start(), ("run", "worker")), (second.start(), ("worker",))):
        for verb in verbs:
            task.await_line(f"{verb} begins")
        task.warn()
        task.warn()
        assert task.wait() in STOPPED
        assert task.is_requeued
        assert [f"{verb} stopped" in task.said for verb in ("run", "worker")] == [
            "run" in verbs,
            True,
        ]
    assert "run begins" not in second.said


def test_what_is_preempted_or_cancelled_stops_and_asks_for_nothing(queue: Queue) -> None:
    for task in queue.submit():
        task.start().await_line("worker begins")
        task.end()
        assert task.wait() in STOPPED, task.said
        assert not task.is_requeued


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_drivers_code_is_the_jobs_and_its_end_the_workers(code: int, queue: Queue) -> None:
    first, _ = queue.submit(f"export CODE={code} LASTS=5")
    assert first.start().wait(20) == code
    assert not first.is_requeued
    assert "run ends" in first.said
    assert ("worker stopped" in first.said) == (code != 0 and "worker ends" not in first.said)


def test_a_finished_job_needs_no_other_turn(queue: Queue) -> None:
    """Notice and end at once: the driver has its answer."""
    first, _ = queue.submit("export LASTS=3", "trap '' TERM")
    first.start().await_line("run begins")
    first.warn()
    assert first.wait(20) in {0, *STOPPED}
    assert first.is_requeued == (first.shell.returncode != 0)


def test_a_notice_before_anything_has_begun_starts_nothing(queue: Queue) -> None:
    first, second = queue.submit("echo loads; sleep 1; : $UNSET_IN_SOMEBODYS_MODULE")
    for task in (first, second):
        task.start().await_line("loads")
        task.warn()
        assert task.wait(20) == 143
        assert task.is_requeued
        assert "begins" not in task.said


def test_a_ray_cluster_is_up_before_the_driver_and_stays_till_it_has_left(queue: Queue) -> None:
    (task,) = queue.submit(kind="ray")
    task.start().await_line("run begins")
    task.await_line("ray begins")
    head, driver = sorted(line for line in task.said.splitlines() if "begins" in line)
    assert " --head --node-ip-address=127.0.0.1 --port=20700 " in head
    assert driver.endswith(" --ray-address 127.0.0.1:20700")
    task.warn()
    assert task.wait() in STOPPED
    assert task.is_requeued
    assert task.said.index("run stopped") < task.said.index("ray stopped")


def test_a_ray_cluster_ends_with_the_driver(queue: Queue) -> None:
    (task,) = queue.submit(kind="ray")
    task.start().await_line("run begins")
    for process in task.started():
        with suppress(psutil.NoSuchProcess):
            if "--ray-address" in process.cmdline():
                process.terminate()
    assert task.wait() in STOPPED
    assert not task.is_requeued
    assert "ray stopped" in task.said


NOTHING = dict.fromkeys(("width", "steps", "run", *batch.MANNER))


def test_a_torchrun_per_node_trains_the_prepared_run(queue: Queue) -> None:
    (task,) = queue.submit("export LASTS=0", kind="launch", **NOTHING)
    assert task.start().wait() == 0
    prepare, *agents = (line for line in task.said.splitlines() if "begins" in line)
    assert prepare.endswith("--run width-256 --prepare")
    assert len(agents) == 2
    assert len(set(agents)) == 1, "they differ by SLURM's variables alone"
    assert "--nnodes=2 --nproc-per-node=1 " in agents[0]
    assert "--rdzv-endpoint=127.0.0.1:30700 -m telescope.target " in agents[0]
    assert agents[0].endswith("/results/quickstart/target/width-256")


def test_a_run_that_is_refused_starts_no_ranks(queue: Queue) -> None:
    (task,) = queue.submit("export PREPARED=1", kind="launch", **NOTHING)
    assert task.start().wait() == 1
    assert "torchrun" not in task.said


def test_a_target_run_asks_for_another_turn_too(queue: Queue) -> None:
    (task,) = queue.submit(kind="launch", **NOTHING)
    for restart in range(2):
        task.start().await_line(f"--rdzv-id=700-{restart} ")
        task.warn()
        assert task.wait() != 0
        assert task.is_requeued


def answer(place: Path, results: str) -> list[str]:
    """The answer and all trials, without what differs from run to run."""
    shown = json.loads(output(place, "show", "bowl", "--json", "--results", results))
    rows = csv.DictReader(output(place, "show", "bowl", "--csv", "--results", results).splitlines())
    kept = ("width", "seed", "lr", "loss", "status")
    return [json.dumps(shown["target"]), *sorted(str([row[key] for key in kept]) for row in rows)]


def results_of(task: Task, place: Path) -> int:
    """The number of trials that the heartbeat counts."""
    path = place / "results" / "bowl" / "status.json"
    with suppress(OSError, ValueError):
        return int(json.loads(path.read_text())["done"])
    return 0


def await_results(number: int, task: Task, place: Path) -> None:
    end = time.monotonic() + 120
    while results_of(task, place) < number:
        assert time.monotonic() < end, task.said
        time.sleep(0.05)


@pytest.mark.slow
def test_an_interrupted_array_goes_on_and_has_the_answer_of_an_undisturbed_run(
    spec_file: Path, submitted: list[Task]
) -> None:
    """The programs themselves, on SQLite, which workers on one machine may share."""
    place = spec_file.parent
    output(place, "run", "bowl.toml", "--dispatcher", "inline", "--results", "undisturbed")
    storage = f"sqlite:///{place}/shared.db"
    options = ("--storage", storage, "--workers", "2", "--setup", "export NAP=0.3")
    written(*options, cwd=place)
    first, second = sbatch(place / "job.sbatch", place)
    submitted += [first, second]
    first.start()
    second.start()
    await_results(2, first, place)
    first.warn()
    second.end()
    assert {first.wait(), second.wait()} <= STOPPED
    assert (first.is_requeued, second.is_requeued) == (True, False)
    first.start()
    second.start()
    assert (first.wait(900), second.wait()) == (0, 0), first.said + second.said
    assert "going on after" in first.said
    assert answer(place, "results") == answer(place, "undisturbed")


@pytest.mark.slow
def test_an_interrupted_ray_cluster_goes_on(spec_file: Path, submitted: list[Task]) -> None:
    """Ray itself, two nodes of one CPU on this machine."""
    place = spec_file.parent
    output(place, "run", "bowl.toml", "--dispatcher", "inline", "--results", "undisturbed")
    asked = ("--ray", "--nodes", "2", "--workers", "2", "--setup", "export NAP=0.3")
    written(*asked, cwd=place)
    (task,) = sbatch(place / "job.sbatch", place)
    submitted.append(task)
    task.start()
    await_results(2, task, place)
    task.warn()
    assert task.wait() in STOPPED
    assert task.is_requeued
    assert task.start().wait(900) == 0, task.said
    assert "going on after" in task.said
    assert answer(place, "results") == answer(place, "undisturbed")


@pytest.mark.slow
def test_an_interrupted_target_run_goes_on(
    tmp_path: Path, corpus_file: Path, submitted: list[Task]
) -> None:
    """Two torchruns of one rank each."""
    (tmp_path / "tiny.toml").write_text(as_toml(tiny_spec(corpus_file)))
    output(tmp_path, "run", "tiny.toml", "--dispatcher", "inline", "--no-check")
    asked = ("--launch", "--nodes", "2", "--out", "job.sbatch")
    more = ("--steps", "200", "--checkpoint-every", "10", "--unproven")
    output(tmp_path, "slurm", "tiny", *asked, "--", *more)
    (task,) = sbatch(tmp_path / "job.sbatch", tmp_path)
    submitted.append(task)
    task.start().await_line("step 20 of", 900)
    task.warn()
    assert task.wait() != 0
    assert task.is_requeued, task.said
    assert task.start().wait(900) == 0, task.said
    run = tmp_path / "results" / "tiny" / "target" / "width-64-steps-200"
    assert json.loads((run / "result.json").read_text())["step"] == 200
