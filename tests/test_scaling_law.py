"""Scaling laws fitted to simulated families, against scipy, known truths and M's published laws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.optimize import brentq, least_squares

from telescope.scaling.answer import Measured, Scaling, analysed
from telescope.scaling.laws import PFLOPS_DAY, Array, Form, Law, fit_laws

PARAMETERS = np.array([339.7e6, 545.8e6, 822.1e6, 1146.6e6, 1585.9e6])
TOKENS = np.array([8.92e9, 14.04e9, 20.76e9, 28.54e9, 38.91e9])
PUBLISHED = {"muon": Law(0.0, 2.506, 0.052), "adamw": Law(0.0, 2.608, 0.054)}
"""Figure 1 of arXiv 2502.16982, C in PFLOP/s-days."""
COMPUTE = 6 * PARAMETERS * TOKENS / PFLOPS_DAY

Truth = Callable[[str, float], float]
"""(optimizer, PFLOP/s-days) → loss."""


def published(optimizer: str, compute: float) -> float:
    return float(PUBLISHED[optimizer].loss(compute))


def family(
    truth: Truth,
    computes: Array,
    *,
    noise: float = 0.0,
    luck: float = 0.0,
    seeds: int = 3,
    rng: np.random.Generator | None = None,
    dearer: float = 1.0,
    optimizers: tuple[str, ...] = ("muon", "adamw"),
) -> Measured:
    """Simulate a family; `luck` is what a seed does to all optimizers alike, `dearer` Muon's."""
    rng = rng or np.random.default_rng(0)
    shared = rng.normal(0, luck, (len(computes), seeds))
    compute, losses = {}, {}
    for name in optimizers:
        compute[name] = tuple(computes * (dearer if name == "muon" else 1.0))
        own = rng.normal(0, noise, (len(computes), seeds))
        losses[name] = tuple(
            tuple(truth(name, c) * np.exp(shared[n] + own[n])) for n, c in enumerate(compute[name])
        )
    return Measured(optimizers, compute, losses)


@pytest.mark.parametrize(("constant", "shared"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01])
def test_the_fit_is_scipys(constant: bool, shared: bool, noise: float) -> None:
    """The same least, as a general solver finds it from twelve starts."""
    rng = np.random.default_rng(3)
    compute = np.stack([COMPUTE, 0.97 * COMPUTE])
    truth = [Law(1.2, 1.3, 0.11), Law(1.2, 1.4, 0.12)]
    clean = np.log(np.stack([law.loss(c) for law, c in zip(truth, compute, strict=True)]))
    y = clean + rng.normal(0, 1, clean.shape) * noise
    scale = max(4 * noise, 0.001)
    fit = fit_laws(compute, y[None], Form(constant, shared), scale=scale)

    def off(theta: Array) -> Array:
        head = int(constant)
        least = math.exp(y.min()) / (1 + np.exp(-theta[0])) if constant else 0.0
        levels, exponents = theta[head : head + 2], np.exp(theta[head + 2 :])
        above = np.exp(levels[:, None] - exponents[:, None] * np.log(compute))
        return np.asarray((np.log(least + above) - y).ravel())

    solved = []
    for share, alpha in product([-4, 0, 1, 2], [0.05, 0.2, 0.5]):
        rest = [0.5, 0.5, *[math.log(alpha)] * (1 if shared else 2)]
        start = np.array([share, *rest] if constant else rest)
        limits = {"xtol": 1e-12, "ftol": 1e-14, "max_nfev": 2000}
        solved.append(least_squares(off, start, loss="soft_l1", f_scale=scale, **limits))
    best = min(2 * float(solution.cost) for solution in solved)
    assert fit.cost[0] == pytest.approx(best, rel=1e-3, abs=1e-10)


def test_a_draw_is_fitted_as_if_it_were_alone() -> None:
    rng = np.random.default_rng(4)
    draws = np.log([[published("adamw", c) for c in COMPUTE]]) + rng.normal(0, 0.01, (7, 1, 5))
    together = fit_laws(COMPUTE[None], draws, Form(True, True), scale=0.01)
    for n in range(7):
        alone = fit_laws(COMPUTE[None], draws[n : n + 1], Form(True, True), scale=0.01)
        assert alone.laws(0) == together.laws(n)


def test_one_wild_size_does_not_carry_the_law_away() -> None:
    law = Law(0.0, 0.5, 0.2)
    compute = np.geomspace(1e-8, 1e-5, 8)[None]
    y = np.log(law.loss(compute))
    y[0, 3] += 0.2
    robust = fit_laws(compute, y[None], Form(False, True), scale=0.001).laws(0)[0]
    plain = fit_laws(compute, y[None], Form(False, True), scale=1e6).laws(0)[0]
    at = 1e-6
    errors = [abs(float(one.loss(at)) - float(law.loss(at))) for one in (robust, plain)]
    assert errors[0] < errors[1] / 2


