"""The answer of a scaling family: laws with intervals, and the FLOP ratio at equal loss.

Intervals hold with 90 % probability. They come from draws of the mean losses: seeds are drawn anew,
the same ones for all optimizers, and what the laws leave unexplained beyond the seeds' noise is
drawn from the residuals of all sizes, again together for all optimizers. The intervals leave out
that the settings, learning rate and weight decay, are themselves estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from telescope.records import as_json
from telescope.scaling.laws import (
    EXPONENTS,
    SIZES_FOR_CONSTANT,
    Array,
    Fits,
    Form,
    Law,
    fit_laws,
)

DRAWS = 1000
TAILS = (5.0, 95.0)
"""Percentiles between which an interval lies."""
OUTLIER = 4.0
"""Standard deviations of a mean beyond which a residual counts less than by its square."""
LEAST_SCALE = 0.001
"""Least residual, in log loss, that may count less: from few seeds the noise is not known well."""

FLAT = 2 * EXPONENTS[0]
"""Exponent up to which a law is flat: the fit has ended at its least one."""
NO_CONSTANT = 0.01
"""E that counts as 0, nats per token."""
TITLES = {"muon": "Muon", "adamw": "AdamW"}

Interval = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """The losses of a family: the same sizes and seeds under every optimizer."""

    optimizers: tuple[str, ...]
    compute: Mapping[str, tuple[float, ...]]
    """Optimizer → PFLOP/s-days of each size, small first."""
    losses: Mapping[str, tuple[tuple[float, ...], ...]]
    """Optimizer → size → losses, nats per token, of the seeds in their order."""

    @property
    def sizes(self) -> int:
        """Number of sizes."""
        return len(self.losses[self.optimizers[0]])


@dataclass(frozen=True)
class Number:
    """A fitted number with its interval, which is None where nothing shows the scatter."""

    value: float
    interval: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {"value": self.value, "interval": self.interval and list(self.interval)}


@dataclass(frozen=True)
class Laws:
    """The laws of one form, L = constant + factor · C^−exponent, C in PFLOP/s-days."""

    form: Form
    constant: Number
    factor: Mapping[str, Number]
    exponent: Mapping[str, Number]
    difference: Number | None
    """The first optimizer's exponent less the second's; None for one optimizer or a shared one."""
    ratios: tuple[Number, ...]
    """For each size: FLOPs of the first optimizer over those of the second, at the loss that the
    second's law has there. Empty for one optimizer."""
    unexplained: float
    """Root mean square of the residuals, as a share of the loss."""

    def law(self, optimizer: str) -> Law:
        """Return an optimizer's law."""
        return Law(
            self.constant.value, self.factor[optimizer].value, self.exponent[optimizer].value
        )

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {
            "shared_exponent": self.form.shared,
            "constant": self.constant.as_dict(),
            "factor": {name: number.as_dict() for name, number in self.factor.items()},
            "exponent": {name: number.as_dict() for name, number in self.exponent.items()},
            "exponent_difference": self.difference and self.difference.as_dict(),
            "ratios": [ratio.as_dict() for ratio in self.ratios],
            "unexplained": self.unexplained,
        }


@dataclass(frozen=True)
class Ratio:
    """FLOPs of one optimizer over another's at equal loss."""

    loss: float
    """Nats per token; the second optimizer's law at one of its sizes."""
    number: Number | None
    """None where a law may be flat, which any compute reaches or none."""
    is_outside: bool
    """True if its compute lies outside its sizes, where its law is extrapolated."""

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        number = self.number.as_dict() if self.number else {"value": None, "interval": None}
        return {"loss": self.loss, **number, "extrapolated": self.is_outside}


def percent(number: Mapping[str, Any]) -> str:
    """Describe a ratio, {"value", "interval"}, as a percentage with its interval.

    >>> percent({"value": 0.523, "interval": [0.47, 0.58]})
    '52 % (47-58)'
    >>> percent({"value": 3e-5, "interval": [0.0, 1e290]})
    '<1 % (<1 to >1000)'
    >>> percent({"value": None, "interval": None})
    'unknown'
    """
    if number["value"] is None:
        return "unknown"
    share = f"{_hundredths(number['value'])} %"
    if number["interval"] is None:
        return share
    low, high = map(_hundredths, number["interval"])
    is_plain = f"{low}{high}".isdigit()
    return f"{share} ({low}-{high})" if is_plain else f"{share} ({low} to {high})"


