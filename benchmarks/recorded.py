"""Real training as a loss surface: the recorded grids, between whose cells one can ask.

A cell that was trained with the seed asked for answers with its own loss. Anywhere else the answer
is a thin-plate spline through the seed means of its width, plus the residual of some recorded
trial, the same whenever the same trial is asked for. `leave_one_out` says how well the spline
predicts cells that it was not shown.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from recorded_ladder import LADDER_FOLDER
from scipy.interpolate import RBFInterpolator
from width_rules import EVALS, FOLDER, load_spec

from telescope.records import LadderSpec, Result, Status, Trial
from telescope.sweep.counting import count_costs

CURVE = [f"held_out_{i + 1}" for i in range(EVALS)]


def load_rows(rule: str) -> pd.DataFrame:
    """Muon's recorded trials under one rule, every width and seed that there is."""
    rows = pd.concat(
        [pd.read_csv(FOLDER / "trials.csv"), pd.read_csv(LADDER_FOLDER / "trials.csv")]
    )
    mine = (rows.optimizer == "muon") & rows.rule.isin([rule, "any"])
    return rows[mine].drop_duplicates(["width", "seed", "lr", "weight_decay"])


def ladder_spec(rule: str, *, widths: tuple[int, ...], target: int) -> LadderSpec:
    """The ladder that the recorded grids were made for, costs in target runs."""
    overrides = {"ladder.widths": list(widths), "target.width": target}
    spec = load_spec("muon", rule, *(f"{key}={value}" for key, value in overrides.items()))
    counted = count_costs(spec)
    whole = counted.of_target(spec)
    costs = {w: cost / whole for w, cost in counted.per_trial(spec).items()}
    axes = spec.ladder_spec.axes
    return LadderSpec(axes, widths, target_width=target, costs={**costs, target: 1.0})


@dataclass(frozen=True)
class Recorded:
    """The recorded grids under one rule, as something that answers trials."""

    rows: pd.DataFrame
    draw: int = 0
    """The recorded seed that answers as seed 0; it also decides the residuals that are drawn."""

    @cached_property
    def _cells(self) -> dict[tuple[int, float, float], dict[int, float]]:
        """(width, lr, weight decay) → seed → loss; cells with a divergence are left out."""
        cells: dict[tuple[int, float, float], dict[int, float]] = {}
        columns = ("width", "lr", "weight_decay", "seed", "loss")
        for width, lr, decay, seed, loss in self.rows[list(columns)].to_numpy(dtype=float):
            cells.setdefault((int(width), lr, decay), {})[int(seed)] = loss
        return {
            key: losses for key, losses in cells.items() if np.isfinite([*losses.values()]).all()
        }

    def mean(self, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n, 2) log2 of the cells of a width, and their (n,) seed means."""
        here = {key[1:]: fmean(v.values()) for key, v in self._cells.items() if key[0] == width}
        return np.log2(list(here)), np.array(list(here.values()))

    @cached_property
    def _splines(self) -> dict[int, RBFInterpolator]:
        splines = {}
        for width in sorted({key[0] for key in self._cells}):
            places, means = self.mean(width)
            if len(set(places[:, 1])) > 1:  # else one weight decay: no surface
                splines[width] = RBFInterpolator(places, means, kernel="thin_plate_spline")
        return splines

    @cached_property
    def _residuals(self) -> NDArray[np.float64]:
        """Relative residuals of all recorded trials from their cell's mean, made unbiased."""
        return np.array(
            [
                (loss / fmean(losses.values()) - 1) * math.sqrt(len(losses) / (len(losses) - 1))
                for losses in self._cells.values()
                for loss in losses.values()
                if len(losses) > 1
            ]
        )

    @property
    def noise(self) -> float:
        """Standard deviation between seeds, as a share of the loss."""
        return float(self._residuals.std())

    def smooth(self, point: Mapping[str, float], width: int) -> float:
        """The spline's loss at a point."""
        place = np.log2([[point["lr"], point["weight_decay"]]])
        return float(self._splines[width](place)[0])

    @cached_property
    def _lowest(self) -> dict[int, float]:
        """Width → the spline's lowest loss inside the recorded range."""
        lowest = {}
        for width, spline in self._splines.items():
            places, _ = self.mean(width)
            axes = [np.linspace(places[:, a].min(), places[:, a].max(), 121) for a in (0, 1)]
            grid = np.stack([g.ravel() for g in np.meshgrid(*axes)], axis=1)
            lowest[width] = float(spline(grid).min())
        return lowest

    def excess(self, point: Mapping[str, float], width: int) -> float:
        """The spline's loss at a point above its lowest, as a share of the loss."""
        return self.smooth(point, width) / self._lowest[width] - 1

    def leave_one_out(self, width: int) -> float:
        """RMS error, as a share of the loss, of the spline at cells that it is not shown.

        Of the better half of the cells, those inside the grid's border: where ladders look.
        """
        places, means = self.mean(width)
        inside = (places > places.min(0)) & (places < places.max(0))
        errors = []
        for i in np.flatnonzero(inside.all(axis=1) & (means <= np.median(means))):
            others = np.arange(len(means)) != i
            spline = RBFInterpolator(places[others], means[others], kernel="thin_plate_spline")
            errors.append(float(spline(places[[i]])[0]) / means[i] - 1)
        return float(np.sqrt(np.mean(np.square(errors))))

    def __call__(self, trial: Trial) -> Result:
        """Answer a trial."""
        seeds = self._cells.get((trial.width, trial.lr, trial.weight_decay), {})
        first = self.draw % max(1, len(seeds))  # which of the recorded seeds answers as seed 0
        order = sorted(seeds)[first:] + sorted(seeds)[:first]
        if trial.seed < len(order):
            return Result(trial, Status.COMPLETE, loss=seeds[order[trial.seed]])
        number = zlib.crc32(f"{self.draw} {trial}".encode()) % len(self._residuals)
        loss = self.smooth(trial.point, trial.width) * (1 + self._residuals[number])
        return Result(trial, Status.COMPLETE, loss=loss)
