"""A frontier against races whose truth is known, hand numbers, and a driver that is killed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import from_json, output, telescope
from conftest import ROOT, as_toml, tiny_spec
from races import race_spec
from scipy.stats import t as student

from telescope.answer.frontier import arm_specs, digest_of, read_arm
from telescope.errors import SpecError
from telescope.frontier.answer import Answer, answer
from telescope.frontier.arms import Arm, plan_arms
from telescope.frontier.critical import critical_of
from telescope.frontier.curves import Envelope, envelope
from telescope.frontier.devices import Devices, NotKnownError, Step, place
from telescope.frontier.reach import Reached, ratio_of, reached, trend_of
from telescope.records import Axis, CurvePoint, LadderSpec, Point, Result, Status, Trial
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.prepare import prepare

BATCHES = (8, 32, 128, 512)


def arms_of(*optimizers: str, batches: tuple[int, ...] = BATCHES) -> tuple[Arm, ...]:
    """Arms of 16 tokens per sequence on the hyperbola of 40,000 tokens and 20 steps."""
    return plan_arms(optimizers, batches, sequence_length=16, tokens=40_000, steps=20)


def fitted(arm: Arm, factor: float, error: float = 0.003, shift: float = 0.0) -> Envelope:
    """The envelope of an arm that takes `factor` times 1,000 tokens to loss 5."""
    tokens = [round(arm.tokens * part / 10) for part in range(1, 11)]
    losses = [2 + 3 * (each / factor / 1000) ** -0.4 + shift for each in tokens]
    return Envelope(tuple(tokens), tuple(losses), (error,) * 10)


def compared(
    of: Callable[[Arm], float], *optimizers: str, error: float = 0.003, losses: Any = (2.8,)
) -> Answer:
    """The answer where `of` gives each arm's tokens to loss 5, in thousands."""
    arms = arms_of(*optimizers)
    return answer(
        {arm: fitted(arm, of(arm), error) for arm in arms},
        {arm: Step(1.0) for arm in arms},
        Devices((1, 2)),
        losses,
    )


def constant(ratio: float, critical: float = 2000.0) -> Callable[[Arm], float]:
    """Equal critical batches, and AdamW so many times the tokens."""

    def of(arm: Arm) -> float:
        return (ratio if arm.optimizer == "adamw" else 1.0) * (1 + arm.batch_tokens / critical)

    return of


# -- tokens to a loss -----------------------------------------------------------------------------


def test_tokens_to_a_loss_are_read_off_the_curve() -> None:
    (arm,) = arms_of("muon", batches=(8,))
    curve = fitted(arm, 1.0)
    tokens = 1000 * ((2.8 - 2) / 3) ** (-1 / 0.4)
    assert curve.tokens_to(2.8) == pytest.approx(tokens, rel=0.01)
    found = reached(arm, curve, 2.8, 0)
    assert found.tokens == curve.tokens_to(2.8)
    assert found.steps == pytest.approx(tokens / 128, rel=0.01)
    # dL/dlog D = −0.4 · 0.8: an error of 0.003 is one of 0.94 % of the tokens. 95 % of Student's
    # distribution with 6 degrees of freedom lie below 1.943.
    low, high = found.interval or (None, None)
    assert low == pytest.approx(tokens * math.exp(-1.943 * 0.003 / 0.32), rel=0.01)
    assert high == pytest.approx(tokens * math.exp(1.943 * 0.003 / 0.32), rel=0.01)


def test_what_is_not_reached_is_no_number() -> None:
    (arm,) = arms_of("muon", batches=(8,))
    curve = fitted(arm, 1.0)
    late = reached(arm, curve, curve.losses[-1] - 0.1, 0)
    assert (late.tokens, late.steps, late.interval) == (None, None, None)
    assert late.reason == f"not reached within {arm.tokens:,} tokens"
    early = reached(arm, curve, curve.losses[0] + 0.1, 0)
    assert early.tokens is None
    assert early.reason.startswith("reached before the first measurement, at ")
    close = reached(arm, curve, curve.losses[-1], 0)
    assert close.tokens == pytest.approx(arm.tokens)
    assert close.interval is not None
    assert close.interval[0] is not None
    assert close.interval[1] is None, "half of the draws are not down yet"


