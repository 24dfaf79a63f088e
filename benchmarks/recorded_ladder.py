"""A dense grid of real training at four widths with several seeds, for replaying ladders on.

    python benchmarks/recorded_ladder.py        about an hour on 2 cores, resumable

Adds to the `mup` rows of `results/reference/width-rules/trials.csv` what a replay needs beyond
them: more seeds at widths 32, 64 and 128, and every weight decay and learning rate at 256. Same
spec, same training; the new rows go to `results/reference/ladder/trials.csv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from width_rules import FOLDER, Grid, Table, check_comparable, load_spec

from telescope.dispatch.ray_tune import run_ray
from telescope.ladder.grid import grid_trials
from telescope.prepare import prepare
from telescope.records import Trial
from telescope.spec import Spec
from telescope.train.loop import TelescopeTrainer

LADDER_FOLDER = FOLDER.parent / "ladder"
SEEDS = {32: (0, 1, 2, 3), 64: (0, 1, 2, 3), 128: (0, 1, 2, 3), 256: (0, 1)}
"""Width → seeds of every cell."""


class DenseGrid(Grid):
    """The trials of the whole grid at all widths, less what the evidence on width rules has."""

    def __init__(self, spec: Spec) -> None:
        """Take what both tables have."""
        table = Table(LADDER_FOLDER / "trials.csv", spec.base_width)
        super().__init__(spec, table, hidden_alone=False)
        evidence = Table(FOLDER / "trials.csv", spec.base_width)
        self.known.update(evidence.results(self.optimizer, self.rule, hidden_alone=False))

    def ask(self) -> Sequence[Trial]:
        """All trials without a result, narrow widths first."""
        return [
            trial
            for width, seeds in SEEDS.items()
            for trial in grid_trials(width, self.grid(), seeds)
            if trial not in self.known
        ]


def main() -> None:
    """Train what the tables miss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    LADDER_FOLDER.mkdir(parents=True, exist_ok=True)
    spec = load_spec("muon", "mup")
    prepared = prepare(spec)
    fields = spec.strict_fields(prepared.trial_config.corpus_digest)
    check_comparable("muon mup", fields)
    run_ray(DenseGrid(spec), TelescopeTrainer(prepared.trial_config), workers=workers)


if __name__ == "__main__":
    main()
