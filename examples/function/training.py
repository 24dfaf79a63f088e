"""A training function as telescope calls it: width, seed and the axes as keywords, a loss back."""

from __future__ import annotations

from typing import Any

import numpy as np
from models.network import Network

INPUTS, STEPS, BATCH = 16, 150, 128
NOISE = 0.5


def train(*, width: int, seed: int, lr: float, forget: float, base_width: int) -> dict[str, Any]:
    """Fit a noisy function of 16 numbers; returns the loss on numbers never seen.

    Args:
        width: of the hidden layers.
        seed: sets the start and the order of the data.
        lr: Adam's peak learning rate at base width.
        forget: share of the old gradients that a step forgets, one minus Adam's first beta.
        base_width: the ladder's first width.
    """
    task = np.random.default_rng(0)  # the same for every trial
    direction = task.normal(size=(INPUTS, 2))
    x = task.normal(size=(6000, INPUTS))
    y = np.sin(x @ direction).sum(axis=1, keepdims=True) + NOISE * task.normal(size=(6000, 1))

    rng = np.random.default_rng(seed)
    network = Network(INPUTS, width, width / base_width, rng)
    mean = [np.zeros_like(weight) for weight in network.weights]
    square = [np.zeros_like(weight) for weight in network.weights]
    curve = []
    for step in range(1, STEPS + 1):
        batch = rng.integers(4000, size=BATCH)
        loss, gradients = network.loss(x[batch], y[batch])
        for i, gradient in enumerate(gradients):
            mean[i] += forget * (gradient - mean[i])
            square[i] += 0.05 * (gradient**2 - square[i])
            size = np.sqrt(square[i] / (1 - 0.95**step)) + 1e-12
            rate = lr * network.slower[i] * (1 - (step - 1) / STEPS)
            network.weights[i] -= rate * mean[i] / (1 - (1 - forget) ** step) / size
        if step % 30 == 0:
            curve.append({"step": step, "train_loss": loss})
    return {"loss": network.loss(x[4000:], y[4000:])[0], "step": STEPS, "curve": curve}