def test_the_published_laws_are_recovered_and_muon_needs_half_the_flops() -> None:
    """As printed, the formulas give 0.44 to 0.49 at the five sizes; the paper says about 0.52."""
    truth = [PUBLISHED["muon"].compute(published("adamw", c)) / c for c in COMPUTE]
    assert truth == pytest.approx([0.44, 0.45, 0.47, 0.48, 0.49], abs=0.005)
    at = 19.0
    assert PUBLISHED["muon"].compute(published("adamw", at)) / at == pytest.approx(0.52, abs=0.002)
    found = analysed(family(published, COMPUTE, noise=0.001, luck=0.001))
    laws = found.power_separate
    assert laws
    for name, law in PUBLISHED.items():
        low, high = laws.exponent[name].interval or (math.nan, math.nan)
        assert low < law.exponent < high
        assert laws.exponent[name].value == pytest.approx(law.exponent, abs=0.003)
        assert laws.factor[name].value == pytest.approx(law.factor, rel=0.003)
    for size, true in enumerate(truth):
        low, high = interval_of(found, size)
        assert low < true < high
        assert high - low < 0.1
    assert found.sentence.startswith("Muon reaches the loss of AdamW's largest size (2.41")
    assert "E may be anything up to" in found.notes[0], "one decade of compute does not show it"


@pytest.mark.parametrize("count", [2, 3])
def test_few_sizes_give_a_power_law_and_say_so(count: int) -> None:
    found = analysed(family(published, COMPUTE[:count]))
    assert found.separate.constant.value == 0
    assert found.power_separate is None
    assert found.separate.exponent["muon"].value == pytest.approx(0.052)
    assert found.separate.factor["adamw"].value == pytest.approx(2.608)
    assert f"{count} sizes do not determine E, which needs 4" in found.notes[0]


def test_one_seed_and_nothing_left_to_show_the_scatter_gives_no_interval() -> None:
    found = analysed(family(published, COMPUTE[:2], seeds=1))
    assert found.ratios[-1].number
    assert found.ratios[-1].number.interval is None
    assert "without a second seed there is no interval" in found.sentence
    assert interval_of(analysed(family(published, COMPUTE[:3], seeds=1)), -1)[0] > 0


def test_one_size_or_one_compute_is_refused() -> None:
    for computes in (COMPUTE[:1], COMPUTE[[0, 0, 0]]):
        with pytest.raises(ValueError, match="needs 2 sizes of different compute"):
            analysed(family(published, computes))


def test_one_optimizer_has_a_law_and_no_ratio() -> None:
    found = analysed(family(published, COMPUTE, optimizers=("muon",)))
    assert found.ratios == ()
    assert found.separate.difference is None
    assert found.power_shared
    assert found.power_shared.exponent["muon"].value == pytest.approx(0.052)
    assert found.sentence == "Muon alone: its law is fitted, and there is nothing to compare"


def test_a_loss_that_does_not_fall_gives_a_flat_law_and_no_crash() -> None:
    found = analysed(family(lambda _, c: 2.0 + 0.001 * math.log(c), COMPUTE, noise=0.001))
    assert found.separate.exponent["muon"].value < 0.01
    assert found.flat == ("muon", "adamw")
    assert [ratio.number for ratio in found.ratios] == [None] * 5
    assert [ratio["value"] for ratio in found.as_dict()["ratios"]] == [None] * 5
    assert found.sentence.startswith("no FLOP ratio: the losses of Muon and AdamW do not surely")


@pytest.mark.parametrize("flat", ["muon", "adamw"])
def test_where_one_optimizer_s_losses_do_not_fall_there_is_no_ratio(flat: str) -> None:
    """Mere noise has a law too, by which any FLOP ratio can come out, or one of 300 digits."""
    found = analysed(
        family(lambda n, c: 2.5 if n == flat else published(n, c), COMPUTE[:3], noise=0.003)
    )
    assert found.flat == (flat,)
    assert "no FLOP ratio" in found.sentence
    assert any(note.startswith("α of") and "may be 0" in note for note in found.notes)
    assert not any(ratio.number or ratio.is_outside for ratio in found.ratios)


def test_a_ratio_beyond_all_measure_is_short() -> None:
    """Muon's law falls so slowly that AdamW's loss needs 10^30 times the FLOPs."""
    flat = {"muon": 0.002, "adamw": 0.1}
    found = analysed(family(lambda n, c: 2.5 * float(c ** -flat[n]), COMPUTE * 10, noise=1e-5))
    assert "with >1000 % of the FLOPs (>1000 to >1000)" in found.sentence


@pytest.mark.parametrize("count", [2, 3, 5])
def test_losses_that_fall_like_a_stone_give_numbers_and_no_crash(count: int) -> None:
    """The computes of tiny models lie close together, and what falls between them is mere noise."""
    computes = np.geomspace(1e-12, 1.1e-12, count)
    measured = family(lambda _, c: 3.0 * (c / 1e-12) ** -60, computes, noise=0.1)
    found = analysed(measured)
    numbers = [*found.ratios, *(laws for laws in (found.shared, found.separate))]
    assert all(math.isfinite(r.number.value) for r in found.ratios if r.number)
    assert "nan" not in repr(numbers).lower()
    json.dumps(found.as_dict(), allow_nan=False)