def parabola(seed: int, at: int, *, noise: float = 0.01, best: float = 0.0) -> list[Result]:
    """Trials of one arm with seeds 0 to 2, whose best loss at `at` tokens is 2 + 3/√at."""
    luck = np.random.default_rng(seed).normal(0, noise, (3, 7))
    shifts = np.random.default_rng(seed + 1000).normal(0, noise, 3)
    made = []
    for lr, row in ((2.0**k, k) for k in range(-3, 4)):
        for s in range(3 if abs(row) < 1 else 1):
            rows = []
            for step in (at // 2, at):
                loss = 2 + 3 / math.sqrt(step) + 0.02 * (row - best) ** 2
                rows.append(CurvePoint(step, None, loss + luck[s, row + 3] + shifts[s]))
            trial = Trial(8, Point.of(lr=lr), s)
            made.append(
                Result(trial, Status.COMPLETE, loss=rows[-1].held_out_loss, curve=tuple(rows))
            )
    return made


LADDER = LadderSpec((Axis("lr", 2.0**-3, 2.0**3, 7),), (8,))


def test_the_interval_of_the_best_loss_holds_it() -> None:
    """Over 24 simulated arms, whose best lr lies between the trials: about 90 %, never under 70."""
    truth, held = 2 + 3 / math.sqrt(900), 0
    for seed in range(24):
        fit = envelope(LADDER, parabola(seed, 900, best=0.4), 1)
        assert fit is not None
        assert fit.tokens == (450, 900)
        held += abs(fit.losses[-1] - truth) < 1.943 * fit.errors[-1]
    assert held >= 17


def test_diverged_and_failed_trials_are_no_numbers() -> None:
    whole = parabola(0, 900)
    lost = Trial(8, Point.of(lr=16.0), 0)
    wall = Result(lost, Status.DIVERGED, reason="loss 9", curve=(CurvePoint(450, None, 2.0),))
    broken = Result(Trial(8, Point.of(lr=1.0), 7), Status.FAILED, reason="out of memory")
    with_both = envelope(LADDER, [*whole, wall, broken], 1)
    assert with_both is not None
    plain = envelope(LADDER, whole, 1)
    assert plain is not None
    assert with_both.losses[0] == pytest.approx(plain.losses[0], abs=plain.errors[0])
    assert envelope(LADDER, [wall, broken], 1) is None
    assert envelope(LADDER, whole[:2], 1) is None, "two losses make no fit"


# -- the ratio ------------------------------------------------------------------------------------


def test_a_ratio_that_is_there_is_found() -> None:
    found = compared(constant(1.25), "muon", "adamw")
    for ratio in found.ratios:
        assert ratio.ratio == pytest.approx(1.25, rel=0.01)
        assert ratio.verdict == "above"
        low, high = ratio.interval or (None, None)
        assert low is not None
        assert high is not None
        # Two errors of 0.94 %, each from a distribution with 6 degrees of freedom.
        t = student.rvs(6, size=(2, 100_000), random_state=0)
        wide = float(np.quantile(t[0] - t[1], 0.95)) * 0.0094
        assert math.log(high / low) / 2 == pytest.approx(wide, rel=0.1)
    (trend,) = found.trends
    assert trend.verdict == "inside"
    assert trend.slope == pytest.approx(0, abs=0.01)
    assert found.optimizer == "muon"
    # 1.25 times the fewest tokens, D_min · (1 + B/2000), are at B = 640 or so: batch 32.
    assert found.batch is not None
    assert found.batch.batch_size == 32
    assert found.sentence == (
        "use Muon, batch 32 (512 tokens): to loss 2.8 expect 20 % fewer tokens than AdamW "
        "(18 to 22 %)"
    )


def test_adamw_may_win() -> None:
    found = compared(constant(0.8), "muon", "adamw")
    assert found.optimizer == "adamw"
    assert found.sentence.startswith("use AdamW, batch 32 (512 tokens): to loss 2.8 expect 20 %")
    assert {ratio.verdict for ratio in found.ratios} == {"below"}


def test_a_difference_inside_the_noise_is_called_so() -> None:
    found = compared(constant(1.01), "muon", "adamw", error=0.006)
    assert found.optimizer is None
    assert found.sentence == (
        "the difference is inside the noise: at batch 32 (512 tokens), to loss 2.8, Muon needs "
        "4 % more to 6 % fewer tokens than AdamW"
    )


@pytest.mark.parametrize(("critical", "verdict"), [(500.0, "rises"), (8000.0, "falls")])
def test_a_ratio_that_changes_with_the_batch_is_seen(critical: float, verdict: str) -> None:
    """AdamW with a smaller critical batch than Muon's loses more at large batches."""

    def of(arm: Arm) -> float:
        return 1 + arm.batch_tokens / (critical if arm.optimizer == "adamw" else 2000.0)

    (trend,) = compared(of, "muon", "adamw", losses=(3.2,)).trends
    assert trend.verdict == verdict


def test_a_ratio_without_a_number_says_why() -> None:
    muon, adamw = arms_of("muon", "adamw", batches=(8,))
    found = ratio_of(
        reached(muon, fitted(muon, 1.0), 2.7, 0), reached(adamw, fitted(adamw, 3.0), 2.7, 1)
    )
    assert (found.ratio, found.interval, found.verdict) == (None, None, "none")
    assert found.reason == f"adamw: not reached within {adamw.tokens:,} tokens"
    assert trend_of(2.7, [found, found, found]).verdict == "none"


def test_an_end_that_was_not_measured_stays_open() -> None:
    """AdamW reaches the loss at its very end: it may as well take many more tokens."""
    muon, adamw = arms_of("muon", "adamw", batches=(8,))
    ends = fitted(adamw, 1.0)
    ratio = ratio_of(
        reached(muon, fitted(muon, 0.5), ends.losses[-1], 0),
        reached(adamw, ends, ends.losses[-1], 1),
    )
    assert ratio.interval is not None
    assert ratio.interval[0] == pytest.approx(2.0, rel=0.05)
    assert ratio.interval[1] is None
    assert ratio.verdict == "above"


def test_one_optimizer_alone_gets_a_batch_size() -> None:
    found = compared(constant(1.0), "muon")
    assert found.ratios == ()
    assert found.optimizer == "muon"
    assert found.sentence.startswith("use batch 32 (512 tokens): to loss 2.8 ")


def test_nothing_reached_is_nothing_said() -> None:
    found = compared(constant(1.25), "muon", "adamw", losses=(1.0,))
    assert found.batch is None
    assert found.sentence.endswith("nothing to say")
    assert found.placed == ()
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))


