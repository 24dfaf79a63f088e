"""The settings of a point at any width, ready for torch's optimizers: one group per (role, shape).

The program's own training loop uses the same groups, so plain `torch.optim.Muon` and
`torch.optim.AdamW` with these settings train as the sweep did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from telescope.config import OptimizerConfig, TrainConfig
from telescope.errors import RefusedError
from telescope.markup import table, text
from telescope.records import Certificate, Point, as_json
from telescope.rules.groups import Group, parameter_groups
from telescope.rules.scaling import Role, Start, Tag

HORIZON_NOTE = (
    "weight_decay is rescaled so that lr · weight_decay · steps stays as in the sweep, to "
    "{here:.4g} in base-width units, lr is kept: an assumption, the sweep did not vary the steps "
    "(arXiv 2405.13698, 2510.19093); by the power law in tokens per parameter that was found for "
    "AdamW (arXiv 2505.13738) it would be {by_law:.4g}"
)
TIME_SCALE_EXPONENT = -0.527
"""Exponent of the best 1 / (lr · weight_decay · steps) in tokens per parameter, found for AdamW in
arXiv 2505.13738. Quoted; not measured here for Muon."""
STEPS_NOTE = (
    "lr is kept for a run of another length than the sweep's: an assumption, the sweep did not "
    "vary the steps"
)
BATCH_NOTE = (
    "the target's batch size is not the sweep's; lr and weight_decay are left as they are: an "
    "assumption, the sweep did not vary it"
)
CONVENTION_NOTE = (
    "rule {rule}; a step decays by lr · weight_decay of its own group, as torch.optim does; lr is "
    "the schedule's peak; what other libraries call these rules is in docs/width-rules.md"
)

EQUILIBRIUM = 3.0
"""lr · weight_decay · steps above which weight decay has had its full effect: a twentieth of the
initial weights is left. Derived, for a constant lr."""


@dataclass(frozen=True, repr=False)
class Transfer:
    """The settings at a width; the attributes are the keys of `telescope transfer --json`."""

    width: int
    point: Point
    """The point in base-width units, with weight_decay rescaled for another number of steps."""
    steps: int | None
    groups: tuple[dict[str, Any], ...] | None
    """One per (role, shape); None where the spec names no model file."""
    schedule: dict[str, Any] | None
    notes: tuple[str, ...]
    certificate: Certificate | None = field(default=None)
    """The certainty of the answer; None under policy `paper`, which gives none."""

    @property
    def lr(self) -> float:
        """Peak learning rate in base-width units; KeyError where it is no axis."""
        return self.point.lr

    @property
    def weight_decay(self) -> float:
        """Weight decay in base-width units; KeyError where it is no axis."""
        return self.point.weight_decay

    @property
    def starts(self) -> tuple[str, ...]:
        """Each group's initialisation for a table: a standard deviation, or a word."""
        return tuple(
            f"{group['init_std']:.4g}"
            if group["init"] == Start.NORMAL
            else group["init"] or str(Start.AS_BUILT)
            for group in self.groups or ()
        )

    def __repr__(self) -> str:
        """Describe settings and verdict in one line."""
        groups = "no groups" if self.groups is None else f"{len(self.groups)} groups"
        steps = f", steps {self.steps}" if self.steps else ""
        verdict = self.certificate.verdict if self.certificate else "no certificate"
        return f"<Transfer to width {self.width}{steps}: {self.point}; {groups}; {verdict}>"

    def _repr_html_(self) -> str:
        """Render that line and a table of the groups, for notebooks."""
        return f"<p>{text(repr(self)[1:-1])}</p>{self.groups_table()}"

    def groups_table(self) -> str:
        """Return the groups as an HTML table; "" without groups."""
        if self.groups is None:
            return ""
        head = ["role", "shape", "count", "optimizer", "lr", "weight decay", "init std", "output ×"]
        rows = [
            [
                group["role"],
                "×".join(map(str, group["shape"])),
                group["count"],
                group["optimizer"] or group["note"],
                f"{group['lr']:.6g}",
                f"{group['weight_decay']:.6g}",
                start,
                f"{group['multiplier']:.4g}",
            ]
            for group, start in zip(self.groups, self.starts, strict=True)
        ]
        return table(head, rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the keys of `telescope transfer --json`, in their order."""
        return {
            "width": self.width,
            "point": dict(self.point),
            "lr": self.point.get("lr"),
            "weight_decay": self.point.get("weight_decay"),
            "steps": self.steps,
            "schedule": self.schedule,
            "groups": as_json(self.groups),
            "certificate": self.certificate and self.certificate.as_dict(),
            "notes": list(self.notes),
        }


def rescale_horizon(point: Point, *, sweep_steps: int, steps: int) -> Point:
    """Keep lr · weight_decay · steps for a run of another length; lr stays.

    >>> rescale_horizon(Point.of(lr=0.1, weight_decay=0.2), sweep_steps=100, steps=400).weight_decay
    0.05
    """
    return Point.of({**point, "weight_decay": point.weight_decay * sweep_steps / steps})


def at_horizon(point: Point, sweep_steps: int | None, steps: int | None) -> Point:
    """Return the point for a run of `steps`, rescaled if the sweep's runs had another length."""
    if sweep_steps is None or steps is None or steps == sweep_steps or "weight_decay" not in point:
        return point
    return rescale_horizon(point, sweep_steps=sweep_steps, steps=steps)


def horizon_note(point: Point, sweep_steps: int | None, steps: int | None) -> str | None:
    """State both conventions for a run of another length; None if it is the same or unknown.

    >>> note = horizon_note(Point.of(lr=0.1, weight_decay=0.2), 100, 400) or ""
    >>> "to 0.05 in" in note, note[-18:]  # 0.05 · 4^0.527
    (True, 'it would be 0.1038')
    """
    if sweep_steps is None or steps is None or steps == sweep_steps:
        return None
    if "weight_decay" not in point:
        return STEPS_NOTE
    here = rescale_horizon(point, sweep_steps=sweep_steps, steps=steps).weight_decay
    # At one model and batch size, tokens per parameter grow as the steps do.
    by_law = here * (steps / sweep_steps) ** -TIME_SCALE_EXPONENT
    return HORIZON_NOTE.format(here=here, by_law=by_law)


def time_scale_note(point: Point, sweep_steps: int | None) -> str | None:
    """Say how close to equilibrium weight decay came in the sweep's runs; None if unknown.

    >>> time_scale_note(Point.of(lr=0.1, weight_decay=0.2), 500)
    'lr · weight_decay · steps of the answer is 10'
    """
    if sweep_steps is None or not {"lr", "weight_decay"} <= set(point):
        return None
    reached = point.lr * point.weight_decay * sweep_steps
    note = f"lr · weight_decay · steps of the answer is {reached:.2g}"
    if reached >= EQUILIBRIUM:
        return note
    return (
        f"{note}, below {EQUILIBRIUM:g}: weight decay has not reached its equilibrium in the "
        "sweep's runs, which say little of one that is much longer"
    )


def transfer_settings(
    point: Point,
    *,
    width: int,
    steps: int | None,
    train: TrainConfig | None,
    sweep_steps: int | None = None,
    optimizer: OptimizerConfig,
    tags: Mapping[str, Tag] | None,
    fold: bool = False,
) -> Transfer:
    """Return the settings of `point` at `width`.

    Args:
        point: the chosen point, in base-width units.
        width: the target's width; any that the model file can build.
        steps: the target's optimizer steps; None if neither spec nor user gives them.
        train: the sweep's training, for its schedule; None for a trainer with its own.
        sweep_steps: optimizer steps of the sweep's trials; by default those of `train`.
        optimizer: the sweep's optimizer.
        tags: each parameter's role and shape at `width`, by its name; None if the spec names
            neither a model file nor shapes.
        fold: fold the readouts' multipliers into their other settings; see `fold_readout`.

    Raises:
        RefusedError: `fold`, and the readout is tied.
    """
    notes = []
    sweep_steps = sweep_steps or (train.steps if train else None)
    if tags:
        notes.append(CONVENTION_NOTE.format(rule=optimizer.rule))
    if note := horizon_note(point, sweep_steps, steps):
        notes.append(note)
    point = at_horizon(point, sweep_steps, steps)
    groups = tags and group_settings(parameter_groups(tags, point, optimizer), optimizer, fold=fold)
    return Transfer(
        width=width,
        point=point,
        steps=steps,
        groups=tuple(groups) if groups else None,
        schedule=_schedule(train, point, steps) if train and steps else None,
        notes=tuple(notes),
    )


def _schedule(train: TrainConfig, point: Point, steps: int) -> dict[str, Any]:
    """Return the learning-rate schedule of a run of `steps`; see `share_of_peak`."""
    schedule: dict[str, Any] = {
        "name": train.schedule,
        "warmup_steps": round(min(1.0, point.get("warmup", train.warmup)) * steps),
        "final_lr": 1.0 if train.schedule == "constant" else train.final_lr,
    }
    if train.schedule == "wsd":
        # The decay begins after the warm-up; trainers differ if both together exceed the run.
        most = steps - schedule["warmup_steps"]
        schedule["decay_steps"] = min(round(train.decay * steps), most)
    return schedule


def fold_readout(group: Group) -> Group:
    """Convert a readout's settings for code without the multiplier m on its logits.

    The code's weight is then W' = m·W, and its gradient is 1/m of W's. AdamW's step depends on the
    size of a gradient only through eps, so with lr·m and eps/m, W' moves as m·W does. A step
    removes lr · weight_decay of the weights, so weight_decay becomes weight_decay/m. The training
    is exactly the same except for clipping, because the norm of all gradients changes. Groups of
    other roles are returned unchanged.

    Raises:
        RefusedError: the readout is tied, so the multiplier cannot go into its weight.
    """
    m = group.multiplier
    if m == 1:
        return group
    if group.role is Role.TIED:
        raise RefusedError(
            f"fold-readout: {group.names[0]} is tied: an embedding that is also the readout cannot "
            f"hold the multiplier; multiply the logits by {m:g} in the code, or untie the readout"
        )
    return replace(
        group,
        lr=group.lr * m,
        weight_decay=group.weight_decay / m,
        init_std=group.init_std * m,
        kwargs={**group.kwargs, "eps": group.kwargs["eps"] / m},
        multiplier=1.0,
    )


def group_settings(
    groups: Iterable[Group], optimizer: OptimizerConfig, *, fold: bool = False
) -> list[dict[str, Any]]:
    """Return groups with the keys of `telescope transfer --json`.

    Raises:
        RefusedError: `fold`, and the readout is tied.
    """
    settings = []
    for group in groups:
        folded = fold_readout(group) if fold else group
        entry = _as_dict(folded, optimizer)
        if folded.multiplier != group.multiplier:
            note = f"its multiplier {group.multiplier:g} is folded into init_std, lr, decay and eps"
            entry["note"] = "; ".join(filter(None, (entry["note"], note)))
        settings.append(entry)
    return settings


def _as_dict(group: Group, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Return one group with the JSON's keys; its `optimizer` is None if torch has no equivalent."""
    name: str | None = "Muon" if group.is_muon else "AdamW"
    notes = [_init_note(group)]
    if group.is_muon and optimizer.ns_dtype == "fp32":
        name = None
        notes.append("needs a Muon with fp32 Newton–Schulz; torch.optim.Muon computes in bf16")
    if group.is_muon and optimizer.ns != "jordan":
        name = None
        notes.append(
            f"needs a Muon with {optimizer.ns} Newton–Schulz (arXiv 2505.16932, Algorithm 1); "
            "torch.optim.Muon has one quintic for all steps"
        )
    if group.is_muon and len(group.shape) > 2:
        notes.append(
            "each matrix of the stack is a parameter of its own: unbind it; torch's Muon takes 2-D "
            "only"
        )
    if group.is_transposed:
        notes.append("kept as (in, out), transposed, so init_std is by the first of the two sides")
    if group.role in (Role.READOUT, Role.TIED) and group.multiplier != 1:
        notes.append(f"the logits are multiplied by {group.multiplier:g}, as mup's readout does")
    return {
        "role": str(group.role),
        "shape": list(group.shape),
        "names": list(group.names),
        "count": len(group.names),
        "optimizer": name,
        "kwargs": as_json(group.kwargs),
        "lr": group.lr,
        "weight_decay": group.weight_decay,
        "init": group.start and str(group.start),
        "init_std": group.init_std,
        "multiplier": group.multiplier,
        "note": "; ".join(note for note in notes if note),
    }


def _init_note(group: Group) -> str:
    """Describe the initialisation where the standard deviation does not; else ""."""
    if not group.role.is_vector:
        return "starts at zero" if group.start is Start.ZEROS else ""
    match group.start:
        case None:
            return "starts as the model's own code has it, a layer's bias at 0"
        case Start.ONES:
            return "starts at 1, as the model's own code has it"
        case Start.ZEROS:
            return "starts at 0, as the model's own code has it, or a layer's bias"
        case _:
            return "starts as the model's own code has it"
