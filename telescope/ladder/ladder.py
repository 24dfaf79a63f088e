"""The ladder: asks for trials stage by stage, is told their results, and decides.

Its state is (spec, results) and nothing else: a fresh run, a resume, a dry run and `status` are the
same replay, and the order in which a round's results arrive never changes a decision. What it
decides is a policy's: `adaptive` or `paper`, each a function from a `State` to the next `Move`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from telescope.errors import TrialError
from telescope.ladder import adaptive, paper
from telescope.ladder.certificate import certify
from telescope.ladder.state import State
from telescope.records import (
    Certificate,
    Choice,
    LadderSpec,
    Result,
    Skipped,
    Stage,
    Status,
    Trial,
)

POLICIES = {"adaptive": adaptive.next_move, "paper": paper.next_move}


class Ladder:
    """A telescoping sweep as ask and tell.

    Attributes:
        stages: the stages opened so far, the last of them open unless the ladder is finished.
        choices: one per closed stage.
        skipped: the widths left out, each with the reason.
        stuck: why no choice can be made, or None.
    """

    def __init__(self, spec: LadderSpec) -> None:
        """Open the first stage."""
        self.spec = spec
        self.stages: list[Stage] = []
        self.choices: list[Choice] = []
        self.skipped: tuple[Skipped, ...] = ()
        self.stuck: str | None = None
        self._known: dict[Trial, Result] = {}
        self._asked: set[Trial] = set()
        self._advance()

    @property
    def is_finished(self) -> bool:
        """Whether every width has its choice, or was left out."""
        return len(self.choices) + len(self.skipped) == len(self.spec.widths)

    def ask(self) -> Sequence[Trial]:
        """The open stage's trials without a result; empty when finished or stuck."""
        if self.is_finished or self.stuck:
            return []
        return [trial for trial in self.stages[-1].trials if trial not in self._known]

    def tell(self, result: Result) -> None:
        """Take a trial's final result; decides when it was the last one missing.

        The first result of a trial counts; telling the same again changes nothing.

        Raises:
            TrialError: no stage so far has asked for this trial.
        """
        if result.trial not in self._asked:
            raise TrialError(
                f"{result.trial}: no stage has asked for this trial; tell what `ask` gave"
            )
        if result.trial not in self._known:
            self._known[result.trial] = result
            self._advance()

    def results(self, stage: Stage) -> list[Result]:
        """The results of a stage so far, in the order of its trials."""
        return self._state().results(stage)

    def certificate(
        self, width: int | None = None, *, rule_checked: bool = False
    ) -> Certificate | None:
        """What the closed stages say of a width.

        Args:
            width: the width to predict; left out, the spec's target.
            rule_checked: a coordinate check of the model has passed.

        Returns:
            None under policy `paper`, which says nothing of how sure it is, and before the first
            choice.
        """
        if self.spec.policy == "paper" or not self.choices or not self.spec.swept:
            return None
        width = width or self.spec.target
        return certify(self._state(), self.skipped, width, rule_checked=rule_checked)

    def _state(self) -> State:
        return State(self.spec, tuple(self.stages), tuple(self.choices), self._known)

    def _advance(self) -> None:
        """Make the policy's moves until it waits for results, is finished or stuck."""
        policy = POLICIES[self.spec.policy]
        while not self.is_finished and not self.stuck and (move := policy(self._state())):
            self.stuck = move.stuck
            if move.choice:
                self.choices.append(move.choice)
            self.skipped = move.skipped
            if move.stage:
                if len(self.stages) > len(self.choices):
                    self.stages.pop()
                self.stages.append(move.stage)
                self._asked.update(move.stage.trials)


def replay(spec: LadderSpec, results: Iterable[Result], *, retry_failures: bool = False) -> Ladder:
    """Rebuild a ladder from what is known; results that it does not ask for are left aside.

    Args:
        spec: the ladder's spec, which may have changed since the results were made.
        results: results in any order; of one trial's, the first that did not fail counts.
        retry_failures: if failed trials leave the ladder stuck, ask for those again.
    """
    known: dict[Trial, Result] = {}
    for result in results:
        if result.trial not in known or known[result.trial].status is Status.FAILED:
            known[result.trial] = result
    ladder = Ladder(spec)
    while answered := [known[trial] for trial in ladder.ask() if trial in known]:
        for result in answered:
            ladder.tell(result)
    if ladder.stuck and retry_failures:
        stuck_trials = set(ladder.stages[-1].trials)
        failed = {t for t in stuck_trials & known.keys() if known[t].status is Status.FAILED}
        if failed:
            return replay(spec, [r for trial, r in known.items() if trial not in failed])
    return ladder
