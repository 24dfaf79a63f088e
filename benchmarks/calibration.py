"""Do 90 % intervals hold the truth 90 times in 100? On simulated surfaces and on recorded grids.

    python benchmarks/calibration.py        a minute or two

Simulated: random surfaces of known optimum; the intervals of every choice of an adaptive ladder.
Recorded: each seed of a grid of real training is fitted alone, and so are the other seeds of the
same width together. The two optima differ by both errors, so the interval of the difference, 1.645
times the root of the summed variances, is to hold 0.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from recorded import load_rows
from simulated import ESSENTIAL, Surface
from width_rules import load_spec

from telescope.ladder.basis import Frame
from telescope.ladder.ladder import Ladder
from telescope.ladder.surface import Data
from telescope.ladder.surface import Surface as Fit
from telescope.ladder.window import octaves

WITHIN = 1.645
"""Standard deviations that hold 90 % of a normal distribution."""


def random_truth(seed: int) -> Surface:
    """A surface of random place, noise, curvature, skew, tilt, drift and cliff."""
    place, shape = np.random.default_rng(seed), np.random.default_rng(5000 + seed)
    optimum = {}
    for axis in ESSENTIAL.swept:
        middle = math.log2(axis.low * axis.high) / 2
        optimum[axis.name] = middle + place.uniform(-1.5, 1.5) * octaves(axis)[0]
    return Surface(
        ESSENTIAL,
        optimum,
        seed=seed,
        noise=10 ** shape.uniform(-3.3, -2),
        drift=shape.normal(0, 0.2),
        exponent=shape.choice([1.0, 0.5]),
        skew=shape.uniform(-0.5, 0.5),
        tilt=shape.uniform(-0.5, 0.5),
        curvature={
            "lr": 0.0039 * 2 ** shape.uniform(-0.5, 2),
            "weight_decay": 0.001 * 2 ** shape.uniform(-1, 2),
        },
        cliff=shape.uniform(2.5, 5),
    )


def simulated(seeds: int) -> Iterator[tuple[str, bool]]:
    """(axis, whether the interval holds the optimum) of every choice that has one."""
    for seed in range(seeds):
        truth, ladder = random_truth(seed), Ladder(ESSENTIAL)
        while trials := ladder.ask():
            for trial in trials:
                ladder.tell(truth(trial))
        for choice in ladder.choices:
            best = truth.best(choice.width)
            for axis, interval in choice.intervals.items():
                if interval:
                    yield axis, interval[0] <= 2 ** best[axis] <= interval[1]


def fitted(rows: pd.DataFrame, width: int) -> Fit:
    """The surface through the recorded trials of one width."""
    axes = load_spec("muon", "mup").ladder_spec.swept
    complete = rows[rows.loss.notna()]
    frame = Frame(
        widths=(width,),
        step=np.array([octaves(axis)[0] for axis in axes]),
        span=np.array([octaves(axis)[1] for axis in axes]),
        expected_noise=ESSENTIAL.expected_noise * float(complete.loss.median()),
    )
    data = Data(
        places=np.log2(complete[[axis.name for axis in axes]].to_numpy(dtype=float)),
        widths=np.full(len(complete), width),
        seeds=complete.seed.to_numpy(dtype=np.int64),
        losses=complete.loss.to_numpy(dtype=float),
        walls=np.zeros((0, len(axes))),
    )
    return Fit(frame, data)


def recorded(
    rules: tuple[str, ...] = ("mup", "paper", "moonlight", "standard"),
) -> Iterator[tuple[str, bool]]:
    """(axis, whether the interval of the difference holds 0) of each seed against the others."""
    for rule in rules:
        rows = load_rows(rule)
        for width in (32, 64, 128) if rule == "mup" else (64, 128):
            here = rows[rows.width == width]
            for seed in sorted(here.seed.unique()):
                one = fitted(here[here.seed == seed], width).optimum(width).draws
                others = fitted(here[here.seed != seed], width).optimum(width).draws
                spread = WITHIN * np.hypot(one.std(0), others.std(0))
                for axis, (apart, within) in enumerate(
                    zip(one.mean(0) - others.mean(0), spread, strict=True)
                ):
                    yield ("lr", "weight_decay")[axis], bool(abs(apart) <= within)


def shares(checks: Iterator[tuple[str, bool]]) -> Mapping[str, Any]:
    """Axis → (share that hold, how many)."""
    table = pd.DataFrame(checks, columns=["axis", "holds"])
    by_axis = {str(axis): (rows.holds.mean(), len(rows)) for axis, rows in table.groupby("axis")}
    return {**by_axis, "all": (table.holds.mean(), len(table))}


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=150)
    seeds = parser.parse_args().seeds
    for name, checks in (("simulated", simulated(seeds)), ("recorded", recorded())):
        for axis, (share, count) in shares(checks).items():
            print(f"{name:10} {axis:13} {share:.1%} of {count}")


if __name__ == "__main__":
    main()
