"""The fitted surface against bowls whose parameters were written by hand, and against itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from telescope.ladder.fit.acquisition import Candidates, pick
from telescope.ladder.fit.data import Data, walled
from telescope.ladder.fit.laws import LAWS
from telescope.ladder.fit.model import Array, Frame
from telescope.ladder.fit.priors import MISFIT, SEED_SHIFT
from telescope.ladder.fit.surface import Surface

FRAME = Frame((32, 64, 128), np.array([1.0, 2.0]), np.array([6.0, 6.0]), expected_noise=0.006)
OPTIMUM = np.array([-4.3, -2.5])
CURVATURE = np.array([0.02, 0.006])
GRID = np.array(list(itertools.product(np.arange(-7.0, -1.0), np.arange(-6.0, 1.0, 2.0))))


def bowl(places: Array, *, noise: float = 0.0, seed: int = 0) -> Array:
    """2 + 0.02 x² + 0.006 y² + 0.004 x y around the optimum, nats."""
    x = places - OPTIMUM
    loss = 2.0 + (CURVATURE * x**2).sum(1) + 0.004 * x[:, 0] * x[:, 1]
    return np.asarray(loss + noise * np.random.default_rng(seed).standard_normal(len(x)))


def data(places: Array, losses: Array, *, width: int = 32, walls: Array | None = None) -> Data:
    return Data(
        places=places,
        widths=np.full(len(places), width),
        seeds=np.zeros(len(places), dtype=np.int64),
        losses=losses,
        walls=np.zeros((0, 2)) if walls is None else walls,
    )


def test_an_exact_bowl_is_found_exactly() -> None:
    surface = Surface(FRAME, data(GRID, bowl(GRID)))
    optimum = surface.optimum(32)
    assert optimum.place == pytest.approx(OPTIMUM, abs=0.05)
    assert surface.curvature == pytest.approx(CURVATURE, rel=0.1)
    for axis in range(2):
        low, high = optimum.interval(axis)
        assert low <= OPTIMUM[axis] <= high
        assert high - low < 0.5
    assert surface.loss_at(32, OPTIMUM) == pytest.approx(2.0, abs=0.002)


@pytest.mark.parametrize("noise", [0.002, 0.006, 0.02])
def test_noise_is_measured_and_widens_the_interval(noise: float) -> None:
    fits = [Surface(FRAME, data(GRID, bowl(GRID, noise=noise, seed=s))) for s in range(6)]
    assert np.mean([fit.noise for fit in fits]) == pytest.approx(noise, rel=0.4)
    lengths = [np.subtract(*fit.optimum(32).interval(0)[::-1]) for fit in fits]
    quiet = np.subtract(*Surface(FRAME, data(GRID, bowl(GRID))).optimum(32).interval(0)[::-1])
    assert np.mean(lengths) > quiet


def test_a_flat_axis_has_an_interval_as_wide_as_its_support() -> None:
    flat = 2.0 + 0.02 * (GRID[:, 0] - OPTIMUM[0]) ** 2
    noisy = flat + 0.004 * np.random.default_rng(1).standard_normal(len(GRID))
    low, high = Surface(FRAME, data(GRID, noisy)).optimum(32).interval(1)
    assert high - low > 0.5 * FRAME.span[1]


def test_a_seed_that_shifts_all_points_alike_moves_nothing() -> None:
    again = GRID[::3]
    places = np.concatenate([GRID, again])
    losses = np.concatenate([bowl(GRID), bowl(again) + 0.05])
    seeds = np.repeat([0, 1], [len(GRID), len(again)])
    widths = np.full(len(places), 32)
    surface = Surface(FRAME, Data(places, widths, seeds, losses, np.zeros((0, 2))))
    assert surface.optimum(32).place == pytest.approx(OPTIMUM, abs=0.1)


def test_a_reflected_axis_reflects_everything() -> None:
    losses, flip = bowl(GRID, noise=0.004), np.array([-1.0, 1.0])
    walls = np.array([[-1.0, -2.0]])
    plain = Surface(FRAME, data(GRID, losses, walls=walls))
    mirrored = Surface(FRAME, data(GRID * flip, losses, walls=walls * flip))
    for width in FRAME.widths:
        one, other = plain.optimum(width), mirrored.optimum(width)
        assert other.place == pytest.approx(one.place * flip, abs=1e-9)
        assert other.interval(0) == pytest.approx([-x for x in one.interval(0)[::-1]], abs=1e-9)
        assert other.excess.mean() == pytest.approx(one.excess.mean(), rel=1e-9)


def test_nothing_lies_beyond_a_wall() -> None:
    # From lr 2^-4.5 on trials diverged: the bowl's own optimum, at -4.3, is out of reach.
    line = Frame((32, 64), np.array([0.5]), np.array([6.0]), expected_noise=0.006)
    left = np.arange(-7.0, -4.5, 0.5)[:, None]
    losses = 2.0 + 0.02 * (left[:, 0] - OPTIMUM[0]) ** 2
    surface = Surface(line, data(left, losses, walls=np.array([[-4.5]])))
    for width in line.widths:
        assert surface.optimum(width, margin=2.0).place[0] < -4.5
    beyond = walled(np.array([[-5.0], [-4.5], [0.0]]), np.array([[-4.5]]), surface.centre)
    assert beyond.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("law", "expected"), [(0, [0, 1, 1.5]), (1, [0, 1, 1.7071]), (2, [0, 1, 2])]
)
def test_laws_of_drift(law: int, expected: list[float]) -> None:
    # 1 − 1/4 = 1.5 · (1 − 1/2); (1 − 1/2) / (1 − 1/√2) = 1 + 1/√2; log2(4) = 2.
    got = [LAWS[law].progress(width, 32) for width in (32, 64, 128)]
    assert got == pytest.approx(expected, abs=1e-4)


def test_a_drift_is_followed_to_a_width_that_was_not_trained() -> None:
    """Optima at -4.3, -4.1 and, by 1/width, -4.0 at width 128."""
    shifted = GRID - np.array([0.2, 0.0])
    places, widths = np.concatenate([GRID, GRID]), np.repeat([32, 64], len(GRID))
    losses = np.concatenate([bowl(GRID), bowl(shifted) - 0.1])
    zeros = np.zeros(len(places), dtype=np.int64)
    surface = Surface(FRAME, Data(places, widths, zeros, losses, np.zeros((0, 2))))
    assert surface.optimum(64).place[0] == pytest.approx(-4.1, abs=0.05)
    assert surface.optimum(128).place[0] == pytest.approx(-4.0, abs=0.1)
    low, high = surface.optimum(128).interval(0)
    assert low < -4.0 < high
    assert high - low > np.subtract(*surface.optimum(64).interval(0)[::-1])


@pytest.mark.parametrize("width", [32, 64])
def test_picks_are_those_of_a_plain_search(width: int) -> None:
    """Greedy choice by covariances against conditioning on each candidate by regression.

    Of width 64, which has no loss yet, only differences between its losses say anything.
    """
    surface = Surface(FRAME, data(GRID[::2], bowl(GRID[::2], noise=0.004)))
    places = np.array(list(itertools.product((-6.0, -4.5, -3.0), (-4.0, -1.0))))
    aim = surface.optimum(128).draws
    wanted = (aim - aim.mean(0)) * np.sqrt(surface.curvature)
    repeats = np.array([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    picks = pick(surface, [Candidates(width, places, repeats, cost=1.0)], wanted, 2)
    shapes = surface.polynomials(width) @ surface.basis.shapes(places).T
    mean = shapes.mean(0)
    error = surface.noise**2 * (1 + SEED_SHIFT**2 * repeats)
    error += (np.mean(MISFIT) * (mean - mean.min())) ** 2
    known = width in surface.data.seen
    losses = shapes + surface.levels(width)[:, None] if known else shapes - shapes.mean(1)[:, None]

    def left_over(chosen: list[int]) -> float:
        """Curvature-weighted variance of the aim that knowing some losses leaves."""
        x = losses[:, chosen] - losses[:, chosen].mean(0)
        y = (aim - aim.mean(0)) * np.sqrt(surface.curvature)
        gram = x.T @ x / len(x) + np.diag(error[chosen])
        cross = x.T @ y / len(x)
        return float((y**2).mean(0).sum() - np.trace(cross.T @ np.linalg.solve(gram, cross)))

    first = min(range(6), key=lambda i: left_over([i]))
    second = min((i for i in range(6) if i != first), key=lambda i: left_over([first, i]))
    assert [p.index for p in picks] == [first, second]
    before = left_over([first]) - left_over([first, second])
    assert picks[1].gain == pytest.approx(before, rel=1e-6)
