"""MLflow: an experiment per sweep, and a run per trial with the stage as a tag.

Server or database and experiment are MLflow's own: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from telescope.log.records import End, Row, Run

TAG = "telescope.run"
"""The tag with a run's id, by which it is found again."""
BATCH = 1000
"""Most metrics of a request, by the REST API's limit."""
PAGE = 1000
"""Runs asked for at once."""
REQUESTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Limits of a request to a server that does not answer, unless the user sets others."""


class MLflow:
    """Logs through MLflow's client, several runs at once."""

    def __init__(self, sweep: str) -> None:
        """Find the experiment, or create it."""
        for name, value in REQUESTS.items():
            os.environ.setdefault(name, value)
        uri = mlflow.get_tracking_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or sweep
        self._client = MlflowClient(uri)
        found = self._client.get_experiment_by_name(name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.destination = f"{uri} {name}"
        self._runs = dict(self._known())
        """Run → MLflow's own id of it."""

    def _known(self) -> Iterator[tuple[str, str]]:
        """Yield the runs of the experiment that are ours."""
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`{TAG}` != ''", max_results=PAGE, page_token=token
            )
            yield from ((run.data.tags[TAG], run.info.run_id) for run in page)
            if not (token := page.token):
                return

    def holds(self, run: Run) -> bool:
        """Tell whether the store has the run."""
        return run.id in self._runs

    def open(self, run: Run, after: int) -> None:
        """Create the run with its parameters, or set it to running again."""
        if run.id in self._runs:
            self._client.update_run(self._runs[run.id], status="RUNNING")
            return
        tags = {TAG: run.id, "sweep": run.sweep, "stage": run.stage, "kind": run.kind}
        made = self._client.create_run(self._experiment, tags=tags, run_name=run.name)
        parameters = [Param(key, str(value)) for key, value in run.config.items()]
        self._client.log_batch(made.info.run_id, params=parameters)
        self._runs[run.id] = made.info.run_id

    def add(self, run: Run, rows: Sequence[Row]) -> None:
        """Log the rows' numbers as metrics."""
        self._log(run, _metrics(rows))

    def end(self, run: Run, end: End, step: int) -> None:
        """Log the end's numbers, texts and files, and end the run: FAILED for a failed one."""
        ours = self._runs[run.id]
        self._log(run, _metrics([Row(max(step, 0), end.numbers)]))
        texts = {"status": end.status, **end.texts}
        tags = [RunTag(name, text[:MOST_TEXT]) for name, text in texts.items()]
        self._client.log_batch(ours, tags=tags)
        for path in end.files.values():
            self._client.log_artifact(ours, path)
        self._client.set_terminated(ours, "FAILED" if end.status == "failed" else "FINISHED")

    def leave(self, run: Run) -> None:
        """End the run as killed, until it goes on."""
        self._client.set_terminated(self._runs[run.id], "KILLED")

    def _log(self, run: Run, metrics: Iterable[Metric]) -> None:
        left = list(metrics)
        while left:
            self._client.log_batch(self._runs[run.id], metrics=left[:BATCH])
            del left[:BATCH]


MOST_TEXT = 5000
"""Most characters of a tag, by MLflow's limit."""


def _metrics(rows: Iterable[Row]) -> Iterator[Metric]:
    now = int(time.time() * 1000)
    for row in rows:
        for name, value in row.numbers.items():
            yield Metric(name, value, now, row.step)