def test_an_optimizer_without_a_fit_is_no_loser() -> None:
    arms = arms_of("muon")
    found = answer(
        {arm: fitted(arm, 1.0) for arm in arms},
        {arm: Step(1.0) for arm in arms},
        Devices((1,)),
        planned=("muon", "adamw"),
    )
    assert found.optimizer is None
    assert found.sentence == "nothing to compare: no arm of adamw has losses to fit"


def test_chosen_losses_are_reached_by_all() -> None:
    found = compared(constant(1.25), "muon", "adamw", losses=())
    assert len(found.losses) == 3
    lowest = [one for one in found.reached if one.loss == found.losses[0]]
    assert all(one.tokens is not None for one in lowest)
    assert all(one.interval and None not in one.interval for one in lowest)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))


# -- the critical batch ---------------------------------------------------------------------------


def reaching(tokens: dict[int, float], error: float = 0.01) -> list[Reached]:
    """Arms that reach a loss after these tokens, with a relative error."""
    found = []
    for number, (size, mean) in enumerate(tokens.items()):
        draws = mean * np.exp(error * np.random.default_rng(number).normal(size=1001))
        ends = (float(np.quantile(draws, 0.05)), float(np.quantile(draws, 0.95)))
        arm = Arm("muon", size, 16, 100)
        found.append(Reached(arm, 2.8, mean, ends, 1, 10**9, draws))
    return found


def test_a_curve_of_the_assumed_form_gives_its_numbers() -> None:
    exact = reaching({size: 30_000 + 15 * 16 * size for size in BATCHES})
    found = critical_of("muon", 2.8, exact)
    assert found.fewest_tokens == pytest.approx(30_000, rel=1e-6)
    assert found.fewest_steps == pytest.approx(15, rel=1e-6)
    assert found.tokens == pytest.approx(2000, rel=1e-6)
    low, high = found.interval or (None, None)
    assert low is not None
    assert high is not None
    assert 1900 < low < 2000 < high < 2100
    assert found.misfit == pytest.approx(0, abs=1e-9)


