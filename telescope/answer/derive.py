"""A ladder's answer for a width: its certificate, and the settings to transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from telescope.errors import RefusedError, SpecError
from telescope.ladder.assumed import FIND_THE_RULE, assumed_alike
from telescope.ladder.ladder import Ladder
from telescope.records import Certificate, Point, PredictedLoss
from telescope.rules.scaling import Tag
from telescope.spec.spec import Spec
from telescope.store.memory import of_model

if TYPE_CHECKING:
    from telescope.config import ModelConfig
    from telescope.transfer.settings import Transfer
    from telescope.transfer.shapes import Shapes

FOREIGN_RULE = (
    "the trainer follows rule mup at every width of the sweep and at the target, as optimizer.rule "
    "says: telescope does not see it"
)

FIND_YOUR_RULE = (
    "see how the trainer sets initialisation, learning rates and multipliers by width, and "
    "optimizer.rule"
)

UNCONFIRMED = "the answer will not be confirmed: {}"
"""The line of `plan` and `run` before a budget is spent; the blank is `rule_problem`'s."""

UNKNOWN_STEPS = (
    "weight_decay is as swept: trainer.steps does not say how many steps the trials had; for a run "
    "of another length keep lr · weight_decay · steps"
)


def rule_problem(spec: Spec) -> str:
    """The reason why no answer of a sweep can be confirmed; empty where its rule is mup."""
    if spec.rule == "mup":
        return ""
    if spec.rule:
        return (
            f"optimizer.rule is {spec.rule}, under which an optimum is not known to hold across "
            "widths; use mup"
        )
    return (
        "optimizer.rule is not given: nothing says that the trainer follows a rule under which an "
        'optimum holds across widths; if yours does, say so: [optimizer] rule = "mup"'
    )


def certificate_of(
    spec: Spec,
    ladder: Ladder,
    *,
    width: int | None = None,
    steps: int | None = None,
    rule_checked: bool,
) -> Certificate | None:
    """Certify a width by its ladder and the spec's rule; None where the policy certifies nothing.

    Args:
        spec: the sweep.
        ladder: its ladder, with a choice or more.
        width: the width to predict; left out, the spec's target.
        steps: the target's optimizer steps; left out, the spec's.
        rule_checked: a coordinate check of the model has passed.
    """
    certificate = ladder.certificate(width, rule_checked=rule_checked)
    if certificate is None:
        return None
    certificate = _for_the_target(certificate, spec, steps)
    if spec.model is None:  # `telescope check` would refuse
        problems = (text.replace(FIND_THE_RULE, FIND_YOUR_RULE) for text in certificate.problems)
        certificate = replace(certificate, problems=tuple(problems))
    if spec.rule == "mup":
        assumed = () if spec.model else (FOREIGN_RULE,)
        return replace(certificate, assumptions=(*certificate.assumptions, *assumed))
    problem = rule_problem(spec)
    verdict = "WARN" if certificate.verdict == "PASS" else certificate.verdict
    return replace(certificate, verdict=verdict, problems=(*certificate.problems, problem))


def chosen_point(ladder: Ladder, certificate: Certificate | None) -> Point:
    """The answer of a ladder with a choice or more, for a run of the sweep's own steps."""
    return certificate.point if certificate else ladder.choices[-1].point


def _for_the_target(certificate: Certificate, spec: Spec, steps: int | None) -> Certificate:
    """The certificate with what follows from the sweep's training and the target's.

    That is how far weight decay got, and what is assumed of a target that is trained otherwise.
    """
    from telescope.transfer.settings import BATCH_NOTE, horizon_note, time_scale_note

    steps = steps or spec.target.steps
    unknown = UNKNOWN_STEPS if steps and not spec.steps else None
    differing = {
        "steps": unknown or horizon_note(certificate.point, spec.steps, steps),
        "batch size": BATCH_NOTE if _has_another_batch(spec) else None,
    }
    notes = {name: note for name, note in differing.items() if note}
    others = [text for text in certificate.assumptions if text != assumed_alike()]
    reached = time_scale_note(certificate.point, spec.steps)
    predicted = certificate.predicted_loss
    if notes and predicted and predicted.loss is not None:
        why = f"a loss is predicted for the sweep's own {' and '.join(notes)} alone"
        predicted = PredictedLoss(None, None, predicted.widths, why)
    return replace(
        certificate,
        predicted_loss=predicted,
        evidence=(*certificate.evidence, *([reached] if reached else [])),
        assumptions=(assumed_alike(*notes), *notes.values(), *others),
    )


