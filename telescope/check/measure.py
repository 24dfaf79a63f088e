"""The coordinate check's measurements in one training run: sizes that could depend on the width.

A sum hides a term that shrinks. So the check also measures each block's input and the term that the
block adds to it; the output of each matrix that ends a branch, and the gradient there, which every
factor between it and the loss affects; and the inputs of attention's softmax, the logits.

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

DRAWN = (Role.HIDDEN, Role.LATENT, Role.INPUT, Role.EMBEDDING, Role.TIED)
"""Roles initialised at random; the others start at zero or as the model file has them."""


@dataclass(frozen=True)
class Measured:
    """The measurements of one training run."""

    sizes: Mapping[int, Mapping[Quantity, float]]
    """Step → quantity → size."""
    unseen_heads: Mapping[str, int]
    """Module → the size of its heads, for modules whose softmax could not be observed."""


def measure_sizes(config: TrialConfig, trial: Trial, steps: Sequence[int]) -> Measured:
    """Train at one width and seed, and measure the sizes.

    Args:
        config: the training, as `coordcheck.check_config` returns it.
        trial: the width, the setting and the seed.
        steps: the steps after which to measure; training ends with the last.

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
    """Return the matrices and tables that lie in no measured module."""
    watched = {q.of for q in quantities if q.kind is Kind.OUTPUT and not q.is_softmax}

    def is_watched(name: str) -> bool:
        parts = name.split(".")[:-1]
        return any(".".join(parts[: i + 1]) in watched for i in range(len(parts)))

    return tuple(n for n, tag in tags.items() if len(tag.shape) > 1 and not is_watched(n))


@contextmanager
def _blamed(config: TrialConfig, width: int) -> Iterator[None]:
    """Turn an exception of the model file into a one-line error that says where it happened."""
    try:
        with blamed_on(config.model):
            yield
    except ModelError as error:
        raise ModelError(
            f"{error} (in the coordinate check, at width {width}; `run --no-check` leaves it out)"
        ) from error


@dataclass(frozen=True)
class _Watched:
    """A module that the check measures."""

    output: Quantity
    module: nn.Module
    width: int
    """The model's width."""
    is_block: bool
    """True if it has hidden matrices and does not end a branch; then the difference between its
    output and input is worth measuring."""
    ends_branch: bool

    def has(self, kind: Kind) -> Quantity:
        """Return the quantity of another kind for this module."""
        return replace(self.output, kind=kind)


def _watched(
    model: nn.Module, tags: Mapping[str, Tag], config: ModelConfig, width: int
) -> tuple[_Watched, ...]:
    """List the modules to measure.

    These are the model's parts, the items of every container, embeddings, readouts, modules that
    end a branch, and those of latent matrices. A readout that is not onto the vocabulary, such as a
    router, is inner, and so is a latent matrix: where it reads the width its start rightly shrinks.
    """
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    holders = (m for m in model.modules() if m is model or isinstance(m, containers))
    parts = {id(part) for holder in holders for part in holder.children()}
    outlets = {id(module) for module, _ in readouts(model)}
    roles = {id(p): tags[name].role for name, p in model.named_parameters() if name in tags}
    watched = []
    for name, module in model.named_modules():
        is_readout = id(module) in outlets
        ends_branch = bool(getattr(module, "residual_output", False))
        own = {roles.get(id(p)) for p in module.parameters(recurse=False)}
        is_latent = Role.LATENT in own
        is_watched = is_readout or ends_branch or is_latent or isinstance(module, nn.Embedding)
        if name and (id(module) in parts or is_watched):
            is_inner = is_latent or (
                is_readout and len(module.weight) != config.kwargs["vocab_size"]
            )
            held = (roles.get(id(p)) for p in module.parameters())
            is_block = not ends_branch and any(role and role.is_hidden for role in held)
            output = Quantity(name, is_inner=is_inner)
            watched.append(_Watched(output, module, width, is_block, ends_branch))
    return tuple(watched)


@torch.no_grad()
def _activations(
    setup: Setup, watched: Sequence[_Watched], file: str
) -> tuple[dict[Quantity, Tensor], dict[Quantity, float], dict[str, int]]:
    """Run the held-out batch and measure the watched modules and the model.

    Returns:
        The outputs, among them the inputs of every softmax; the sizes of all outputs, of all
        inputs, and of the term that each block adds to its input; and the heads whose softmax was
        not observed.
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
        except Exception:
            # A compiled kernel may fail under observation. Errors of the model itself recur here.
            outputs[Quantity("")] = setup.model(setup.held_out[0])
    setup.model.train()
    outputs |= softmaxes.logits
    sizes = {of: _rms(output) for of, output in outputs.items()}
    # An input that is another module's unchanged output says nothing new.
    passed_on = set(sizes.values())
    new = {of: size for of, size in inputs.items() if size not in passed_on}
    return outputs, sizes | new | added, softmaxes.unseen_heads


@contextmanager
def _gradients(watched: Sequence[_Watched]) -> Iterator[dict[Quantity, float]]:
    """Collect the gradient's sizes at the ends of blocks and branches during a backward pass.

    Elsewhere a gradient need not shrink as 1/width: at the logits it is the same at all widths.
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
    """Call `see` with the main input and output of each watched module, whenever it runs."""

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
    """Return the first tensor in `value` that is as wide as the model, else its first tensor."""
    tensors = list(_tensors(value))
    wide = (tensor for tensor in tensors if tensor.shape[-1:] == (width,))
    return next(wide, tensors[0] if tensors else None)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the non-empty floating-point tensors in lists, tuples and tables, in order."""
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
    """Return the size of every output's change, where its shape is unchanged.

    An expert's output has another shape when other tokens are routed to it; then there is nothing
    to compare.
    """
    return {
        replace(output, kind=Kind.CHANGE): _rms(value - before[output])
        for output, value in now.items()
        if output in before and before[output].shape == value.shape
    }


def _multipliers(model: nn.Module, tags: Mapping[str, Tag]) -> dict[str, float]:
    """Map each readout's weight to the factor by which its module multiplies the logits."""
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
    """Return for each role the RMS of its parameters' sizes, or of the sizes of their updates.

    Stacks of matrices count by themselves, so that the others of their role cannot hide them.

    The size of a matrix is the most by which it can multiply the RMS of an activation: √(in/out)
    times its spectral norm, for any rank (arXiv 2310.17813). The size of anything else is its RMS.

    Args:
        values: name → the parameter, or its update since the start.
        tags: name → tag.
        multipliers: see `_multipliers`.
        kind: the kind of the quantities.
    """
    squares: dict[str, list[float]] = {}
    for name, value in values.items():
        role = tags[name].role
        if role.is_hidden or role is Role.READOUT:
            out, in_ = value.shape[-2:]
            norm = _spectral_norm(value.float()) * multipliers.get(name, 1.0)
            size = math.sqrt(in_ / out) * norm
        else:
            size = _rms(value)
        of = f"{role} stack" if role.is_hidden and value.ndim > 2 else role
        squares.setdefault(of, []).append(size**2)
    return {Quantity(of, kind): math.sqrt(float(np.mean(sizes))) for of, sizes in squares.items()}


def _spectral_norm(matrices: Tensor) -> float:
    """Estimate the largest singular value (RMS over a stack), to a few per cent."""
    if not matrices.any():
        return 0.0
    if not matrices.isfinite().all():
        return math.nan
    values = torch.svd_lowrank(matrices, q=min(6, *matrices.shape[-2:]), niter=4)[1]
    return _rms(values[..., 0])


def _rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item()
