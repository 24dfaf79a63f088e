"""The Python API: a ladder for any training loop, its transfer, and a view of finished sweeps."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from telescope.answer.derive import transfer
from telescope.errors import RefusedError, SpecError, StoreError, TrialError
from telescope.files import write_json
from telescope.ladder import ladder
from telescope.ladder.ladder import replay
from telescope.ladder.plan import over_budget
from telescope.losses import as_number, judged, shown
from telescope.markup import table, text
from telescope.records import (
    Certificate,
    Choice,
    LadderSpec,
    Result,
    Skipped,
    Status,
    Trial,
)
from telescope.spec.spec import Spec

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from telescope.answer.finished import Finished
    from telescope.transfer.settings import Transfer
    from telescope.transfer.shapes import Shapes

FORMAT = 1
"""Of a file that `Ladder.save` writes."""


class Ladder:
    """The telescoping ladder for any training loop.

    >>> import math
    >>> spec = Spec.load("quickstart")
    >>> ladder = Ladder(spec)
    >>> while trials := ladder.ask():
    ...     for trial in trials:
    ...         ladder.tell(trial, loss=2.0 + math.log2(trial.lr / 0.1) ** 2 / 50)
    >>> [choice.width for choice in ladder.choices], round(ladder.choices[-1].point.lr, 2)
    ([32, 64, 128], 0.1)
    """

    def __init__(
        self, spec: Spec, results: Iterable[Result] = (), *, given: Iterable[Result] = ()
    ) -> None:
        """Start a ladder, or resume one.

        Args:
            spec: the sweep.
            results: results of an earlier ladder. None of these trials is asked for again, except
                failures that left the ladder stuck. Under the same spec the ladder resumes as if
                the results had just been told. If the spec has changed (axes, widths, seeds,
                policy, tolerance, target or budget) and the ladder does not ask for some of these
                trials, all results count from the start.
            given: results that count from the start in any case, among `results` or not. Pass the
                earlier ladder's attribute `given` to resume exactly where that one stopped.

        Raises:
            RefusedError: the ladder must cost more than the budget allows.
            ModelError, SpecError: the model file cannot be built, or does not take a keyword.
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
        """Wrap the program's internal ladder in this class."""
        self = cls.__new__(cls)
        self.spec, self._ladder = spec, ladder
        return self

    def ask(self) -> list[Trial]:
        """Return the open stage's unanswered trials; [] when the ladder is finished or stuck."""
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
            trial: a trial from `ask`.
            loss: its final loss, a number of any library, in any unit; lower is better. NaN and
                infinities count as a divergence.
            status: "diverged" (the point's fault: ranks last) or "failed" (the machine's fault:
                never ranked) instead of a loss.
            reason: the reason that it diverged or failed.

        Raises:
            TrialError: the trial was never asked for, or loss and status do not fit together.
        """
        try:
            self._ladder.tell(_answer(trial, loss, status, reason))
        except ValueError as error:
            raise TrialError(f"tell({trial}): {error}") from error

    @property
    def results(self) -> tuple[Result, ...]:
        """Every answer so far, from which a later `Ladder` can resume."""
        return tuple(self._ladder.known)

    @property
    def given(self) -> tuple[Result, ...]:
        """The results that counted from the start, because the spec had changed."""
        return self._ladder.given

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices, one per finished stage."""
        return tuple(self._ladder.choices)

    @property
    def stuck(self) -> str | None:
        """The reason that the ladder cannot go on; None if it can or is finished."""
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
        roles: Mapping[str, str] | None = None,
        fold_readout: bool = False,
    ) -> Transfer:
        """Return the settings to use at a width.

        Args:
            width: the target's width; by default the spec's.
            steps: the target's optimizer steps; by default the spec's. If they differ from the
                sweep's, the weight decay is rescaled.
            shapes: the parameters of a model that the spec does not name, or a file of them; see
                `telescope.Shapes`. By default the spec's [trainer] shapes.
            roles: pattern of names → role, for a file of shapes; see `Shapes.load`.
            fold_readout: return the readout's settings for code without mup's multiplier.

        Raises:
            RefusedError: no stage has finished yet, or the ladder is stuck.
            ModelError: the model file cannot be built at this width.
            SpecError: the shapes are of another width or not valid.
        """
        return transfer(
            self.spec,
            self._ladder,
            width=None if width is None else operator.index(width),
            steps=None if steps is None else operator.index(steps),
            shapes=shapes,
            roles=roles,
            fold_readout=fold_readout,
        )

    def save(self, path: str | Path) -> None:
        """Write the spec and every result so far to a JSON file, whole or not at all.

        Args:
            path: the file, in an existing folder; an existing file is replaced.

        Raises:
            StoreError: the file cannot be written.
        """
        data = {
            "format": FORMAT,
            "spec": self.spec.as_dict(),
            "model": self.spec.model_source,
            "results": [result.as_dict() for result in self.results],
            "given": [result.trial.as_dict() for result in self.given],
        }
        try:
            write_json(Path(path), data)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Ladder:
        """Read a saved ladder, which resumes where it was.

        Args:
            path: a file written by `save`.

        Raises:
            StoreError: the file is missing, damaged or from a newer version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found := data["format"], int) or found > FORMAT:
                raise ValueError(f"format {found!r}, this version reads up to {FORMAT}")
            model = tuple(map(str, data["model"])) if data["model"] else None
            tables, results = dict(data["spec"]), [Result.from_dict(r) for r in data["results"]]
            given = {Trial.from_dict(trial) for trial in data["given"]}
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise StoreError(f"{path}: no file of Ladder.save, or a damaged one ({why})") from error
        try:
            spec = Spec.from_dict(tables, model_source=model)  # type: ignore[arg-type]
        except SpecError as error:
            raise StoreError(f"{path}: {'; '.join(error.faults)}") from error
        return cls(spec, results, given=[r for r in results if r.trial in given])

    @property
    def _state(self) -> str:
        """The progress, in words."""
        if self.stuck:
            return f"stuck: {self.stuck}"
        if self._ladder.is_finished:
            return "finished"
        return f"{len(self.ask())} trials to answer at width {self._ladder.stages[-1].width}"

    def __repr__(self) -> str:
        """Describe the sweep, its progress and the last choice in one line."""
        chosen = (
            f"; width {c.width}: {c.point}" if (c := next(reversed(self.choices), None)) else ""
        )
        return f"<Ladder {self.spec.name}: {len(self.results)} results, {self._state}{chosen}>"

    def _repr_html_(self) -> str:
        """The same with the choices in a table, for notebooks."""
        return f"<p>{text(repr(self)[1:-1])}</p>{_choices_table(self.choices)}"


class Sweep:
    """A sweep that was run, finished or not; `telescope.open` returns one.

    It shows the state at the moment at which it was opened.
    """

    def __init__(self, finished: Finished) -> None:
        """Wrap a results folder that was read and replayed."""
        self._finished = finished

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.spec.name

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return self._finished.folder.path

    @property
    def spec(self) -> Spec:
        """The spec that was swept."""
        return self._finished.spec

    @property
    def ladder(self) -> Ladder:
        """The ladder, in the state to which its results lead."""
        return Ladder.around(self.spec, self._finished.ladder)

    @property
    def results(self) -> tuple[Result, ...]:
        """Every stored result."""
        return tuple(self._finished.results)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A table as in `trials.csv`, one row per trial: width, seed, axes, loss, status, …"""
        from telescope.report.frames import trials_frame

        return trials_frame(self._finished.ladder, self._finished.results)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices, one per finished stage."""
        return tuple(self._finished.ladder.choices)

    @property
    def certificate(self) -> Certificate | None:
        """The verdict on the answer for the spec's target; None under policy `paper`."""
        return self._finished.certificate

    @property
    def cost(self) -> Mapping[str, Any]:
        """The sweep's cost, with the keys of `show --json`."""
        return self._finished.cost()

    def transfer(
        self,
        width: int | None = None,
        steps: int | None = None,
        *,
        shapes: Shapes | str | Path | None = None,
        roles: Mapping[str, str] | None = None,
        fold_readout: bool = False,
    ) -> Transfer:
        """Return the settings at a width, as `telescope transfer` does; see `Ladder.transfer`."""
        return self._finished.transfer(
            width=None if width is None else operator.index(width),
            steps=None if steps is None else operator.index(steps),
            shapes=shapes,
            roles=roles,
            fold_readout=fold_readout,
        )

    def figure(self) -> Figure:
        """Draw the figure of `loss.png` with matplotlib: optimum against width, and excess loss."""
        from telescope.report.figures import loss_figure

        return loss_figure(self._finished.ladder, self.name)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report of `telescope report`.

        Args:
            out: the file; by default `report.html` in the sweep's folder.

        Returns:
            The file.

        Raises:
            SpecError: the file cannot be written.
        """
        from telescope.sweep.reporting import write_page

        return write_page([self._finished], None if out is None else Path(out))

    def __repr__(self) -> str:
        """Describe the sweep, its progress and the answer in one line."""
        answer, ladder = self._finished.target_point(), self._finished.ladder
        state = f"stuck: {ladder.stuck}" if ladder.stuck else "finished"
        state = state if ladder.is_finished or ladder.stuck else "not finished"
        verdict = f", {self.certificate.verdict}" if self.certificate else ""
        target = self.spec.target.width
        said = f"; for width {target}: {answer}{verdict}" if answer and not ladder.stuck else ""
        return f"<Sweep {self.name}: {len(self.results)} results, {state}{said}>"

    def _repr_html_(self) -> str:
        """The same with the choices in a table, for notebooks."""
        return f"<p>{text(repr(self)[1:-1])}</p>{_choices_table(self.choices)}"


def open(sweep: str | Path, results: str | Path = "results") -> Sweep:
    """Read a sweep from its results folder, also while it is running.

    Args:
        sweep: a path to its folder, or its name under `results`.
        results: the folder of all results.

    Raises:
        SpecError: there is no such sweep.
        ResumeError: its files or its store cannot be read.
    """
    from telescope.answer.finished import open_result

    return Sweep(open_result(sweep, Path(results)))


def _choices_table(choices: Iterable[Choice]) -> str:
    """Return the choices as an HTML table, one row per width; "" without any."""
    rows = [
        [choice.width, *(f"{value:.4g}" for value in choice.point.values()), f"{choice.loss:.4f}"]
        for choice in choices
    ]
    axes = next((list(choice.point) for choice in choices), [])
    return table(["width", *axes, "loss"], rows) if rows else ""


def _answer(
    trial: Trial, loss: SupportsFloat | None, status: str | Status | None, reason: str
) -> Result:
    """Turn the arguments of `tell` into a result.

    Raises:
        ValueError: loss and status do not fit together or are not valid.
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
    from telescope.sweep.counting import count_costs

    costs = count_costs(spec)
    return spec.ladder_spec_with(costs.per_trial(spec), costs.of_target(spec))
