"""Sweeps whose spec changes after a part or all of it has run: no result is lost or made again.

Every change that keeps the fingerprint is tried, as a ladder without effects, as a sweep that
another program trains, as a searcher of Tune, and cut off at every result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bowls import bowl_spec, run_bowl
from commands import output

from telescope import Ladder as UserLadder
from telescope import Spec
from telescope.answer.finished import open_result
from telescope.errors import TrialError
from telescope.ladder.ladder import Ladder, replay
from telescope.records import Axis, LadderSpec, Point, Result, Status, Trial
from telescope.store.store import Store
from telescope.sweep.recorder import Recorder
from telescope.tune import TelescopeSearch

COSTS = {16: 1.0, 32: 4.0, 64: 16.0}
BEFORE = LadderSpec(
    (Axis("lr", 0.01, 1.0, 7), Axis("weight_decay", 0.01, 1.0, 5)),
    (16, 32),
    target_width=128,
    costs={width: COSTS[width] for width in (16, 32)},
    budget=400.0,
)
FIXED = (Axis("lr", 0.01, 1.0, 7), Axis("weight_decay", 0.1, 0.1, 1))
CHANGES: dict[str, dict[str, Any]] = {
    "wider": {"widths": (16, 32, 64), "costs": COSTS},
    "narrower": {"widths": (16,), "costs": {16: 1.0}},
    "seeds": {"seeds": (0, 1)},
    "range": {"axes": (Axis("lr", 0.03, 3.0, 7), Axis("weight_decay", 0.01, 1.0, 5))},
    "points": {"axes": (Axis("lr", 0.01, 1.0, 5), Axis("weight_decay", 0.01, 1.0, 3))},
    "policy": {"policy": "paper"},
    "tolerance": {"tolerance": 0.0001},
    "round": {"round": 6},
    "until": {"until_proven": True},
    "target": {"target_width": 512},
    "budget": {"budget": 60.0},
}


def answer(trial: Trial) -> Result:
    """Train: one-sided in lr, a plateau and a wall in weight decay, noise by content."""
    lr, decay = math.log2(trial.lr / 0.15), math.log2(trial.weight_decay / 0.12)
    if lr > 2.5:
        return Result(trial, Status.DIVERGED, reason="NaN at step 3")
    noise = 0.003 * math.sin(1e4 * (trial.lr + 3 * trial.weight_decay) + trial.seed + trial.width)
    loss = 2 + 1 / trial.width + 0.02 * (math.exp(0.5 * lr) - 0.5 * lr) + 0.01 * decay**2
    return Result(trial, Status.COMPLETE, loss=loss + noise)


def climb(
    ladder: Ladder, limit: int = 10**6, train: Callable[[Trial], Result] = answer
) -> list[Result]:
    """Answer what a ladder asks for, one trial at a time; returns the results."""
    told: list[Result] = []
    while len(told) < limit and (trials := ladder.ask()):
        told.append(train(trials[0]))
        ladder.tell(told[-1])
    return told


def fresh(spec: LadderSpec) -> list[Result]:
    return climb(Ladder(spec))


@functools.cache
def first() -> tuple[Result, ...]:
    """All results of the first spec, in the order they were told."""
    return tuple(fresh(BEFORE))


def measured(ladder: Ladder) -> set[tuple[int, tuple[tuple[str, float], ...], int]]:
    """The results that the ladder's fit is made of."""
    return {
        (r.trial.width, r.trial.point.axes, r.trial.seed)
        for r in ladder._state().evidence  # what is fitted has no public name
    }


@pytest.mark.parametrize(
    ("change", "share"),
    [*((change, 1.0) for change in CHANGES), ("wider", 0.4), ("seeds", 0.4), ("policy", 0.4)],
)
def test_nothing_known_is_asked_for_again(change: str, share: float) -> None:
    """After a whole sweep and after a part of one; then back to the first spec."""
    stored = first()[: round(share * len(first()))]
    after = replace(BEFORE, **CHANGES[change])
    ladder = replay(after, stored)
    new = climb(ladder)
    assert ladder.is_finished
    assert not {r.trial for r in new} & {r.trial for r in stored}
    assert {r.trial for r in ladder.known} == {r.trial for r in [*stored, *new]} or (
        after.policy == "paper"  # whose choices are of its grids alone
    )
    back = replay(BEFORE, [*stored, *new])
    more = climb(back)
    assert not {r.trial for r in more} & {r.trial for r in [*stored, *new]}
    assert measured(back) == {
        (r.trial.width, r.trial.point.axes, r.trial.seed) for r in [*stored, *new, *more]
    }


