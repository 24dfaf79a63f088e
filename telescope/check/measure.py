"""What the coordinate check measures in one training: sizes that could go with the width.

A sum hides what shrinks in it. So of a block its input and what it adds are looked at too, and of
the matrices that end a branch their output and the gradient that comes back to it, which feels
every factor between there and the loss; and of attention what goes into its softmax, the logits.

Nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telescope.check.softmax import SoftmaxInputs
from telescope.check.verdict import Kind, Quantity
from telescope.config import ModelConfig, TrialConfig
from telescope.errors import ModelError
from telescope.records import Trial
from telescope.rules.parametrization import readouts
from telescope.rules.scaling import Role, Tag
from telescope.train.loop import Setup, set_up, take_step
from telescope.train.model import blamed_on, module_file

DRAWN = (Role.HIDDEN, Role.EMBEDDING, Role.TIED)
"""Roles that start at random; the others start at zero, or as the model file has them."""


@dataclass(frozen=True)
class Measured:
    """One training, measured."""

    sizes: Mapping[int, Mapping[Quantity, float]]
    """Step → quantity → size."""
    unseen_heads: Mapping[str, int]
    """Module → the size of its heads, where no softmax could be seen."""


def measure_sizes(config: TrialConfig, trial: Trial, steps: Sequence[int]) -> Measured:
    """The sizes of one width and seed.

    Args:
        config: the training, as `coordcheck.check_config` gives it.
        trial: the width, the setting and the seed.
        steps: after which to measure; the last one ends the training.

    Raises:
        ModelError: the model file fails at this width.
        DataError: the corpus is not the driver's.
    """
    setup = set_up(config, trial)
    model, watched = setup.model, _watched(setup.model, setup.tags, config.model, trial.width)
    multipliers = _multipliers(model, setup.tags)
    trained = {name: p for name, p in model.named_parameters() if name in setup.tags}
    start = {name: p.detach().clone() for name, p in trained.items()}
    drawn = {name: value for name, value in start.items() if setup.tags[name].role in DRAWN}
    at_start = _parameter_sizes(drawn, setup.tags, multipliers, Kind.START)
    file = module_file(config.model)
    with _blamed(config, trial.width):
        before, _, unseen_heads = _activations(setup, watched, file)
    sizes: dict[int, dict[Quantity, float]] = {}
    for step in range(max(steps)):
        is_measured = step + 1 in steps
        with _blamed(config, trial.width), _gradients(watched if is_measured else ()) as gradients:
            take_step(model, setup.optimizers, setup.batches, setup.train, step, setup.device)
        if not is_measured:
            continue
        with _blamed(config, trial.width):
            now, sizes[step + 1], _ = _activations(setup, watched, file)
        updates = {name: p.detach() - start[name] for name, p in trained.items()}
        sizes[step + 1] |= {
            **_changes(before, now),
            **{of: value * trial.width for of, value in gradients.items()},
            **_parameter_sizes(updates, setup.tags, multipliers, Kind.UPDATE),
            **at_start,
        }
    return Measured(sizes, unseen_heads)


def unwatched(tags: Mapping[str, Tag], quantities: Collection[Quantity]) -> tuple[str, ...]:
    """The matrices and tables that are in no module with a quantity of its own."""
    watched = {q.of for q in quantities if q.kind is Kind.OUTPUT and not q.is_softmax}

    def is_watched(name: str) -> bool:
        parts = name.split(".")[:-1]
        return any(".".join(parts[: i + 1]) in watched for i in range(len(parts)))

    return tuple(n for n, tag in tags.items() if len(tag.shape) > 1 and not is_watched(n))


@contextmanager
def _blamed(config: TrialConfig, width: int) -> Iterator[None]:
    """Turn what the model file raises as it runs into a line that says where."""
    try:
        with blamed_on(config.model):
            yield
    except ModelError as error:
        raise ModelError(
            f"{error} (in the coordinate check, at width {width}; `run --no-check` leaves it out)"
        ) from error


@dataclass(frozen=True)
class _Watched:
    """A module that the check looks at."""

    output: Quantity
    module: nn.Module
    width: int
    """The model's."""
    is_block: bool
    """Whether it has hidden matrices and is not the end of a branch: then what it adds to its input
    says something."""
    ends_branch: bool

    def has(self, kind: Kind) -> Quantity:
        """Another quantity of it."""
        return replace(self.output, kind=kind)


def _watched(
    model: nn.Module, tags: Mapping[str, Tag], config: ModelConfig, width: int
) -> tuple[_Watched, ...]:
    """The model's parts, the items of every container, and what looks up, reads out, ends a branch.

    A readout onto something else than the vocabulary, a router, is an inner one.
    """
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    holders = (m for m in model.modules() if m is model or isinstance(m, containers))
    parts = {id(part) for holder in holders for part in holder.children()}
    outlets = {id(module) for module, _ in readouts(model)}
    hidden = {
        id(p) for name, p in model.named_parameters() if name in tags and tags[name].role.is_hidden
    }
    watched = []
    for name, module in model.named_modules():
        is_readout = id(module) in outlets
        ends_branch = bool(getattr(module, "residual_output", False))
        if name and (
            id(module) in parts or is_readout or ends_branch or isinstance(module, nn.Embedding)
        ):
            is_inner = is_readout and len(module.weight) != config.kwargs["vocab_size"]
            is_block = not ends_branch and any(id(p) in hidden for p in module.parameters())
            output = Quantity(name, is_inner=is_inner)
            watched.append(_Watched(output, module, width, is_block, ends_branch))
    return tuple(watched)


