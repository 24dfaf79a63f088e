"""The table of width rules: each parameter's role, and its settings at every width.

A parameter's *scaling* is a pure function of role, shape, shape at base width and rule. It is
written so that it can be checked line by line against the literature named beside it. It uses only
the standard library, so that a trainer of any framework can call it.

r is a matrix's fan-in over its fan-in at base width. At r = 1 all rules agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from telescope.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

RMS_MATCH = 0.2
"""RMS of Muon's update per unit of lr, about that of AdamW's. Source: arXiv 2502.16982 §2.2."""
GROWTH_TOLERANCE = 0.25
"""Octaves by which a growing side may miss proportionality to the width. This leaves room for a
side that is rounded to a multiple (8/3 of the width, in eights); a side that grows as √width misses
by 0.5 per doubling, a capped one by 1."""
TIED_STD = 0.02
"""Standard deviation of a tied embedding. It also reads out: at 1 its logits shrink with the width
(slope -0.37)."""


class Role(StrEnum):
    """The role of a parameter in the width rules."""

    HIDDEN = "hidden"
    """A matrix, or a stack of them, with both sides growing."""
    RESIDUAL = "residual"
    """A hidden matrix that ends a residual branch; starts at zero."""
    EMBEDDING = "embedding"
    """A lookup table from a fixed vocabulary to the width."""
    READOUT = "readout"
    """mup's MuReadout: from the width to something fixed."""
    TIED = "tied"
    """An embedding shared with a MuSharedReadout."""
    INPUT = "input"
    """A Linear from something fixed, such as features, to the width."""
    VECTOR = "vector"
    """One growing dimension: norm gains and biases."""
    FINITE = "finite"
    """A vector that does not grow, such as the QK-norm gains of a fixed head_dim."""
    LATENT = "latent"
    """A matrix that Muon trains although a side, or both, has a fixed size inside the network, such
    as a router or one key for all heads. The model file marks its module ``latent = True``."""

    @property
    def is_hidden(self) -> bool:
        """True if Muon trains it."""
        return self in (Role.HIDDEN, Role.RESIDUAL, Role.LATENT)

    @property
    def is_vector(self) -> bool:
        """True if the model's own code initialises it."""
        return self in (Role.VECTOR, Role.FINITE)


class Start(StrEnum):
    """A parameter's initialisation."""

    NORMAL = "normal"
    """Drawn at random with the group's standard deviation."""
    ZEROS = "zeros"
    ONES = "ones"
    AS_BUILT = "as built"
    """As the model's own code has it, which is not known to be zeros or ones."""


@dataclass(frozen=True, slots=True)
class Tag:
    """The properties of one parameter that the width rules use."""

    name: str
    role: Role
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    output_mult: float = 1.0
    """The factor that the model file itself gives a readout, besides the rule's."""
    start: Start | None = None
    """Initialisation of a vector, which its model's own code sets; None where it is not known. A
    matrix is initialised by its role."""
    is_transposed: bool = False
    """True if the model stores it as (…, in, out); `shape` is (…, out, in) even then."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The parameter's shape in the model."""
        return transposed(self.shape) if self.is_transposed else self.shape


@dataclass(frozen=True, slots=True)
class Scaling:
    """The settings of one parameter under a rule, in base-width units."""

    lr: float
    """Step length per unit of lr: Muon's factor of the orthogonalised update, AdamW's of its unit
    step."""
    decay: float
    """Share of the weights that a step removes, per lr · weight_decay."""
    init_std: float
    """Standard deviation at initialisation; 0 means zeros or, for vectors, the model's own."""
    multiplier: float
    """Factor of the module's output; 1 except for readouts."""


def scaling(
    role: Role,
    shape: tuple[int, ...],
    base_shape: tuple[int, ...],
    *,
    optimizer: str,
    rule: str,
) -> Scaling:
    """Look up a parameter's settings in the table of width rules.

    Args:
        role: the parameter's role.
        shape: (…, out, in) for matrices; an embedding is (vocabulary, width).
        base_shape: the same parameter's shape at base width.
        optimizer: "muon" or "adamw".
        rule: "mup", "paper", "moonlight" or "standard"; for adamw only "mup" or "standard".

    Source: mup, arXiv 2512.05620 App. G, and for a side that does not grow the spectral condition
    that it comes from, arXiv 2310.17813; paper, arXiv 2505.02222 §3; moonlight, arXiv 2502.16982
    §2.2; AdamW, arXiv 2203.03466 Table 8. Residual outputs at zero: arXiv 2512.05620.

    >>> scaling(Role.HIDDEN, (64, 64), (16, 16), optimizer="muon", rule="mup").lr  # 0.2 · sqrt(16)
    0.8
    """
    init = init_std(role, shape) * start_share(role, shape, base_shape)
    if role in (Role.READOUT, Role.TIED):
        r = shape[-1] / base_shape[-1]
        return Scaling(1.0, 1.0, init, 1.0 if rule == "standard" else 1 / r)
    if not role.is_hidden:
        return Scaling(1.0, 1.0, init, 1.0)
    (out, in_), (out0, in0) = shape[-2:], base_shape[-2:]
    r = in_ / in0
    match optimizer, rule:
        case "muon", "mup":
            lr = RMS_MATCH * math.sqrt(max(out0, in0)) * math.sqrt((out / in_) / (out0 / in0))
            decay = 1.0
        case "muon", "paper":
            lr = RMS_MATCH * math.sqrt(max(out, in_)) / r
            decay = 1 / r
        case "muon", "moonlight" | "standard":
            lr = RMS_MATCH * math.sqrt(max(out, in_))
            decay = 1.0
        case "adamw", "mup":
            lr, decay = 1 / r, 1.0
        case "adamw", "standard":
            lr, decay = 1.0, 1.0
        case _:
            raise ValueError(f"no rule {rule!r} for {optimizer!r}")
    return Scaling(lr, decay, init, 1.0)


