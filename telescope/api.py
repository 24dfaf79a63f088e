"""The Python API: a ladder that asks for trials and is told their losses, and its transfer."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

from telescope.answer import transfer
from telescope.errors import RefusedError, TrialError
from telescope.ladder import ladder
from telescope.ladder.ladder import replay
from telescope.ladder.plan import over_budget
from telescope.losses import as_number, judged, shown
from telescope.records import (
    Choice,
    LadderSpec,
    Result,
    Skipped,
    Status,
    Trial,
)
from telescope.spec import Spec

if TYPE_CHECKING:
    from telescope.transfer.settings import Transfer
    from telescope.transfer.shapes import Shapes


class Ladder:
    """The telescoping ladder for any training loop.

    >>> import math
    >>> spec = Spec.load("quickstart")
    >>> ladder = Ladder(spec)
    >>> while trials := ladder.ask():
    ...     for trial in trials:
    ...         ladder.tell(trial, loss=2.0 + math.log2(trial.lr / 0.1) ** 2 / 50)
    >>> [choice.width for choice in ladder.choices], round(ladder.choices[-1].point.lr, 2)
    ([32, 64], 0.1)
    """

    def __init__(
        self, spec: Spec, results: Iterable[Result] = (), *, given: Iterable[Result] = ()
    ) -> None:
        """Start a ladder, or go on with one.

        Args:
            spec: the sweep.
            results: results of an earlier ladder. None is asked for again, but for failures that
                left it stuck. Where this ladder asks for all of them, as under the same spec, it
                goes on as if they had been told. Where it does not, because the spec has changed in
                its axes, widths, seeds, policy, tolerance, target or budget, all of them are given:
                they count from the start.
            given: results that count from the start in any case, among `results` or not. Pass the
                attribute `given` of the earlier ladder to go on exactly as that one would have.

        Raises:
            RefusedError: the ladder must cost more than the budget allows.
            ModelError, SpecError: the model file cannot be built, or takes no such keyword.
        """
        self.spec = spec
        ladder_spec = _with_costs(spec)
        if refusal := over_budget(ladder_spec, spec.budget.max_over_target):
            squares = "" if spec.cost or spec.model else "; without [cost] a run costs its width²"
            raise RefusedError(f"{spec.name}: {refusal}{squares}")
        given = tuple(given)
        self._ladder = replay(
            ladder_spec,
            (*given, *results),
            given=[result.trial for result in given],
            retry_failures=True,
        )

    @classmethod
    def around(cls, spec: Spec, ladder: ladder.Ladder) -> Ladder:
        """A ladder of the program's inside, as users know it."""
        self = cls.__new__(cls)
        self.spec, self._ladder = spec, ladder
        return self

    def ask(self) -> list[Trial]:
        """The open stage's trials still unanswered; [] when the ladder is finished or stuck."""
        return list(self._ladder.ask())

    def tell(
        self,
        trial: Trial,
        *,
        loss: SupportsFloat | None = None,
        status: str | Status | None = None,
        reason: str = "",
    ) -> None:
        """Answer a trial; the order of answers never matters.

        Args:
            trial: one that `ask` gave.
            loss: its final loss, a number of any library in any unit in which lower is better;
                NaN and infinities are a divergence.
            status: "diverged" (the point's fault: ranks last) or "failed" (the machine's fault:
                never ranked) instead of a loss.
            reason: why it diverged or failed.

        Raises:
            TrialError: the trial was never asked for, or loss and status do not fit together.
        """
        try:
            self._ladder.tell(_answer(trial, loss, status, reason))
        except ValueError as error:
            raise TrialError(f"tell({trial}): {error}") from error

    @property
    def results(self) -> tuple[Result, ...]:
        """Every answer so far, for a later `Ladder` to go on from."""
        return tuple(self._ladder.known)

    @property
    def given(self) -> tuple[Result, ...]:
        """Those of the results that counted from the start, because the spec had changed."""
        return self._ladder.given

    @property
    def choices(self) -> tuple[Choice, ...]:
        """One per finished stage."""
        return tuple(self._ladder.choices)

    @property
    def stuck(self) -> str | None:
        """Why the ladder cannot go on; None when it can, or is finished."""
        return self._ladder.stuck

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The widths that were left out, with the reason."""
        return self._ladder.skipped

    def transfer(
        self,
        width: int | None = None,
        steps: int | None = None,
        *,
        shapes: Shapes | str | Path | None = None,
        fold_readout: bool = False,
    ) -> Transfer:
        """What to use at a width.

        Args:
            width: the target's width; left out, the spec's.
            steps: the target's optimizer steps; left out, the spec's. Another number than the
                sweep's rescales the weight decay.
            shapes: the parameters of a model that the spec does not name, or a file of them; see
                `telescope.Shapes`. Left out, the spec's [trainer] shapes.
            fold_readout: give the readout settings for code without mup's multiplier.

        Raises:
            RefusedError: no stage has finished yet, or the ladder is stuck.
            ModelError: the model file cannot be built at this width.
            SpecError: shapes that are of another width, or make no sense.
        """
        return transfer(
            self.spec,
            self._ladder,
            width=None if width is None else operator.index(width),
            steps=None if steps is None else operator.index(steps),
            shapes=shapes,
            fold_readout=fold_readout,
        )


def _answer(
    trial: Trial, loss: SupportsFloat | None, status: str | Status | None, reason: str
) -> Result:
    """The result that `tell` was given of a trial.

    Raises:
        ValueError: loss and status do not fit together, or are none.
    """
    try:
        given = Status(status) if status is not None else None
    except ValueError:
        raise ValueError(
            f"status: got {status!r}, must be {', '.join(map(repr, map(str, Status)))}"
        ) from None
    if loss is None:
        if given is None or given is Status.COMPLETE:
            raise ValueError("got no loss; give loss=, or status='diverged' or 'failed'")
        return Result(trial, given, reason=reason)
    if (number := as_number(loss)) is None:
        raise ValueError(f"loss: got {shown(loss)} ({type(loss).__name__}), must be a number")
    if given is not None and given is not Status.COMPLETE:
        if math.isfinite(number):
            raise ValueError(f"got loss {number} and status '{given}'; give one of the two")
        return Result(trial, given, reason=reason or f"loss {number}")
    found, finite, why = judged(number)
    return Result(trial, found, loss=finite, reason=reason or why)


def _with_costs(spec: Spec) -> LadderSpec:
    """The ladder's spec, with costs as given, counted where it says what is trained, or width²."""
    if spec.cost:
        return spec.ladder_spec_with(spec.costs, spec.target_cost)
    if spec.model is None or spec.train is None:
        squares = {width: float(width) ** 2 for width in spec.ladder.widths}
        longer = spec.target.steps / spec.steps if spec.target.steps and spec.steps else 1.0
        return spec.ladder_spec_with(squares, float(spec.target.width) ** 2 * longer)
    from telescope.prepare import count_costs

    return count_costs(spec).ladder_spec