def _hundredths(ratio: float) -> str:
    """Round to whole percent; what is beyond a hundredth or ten times is only said to be."""
    if ratio < 0.01:
        return "<1"
    return f"{100 * ratio:.0f}" if ratio <= 10 else ">1000"


@dataclass(frozen=True)
class Scaling:
    """Laws of every form, and what they say."""

    measured: Measured
    shared: Laws
    separate: Laws
    power_shared: Laws | None
    """Without E, the form of the laws in arXiv 2502.16982; None where `shared` has none either."""
    power_separate: Laws | None

    @property
    def is_separate(self) -> bool:
        """True if the data tell the exponents apart: 0 is not in their difference's interval."""
        difference = self.separate.difference
        if difference is None or difference.interval is None:
            return False
        low, high = difference.interval
        return low > 0 or high < 0

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """The FLOP ratios at the losses of the second optimizer's sizes, by separate exponents.

        Also where the data do not tell the exponents apart: a shared one would be a second
        assumption, and where that is wrong its narrow intervals miss the ratio more often than not.
        """
        if len(self.measured.optimizers) < 2:
            return ()
        first, second = self.measured.optimizers
        own, its = self.measured.compute[first], self.measured.compute[second]
        law, known = self.separate.law(second), not self.flat
        found = []
        for compute, number in zip(its, self.separate.ratios, strict=True):
            needed = number.value * compute
            inside = min(own) * (1 - 1e-9) <= needed <= max(own) * (1 + 1e-9)
            loss = float(law.loss(compute))
            found.append(Ratio(loss, number if known else None, known and not inside))
        return tuple(found)

    @property
    def flat(self) -> tuple[str, ...]:
        """Optimizers whose losses do not surely fall with compute: α may be 0."""
        return tuple(
            name
            for name, number in self.separate.exponent.items()
            if min([number.value, *(number.interval or ())]) <= FLAT
        )

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if not self.ratios:
            (name,) = self.measured.optimizers
            return f"{TITLES[name]} alone: its law is fitted, and there is nothing to compare"
        if self.flat:
            names = " and ".join(TITLES[name] for name in self.flat)
            return (
                f"no FLOP ratio: the losses of {names} do not surely fall with compute; train "
                "larger sizes, longer runs or more seeds"
            )
        return _sentence(self.ratios[-1], *(TITLES[name] for name in self.measured.optimizers))

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the fit, each a sentence."""
        return tuple(_notes(self))

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {
            "optimizers": list(self.measured.optimizers),
            "compute": as_json(self.measured.compute),
            "supported": "separate" if self.is_separate else "shared",
            "shared": self.shared.as_dict(),
            "separate": self.separate.as_dict(),
            "power_shared": self.power_shared and self.power_shared.as_dict(),
            "power_separate": self.power_separate and self.power_separate.as_dict(),
            "ratios": [ratio.as_dict() for ratio in self.ratios],
            "sentence": self.sentence,
            "notes": list(self.notes),
        }


def _sentence(ratio: Ratio, first: str, second: str) -> str:
    """Say how many FLOPs the first optimizer needs to reach the loss of the second's largest."""
    assert ratio.number is not None
    interval = ratio.number.interval
    at = f"the loss of {second}'s largest size ({ratio.loss:.3f})"
    beyond = f", by {first}'s law beyond its sizes" if ratio.is_outside else ""
    share, _, within = percent(ratio.number.as_dict()).partition(" (")
    shown = f"{share} of the FLOPs{within and f' ({within}'}{beyond}"
    if interval is None:
        return f"{first} reaches {at} with {shown}; without a second seed there is no interval"
    if interval[0] <= 1 <= interval[1]:
        return (
            f"no difference beyond the noise: {first} reaches {at} with {shown}, an interval that "
            "holds 100 %"
        )
    return f"{first} reaches {at} with {shown}"


