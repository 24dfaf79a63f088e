"""Laws L = E + A · C^−α of several optimizers, fitted together to mean losses.

E, the loss that no compute removes, is shared: it belongs to the data and the model. The exponent
is shared or each optimizer's own. The fit is robust least squares in the logarithm of the loss. For
a given E the laws are straight lines in log(L − E), so that E alone is searched, on a grid that is
refined: there is no local minimum to end in, and many draws are fitted at once.

Compute C is in PFLOP/s-days, the unit of arXiv 2502.16982.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PFLOPS_DAY = 8.64e19
"""FLOPs of a PFLOP/s-day."""
SIZES_FOR_CONSTANT = 4
"""Fewest sizes from which E is fitted. Three points fix E, A and α, and leave nothing that could
show a mistake; the laws in arXiv 2502.16982 have no E."""
SHARES = 1 - np.geomspace(1.0, 0.003, 48)
"""E as shares of the lowest loss, the coarse grid of a fit."""
REFINED = 7
"""Values of E between the neighbours of the best, in each of `ROUNDS` finer grids."""
ROUNDS = 6
ITERATIONS = 8
"""Steps of Gauss and Newton for each E; the robust weights are renewed in each."""
EXPONENTS = (1e-6, 5.0)
"""Least and largest exponent of a law. Published ones are 0.03 to 0.6; without a limit, losses that
are mere noise give numbers that no float holds."""


@dataclass(frozen=True)
class Law:
    """The loss as a function of compute: constant + factor · C^−exponent."""

    constant: float
    """E, nats per token; 0 in a pure power law."""
    factor: float
    """A, with C in PFLOP/s-days."""
    exponent: float
    """α."""

    def loss(self, compute: Array | float) -> Array:
        """Return the loss at a compute in PFLOP/s-days.

        >>> round(float(Law(0.0, 2.506, 0.052).loss(1.0)), 3)
        2.506
        """
        return np.asarray(self.constant + self.factor * np.power(compute, -self.exponent))

    def compute(self, loss: float) -> float:
        """Return the compute, in PFLOP/s-days, that reaches a loss; infinite at or below E.

        >>> law = Law(1.0, 2.0, 0.5)
        >>> law.compute(2.0), law.compute(1.0)
        (4.0, inf)
        """
        above = loss - self.constant
        if above <= 0:
            return math.inf
        exponent = math.log(self.factor / above) / self.exponent
        return math.exp(exponent) if exponent < 700 else math.inf


@dataclass(frozen=True)
class Form:
    """The form of a fit."""

    constant: bool
    """True if E is fitted; else it is 0."""
    shared: bool
    """True if the optimizers have one exponent."""

    def parameters(self, optimizers: int) -> int:
        """Return the number of parameters."""
        return self.constant + optimizers + (1 if self.shared else optimizers)


@dataclass(frozen=True)
class Fits:
    """Laws of several optimizers, fitted together to each of several draws of their mean losses."""

    form: Form
    constant: Array
    """(draws,)"""
    factor: Array
    """(draws, optimizers)"""
    exponent: Array
    """(draws, optimizers)"""
    cost: Array
    """(draws,): the robust sum of squares of the residuals, in log loss."""
    residuals: Array
    """(draws, optimizers, sizes) of log loss: measured minus fitted."""

    def laws(self, draw: int) -> tuple[Law, ...]:
        """Return one draw's laws, one per optimizer."""
        return tuple(
            Law(float(self.constant[draw]), float(factor), float(exponent))
            for factor, exponent in zip(self.factor[draw], self.exponent[draw], strict=True)
        )

    @property
    def freedom(self) -> int:
        """Number of means less the number of parameters."""
        _, optimizers, sizes = self.residuals.shape
        return int(optimizers * sizes) - self.form.parameters(optimizers)


