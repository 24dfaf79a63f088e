"""Dense grids of real training at four widths with several seeds, for replaying ladders on.

    python benchmarks/recorded_ladder.py width-rules    about an hour on 2 cores, resumable
    python benchmarks/recorded_ladder.py quickstart     about two hours on 2 cores, resumable
        [--device cuda --pack 128] [--folder FOLDER]

`width-rules` adds to the `mup` rows of `results/reference/width-rules/trials.csv` what a replay
needs beyond them: more seeds at widths 32, 64 and 128, and every weight decay and learning rate at
256. Same spec, same training; the new rows go to `results/reference/ladder/trials.csv`.

`quickstart` trains the bundled quickstart's model as the quickstart does, at 9 learning rates from
0.008 to 0.25 × 9 weight decays from 0.005 to 2, and writes to
`results/reference/quickstart-ladder/trials.csv`. What matters most comes first: a part is of use.
With --pack the trials of a width train as one model in this process, for an accelerator.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from width_rules import COLUMNS, EVALS, FOLDER, Grid, Table, check_comparable, load_spec

from telescope.dispatch.ray.tune import Size, opened, run_ray
from telescope.ladder.grid import grid_trials, values_at
from telescope.packs.trainer import PackedTrainer
from telescope.records import Axis, Result, Trial
from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.train.loop import TelescopeTrainer

LADDER_FOLDER = FOLDER.parent / "ladder"
SEEDS = {32: (0, 1, 2, 3), 64: (0, 1, 2, 3), 128: (0, 1, 2, 3), 256: (0, 1)}
"""Width → seeds of every cell."""

QUICKSTART_FOLDER = FOLDER.parent / "quickstart-ladder"
QUICKSTART_SEEDS = {32: (0, 1, 2), 64: (0, 1, 2), 128: (0, 1, 2), 256: (0, 1)}
QUICKSTART_AXES = (Axis("lr", 0.008, 0.25, 9), Axis("weight_decay", 0.005, 2.0, 9))
"""Weight decay from where it does nothing to where nothing else counts; of the seven octaves of lr
that the quickstart sweeps the middle five."""
CONTENDER = 0.03
"""A cell whose loss with seed 0 is at most this share above the best of its width is a contender:
near enough to the optimum for a ladder to ask for it, with more seeds too."""


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


class Quickstart:
    """The dense grid of the quickstart, in the order in which a partial recording is worth most."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        """Take what the table has."""
        # Every column but those of the losses along a trial, which are not measured here.
        self.table = Table(folder / "trials.csv", spec.base_width, COLUMNS[:-EVALS])
        self.arm = spec.optimizer.name, spec.optimizer.rule
        self.known: dict[Trial, Result] = dict(self.table.results(*self.arm, hidden_alone=False))
        self.values = {
            axis.name: values_at(axis, width=1, base_width=1, swept=2, centre=axis.low)
            for axis in QUICKSTART_AXES
        }

    def tell(self, result: Result) -> None:
        """Write the row."""
        self.known[result.trial] = result
        self.table.add(*self.arm, result)
        loss = "diverged" if result.loss is None else f"{result.loss:.4f}"
        print(f"{len(self.known)}: {result.trial} {loss} in {result.seconds:.1f} s", flush=True)

    def ask(self) -> list[Trial]:
        """The trials of the first tier that has one without a result; [] when all have."""
        for tier in self._tiers():
            if missing := [trial for trial in tier if trial not in self.known]:
                return missing
        return []

    def _tiers(self) -> Iterator[list[Trial]]:
        """The grid's middle with seed 0, contenders at the widest and with more seeds, the rest.

        A contender of a width is one at the next too. Each tier needs the results of those before.
        """
        *narrow, before, widest = QUICKSTART_SEEDS
        middle = [*self._trials([*narrow, before], seed=0)]
        yield [trial for trial in middle if self._distance(trial) <= 2 or self._on_cross(trial)]
        for seed in (0, 1, 2):
            yield [t for width in narrow for t in self._near(width, [width], seed=seed)]
            yield self._near(narrow[-1], [before], seed=seed)
            if seed in QUICKSTART_SEEDS[widest]:
                yield self._near(before, [widest], seed=seed)
        for width, seeds in QUICKSTART_SEEDS.items():
            for seed in seeds:
                yield self._trials([width], seed=seed)

    def _contenders(self, width: int) -> set[tuple[float, float]]:
        """The points near the best one at a width, by seed 0."""
        losses = {
            (trial.lr, trial.weight_decay): loss
            for trial, result in self.known.items()
            if trial.width == width and trial.seed == 0 and (loss := result.loss) is not None
        }
        best = min(losses.values())
        return {point for point, loss in losses.items() if loss <= best * (1 + CONTENDER)}

    def _near(self, width: int, widths: Sequence[int], *, seed: int) -> list[Trial]:
        """The trials of some widths at the contenders of one."""
        points = self._contenders(width)
        trials = self._trials(widths, seed=seed)
        return [trial for trial in trials if (trial.lr, trial.weight_decay) in points]

    def _trials(self, widths: Sequence[int], *, seed: int) -> list[Trial]:
        """All cells of some widths, from the grid's middle outwards, widths in turn."""
        trials = [trial for width in widths for trial in grid_trials(width, self.values, (seed,))]
        return sorted(trials, key=lambda t: (self._distance(t), t.lr, t.weight_decay, t.width))

    def _places(self, trial: Trial) -> list[int]:
        """Steps of the grid from its middle, per axis."""
        return [
            abs(values.index(trial.point[name]) - len(values) // 2)
            for name, values in self.values.items()
        ]

    def _distance(self, trial: Trial) -> int:
        return max(self._places(trial))

    def _on_cross(self, trial: Trial) -> bool:
        return min(self._places(trial)) == 0


def record_quickstart(options: argparse.Namespace) -> None:
    """Train what the quickstart's table misses, in plain processes of one thread each or packs."""
    options.folder.mkdir(parents=True, exist_ok=True)
    spec = Spec.load("quickstart")
    config = BuiltIn.of(spec).trial_config
    check_comparable("quickstart", spec.strict_fields(config.corpus_digest), options.folder)
    source = Quickstart(spec, options.folder)
    trainer = PackedTrainer(replace(config, device=options.device))
    while trials := source.ask():
        if options.pack > 1:
            results = train_packs(trainer, trials, options.pack)
        else:
            results = train_all(trainer, trials, options.workers)
        for result in results:
            source.tell(result)


def train_packs(trainer: PackedTrainer, trials: Sequence[Trial], size: int) -> Iterator[Result]:
    """Train trials in this process, those of a width as one model."""
    for width in sorted({trial.width for trial in trials}):
        alike = [trial for trial in trials if trial.width == width]
        for first in range(0, len(alike), size):
            yield from trainer.train_pack(alike[first : first + size])


def train_all(trainer: TelescopeTrainer, trials: Sequence[Trial], workers: int) -> Iterator[Result]:
    """Train trials in plain processes, about in their order; results as they come."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(trainer, trial) for trial in trials]):
            yield future.result()


def record_width_rules(options: argparse.Namespace) -> None:
    """Train what the tables of the evidence on width rules miss."""
    LADDER_FOLDER.mkdir(parents=True, exist_ok=True)
    spec = load_spec("muon", "mup")
    prepared = BuiltIn.of(spec)
    fields = spec.strict_fields(prepared.trial_config.corpus_digest)
    check_comparable("muon mup", fields)
    with opened(Size(options.workers)) as session:
        run_ray(DenseGrid(spec), TelescopeTrainer(prepared.trial_config), session)


RECORDINGS = {"width-rules": record_width_rules, "quickstart": record_quickstart}


def main() -> None:
    """Train what a recording misses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recording", choices=RECORDINGS)
    parser.add_argument("--workers", type=int, default=2)
    quickstart = parser.add_argument_group("quickstart only")
    quickstart.add_argument("--device", default="cpu")
    quickstart.add_argument("--pack", type=int, default=1, help="most trials of one model")
    quickstart.add_argument("--folder", type=Path, default=QUICKSTART_FOLDER)
    options = parser.parse_args()
    RECORDINGS[options.recording](options)


if __name__ == "__main__":
    main()
