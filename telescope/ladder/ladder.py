"""The ladder: asks for trials stage by stage, is told their results, and decides.

Its state is (spec, results) and nothing else: a fresh run, a resume, a dry run and `status` are the
same replay, and the order in which a stage's results arrive never changes a decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from telescope.errors import TrialError
from telescope.ladder.choose import choose, stuck_reason
from telescope.ladder.grid import paper_stage
from telescope.records import Choice, LadderSpec, Result, Stage, Status, Trial


class Ladder:
    """Algorithm 1 as ask and tell.

    Attributes:
        stages: the stages opened so far, the last of them open unless the ladder is finished.
        choices: one per closed stage.
        stuck: why no choice can be made, or None.
    """

    def __init__(self, spec: LadderSpec) -> None:
        """Open the first stage."""
        self.spec = spec
        self.stages: list[Stage] = [paper_stage(spec, spec.widths[0], {})]
        self.choices: list[Choice] = []
        self.stuck: str | None = None
        self._results: dict[Trial, Result] = {}

    @property
    def is_finished(self) -> bool:
        """Whether every width has its choice."""
        return len(self.choices) == len(self.spec.widths)

    def ask(self) -> Sequence[Trial]:
        """The open stage's trials without a result; empty when finished or stuck."""
        if self.is_finished or self.stuck:
            return []
        return [trial for trial in self.stages[-1].trials if trial not in self._results]

    def tell(self, result: Result) -> None:
        """Take a trial's final result; closes the stage when it was the last one missing.

        The first result of a trial counts; telling the same again changes nothing.

        Raises:
            TrialError: no stage so far has asked for this trial.
        """
        if not any(result.trial in stage.trials for stage in self.stages):
            raise TrialError(
                f"{result.trial}: no stage has asked for this trial; tell what `ask` gave"
            )
        self._results.setdefault(result.trial, result)
        while not self.is_finished and not self.stuck and self._close_stage():
            pass

    def results(self, stage: Stage) -> list[Result]:
        """The results of a stage so far, in the order of its trials."""
        return [self._results[trial] for trial in stage.trials if trial in self._results]

    def _close_stage(self) -> bool:
        """Decide the open stage if it can be decided, and open the next; says whether it did."""
        stage = self.stages[-1]
        results = self.results(stage)
        self.stuck = stuck_reason(stage, results)
        if self.stuck or len(results) < len(stage.trials):
            return False
        choice = choose(stage, results)
        self.choices.append(choice)
        if not self.is_finished:
            width = self.spec.widths[len(self.choices)]
            self.stages.append(paper_stage(self.spec, width, choice.point))
        return True


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
