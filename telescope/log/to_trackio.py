"""Trackio: a project per sweep, and a run per trial, in a group per stage.

Its place is trackio's own: TRACKIO_DIR, or TRACKIO_SPACE_ID or TRACKIO_SERVER_URL. Trackio warns
where others raise; here its warnings are errors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context

import trackio

from telescope.log.records import End, Row, Run

OWN = ("trackio.", "Could not flush", "* Some logs", "Reserved keys")
"""Beginnings of the warnings by which trackio says that something has not been logged."""


class Trackio:
    """Logs through runs of trackio, several at once."""

    def __init__(self, sweep: str) -> None:
        """Name the project: the sweep, unless TRACKIO_PROJECT names another."""
        self._project = os.environ.get("TRACKIO_PROJECT") or sweep
        where = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
        place = [os.environ[name] for name in where if os.environ.get(name)]
        self._is_local = not place
        self.destination = "/".join([*place, self._project])
        self._runs: dict[str, trackio.Run] = {}

    def _name(self, run: Run) -> str:
        """Return the name by which trackio finds a run again: unlike its id, it may be chosen."""
        return f"{run.name} ({run.id[:6]})"

    def holds(self, run: Run) -> bool:
        """Tell whether trackio's database on this machine has the run."""
        names = (known.name for known in trackio.Api().runs(self._project))
        return not self._is_local or self._name(run) in names

    def open(self, run: Run, after: int) -> None:
        """Start or resume a run; in an empty context, for `init` ends the context's latest run."""
        with _warnings_raised():
            self._runs[run.id] = Context().run(
                trackio.init,
                self._project,
                name=self._name(run),
                group=run.stage,
                config=dict(run.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def add(self, run: Run, rows: Sequence[Row]) -> None:
        """Log one row per step."""
        with _warnings_raised():
            for row in rows:
                self._runs[run.id].log(dict(row.numbers), step=row.step)

    def end(self, run: Run, end: End, step: int) -> None:
        """Log the end's numbers and texts at the last step, and its files; then finish."""
        ours = self._runs.pop(run.id)
        said = {**end.numbers, "status": end.status, **end.texts}
        with _warnings_raised():
            pictures = {n: path for n, path in end.files.items() if path.endswith(".png")}
            shown = {name: trackio.Image(path) for name, path in pictures.items()}
            ours.log({**said, **shown}, step=max(step, 0))
            for name, path in end.files.items():
                if name not in pictures:
                    ours.log_artifact(path, name=f"{run.stage}-{name}", type=run.kind)
            ours.finish()

    def leave(self, run: Run) -> None:
        """Finish; the run can be resumed."""
        with _warnings_raised():
            self._runs.pop(run.id).finish()


@contextmanager
def _warnings_raised() -> Iterator[None]:
    """Raise the first warning of trackio's that something has not been logged, at the block's end.

    Raises:
        RuntimeError: with the warning's text.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if str(warning.message).startswith(OWN):
            raise RuntimeError(str(warning.message))
