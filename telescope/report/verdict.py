"""A sweep's verdict in words, the same on the terminal and in the report."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

from telescope.ladder.thresholds import USABLE
from telescope.records import Certificate

if TYPE_CHECKING:
    from telescope.answer.finished import Finished
    from telescope.ladder.outcome import Judgement

HEADINGS = {"PASS": "CONFIRMED", "FAIL": "DO NOT USE"}
WORDS = {"PASS": "confirmed", "WARN": "not confirmed", "FAIL": "do not use"}
"""Verdict → its words in a table's cell."""


def caveat(finished: Finished) -> str:
    """Say why a sweep has no answer, or an answer without a certificate; else ""."""
    ladder = finished.ladder
    if ladder.stuck:
        return "none: stuck"
    if not ladder.choices:
        return "none yet: no stage has finished"
    if not ladder.is_finished:
        width = ladder.choices[-1].width
        return f"from width {width} alone so far: the sweep has not finished"
    if finished.certificate is None:
        return f"not proven: policy {finished.spec.ladder.policy} gives no interval"
    return ""


def heading_of(certificate: Certificate, goal: float) -> str:
    """Return a heading that says whether the answer can be used.

    Args:
        certificate: the verdict.
        goal: the excess loss that is good enough, as a share of the loss: `ladder.tolerance`.
    """
    is_usable = certificate.excess_bound <= USABLE * goal
    unproven = "USABLE, NOT CONFIRMED" if is_usable else "A START, NOT YET AN ANSWER"
    return HEADINGS.get(certificate.verdict, unproven)


def describe_certificate(certificate: Certificate, goal: float) -> str:
    """Describe a verdict with its answer's excess loss; see `heading_of`."""
    excess, bound = certificate.predicted_excess_loss, certificate.excess_bound
    return (
        f"{heading_of(certificate, goal)}: expect about {percent(excess)} worse than the best "
        f"setting at width {certificate.width}, at most {percent(bound)} with 90 % "
        f"(goal {percent(goal)})"
    )


def describe_loss(certificate: Certificate) -> str:
    """Describe the held-out loss that a run with the answer is expected to end with."""
    predicted = certificate.predicted_loss
    if predicted is None:
        return ""
    if predicted.loss is None or predicted.interval is None:
        return f"not predicted at width {certificate.width}: {predicted.reason}"
    low, high = predicted.interval
    return (
        f"{shortest(predicted.loss, high - low)} expected at width {certificate.width}, between "
        f"{shortest(low, high - low)} and {shortest(high, high - low)} with 90 %"
    )


def describe_judgement(judgement: Judgement) -> str:
    """Describe a target run's loss beside the one predicted, and what that means."""
    got, interval = judgement.got, judgement.interval
    ended = "diverged" if got is None else f"loss {got:.4f}"
    text = f"{judgement.run} (width {judgement.width}): {ended}"
    if judgement.predicted is not None and interval:
        length = interval[1] - interval[0]
        loss, low, high = (shortest(v, length) for v in (judgement.predicted, *interval))
        side = "inside" if judgement.place == "inside" else "outside"
        text += f", predicted {loss} ({low} to {high}): {side}"
    return f"{text}; {judgement.meaning}"


def shortest(value: float, error: float) -> str:
    """Format a value so that two digits of its error show.

    >>> shortest(1.68188, 0.123), shortest(3.2, 0.0071)
    ('1.68', '3.2000')
    """
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 4
    return f"{value:.{min(max(digits, 0), 6)}f}"


def percent(share: float) -> str:
    """Format a share of the loss as a percentage, with a space.

    >>> percent(0.0021), percent(0.00004)
    ('0.21 %', '0.004 %')
    """
    return f"{100 * share:.2f} %" if share >= 0.0005 else f"{100 * share:.1g} %"


def confirming(finished: Finished) -> str | None:
    """Return the command whose trials would confirm an answer; None if none is sure to help.

    It adds a width, or trains the widths that were left out. There is none if an axis has to be
    changed first.
    """
    certificate, ladder, spec = finished.certificate, finished.ladder, finished.spec
    if certificate is None or certificate.verdict != "WARN" or not ladder.is_finished:
        return None
    if not (spec.trainer or spec.model):  # a program that asks and tells trains it
        return None
    swept = [axis.name for axis in spec.ladder_spec.swept]
    if ladder.choices[-1].at_edge or any(certificate.intervals[name] is None for name in swept):
        return None
    widths, wider = list(spec.ladder.widths), 2 * spec.ladder.widths[-1]
    sets = ["ladder.until=proven"] if ladder.skipped else []
    if not ladder.skipped and wider <= spec.target.width and spec.trainer is None:
        # One more round at the new width has to be within the budget too.
        each = ladder.spec.cost(wider) / finished.target_flops
        need = finished.cost()["over_target"] + max(4, len(swept) + 2) * each
        sets = [f"ladder.widths={[*widths, wider]}"]
        if need > spec.budget.max_over_target:
            sets.append(f"budget.max_over_target={math.ceil(need * 10) / 10:g}")
    if not sets or (spec.rule != "mup"):
        return None
    options = " ".join(f"--set {shlex.quote(text)}" for text in sets)
    return f"telescope run {shlex.quote(str(finished.folder.path))} {options}"
