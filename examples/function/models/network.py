"""A tanh network with one hidden matrix, in NumPy, with muP's rules for Adam."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class Network:
    """Inputs → width → width → one number."""

    def __init__(self, inputs: int, width: int, wider: float, rng: np.random.Generator) -> None:
        """Start at random.

        Args:
            inputs: numbers in.
            width: of the hidden layers.
            wider: width over base width.
            rng: where the weights come from.
        """
        self.multiplier = 1 / wider  # muP: the output / r
        self.slower = (1.0, 1 / wider, 1.0)  # muP: Adam's lr on the hidden matrix / r
        self.weights = [
            rng.normal(size=(inputs, width)) / np.sqrt(inputs),
            rng.normal(size=(width, width)) / np.sqrt(width),
            np.zeros((width, 1)),
        ]

    def loss(self, x: Array, y: Array) -> tuple[float, list[Array]]:
        """Mean squared error, and its gradients."""
        first, second, last = self.weights
        one = np.tanh(x @ first)
        two = np.tanh(one @ second)
        error = self.multiplier * (two @ last) - y
        back = 2 * self.multiplier * error / len(y)
        back_two = (back @ last.T) * (1 - two**2)
        back_one = (back_two @ second.T) * (1 - one**2)
        return float((error**2).mean()), [x.T @ back_one, one.T @ back_two, two.T @ back]
