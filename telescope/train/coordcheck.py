"""The coordinate check: does anything in the model grow or shrink with the width as it trains?

Under muP the size of every activation, of its change since initialisation and of every update is
the same at all widths. A few steps at a few widths show it: log2 of each size against log2 of the
width is a line, and its slope is 0. A wrong width rule, a wrong initialisation or a model file that
scales something by itself has a slope of a half or more.

A flat check is necessary, not sufficient: it cannot see how decay acts over a long run, nor depth.

The idea is that of arXiv 2203.03466 App. D.1. Readout and residual outputs
start at zero here, so nothing hidden moves on step 1: the check looks after steps 3, 10 and 20. At
a high learning rate or on random tokens even the right rule's logits shrink, so the
learning rate is the grid's lowest, constant, and the batches are real.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telescope.records import Point, Trial
from telescope.train.config import TrialConfig
from telescope.train.loop import Setup, set_up, take_step
from telescope.train.parametrization import Role, Tag, readouts

WIDTH_FACTORS = (1, 2, 4, 8)
"""Widths as multiples of the base width, whatever the ladder."""
STEPS = (3, 10, 20)
SEEDS = (0, 1, 2)
SHOWN_QUANTITIES = 24
"""A table or figure of more quantities than this shows the steepest of each kind alone."""
INNER = " (inner)"
"""Marks a readout inside a block, such as a router. Among equal experts its gradient is mostly
noise, which Adam's normalised steps turn into logits that shrink as 1/√width under the right rule
too (measured: -0.46 ± 0.12 with two experts); so only growth fails it."""
MAX_TOKENS = 2048
"""Tokens of a step, at most: enough to move, and cheap."""
THRESHOLD = 0.25
"""Largest slope that passes, up or down. Mistakes come in half powers of the width (a factor of
√r forgotten or applied twice), and a right model's slopes are near 0: a quarter lies half way."""
STANDARD_ERRORS = 2.0
"""How many standard errors beyond the threshold a slope must lie to fail. Dozens of slopes are
looked at, and narrow models are noisy: without this margin a right model fails now and then."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured: the full check of `telescope check`, or the short one before a run."""

    width_factors: tuple[int, ...] = WIDTH_FACTORS
    steps: tuple[int, ...] = STEPS
    seeds: tuple[int, ...] = SEEDS

    def widths(self, base_width: int) -> list[int]:
        """What is trained, narrow first."""
        return [factor * base_width for factor in self.width_factors]


SHORT = Extent(steps=(10,), seeds=(0, 1))
"""A third of the full check's cost. All widths are kept: a shorter lever makes slopes noisier."""