def test_a_curve_of_another_form_widens_the_interval() -> None:
    """A sharper corner: D = ((30,000)² + (15 B)²)^½, whose misfit must count as uncertainty."""
    other = reaching({size: math.hypot(30_000, 15 * 16 * size) for size in BATCHES})
    found = critical_of("muon", 2.8, other)
    assert found.misfit is not None
    assert found.misfit > 0.03
    low, high = found.interval or (None, None)
    assert low is not None
    assert low < 2000
    assert high is None or high > 2000
    assert (high or math.inf) / low > 1.5


def test_a_critical_batch_outside_of_what_was_measured_is_no_number() -> None:
    flat = critical_of("muon", 2.8, reaching(dict.fromkeys(BATCHES, 30_000.0)))
    assert flat.tokens is None
    assert flat.reason == "above the largest batch measured"
    assert flat.interval == (None, None) or (flat.interval or (1, 1))[1] is None
    steep = critical_of("muon", 2.8, reaching({size: 1000.0 * size for size in BATCHES}))
    assert steep.reason == "below the smallest batch measured"
    few = critical_of("muon", 2.8, reaching({8: 1e4, 32: 2e4}))
    assert few.reason == "reached at 2 batch sizes, the curve needs 3"


# -- devices --------------------------------------------------------------------------------------


def test_times_on_devices_are_those_by_hand() -> None:
    arms = arms_of("muon", batches=(8, 32))
    found = [reached(arm, fitted(arm, 1.0), 2.8, 0) for arm in arms]
    tokens = found[0].tokens or 0.0
    assert found[1].tokens == pytest.approx(tokens, rel=0.02)
    # A step takes 0.1 s, and 0.05 s per sequence.
    steps = {arm: Step(0.1 + 0.05 * arm.batch_size) for arm in arms}
    placed = {one.devices: one for one in place(Devices((1, 4, 16, 64)), steps, found)}
    assert placed.keys() == {1, 4, 16}, "64 devices are more than sequences"
    # On one device: 0.5 s per 128 tokens, or 1.7 s per 512. On four: 0.2 s, or 0.5 s.
    assert (placed[1].batch_size, placed[4].batch_size) == (32, 32)
    assert placed[1].seconds == pytest.approx(1.7 * tokens / 512, rel=0.02)
    assert placed[4].seconds == pytest.approx(0.5 * tokens / 512, rel=0.02)
    # Only the batch of 32 has a sequence for each of 16.
    assert placed[16].batch_size == 32
    assert placed[16].seconds == pytest.approx(0.2 * tokens / 512, rel=0.02)


def test_two_arms_that_are_timed_say_the_time_of_a_third() -> None:
    arms = arms_of("muon", batches=(8, 16, 32))
    found = [reached(arm, fitted(arm, 1.0), 2.8, 0) for arm in arms]
    steps = {arm: Step(0.1 + 0.05 * arm.batch_size) for arm in arms}
    without = steps | {arms[1]: Step(None)}
    for one, all_timed in zip(
        place(Devices((1, 4)), without, found), place(Devices((1, 4)), steps, found), strict=True
    ):
        assert one.batch_size == all_timed.batch_size
        assert one.seconds == pytest.approx(all_timed.seconds)
    assert place(Devices((1, 4)), without | {arms[0]: Step(None)}, found) == []


def test_a_stated_device_divides_newton_schulz_over_the_owners() -> None:
    (arm,) = arms_of("muon", batches=(32,))
    found = [reached(arm, fitted(arm, 1.0), 2.8, 0)]
    steps = {arm: Step(9.0, model=320.0, optimizer=60.0, parameters=100, matrices=4)}
    count = (found[0].tokens or 0.0) / 512
    placed = {one.devices: one.seconds for one in place(Devices((1, 2, 8), 10.0), steps, found)}
    assert placed[1] == pytest.approx(38.0 * count)
    assert placed[2] == pytest.approx(19.0 * count)
    assert placed[8] == pytest.approx((4.0 + 1.5) * count), "four matrices have four owners"
    slow = place(Devices((8,), 10.0, bandwidth=1000.0), steps, found)
    exchange = 1.25 * 2 * 4 * 100 * 7 / 8 / 1000
    assert slow[0].seconds == pytest.approx((5.5 + exchange) * count)


