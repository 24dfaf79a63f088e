"""The predicted loss of the target run, against numbers by hand and against other routes."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import telescope
from conftest import ROOT
from scipy.integrate import quad
from simulated import Surface
from surfaces import run

from telescope.answer.derive import certificate_of
from telescope.ladder import level
from telescope.ladder.ladder import Ladder
from telescope.ladder.level import Levels, Mixture, extrapolate, levels_of
from telescope.ladder.view import View
from telescope.records import Axis, LadderSpec, PredictedLoss, Result, Trial
from telescope.spec.spec import Spec

QUICKSTART = ROOT / "results" / "reference" / "quickstart"
SPEC = LadderSpec(
    (Axis("lr", 0.004, 0.5, 7), Axis("weight_decay", 0.01, 1.0, 5)),
    (32, 64, 128),
    target_width=256,
    tolerance=1e-5,  # so that no width is left out
    round=6,
)
CENTRE = {"lr": -4.4, "weight_decay": -3.2}


def power(width: float) -> float:
    """A fall of 0.2, 0.15 and 0.1125: by three quarters at each doubling."""
    return 2.0 - 0.8 * (1 - math.pow(0.75, math.log2(width / 32)))


def levels(widths: tuple[int, ...], law: Callable[[float], float], error: float) -> Levels:
    """Levels that are measured with independent errors."""
    values = np.array([law(width) for width in widths])
    return Levels(widths, values, error**2 * np.eye(len(widths)), error, error)


def moments(mixture: Mixture) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = float(mixture.weights @ mixture.means)
    square = float(mixture.weights @ (mixture.variances + mixture.means**2))
    return mean, math.sqrt(square - mean**2)


def ends(mixture: Mixture) -> tuple[float, float]:
    return mixture.quantile(0.05), mixture.quantile(0.95)


def test_a_power_law_is_continued() -> None:
    """0.2, 0.15 and 0.1125 are followed by 0.084375: 1.5375 becomes 1.453125."""
    assert power(256) == pytest.approx(1.5375)
    found = extrapolate(levels((32, 64, 128, 256), power, 1e-4), 512)
    low, high = ends(found)
    assert low < 1.453125 < high
    assert found.quantile(0.5) == pytest.approx(1.453125, abs=0.01)
    assert high - low < 0.08


@pytest.mark.parametrize(("exponent", "departure"), [(0.3, 0.2), (1.0, 0.05)])
def test_one_law_gives_what_least_squares_give(
    exponent: float, departure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unknowns are offset, fall and the departure of each stretch; their priors are rows."""
    monkeypatch.setattr(level, "EXPONENTS", np.array([exponent]))
    monkeypatch.setattr(level, "DEPARTURES", (departure,))
    widths, target, errors = (32, 64, 96, 160), 320, np.array([0.01, 0.02, 0.005, 0.01])
    losses = np.array([2.0, 1.8, 1.75, 1.66])
    found = extrapolate(Levels(widths, losses, np.diag(errors**2), 0, 0), target)

    octaves = np.log2(np.array([*widths, target]) / 32)
    span, scale = octaves[3], math.hypot(losses[0] - losses[3], 0.02)

    def gone(at: float) -> float:
        return float((1 - 2 ** (-exponent * at)) / (1 - 2 ** (-exponent * span)))

    def slope(at: float) -> float:
        whole = 1 - 2 ** (-exponent * span)
        return float(exponent * math.log(2) * 2 ** (-exponent * at) / whole)

    stretches = [
        departure * scale * math.sqrt(quad(lambda at: slope(at) ** 2, a, b)[0])
        for a, b in itertools.pairwise(octaves)
    ]
    rows = np.array(
        [
            [1, -gone(at), *(float(number < place) for number in range(4))]
            for place, at in enumerate(octaves)
        ]
    )
    # Unknowns in units of their priors' standard deviations.
    units = np.array([3 * scale, 3 * scale, *stretches])
    design = np.concatenate([rows[:4] * units / errors[:, None], np.eye(6)])
    wanted = np.concatenate([(losses - losses[3]) / errors, np.zeros(6)])
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    spread = np.linalg.inv(design.T @ design)
    last = rows[4] * units
    mean, deviation = moments(found)
    assert mean == pytest.approx(losses[3] + last @ solution, abs=1e-9)
    assert deviation == pytest.approx(math.sqrt(last @ spread @ last), rel=1e-6)


def test_the_exponents_are_weighed_by_what_the_losses_say() -> None:
    """Falls that halve speak for 1, falls that shrink by a tenth for 0.15."""
    for ratio in (0.5, 0.9):
        falls = 0.1 * ratio ** np.arange(4)
        values = 2 - np.concatenate([[0], np.cumsum(falls)])
        known = Levels((32, 64, 128, 256), values[:4], 1e-8 * np.eye(4), 0, 0)
        found = extrapolate(known, 512)
        weights = found.weights.reshape(len(level.EXPONENTS), -1).sum(axis=1)
        likely = float(weights @ level.EXPONENTS)
        assert likely == pytest.approx(-math.log2(ratio), abs=0.25)
        assert found.quantile(0.5) == pytest.approx(values[4], abs=0.02)


def test_more_widths_narrow_the_interval_and_distance_widens_it() -> None:
    def length(widths: tuple[int, ...], target: int) -> float:
        low, high = ends(extrapolate(levels(widths, power, 0.001), target))
        return high - low

    assert length((32, 64, 128, 256), 512) < length((64, 128, 256), 512)
    assert length((64, 128, 256), 512) < 0.8 * length((128, 256), 512)
    assert length((32, 64, 128), 256) < length((32, 64, 128), 512) < length((32, 64, 128), 1024)


