"""Input and output of a policy: a ladder's state, and its next move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from telescope.records import Choice, LadderSpec, Result, Skipped, Stage, Trial

Made = TypeVar("Made")


class Memory(Protocol):
    """A cache of values computed from a state, so that a replay need not compute them again."""

    def recall(self, kind: object, of: object, make: Callable[[], Made]) -> Made:
        """Return the value of type `kind` computed from `of`; call `make` if it is new."""
        ...

    def keep(self) -> None:
        """Store the new values for other processes."""
        ...


@dataclass(frozen=True, slots=True)
class State:
    """A ladder between two moves: a function of the spec and the results told so far."""

    spec: LadderSpec
    stages: tuple[Stage, ...]
    choices: tuple[Choice, ...]
    """One per closed stage."""
    known: Mapping[Trial, Result]
    given: tuple[Trial, ...] = ()
    """The trials of `known` that counted before the first stage opened. All are fitted from the
    start, and a stage of an adaptive ladder begins with those of its width."""

    @property
    def open_stage(self) -> Stage | None:
        """The stage without a choice; None before the first and between two."""
        return self.stages[-1] if len(self.stages) > len(self.choices) else None

    def results(self, stage: Stage) -> list[Result]:
        """Return the results of a stage so far, in the order of its trials."""
        return [self.known[trial] for trial in stage.trials if trial in self.known]

    def given_at(self, width: int) -> tuple[Trial, ...]:
        """Return the given trials of one width."""
        return tuple(trial for trial in self.given if trial.width == width)

    @property
    def given_ahead(self) -> list[Result]:
        """Given results of widths without a stage so far; some may never have one."""
        opened = {stage.width for stage in self.stages}
        return [self.known[trial] for trial in self.given if trial.width not in opened]

    @property
    def evidence(self) -> list[Result]:
        """Every result that the fit uses: those of the stages, and those given ahead of them."""
        return [r for stage in self.stages for r in self.results(stage)] + self.given_ahead

    @property
    def content(self) -> tuple[object, ...]:
        """Everything that a decision can depend on, the same in whatever order results came in."""
        results = sorted(
            (r.trial.width, r.trial.point.axes, r.trial.seed, r.status, r.loss, r.reason)
            for r in self.known.values()
        )
        return self.spec, self.stages, self.choices, self.given, results

    def is_answered(self, stage: Stage) -> bool:
        """Tell whether every trial that a stage has asked for has a result."""
        return all(trial in self.known for trial in stage.trials)

    @property
    def spent(self) -> float:
        """Cost of all trials asked for and given, in the unit of the spec's costs."""
        asked = sum(len(stage.trials) * self.spec.cost(stage.width) for stage in self.stages)
        return asked + sum(self.spec.cost(result.trial.width) for result in self.given_ahead)


@dataclass(frozen=True, slots=True)
class Move:
    """A policy's decision: a stage opens, grows or closes with a choice, or the ladder is stuck."""

    stage: Stage | None = None
    """The open stage with another round, or a new one."""
    choice: Choice | None = None
    """Closes the open stage."""
    skipped: tuple[Skipped, ...] = ()
    """All widths that are left out, with or without a choice; the ladder is then finished."""
    stuck: str | None = None
    """The reason that no choice can be made, whatever further results say."""
