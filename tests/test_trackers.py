"""Trackers' own libraries, offline: what they have kept is read back; `make test-trackers`.

The libraries are an extra of pyproject.toml each. TensorBoard and all that is common to them is in
test_log.py.
"""

from __future__ import annotations

import importlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bowls import BOWL, bowl_spec
from rich.console import Console
from tracked import AXES, PAPER, SPOILT, read_events, run_logged

from telescope import Spec
from telescope.log import sending
from telescope.log.names import PACKAGES
from telescope.report.live import PlainScreen
from telescope.sweep.run import Options, run

pytestmark = [
    pytest.mark.trackers,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # of the libraries, which are read in this process
]


@dataclass
class Kept:
    """A run as a tracker has kept it."""

    stage: str
    config: Mapping[str, str]
    rows: list[tuple[int, str, float]] = field(default_factory=list)
    """Step, name and number, in the order in which they were logged."""
    texts: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    state: str = ""


def of_wandb(place: Path) -> dict[str, Kept]:
    """Runs by name, from the folders of WANDB_MODE=offline."""
    runs: dict[str, Kept] = {}
    for path in sorted((place / "results" / "bowl" / "wandb").glob("offline-run-*/run-*.wandb")):
        name = ""
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.display_name
                config = {item.key: item.value_json for item in record.run.config.update}
                runs.setdefault(name, Kept(record.run.job_type, config))
            elif kind == "history":
                items = {"".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                step = int(items.pop("_step"))
                own = {k: json.loads(v) for k, v in items.items() if not k.startswith("_")}
                numbers = {k: v for k, v in own.items() if isinstance(v, (int, float))}
                runs[name].rows += [(step, key, value) for key, value in numbers.items()]
                runs[name].files |= own.keys() - numbers.keys()
            elif kind == "summary":
                for item in record.summary.update:
                    key = "".join(item.nested_key) or item.key
                    runs[name].texts[key] = str(json.loads(item.value_json))
            elif kind == "exit":
                runs[name].state = str(record.exit.exit_code)
            elif kind == "artifact" or (kind == "request" and record.request.log_artifact.artifact):
                artifact = record.artifact or record.request.log_artifact.artifact
                runs[name].files |= {entry.path for entry in artifact.manifest.contents}
    return runs


def wandb_records(path: Path) -> list[Any]:
    """Read a wandb transaction log: LevelDB's format, blocks of 32 KiB, after seven bytes."""
    record_of = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, found, whole, place = path.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            found.append(record_of.FromString(whole))
            whole = b""
    return found


def of_mlflow(place: Path) -> dict[str, Kept]:
    """Runs by name, from a SQLite store."""
    client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name("bowl")
    runs = {}
    for found in client.search_runs([experiment.experiment_id]):
        tags, id = found.data.tags, found.info.run_id
        kept = Kept(tags["stage"], found.data.params, state=found.info.status)
        for key in found.data.metrics:
            history = client.get_metric_history(id, key)
            kept.rows += [(metric.step, key, metric.value) for metric in history]
        kept.texts = tags
        kept.files = {file.path for file in client.list_artifacts(id)}
        assert found.info.run_name not in runs
        runs[found.info.run_name] = kept
    return runs


def of_trackio(place: Path) -> dict[str, Kept]:
    """Runs by name, from trackio's database."""
    runs: dict[str, Kept] = {}
    with sqlite3.connect(place / "trackio" / "bowl.db") as database:
        for name, config in database.execute("select run_name, config from configs"):
            about = json.loads(config)
            assert name.split(" (")[0] not in runs
            runs[name.split(" (")[0]] = Kept(about["_Group"], about, state="1")
        for name, step, text in database.execute("select run_name, step, metrics from metrics"):
            kept = runs[name.split(" (")[0]]
            said = json.loads(text)
            numbers = {k: v for k, v in said.items() if isinstance(v, (int, float))}
            kept.rows += [(step, key, value) for key, value in numbers.items()]
            kept.texts |= {k: v for k, v in said.items() if isinstance(v, str)}
            kept.files |= {k for k, v in said.items() if isinstance(v, dict)}
        for artifact, name in database.execute(
            "select a.name, l.run_name from run_artifact_links l "
            "join artifact_versions v on v.id = l.artifact_version_id "
            "join artifacts a on a.id = v.artifact_id"
        ):
            runs[name.split(" (")[0]].files.add(artifact)
    database.close()
    return runs


READ: dict[str, Callable[[Path], dict[str, Kept]]] = {
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


@pytest.fixture(params=sorted(READ))
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker that is installed, told to stay on this machine and in this folder."""
    name = str(request.param)
    package = PACKAGES[name]
    if importlib.util.find_spec(package.module) is None:
        pytest.skip(f"{name}: pip install {package.install}")
    for variable, value in {
        "WANDB_MODE": "offline",
        "WANDB_DATA_DIR": str(tmp_path / "wandb-data"),
        "WANDB_CACHE_DIR": str(tmp_path / "wandb-cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "wandb-config"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    # A first import, and MLflow's first tables, take half a minute on a busy machine.
    monkeypatch.setattr(sending, "START_SECONDS", 200.0)
    monkeypatch.setattr(sending, "SILENT_SECONDS", 60.0)
    monkeypatch.setattr(sending, "CLOSE_SECONDS", 240.0)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_sweep_is_kept_whole_and_once(tracker: str, tmp_path: Path) -> None:
    (tmp_path / "bowl.py").write_text(BOWL.replace("noise =", f"{SPOILT}\nnoise ="))
    finished, said = run_logged(tmp_path, log={"to": [tracker]})
    assert tracker not in said, said
    runs = READ[tracker](tmp_path)
    assert runs.keys() == {*(str(result.trial) for result in finished.results), "bowl"}
    for result in finished.results:
        kept = runs[str(result.trial)]
        trial = result.trial
        assert kept.stage == f"width-{trial.width}"
        assert float(kept.config["lr"]) == trial.point["lr"]
        assert (int(kept.config["width"]), int(kept.config["seed"])) == (trial.width, 0)
        assert kept.texts["status"].strip('"') == result.status
        curve = finished.folder.read_curve(trial)
        losses = [(step, value) for step, key, value in kept.rows if key == "held_out_loss"]
        assert losses == [(r.step, r.held_out_loss) for r in curve if r.held_out_loss is not None]
        trained = [(step, value) for step, key, value in kept.rows if key == "train_loss"]
        assert trained == [(r.step, r.train_loss) for r in curve if r.train_loss is not None]
        said_loss = [value for _, key, value in kept.rows if key == "loss"]
        said_loss += [float(kept.texts["loss"])] if "loss" in kept.texts else []
        assert said_loss == ([] if result.loss is None else [result.loss])
        if result.status == "diverged":
            assert kept.texts["reason"].strip('"') == "too slow"
    assert {str(result.status) for result in finished.results} == {"complete", "diverged"}
    answer = runs["bowl"]
    chosen = [(step, value) for step, key, value in answer.rows if key == "choice/lr"]
    assert chosen == [(c.width, c.point["lr"]) for c in finished.ladder.choices]
    assert answer.texts["status"].strip('"') == "finished"
    assert any("answer" in name for name in answer.files), answer.files
    assert any("loss" in name for name in answer.files), "the figure"
    _, said = run_logged(tmp_path, log={"to": [tracker]})
    assert tracker not in said, said
    assert {n: len(k.rows) for n, k in READ[tracker](tmp_path).items()} == {
        n: len(k.rows) for n, k in runs.items()
    }, "the same command adds nothing"


def test_a_sweep_that_was_interrupted_goes_on_in_the_same_runs(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third trial stops the driver after its first rows have been followed."""
    early = "".join(
        f'print(json.dumps({{"step": {step}, "train_loss": 9.0}}), flush=True)\n' for step in (0, 1)
    )
    halt = tmp_path / "halt"
    wait = f"if lr > 0.4 and os.path.exists({str(halt)!r}): sys.exit('halted')\n"
    ends = 'print(json.dumps({"loss": loss, "step": 2}))\n'
    (tmp_path / "bowl.py").write_text(BOWL.split("print(")[0] + early + wait + ends)
    halt.touch()
    first, said = run_logged(tmp_path, log={"to": [tracker]})
    assert first.ladder.stuck
    assert tracker not in said, said
    failed = {str(result.trial) for result in first.results if result.status == "failed"}
    assert failed
    before = READ[tracker](tmp_path)
    assert {before[name].texts["status"].strip('"') for name in failed} == {"failed"}
    if tracker != "trackio":  # it has no state of a run
        assert {before[name].state for name in failed} <= {"FAILED", "1"}
    halt.unlink()
    spec = bowl_spec(tmp_path, log={"to": [tracker]}, axes=AXES, ladder=PAPER)
    options = Options(tmp_path / "results", dispatcher="inline", accept_trainer=True)
    again = run(Spec.from_dict(spec), options, lambda: PlainScreen(Console(quiet=True)))
    assert again.ladder.is_finished
    runs = READ[tracker](tmp_path)
    assert runs.keys() >= before.keys()
    for result in again.results:
        kept = runs[str(result.trial)]
        if result.status == "complete":
            steps = [step for step, key, _ in kept.rows if key == "train_loss"]
            assert steps == [0, 1], "neither again nor missing"
            losses = [(step, value) for step, key, value in kept.rows if key == "held_out_loss"]
            assert losses == [(2, result.loss)]
    for name in failed:
        assert runs[name].texts["status"].strip('"') == "complete"
        assert runs[name].state in ("0", "FINISHED", "1" if tracker == "trackio" else "0")


def test_all_at_once_and_tensorboard(tmp_path: Path, tracker: str) -> None:
    """One tracker's library does not disturb another's: each has a process."""
    finished, said = run_logged(tmp_path, log={"to": [tracker, "tensorboard"]})
    assert "not delivered" not in said, said
    assert len(READ[tracker](tmp_path)) == len(finished.results) + 1
    assert len(read_events(finished.folder.path / "tensorboard")) == len(finished.results) + 1