def test_a_measured_width_is_its_own_prediction() -> None:
    low, high = ends(extrapolate(levels((32, 64, 128), power, 0.002), 128))
    assert low < power(128) < high
    assert high - low < 2 * 1.645 * 0.0021
    alone = extrapolate(levels((64,), power, 0.002), 64)
    assert moments(alone)[0] == pytest.approx(power(64))


@pytest.mark.parametrize(("factor", "added"), [(1000.0, 0.0), (1.0, -1.7), (0.01, 5.0)])
def test_the_unit_and_the_zero_of_a_loss_do_not_matter(factor: float, added: float) -> None:
    known = levels((32, 64, 128), power, 0.003)
    other = Levels(
        known.widths, factor * known.losses + added, factor**2 * known.covariance, 0.0, 0.0
    )
    moved = [factor * end + added for end in ends(extrapolate(known, 256))]
    assert ends(extrapolate(other, 256)) == pytest.approx(moved, rel=1e-6)


def test_a_loss_that_rises_or_stays_is_continued_too() -> None:
    rising = extrapolate(levels((32, 64, 128), lambda width: 4 - power(width), 0.003), 256)
    assert rising.quantile(0.5) > 4 - power(128)
    flat = extrapolate(levels((32, 64, 128), lambda _: 2.0, 0.003), 256)
    assert flat.quantile(0.5) == pytest.approx(2.0, abs=1e-6)
    assert 0.005 < flat.quantile(0.95) - 2.0 < 0.05


def surface(seed: int, *, noise: float, widths: tuple[int, ...] = (32, 64, 128)) -> Surface:
    """A surface whose level is `power`."""
    spec = replace(SPEC, widths=widths)
    return Surface(
        spec,
        CENTRE,
        {"lr": 0.01, "weight_decay": 0.005},
        noise=noise,
        cliff=6.0,
        level=power,
        seed=seed,
    )


def predicted(truth: Callable[[Trial], Result], spec: LadderSpec) -> tuple[Ladder, PredictedLoss]:
    ladder = run(truth, spec)
    certificate = ladder.certificate(rule_checked=True)
    assert certificate
    assert certificate.predicted_loss
    return ladder, certificate.predicted_loss


def test_ladders_predict_the_run_at_the_target() -> None:
    inside = 0
    for seed in range(5):
        truth = surface(seed, noise=0.002)
        ladder, prediction = predicted(truth, truth.spec)
        certificate = ladder.certificate()
        assert certificate
        assert prediction.interval
        assert prediction.widths == tuple(choice.width for choice in ladder.choices)
        got = truth(Trial(256, certificate.point, 77)).loss
        assert got
        low, high = prediction.interval
        assert high - low < 0.25
        inside += low <= got <= high
    assert inside >= 4


def test_one_width_predicts_no_loss_but_its_own() -> None:
    truth = surface(0, noise=0.001, widths=(32,))
    _, prediction = predicted(truth, replace(truth.spec, target_width=64))
    assert prediction.loss is None
    assert prediction.interval is None
    assert "one width" in prediction.reason
    _, prediction = predicted(truth, replace(truth.spec, target_width=32))
    assert prediction.loss == pytest.approx(2.0, abs=0.02)


def test_the_luck_of_a_seed_is_averaged_out() -> None:
    """Seed 1 lies 2 % above seed 0 at every point: the level lies between, and is less sure."""
    still = surface(0, noise=0.001)

    def lucky(trial: Trial) -> Result:
        result = still(trial)
        return replace(result, loss=(result.loss or 0) * (1 + 0.02 * (trial.seed == 1)))

    spec = replace(still.spec, widths=(32, 64), seeds=(0, 1))
    known = []
    for truth in (still, lucky):
        view = View(run(truth, spec)._state(), 128)
        known.append((levels_of(view.surface), view.surface.noise))
    (same, _), (moved, noise) = known
    assert moved.losses / same.losses == pytest.approx(1.01, abs=0.004)
    assert moved.shift > 2 * same.shift
    assert moved.shift > 2 * noise


def test_no_loss_is_predicted_for_another_length() -> None:
    spec = Spec.load("quickstart")
    ladder = run(surface(1, noise=0.002), replace(SPEC, tolerance=0.01))
    alike = certificate_of(spec, ladder, rule_checked=True)
    assert alike
    assert alike.predicted_loss
    assert alike.predicted_loss.loss
    longer = certificate_of(spec, ladder, steps=1000, rule_checked=True)
    assert longer
    assert longer.predicted_loss
    assert longer.predicted_loss.loss is None
    assert "own steps alone" in longer.predicted_loss.reason


def test_show_transfer_and_report_say_it(tmp_path: Path) -> None:
    shutil.copytree(QUICKSTART, tmp_path / "made")
    shown = telescope("show", "made", "--results", ".", "--json", cwd=tmp_path)
    found = json.loads(shown.stdout)["target"]["certificate"]["predicted_loss"]
    low, high = found["interval"]
    assert low < found["loss"] < high
    assert found["widths"] == [32, 64, 128]
    assert found["reason"] is None
    handed = telescope("transfer", "made", "--results", ".", "--json", cwd=tmp_path)
    assert json.loads(handed.stdout)["certificate"]["predicted_loss"] == found
    line = (
        f"loss       {found['loss']:.2f} expected at width 256, between {low:.2f} and {high:.2f} "
        "with 90 %"
    )
    shown = telescope("show", "made", "--results", ".", cwd=tmp_path)
    assert line in shown.stdout.splitlines()
    telescope("report", "made", "--results", ".", "--out", "page.html", cwd=tmp_path)
    fact = f"<b>{found['loss']:.2f}</b><span>90 %: {low:.2f} to {high:.2f}</span>"
    assert fact in (tmp_path / "page.html").read_text().replace("\u00a0", " ")
