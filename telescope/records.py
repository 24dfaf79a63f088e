"""The nouns of a sweep: frozen, hashable, convertible to JSON, standard library only.

A *point* is one setting of the axes. A *trial* is one training run (width, point, seed), and a
*result* is its outcome. A *stage* is the set of trials of one width. A *choice* is the decision
from a closed stage, with its reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from typing import Any, Protocol


class Status(StrEnum):
    """The outcome of a trial."""

    COMPLETE = "complete"
    """A finite held-out loss."""
    DIVERGED = "diverged"
    """The point's fault: ranks after every complete point, never retried."""
    FAILED = "failed"
    """The machine's fault: retried by the dispatcher, never ranked."""


@dataclass(frozen=True, slots=True, repr=False)
class Point(Mapping[str, float]):
    """An ordered mapping axis → value, in base-width units; identity is its content.

    >>> point = Point.of(lr=0.05, weight_decay=0.1)
    >>> point.lr, dict(point)
    (0.05, {'lr': 0.05, 'weight_decay': 0.1})
    """

    axes: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, values: Mapping[str, float] | None = None, /, **named: float) -> Point:
        """Build a point from a mapping or from keywords, in their order."""
        return cls(tuple((name, float(v)) for name, v in {**(values or {}), **named}.items()))

    def __getitem__(self, axis: str) -> float:
        """Return the value of one axis."""
        for name, value in self.axes:
            if name == axis:
                return value
        raise KeyError(axis)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the axes' names, in the spec's order."""
        return (name for name, _ in self.axes)

    def __len__(self) -> int:
        """Return the number of axes, fixed ones included."""
        return len(self.axes)

    def __str__(self) -> str:
        """Return the form for people: ``lr 0.05, weight_decay 0.1``."""
        return ", ".join(f"{name} {value:.4g}" for name, value in self.axes)

    def __repr__(self) -> str:
        """Return the Python expression for the point."""
        return f"Point.of({', '.join(f'{name}={value!r}' for name, value in self.axes)})"

    @property
    def lr(self) -> float:
        """Peak learning rate at base width."""
        return self["lr"]

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay at base width, as torch takes it: a step decays by lr · wd."""
        return self["weight_decay"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One training run. Two trials with the same content are the same trial."""

    width: int
    point: Point
    seed: int

    def __post_init__(self) -> None:
        """Convert other libraries' integers to Python's, which JSON and databases require."""
        for name in ("width", "seed"):
            if type(getattr(self, name)) is not int:
                object.__setattr__(self, name, operator.index(getattr(self, name)))

    @property
    def lr(self) -> float:
        """The point's learning rate, for loops that need nothing else."""
        return self.point.lr

    @property
    def weight_decay(self) -> float:
        """The point's weight decay."""
        return self.point.weight_decay

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {"width": self.width, "point": dict(self.point), "seed": self.seed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """Rebuild a trial from `as_dict`."""
        return cls(int(data["width"]), Point.of(data["point"]), int(data["seed"]))

    def __str__(self) -> str:
        """Return the form for logs and file names: ``width=32_lr=0.05_weight_decay=0.1_seed=0``."""
        axes = "_".join(f"{name}={value:.6g}" for name, value in self.point.items())
        return f"width={self.width}_{axes}_seed={self.seed}"


CURVE_COLUMNS = ("step", "train_loss", "held_out_loss")
"""Columns of every curve's file, before those of the model's diagnostics."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One row of a training curve."""

    step: int
    """Optimizer steps taken when it was measured."""
    train_loss: float | None
    """Mean loss of the batches since the row before, nats per token."""
    held_out_loss: float | None
    """Loss on the held-out tokens, nats per token; None where it was not measured."""
    diagnostics: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Name → number that the model file reports of itself, such as the load of its experts."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one trial."""

    trial: Trial
    status: Status
    loss: float | None = None
    """Held-out loss at the end, nats per token; finite when complete, else None."""
    reason: str = ""
    """The reason that it diverged or failed; empty when complete."""
    flops: float = 0.0
    """Floating-point operations of the training steps, by count, without evaluation."""
    seconds: float = 0.0
    """Wall time of the training loop on its worker."""
    worker: str = field(default="", compare=False)
    """The process that trained it, ``host:pid``; not part of the answer."""
    curve: tuple[CurvePoint, ...] = field(default=(), compare=False, repr=False)
    """The training curve, for a file of its own."""

    def __post_init__(self) -> None:
        """Keep failures out of the numbers."""
        finite = self.loss is not None and math.isfinite(self.loss)
        if (self.status is Status.COMPLETE) != finite or (not finite and self.loss is not None):
            raise ValueError(
                f"a {self.status} result has loss {self.loss!r}; a complete one needs a finite "
                "loss, a diverged or failed one none"
            )
        for name in ("loss", "flops", "seconds"):
            number = getattr(self, name)
            if type(number) is not float and isinstance(number, Real):
                object.__setattr__(self, name, float(number))

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes, without the curve."""
        return {
            **self.trial.as_dict(),
            **{"status": str(self.status), "loss": self.loss, "reason": self.reason},
            **{"flops": self.flops, "seconds": self.seconds, "worker": self.worker},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Rebuild a result from `as_dict`; the curve stays empty."""
        return cls(
            Trial.from_dict(data),
            Status(data["status"]),
            loss=data["loss"],
            reason=data["reason"],
            flops=data.get("flops", 0.0),
            seconds=data.get("seconds", 0.0),
            worker=data.get("worker", ""),
        )


@dataclass(frozen=True, slots=True)
class Axis:
    """One swept hyperparameter: `points` values, log-spaced from `low` to `high`."""

    name: str
    low: float
    high: float
    points: int
    most: float = math.inf
    """No value above this makes sense: 1 for a share."""

    @property
    def is_fixed(self) -> bool:
        """True if the axis has one value and is not searched."""
        return self.points == 1


@dataclass(frozen=True, slots=True)
class LadderSpec:
    """Everything that a ladder's decisions depend on, besides the results."""

    axes: tuple[Axis, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    policy: str = "adaptive"
    """"adaptive", or "paper" for Algorithm 1 of arXiv 2505.02222 as printed."""
    target_width: int | None = None
    """Width of the target run; None means the last width."""
    tolerance: float = 0.001
    """Predicted excess loss at the target, as a share of the loss, at which adaptive stops."""
    expected_noise: float = 0.003
    """Standard deviation between seeds, as a share of the loss, expected before any repeat, to
    within a factor of about three. Assumption; repeats correct it."""
    round: int | None = None
    """Points per round of the adaptive policy; None means the number of swept axes plus 2, at least
    4."""
    until_proven: bool = False
    """True if adaptive also goes on until a drift that never settles is ruled out."""
    costs: Mapping[int, float] = field(default_factory=dict)
    """Width → cost of one trial in any unit; if empty, a trial costs the square of its width."""
    budget: float | None = None
    """Most that all trials may cost, in the unit of `costs`; the adaptive policy stops there."""

    @property
    def target(self) -> int:
        """Width of the target run."""
        return self.target_width or self.widths[-1]

    @property
    def swept(self) -> tuple[Axis, ...]:
        """The axes with more than one value."""
        return tuple(axis for axis in self.axes if not axis.is_fixed)

    def cost(self, width: int) -> float:
        """Return the cost of one trial; for a width without one, scale the nearest as width².

        A width that only an earlier version of the spec had may be without a cost.

        >>> LadderSpec((), (32, 64)).cost(64), LadderSpec((), (32,), costs={32: 7.5}).cost(32)
        (4096.0, 7.5)
        >>> LadderSpec((), (32,), costs={32: 7.5}).cost(64)
        30.0
        """
        priced = min(self.costs, key=lambda known: (abs(known - width), known), default=None)
        if priced is None:
            return float(width) ** 2
        return self.costs[priced] * (width / priced) ** 2


@dataclass(frozen=True, slots=True)
class Stage:
    """One width of the ladder: the grid and the trials that it asks for."""

    width: int
    grid: Mapping[str, tuple[float, ...]]
    """Axis → its values in rising order, from which trials are made; a fixed axis has one."""
    trials: tuple[Trial, ...]
    rounds: tuple[str, ...] = ()
    """The reason for each round of trials; empty where the whole grid is asked for at once."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The decision from a closed stage, with its reason."""

    width: int
    point: Point
    loss: float
    """Held-out loss of the chosen point, nats per token: the seed mean, or the fit's if fitted."""
    intervals: Mapping[str, tuple[float, float] | None]
    """Axis → the interval that holds its optimum with 90 % probability; None for a fixed or
    unidentified axis, or under a policy without intervals."""
    at_edge: tuple[str, ...]
    """Axes on whose border the choice lies."""
    reason: str
    counts: Mapping[Status, int]
    """Status → number of the stage's trials that ended so."""
    out_of_budget: bool = False
    """True if the budget ended the stage, and the ladder with it."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A width that the ladder left out, with the reason."""

    width: int
    reason: str


@dataclass(frozen=True, slots=True)
class PredictedLoss:
    """A ladder's prediction of the held-out loss of one run with its answer, nats per token."""

    loss: float | None
    """The median; None where nothing is predicted."""
    interval: tuple[float, float] | None
    """The range that holds the loss with 90 % probability, whatever the run's seed."""
    widths: tuple[int, ...]
    """The widths whose losses it is made from, narrow first."""
    reason: str = ""
    """The reason that nothing is predicted; empty where something is."""

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {
            "loss": self.loss,
            "interval": self.interval and list(self.interval),
            "widths": list(self.widths),
            "reason": self.reason or None,
        }


@dataclass(frozen=True, slots=True)
class Certificate:
    """A ladder's prediction for one width, with its certainty."""

    verdict: str
    """"PASS", "WARN" or "FAIL"."""
    width: int
    point: Point
    """The predicted optimum, base-width units."""
    predicted_excess_loss: float
    """Expected loss above the optimum's at that width, as a share of the loss."""
    intervals: Mapping[str, tuple[float, float] | None]
    """Axis → the interval that holds the optimum at that width with 90 % probability, or None."""
    evidence: tuple[str, ...]
    """Sentences on the measurements and predictions."""
    problems: tuple[str, ...]
    """Reasons against PASS, each with its remedy."""
    assumptions: tuple[str, ...]
    """Assumptions that nothing in the sweep measures."""
    excess_bound: float = math.nan
    """Most that the answer costs with 90 % probability, as a share of the loss; PASS says that this
    is within the tolerance."""
    advice: str = ""
    """One sentence on the use of the answer, and the next step."""
    predicted_loss: PredictedLoss | None = None
    """The held-out loss that a run with the answer is expected to end with."""

    def as_dict(self) -> dict[str, Any]:
        """Return the keys of the JSON, where width and point stand beside it."""
        return {
            "verdict": self.verdict,
            "predicted_excess_loss": self.predicted_excess_loss,
            "intervals": as_json(self.intervals),
            "evidence": list(self.evidence),
            "problems": list(self.problems),
            "assumptions": list(self.assumptions),
            "excess_bound": self.excess_bound,
            "advice": self.advice,
            "predicted_loss": self.predicted_loss and self.predicted_loss.as_dict(),
        }


class TrialSource(Protocol):
    """The interface of a sweep to a dispatcher: it gives trials and takes their results."""

    def ask(self) -> Sequence[Trial]:
        """Return the open stage's trials without a result; empty when there is nothing left."""
        ...

    def tell(self, *results: Result) -> None:
        """Take final results, those of a pack together; this may open the next stage."""
        ...

    def on_start(self, trial: Trial) -> None:
        """Note that a worker has taken a trial."""
        return

    def on_release(self, trials: Sequence[Trial]) -> None:
        """Note that a worker has returned trials untrained, which does not count as a failure."""
        return

    def on_workers(self, number: int) -> None:
        """Note the number of workers, where they come and go."""
        return

    @property
    def is_due(self) -> bool:
        """True once the source can be asked; until then workers may start and wait."""
        return True

    def begun(self) -> TrialSource:
        """Return the source to ask and tell from now on, once this one is due."""
        return self


def as_plain(value: Any) -> Any:
    """Turn mappings, sequences and other libraries' numbers and arrays into Python's own.

    >>> as_plain({"a": (1, 2.0)})
    {'a': [1, 2.0]}
    """
    if isinstance(value, Mapping):
        return {as_plain(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if not isinstance(value, (str, int, float)) or type(value).__module__ == "numpy":
        to_list = getattr(value, "tolist", None)  # of numpy, torch and jax, scalars among them
        return to_list() if callable(to_list) else value
    return value


def as_json(value: Any) -> Any:
    """Turn records, and mappings and sequences of them, into what `json.dumps` takes."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value
