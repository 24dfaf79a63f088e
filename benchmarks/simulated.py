"""Simulated loss surfaces with a known optimum, for tests and benchmarks of the ladder.

None has the form that the ladder fits: along an axis the excess loss is a LINEX bowl, exponential
on one side, linear on the other, with a wall of divergence beyond; or, where a `plateau` is given,
a well that ends in a plateau below and in an exponential wall above, as weight decay of Muon has in
recorded sweeps. Loss at width n is

    level(n) · (1 + excess + noise),   excess = Σ_axes κ · 2/a² · (e^(−a x) − 1 + a x)

where x is the distance from the optimum in octaves, κ the curvature in shares of the loss per
square octave and a the skew; each later axis is tilted against the first. κ may deepen with the
width.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from telescope.records import Axis, LadderSpec, Result, Status, Trial

ESSENTIAL_COSTS = {256: 0.04095, 512: 0.09501, 1024: 0.24248, 2048: 0.69494, 2560: 1.0}
"""FLOPs of a run of the published ladder over its target run's: `telescope plan essential-4b`."""
ESSENTIAL = LadderSpec(
    axes=(Axis("lr", 0.0008, 5.3, 8), Axis("weight_decay", 0.0009, 0.85, 8)),
    widths=(256, 512, 1024, 2048),
    target_width=2560,
    costs=ESSENTIAL_COSTS,
)
"""The published geometry, as `sweeps/essential-4b.toml` has it."""


@dataclass(frozen=True)
class Surface:
    """One simulated truth. Distances are in octaves, losses in shares of the level."""

    spec: LadderSpec
    optimum: Mapping[str, float]
    """Axis → log2 of its optimum at base width."""
    curvature: Mapping[str, float] = field(
        default_factory=lambda: {"lr": 0.0039, "weight_decay": 0.001}
    )
    """Share of the loss per square octave; 0.0039 for lr is what 1,911 public runs show
    (arXiv 2503.04715 by way of 2601.05049)."""
    skew: float = 0.4
    """a of the LINEX bowl; positive is steep towards low learning rates."""
    tilt: float = 0.3
    """Octaves by which a later axis's optimum falls per octave of the first."""
    drift: float = 0.0
    """Octaves that the optimum of every axis moves over the first doubling."""
    exponent: float = 1.0
    """p of the law n^−p of the drift; 0 never settles."""
    begins: int = 0
    """Width up to which no optimum moves, and from which they follow the law; 0: the base width."""
    noise: float = 0.003
    """Standard deviation between seeds."""
    cliff: float = 3.0
    """Octaves above the optimal lr beyond which a trial diverges."""
    plateau: Mapping[str, float] = field(default_factory=dict)
    """Axis → what its lowest values cost at most, a share of the loss; it is no LINEX bowl then."""
    wall: float = 1.2
    """Steepness per octave above the optimum of an axis with a plateau."""
    deepening: float = 1.0
    """Curvature at the target over that at base width; a power of the width between."""
    seed: int = 0
    """Of the noise."""
    level: Callable[[int], float] = lambda width: 1.3 + (width / 256) ** -0.31

    def best(self, width: int) -> dict[str, float]:
        """Axis → log2 of its optimum at a width."""
        ratio = max(1.0, width / max(self.begins, self.spec.widths[0]))
        if self.exponent == 0:
            gone = math.log2(ratio)
        else:
            gone = (1 - ratio**-self.exponent) / (1 - 2**-self.exponent)
        return {axis: at + self.drift * gone for axis, at in self.optimum.items()}

    def excess(self, point: Mapping[str, float], width: int) -> float:
        """Loss above the optimum's at a width, as a share of the loss; no noise."""
        best = self.best(width)
        away = {axis: math.log2(point[axis]) - at for axis, at in best.items()}
        first = next(iter(away.values()))
        total = 0.0
        for number, (axis, x) in enumerate(away.items()):
            if number:
                x = -(x + self.tilt * first)  # steep towards high decay
            if axis in self.plateau:
                total += _well(-x, self.curvature[axis], self.plateau[axis], self.wall)
            else:
                total += self.curvature[axis] * _linex(x, self.skew)
        widths = math.log(self.spec.target / self.spec.widths[0])
        deeper = math.log(width / self.spec.widths[0]) / widths if widths else 0.0
        return total * math.pow(self.deepening, deeper)

    def __call__(self, trial: Trial) -> Result:
        """Answer a trial; the noise depends on its content alone."""
        best = self.best(trial.width)
        if math.log2(trial.lr) - best.get("lr", 0.0) > self.cliff:
            return Result(trial, Status.DIVERGED, reason="loss nan")
        share = zlib.crc32(f"{self.seed} {trial}".encode()) / 2**32
        noise = self.noise * NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9))
        loss = self.level(trial.width) * (1 + self.excess(trial.point, trial.width) + noise)
        return Result(trial, Status.COMPLETE, loss=loss)


def _linex(x: float, skew: float) -> float:
    """A bowl with curvature 1 · x² at its minimum, exponential where skew · x is negative."""
    if abs(skew) < 1e-6:
        return x * x
    return 2 / skew**2 * (math.exp(-skew * x) - 1 + skew * x)


def _well(x: float, curvature: float, plateau: float, wall: float) -> float:
    """A bowl with curvature · x² at its minimum, `plateau` far below it, exponential above."""
    if x > 0:
        return curvature * _linex(-x, wall)
    return plateau * -math.expm1(-curvature * x * x / plateau)
