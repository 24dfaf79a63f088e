"""Models from a model file's text, at any width: loaded, checked, tagged, initialised."""

from __future__ import annotations

import inspect
import linecache
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from telescope.config import ModelConfig
from telescope.errors import ModelError, SpecError, TelescopeError
from telescope.rules.parametrization import initialise, set_multipliers, tag
from telescope.rules.scaling import Start, Tag, layer_biases, vector_start


@dataclass(frozen=True)
class TaggedModel:
    """A model with base shapes set, and the tag of each trained parameter."""

    module: nn.Module = field(repr=False)
    tags: dict[str, Tag]


def load_model_file(config: ModelConfig) -> ModuleType:
    """Execute a model file's text as a module whose file name carries its hash.

    Nothing is written to disk: tracebacks and `inspect.getsource` read the text from `linecache`.
    Each text is loaded once per process.

    Raises:
        ModelError: the file has an error, or defines no `build`.
    """
    name = f"telescope_model_{PurePath(config.name).stem}_{config.digest}"
    if name in sys.modules:
        return sys.modules[name]
    module, file = ModuleType(name), module_file(config)
    module.__file__ = file
    linecache.cache[file] = (len(config.text), None, config.text.splitlines(keepends=True), file)
    # Registered before it runs, because dataclasses and torch look up a class's module by name.
    sys.modules[name] = module
    try:
        with blamed_on(config):
            exec(compile(config.text, file, "exec"), module.__dict__)
        if not callable(getattr(module, "build", None)):
            raise ModelError(f"{config.name}: defines no function build(width, *, vocab_size, ...)")
    except ModelError:
        del sys.modules[name]
        raise
    return module


@contextmanager
def blamed_on(config: ModelConfig) -> Iterator[None]:
    """Turn any exception of a model file into a ModelError that names the file and the line."""
    try:
        yield
    except TelescopeError:
        raise
    except (Exception, SystemExit) as error:
        line, message = _last_line(error, module_file(config)), " ".join(str(error).split())
        if isinstance(error, SyntaxError):
            line, message = error.lineno, error.msg
        where = f"{config.name}:{line}" if line else config.name
        raise ModelError(f"{where}: {type(error).__name__}: {message}") from error


def module_file(config: ModelConfig) -> str:
    """Return a loaded model file's name in tracebacks."""
    return f"<{PurePath(config.name).stem}-{config.digest}.py>"


def _last_line(error: BaseException, filename: str) -> int | None:
    """Return the deepest line of the model file in an exception's traceback."""
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def check_keywords(config: ModelConfig) -> None:
    """Check that the model file's `build` takes the spec's keywords, and gets those it needs.

    Raises:
        SpecError: a keyword is unknown or missing; the message names it and those of `build`.
        ModelError: the file cannot be loaded.
    """
    parameters = inspect.signature(_build_function(config)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    taken = [name for name in parameters if name != "width"]
    for key in config.kwargs:
        if key not in taken:
            raise SpecError(
                f"model.{key}: {config.name} takes no such keyword; it takes {', '.join(taken)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in {"width", *config.kwargs}:
            raise SpecError(f"model.{key}: missing; {config.name} needs it to build a model")


def keyword_defaults(config: ModelConfig) -> dict[str, Any]:
    """Return the keywords of `build` that the spec leaves out, with their defaults."""
    parameters = inspect.signature(_build_function(config)).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and p.name not in {"width", *config.kwargs}
    }


def _build_function(config: ModelConfig) -> Callable[..., nn.Module]:
    build: Callable[..., nn.Module] = load_model_file(config).build
    return build


def _build(config: ModelConfig, width: int, device: str) -> nn.Module:
    build = _build_function(config)
    with blamed_on(config), torch.device(device):
        model = build(width, **config.kwargs)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{config.name}: build returned {type(model).__name__}, not a torch module"
        )
    return model


def build_meta(config: ModelConfig, *, width: int, base_width: int) -> TaggedModel:
    """Build the model's shapes and roles at `width` on the meta device, without memory or weights.

    Raises:
        ModelError: the file fails, or a parameter has no clear role.
    """
    return _tagged(config, _build(config, width, "meta"), width, base_width)


