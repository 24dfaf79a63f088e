"""A range that misses the optimum: left in growing steps, said in words, never repeated in vain."""

from __future__ import annotations

import math

import pytest
from simulated import Surface

from telescope.ladder.ladder import Ladder
from telescope.records import Axis, LadderSpec

NOISE = 0.002


def climbed(spec: LadderSpec, lr: float) -> tuple[Ladder, Surface]:
    """A ladder on a skewed surface whose best lr is given, as an octave."""
    truth = Surface(spec, {"lr": lr, "weight_decay": -3.0}, noise=NOISE, cliff=math.inf)
    ladder = Ladder(spec)
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(truth(trial))
    return ladder, truth


def spec_of(low: float, high: float) -> LadderSpec:
    axes = (Axis("lr", 2**low, 2**high, 5), Axis("weight_decay", 0.01, 1.0, 5))
    return LadderSpec(axes, (32, 64), target_width=128, tolerance=0.005)


@pytest.mark.parametrize("off", [-5.0, 5.0])
def test_an_optimum_far_outside_is_found_in_few_rounds(off: float) -> None:
    """Five octaves beyond a range of four: a lattice step at a time would take five rounds."""
    ladder, truth = climbed(spec_of(-8.0, -4.0), -6.0 + off + math.copysign(2.0, off))
    base = ladder.stages[0]
    border = [reason for reason in base.rounds if "at the border" in reason]
    assert 1 <= len(border) <= 4
    certificate = ladder.certificate(rule_checked=True)
    assert certificate is not None
    assert truth.excess(certificate.point, 128) < 0.005


def test_no_seed_is_spent_on_a_point_far_above_the_best() -> None:
    ladder, truth = climbed(spec_of(-8.0, -4.0), -1.0)
    seeds = [trial for stage in ladder.stages for trial in stage.trials if trial.seed]
    assert seeds
    for trial in seeds:
        assert truth.excess(trial.point, trial.width) < 10 * NOISE


@pytest.mark.parametrize(("off", "words"), [(-40.0, "lr is too high"), (40.0, "lr is too low")])
def test_an_optimum_out_of_reach_is_said_in_words(off: float, words: str) -> None:
    ladder, _ = climbed(spec_of(-8.0, -4.0), -6.0 + off)
    certificate = ladder.certificate(rule_checked=True)
    assert certificate is not None
    assert certificate.verdict != "PASS"
    (said,) = [text for text in certificate.problems if words in text]
    tried = [trial.lr for trial in ladder.stages[-1].trials]
    side = max(tried) if off > 0 else min(tried)
    assert f"at or {'above' if off > 0 else 'below'} {side:.3g}" in said
    assert said.endswith(f"move axes.lr.{'high' if off > 0 else 'low'}")