@torch.no_grad()
def _activations(
    setup: Setup, watched: Sequence[_Watched], file: str
) -> tuple[dict[Quantity, Tensor], dict[Quantity, float], dict[str, int]]:
    """Outputs on the held-out batch, of the watched modules and of the model; and all sizes.

    What goes into softmax counts as an output. The sizes are those of every output, of every input,
    and of what each block adds to its input. Third come the heads whose softmax is unseen.
    """
    outputs: dict[Quantity, Tensor] = {}
    inputs: dict[Quantity, float] = {}
    added: dict[Quantity, float] = {}

    def see(part: _Watched, given: Tensor | None, output: Tensor) -> None:
        outputs[part.output] = output.clone()
        if given is not None:
            inputs[part.has(Kind.INPUT)] = _rms(given)
            if part.is_block and given.shape == output.shape:
                added[part.has(Kind.ADDED)] = _rms(output - given)

    setup.model.eval()
    softmaxes = SoftmaxInputs(setup.model, file)
    with _seen(watched, see):
        try:
            with softmaxes.watching():
                outputs[Quantity("")] = setup.model(setup.held_out[0])
        except (
            Exception
        ):  # a compiled kernel may not take being watched; the model's own come again
            outputs[Quantity("")] = setup.model(setup.held_out[0])
    setup.model.train()
    outputs |= softmaxes.logits
    sizes = {of: _rms(output) for of, output in outputs.items()}
    # An input that is another module's output as it was says nothing new.
    passed_on = set(sizes.values())
    new = {of: size for of, size in inputs.items() if size not in passed_on}
    return outputs, sizes | new | added, softmaxes.unseen_heads


@contextmanager
def _gradients(watched: Sequence[_Watched]) -> Iterator[dict[Quantity, float]]:
    """The size of the loss's gradient where blocks and branches end, once it has been taken.

    Elsewhere it need not go with one over the width: at logits it is the same at all widths.
    """
    sizes: dict[Quantity, float] = {}

    def see(part: _Watched, given: Tensor | None, output: Tensor) -> None:
        is_stream = part.is_block and given is not None and given.shape == output.shape
        if output.requires_grad and (is_stream or part.ends_branch):
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: sizes.update({part.has(Kind.GRADIENT): _rms(gradient)})
            )

    with _seen(watched, see):
        yield sizes


@contextmanager
def _seen(
    watched: Sequence[_Watched], see: Callable[[_Watched, Tensor | None, Tensor], None]
) -> Iterator[None]:
    """Show `see` what each watched module is given and gives, whenever it runs."""

    def hook_of(part: _Watched) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            given, output = _main((args, kwargs), part.width), _main(result, part.width)
            if output is not None:
                see(part, given, output)

        return hook

    handles = [
        part.module.register_forward_hook(hook_of(part), with_kwargs=True) for part in watched
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _main(value: Any, width: int) -> Tensor | None:
    """Of what a module is given or gives the first tensor as wide as the model, else the first."""
    tensors = list(_tensors(value))
    wide = (tensor for tensor in tensors if tensor.shape[-1:] == (width,))
    return next(wide, tensors[0] if tensors else None)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in lists, tuples and tables, in order, none empty."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():  # an expert may get no token
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _changes(
    before: Mapping[Quantity, Tensor], now: Mapping[Quantity, Tensor]
) -> dict[Quantity, float]:
    """The size of every output's change; only where the shape stays.

    An expert that other tokens are routed to has another shape: then there is nothing to compare.
    """
    return {
        replace(output, kind=Kind.CHANGE): _rms(value - before[output])
        for output, value in now.items()
        if output in before and before[output].shape == value.shape
    }


def _multipliers(model: nn.Module, tags: Mapping[str, Tag]) -> dict[str, float]:
    """Readout weight → the factor that its module puts on the logits."""
    return {
        name: module.output_mult / module.width_mult()
        for module, name in readouts(model)
        if name in tags and tags[name].role is Role.READOUT
    }


def _parameter_sizes(
    values: Mapping[str, Tensor],
    tags: Mapping[str, Tag],
    multipliers: Mapping[str, float],
    kind: Kind,
) -> dict[Quantity, float]:
    """Role → RMS over its parameters of their size, or of all updates so far.

    A matrix counts by the most that it can do to the RMS of an activation, √(in/out) times its
    spectral norm, whatever its rank: arXiv 2310.17813. All else counts by its RMS.

    Args:
        values: name → the parameter, or its update.
        tags: name → tag.
        multipliers: see `_multipliers`.
        kind: of the quantities.
    """
    squares: dict[Role, list[float]] = {}
    for name, value in values.items():
        role = tags[name].role
        if role.is_hidden or role is Role.READOUT:
            out, in_ = value.shape[-2:]
            norm = _spectral_norm(value.float()) * multipliers.get(name, 1.0)
            size = math.sqrt(in_ / out) * norm
        else:
            size = _rms(value)
        squares.setdefault(role, []).append(size**2)
    return {
        Quantity(role, kind): math.sqrt(float(np.mean(sizes))) for role, sizes in squares.items()
    }


def _spectral_norm(matrices: Tensor) -> float:
    """Largest singular value, RMS over a stack; by a randomised method, a few percent off."""
    if not matrices.any():
        return 0.0
    if not matrices.isfinite().all():
        return math.nan
    values = torch.svd_lowrank(matrices, q=min(6, *matrices.shape[-2:]), niter=4)[1]
    return _rms(values[..., 0])


def _rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item()
