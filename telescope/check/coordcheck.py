"""The coordinate check: does anything in the model grow or shrink with the width as it trains?

Under muP the size of every activation, of its change since initialisation, of every matrix at the
start and of every update is the same at all widths, and a gradient is as much smaller as the width
is larger. A few steps at a few widths show it: log2 of each size against log2 of the width is a
line, and its slope is 0. A wrong width rule, a wrong initialisation or a model file that scales
something by itself has a slope of a half or more.

A flat check is necessary, not sufficient: it cannot see how decay or AdamW's eps act over a long
run, nor depth.

The idea is that of arXiv 2203.03466 App. D.1. Readout and residual outputs start at zero here, so
nothing hidden moves on step 1: the check looks after steps 3, 10 and 20. At a high learning rate or
on random tokens even the right rule's logits shrink, so the learning rate is low and constant, and
the batches are real.

Here is what is trained, and for how long. `measure.py` measures one training,
`judge.py` judges the sizes, `verdict.py` is what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from telescope.check.judge import is_clear, judge
from telescope.check.measure import measure_sizes, unwatched
from telescope.check.verdict import CoordCheck, Quantity
from telescope.config import TrialConfig
from telescope.records import Point, Trial
from telescope.train.model import build_meta

WIDTH_FACTORS = (1, 2, 4, 8)
"""Widths as multiples of the base width, whatever the ladder."""
STEPS = (3, 10, 20)
SEEDS = (0, 1, 2)
MAX_TOKENS = 2048
"""Tokens of a step, at most: enough to move, and cheap."""
CHECK_EPS = 1e-20
"""AdamW's eps in the check, at most. Readouts start at zero, so in the first steps every other
gradient is a multiple of lr / width, far below what it is later. An eps that a real run never feels
would then damp the wide models' updates more than the narrow ones' and look like a wrong rule
(measured: 1e-8 gives the hidden update a slope of -0.58 at lr 1e-4). Next to no eps leaves Adam's
step the sign that the rule is about."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured: the full check of `telescope check`, or the short one before a run."""

    width_factors: tuple[int, ...] = WIDTH_FACTORS
    steps: tuple[int, ...] = STEPS
    seeds: tuple[int, ...] = SEEDS

    def widths(self, base_width: int) -> list[int]:
        """What is trained, narrow first."""
        return [factor * base_width for factor in self.width_factors]


SHORT = Extent(steps=(3, 10), seeds=(0, 1))
"""A third of the full check's cost. All widths are kept: a shorter lever makes slopes noisier."""


def check_trials(config: TrialConfig, point: Point, extent: Extent) -> list[Trial]:
    """What the check trains, narrow widths first.

    Args:
        config: the sweep's training.
        point: the setting; a swept warm-up is left out, because the check has none.
        extent: which widths and seeds.
    """
    plain = Point.of({axis: value for axis, value in point.items() if axis != "warmup"})
    widths = extent.widths(config.base_width)
    return [Trial(width, plain, seed) for width in widths for seed in extent.seeds]


def check_config(config: TrialConfig, extent: Extent) -> TrialConfig:
    """The sweep's training as the check runs it: constant lr, small batches, next to no eps."""
    length = min(config.train.sequence_length, MAX_TOKENS)
    batch_size = max(1, min(config.train.batch_size, MAX_TOKENS // length))
    train = replace(
        config.train,
        steps=max(extent.steps),
        batch_size=batch_size,
        sequence_length=length,
        schedule="constant",
        warmup=0.0,
        evals=1,
        compile=False,  # what is measured inside the model is measured by hooks
    )
    measured = min(config.data.eval_tokens, train.tokens_per_step)
    data = replace(config.data, eval_tokens=measured)
    optimizer = replace(config.optimizer, eps=min(config.optimizer.eps, CHECK_EPS))
    return replace(config, train=train, data=data, optimizer=optimizer)


def coordinate_check(
    config: TrialConfig,
    point: Point,
    extent: Extent = Extent(),
    progress: Callable[[float, float], None] | None = None,
) -> CoordCheck:
    """Train a few steps at a few widths, and judge what grows or shrinks.

    Where that is not certain, as many seeds again are trained.

    Args:
        config: the sweep's training; its decay and data are used as they are.
        point: the setting to train; its lr must be low, see above.
        extent: how much to measure.
        progress: told before each run how much is done, and of how much; may raise to end it.

    Raises:
        ModelError: the model file fails at one of the widths.
        DataError: the corpus is not the driver's.
    """
    config = check_config(config, extent)
    torch.set_num_threads(config.threads)
    tags = build_meta(config.model, width=config.base_width, base_width=config.base_width).tags
    measured: dict[int, list[Mapping[int, Mapping[Quantity, float]]]] = {}
    heads: dict[int, Mapping[str, int]] = {}

    def measure(extent: Extent) -> CoordCheck:
        trials = check_trials(config, point, extent)
        costs = [trial.width**2 for trial in trials]
        for number, trial in enumerate(trials):
            if progress:
                progress(sum(costs[:number]), sum(costs))
            found = measure_sizes(config, trial, extent.steps)
            measured.setdefault(trial.width, []).append(found.sizes)
            heads[trial.width] = found.unseen_heads
        quantities = _by_quantity(measured, extent.steps)
        check = judge(
            quantities,
            widths=tuple(measured),
            steps=extent.steps,
            seeds=extent.seeds,
            rule=config.optimizer.rule,
            point=point,
        )
        growing = _growing([heads[width] for width in measured])
        return replace(check, unwatched=unwatched(tags, quantities), unseen_heads=growing)

    check = measure(extent)
    if is_clear(check):
        return check
    more = tuple(max(extent.seeds) + 1 + i for i in range(len(extent.seeds)))
    return replace(measure(replace(extent, seeds=more)), seeds=extent.seeds + more)


def _growing(heads: Sequence[Mapping[str, int]]) -> tuple[str, ...]:
    """The modules whose heads are larger in the last of these than in the first."""
    narrow, wide = heads[0], heads[-1]
    return tuple(name for name, size in wide.items() if size > narrow.get(name, size))


def _by_quantity(
    measured: Mapping[int, Sequence[Mapping[int, Mapping[Quantity, float]]]], steps: Sequence[int]
) -> dict[Quantity, dict[int, list[list[float]]]]:
    """Quantity → step → its RMS per width and seed; what is not there every time is left out."""
    everywhere = [seed[step] for seeds in measured.values() for seed in seeds for step in steps]
    found = [each for each in everywhere[0] if all(each in sizes for sizes in everywhere)]
    return {
        quantity: {
            step: [[seed[step][quantity] for seed in seeds] for seeds in measured.values()]
            for step in steps
        }
        for quantity in found
    }
