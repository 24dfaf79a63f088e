"""Certificates against the truth, on surfaces whose optimum at the target is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from calibration import random_truth
from simulated import ESSENTIAL
from surfaces import run, surface

from telescope.ladder.certificate import two_minima
from telescope.ladder.fit.data import Data
from telescope.ladder.ladder import Ladder
from telescope.records import Certificate, Result, Status, Trial


def certify(ladder: Ladder, *, rule_checked: bool = True) -> Certificate:
    certificate = ladder.certificate(rule_checked=rule_checked)
    assert certificate
    return certificate


def surfaces(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test on a few surfaces, and on many in the slow suite: a ladder costs a second."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@surfaces(6, 12)
def test_a_good_ladder_passes_and_keeps_its_promise(count: int) -> None:
    """Over random surfaces with a right rule: what passes costs what was predicted, or little."""
    passed = 0
    for seed in range(count):
        truth = random_truth(seed)
        certificate = certify(run(truth))
        if certificate.verdict == "PASS":
            passed += 1
            assert truth.excess(certificate.point, 2560) < 3 * ESSENTIAL.tolerance
        assert certificate.verdict != "FAIL"
    assert passed >= 5 * count // 12


def test_the_certificate_says_what_it_knows() -> None:
    truth = surface(2, noise=0.001)
    ladder = run(truth)
    certificate = certify(ladder)
    assert certificate.verdict == "PASS"
    assert certificate.width == 2560
    assert certificate.predicted_excess_loss <= ESSENTIAL.tolerance
    assert certificate.problems == ()
    for axis, interval in certificate.intervals.items():
        assert interval
        assert interval[0] < certificate.point[axis] < interval[1]
    text = "\n".join(certificate.evidence)
    for word in (
        "trials at width 256, 512, 1024",
        "noise between seeds",
        "factor of two",
        "predicted",
    ):
        assert word in text
    assert len(certificate.assumptions) == 3
    assert list(certificate.as_dict())[:4] == [
        *("verdict", "predicted_excess_loss", "intervals", "evidence")
    ]
    assert {skip.width for skip in ladder.skipped} == {2048}
    assert all("within the tolerance" in skip.reason for skip in ladder.skipped)


def test_without_a_coordinate_check_two_widths_do_not_prove_the_rule() -> None:
    """A drift is seen, and that it never settles would cost more than the tolerance."""
    curvature = {"lr": 0.01, "weight_decay": 0.003}
    truth = surface(2, noise=0.003, drift=0.4, curvature=curvature)
    spec = replace(ESSENTIAL, target_width=1024, tolerance=0.002)
    ladder = run(truth, spec)
    assert len(ladder.stages) == 2
    certificate = certify(ladder, rule_checked=False)
    assert certificate.verdict == "WARN"
    (problem,) = certificate.problems
    assert 'ladder.until = "proven"' in problem
    proven = run(truth, replace(spec, until_proven=True))
    assert len(proven.stages) > len(ladder.stages)
    assert certify(proven, rule_checked=False).verdict == "PASS"


@surfaces(2, 6)
def test_a_drift_that_begins_late_does_not_pass_unseen(count: int) -> None:
    """Two widths alike say nothing of a target at ten times the base width."""
    two = replace(ESSENTIAL, widths=(256, 512))
    for seed in range(count):
        truth = surface(seed, noise=0.0005, drift=0.6, begins=512)
        short = certify(run(truth, two))
        assert truth.excess(short.point, 2560) > ESSENTIAL.tolerance
        assert short.verdict != "PASS"
        far = [problem for problem in short.problems if "5 times as wide" in problem]
        assert len(far) == 1
        assert far[0].endswith("append a width to ladder.widths")
        ladder = run(truth)
        certificate = certify(ladder)
        assert [stage.width for stage in ladder.stages][:3] == [256, 512, 1024]
        assert truth.excess(certificate.point, 2560) < truth.excess(short.point, 2560) / 1.5


@surfaces(3, 6)
@pytest.mark.parametrize("drift", [-0.5, 0.5])
def test_a_wrong_width_rule_does_not_pass(drift: float, count: int) -> None:
    """√2 per doubling, for ever, as under a rule that is wrong by √width."""
    verdicts, told = [], []
    for seed in range(count):
        wrong = surface(
            seed, drift=drift, exponent=0.0, curvature={"lr": 0.01, "weight_decay": 0.003}
        )
        certificate = certify(run(wrong, replace(ESSENTIAL, until_proven=True)), rule_checked=False)
        verdicts.append(certificate.verdict)
        told += [p for p in certificate.problems if "width rule" in p]
    assert "PASS" not in verdicts
    assert verdicts.count("FAIL") >= count // 2
    assert any("keeps moving" in problem for problem in told)


@surfaces(2, 4)
def test_a_noisy_ladder_does_not_pass(count: int) -> None:
    for seed in range(count):
        certificate = certify(run(surface(seed, noise=0.015)))
        assert certificate.verdict != "PASS"
        assert any("noisier than its tolerance" in problem for problem in certificate.problems)


def test_two_minima_do_not_pass() -> None:
    def answer(trial: Trial) -> Result:
        x = math.log2(trial.lr)
        loss = (
            2
            + 0.01 * min((x + 7.5) ** 2, (x + 0.5) ** 2)
            + 0.002 * (math.log2(trial.weight_decay) + 5) ** 2
        )
        return Result(trial, Status.COMPLETE, loss=loss)

    certificate = certify(run(answer))
    assert certificate.verdict != "PASS"
    assert any("two minima" in problem for problem in certificate.problems)


def test_two_minima_are_two_good_points_with_a_bad_one_between() -> None:
    def width_of(*losses: float) -> int | None:
        places = np.arange(float(len(losses)))[:, None]
        n = len(losses)
        data = Data(
            places, np.full(n, 32), np.zeros(n, np.int64), np.array(losses), np.zeros((0, 1))
        )
        return two_minima(data, noise=0.01)

    assert width_of(2.0, 2.2, 2.01) == 32
    assert width_of(2.0, 2.2, 2.1) is None  # not as good
    assert width_of(2.0, 2.03, 2.01) is None  # not far above
    assert width_of(2.2, 2.0, 2.01) is None  # not between


def test_one_width_shows_nothing_of_transfer() -> None:
    certificate = certify(run(surface(1), replace(ESSENTIAL, widths=(256,))))
    assert certificate.verdict == "WARN"
    assert any("only one width" in problem for problem in certificate.problems)


def test_a_last_width_that_contradicts_the_others_fails() -> None:
    """The optimum jumps by six octaves at the second width."""
    near, far = surface(1), surface(1)
    jumped = replace(far, optimum={axis: at + 4 for axis, at in far.optimum.items()})

    def answer(trial: Trial) -> Result:
        return (near if trial.width == 256 else jumped)(trial)

    certificate = certify(run(answer, replace(ESSENTIAL, widths=(256, 512), target_width=512)))
    assert certificate.verdict != "PASS"


def test_any_width_can_be_predicted() -> None:
    truth = surface(4, drift=0.3)
    ladder = run(truth)
    for width in (256, 768, 4096):
        certificate = ladder.certificate(width)
        assert certificate
        assert certificate.width == width
        assert truth.excess(certificate.point, width) < 0.004
