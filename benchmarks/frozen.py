"""Tables of real losses as ladders: each table's smooth surface, the same at every width or not.

A table holds losses over two axes. Its surface is a thin-plate spline (smoothing 0.3) through
T = log(1 + excess / 5 %) in log2 of the axes; cells that broke down (50 % above the best) are left
out of it and answer for what is nearest to them; outside, the edge's value plus a bowl. So the
shape is real, and the optimum is known. Noise is added anew for every trial.

The public tables (`steplaw_*.csv`) lie outside of the project, in `shared/recorded` beside it or
above it; `public_tables` is empty where they are not.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator, RectBivariateSpline

from telescope.records import Axis, LadderSpec, Result, Status, Trial

Array = NDArray[np.float64]

SCALE = 0.05
"""Excess from which on T grows as the logarithm."""
SMOOTHING = 0.3
BROKEN = 0.5
"""Excess from which on a cell broke down."""
OUTSIDE = 0.005
"""Excess per square octave outside of the table."""
MESH = 0.05
"""Octaves of the mesh on which a spline is evaluated once."""


class Table:
    """The smooth surface through one table of two axes."""

    def __init__(self, places: Array, losses: Array) -> None:
        """Fit the spline.

        Args:
            places: (n, 2) log2 of the axes' values.
            losses: (n,), not finite where a trial diverged.
        """
        best = float(np.nanmin(losses))
        excess = np.where(np.isfinite(losses), losses, np.inf) / best - 1
        broken = excess > BROKEN
        self.places, self.broken = places, broken
        self.values = np.where(np.isfinite(excess), excess, 2.0)
        spline = RBFInterpolator(
            places[~broken],
            np.log1p(excess[~broken] / SCALE),
            kernel="thin_plate_spline",
            smoothing=SMOOTHING,
        )
        self.low, self.high = places.min(0), places.max(0)
        axes = [
            np.linspace(a, b, round((b - a) / MESH) + 1)
            for a, b in zip(self.low, self.high, strict=True)
        ]
        mesh = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        values = spline(mesh).reshape(len(axes[0]), len(axes[1]))
        self._spline = RectBivariateSpline(*axes, values)
        # The optimum lies where cells are, and none that broke down is the nearest.
        allowed = np.array([not self._breaks(place) for place in mesh])
        flat = np.where(allowed, values.ravel(), np.inf)
        self.best: Array = mesh[int(flat.argmin())]
        self._lowest = SCALE * math.expm1(float(flat.min()))

    def _breaks(self, place: Array) -> bool:
        nearest = int(((self.places - place) ** 2).sum(1).argmin())
        return bool(self.broken[nearest])

    def excess(self, place: Array) -> float:
        """Loss above the lowest, as a share of it."""
        inside = np.clip(place, self.low, self.high)
        beyond = OUTSIDE * float(((place - inside) ** 2).sum())
        nearest = int(((self.places - inside) ** 2).sum(1).argmin())
        if self.broken[nearest]:
            return float(self.values[nearest]) + beyond
        smooth = SCALE * math.expm1(float(self._spline(*inside)[0, 0])) - self._lowest
        return max(smooth, 0.0) / (1 + self._lowest) + beyond


@dataclass(frozen=True)
class Frozen:
    """Tables as something that answers trials: one per width, or one as all widths."""

    spec: LadderSpec
    tables: Mapping[int, Table]
    """Width → its table; the widest one's answers for a width that has none."""
    noise: float
    """Standard deviation between seeds, as a share of the loss."""
    seed: int = 0

    def _table(self, width: int) -> Table:
        return self.tables[width if width in self.tables else max(self.tables)]

    @cached_property
    def _names(self) -> list[str]:
        return [axis.name for axis in self.spec.axes]

    def best(self, width: int) -> dict[str, float]:
        """Axis → log2 of its optimum."""
        return dict(zip(self._names, self._table(width).best.tolist(), strict=True))

    def excess(self, point: Mapping[str, float], width: int) -> float:
        """Loss above the lowest, as a share of it."""
        return self._table(width).excess(np.log2([point[name] for name in self._names]))

    def __call__(self, trial: Trial) -> Result:
        """Answer a trial; the noise depends on its content alone."""
        share = zlib.crc32(f"{self.seed} {trial}".encode()) / 2**32
        noise = self.noise * NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9))
        loss = 2.5 * (1 + self.excess(trial.point, trial.width) + noise)
        return Result(trial, Status.COMPLETE, loss=loss)


def folder_of_tables() -> Path | None:
    """`shared/recorded` beside the project or above it."""
    found = (parent / "shared" / "recorded" for parent in Path(__file__).resolve().parents)
    return next((folder for folder in found if folder.is_dir()), None)


@functools.cache
def public_tables(name: str) -> list[tuple[str, pd.DataFrame]]:
    """(cell, rows of lr, second and loss) of `dense` or `moe`; empty without the file."""
    folder = folder_of_tables()
    file = {"dense": "steplaw_dense_part.csv", "moe": "steplaw_moe.csv"}[name]
    if folder is None or not (folder / file).exists():
        return []
    rows = pd.read_csv(folder / file).rename(columns={"batch_size": "second"})
    return [
        (str(cell), part[["lr", "second", "loss"]])
        for cell, part in rows.groupby(["size", "tokens"])
    ]


@functools.cache
def table_of(name: str, number: int) -> Table:
    """The surface of one public cell."""
    rows = public_tables(name)[number][1]
    return Table(
        np.log2(rows[["lr", "second"]].to_numpy(float)), np.asarray(rows.loss, dtype=np.float64)
    )


def grid_table(rows: pd.DataFrame) -> Table:
    """The surface through the seed means of one width's rows of lr, weight_decay and loss."""
    means = rows.groupby(["lr", "weight_decay"]).loss.agg(lambda x: x.mean(skipna=False))
    places = np.log2(np.array(means.index.to_list(), dtype=float))
    return Table(places, np.asarray(means, dtype=np.float64))


def ladder_over(
    table: Table, names: Sequence[str], points: Sequence[int], jitter: Array
) -> LadderSpec:
    """A ladder whose range is the table's, moved by some octaves."""
    axes = tuple(
        Axis(name, float(2 ** (low + by)), float(2 ** (high + by)), count)
        for name, low, high, count, by in zip(
            names, table.low, table.high, points, jitter, strict=True
        )
    )
    return LadderSpec(axes, (256, 512, 1024), target_width=2048)
