"""Shapes that real losses have and a bowl has not: one-sided, a plateau, a wall, a tilt."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from calibration import FAMILIES, climb, quickstart_truth, solve, summary
from frozen import Table, public_tables
from simulated import ESSENTIAL, _well
from surfaces import run, surface

from telescope.ladder.certificate import two_minima
from telescope.ladder.fit.data import Data
from telescope.ladder.fit.laws import HYPOTHESES
from telescope.ladder.fit.model import Array, Basis, Frame
from telescope.ladder.fit.surface import Surface as Fit
from telescope.ladder.window import base_grid, marks_per_step, refined, value_at
from telescope.records import Axis, LadderSpec

FRAME = Frame((32, 64, 128), np.array([1.0, 1.0]), np.array([6.0, 6.0]), expected_noise=0.004)
GRID = np.array(list(itertools.product(np.arange(-3.0, 4.0), np.arange(-3.0, 4.0))))


def data(places: Array, losses: Array, widths: Array | int = 32) -> Data:
    n = len(places)
    return Data(
        places,
        np.broadcast_to(np.asarray(widths, dtype=np.int64), n).copy(),
        np.zeros(n, dtype=np.int64),
        losses,
        np.zeros((0, places.shape[1])),
    )


def test_a_well_ends_in_a_plateau_and_in_a_wall() -> None:
    # Far below 2 %, never more; near the optimum 0.5 % per square octave; 2/1.2² (e^3.6 − 4.6).
    assert _well(-30, 0.005, 0.02, 1.2) == pytest.approx(0.02)
    assert _well(-0.01, 0.005, 0.02, 1.2) == pytest.approx(0.005 * 1e-4, rel=1e-3)
    wall = 0.005 * 2 / 1.44 * (math.exp(3.6) - 4.6)
    assert _well(3, 0.005, 0.02, 1.2) == pytest.approx(wall)


def one_sided(places: Array) -> Array:
    """Steep above in the first axis (as public sweeps), plateau and wall in the second, nats."""
    x, y = places[:, 0] - 0.3, places[:, 1] + 0.4
    first = 0.0125 * x**2 * (1 + 0.5 * x / (1 + x**2 / 9))
    second = np.array([_well(float(v), 0.01, 0.03, 1.2) for v in y])
    return np.asarray(2.5 + first + second)


def test_a_plateau_and_a_wall_hardly_move_the_optimum() -> None:
    """A whole grid's fit is biased by up to a third of an octave, which costs 0.05 % of loss."""
    for seed in range(4):
        noise = 0.004 * np.random.default_rng(seed).standard_normal(len(GRID))
        optimum = Fit(FRAME, data(GRID, one_sided(GRID) + noise)).optimum(32)
        low, high = optimum.interval(0)
        assert low - 0.1 <= 0.3 <= high + 0.1
        assert optimum.place == pytest.approx([0.3, -0.4], abs=0.6)
        cost = one_sided(optimum.place[None])[0] / 2.5 - 1
        assert cost < 0.0015


def test_three_points_of_weight_decay_are_honest() -> None:
    """An axis of three points, 3 octaves apart: the interval is long, and holds the optimum."""
    frame = replace(FRAME, step=np.array([1.0, 3.0]))
    places = np.array(list(itertools.product(np.arange(-3.0, 4.0), (-3.0, 0.0, 3.0))))
    optimum = Fit(frame, data(places, one_sided(places))).optimum(32)
    low, high = optimum.interval(1)
    assert low < -0.4 < high
    assert high - low > 0.5


def test_a_bowl_that_deepens_is_noticed_and_carried_to_the_target() -> None:
    """Twice the excess at every doubling: four times at width 128, which was not trained."""
    above = one_sided(GRID) - 2.5
    places, widths = np.concatenate([GRID, GRID]), np.repeat([32, 64], len(GRID))
    alike = Fit(FRAME, data(places, np.concatenate([2.5 + above, 2.3 + above]), widths))
    deeper = Fit(FRAME, data(places, np.concatenate([2.5 + above, 2.3 + 2 * above]), widths))
    assert abs(alike.deepening) < 0.1
    assert deeper.deepening > 0.6
    one, other = (fit.polynomials(128)[:, 2:4].mean() for fit in (alike, deeper))
    assert other > 1.6 * one


def test_every_column_of_the_basis_is_even_or_odd() -> None:
    """Reflecting an axis about the centre changes the sign of its odd columns, and no other."""
    centre = np.array([0.2, -0.7])
    basis = Basis(
        FRAME, centre, np.array([0.02, 0.01]), spread=0.1, height=1.0, reach=np.array([4.0, 5.0])
    )
    places = centre + np.random.default_rng(0).uniform(-4, 4, (20, 2))
    for axis in range(2):
        mirrored = places.copy()
        mirrored[:, axis] = 2 * centre[axis] - places[:, axis]
        sign = np.where(basis.odd[axis, basis.shape], -1, 1)
        assert basis.shapes(mirrored) == pytest.approx(basis.shapes(places) * sign, abs=1e-12)
    assert basis.shapes(centre[None]) == pytest.approx(np.zeros((1, basis.shape_size)))


def test_hypotheses_are_a_distribution() -> None:
    assert sum(h.prior for h in HYPOTHESES) == pytest.approx(1.0)
    assert len({(h.name, h.deepening) for h in HYPOTHESES}) == len(HYPOTHESES)


