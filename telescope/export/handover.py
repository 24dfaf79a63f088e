"""The parts common to all formats: the head, settings without an equivalent, and deviations.

A format chooses its numbers and then states their effect in its trainer, group by group. Here the
effect is compared with the groups' settings, so that one place decides what counts as exact.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telescope.config import OptimizerConfig
from telescope.errors import RefusedError
from telescope.rules.scaling import RMS_MATCH, Role, Start
from telescope.transfer.settings import CONVENTION_NOTE, Transfer

Group = Mapping[str, Any]
"""One of a transfer's groups."""
Effect = Callable[[Group], tuple[float, float | None]]
"""Group → what the trainer's own formula makes of its settings: the step per unit of the update
(of O for Muon, of AdamW's unit step), and the decay per step; None where it cannot decay."""

EXACT = 1e-6
"""Relative; further apart are two numbers that one setting cannot serve."""
WIDTH_OF_TEXT = 96
BY_GROUP = "torch, hf, deepspeed or optax"
"""The formats with settings for each group."""


@dataclass(frozen=True)
class Handover:
    """The answer of a sweep, on its way to another trainer."""

    sweep: str
    transfer: Transfer
    optimizer: OptimizerConfig
    base_width: int
    approximate: bool = False
    """True if settings may be written that are only the closest ones."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The transfer's groups."""
        return self.transfer.groups or ()

    @property
    def muon(self) -> list[Group]:
        """Those that Muon trains."""
        return [group for group in self.groups if is_muon(group)]

    @property
    def adamw(self) -> list[Group]:
        """Those that AdamW trains."""
        return [group for group in self.groups if not is_muon(group)]

    @property
    def r(self) -> float:
        """The target's width over the base width."""
        return self.transfer.width / self.base_width

    @property
    def multiplier(self) -> float:
        """The factor of the logits; 1 where there is none, or it is folded in."""
        return next((g["multiplier"] for g in self.groups if g["multiplier"] != 1), 1.0)


def is_muon(group: Group) -> bool:
    """Tell whether Muon trains a group."""
    return bool(group["optimizer"] == "Muon")


def is_stack(group: Group) -> bool:
    """Tell whether Muon trains each matrix of a group's tensors by itself."""
    return is_muon(group) and len(group["shape"]) > 2


def step_of(group: Group) -> float:
    """The step that a group asks for, per unit of the update.

    >>> step_of({"optimizer": "Muon", "shape": [100, 25], "lr": 0.5})  # 0.2 · √100 · 0.5
    1.0
    """
    return float(group["lr"]) * (RMS_MATCH * longest(group) if is_muon(group) else 1.0)


def decay_of(group: Group) -> float:
    """The share of a weight that a step takes off at the schedule's peak."""
    return float(group["lr"] * group["weight_decay"])


def longest(group: Group) -> float:
    """√max(out, in) of a group's matrices."""
    return math.sqrt(max(group["shape"][-2:]))


def mean(values: Iterable[float]) -> float:
    """The geometric mean; numbers that are the same but for rounding stay as they are.

    >>> mean([0.25, 1.0]), mean([0.3, 0.3]), mean([0.0, 0.0])
    (0.5, 0.3, 0.0)
    """
    numbers = list(values)
    if max(numbers) <= min(numbers) * (1 + 1e-12):
        return numbers[0]
    if min(numbers) <= 0:
        return sum(numbers) / len(numbers)
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def described(group: Group) -> str:
    """A group by its role, shape and names.

    >>> described({"role": "hidden", "shape": [8, 4], "names": ["a", "b"]})
    'hidden 8×4 (a and 1 more)'
    """
    shape = "×".join(map(str, group["shape"]))
    first, *others = group["names"]
    return f"{group['role']} {shape} ({first}{f' and {len(others)} more' if others else ''})"


def check_transfer(handover: Handover, format: str) -> None:
    """Refuse what no trainer of the formats can be told.

    Raises:
        RefusedError: no groups, or a group that needs another Muon, or Muon on parts of a tensor.
    """
    where = f"{handover.sweep}: format {format}"
    if not handover.groups:
        raise RefusedError(
            f"{where}: there are no groups to write: the sweep names no model file; give shapes "
            "with --shapes FILE, or take --format json"
        )
    odd = [g for g in handover.groups if g["optimizer"] is None or is_stack(g)]
    if odd:
        needs = "; ".join(f"{described(group)}: {group['note']}" for group in odd)
        raise RefusedError(f"{where}: cannot say what these need: {needs}; take --format json")


def refuse_unless(handover: Handover, format: str, *conditions: tuple[bool, str]) -> None:
    """Refuse with all the reasons at once.

    Raises:
        RefusedError: one of the conditions does not hold.
    """
    reasons = [reason for holds, reason in conditions if not holds]
    if reasons:
        raise RefusedError(f"{handover.sweep}: format {format}: {'; '.join(reasons)}")


def check_effect(handover: Handover, format: str, effect: Effect) -> list[str]:
    """Compare what a trainer makes of its settings with what the groups ask for.

    Returns:
        A line for each group that is off, by how much; none where all is exact.

    Raises:
        RefusedError: a group is off, and that is not allowed.
    """
    off = []
    for group in handover.groups:
        step, decay = effect(group)
        wrong = []
        if not math.isclose(step, step_of(group), rel_tol=EXACT):
            wrong.append(f"step ×{step / step_of(group):.4g}")
        if decay is not None and not math.isclose(decay, decay_of(group), rel_tol=EXACT):
            wrong.append(f"decay ×{decay / decay_of(group):.4g}")
        if wrong:
            off.append(f"{described(group)}: {', '.join(wrong)}")
    if off and not handover.approximate:
        raise RefusedError(
            f"{handover.sweep}: format {format}: its settings cannot serve all parameters at once; "
            f"the closest would give {'; '.join(off)}; --approximate writes them, and "
            f"{BY_GROUP} take settings for each group"
        )
    return off