def _has_another_batch(spec: Spec) -> bool:
    """Tell whether the target's batch size is known to be another than the sweep's."""
    batch_size = spec.target.batch_size
    return bool(spec.train and batch_size and batch_size != spec.train.batch_size)


def transfer(
    spec: Spec,
    ladder: Ladder,
    *,
    width: int | None,
    steps: int | None,
    rule_checked: bool = False,
    shapes: Shapes | str | Path | None = None,
    roles: Mapping[str, str] | None = None,
    fold_readout: bool = False,
) -> Transfer:
    """The answer of a ladder, handed over at a width; see `telescope.Ladder.transfer`."""
    if ladder.stuck or not ladder.choices:
        why = ladder.stuck or "no stage has finished yet; go on with `telescope run`"
        raise RefusedError(f"{spec.name}: nothing to transfer: {why}")
    from telescope.transfer.settings import BATCH_NOTE, transfer_settings

    width = width or spec.target.width
    last = ladder.choices[-1]
    certificate = certificate_of(spec, ladder, width=width, steps=steps, rule_checked=rule_checked)
    steps = steps or spec.target.steps or spec.steps
    tags = _tags(spec, width, shapes, roles)
    answer = transfer_settings(
        chosen_point(ladder, certificate),
        width=width,
        steps=steps,
        train=spec.train,
        sweep_steps=spec.steps,
        optimizer=spec.optimizer,
        tags=tags,
        fold=fold_readout,
    )
    notes = list(answer.notes)
    if fold_readout and tags is None:
        raise SpecError("fold-readout: there are no groups to fold; give shapes, or a model file")
    if _has_another_batch(spec):
        notes.append(BATCH_NOTE)
    if spec.trainer and steps and not spec.steps:
        notes.append(UNKNOWN_STEPS)
    if not ladder.is_finished:
        notes.insert(
            0, f"the sweep has NOT finished: this is the choice of width {last.width} alone"
        )
    return replace(answer, notes=tuple(notes), certificate=certificate)


def _tags_of_model(model: ModelConfig, width: int, base_width: int) -> dict[str, Tag]:
    """The parameters of a model file at a width, and how its vectors start."""
    from telescope.train.model import build_meta, vector_starts

    tags = build_meta(model, width=width, base_width=base_width).tags
    starts = vector_starts(model, base_width=base_width)
    return {name: replace(tag, start=starts.get(name)) for name, tag in tags.items()}


def _tags(
    spec: Spec,
    width: int,
    shapes: Shapes | str | Path | None,
    roles: Mapping[str, str] | None,
) -> Mapping[str, Tag] | None:
    """The parameters at a width: of the model file, else of the shapes; None where neither is.

    Raises:
        SpecError: shapes of other widths, beside a model file, or without the trainer's rule.
        ModelError: the model file cannot be built at this width.
    """
    model = spec.resolved_model
    if model:
        if shapes is not None:
            raise SpecError("shapes: left out where the spec has a model file, which has its own")
        if roles:
            raise SpecError("roles: left out where the spec has a model file, which has its own")
        return of_model(
            dict[str, Tag],
            model,
            ("tags", model, width, spec.base_width),
            lambda: _tags_of_model(model, width, spec.base_width),
        )
    shapes = shapes or (spec.trainer.shapes if spec.trainer else None)
    if roles and not isinstance(shapes, (str, Path)):
        raise SpecError("roles: they are for a file of shapes; give it with --shapes FILE")
    if shapes is None:
        return None
    if spec.rule is None:
        raise SpecError(
            "optimizer.rule: missing; with shapes it must be given, because the settings depend on "
            "which rule the trainer follows: mup, paper, moonlight or standard"
        )
    for axis in ("lr", "weight_decay"):
        if axis not in spec.axes:
            raise SpecError(f"axes.{axis}: missing; with shapes it must be given, with `value` say")
    if isinstance(shapes, (str, Path)):
        from telescope.transfer.shapes import Shapes

        shapes = Shapes.load(
            shapes,
            width=width,
            base_width=spec.base_width,
            only_width=spec.target.width,
            roles=roles,
        )
    if (shapes.width, shapes.base_width) != (width, spec.base_width):
        raise SpecError(
            f"shapes: of width {shapes.width} and base width {shapes.base_width}, must be of "
            f"{width} and {spec.base_width}"
        )
    return shapes.tags
