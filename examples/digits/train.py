"""Train a small muP network on handwritten digits, and print its held-out loss as a JSON line.

A plain training script in NumPy, as you may have one in anything: telescope is not imported. Two
hidden layers of `--width` units; widths enter by muP's rules for Adam, marked below.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

STEPS, BATCH, CLASSES = 200, 128, 10
SMOOTHING = 0.1
"""Share of each label that is spread over all classes, so that a few odd digits do not rule."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def start(width: int, rng: np.random.Generator) -> dict[str, Array]:
    """muP's initial weights: by fan-in for what is hidden, zero for the readout."""
    return {
        "first": rng.normal(size=(64, width)) / 8,
        "hidden": rng.normal(size=(width, width)) * np.sqrt(2 / width),
        "readout": np.zeros((width, CLASSES)),
    }


def loss_and_gradients(
    weights: dict[str, Array], pixels: Array, labels: Array, multiplier: float
) -> tuple[float, dict[str, Array]]:
    """Mean cross-entropy in nats, and its gradients."""
    one = np.maximum(pixels @ weights["first"], 0)
    two = np.maximum(one @ weights["hidden"], 0)
    logits = multiplier * (two @ weights["readout"])
    logits -= logits.max(axis=1, keepdims=True)
    log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = (1 - SMOOTHING) * np.eye(CLASSES)[labels] + SMOOTHING / CLASSES
    error = (np.exp(log_shares) - wanted) * multiplier / len(labels)
    back_two = (error @ weights["readout"].T) * (two > 0)
    back_one = (back_two @ weights["hidden"].T) * (one > 0)
    gradients = {
        "first": pixels.T @ back_one,
        "hidden": one.T @ back_two,
        "readout": two.T @ error,
    }
    return -float((wanted * log_shares).sum(axis=1).mean()), gradients


def train(width: int, base_width: int, seed: int, lr: float, weight_decay: float) -> float:
    """Train once, saying how it goes; returns the held-out loss, nats per digit."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels / 8 - 1
    is_held_out = np.arange(len(labels)) % 3 == 0  # the same third for every trial
    seen = np.flatnonzero(~is_held_out)

    rng = np.random.default_rng(seed)
    wider = width / base_width
    weights = start(width, rng)
    slower = {"first": 1.0, "hidden": 1 / wider, "readout": 1.0}  # muP: Adam's lr on hidden / r
    multiplier = 1 / wider  # muP: the logits / r
    mean = {name: np.zeros_like(weight) for name, weight in weights.items()}
    square = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, STEPS + 1):
        batch = rng.choice(seen, BATCH, replace=False)
        loss, gradients = loss_and_gradients(weights, pixels[batch], labels[batch], multiplier)
        rate = lr * (1 - (step - 1) / STEPS)
        for name, gradient in gradients.items():
            mean[name] += 0.1 * (gradient - mean[name])
            square[name] += 0.05 * (gradient**2 - square[name])
            size = np.sqrt(square[name] / (1 - 0.95**step)) + 1e-12
            weights[name] *= 1 - rate * weight_decay
            weights[name] -= rate * slower[name] * mean[name] / (1 - 0.9**step) / size
        if step % 20 == 0:
            print(json.dumps({"step": step, "train_loss": loss}), flush=True)
    held_out = pixels[is_held_out], labels[is_held_out]
    return loss_and_gradients(weights, *held_out, multiplier)[0]


def main() -> None:
    """Train as the command line says, and print the result as the last JSON line."""
    parser = argparse.ArgumentParser()
    for name in ("--width", "--base-width", "--seed"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--lr", "--weight-decay"):
        parser.add_argument(name, type=float, required=True)
    loss = train(**vars(parser.parse_args()))
    print(json.dumps({"step": STEPS, "loss": loss, "tokens": STEPS * BATCH}))


if __name__ == "__main__":
    main()