def _tagged(config: ModelConfig, model: nn.Module, width: int, base_width: int) -> TaggedModel:
    widths = (width, base_width, 2 * base_width)
    base, delta = (_build(config, w, "meta") for w in widths[1:])
    try:
        return TaggedModel(model, tag(model, base, delta, widths=widths))
    except ModelError as error:
        raise ModelError(f"{config.name}: {error}") from error


def build_model(
    config: ModelConfig,
    *,
    width: int,
    base_width: int,
    seed: int,
    optimizer: str,
    rule: str,
    device: str,
    init_scale: float = 1.0,
) -> TaggedModel:
    """Build the model at `width` on `device`, initialised and with its readout multipliers set.

    The global random states are seeded first: the file may draw its own parameters, and dropout
    draws from them during training.

    Raises:
        ModelError: the file fails, or a parameter has no clear role or is not initialised.
    """
    zeroed = ungiven_biases(config, base_width=base_width)
    torch.manual_seed(seed)
    with _other_draws(seed):
        # Tensors that a file makes from numpy arrays are on the CPU.
        model = _build(config, width, device).to(device)
    tagged = _tagged(config, model, width, base_width)
    initialise(tagged.module, tagged.tags, seed=seed, init_scale=init_scale, zeroed=zeroed)
    set_multipliers(tagged.module, optimizer=optimizer, rule=rule)
    return tagged


@contextmanager
def _other_draws(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators inside this context; model files use them too."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def ungiven_biases(config: ModelConfig, *, base_width: int) -> frozenset[str]:
    """Return the layers' biases that the model file does not set; they will start at zero.

    torch draws these biases at random. They are found by building the model at base width with two
    seeds, with memory that nothing writes filled with NaN.

    Raises:
        ModelError: the file fails, or does not initialise another vector or a frozen parameter.
    """
    return _starts(config, base_width).ungiven


def vector_starts(config: ModelConfig, *, base_width: int) -> Mapping[str, Start]:
    """Return the initialisation of every trained vector and scalar, by its name.

    Raises:
        ModelError: as `ungiven_biases`.
    """
    return _starts(config, base_width).vectors


@dataclass(frozen=True)
class _Starts:
    """The initialisation of the parameters that a model file itself sets."""

    ungiven: frozenset[str]
    vectors: Mapping[str, Start]


_STARTS: dict[tuple[Any, ...], _Starts] = {}
"""(Model file, its keywords, base width) → the starts, found once per process."""


def _starts(config: ModelConfig, base_width: int) -> _Starts:
    key = (config.name, config.digest, repr(sorted(config.kwargs.items())), base_width)
    if key not in _STARTS:
        _STARTS[key] = _find_starts(config, base_width)
    return _STARTS[key]


def _find_starts(config: ModelConfig, base_width: int) -> _Starts:
    first, second = (_marked_start(config, base_width, seed) for seed in (0, 1))
    biases = first.biases
    for name, value in first.own.items():
        if name not in biases and value.is_floating_point() and value.isnan().any():
            raise ModelError(
                f"{config.name}: {name}: has no start: vectors, scalars and frozen parameters keep "
                "what build gives them, and here nothing was written (torch.empty), or NaN; give "
                "it, as torch.ones or torch.zeros"
            )
    seeds_itself = torch.equal(first.random_state, second.random_state)
    ungiven = frozenset(
        name
        for name in biases
        if not torch.equal(first.own[name], second.own[name])
        or (seeds_itself and len(set(first.own[name].tolist())) > 1)
    )
    vectors = {
        name: Start.ZEROS if name in ungiven else vector_start(_one_number(first.own[name]))
        for name in first.own.keys() & first.trained
    }
    return _Starts(ungiven, vectors)


def _one_number(values: Tensor) -> float | None:
    """The number that a vector or a scalar holds everywhere; None where there are several."""
    numbers = set(values.flatten().tolist())
    return numbers.pop() if len(numbers) == 1 else None


@dataclass(frozen=True)
class _MarkedStart:
    """The parameters that a model file itself initialises; its matrices are given up at once."""

    biases: Sequence[str]
    """Names of the layers' biases, see `layer_biases`."""
    own: Mapping[str, Tensor]
    """Name → vectors, scalars and frozen parameters."""
    trained: frozenset[str]
    """Names of all parameters that are not frozen."""
    random_state: Tensor
    """The generator's state after the model was built."""


def _marked_start(config: ModelConfig, width: int, seed: int) -> _MarkedStart:
    """Build on the CPU, with NaN in uninitialised memory; torch's random state is restored."""
    is_strict = torch.are_deterministic_algorithms_enabled()
    is_lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]), _other_draws(seed):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN
        try:
            model = _build(config, width, "cpu")
        finally:
            torch.use_deterministic_algorithms(is_strict, warn_only=is_lenient)
        state = torch.get_rng_state()
    own = {n: p.detach() for n, p in model.named_parameters() if p.ndim < 2 or not p.requires_grad}
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    return _MarkedStart(layer_biases(model), own, trained, state)