def test_a_device_model_that_needs_what_is_not_known_is_refused() -> None:
    (arm,) = arms_of("adamw", batches=(32,))
    found = [reached(arm, fitted(arm, 1.0), 2.8, 0)]
    with pytest.raises(NotKnownError, match="flops_per_second"):
        place(Devices((2,), 10.0), {arm: Step(1.0)}, found)
    with pytest.raises(NotKnownError, match="bandwidth"):
        place(Devices((2,), None, 10.0), {arm: Step(1.0)}, found)


# -- the arms of a spec ---------------------------------------------------------------------------

TABLE = {"batch_sizes": [8, 2], "tokens": 2000, "steps": 20}


def tiny(corpus: Path, **tables: Any) -> Spec:
    frontier = {**TABLE, **tables.pop("frontier", {})}
    return Spec.from_dict(tiny_spec(corpus, frontier=frontier, **tables))


def test_two_arms_differ_in_nothing_but_the_optimizer(corpus_file: Path) -> None:
    optimizer = {"name": "muon", "ns_steps": 4, "betas": [0.9, 0.99]}
    spec = tiny(corpus_file, optimizer=optimizer, frontier={"adamw": {"betas": [0.9, 0.95]}})
    specs = {arm.name: (arm, its) for arm, its in arm_specs(spec).items()}
    assert list(specs) == ["muon-2", "adamw-2", "muon-8", "adamw-8"]
    for size in (2, 8):
        (muon_arm, muon), (adamw_arm, adamw) = specs[f"muon-{size}"], specs[f"adamw-{size}"]
        assert (muon_arm.steps, muon_arm.tokens) == (adamw_arm.steps, adamw_arm.tokens)
        one, other = muon.as_dict(), adamw.as_dict()
        assert one.pop("name") != other.pop("name")
        assert one.pop("optimizer") == {**spec.as_dict()["optimizer"], "ns_steps": 4}
        assert other.pop("optimizer")["betas"] == [0.9, 0.95]
        assert one == other
        assert muon.model_source == adamw.model_source
        assert muon.budget.max_over_target == adamw.budget.max_over_target == 12
    # D = 2,000 tokens + 20 steps: 62.5 and 20 steps of 32 tokens.
    assert specs["muon-2"][1].steps == 82
    assert specs["muon-8"][1].steps == 36


def test_an_arm_of_one_width_gets_no_coordinate_check(corpus_file: Path) -> None:
    spec = tiny(corpus_file)
    for arm_spec in arm_specs(spec).values():
        made, reason = prepare(arm_spec).model_check(wanted=True)
        assert made is None
        assert reason == "there is one width alone, and nothing to transfer"
    assert prepare(spec).model_check(wanted=True)[0] is not None


def test_an_axis_of_one_optimizer_alone(corpus_file: Path) -> None:
    wide = {"low": 0.001, "high": 1.0, "points": 5}
    axes = {"adamw_lr_ratio": {"low": 0.1, "high": 1.0, "points": 3}}
    spec = tiny(corpus_file, axes=axes, frontier={"adamw": {"axes": {"lr": wide}}})
    of = {arm.name: its for arm, its in arm_specs(spec).items()}
    assert of["adamw-2"].axes["lr"].low == 0.001
    assert of["muon-2"].axes["lr"].low == 0.01
    assert of["adamw-2"].axes["weight_decay"] == of["muon-2"].axes["weight_decay"]
    assert "adamw_lr_ratio" in of["muon-2"].axes
    assert "adamw_lr_ratio" not in of["adamw-2"].axes


