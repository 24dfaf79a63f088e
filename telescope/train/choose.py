"""What `auto` means on this machine: each kind of arithmetic timed, the faster one taken.

Forward and backward by `train.precision`, Newton–Schulz by `optimizer.ns_dtype`, at every width of
a sweep. A sweep has one of each at all its widths, because losses of different widths are compared:
the one that takes less time over all its planned trials. What is timed is one trial alone, in packs
too: how large they will be is not known yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from telescope.config import TrialConfig
from telescope.records import Point, Trial
from telescope.train.loop import resolve_device, set_up, token_loss, use_threads
from telescope.train.muon import DTYPES, Muon, orthogonalize_all

ROUNDS = 3
"""How often each is timed, in turns; the fastest counts."""
AUTO_KEYS = ("train.precision", "optimizer.ns_dtype")
ARITHMETICS = ("fp32", "bf16")


@dataclass(frozen=True)
class Timings:
    """How long a step's part takes, by what it is computed in."""

    seconds: Mapping[str, Mapping[int, float]]
    """"fp32" and "bf16" → width → seconds of one step's part, on `device`."""
    trials: Mapping[int, int]
    """Width → trials that are planned: the weights of the choice."""
    device: str

    @property
    def choice(self) -> str:
        """The one whose weighted sum is less; fp32 where both are as fast."""
        return min(self.seconds, key=self._total)

    def _total(self, arithmetic: str) -> float:
        return sum(self.trials[width] * s for width, s in self.seconds[arithmetic].items())

    @property
    def gain(self) -> float:
        """How many times less time the choice takes than the other one; at least 1."""
        totals = [self._total(arithmetic) for arithmetic in self.seconds]
        return max(totals) / min(totals)


def undecided(config: TrialConfig) -> tuple[str, ...]:
    """The keys that are "auto"."""
    values = (config.train.precision, config.optimizer.ns_dtype)
    return tuple(key for key, value in zip(AUTO_KEYS, values, strict=True) if value == "auto")


def measure(config: TrialConfig, trials: Mapping[int, int], point: Point) -> dict[str, Timings]:
    """Time what an undecided key could be.

    Args:
        config: the sweep's training; its corpus is read, nothing is written.
        trials: width → how many trials are planned there.
        point: hardly matters.

    Returns:
        Undecided key → what was measured.

    Raises:
        DataError, ModelError: as `loop.set_up`.
    """
    keys, device = undecided(config), resolve_device(config.device)
    seconds: dict[str, dict[str, dict[int, float]]] = {
        key: {arithmetic: {} for arithmetic in ARITHMETICS} for key in keys
    }
    for width in trials:
        use_threads(config, width)
        for key, parts in _parts(config, Trial(width, point, 0)).items():
            if key in keys:
                for arithmetic, least in _fastest(parts, device).items():
                    seconds[key][arithmetic][width] = least
    return {key: Timings(seconds[key], dict(trials), device) for key in keys}


def decided(config: TrialConfig, choices: Mapping[str, str]) -> TrialConfig:
    """The same with the choice of every key in `choices`."""
    train, optimizer = config.train, config.optimizer
    precision = choices.get("train.precision", train.precision)
    ns_dtype = choices.get("optimizer.ns_dtype", optimizer.ns_dtype)
    return replace(
        config,
        train=replace(train, precision=precision),  # type: ignore[arg-type]
        optimizer=replace(optimizer, ns_dtype=ns_dtype),  # type: ignore[arg-type]
    )


def _parts(config: TrialConfig, trial: Trial) -> dict[str, dict[str, Callable[[], object]]]:
    """Key → arithmetic → what a step does in it."""
    any_will_do = dict.fromkeys(undecided(config), "bf16")
    setup = set_up(decided(config, any_will_do), trial)
    inputs, targets = (tokens.to(setup.device) for tokens in setup.batches.at(0))
    matrices: list[Tensor] = [
        p.detach()
        for optimizer in setup.optimizers
        if isinstance(optimizer, Muon)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    steps, ns = config.optimizer.ns_steps, config.optimizer.ns

    def train(precision: str) -> None:
        setup.model.zero_grad()
        token_loss(setup.model, inputs, targets, precision).backward()  # type: ignore[no-untyped-call]

    def orthogonalise(dtype: str) -> None:
        if matrices:
            orthogonalize_all(matrices, steps=steps, dtype=DTYPES[dtype], ns=ns)

    return {
        key: {arithmetic: partial(part, arithmetic) for arithmetic in ARITHMETICS}
        for key, part in zip(AUTO_KEYS, (train, orthogonalise), strict=True)
    }


def _fastest(parts: Mapping[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Seconds of each, in turns, after one turn that warms up."""
    least: dict[str, float] = {}
    for turn in range(ROUNDS + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if torch.device(device).type != "cpu":
                torch.accelerator.synchronize(device)
            taken = time.perf_counter() - start
            if turn:
                least[name] = min(taken, least.get(name, taken))
    return least
