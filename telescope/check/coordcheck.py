"""The coordinate check: a few training steps show whether anything grows or shrinks with the width.

Under muP the following have the same size at all widths: every activation, its change since
initialisation, every matrix at initialisation, and every update. A gradient shrinks as 1/width. A
few steps at a few widths show it: log2 of each size against log2 of the width is a line of slope 0.
A wrong width rule, a wrong initialisation, or a model file that scales something by itself gives a
slope of a half or more.

A flat check is necessary, not sufficient: it does not see the effect of weight decay or of AdamW's
eps over a long run, nor of depth.

The idea is from arXiv 2203.03466 App. D.1. Readouts and residual outputs start at zero here, so
nothing hidden moves on step 1; therefore the check measures after steps 3, 10 and 20. At a high
learning rate or on random tokens, even the right rule's logits shrink; therefore the learning rate
is low and constant, and the batches are real.

This module decides what to train. `measure.py` measures one training run, `judge.py` judges the
sizes, `verdict.py` holds the verdict.
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
"""Widths as multiples of the base width, for every ladder."""
STEPS = (3, 10, 20)
SEEDS = (0, 1, 2)
MAX_TOKENS = 2048
"""Most tokens of a step: enough for the weights to move, and cheap."""
CHECK_EPS = 1e-20
"""Largest eps of AdamW in the check. Readouts start at zero, so in the first steps every other
gradient is proportional to lr / width and far smaller than later. An eps that has no effect in a
real run would then damp the updates of wide models more than those of narrow ones, which looks like
a wrong rule (measured: 1e-8 gives the hidden update a slope of -0.58 at lr 1e-4). With almost no
eps, Adam's step is the sign of the gradient, which the rule assumes."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The extent of a check: the full one of `telescope check`, or the short one before a run."""

    width_factors: tuple[int, ...] = WIDTH_FACTORS
    steps: tuple[int, ...] = STEPS
    seeds: tuple[int, ...] = SEEDS

    def widths(self, base_width: int) -> list[int]:
        """Return the widths to train, narrow first."""
        return [factor * base_width for factor in self.width_factors]


SHORT = Extent(steps=(3, 10), seeds=(0, 1))
"""A third of the full check's cost. It keeps all widths, because fewer make the slopes noisier."""


def check_trials(config: TrialConfig, point: Point, extent: Extent) -> list[Trial]:
    """Return the trials of a check, narrow widths first.

    Args:
        config: the sweep's training.
        point: the setting; a swept warm-up is left out, because the check has none.
        extent: the widths and seeds.
    """
    plain = Point.of({axis: value for axis, value in point.items() if axis != "warmup"})
    widths = extent.widths(config.base_width)
    return [Trial(width, plain, seed) for width in widths for seed in extent.seeds]


def check_config(config: TrialConfig, extent: Extent) -> TrialConfig:
    """Return the sweep's training as the check runs it: constant lr, small batches, tiny eps."""
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
        compile=False,  # the check measures through hooks, which a compiled model may skip
    )
    measured = min(config.data.eval_tokens, train.tokens_per_step)
    data = replace(config.data, eval_tokens=measured)
    optimizer = replace(config.optimizer, eps=min(config.optimizer.eps, CHECK_EPS))
    return replace(config, train=train, data=data, optimizer=optimizer, threads_at={})


def coordinate_check(
    config: TrialConfig,
    point: Point,
    extent: Extent = Extent(),
    progress: Callable[[float, float], None] | None = None,
) -> CoordCheck:
    """Train a few steps at a few widths, and judge what grows or shrinks.

    If the verdict is not certain, the check trains as many seeds again.

    Args:
        config: the sweep's training; its decay and data are used as they are.
        point: the setting to train; its lr must be low, see above.
        extent: the widths, steps and seeds to measure.
        progress: called before each run with (cost done, total cost); may raise to end the check.

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
    """Return the modules whose heads are larger at the last width than at the first."""
    narrow, wide = heads[0], heads[-1]
    return tuple(name for name, size in wide.items() if size > narrow.get(name, size))


def _by_quantity(
    measured: Mapping[int, Sequence[Mapping[int, Mapping[Quantity, float]]]], steps: Sequence[int]
) -> dict[Quantity, dict[int, list[list[float]]]]:
    """Map quantity → step → size per width and seed; leave out what some run lacks."""
    everywhere = [seed[step] for seeds in measured.values() for seed in seeds for step in steps]
    found = [each for each in everywhere[0] if all(each in sizes for sizes in everywhere)]
    return {
        quantity: {
            step: [[seed[step][quantity] for seed in seeds] for seeds in measured.values()]
            for step in steps
        }
        for quantity in found
    }