@pytest.mark.parametrize(
    "change",
    [
        *("wider", "seeds", "range", "policy"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("points", "tolerance", "until")),
    ],
)
def test_a_cut_off_at_any_result_changes_nothing(change: str) -> None:
    stored = first()
    after = replace(BEFORE, **CHANGES[change])
    whole = replay(after, stored)
    given = [result.trial for result in whole.given]
    new = climb(whole)
    for cut in {0, 1, len(new) // 2, len(new)}:
        ladder = replay(after, [*new[:cut], *stored], given=given)
        assert [result.trial for result in climb(ladder)] == [r.trial for r in new[cut:]]
        assert ladder.choices == whole.choices
        assert ladder.certificate() == whole.certificate()


def test_an_unchanged_spec_is_told_not_given() -> None:
    stored = first()
    for count in (0, 1, 4, len(stored) // 2, len(stored)):
        assert not replay(BEFORE, stored[:count]).given


def test_a_longer_ladder_of_the_paper_goes_on_as_it_would_have() -> None:
    """Its first stages ask for the very same trials."""
    short = replace(BEFORE, policy="paper")
    longer = replace(short, widths=(16, 32, 64), costs=COSTS)
    ladder = replay(longer, fresh(short))
    assert not ladder.given
    climb(ladder)
    assert ladder.choices == replay(longer, fresh(longer)).choices


def test_the_certificate_cannot_be_chosen() -> None:
    """Results at 64 that move the optimum count for the spec of before they were made too."""
    wide = {replace(result.trial, width=64, seed=0) for result in first()}
    other = [*first(), *(moved(answer(trial)) for trial in wide)]
    again, before = replay(BEFORE, other), replay(BEFORE, first())
    climb(again)
    mine, theirs = before.certificate(), again.certificate()
    assert mine is not None
    assert theirs is not None
    assert theirs.point.lr < 0.97 * mine.point.lr
    assert any("before the spec changed, some of width 64" in line for line in theirs.evidence)


def moved(result: Result) -> Result:
    """The result of a trial, had the optimum been at two thirds of the learning rate."""
    values = dict(result.trial.point)
    elsewhere = replace(result.trial, point=Point.of({**values, "lr": values["lr"] * 1.5}))
    return replace(answer(elsewhere), trial=result.trial)


def bowl(trial: Trial) -> Result:
    """Train: a bowl in lr alone, with little noise and drift."""
    noise = 0.001 * math.sin(1e4 * (trial.lr + trial.seed + 3 * trial.width))
    away = math.log2(trial.lr / 0.1 / (1 + 1 / trial.width))
    return Result(trial, Status.COMPLETE, loss=2 + away**2 / 50 + noise)


@pytest.mark.parametrize(("tolerance", "most_at_base"), [(0.001, 0), (0.0001, 12)])
def test_an_appended_width_is_no_reason_to_train_the_narrow_ones_again(
    tolerance: float, most_at_base: int
) -> None:
    """An answer within the tolerance is tested at the width; another is bettered at wide models."""
    short = replace(BEFORE, axes=BEFORE.axes[:1], tolerance=tolerance)
    ladder = replay(replace(short, **CHANGES["wider"]), climb(Ladder(short), train=bowl))
    assert ladder.given
    new = climb(ladder, train=bowl)
    assert sum(result.trial.width == 16 for result in new) <= most_at_base
    assert sum(result.trial.width == 64 for result in new) >= 4
    assert len(new) == 4 or tolerance < 0.001
    certificate = ladder.certificate()
    assert certificate is not None
    assert certificate.excess_bound <= 0.001


def test_what_is_given_twice_counts_once() -> None:
    swapped = [replace(r, trial=replace(r.trial, point=backwards(r.trial.point))) for r in first()]
    ladder = Ladder(replace(BEFORE, **CHANGES["wider"]), [*first(), *first(), *swapped])
    assert sorted(map(str, ladder.given)) == sorted(map(str, first()))


def backwards(point: Point) -> Point:
    return Point.of(dict(reversed(list(dict(point).items()))))


def test_what_was_given_counts_towards_the_budget() -> None:
    stored = first()
    spent = sum(BEFORE.cost(result.trial.width) for result in stored)
    least = replace(BEFORE, budget=spent + 3 * BEFORE.cost(16), tolerance=1e-9, seeds=(0, 1))
    ladder = replay(least, stored)
    new = climb(ladder)
    assert sum(BEFORE.cost(result.trial.width) for result in new) <= 3 * BEFORE.cost(16)


def test_a_width_whose_trials_all_diverged_is_left_out_for_the_budget_that_is_spent() -> None:
    base = [result for result in first() if result.trial.width == 16]
    lost = [
        Result(replace(result.trial, width=32), Status.DIVERGED, reason="NaN")
        for result in base[:4]
    ]
    spent = sum(BEFORE.cost(result.trial.width) for result in [*base, *lost])
    ladder = Ladder(replace(BEFORE, budget=spent, seeds=(0, 1)), [*base, *lost])
    assert climb(ladder) == []
    assert [width.width for width in ladder.skipped] == [32]
    assert "budget is spent" in ladder.skipped[0].reason


@pytest.mark.parametrize(
    ("axes", "counts"),
    [
        (FIXED, {0.1}),
        ((BEFORE.axes[0], Axis("weight_decay", 0.02, 0.02, 1)), set()),
        ((BEFORE.axes[0],), set()),
        ((BEFORE.axes[1], BEFORE.axes[0]), {0.1}),
    ],
    ids=["fixed", "fixed elsewhere", "dropped", "swapped"],
)
def test_results_off_the_axes_say_nothing(axes: tuple[Axis, ...], counts: set[float]) -> None:
    spec = replace(BEFORE, axes=axes)
    given = Ladder(spec, first()).given
    kept = {result.trial.point["weight_decay"] for result in given}
    assert kept <= counts or len(given) == len(first())
    assert bool(given) == bool(counts)
    assert all(tuple(r.trial.point) == tuple(a.name for a in axes) for r in given)


def test_an_axis_that_was_fixed_can_be_swept() -> None:
    """All that is known lies on one value of it, so that the first round is still asked for."""
    stored = fresh(replace(BEFORE, axes=FIXED))
    ladder = replay(BEFORE, stored)
    new = climb(ladder)
    assert {r.trial for r in stored} <= {r.trial for r in ladder.known}
    assert not {r.trial for r in new} & {r.trial for r in stored}
    assert len({r.trial.weight_decay for r in new}) >= 3


def test_failures_that_were_given_are_tried_again() -> None:
    stored = first()
    lost = replace(stored[1], status=Status.FAILED, loss=None, reason="disk")
    ladder = replay(replace(BEFORE, seeds=(0, 1)), [stored[0], lost, *stored[2:]])
    assert lost.trial not in {result.trial for result in ladder.given}
    assert ladder.given


def test_telling_a_given_trial_changes_nothing() -> None:
    stored = first()
    ladder = Ladder(replace(BEFORE, widths=(16,)), stored)
    known = ladder.known
    ladder.tell(replace(stored[0], loss=9.0))
    assert ladder.known == known
    with pytest.raises(TrialError, match="no stage has asked"):
        ladder.tell(replace(stored[0], trial=replace(stored[0].trial, seed=99)))


def rows(folder: Path) -> list[Trial]:
    return [result.trial for result in open_result("bowl", folder / "results").results]


SWEEPS: dict[str, dict[str, Any]] = {
    "widths": {"ladder": {"widths": [8, 16, 32]}, "target": {"width": 64}},
    "seeds": {"ladder": {"seeds": [0, 1]}},
    "range": {"axes": {"lr": {"low": 0.02, "high": 2.0, "points": 6}}},
    "policy": {"ladder": {"policy": "paper"}},
    "tolerance": {"ladder": {"tolerance": 0.00001}},
}
PRICES = {"cost": {"parameters": {"8": 10, "16": 30, "32": 100, "64": 350}}}


@pytest.mark.parametrize("change", SWEEPS)
def test_a_sweep_trains_nothing_twice(change: str, tmp_path: Path) -> None:
    """There and back again, the table whole, and the answer the one of all results."""
    for tables in ({}, SWEEPS[change], {}):
        run_bowl(tmp_path, **PRICES, **tables)
        trials = rows(tmp_path)
        assert len(trials) == len(set(trials))
        assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(trials)
        table = output(tmp_path, "show", "bowl", "--csv").splitlines()
        assert len(table) == 1 + len(trials)
    finished = open_result("bowl", tmp_path / "results")
    assert len(finished.ladder._state().evidence) == len(trials)
    finished.cost()  # of widths that the spec has no longer, too


def test_what_another_writer_stored_is_told_not_trained(tmp_path: Path) -> None:
    """The last guard: a result that appears in the store is never made again."""
    spec = Spec.from_dict(bowl_spec(tmp_path))
    donor = run_bowl(tmp_path)[1]
    kept = [result for stage in donor.stages for result in donor.results(stage)]
    recorder = Recorder(
        ladder=Ladder(donor.spec),
        store=None,  # type: ignore[arg-type]  # nothing is stored here
        folder=None,  # type: ignore[arg-type]
        screen=None,  # type: ignore[arg-type]
        name=spec.name,
        workers={},
        planned={},
        known=kept,
    )
    assert recorder.ask() == []
    assert recorder.ladder.choices == donor.choices


def test_a_pack_cut_off_under_other_axes_is_stored(tmp_path: Path) -> None:
    """Its results wait in a file while the spec's axes change."""
    axes = (Axis("lr", 0.01, 1.0, 7), Axis("beta", 0.1, 0.9, 3))
    with closing(Store(f"sqlite:///{tmp_path / 'trials.db'}", "bowl", axes, "f")) as store:
        store.add(first()[0])
        assert store.results() == [first()[0]]


def test_time_left_knows_the_pace_of_a_width_that_the_spec_has_no_longer() -> None:
    wide = Result(Trial(64, Point.of({"lr": 0.1, "weight_decay": 0.1}), 0), Status.COMPLETE, 2.0)
    recorder = Recorder(
        ladder=replay(replace(BEFORE, widths=(16,), costs={16: 1.0}), [wide]),
        store=None,  # type: ignore[arg-type]
        folder=None,  # type: ignore[arg-type]
        screen=None,  # type: ignore[arg-type]
        name="bowl",
        workers={16: 1},
        planned={16: 9},
        known=[replace(wide, seconds=32.0)],
    )
    assert recorder.progress("running").eta_seconds == pytest.approx(9 * 32 / 16)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_trial_that_a_restored_searcher_does_not_ask_for_is_given(
    keeps: bool, tmp_path: Path
) -> None:
    """It ran while its Tuner was restored under a changed spec; what it ends with counts."""
    tables = {
        "name": "mine",
        "target": {"width": 64},
        "cost": {"parameters": {"8": 1, "16": 4, "64": 64}},
        "axes": {"lr": {"low": 0.01, "high": 1.0, "points": 7}},
    }
    results = tmp_path / "results" if keeps else None
    search = TelescopeSearch({**tables, "ladder": {"widths": [8, 16]}}, results=results)
    for number in range(4):
        search.suggest(str(number))
    search.on_trial_complete("0", {"loss": 3.0})
    search.save(str(tmp_path / "state.json"))
    search.close()
    changed = {**tables, "ladder": {"widths": [8, 16], "seeds": [4]}}
    search = TelescopeSearch(changed, results=results)
    search.restore(str(tmp_path / "state.json"))
    search.on_trial_complete("1", {"loss": 2.5})
    search.on_trial_complete("2", {"loss": 2.6})
    search.on_trial_complete("3", {"status": "failed"})
    assert search.suggest("4")
    assert {result.loss for result in search.ladder.given} == {2.5, 2.6, 3.0}
    asked = search.ladder.ask()
    search.close()
    if results:
        finished = open_result("mine", results)
        assert finished.ladder.ask() == asked
        assert [r.loss for r in finished.ladder.given] == [r.loss for r in search.ladder.given]


def test_a_users_ladder_is_given_what_it_would_not_ask_for() -> None:
    tables = {
        "name": "mine",
        "target": {"width": 64},
        "axes": {"lr": {"low": 0.01, "high": 1.0, "points": 7}, "weight_decay": {"value": 0.1}},
    }
    short = Spec.from_dict({**tables, "ladder": {"widths": [8, 16]}})
    longer = Spec.from_dict({**tables, "ladder": {"widths": [8, 16, 32], "seeds": [0, 1]}})
    first = UserLadder(short)
    tell_all(first)
    second = UserLadder(longer, first.results)
    assert {r.trial for r in second.given} == {r.trial for r in first.results}
    half = tell_all(second, 3)
    third = UserLadder(longer, second.results, given=second.given)
    rest = tell_all(third)
    assert not set(half) & set(rest)
    assert not {r.trial for r in first.results} & {*half, *rest}
    tell_all(second)
    assert third.choices == second.choices


def tell_all(ladder: UserLadder, limit: int = 10**6) -> list[Trial]:
    told: list[Trial] = []
    while len(told) < limit and (trials := ladder.ask()):
        ladder.tell(trials[0], loss=answer(trials[0]).loss or 9.0)
        told.append(trials[0])
    return told
