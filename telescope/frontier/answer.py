"""The answer of a frontier: which optimizer, which batch size, how many tokens fewer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from telescope.frontier.arms import Arm
from telescope.frontier.critical import Critical, critical_of
from telescope.frontier.curves import Envelope
from telescope.frontier.devices import Devices, Placed, Step, is_timed, place
from telescope.frontier.reach import (
    FREEDOM,
    TAIL,
    Ratio,
    Reached,
    Trend,
    ratio_of,
    reached,
    trend_of,
)
from telescope.records import as_json

WASTE = 1.25
"""Most tokens at the recommended batch, in multiples of the fewest at any batch. Assumption.
On the curve of equal loss, such a run takes five times the fewest steps."""
DIGITS = 4
"""Digits of a target loss that is chosen here; it is rounded up."""
BACK = (1.0, math.sqrt(0.5), 0.5)
"""Shares of the slowest arm's tokens after which it reaches the target losses chosen here."""
NAMES = {"muon": "Muon", "adamw": "AdamW"}
"""Optimizer → its name in a sentence."""
SURE = float(student.ppf(1 - TAIL, FREEDOM))
"""Standard deviations to the end of a 90 % interval."""


@dataclass(frozen=True)
class Answer:
    """All that the arms say together."""

    losses: tuple[float, ...]
    """Target losses, lowest first."""
    reached: tuple[Reached, ...]
    """Loss after loss, each with every arm that has a fit."""
    ratios: tuple[Ratio, ...]
    trends: tuple[Trend, ...]
    critical: tuple[Critical, ...]
    placed: tuple[Placed, ...]
    basis: str
    """The model of the devices in words."""
    optimizer: str | None
    """The optimizer to use; None where the difference is inside the noise, or unknown."""
    batch: Arm | None
    """The arm with the recommended batch size."""
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {
            "sentence": self.sentence,
            "use": {
                "optimizer": self.optimizer,
                "batch_size": self.batch and self.batch.batch_size,
                "batch_tokens": self.batch and self.batch.batch_tokens,
            },
            "losses": list(self.losses),
            "reached": [_reached_as_json(one) for one in self.reached],
            "ratios": [
                {
                    "batch_size": one.batch_size,
                    "batch_tokens": one.batch_tokens,
                    "loss": one.loss,
                    "ratio": one.ratio,
                    "interval": as_json(one.interval),
                    "verdict": one.verdict,
                    "reason": one.reason or None,
                }
                for one in self.ratios
            ],
            "trends": [as_json(vars(one)) for one in self.trends],
            "critical": [
                as_json({**vars(one), "reason": one.reason or None}) for one in self.critical
            ],
            "devices": {"basis": self.basis, "times": [as_json(vars(one)) for one in self.placed]},
        }


def _reached_as_json(one: Reached) -> dict[str, Any]:
    return {
        "optimizer": one.arm.optimizer,
        "batch_size": one.arm.batch_size,
        "batch_tokens": one.arm.batch_tokens,
        "loss": one.loss,
        "tokens": one.tokens,
        "steps": one.steps,
        "interval": as_json(one.interval),
        "reason": one.reason or None,
    }


def choose_losses(envelopes: Sequence[Envelope]) -> tuple[float, ...]:
    """Choose the lowest loss that all arms surely reach, and two above it; lowest first.

    The two are where the slowest arm was at 71 and at 50 % of its tokens.

    >>> flat = Envelope((100, 200, 400), (4.0, 3.0, 2.5), (0.0, 0.0, 0.0))
    >>> choose_losses([flat, Envelope((100, 200, 400), (4.0, 3.0, 2.0), (0.0, 0.0, 0.0))])
    (2.5, 2.75, 3.0)
    """
    if not envelopes:
        return ()
    slowest = max(envelopes, key=lambda one: _surely(one, one.tokens[-1]))
    last = slowest.tokens[-1]
    levels = (_surely(slowest, max(share * last, slowest.tokens[0])) for share in BACK)
    return tuple(sorted({_rounded_up(level) for level in levels}))


