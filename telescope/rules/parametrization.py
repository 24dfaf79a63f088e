"""muP for Muon in torch: each parameter's role, its initialisation, and the readouts' multipliers.

A parameter's *role* follows from its sides that grow with the width (mup's `infshape`) and from the
module that holds it. `telescope.rules.scaling` turns a role into settings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import mup
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from telescope.errors import ModelError
from telescope.rules.scaling import (
    Role,
    Tag,
    check_growth,
    init_std,
    owners_of,
    scaling,
    start_share,
)

LATENT = "where a side is fixed on purpose, as a router's, say latent = True on its module"
"""Advice for a matrix without a role."""


def tag(
    model: nn.Module, base: nn.Module, delta: nn.Module, *, widths: tuple[int, int, int]
) -> dict[str, Tag]:
    """Set mup's base shapes on `model` and find the role of every trained parameter.

    A frozen parameter (``requires_grad=False``) is a constant like a buffer; it has no role.

    Args:
        model: the model to be trained, or its shape on the meta device.
        base: the same model at base width; only its shapes are read.
        delta: the same model at another width, which shows the sides that grow.
        widths: the widths of the three models; a growing side must be proportional to them.

    Returns:
        name → tag of each trained parameter, in the order of `named_parameters`.

    Raises:
        ModelError: a parameter has no clear role; the message says what to change in the model
            file.
    """
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(
                f"{name}: has no shape before the first batch; give a lazy module's sizes in build"
            )
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, base, delta)]
    if not shapes[0].keys() == shapes[1].keys() == shapes[2].keys():
        everywhere = shapes[0].keys() & shapes[1].keys() & shapes[2].keys()
        odd = sorted({name for names in shapes for name in names} - everywhere)
        raise ModelError(f"{odd[0]}: exists at one width only; every width needs the same layers")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError("no parameter is trained: there is none with requires_grad=True")
    for name, sizes in shapes[0].items():
        others = [by_name[name] for by_name in shapes]
        if name in trained:
            check_growth(name, others, widths)
        elif any(len(other) != len(sizes) for other in others):
            raise ModelError(f"{name}: has another number of dimensions at another width")
    mup.set_base_shapes(model, base, delta=delta, rescale_params=False, do_assert=False)
    owners = owners_of(model)
    return {
        name: Tag(
            name,
            _role(name, p, owners[id(p)]),
            shapes[0][name],
            shapes[1][name],
            math.prod(getattr(owner, "output_mult", 1.0) for owner in owners[id(p)]),
        )
        for name, p in trained.items()
    }


def _role(name: str, parameter: Tensor, owners: list[nn.Module]) -> Role:
    """Return the role of one trained parameter; see `tag`."""
    grows = [dimension.isinf() for dimension in parameter.infshape]  # type: ignore[attr-defined]
    shared = any(isinstance(owner, mup.MuSharedReadout) for owner in owners)
    readout = any(isinstance(owner, mup.MuReadout) for owner in owners)
    if readout and any(map(is_parametrized, owners)):
        raise ModelError(
            f"{name}: a readout under a torch parametrization; mup scales a readout by its own "
            "weight's shape: leave the readout plain"
        )
    embeddings = sum(isinstance(owner, nn.Embedding) for owner in owners)
    if parameter.ndim <= 1:
        if shared:
            raise ModelError(
                f"{name}: MuSharedReadout takes bias=False; its bias has the wrong size"
            )
        return Role.VECTOR if any(grows) else Role.FINITE
    if shared and not embeddings:
        raise ModelError(
            f"{name}: is shared with a MuSharedReadout but is no nn.Embedding's weight; share an "
            "embedding's, or use mup.MuReadout"
        )
    if 0 < embeddings < len(owners) and not shared:
        raise ModelError(f"{name}: an embedding that is tied needs mup.MuSharedReadout")
    if readout or embeddings:
        if grows != [False, True]:
            raise ModelError(
                f"{name}: shape {tuple(parameter.shape)} must grow with the width in its last "
                f"dimension alone, for {'a readout' if readout else 'an embedding'}"
            )
        return Role.TIED if shared else Role.READOUT if readout else Role.EMBEDDING
    is_plain = not any(map(is_parametrized, owners))  # a side of weight_norm's factors is fixed too
    is_latent = is_plain and all(getattr(owner, "latent", False) is True for owner in owners)
    if (is_latent or grows[-2:] == [True, True]) and not any(grows[:-2]):
        ends_branch = {bool(getattr(owner, "residual_output", False)) for owner in owners}
        if len(ends_branch) > 1:
            raise ModelError(
                f"{name}: is shared by modules of which only some say residual_output = True; "
                "all of them must, or none"
            )
        if ends_branch == {True}:
            return Role.RESIDUAL
        return Role.HIDDEN if all(grows[-2:]) else Role.LATENT
    is_linear = is_plain and all(isinstance(owner, nn.Linear) for owner in owners)
    if is_linear and grows == [True, False]:
        return Role.INPUT
    raise ModelError(_unclear(name, parameter, grows, owners))


def _unclear(name: str, parameter: Tensor, grows: list[bool], owners: list[nn.Module]) -> str:
    """Say why a matrix has no role, and what to change."""
    shape = tuple(parameter.shape)
    if any(map(is_parametrized, owners)):
        return (
            f"{name}: shape {shape} belongs to a torch parametrization, as weight_norm's, and is "
            "no matrix of the layer; write it in forward, a factor per output as one nn.Parameter "
            "(out,)"
        )
    if any(isinstance(owner, _ConvNd) for owner in owners):
        return (
            f"{name}: shape {shape} is a convolution's; write a dense one as a stack of matrices "
            "(taps, out, in), one nn.Parameter with a matrix per tap, and a depthwise one as one "
            "nn.Parameter (width,) per tap"
        )
    if grows[-2:] == [False, True]:
        return (
            f"{name}: shape (out, in) = {shape} grows in its input alone; an output layer must be "
            "mup.MuReadout, a lookup or positional table nn.Embedding, and a hidden layer's output "
            f"must grow with the width too (key-value heads as a ratio, not a number); {LATENT}"
        )
    if grows[-2:] == [True, False]:
        return (
            f"{name}: shape (out, in) = {shape} grows in its output alone; a lookup table must be "
            "nn.Embedding, an input layer nn.Linear, a hidden layer's input must grow with the "
            f"width too; {LATENT}"
        )
    return (
        f"{name}: shape {shape} has no clear role (growing dimensions: {grows}); the last two of a "
        f"matrix or a stack of matrices must grow with the width, and no others; {LATENT}"
    )


def initialise(
    model: nn.Module,
    tags: dict[str, Tag],
    *,
    seed: int,
    init_scale: float = 1.0,
    zeroed: Collection[str] = (),
) -> None:
    """Initialise the matrices and tables by their role.

    Vectors, scalars, frozen parameters and an embedding's padding row stay as `build` made them,
    except for the biases in `zeroed`. All values come from one generator on the CPU, in the order
    of `tags`, so that a seed means the same on every device.

    Args:
        model: initialised in place.
        tags: name → tag of every trained parameter.
        seed: the generator's seed.
        init_scale: factor of every standard deviation, at every width.
        zeroed: the biases that start at zero, see `telescope.rules.scaling.layer_biases`.
    """
    parameters, starts = dict(model.named_parameters()), []
    for name, tag in tags.items():
        if not tag.role.is_vector:
            std = init_std(tag.role, tag.shape) * start_share(tag.role, tag.shape, tag.base_shape)
            starts.append((parameters[name], std * init_scale))
        elif name in zeroed:
            starts.append((parameters[name], 0.0))
    draw(model, starts, seed=seed)


@torch.no_grad()
def draw(model: nn.Module, starts: Iterable[tuple[Tensor, float]], *, seed: int) -> None:
    """Initialise parameters in place, each with its standard deviation; 0 means zeros.

    All values come from one generator on the CPU, in the given order. An embedding's padding row
    keeps its values.
    """
    generator, padding = torch.Generator().manual_seed(seed), _padding_rows(model)
    for parameter, std in starts:
        if std == 0:
            parameter.zero_()
            continue
        values = torch.randn(parameter.shape, generator=generator) * std
        for row in padding.get(id(parameter), ()):
            values[row] = parameter[row]
        parameter.copy_(values)


def _padding_rows(model: nn.Module) -> dict[int, set[int]]:
    """Map each embedding's weight (by id) to its padding rows."""
    rows: dict[int, set[int]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            rows.setdefault(id(module.weight), set()).add(module.padding_idx)
    return rows


def set_multipliers(model: nn.Module, *, optimizer: str, rule: str) -> None:
    """Set every readout's multiplier to the rule's, also of frozen ones; mup itself divides by r.

    r is stored as a number: mup reads it from the weight's attributes, but in a functional call
    the weight is a plain tensor without them.
    """
    for module, _ in readouts(model):
        ratio = float(module.width_mult())
        shape = tuple(module.weight.shape)
        base_shape = tuple(side.base_dim for side in module.weight.infshape)
        wanted = scaling(Role.READOUT, shape, base_shape, optimizer=optimizer, rule=rule)
        module.output_mult *= wanted.multiplier * ratio
        module.width_mult = functools.partial(float, ratio)


def readouts(model: nn.Module) -> Iterator[tuple[mup.MuReadout, str]]:
    """Yield every MuReadout with its weight's name; a tied weight has its embedding's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, mup.MuReadout):
            yield module, names[id(module.weight)]


class Multiplied:
    """A forward pre-hook that multiplies a layer's input, and so its output but for the bias."""

    def __init__(self, factor: float) -> None:
        """Multiply by `factor`."""
        self.divisor = 1 / factor  # as mup: where this is a whole number, a product is less exact

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Multiply the input, which is the first argument or the keyword `input`."""
        if args:
            return (args[0] / self.divisor, *args[1:]), kwargs
        return args, {**kwargs, "input": kwargs["input"] / self.divisor}


def set_multiplier(module: nn.Module, multiplier: float) -> None:
    """Set the total multiplier of a readout's logits, in place of any that was set before.

    Args:
        module: mup's readout, which then needs no base shapes, or a plain layer.
        multiplier: of the weight's part of the logits; the bias is not multiplied, as in mup.
    """
    if isinstance(module, mup.MuReadout):
        ratio = module.output_mult / multiplier
        module.width_mult = functools.partial(float, ratio)  # its forward divides by this
        return
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Multiplied):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    if multiplier != 1:
        module.register_forward_pre_hook(Multiplied(multiplier), with_kwargs=True)


def multiplier_of(module: nn.Module) -> float:
    """Return the multiplier of a readout's or a plain layer's logits, the width's part included.

    Raises:
        ModelError: mup's readout has no base shapes yet.
    """
    if isinstance(module, mup.MuReadout):
        if isinstance(module.width_mult, functools.partial) or hasattr(module.weight, "infshape"):
            return float(module.output_mult / module.width_mult())
        raise ModelError(
            "the readout's multiplier is unknown: call mup.set_base_shapes or telescope.apply first"
        )
    hooks = module._forward_pre_hooks.values()
    return math.prod(1 / hook.divisor for hook in hooks if isinstance(hook, Multiplied))
