"""An existing Ray Tuner that asks a telescoping ladder instead of a random search.

    python examples/tuner/tuner.py --storage ray_results --results results
    telescope show tuner
    tensorboard --logdir ray_results

The training is the Tuner's own: a function of a config that reports a loss. Here it is a linear
model of a made-up regression, so that it takes no time; how it is written, logged and stored is
what any Tuner has. Only `search_alg` and `num_samples` are new.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.logger import TBXLoggerCallback

from telescope.tune import TelescopeSearch

SWEEP = Path(__file__).parent / "sweep.toml"


def train(config: dict[str, Any]) -> None:
    """Gradient descent with momentum on `width` random features; lr divided by the width."""
    generator = np.random.default_rng(config["seed"])
    inputs = generator.normal(size=(256, 8))
    outputs = np.tanh(inputs @ generator.normal(size=8))
    features = np.tanh(inputs @ generator.normal(size=(8, config["width"])) / 3)
    weights, velocity = np.zeros(config["width"]), np.zeros(config["width"])
    for step in range(1, 61):
        error = features[:128] @ weights - outputs[:128]
        velocity = config["momentum"] * velocity + features[:128].T @ error / 128
        weights -= config["lr"] / config["width"] * velocity
        if step % 20 == 0:
            held_out = np.mean((features[128:] @ weights - outputs[128:]) ** 2)
            tune.report({"loss": float(held_out)})  # not finite where it has diverged


def main() -> None:
    """Run the Tuner, and print what the ladder found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--storage", type=Path, default=Path("ray_results"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    search = TelescopeSearch(SWEEP, results=arguments.results)
    tuner = tune.Tuner(
        train,
        tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tuner",
            storage_path=str(arguments.storage.absolute()),
            callbacks=[TBXLoggerCallback()],
            verbose=0,
        ),
    )
    tuner.fit()
    for choice in search.ladder.choices:
        print(f"width {choice.width}: {choice.point}, loss {choice.loss:.4f}")
    print(f"width {search.spec.target.width}: {search.ladder.transfer().point}")


if __name__ == "__main__":
    main()