def head(
    handover: Handover,
    *,
    written_for: str,
    factor: str,
    schedule: str,
    not_expressed: Sequence[str],
    off: Sequence[str] = (),
) -> list[str]:
    """The lines that stand above every export.

    Args:
        handover: what is handed over.
        written_for: the trainer, and its version.
        factor: the number that stands for the width rule, and where it is.
        schedule: the schedule in the trainer's words.
        not_expressed: what is to be done by hand.
        off: groups whose settings are the closest only, of `check_effect`.
    """
    transfer = handover.transfer
    certificate = transfer.certificate.verdict if transfer.certificate else "none"
    convention = CONVENTION_NOTE.format(rule=handover.optimizer.rule)
    lines = [
        f"telescope transfer {handover.sweep}, for {written_for}",
        f"rule {handover.optimizer.rule}, base width {handover.base_width}, width "
        f"{transfer.width}, r {handover.r:g}, optimizer {handover.optimizer.name}",
        f"answer {transfer.point} (base-width units), certificate {certificate}",
        f"factor {factor}",
        f"schedule {schedule}",
        *(f"note {note}" for note in transfer.notes if note != convention),
        "not expressed here:",
        *(f"- {line}" for line in not_expressed),
    ]
    if off:
        lines += ["APPROXIMATE: one setting serves groups that differ. Of what it should be:"]
        lines += [f"- {line}" for line in off]
    return lines


def comment(lines: Iterable[str], prefix: str = "# ") -> str:
    """Lines as comments, folded."""
    folded = []
    for line in lines:
        after = "  " if line.startswith("- ") else ""
        folded += textwrap.wrap(
            line, WIDTH_OF_TEXT, subsequent_indent=after, break_long_words=False
        ) or [""]
    return "".join(f"{prefix}{line}".rstrip() + "\n" for line in folded)


def start_by_hand(handover: Handover) -> str:
    """Describe the parameters' initialisation, for a trainer that has its own."""
    starts = {}
    for group in handover.groups:
        if Role(group["role"]).is_vector:
            continue  # as the model has it, everywhere
        shape = "×".join(map(str, group["shape"]))
        normal = group["init"] == Start.NORMAL
        how = f"normal, std {group['init_std']:.6g}" if normal else group["init"]
        starts[f"{group['role']} {shape}"] = how
    return "the start; set it after the model is built: " + ", ".join(
        f"{what} {how}" for what, how in starts.items()
    )


def logits_by_hand(handover: Handover) -> list[str]:
    """The multiplier of the logits, for a trainer that has none; empty where it is 1."""
    m = handover.multiplier
    if m == 1:
        return []
    return [
        f"the logits × {m:.6g}; mup's MuReadout does it by its base shapes; other code multiplies "
        "them itself, or is exported to with --fold-readout"
    ]


def odd_matrices(handover: Handover) -> list[str]:
    """Names of AdamW's matrices besides word embedding and output, where Muon trains the others.

    They are input layers and further tables, such as one of positions.
    """
    words = {g["shape"][0] for g in handover.groups if g["role"] in ("readout", "tied")}
    return [
        name
        for g in handover.adamw
        if g["role"] == "input" or (g["role"] == "embedding" and g["shape"][0] not in words)
        for name in g["names"]
    ]


def odd_by_hand(handover: Handover) -> list[str]:
    """Matrices of AdamW that a trainer which goes by names and sides would give to Muon."""
    names = odd_matrices(handover)
    if not names or not handover.muon:
        return []
    return [f"AdamW for {', '.join(names)}; see that the trainer does not give them to Muon"]


def share_of_run(count: int, steps: int) -> float:
    """Return a number of steps as a share that gives it back: trainers drop what follows the point.

    >>> int(15 / 22 * 22), int(share_of_run(15, 22) * 22)
    (14, 15)
    """
    share = count / steps
    return share if int(share * steps) == count else math.nextafter(share, 1)


def other_eps(handover: Handover) -> list[str]:
    """Groups whose eps is not the one that all get."""
    eps = handover.optimizer.eps
    return [
        f"eps {group['kwargs']['eps']:.4g} of {described(group)}; it gets {eps:g}"
        for group in handover.adamw
        if not math.isclose(group["kwargs"]["eps"], eps)
    ]


def without_schedule() -> str:
    """The schedule of a sweep whose trainer is not telescope's."""
    return "the one of the sweep's own trainer: lr is its peak"


def yaml_rows(keys: Mapping[str, object], indent: str = "") -> str:
    """Write keys and their values as YAML, a line each.

    >>> yaml_rows({"lr": 1e-08, "nesterov": True, "type": "muon"}, indent="  ").splitlines()
    ['  lr: 1.0e-08', '  nesterov: true', '  type: muon']
    """
    rows = []
    for key, value in keys.items():
        if isinstance(value, bool):
            text = str(value).lower()
        else:
            text = number(value) if isinstance(value, float) else str(value)
        rows.append(f"{indent}{key}: {text}\n")
    return "".join(rows)


def number(value: float) -> str:
    """A number that YAML, JSON and Python all read as a float.

    >>> number(1e-08), number(0.5), number(3)
    ('1.0e-08', '0.5', '3.0')
    """
    text = repr(float(value))
    mantissa, e, exponent = text.partition("e")
    return text if not e or "." in mantissa else f"{mantissa}.0e{exponent}"