def start_share(role: Role, shape: tuple[int, ...], base_shape: tuple[int, ...]) -> float:
    """Return the factor of `init_std` that depends on the base width; 1 but for latent matrices.

    Their standard deviation is 1/√in · min(1, √(out/in)), the root relative to base width (arXiv
    2310.17813). So where in grows alone it is ∝ 1/in, as muP has it for an output layer: with more,
    the random start would swamp the gradient that goes back through the matrix.

    >>> start_share(Role.LATENT, (8, 64), (8, 16)), start_share(Role.LATENT, (64, 8), (16, 8))
    (0.5, 1.0)
    """
    if role is not Role.LATENT:
        return 1.0
    (out, in_), (out0, in0) = shape[-2:], base_shape[-2:]
    return math.sqrt(min(1.0, (out / in_) / (out0 / in0)))


def init_std(role: Role, shape: tuple[int, ...]) -> float:
    """Return the standard deviation at initialisation, the same under all rules."""
    match role:
        case Role.HIDDEN | Role.LATENT | Role.INPUT:
            return 1 / math.sqrt(shape[-1])
        case Role.EMBEDDING:
            return 1.0
        case Role.TIED:
            return TIED_STD
        case _:
            return 0.0


def check_growth(name: str, shapes: Sequence[tuple[int, ...]], widths: Sequence[int]) -> None:
    """Check that every side of a parameter is constant or proportional to the width.

    Args:
        name: the parameter's name.
        shapes: its shape in the model, at base width, and at further widths.
        widths: the widths of these shapes, in the same order.

    Raises:
        ModelError: the number of dimensions changes, or a side grows by another factor.
    """
    if len({len(shape) for shape in shapes}) > 1:
        raise ModelError(f"{name}: has another number of dimensions at another width")
    for sides in zip(*shapes, strict=True):
        octaves = [
            math.log2(max(side, 1) / max(sides[1], 1)) - math.log2(width / widths[1])
            for side, width in zip(sides, widths, strict=True)
        ]
        if len(set(sides)) > 1 and max(map(abs, octaves)) > GROWTH_TOLERANCE:
            pairs = ", ".join(f"{s} at width {w}" for s, w in zip(sides, widths, strict=True))
            raise ModelError(
                f"{name}: a side is {pairs}; a side must stay or be proportional to the width "
                "(rounding aside)"
            )


def transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Swap the last two sides of a matrix's or a stack's shape."""
    return (*shape[:-2], shape[-1], shape[-2])


def vector_start(number: float | None) -> Start:
    """Name the initialisation of a vector of one number; None if it holds several."""
    return {0.0: Start.ZEROS, 1.0: Start.ONES}.get(
        math.nan if number is None else number, Start.AS_BUILT
    )


def owners_of(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Map each parameter's id to the modules that hold it; several where weights are tied.

    The tensors from which a torch parametrization computes a module's weight count as the module's.
    """
    wrapped = {
        id(part): module
        for module in model.modules()
        for part in getattr(module, "parametrizations", {}).values()
    }
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(wrapped.get(id(module), module))
    return owners


def layer_biases(model: nn.Module) -> list[str]:
    """Return the names of all biases of modules that also hold a matrix, such as nn.Linear's.

    Unless the model file sets them, torch draws them at random, with a size that depends on the
    width.
    """
    owners = owners_of(model)
    layers = {
        id(owner)
        for parameter in model.parameters()
        if parameter.ndim > 1
        for owner in owners[id(parameter)]
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1
        and (name.rsplit(".", 1)[-1] == "bias" or name.rsplit(".", 1)[-1].startswith("bias_"))
        and any(id(owner) in layers for owner in owners[id(parameter)])
    ]