def _notes(scaling: Scaling) -> Iterator[str]:
    """Say which form the data support, and how far the fit can be relied on."""
    sizes = scaling.measured.sizes
    if scaling.power_separate is None:
        yield (
            f"{sizes} sizes do not determine E, which needs {SIZES_FOR_CONSTANT}: these are power "
            "laws without it, the form of arXiv 2502.16982"
        )
    elif (interval := scaling.separate.constant.interval) and interval[0] < NO_CONSTANT:
        yield (
            f"E may be anything up to {interval[1]:.2f}: the sizes span too little compute to tell "
            "it from 0, and α depends on it"
        )
    if difference := scaling.separate.difference:
        yield _apart(scaling.is_separate, difference)
    if flat := " and ".join(TITLES[name] for name in scaling.flat):
        yield f"α of {flat} may be 0: the losses do not surely fall from size to size"
    outside = [n for n, ratio in enumerate(scaling.ratios, start=1) if ratio.is_outside]
    if outside:
        first = TITLES[scaling.measured.optimizers[0]]
        which = ", ".join(map(str, outside))
        yield f"at size {which} the ratio needs {first}'s law outside the sizes it was trained at"


def _apart(separate: bool, difference: Number) -> str:
    if difference.interval is None:
        return f"α differs by {difference.value:+.3f}; without a second seed there is no interval"
    low, high = difference.interval
    shown = f"α differs by {difference.value:+.3f} ({low:+.3f} to {high:+.3f})"
    if separate:
        return f"{shown}: the data ask for separate exponents"
    return f"{shown}: the data do not tell the exponents apart"


def analysed(measured: Measured, *, draws: int = DRAWS) -> Scaling:
    """Fit the laws of every form, with intervals.

    Args:
        measured: two sizes or more, small first, and one or two optimizers.
        draws: number of draws behind the intervals.

    Raises:
        ValueError: fewer than two sizes of different compute.
    """
    data = _Data(measured, draws)
    constant = measured.sizes >= SIZES_FOR_CONSTANT
    shared, separate = data.laws(constant)
    power = data.laws(constant=False) if constant else (None, None)
    return Scaling(measured, shared, separate, *power)