def _surely(envelope: Envelope, tokens: float) -> float:
    """Return the upper end of the interval of the loss after some tokens, between measurements."""
    ends = [
        loss + SURE * error for loss, error in zip(envelope.losses, envelope.errors, strict=True)
    ]
    logs = [math.log(each) for each in envelope.tokens]
    at = math.log(tokens)
    for (before, high), (after, low) in zip(
        zip(logs, ends, strict=True), list(zip(logs, ends, strict=True))[1:], strict=False
    ):
        if before <= at <= after + 1e-12:
            return high + (low - high) * (at - before) / (after - before)
    return ends[-1]


def _rounded_up(loss: float) -> float:
    """Round up to `DIGITS` digits.

    >>> _rounded_up(2.31412), _rounded_up(2.5)
    (2.315, 2.5)
    """
    step = 10.0 ** (math.floor(math.log10(abs(loss))) - DIGITS + 1) if loss else 1.0
    return float(f"{math.ceil(loss / step - 1e-9) * step:.{DIGITS}g}")


def answer(
    envelopes: Mapping[Arm, Envelope],
    steps: Mapping[Arm, Step],
    devices: Devices,
    losses: Sequence[float] = (),
    planned: Sequence[str] = (),
) -> Answer:
    """Compare the arms.

    Args:
        envelopes: of the arms that have a fit, in the order of the plan.
        steps: cost of a step of each of them.
        devices: a model of the devices.
        losses: target losses; left out, `choose_losses`.
        planned: the optimizers to compare, those without any fit among them.

    Raises:
        NotKnownError: see `place`.
    """
    targets = tuple(sorted(losses)) or choose_losses(list(envelopes.values()))
    optimizers = list(dict.fromkeys(arm.optimizer for arm in envelopes))
    found = [
        [reached(arm, envelope, loss, n) for n, (arm, envelope) in enumerate(envelopes.items())]
        for loss in targets
    ]
    ratios = [_ratios(of_loss) for of_loss in found]
    critical, placed = [], []
    for loss, of_loss in zip(targets, found, strict=True):
        for optimizer in optimizers:
            its = [one for one in of_loss if one.arm.optimizer == optimizer]
            critical.append(critical_of(optimizer, loss, its))
            its_steps = {one.arm: steps[one.arm] for one in its}
            placed += place(devices, its_steps, its)
    missing = [name for name in planned if name not in optimizers]
    use, batch, sentence = _decide(found, ratios) if not missing else (None, None, "")
    if missing:
        sentence = f"nothing to compare: no arm of {' or '.join(missing)} has losses to fit"
    return Answer(
        losses=targets,
        reached=tuple(one for of_loss in found for one in of_loss),
        ratios=tuple(one for of_loss in ratios for one in of_loss),
        trends=tuple(trend_of(loss, of) for loss, of in zip(targets, ratios, strict=True) if of),
        critical=tuple(critical),
        placed=tuple(placed),
        basis=_basis(devices, steps),
        optimizer=use,
        batch=batch,
        sentence=sentence,
    )


def _basis(devices: Devices, steps: Mapping[Arm, Step]) -> str:
    """Return the model of the devices in words, with the optimizers that have no time by it."""
    of: dict[str, dict[Arm, Step]] = {}
    for arm, step in steps.items():
        of.setdefault(arm.optimizer, {})[arm] = step
    untimed = [NAMES[name] for name, its in of.items() if not is_timed(its)]
    if devices.flops_per_second is not None or not untimed:
        return devices.basis
    return (
        f"{devices.basis}; not known for {' and '.join(untimed)}: the trials trained in packs, and "
        "none alone; give frontier.devices.flops_per_second"
    )


def _ratios(found: Sequence[Reached]) -> list[Ratio]:
    """Return the ratio at every batch size that both optimizers have."""
    of = {(one.arm.optimizer, one.arm.batch_size): one for one in found}
    sizes = dict.fromkeys(one.arm.batch_size for one in found)
    return [
        ratio_of(of["muon", size], of["adamw", size])
        for size in sizes
        if ("muon", size) in of and ("adamw", size) in of
    ]


