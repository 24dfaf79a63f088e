"""From a model file's text to a model at any width: loaded, checked, tagged, initialised."""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from telescope.errors import ModelError, SpecError, TelescopeError
from telescope.train.config import ModelConfig
from telescope.train.parametrization import initialise, set_multipliers, tag
from telescope.train.rules import Tag


@dataclass(frozen=True)
class TaggedModel:
    """A model with base shapes set, and what each parameter is to the width rules."""

    module: nn.Module = field(repr=False)
    tags: dict[str, Tag]


def load_model_file(config: ModelConfig) -> ModuleType:
    """Execute a model file's text as a module whose file name carries its hash.

    Nothing is written to disk: the text is handed to `linecache`, which tracebacks and
    `inspect.getsource` read. Loaded once per process and text.

    Raises:
        ModelError: the file has an error, or defines no `build`.
    """
    name = f"telescope_model_{PurePath(config.name).stem}_{config.digest}"
    if name in sys.modules:
        return sys.modules[name]
    module, file = ModuleType(name), _module_file(config)
    module.__file__ = file
    linecache.cache[file] = (len(config.text), None, config.text.splitlines(keepends=True), file)
    # Registered before it runs: dataclasses and torch look a class's module up by name.
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
    """Turn whatever a model file raises into a ModelError that names the file and the line."""
    try:
        yield
    except TelescopeError:
        raise
    except (Exception, SystemExit) as error:
        line, message = _last_line(error, _module_file(config)), " ".join(str(error).split())
        if isinstance(error, SyntaxError):
            line, message = error.lineno, error.msg
        where = f"{config.name}:{line}" if line else config.name
        raise ModelError(f"{where}: {type(error).__name__}: {message}") from error


def _module_file(config: ModelConfig) -> str:
    """The file name that a loaded model file goes by in tracebacks."""
    return f"<{PurePath(config.name).stem}-{config.digest}.py>"


def _last_line(error: BaseException, filename: str) -> int | None:
    """The deepest line of the model file in an exception's traceback."""
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def check_keywords(config: ModelConfig) -> None:
    """Check that the model file's `build` takes the spec's keywords, and gets those it needs.

    Raises:
        SpecError: naming the keyword and those that `build` takes.
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
    """The keywords of `build` that the spec leaves out, with their defaults."""
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
    """The model's shapes and roles at `width`: on the meta device, no memory, no weights.

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
    """The model at `width`, initialised and with its readout multipliers set, on `device`.

    Raises:
        ModelError: the file fails, or a parameter has no clear role.
    """
    tagged = _tagged(config, _build(config, width, device), width, base_width)
    initialise(tagged.module, tagged.tags, seed=seed, init_scale=init_scale)
    set_multipliers(tagged.module, tagged.tags, optimizer=optimizer, rule=rule)
    return tagged


def checked_logits(
    config: ModelConfig, model: Any, *, sequence_length: int, vocab_size: int
) -> Tensor:
    """Run the model on the meta device: tokens (1, T) must give logits (1, T, vocab_size).

    Raises:
        ModelError: the forward pass fails or gives another shape.
    """
    tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device="meta")
    try:
        with blamed_on(config):
            logits = model(tokens)
    except ModelError as error:
        hint = "shapes are checked on the meta device, where tensors have no values"
        raise ModelError(f"{error} ({hint})") from error
    shape, wanted = tuple(getattr(logits, "shape", ())), (1, sequence_length, vocab_size)
    if shape != wanted:
        raise ModelError(
            f"{config.name}: forward gave shape {shape} for tokens (1, {sequence_length}), must be "
            f"(batch, sequence, vocab_size) = {wanted}"
        )
    assert isinstance(logits, Tensor)
    return logits