@contextmanager
def without_values() -> Iterator[None]:
    """Give tensors of any device shapes without values inside this context, as on meta.

    This is for models that use the device's name: autocast and others do not know "meta".
    """
    # Documented (docs.pytorch.org, "Fake tensor"), but without a public name.
    from torch._subclasses import fake_tensor

    log = logging.getLogger(fake_tensor.__name__)  # we report a model's error ourselves
    is_off, log.disabled = log.disabled, True
    try:
        # torch's FLOP counter does not know a CPU's fused attention, but does know matrix products.
        with sdpa_kernel(SDPBackend.MATH), fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except ModelError as error:
        need_values = (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
        )
        if not isinstance(error.__cause__, need_values):
            raise
        raise ModelError(
            f"{error} (shapes are counted on tensors without values, so forward must not ask for "
            "one, as .item(), nonzero() and a branch on a tensor do)"
        ) from error
    finally:
        log.disabled = is_off


def build_without_values(
    config: ModelConfig, device: str, *, width: int, base_width: int
) -> TaggedModel:
    """Build as `build_meta` does, but on a real device's name, inside `without_values`."""
    return _tagged(config, _build(config, width, device), width, base_width)


def checked_logits(
    config: ModelConfig,
    model: Any,
    *,
    sequence_length: int,
    vocab_size: int,
    device: str = "meta",
) -> Tensor:
    """Run the model without values: tokens (1, T) must give logits (1, T, vocab_size).

    Args:
        config: the model's config, for messages.
        model: a model from `build_meta` or `build_without_values`.
        sequence_length: T.
        vocab_size: number of logits per token.
        device: the model's device.

    Raises:
        ModelError: the forward pass fails or returns anything else.
    """
    tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device=device)
    with blamed_on(config):
        logits = model(tokens)
    wanted = (1, sequence_length, vocab_size)
    if not isinstance(logits, Tensor):
        raise ModelError(f"{config.name}: {_no_tensor(logits, wanted)}")
    shape = tuple(logits.shape)
    if shape != wanted:
        raise ModelError(
            f"{config.name}: forward gave shape {shape} for tokens (1, {sequence_length}), must be "
            f"(batch, sequence, vocab_size) = {wanted}"
        )
    if not (logits.is_floating_point() and logits.requires_grad):
        raise ModelError(
            f"{config.name}: forward gave logits of {logits.dtype} that lead back to no parameter: "
            "it must not detach, cast to integers or run under torch.no_grad"
        )
    return logits


def _no_tensor(value: Any, wanted: tuple[int, ...]) -> str:
    """Describe a forward pass's output that is not a tensor, and say what to return instead."""
    items: dict[Any, Any] = {}
    if isinstance(value, Mapping):
        items = dict(value)
    elif isinstance(value, (tuple, list)):
        items = dict(enumerate(value))
    parts = ", ".join(
        f"{key!r}: {f'shape {tuple(v.shape)}' if isinstance(v, Tensor) else type(v).__name__}"
        for key, v in items.items()
    )
    fitting = [k for k, v in items.items() if isinstance(v, Tensor) and tuple(v.shape) == wanted]
    advice = f"; return its item {fitting[0]!r}" if fitting else ""
    if hasattr(value, "logits"):
        advice = "; return its .logits"
    kind = "None" if value is None else f"a {type(value).__name__}"
    return (
        f"forward gave {kind}{f' ({parts})' if parts else ''}, must be the logits alone, one "
        f"tensor (batch, sequence, vocab_size) = {wanted}{advice}"
    )
