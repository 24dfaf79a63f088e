"""The ladder: asks for trials stage by stage, is told their results, and decides.

Its state is the spec, the results given at its start and the results told since, nothing else. So a
fresh run, a resume, a dry run and `status` are the same replay, and the order in which a round's
results arrive never changes a decision. The decisions are made by a policy, `adaptive` or `paper`:
a function from a `State` to the next `Move`.

Results are given at the start where the spec has changed since they were made: its widths, seeds,
ranges, points, policy, tolerance, target or budget. They count as evidence, and none is trained
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from telescope.errors import TrialError
from telescope.ladder.state import Made, Memory, Move, State
from telescope.records import (
    Certificate,
    Choice,
    LadderSpec,
    Point,
    Result,
    Skipped,
    Stage,
    Status,
    Trial,
)

if TYPE_CHECKING:
    from telescope.ladder.portrait import Portrait


def _policy(name: str) -> Callable[[State], Move | None]:
    """Return a policy by its name, imported only now: a replay from memory never needs it."""
    from telescope.ladder import adaptive, paper

    return {"adaptive": adaptive.next_move, "paper": paper.next_move}[name]


class Ladder:
    """A telescoping sweep with the interface ask and tell.

    Attributes:
        given: the results that counted from the start, of any width.
        stages: the stages opened so far; the last one is open unless the ladder is finished.
        choices: one per closed stage.
        skipped: the widths left out, each with the reason.
        stuck: the reason that no choice can be made, or None.
    """

    def __init__(
        self, spec: LadderSpec, given: Iterable[Result] = (), *, memory: Memory | None = None
    ) -> None:
        """Open the first stage.

        Args:
            spec: the ladder's spec.
            given: results made before, in any order; the first result of a trial counts. Ignored
                are failed ones, and those of other axes or of another value of a fixed axis.
            memory: remembers decisions and certificates; without one, each is computed again.
        """
        self.spec = spec
        self.memory = memory
        self.given = tuple(sorted(_usable(spec, given), key=_by_content))
        self.stages: list[Stage] = []
        self.choices: list[Choice] = []
        self.skipped: tuple[Skipped, ...] = ()
        self.stuck: str | None = None
        self._known: dict[Trial, Result] = {result.trial: result for result in self.given}
        self._asked: set[Trial] = set()
        self._advance()

    @property
    def is_finished(self) -> bool:
        """True once every width has its choice or was left out."""
        return len(self.choices) + len(self.skipped) == len(self.spec.widths)

    def ask(self) -> Sequence[Trial]:
        """Return the open stage's trials without a result; none when finished or stuck."""
        if self.is_finished or self.stuck:
            return []
        return [trial for trial in self.stages[-1].trials if trial not in self._known]

    def tell(self, result: Result) -> None:
        """Take a trial's final result; decide if it was the last one missing.

        The first result of a trial counts; telling the same again changes nothing.

        Raises:
            TrialError: no stage so far has asked for this trial.
        """
        if not self.counts(result.trial):
            raise TrialError(
                f"{result.trial}: no stage has asked for this trial; tell what `ask` gave"
            )
        if result.trial not in self._known:
            self._known[result.trial] = result
            self._advance()

    def counts(self, trial: Trial) -> bool:
        """Tell whether a trial's result is evidence: asked for by a stage, or given."""
        return trial in self._asked or trial in self._known

    @property
    def known(self) -> list[Result]:
        """Every result so far: the stages' in the order of their trials, then the given ones."""
        ours = [result for stage in self.stages for result in self.results(stage)]
        return ours + [result for result in self.given if result.trial not in self._asked]

    @property
    def content(self) -> tuple[object, ...]:
        """Everything that its decisions, certificates and figures depend on."""
        return self._state().content

    def results(self, stage: Stage) -> list[Result]:
        """Return the results of a stage so far, in the order of its trials."""
        return self._state().results(stage)

    def certificate(
        self, width: int | None = None, *, rule_checked: bool = False
    ) -> Certificate | None:
        """Judge the answer for a width from the closed stages.

        Args:
            width: the width to predict; left out, the spec's target.
            rule_checked: a coordinate check of the model has passed.

        Returns:
            None before the first choice, without a swept axis, and under policy `paper`, which
            gives no measure of certainty.
        """
        if self.spec.policy == "paper" or not self.choices or not self.spec.swept:
            return None
        state, skipped, width = self._state(), self.skipped, width or self.spec.target

        def judge() -> Certificate:
            from telescope.ladder.certificate import certify  # as late as a policy

            return certify(state, skipped, width, rule_checked=rule_checked)

        return self._recall(Certificate, (state.content, skipped, width, rule_checked), judge)

    def _next_move(self) -> Move | None:
        state = self._state()
        return self._recall(Move | None, state.content, lambda: _policy(self.spec.policy)(state))

    def _recall(self, kind: object, of: object, make: Callable[[], Made]) -> Made:
        return self.memory.recall(kind, of, make) if self.memory else make()

    def portrait(self, width: int | None = None) -> Portrait:
        """Return the data of the ladder's figures, at any time; see `portrait.portrait`.

        Args:
            width: the width to predict; left out, the spec's target.
        """
        from telescope.ladder.portrait import Portrait, portrait  # as late as a policy

        state, width = self._state(), width or self.spec.target
        return self._recall(Portrait, (state.content, width), lambda: portrait(state, width))

    def _state(self) -> State:
        given = tuple(result.trial for result in self.given)
        return State(self.spec, tuple(self.stages), tuple(self.choices), self._known, given)

    def _advance(self) -> None:
        """Make the policy's moves until the ladder waits for results, is finished or is stuck."""
        while not self.is_finished and not self.stuck and (move := self._next_move()):
            self.stuck = move.stuck
            if move.choice:
                self.choices.append(move.choice)
            self.skipped = move.skipped
            if move.stage:
                if len(self.stages) > len(self.choices):
                    self.stages.pop()
                self.stages.append(move.stage)
                self._asked.update(move.stage.trials)