def test_equal_optimizers_are_inside_the_noise() -> None:
    found = analysed(family(lambda _, c: published("muon", c), COMPUTE, noise=0.003))
    assert found.sentence.startswith("no difference beyond the noise: Muon reaches")
    assert not found.is_separate


def test_exponents_that_differ_are_told_apart() -> None:
    def truth(name: str, compute: float) -> float:
        exponent = {"muon": 0.2, "adamw": 0.1}[name]
        return 1.0 + {"muon": 0.9, "adamw": 1.0}[name] * float(compute**-exponent)

    found = analysed(family(truth, np.geomspace(0.1, 100, 5), noise=0.002))
    assert found.is_separate
    assert "the data ask for separate exponents" in " ".join(found.notes)


def test_a_law_beyond_its_sizes_is_called_so() -> None:
    """Muon at half the loss of AdamW: it would need far less compute than its smallest size."""
    found = analysed(family(lambda n, c: {"muon": 0.5, "adamw": 1.0}[n] * c**-0.1, COMPUTE))
    assert all(ratio.is_outside for ratio in found.ratios)
    assert "by Muon's law beyond its sizes" in found.sentence
    assert "at size 1, 2, 3, 4, 5 the ratio needs Muon's law outside" in found.notes[-1]
    near = analysed(family(published, COMPUTE))
    assert [ratio.is_outside for ratio in near.ratios] == [True, False, False, False, False]


def test_what_a_seed_does_to_both_optimizers_cancels() -> None:
    """Paired seeds: luck that is shared costs the ratio less than luck of each optimizer's."""
    widths = []
    for noise, luck in ((0.0005, 0.005), (0.005, 0.0)):
        measured = family(published, COMPUTE, noise=noise, luck=luck)
        low, high = interval_of(analysed(measured), 2)
        widths.append(high - low)
    assert widths[0] < 0.8 * widths[1]


def interval_of(found: Scaling, size: int) -> tuple[float, float]:
    """The interval of one size's FLOP ratio; NaN where there is none."""
    number = found.ratios[size].number
    return (number and number.interval) or (math.nan, math.nan)


def with_another_constant(name: str, compute: float) -> float:
    above = {"muon": 0.2, "adamw": 0.21}[name] * float(compute**-0.12)
    return {"muon": 1.49, "adamw": 1.5}[name] + above


def of_two_terms(name: str, compute: float) -> float:
    c = compute * (1.8 if name == "muon" else 1.0)
    return 1.2 + 0.12 * float(c**-0.1) + 0.002 * float(c**-0.3)


def of_two_exponents(name: str, compute: float) -> float:
    alpha = {"muon": 0.11, "adamw": 0.13}[name]
    return 1.5 + {"muon": 0.25, "adamw": 0.2}[name] * float(compute**-alpha)


def compute_of(truth: Truth, optimizer: str, loss: float) -> float:
    """The compute at which an optimizer truly has a loss."""
    return math.exp(brentq(lambda c: truth(optimizer, math.exp(c)) - loss, -40.0, 10.0))


@pytest.mark.parametrize("truth", [with_another_constant, of_two_terms, of_two_exponents])
def test_intervals_hold_the_ratio_of_laws_of_other_forms_too(truth: Truth) -> None:
    """Of 40 simulated families of each form, at the middle and the largest size."""
    computes = np.geomspace(1e-8, 3e-6, 5)
    held = {2: 0, 4: 0}
    rng = np.random.default_rng(5)
    for _ in range(40):
        measured = family(truth, computes, noise=0.005, luck=0.003, rng=rng, dearer=1.1)
        found = analysed(measured, draws=100)
        for size in held:
            needed = compute_of(truth, "muon", truth("adamw", computes[size]))
            low, high = interval_of(found, size)
            held[size] += low <= needed / computes[size] <= high
    assert min(held.values()) >= 31, held  # 36 are expected; fewer than 31 in 1 of 70 by chance


def test_a_shared_exponent_that_its_own_test_allows_is_too_sure() -> None:
    """The reason that ratios are of separate exponents: of 40 families like the published one."""
    computes = np.geomspace(1.0, 316.0, 5)
    needed = compute_of(published, "muon", published("adamw", computes[-1])) / computes[-1]
    held = {"separate": 0, "shared where allowed": 0}
    rng = np.random.default_rng(0)
    for _ in range(40):
        measured = family(published, computes, noise=0.005, luck=0.003, rng=rng, dearer=1.1)
        found = analysed(measured, draws=100)
        allowed = found.separate if found.is_separate else found.shared
        for name, laws in zip(held, (found.separate, allowed), strict=True):
            low, high = laws.ratios[-1].interval or (math.nan, math.nan)
            held[name] += low <= needed <= high
    assert held["separate"] >= 31, held
    assert held["shared where allowed"] < 20, held


def test_the_answer_is_a_function_of_the_losses() -> None:
    measured = family(published, COMPUTE, noise=0.005)
    first, again = analysed(measured), analysed(replace(measured))
    assert isinstance(first, Scaling)
    assert first.as_dict() == again.as_dict()