def fit_laws(compute: Array, log_losses: Array, form: Form, *, scale: float) -> Fits:
    """Fit the laws of all optimizers, to every draw by itself.

    Args:
        compute: (optimizers, sizes) in PFLOP/s-days.
        log_losses: (draws, optimizers, sizes): mean logarithm of the loss.
        form: the form of the laws.
        scale: residuals, in log loss, beyond which a mean counts less than by its square.

    Raises:
        ValueError: fewer sizes than the form needs, or all of one compute.
    """
    sizes = log_losses.shape[-1]
    need = SIZES_FOR_CONSTANT if form.constant else 2
    if sizes < need or not np.all(np.ptp(np.log(compute), axis=1) > 0):
        raise ValueError(f"a law of this form needs {need} sizes of different compute, got {sizes}")
    lines = _Lines(np.log(compute), log_losses, form.shared, scale)
    shares = np.zeros((len(log_losses), 1))
    if form.constant:
        shares = np.broadcast_to(SHARES, (len(log_losses), len(SHARES)))
        for _ in range(ROUNDS):
            shares = _finer(shares, lines.fitted(shares)[0])
    cost, levels, exponents, residuals = lines.fitted(shares)
    best = cost.argmin(axis=1)
    rows = np.arange(len(best))
    exponent = exponents[rows, best]
    return Fits(
        form=form,
        constant=shares[rows, best] * lines.lowest,
        factor=np.exp(levels[rows, best] + exponent * lines.centre),
        exponent=exponent,
        cost=cost[rows, best],
        residuals=residuals[rows, best],
    )


def _finer(shares: Array, cost: Array) -> Array:
    """Return a finer grid (draws, `REFINED`) around each draw's best share.

    Args:
        shares: (draws, grid), rising.
        cost: (draws, grid).
    """
    rows, best = np.arange(len(shares)), cost.argmin(axis=1)
    low = shares[rows, np.maximum(best - 1, 0)]
    high = shares[rows, np.minimum(best + 1, shares.shape[1] - 1)]
    return np.asarray(np.linspace(low, high, REFINED, axis=1))


class _Lines:
    """Fits with E given: straight lines in log(L − E), weighted as the log of the loss asks."""

    def __init__(self, logs: Array, log_losses: Array, shared: bool, scale: float) -> None:
        self.centre = float(logs.mean())
        self.x = logs - self.centre
        self.y = log_losses
        self.lowest = np.exp(log_losses.min(axis=(1, 2)))
        self.shared = shared
        self.scale = scale

    def fitted(self, shares: Array) -> tuple[Array, Array, Array, Array]:
        """Fit every draw with every E.

        Args:
            shares: (draws, grid) of the draw's lowest loss.

        Returns:
            cost (draws, grid), levels at the centre and exponents (draws, grid, optimizers), and
            residuals (draws, grid, optimizers, sizes).
        """
        y = self.y[:, None]
        constant = (shares * self.lowest[:, None])[..., None, None]
        above = np.exp(y) - constant
        working, weights = np.log(above), (above / np.exp(y)) ** 2
        for _ in range(ITERATIONS):
            levels, exponents = self._line(working, weights)
            line = levels[..., None] - exponents[..., None] * self.x
            total = constant + np.exp(line)
            residuals = y - np.log(total)
            slope = np.exp(line) / total
            working = line + residuals / slope
            weights = slope**2 / np.sqrt(1 + (residuals / self.scale) ** 2)
        robust = 2 * self.scale**2 * (np.sqrt(1 + (residuals / self.scale) ** 2) - 1)
        return robust.sum(axis=(2, 3)), levels, exponents, residuals

    def _line(self, working: Array, weights: Array) -> tuple[Array, Array]:
        """Return levels and exponents (..., optimizers) of weighted straight lines."""
        total = weights.sum(axis=-1)
        x = (weights * self.x).sum(axis=-1) / total
        level = (weights * working).sum(axis=-1) / total
        off = self.x - x[..., None]
        spread = (weights * off**2).sum(axis=-1)
        slope = (weights * off * working).sum(axis=-1)
        if self.shared:
            spread, slope = (
                np.broadcast_to(part.sum(axis=-1, keepdims=True), part.shape)
                for part in (spread, slope)
            )
        exponents = np.clip(-slope / spread, *EXPONENTS)
        return level + exponents * x, exponents