def _decide(
    found: Sequence[Sequence[Reached]], ratios: Sequence[Sequence[Ratio]]
) -> tuple[str | None, Arm | None, str]:
    """Return optimizer, arm and sentence, by the lowest loss at which two can be compared.

    They are compared at the batch recommended for Muon; if that is inside the noise, at AdamW's.
    """
    for of_loss, of in zip(found, ratios, strict=True):
        by_size = {one.batch_size: one for one in of if one.ratio is not None}
        best = [_recommended(of_loss, name) for name in NAMES]
        sizes = dict.fromkeys(one.arm.batch_size for one in best if one)
        known = [by_size[size] for size in sizes if size in by_size]
        clear = [ratio for ratio in known if ratio.verdict != "inside"]
        if known:
            ratio = (clear or known)[0]
            winner = "adamw" if ratio.verdict == "below" else "muon"
            arm = _arm_of(of_loss, winner, ratio.batch_size)
            return (winner if clear else None), arm.arm, _compared(arm, ratio, winner)
    for of_loss in found:
        names = list(dict.fromkeys(one.arm.optimizer for one in of_loss))
        best = [_recommended(of_loss, name) for name in names]
        if len(names) == 1 and best[0]:
            return names[0], best[0].arm, _alone(best[0])
    return None, None, "no loss was reached by both optimizers at one batch size: nothing to say"


def _arm_of(found: Sequence[Reached], optimizer: str, batch_size: int) -> Reached:
    """Return one arm of those that reached a loss."""
    asked = optimizer, batch_size
    return next(one for one in found if (one.arm.optimizer, one.arm.batch_size) == asked)


def _recommended(found: Sequence[Reached], optimizer: str) -> Reached | None:
    """Return the largest batch that takes at most `WASTE` times the fewest tokens."""
    known = [one for one in found if one.arm.optimizer == optimizer and one.tokens is not None]
    fewest = min((one.tokens or 0.0 for one in known), default=0.0)
    enough = [one for one in known if (one.tokens or 0.0) <= WASTE * fewest]
    return max(enough, key=lambda one: one.arm.batch_size, default=None)


def _compared(arm: Reached, ratio: Ratio, winner: str) -> str:
    """Return the sentence on two optimizers at one batch size."""
    assert ratio.ratio is not None
    assert ratio.interval is not None
    factor = ratio.ratio if winner == "muon" else 1 / ratio.ratio
    low, high = ratio.interval
    ends = (low, high) if winner == "muon" else (high and 1 / high, low and 1 / low)
    shares = [None if end is None else 100 * (1 - 1 / end) for end in ends]
    at = f"batch {arm.arm.batch_size:,} ({arm.arm.batch_tokens:,} tokens)"
    other = NAMES["adamw" if winner == "muon" else "muon"]
    if ratio.verdict == "inside":
        return (
            f"the difference is inside the noise: at {at}, to loss {arm.loss:g}, Muon needs "
            f"{_share(shares[0])} to {_share(shares[1])} tokens than AdamW"
        )
    more = "" if shares[1] is not None else " or more"
    ends_text = f"{shares[0]:.0f} to {shares[1]:.0f} %" if not more else f"{shares[0]:.0f} %{more}"
    return (
        f"use {NAMES[winner]}, {at}: to loss {arm.loss:g} expect {100 * (1 - 1 / factor):.0f} % "
        f"fewer tokens than {other} ({ends_text})"
    )


def _share(percent: float | None) -> str:
    """Format a share of tokens saved.

    >>> _share(12.3), _share(-4.0), _share(None)
    ('12 % fewer', '4 % more', 'an unknown number of')
    """
    if percent is None:
        return "an unknown number of"
    return f"{abs(percent):.0f} % {'fewer' if percent >= 0 else 'more'}"


def _alone(arm: Reached) -> str:
    """Return the sentence on one optimizer."""
    return (
        f"use batch {arm.arm.batch_size:,} ({arm.arm.batch_tokens:,} tokens): to loss {arm.loss:g} "
        f"{arm.tokens:,.0f} tokens, at most {100 * (WASTE - 1):.0f} % more than at any other"
    )
