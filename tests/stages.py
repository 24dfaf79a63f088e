"""Sources of trials that need no ladder."""

from __future__ import annotations

from collections.abc import Sequence

from telescope.records import Point, Result, Trial, TrialSource


class Stages(TrialSource):
    """A source of trials in stages: the next opens when all of one are told."""

    def __init__(self, *sizes: int) -> None:
        self.stages = [
            [Trial(32 << stage, Point.of(lr=0.01 * (n + 1)), 0) for n in range(size)]
            for stage, size in enumerate(sizes)
        ]
        self.results: dict[Trial, Result] = {}

    def ask(self) -> Sequence[Trial]:
        for stage in self.stages:
            if unanswered := [trial for trial in stage if trial not in self.results]:
                return unanswered
        return []

    def tell(self, *results: Result) -> None:
        for result in results:
            assert result.trial not in self.results, f"{result.trial} is told twice"
            self.results[result.trial] = result

    def workers(self, stage: int) -> set[str]:
        return {self.results[trial].worker for trial in self.stages[stage]}


class Recorded(Stages):
    """One that keeps what it learns, in its order."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.started: list[Trial] = []
        self.told: list[tuple[Result, ...]] = []
        self.released: list[tuple[Trial, ...]] = []
        self.joined: list[int] = []

    def on_start(self, trial: Trial) -> None:
        self.started.append(trial)

    def on_workers(self, number: int) -> None:
        self.joined.append(number)

    def on_release(self, trials: Sequence[Trial]) -> None:
        self.released.append(tuple(trials))

    def tell(self, *results: Result) -> None:
        super().tell(*results)
        self.told.append(results)
