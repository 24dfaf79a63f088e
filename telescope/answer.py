"""What a ladder says of a width: how sure it is, and what to hand over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from telescope.errors import RefusedError
from telescope.ladder.ladder import Ladder
from telescope.records import Certificate
from telescope.spec import Spec

if TYPE_CHECKING:
    from telescope.transfer.settings import Transfer


def certificate_of(
    spec: Spec, ladder: Ladder, *, width: int | None = None, rule_checked: bool
) -> Certificate | None:
    """What a ladder says of a width, with what the spec's rule adds; None without a certificate.

    Args:
        spec: the sweep.
        ladder: its ladder, with a choice or more.
        width: the width to predict; left out, the spec's target.
        rule_checked: a coordinate check of the model has passed.
    """
    certificate = ladder.certificate(width, rule_checked=rule_checked)
    if certificate is None or spec.optimizer.rule == "mup":
        return certificate
    problem = (
        f"optimizer.rule is {spec.optimizer.rule}, under which an optimum is not known to hold "
        "across widths; use mup"
    )
    verdict = "WARN" if certificate.verdict == "PASS" else certificate.verdict
    return replace(certificate, verdict=verdict, problems=(*certificate.problems, problem))


def transfer(
    spec: Spec,
    ladder: Ladder,
    *,
    width: int | None,
    steps: int | None,
    rule_checked: bool = False,
) -> Transfer:
    """The answer of a ladder, handed over at a width; see `telescope.Ladder.transfer`."""
    if ladder.stuck or not ladder.choices:
        why = ladder.stuck or "no stage has finished yet; go on with `telescope run`"
        raise RefusedError(f"{spec.name}: nothing to transfer: {why}")
    from telescope.train.model import build_meta
    from telescope.transfer.settings import BATCH_NOTE, transfer_settings

    width = width or spec.target.width
    last = ladder.choices[-1]
    certificate = certificate_of(spec, ladder, width=width, rule_checked=rule_checked)
    steps = steps or spec.target.steps or (spec.train.steps if spec.train else None)
    model = spec.resolved_model
    tagged = build_meta(model, width=width, base_width=spec.base_width) if model else None
    answer = transfer_settings(
        certificate.point if certificate else last.point,
        width=width,
        steps=steps,
        train=spec.train,
        optimizer=spec.optimizer,
        tags=tagged.tags if tagged else None,
    )
    notes = list(answer.notes)
    batch_size = spec.target.batch_size
    if spec.train and batch_size and batch_size != spec.train.batch_size:
        notes.append(BATCH_NOTE)
    if not ladder.is_finished:
        notes.insert(
            0, f"the sweep has NOT finished: this is the choice of width {last.width} alone"
        )
    return replace(answer, notes=tuple(notes), certificate=certificate)