def test_adamw_has_a_rule_that_it_knows(corpus_file: Path) -> None:
    spec = tiny(corpus_file, optimizer={"rule": "moonlight"})
    rules = {arm.name: its.optimizer.rule for arm, its in arm_specs(spec).items()}
    assert rules["muon-2"] == "moonlight"
    assert rules["adamw-2"] == "mup"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": []}, "frontier.batch_sizes: got [], must be one or more"),
        ({"batch_sizes": [8, 8]}, "frontier.batch_sizes: got [8, 8], must be each once"),
        ({"adamw": {"ns_step": 3}}, "frontier.adamw.ns_step: unknown key; allowed in"),
        ({"muon": {"axes": {"lr": {"lo": 1}}}}, "frontier.muon.axes.lr.lo: unknown key; allowed"),
        ({"devices": {"counts": [2, 1]}}, "frontier.devices.counts: got [2, 1], must be rising"),
        ({"trial": 3}, "did you mean trials?"),
    ],
)
def test_a_wrong_table_says_so(corpus_file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        tiny(corpus_file, frontier=changes)
    assert message in str(error.value)


def test_keys_that_an_arm_cannot_take_are_all_named(corpus_file: Path) -> None:
    with pytest.raises(SpecError) as error:
        arm_specs(tiny(corpus_file, frontier={"adamw": {"ns_steps": 3}, "width": 12}))
    assert [fault.partition(": ")[0] for fault in error.value.faults] == [
        "frontier, muon-2, muon-8",
        "frontier, muon-2, muon-8",
        "frontier, adamw-2, adamw-8",
    ]
    with pytest.raises(SpecError, match=r"frontier\.sequence_length: got 16, must be left out"):
        arm_specs(tiny(corpus_file, frontier={"sequence_length": 16}))
    with pytest.raises(SpecError, match=r"tiny: frontier: missing; a table \[frontier\]"):
        arm_specs(Spec.from_dict(tiny_spec(corpus_file)))


def test_a_foreign_trainer_must_be_told(tmp_path: Path) -> None:
    spec = race_spec(tmp_path)
    del spec["trainer"]["arguments"], spec["trainer"]["steps"], spec["frontier"]["sequence_length"]
    spec["target"] = {"width": 32}
    spec["frontier"]["adamw"] = {"betas": [0.9, 0.95]}
    with pytest.raises(SpecError) as error:
        arm_specs(Spec.from_dict(spec))
    keys = [fault.partition(":")[0] for fault in error.value.faults]
    assert keys == [
        "frontier.sequence_length",
        "trainer.arguments.optimizer",
        "trainer.arguments.batch_size",
        "trainer.steps",
        "frontier.adamw",
    ]


def test_what_changes_no_arm_changes_no_digest(corpus_file: Path) -> None:
    before = digest_of(tiny(corpus_file))
    assert digest_of(tiny(corpus_file, compute={"workers": 3})) == before
    assert digest_of(tiny(corpus_file, frontier={"repeats": 4})) != before


# -- the command ----------------------------------------------------------------------------------


def runs_of(folder: Path) -> list[Any]:
    """The trials that the race's function has trained."""
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished race, and its answer."""
    folder = tmp_path_factory.mktemp("race")
    (folder / "race.toml").write_text(as_toml(race_spec(folder)))
    return folder, from_json("frontier", "race.toml", "--dispatcher", "inline", cwd=folder)


def test_the_seconds_of_a_pack_are_no_step_time(
    raced: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "race"
    shutil.copytree(raced[0], folder)
    ask = ("frontier", "race.toml", "--dispatcher", "inline")
    at = folder / "results" / "race" / "frontier"
    arms = [arm for arm in arm_specs(Spec.load(folder / "race.toml")) if arm.optimizer == "muon"]
    for arm in arms:
        kept = read_arm(arm, at)
        assert kept is not None
        for part, results in (("", kept.finished.results), ("repeats", kept.repeats)):
            names = [str(result.trial) for result in results]
            Folder(at / arm.name / part).note_pack({"width": 32, "trials": names})
    devices = from_json(*ask, cwd=folder)["devices"]
    assert {one["optimizer"] for one in devices["times"]} == {"adamw"}
    assert "not known for Muon: the trials trained in packs, and none alone" in devices["basis"]
    for arm in arms:
        line = {"width": 32, "asked": "auto", "most": 9, "why": "", "until": None}
        Folder(at / arm.name).note_pack(line | {"step_seconds": 3.0 + arm.batch_size})
    found = from_json(*ask, cwd=folder)
    alone = next(one for one in found["devices"]["times"] if one["optimizer"] == "muon")
    its = next(
        one
        for one in found["reached"]
        if (one["optimizer"], one["loss"], one["batch_size"])
        == ("muon", alone["loss"], alone["batch_size"])
    )
    assert alone["devices"] == 1
    each = 3.0 + alone["batch_size"]
    assert alone["seconds"] == pytest.approx(each * its["tokens"] / its["batch_tokens"], rel=1e-6)


def test_a_plan_is_exact_and_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "race.toml").write_text(as_toml(race_spec(tmp_path)))
    plan = from_json("frontier", "race.toml", "--plan", cwd=tmp_path)
    assert not runs_of(tmp_path)
    assert not (tmp_path / "results").exists()
    assert [arm["steps"] for arm in plan["arms"][::2]] == [332, 59, 25]
    first = plan["arms"][0]
    # 100 parameters for 100 steps of 8 sequences; here 332 of them.
    assert first["cost"]["trial"] == pytest.approx(332)
    assert first["trials"]["most"] == 6
    worst = sum(arm["cost"]["trial"] * (6 + 3) for arm in plan["arms"])
    assert plan["over_target"]["most"] == pytest.approx(worst / 1_000_000)
    assert plan["refused"] is None
    text = output(tmp_path, "frontier", "race.toml", "--plan")
    assert "adamw" in text


def test_too_few_trials_are_refused(tmp_path: Path) -> None:
    spec = race_spec(tmp_path)
    spec["frontier"]["trials"] = 2
    (tmp_path / "race.toml").write_text(as_toml(spec))
    said = output(tmp_path, "frontier", "race.toml", "--plan", code=2)
    assert "race: frontier.trials: got 2, must be at least 6 to tune lr" in said


def test_more_than_the_budget_is_refused_before_anything_runs(tmp_path: Path) -> None:
    spec = race_spec(tmp_path, budget={"max_over_target": 0.001})
    (tmp_path / "race.toml").write_text(as_toml(spec))
    said = output(tmp_path, "frontier", "race.toml", "--dispatcher", "inline", code=1)
    assert "budget.max_over_target is 0.001; take fewer batch sizes" in said
    assert not runs_of(tmp_path)


def test_a_variant_over_its_budget_is_refused_before_the_others_run(tmp_path: Path) -> None:
    spec = race_spec(tmp_path, variants={"dear": {"budget": {"max_over_target": 0.001}}})
    (tmp_path / "race.toml").write_text(as_toml(spec))
    said = output(tmp_path, "frontier", "race.toml", "--dispatcher", "inline", code=1)
    assert "race-dear: the frontier may cost" in said
    assert not runs_of(tmp_path)


def test_a_race_is_called_right(raced: tuple[Path, dict[str, Any]]) -> None:
    """A foreign function end to end: the ratio is 1.25 everywhere, the critical batch 2,000."""
    folder, found = raced
    trained = runs_of(folder)
    assert len(trained) == len({tuple(run) for run in trained}), "nothing twice"
    for name in ("muon", "adamw"):
        for size in (8, 64, 512):
            mine = [run for run in trained if run[:2] == [name, size]]
            assert len(mine) <= 9, "trials and repeats"
    assert {arm["trials"] for arm in found["arms"]} <= {4, 5, 6}
    lowest = found["losses"][0]
    ratios = [one for one in found["ratios"] if one["loss"] == lowest]
    assert len(ratios) == 3
    assert all(one["ratio"] == pytest.approx(1.25, rel=0.1) for one in ratios)
    ends = [(low, high or math.inf) for low, high in (one["interval"] for one in ratios)]
    assert sum(low < 1.25 < high for low, high in ends) >= 2, "of 90 % intervals"
    assert sum(one["verdict"] == "above" for one in ratios) >= 2
    (trend,) = (one for one in found["trends"] if one["loss"] == lowest)
    assert trend["verdict"] == "inside"
    for one in found["critical"]:
        if one["loss"] == lowest:
            low, high = one["interval"]
            assert low is None or low < 2000
            assert high is None or high > 2000
    assert found["use"]["optimizer"] == "muon"
    assert found["sentence"].startswith("use Muon, batch ")
    assert all(arm["point"]["lr"] == pytest.approx(0.05, rel=0.5) for arm in found["arms"])


def test_a_finished_race_answers_again_without_training(
    raced: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = raced
    before = len(runs_of(folder))
    again = from_json("frontier", "race.toml", cwd=folder)
    assert again == found
    text = output(folder, "frontier", "race.toml", "--out", "answer.json")
    assert found["sentence"] in text
    assert json.loads((folder / "answer.json").read_text()) == found
    assert len(runs_of(folder)) == before
    more = from_json(
        *("frontier", "race.toml", "--dispatcher", "inline", "--set", "frontier.repeats=4"),
        cwd=folder,
    )
    new = runs_of(folder)[before:]
    assert 1 <= len(new) <= 6, "a fourth seed, and nothing again"
    assert {run[4] for run in new} == {3}
    assert more["losses"]


def test_a_race_that_was_killed_goes_on_to_the_same_answer(
    raced: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, found = raced
    spec = race_spec(tmp_path, frontier={**race_spec(tmp_path)["frontier"], "batch_sizes": [64]})
    (tmp_path / "race.toml").write_text(as_toml(spec))
    command = ["frontier", "race.toml", "--dispatcher", "inline"]
    environment = {**os.environ, "NAP": "0.2", "PYTHONPATH": str(ROOT)}
    for killed_after in (3, 11):
        with subprocess.Popen(
            [sys.executable, "-m", "telescope", *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
        ) as driver:
            while len(runs_of(tmp_path)) < killed_after and driver.poll() is None:
                time.sleep(0.02)
            driver.kill()
        assert driver.returncode == -signal.SIGKILL
    resumed = from_json(*command, cwd=tmp_path)
    small = [arm for arm in found["arms"] if arm["batch_size"] == 64]
    for arm, other in zip(resumed["arms"], small, strict=True):
        assert {**arm, "seconds": 0} == {**other, "seconds": 0}
    trained = runs_of(tmp_path)
    # Each kill may have caught one that was running, and one on its way to the store.
    assert len(trained) - len({tuple(run) for run in trained}) <= 4


def test_another_training_is_refused(raced: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = raced
    before = len(runs_of(folder))
    done = telescope(
        *("frontier", "race.toml", "--dispatcher", "inline", "--set", "frontier.steps=30"),
        cwd=folder,
    )
    assert done.returncode == 2
    assert "not comparable" in done.stderr
    assert "trainer.steps" in done.stderr
    assert len(runs_of(folder)) == before


def test_the_plan_has_the_same_keys_without_variants_and_is_written(tmp_path: Path) -> None:
    (tmp_path / "race.toml").write_text(as_toml(race_spec(tmp_path)))
    plan = from_json("frontier", "race.toml", "--plan", "--out", "plan.json", cwd=tmp_path)
    assert plan["variants"] == {}
    assert json.loads((tmp_path / "plan.json").read_text()) == plan


def test_variants_are_compared_side_by_side(raced: tuple[Path, dict[str, Any]]) -> None:
    """A variant whose AdamW takes no longer than Muon; the spec itself has been trained."""
    folder, _ = raced
    spec = race_spec(folder, variants={"even": {"trainer": {"function": "races_here:even"}}})
    spec["frontier"] |= {"batch_sizes": [64], "repeats": 1}
    (folder / "both.toml").write_text(as_toml(spec))
    plan = from_json("frontier", "both.toml", "--plan", cwd=folder)
    assert plan["variants"]["even"]["name"] == "race-even"
    before = len(runs_of(folder))
    found = from_json("frontier", "both.toml", "--dispatcher", "inline", cwd=folder)
    even = found["variants"]["even"]
    assert found["ratios"][0]["ratio"] == pytest.approx(1.25, rel=0.1)
    assert even["ratios"][0]["ratio"] == pytest.approx(1.0, rel=0.001)
    assert "inside the noise" in even["sentence"]
    trained = runs_of(folder)[before:]
    assert {run[0] for run in trained} == {"muon"}, "of the variant alone"
    text = output(folder, "frontier", "both.toml")
    assert "even, to loss" in text
    assert len(runs_of(folder)) == before + len(trained)