def replay(
    spec: LadderSpec,
    results: Iterable[Result],
    *,
    given: Iterable[Trial] = (),
    retry_failures: bool = False,
    memory: Memory | None = None,
) -> Ladder:
    """Rebuild a ladder from all known results.

    The results of `given` count from the start; the others are told when the ladder asks for their
    trials. If it never asks for one of them, because its spec has changed since, then all results
    count from the start.

    Args:
        spec: the ladder's spec, which may have changed since the results were made.
        results: results in any order; the first one of a trial that did not fail counts.
        given: the trials whose results counted from the start since the last change of the spec.
        retry_failures: if failed trials leave the ladder stuck, ask for them again.
        memory: see `Ladder`.
    """
    known: dict[Trial, Result] = {}
    for result in results:
        if result.trial not in known or known[result.trial].status is Status.FAILED:
            known[result.trial] = result
    ladder = _told(spec, known, given, retry_failures, memory)
    if all(ladder.counts(result.trial) for result in _usable(spec, known.values())):
        return ladder
    return _told(spec, known, known, retry_failures, memory)


def _told(
    spec: LadderSpec,
    known: Mapping[Trial, Result],
    given: Iterable[Trial],
    retry_failures: bool,
    memory: Memory | None,
) -> Ladder:
    """Build a ladder with some known results given; tell it the others when it asks for them."""
    ladder = Ladder(spec, [known[trial] for trial in given if trial in known], memory=memory)
    while answered := [known[trial] for trial in ladder.ask() if trial in known]:
        for result in answered:
            ladder.tell(result)
    if ladder.stuck and retry_failures:
        stuck_trials = set(ladder.stages[-1].trials)
        failed = {t for t in stuck_trials & known.keys() if known[t].status is Status.FAILED}
        if failed:
            kept = {trial: result for trial, result in known.items() if trial not in failed}
            return _told(spec, kept, given, True, memory)
    return ladder


def _usable(spec: LadderSpec, results: Iterable[Result]) -> list[Result]:
    """Return one result per trial that fits the spec's axes, with the axes in the spec's order."""
    names = [axis.name for axis in spec.axes]
    usable: dict[Trial, Result] = {}
    for result in results:
        point = result.trial.point
        if result.status is Status.FAILED or set(point) != set(names):
            continue
        if all(point[axis.name] == axis.low for axis in spec.axes if axis.is_fixed):
            ordered = Point.of({name: point[name] for name in names})
            trial = replace(result.trial, point=ordered)
            usable.setdefault(trial, replace(result, trial=trial))
    return list(usable.values())


def _by_content(result: Result) -> tuple[int, tuple[tuple[str, float], ...], int]:
    trial = result.trial
    return trial.width, trial.point.axes, trial.seed
