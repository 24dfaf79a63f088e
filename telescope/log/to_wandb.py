"""Weights & Biases: a run per trial, in a group per sweep, with the stage as its job type.

Project, entity, server and mode are wandb's own: WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL,
WANDB_MODE. Its files lie in the results folder unless WANDB_DIR says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import wandb

from telescope.log.records import End, Row, Run

PROJECT = "telescope"
"""The project, unless WANDB_PROJECT names one."""
INIT_SECONDS = 30.0
"""Time limit for the start of a run, after which the server counts as unreachable."""


class WandB:
    """Logs through runs of wandb, several at once."""

    def __init__(self, folder: Path) -> None:
        """Read wandb's settings."""
        self._folder = Path(os.environ.get("WANDB_DIR") or folder)
        asked = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=True,  # they would be of the driver's machine, not of the trial's
            init_timeout=INIT_SECONDS,
            reinit="create_new",
        )
        self._settings = asked
        known = wandb.setup(asked).settings  # with the environment and wandb's own files
        self._project = known.project or PROJECT
        self._is_offline = known.mode in ("offline", "dryrun")
        place = (known.mode, known.base_url, known.entity, self._project)
        self.destination = "/".join(map(str, place))
        self._runs: dict[str, wandb.Run] = {}

    def holds(self, run: Run) -> bool:
        """Tell whether there is a folder of the run, if wandb is offline."""
        pattern = f"wandb/offline-run-*-{run.id}"
        return not self._is_offline or any(self._folder.glob(pattern))

    def open(self, run: Run, after: int) -> None:
        """Start a run or resume it; `wandb sync` puts the parts of an offline one together."""
        self._runs[run.id] = wandb.init(
            project=self._project,
            id=run.id,
            name=run.name,
            group=run.sweep,
            job_type=run.stage,
            tags=[run.kind],
            config=dict(run.config),
            resume="allow",
            dir=str(self._folder),
            settings=self._settings,
        )

    def add(self, run: Run, rows: Sequence[Row]) -> None:
        """Log one row per step."""
        for row in rows:
            self._runs[run.id].log(dict(row.numbers), step=row.step)

    def end(self, run: Run, end: End, step: int) -> None:
        """Set the summary, keep the files as an artifact, and finish: 1 for a failed run."""
        ours = self._runs.pop(run.id)
        ours.summary.update({**end.numbers, "status": end.status, **end.texts})
        for name, path in end.files.items():
            if path.endswith(".png"):
                ours.log({name: wandb.Image(path)}, step=max(step, 0))
        if end.files:
            artifact = wandb.Artifact(f"{run.sweep}-{run.stage}", type=f"telescope-{run.kind}")
            for path in end.files.values():
                artifact.add_file(path)
            ours.log_artifact(artifact)
        ours.finish(exit_code=int(end.status == "failed"))

    def leave(self, run: Run) -> None:
        """Finish as preempted, which the run resumes from."""
        ours = self._runs.pop(run.id)
        ours.mark_preempting()
        ours.finish(exit_code=1)
