"""The true cost of recorded ladders' answers, by an audit and by the dense grid at the target.

    OMP_NUM_THREADS=1 python benchmarks/audits.py      about a minute

A ladder climbs widths 32, 64 and 128 of a recorded grid (see `level.py`), with each recorded seed
as its first. Its answer at 256 is audited as `telescope audit` does, with the seeds recorded there
in place of fresh ones, and its cost is read off the smooth surface through the whole grid at 256
too. Writes `recorded.md` to `results/reference/target/`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from calibration import climb
from frozen import grid_table
from level import AXES, OUT, Seeds, tables

from telescope.files import write_atomic
from telescope.ladder.audit import FIRST_SEED, neighbours_of, trials_of_audit, verdict_of
from telescope.records import Axis, LadderSpec, Result, Status

WIDTHS, TARGET = (32, 64, 128), 256
TOLERANCE = 0.005
"""The quickstart's."""
FEWEST = 5
"""Weight decays of a grid that can say what an answer between its cells costs."""


def lines() -> Iterator[str]:
    """The table in Markdown."""
    yield "| ladder | answer: lr, weight decay | certificate, at most % | audit: costs % "
    yield "| it says | by the dense grid, % |\n|---|---|---|---|---|---|\n"
    for name, rows, _ in tables():
        here = rows[rows.width == TARGET]
        if here.weight_decay.nunique() < FEWEST:  # a spline between so few is a guess
            continue
        dense = grid_table(here)
        axes = tuple(
            Axis(axis, rows[axis].min(), rows[axis].max(), min(rows[axis].nunique(), 7))
            for axis in AXES
        )
        spec = LadderSpec(axes, WIDTHS, target_width=TARGET, tolerance=TOLERANCE, until_proven=True)
        for first in sorted(rows[rows.width == WIDTHS[-1]].seed.unique()):
            truth = Seeds(rows, spec, int(first))
            certificate = climb(spec, truth).certificate(rule_checked=True)
            if certificate is None:
                continue
            answer, seeds = certificate.point, sorted(here.seed.unique())
            count = len(seeds) * (1 + len(neighbours_of(spec, answer)))
            results = [
                Result(
                    trial,
                    Status.COMPLETE,
                    loss=truth.loss(TARGET, trial.point, int(seeds[trial.seed - FIRST_SEED])),
                )
                for trial in trials_of_audit(spec, answer, count)
            ]
            found = verdict_of(spec, answer, results, certificate.excess_bound)
            excess, error = 100 * (found.excess or 0.0), 100 * (found.error or 0.0)
            true = 100 * dense.excess(np.log2([answer[axis] for axis in AXES]))
            yield (
                f"| {name} from seed {first} | {answer.lr:.4f}, {answer.weight_decay:.3f} "
                f"| {certificate.verdict}, {100 * certificate.excess_bound:.2f} "
                f"| {excess:.2f} ± {error:.2f} | {found.verdict} | {true:.2f} |\n"
            )


def main() -> None:
    """Write the table."""
    text = "".join(lines())
    write_atomic(OUT / "recorded.md", text)
    print(text)


if __name__ == "__main__":
    main()