@dataclass(frozen=True)
class CoordCheck:
    """What was measured, and the verdict."""

    rule: str
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    point: Point
    """The setting that was trained: a low lr."""
    sizes: Mapping[str, Mapping[int, tuple[float, ...]]] = field(repr=False)
    """Quantity → step → geometric mean over seeds of its RMS, one per width; 0 is exactly 0."""
    slopes: Mapping[str, float | None]
    """Quantity → the slope of log2 RMS against log2 width, of the steps the one that is farthest
    beyond its standard errors from 0; None where nothing moved."""
    errors: Mapping[str, float | None]
    """Quantity → the standard error of that slope."""
    problems: Mapping[str, str]
    """Quantity → why it fails, in words, worst first; empty when the verdict is PASS."""
    threshold: float = THRESHOLD

    @property
    def passed(self) -> bool:
        """Whether every slope is flat."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """PASS or FAIL."""
        return "PASS" if self.passed else "FAIL"

    @property
    def steepest(self) -> tuple[str, float]:
        """The quantity with the slope farthest from 0, and that slope."""
        slopes = {name: slope for name, slope in self.slopes.items() if slope is not None}
        return max(slopes.items(), key=lambda item: abs(item[1]), default=("nothing", 0.0))

    def shown(self, limit: int = SHOWN_QUANTITIES) -> list[str]:
        """The quantities worth showing: all, or of more than `limit` the steepest of each kind.

        Of a kind are those whose names differ in digits alone, as 34 blocks do.
        """
        if len(self.slopes) <= limit:
            return list(self.slopes)
        steepest: dict[str, str] = {}
        for name, slope in self.slopes.items():
            kind = re.sub(r"\d+", "*", name)
            before = self.slopes[steepest[kind]] if kind in steepest else None
            if kind not in steepest or abs(slope or 0.0) > abs(before or 0.0):
                steepest[kind] = name
        return list(steepest.values())

    def as_dict(self) -> dict[str, Any]:
        """The keys of `telescope check --json`."""
        return {
            "verdict": self.verdict,
            "rule": self.rule,
            "widths": list(self.widths),
            "threshold": self.threshold,
            "slopes": dict(self.slopes),
            "errors": dict(self.errors),
            "problems": dict(self.problems),
            "steps": list(self.steps),
            "seeds": list(self.seeds),
            "point": dict(self.point),
            "sizes": {
                name: {str(step): [_or_none(v) for v in values] for step, values in by_step.items()}
                for name, by_step in self.sizes.items()
            },
        }


def _or_none(value: float) -> float | None:
    """A number that JSON can hold."""
    return value if math.isfinite(value) else None


def check_trials(config: TrialConfig, point: Point, extent: Extent) -> list[Trial]:
    """What the check trains, narrow widths first.

    Args:
        config: the sweep's training.
        point: the setting; a swept warm-up is left out, because the check has none.
        extent: which widths and seeds.
    """
    plain = Point.of({axis: value for axis, value in point.items() if axis != "warmup"})
    widths = extent.widths(config.base_width)
    return [Trial(width, plain, seed) for width in widths for seed in extent.seeds]


def check_config(config: TrialConfig, extent: Extent) -> TrialConfig:
    """The sweep's training as the check runs it: constant lr, small batches."""
    length = min(config.train.sequence_length, MAX_TOKENS)
    batch_size = max(1, min(config.train.batch_size, MAX_TOKENS // length))
    train = replace(
        config.train,
        steps=max(extent.steps),
        batch_size=batch_size,
        sequence_length=length,
        schedule="constant",
        warmup=0.0,
        evals=1,
    )
    measured = min(config.data.eval_tokens, train.tokens_per_step)
    data = replace(config.data, eval_tokens=measured)
    return replace(config, train=train, data=data)


def coordinate_check(
    config: TrialConfig,
    point: Point,
    extent: Extent = Extent(),
    on_width: Callable[[int], None] | None = None,
) -> CoordCheck:
    """Train a few steps at a few widths, and judge what grows or shrinks.

    Args:
        config: the sweep's training; its optimizer, decay and data are used as they are.
        point: the setting to train; its lr must be low, see above.
        extent: how much to measure.
        on_width: called with each width before it is trained.

    Raises:
        ModelError: the model file fails at one of the widths.
        DataError: the corpus is not the driver's.
    """
    trials, config = check_trials(config, point, extent), check_config(config, extent)
    torch.set_num_threads(config.threads)
    measured: dict[int, list[dict[int, dict[str, float]]]] = {}
    for trial in trials:
        if on_width and trial.width not in measured:
            on_width(trial.width)
        measured.setdefault(trial.width, []).append(_measure(config, trial, extent.steps))
    return judge(
        _by_quantity(measured, extent.steps),
        widths=tuple(measured),
        steps=extent.steps,
        seeds=extent.seeds,
        rule=config.optimizer.rule,
        point=trials[0].point,
    )


def _measure(
    config: TrialConfig, trial: Trial, steps: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Step → quantity → RMS of one width and seed."""
    setup = set_up(config, trial)
    before = _activations(setup)
    start = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    multipliers = _multipliers(setup.model, setup.tags)
    sizes: dict[int, dict[str, float]] = {}
    for step in range(max(steps)):
        take_step(setup.model, setup.optimizers, setup.batches, setup.train, step, setup.device)
        if step + 1 in steps:
            sizes[step + 1] = _activation_sizes(before, _activations(setup)) | _update_sizes(
                setup.model, start, setup.tags, multipliers
            )
    return sizes


@torch.no_grad()
def _activations(setup: Setup) -> dict[str, Tensor]:
    """Module → its output on the held-out batch, of every module that the check watches."""
    outputs: dict[str, Tensor] = {}
    setup.model.eval()
    with _recorded(setup.model, outputs):
        outputs["output"] = setup.model(setup.held_out[0])
    setup.model.train()
    return outputs


@contextmanager
def _recorded(model: nn.Module, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Keep the outputs of the watched modules while they run; of several calls the last."""

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None and tensor.numel():  # an expert may get no token
                outputs[name] = tensor.detach().clone()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in _watched(model) if name]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _watched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every embedding, every item of every ModuleList, every readout.

    A readout inside an item, a router, is named "… (inner)".
    """
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    items = {id(item) for modules in lists for item in modules}
    outlets = {id(module) for module, _ in readouts(model)}
    inside = {id(part) for m in model.modules() if id(m) in items for part in m.modules()}
    for name, module in model.named_modules():
        if id(module) in outlets & inside:
            yield f"{name}{INNER}", module
        elif isinstance(module, nn.Embedding) or id(module) in items | outlets:
            yield name, module


def _first_tensor(output: Any) -> Tensor | None:
    """The floating-point tensor that a module gave, alone or as the first of several."""
    values = output if isinstance(output, (tuple, list)) else [output]
    tensors = (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return next(tensors, None)


def _activation_sizes(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """RMS of every output, and of its change; a change only where the shape stays.

    An expert that other tokens are routed to has another shape: then there is nothing to compare.
    """
    sizes = {}
    for name, value in now.items():
        sizes[name] = _rms(value)
        if name in before and before[name].shape == value.shape:
            sizes[f"{name} change"] = _rms(value - before[name])
    return sizes


def _multipliers(model: nn.Module, tags: Mapping[str, Tag]) -> dict[str, float]:
    """Readout weight → the factor that its module puts on the logits."""
    return {
        name: module.output_mult / module.width_mult()
        for module, name in readouts(model)
        if tags[name].role is Role.READOUT
    }


@torch.no_grad()
def _update_sizes(
    model: nn.Module,
    start: Mapping[str, Tensor],
    tags: Mapping[str, Tag],
    multipliers: Mapping[str, float],
) -> dict[str, float]:
    """Role → RMS over its parameters of the size of all updates so far.

    A matrix's update counts by the most that it can change the RMS of an activation, √(in/out)
    times its spectral norm, whatever its rank: arXiv 2310.17813. All else counts by its RMS.
    """
    squares: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        tag, update = tags[name], parameter - start[name]
        if tag.role.is_hidden or tag.role is Role.READOUT:
            out, in_ = update.shape[-2:]
            norm = _spectral_norm(update.float()) * multipliers.get(name, 1.0)
            size = math.sqrt(in_ / out) * norm
        else:
            size = _rms(update)
        squares.setdefault(f"{tag.role} update", []).append(size**2)
    return {role: math.sqrt(float(np.mean(values))) for role, values in squares.items()}


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


def _by_quantity(
    measured: Mapping[int, Sequence[Mapping[int, Mapping[str, float]]]], steps: Sequence[int]
) -> dict[str, dict[int, list[list[float]]]]:
    """Quantity → step → its RMS per width and seed; what is not there every time is left out."""
    everywhere = [seed[step] for seeds in measured.values() for seed in seeds for step in steps]
    names = [name for name in everywhere[0] if all(name in sizes for sizes in everywhere)]
    return {
        name: {
            step: [[seed[step][name] for seed in seeds] for seeds in measured.values()]
            for step in steps
        }
        for name in names
    }


def judge(
    measured: Mapping[str, Mapping[int, Sequence[Sequence[float]]]],
    *,
    widths: tuple[int, ...],
    steps: tuple[int, ...],
    seeds: tuple[int, ...],
    rule: str,
    point: Point,
) -> CoordCheck:
    """Slopes and verdict from measured sizes; pure.

    Args:
        measured: quantity → step → RMS per width and seed.
        widths: rising.
        steps: after which it was measured.
        seeds: one run each.
        rule: the width rule, for the record.
        point: the setting, for the record.
    """
    slopes = {
        name: max((_slope(widths, by_step[step]) for step in steps), key=lambda s: s.certain)
        for name, by_step in measured.items()
    }
    problems = {
        name: slope.problem
        for name, slope in slopes.items()
        if slope.problem and not (INNER in name and (slope.value or 0.0) < 0)
    }
    if all(slope.value is None for slope in slopes.values()) and not problems:
        problems["output"] = "nothing moved"
    return CoordCheck(
        rule=rule,
        widths=widths,
        steps=steps,
        seeds=seeds,
        point=point,
        sizes={
            name: {step: tuple(map(_geometric_mean, by_step[step])) for step in steps}
            for name, by_step in measured.items()
        },
        slopes={name: slope.value for name, slope in slopes.items()},
        errors={name: slope.error for name, slope in slopes.items()},
        problems=dict(sorted(problems.items(), key=lambda item: -slopes[item[0]].certain)),
    )


@dataclass(frozen=True, slots=True)
class _Slope:
    """The slope of log2 size against log2 width at one step."""

    value: float | None
    """None where there is no line to fit."""
    error: float | None
    certain: float
    """How far from 0 it is at least, by its standard errors; infinite where sizes make no line."""
    problem: str
    """Why it fails; empty where it does not."""


def _slope(widths: Sequence[int], sizes: Sequence[Sequence[float]]) -> _Slope:
    """The slope of log2 size against log2 width, over all seeds.

    Args:
        widths: rising.
        sizes: per width, one per seed.
    """
    means = [_geometric_mean(values) for values in sizes]
    if not all(math.isfinite(mean) for mean in means):
        return _Slope(None, None, math.inf, "is not finite")
    if not any(means):
        return _Slope(None, None, -math.inf, "")
    if not all(means):
        still = ", ".join(str(w) for w, mean in zip(widths, means, strict=True) if not mean)
        return _Slope(None, None, math.inf, f"moves at some widths but not at {still}")
    x = np.repeat(np.log2(widths), [len(values) for values in sizes])
    y = np.log2(np.concatenate([np.asarray(values) for values in sizes]))
    centred = x - x.mean()
    value = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - value * centred
    freedom = max(len(x) - 2, 1)
    error = math.sqrt(float(residuals @ residuals) / freedom / float(centred @ centred))
    certain = abs(value) - STANDARD_ERRORS * error
    verb = "grows" if value > 0 else "shrinks"
    problem = f"{verb} with the width, slope {value:+.2f} ± {error:.2f}"
    return _Slope(value, error, certain, problem if certain > THRESHOLD else "")


def _geometric_mean(values: Sequence[float]) -> float:
    """Exactly 0 where one of them is; NaN where one of them is not finite."""
    if not all(math.isfinite(value) for value in values):
        return math.nan
    return math.exp(np.mean(np.log(values))) if all(values) else 0.0