def test_a_tilted_valley_is_one_minimum() -> None:
    """Two good points of the valley, and a bad one between them off it."""
    u = GRID
    losses = 2 + 0.02 * (u[:, 0] + u[:, 1]) ** 2 + 0.0002 * (u[:, 0] - u[:, 1]) ** 2
    valley = data(u, losses)
    assert two_minima(valley, noise=0.001) == 32
    assert two_minima(valley, 0.001, Fit(FRAME, valley)) is None
    ridge = data(
        u, 2 + 0.02 * np.minimum((u[:, 0] + 2) ** 2, (u[:, 0] - 2) ** 2) + 0.01 * u[:, 1] ** 2
    )
    tilted = data(u, ridge.losses + 0.0005 * u[:, 1])
    assert two_minima(tilted, 0.001, Fit(FRAME, tilted)) == 32


def test_marks_between_lattice_points() -> None:
    decay = Axis("weight_decay", 0.01, 1.0, 3)  # 3.3 octaves a step: quarters
    lr = Axis("lr", 0.01, 0.64, 7)  # one octave: halves
    assert (marks_per_step(decay), marks_per_step(lr)) == (4, 2)
    spec = LadderSpec((lr, decay), (32, 64))
    finer = refined(spec, base_grid(spec), np.array([math.log2(0.04), math.log2(0.1)]))
    assert set(base_grid(spec)["weight_decay"]) <= set(finer["weight_decay"])
    assert finer["weight_decay"] == tuple(value_at(decay, i) for i in range(9))
    assert finer["lr"] == pytest.approx(
        (0.01, 0.02, 0.0282843, 0.04, 0.0565685, 0.08, 0.16, 0.32, 0.64)
    )


def test_an_axis_of_three_points_is_asked_between_them() -> None:
    axes = (Axis("lr", 0.004, 0.5, 7), Axis("weight_decay", 0.01, 1.0, 3))
    spec = LadderSpec(axes, (32, 64, 128), target_width=256)
    truth = FAMILIES["plateau and wall"](0)
    ladder = climb(spec, replace(truth, spec=spec))
    asked = {trial.weight_decay for trial in ladder.stages[0].trials}
    assert asked - set(base_grid(spec)["weight_decay"])
    marks = {value_at(axes[1], i) for i in range(-40, 50)}
    assert asked <= marks
    for stage in ladder.stages:
        for trial in stage.trials:
            assert trial.weight_decay in stage.grid["weight_decay"]


def test_pass_is_a_bound_and_the_certificate_says_so() -> None:
    certificate = run(surface(2, noise=0.001)).certificate(rule_checked=True)
    assert certificate
    assert certificate.verdict == "PASS"
    assert certificate.predicted_excess_loss < certificate.excess_bound <= ESSENTIAL.tolerance
    assert certificate.advice.startswith("use it: ")
    assert certificate.as_dict()["excess_bound"] == certificate.excess_bound
    poor = run(surface(2, noise=0.001), replace(ESSENTIAL, budget=0.6)).certificate()
    assert poor
    assert poor.verdict != "PASS"
    assert poor.excess_bound > poor.predicted_excess_loss
    assert poor.advice


@pytest.mark.parametrize("family", ["plateau and wall", "our grid frozen"])
def test_what_passes_costs_no_more_than_the_tolerance(family: str) -> None:
    """Of a few ladders of each kind; `benchmarks/calibration.py` takes more."""
    (row,) = summary(pd.DataFrame([solve(family, s) for s in range(3)])).to_dict("records")
    assert row["false"] == 0
    assert row["regret"] < 0.002


def test_an_axis_that_the_width_before_shows_keeps_its_value_and_may_pass() -> None:
    """On the quickstart's recorded losses; `test_adaptive` has an axis that no width shows."""
    truth = quickstart_truth(0)
    ladder = climb(truth.spec, truth)
    *_, before, last = (choice.intervals["weight_decay"] for choice in ladder.choices)
    assert before
    assert last is None
    certificate = ladder.certificate(rule_checked=True)
    assert certificate
    assert certificate.verdict == "PASS", certificate.problems
    assert before[0] < certificate.point.weight_decay < before[1]
    (kept,) = (text for text in certificate.evidence if "keeps the width before's" in text)
    assert f"{certificate.point.weight_decay:.4g}" in kept
    assert truth.excess(certificate.point, 256) < certificate.excess_bound < truth.spec.tolerance


def test_the_surface_through_a_table_has_its_optimum_where_the_losses_do() -> None:
    places = GRID
    losses = 2.5 * (1 + 0.005 * ((places - np.array([0.5, -0.5])) ** 2).sum(1))
    losses[places[:, 0] == 3] = np.nan  # a wall
    table = Table(places, losses)
    assert table.best == pytest.approx([0.5, -0.5], abs=0.3)
    assert table.excess(np.array([3.0, 0.0])) > 0.5
    assert table.excess(np.array([-1.0, -0.5])) == pytest.approx(0.005 * 2.25, abs=0.002)


@pytest.mark.skipif(not public_tables("dense"), reason="shared/recorded is not here")
def test_a_public_table_is_found_by_a_ladder() -> None:
    row = solve("public lr x batch", 1)
    assert row["regret"] < 0.003