class _Data:
    """The mean log losses of a family, and the draws of them."""

    def __init__(self, measured: Measured, draws: int) -> None:
        self.names = measured.optimizers
        self.compute = np.array([measured.compute[name] for name in self.names], dtype=float)
        logs = [[np.log(seeds) for seeds in measured.losses[name]] for name in self.names]
        self.y = np.array([[row.mean() for row in rows] for rows in logs])
        self.seeds = [len(row) for row in logs[0]]
        self.pool = _deviations(logs, self.y)
        self.noise = math.sqrt(float(np.mean(self.pool**2))) if len(self.pool) else 0.0
        per_mean = float(np.mean([self.noise / math.sqrt(count) for count in self.seeds]))
        self.scale = max(OUTLIER * per_mean, LEAST_SCALE)
        self.of_mean = float(np.mean([self.noise**2 / count for count in self.seeds]))
        self.draws = draws

    def laws(self, constant: bool) -> tuple[Laws, Laws]:
        """Return the laws with a shared and with separate exponents.

        The draws are made around the separate ones, whose form includes the other.
        """
        forms = [Form(constant, shared) for shared in (True, False)]
        fits = [fit_laws(self.compute, self.y[None], form, scale=self.scale) for form in forms]
        drawn = self._drawn(fits[1])
        shared, separate = (
            self._laws(fit, drawn if drawn is None else self._fit(drawn, fit.form)) for fit in fits
        )
        return shared, separate

    def _fit(self, drawn: Array, form: Form) -> Fits:
        return fit_laws(self.compute, drawn, form, scale=self.scale)

    def _drawn(self, fit: Fits) -> Array | None:
        """Draw mean log losses (draws, optimizers, sizes); None where nothing shows the scatter."""
        residuals, freedom = fit.residuals[0], fit.freedom
        if freedom <= 0 and not len(self.pool):
            return None
        rng = np.random.default_rng(0)
        drawn = np.broadcast_to(self.y - residuals, (self.draws, *self.y.shape)).copy()
        sizes = self.y.shape[1]
        if len(self.pool):
            freed = sum(self.seeds) - sizes
            spread = np.sqrt(freed / rng.chisquare(freed, self.draws))
            for size, count in enumerate(self.seeds):
                rows = rng.integers(len(self.pool), size=(self.draws, count))
                drawn[:, :, size] += spread[:, None] * self.pool[rows].mean(axis=1)
        lack = self._lack(residuals, freedom)
        if lack > 0:
            units = residuals / math.sqrt(float(np.mean(residuals**2)))
            spread = lack * np.sqrt(freedom / rng.chisquare(freedom, self.draws))
            columns = rng.integers(sizes, size=(self.draws, sizes))
            signs = rng.choice([-1.0, 1.0], size=(self.draws, 1, sizes))
            drawn += spread[:, None, None] * signs * units[:, columns].swapaxes(0, 1)
        return drawn

    def _lack(self, residuals: Array, freedom: int) -> float:
        """Return the standard deviation of a mean about the laws, beyond the seeds' noise."""
        if freedom <= 0:
            return 0.0
        return math.sqrt(max(0.0, float((residuals**2).sum()) / freedom - self.of_mean))

    def _laws(self, fit: Fits, drawn: Fits | None) -> Laws:
        """Return one form's laws, with intervals from the draws."""

        def number(value: Array, draws: Array | None) -> Number:
            return Number(float(value), None if draws is None else _interval(draws))

        def each(value: Array, draws: Array | None) -> dict[str, Number]:
            return {
                name: number(value[0, n], None if draws is None else draws[:, n])
                for n, name in enumerate(self.names)
            }

        def drawn_of(name: str) -> Array | None:
            return None if drawn is None else np.asarray(getattr(drawn, name))

        ratios = self._ratios(fit)
        of_draws = None if drawn is None else self._ratios(drawn)
        difference = None
        if len(self.names) == 2 and not fit.form.shared:
            exponents = drawn_of("exponent")
            difference = number(
                fit.exponent[0, 0] - fit.exponent[0, 1],
                None if exponents is None else exponents[:, 0] - exponents[:, 1],
            )
        return Laws(
            form=fit.form,
            constant=number(fit.constant[0], drawn_of("constant")),
            factor=each(fit.factor, drawn_of("factor")),
            exponent=each(fit.exponent, drawn_of("exponent")),
            difference=difference,
            ratios=tuple(
                number(ratios[0, n], None if of_draws is None else of_draws[:, n])
                for n in range(ratios.shape[1])
            ),
            unexplained=math.sqrt(float(np.mean(fit.residuals[0] ** 2))),
        )

    def _ratios(self, fits: Fits) -> Array:
        """Return the FLOP ratios (draws, sizes); no sizes for one optimizer."""
        if len(self.names) < 2:
            return np.zeros((len(fits.constant), 0))
        # E is shared: at equal loss the two excesses are equal, and E drops out.
        log_excess = np.log(fits.factor[:, 1:2]) - fits.exponent[:, 1:2] * np.log(self.compute[1])
        log_needed = (np.log(fits.factor[:, :1]) - log_excess) / fits.exponent[:, :1]
        return np.asarray(np.exp(np.clip(log_needed - np.log(self.compute[1]), -690, 690)))


def _deviations(logs: Sequence[Sequence[Array]], means: Array) -> Array:
    """Return the seeds' deviations from their size's mean, (seeds of all sizes, optimizers).

    They are stretched to the variance of a population; a size of one seed has none.
    """
    rows = [
        np.stack([logs[o][size] - means[o, size] for o in range(len(logs))], axis=1)
        * math.sqrt(count / (count - 1))
        for size in range(means.shape[1])
        if (count := len(logs[0][size])) > 1
    ]
    return np.concatenate(rows) if rows else np.zeros((0, len(logs)))


def _interval(draws: Array) -> Interval:
    low, high = np.percentile(draws, TAILS)
    return float(low), float(high)
