"""The coordinate check: does anything in the model grow or shrink with the width as it trains?

Under muP the size of every activation, of its change since initialisation, of every matrix at the
start and of every update is the same at all widths, and a gradient is as much smaller as the width
is larger. A few steps at a few widths show it: log2 of each size against log2 of the width is a
line, and its slope is 0. A wrong width rule, a wrong initialisation or a model file that scales
something by itself has a slope of a half or more.

A sum hides what shrinks in it. So of a block its input and what it adds are looked at too, and of
the matrices that end a branch their output and the gradient that comes back to it, which feels
every factor between there and the loss.

A flat check is necessary, not sufficient: it cannot see how decay or AdamW's eps act over a long
run, nor depth.

The idea is that of arXiv 2203.03466 App. D.1. Readout and residual outputs
start at zero here, so nothing hidden moves on step 1: the check looks after steps 3, 10 and 20. At
a high learning rate or on random tokens even the right rule's logits shrink, so the learning rate
is low and constant, and the batches are real.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from telescope.errors import ModelError
from telescope.records import Point, Trial
from telescope.train.config import ModelConfig, TrialConfig
from telescope.train.loop import Setup, set_up, take_step
from telescope.train.model import blamed_on, build_meta
from telescope.train.parametrization import readouts
from telescope.train.rules import Role, Tag

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
"""A slope fails when it lies this many standard errors beyond the threshold, and is flat this many
within; between them it is uncertain. Dozens of slopes are looked at, and narrow models are noisy:
without this margin a right model fails now and then (measured: tied, AdamW, +0.32 ± 0.10 on a
gradient). Where one is uncertain, as many seeds again are trained; what then still is, is said."""
CLEAR_ERRORS = 5.0
"""What lies this many standard errors beyond the threshold fails without more seeds. Two seeds make
a poor estimate of the error: at two errors a right model's -0.57 ± 0.10 fails (tied, AdamW), which
four more seeds show to be -0.2."""
CHECK_EPS = 1e-20
"""AdamW's eps in the check, at most. Readouts start at zero, so in the first steps every other
gradient is a multiple of lr / width, far below what it is later. An eps that a real run never feels
would then damp the wide models' updates more than the narrow ones' and look like a wrong rule
(measured: 1e-8 gives the hidden update a slope of -0.58 at lr 1e-4). Next to no eps leaves Adam's
step the sign that the rule is about."""
DRAWN = (Role.HIDDEN, Role.EMBEDDING, Role.TIED)
"""Roles that start at random; the others start as zeros or ones."""
MOVES = ("change", "update")
"""Kinds of quantity, by the last word of their names, that are 0 when nothing has been trained."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured: the full check of `telescope check`, or the short one before a run."""

    width_factors: tuple[int, ...] = WIDTH_FACTORS
    steps: tuple[int, ...] = STEPS
    seeds: tuple[int, ...] = SEEDS

    def widths(self, base_width: int) -> list[int]:
        """What is trained, narrow first."""
        return [factor * base_width for factor in self.width_factors]


SHORT = Extent(steps=(3, 10), seeds=(0, 1))
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
    """Quantity → step → geometric mean over seeds of its size, one per width; 0 is exactly 0."""
    slopes: Mapping[str, float | None]
    """Quantity → the slope of log2 size against log2 width, of the steps the one that is farthest
    beyond its standard errors from 0; None where nothing moved."""
    errors: Mapping[str, float | None]
    """Quantity → the standard error of that slope."""
    slope_steps: Mapping[str, int]
    """Quantity → after which step it has that slope."""
    problems: Mapping[str, str]
    """Quantity → why it fails, in words, worst first; empty when the verdict is PASS."""
    uncertain: tuple[str, ...]
    """Quantities on neither side of the threshold by their standard errors."""
    unwatched: tuple[str, ...] = ()
    """Matrices in no module that the check could look at."""
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
            "slope_steps": dict(self.slope_steps),
            "problems": dict(self.problems),
            "uncertain": list(self.uncertain),
            "unwatched": list(self.unwatched),
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
    """The sweep's training as the check runs it: constant lr, small batches, next to no eps."""
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
        compile=False,  # what is measured inside the model is measured by hooks
    )
    measured = min(config.data.eval_tokens, train.tokens_per_step)
    data = replace(config.data, eval_tokens=measured)
    optimizer = replace(config.optimizer, eps=min(config.optimizer.eps, CHECK_EPS))
    return replace(config, train=train, data=data, optimizer=optimizer)


def coordinate_check(config: TrialConfig, point: Point, extent: Extent = Extent()) -> CoordCheck:
    """Train a few steps at a few widths, and judge what grows or shrinks.

    Where that is not certain, as many seeds again are trained.

    Args:
        config: the sweep's training; its decay and data are used as they are.
        point: the setting to train; its lr must be low, see above.
        extent: how much to measure.

    Raises:
        ModelError: the model file fails at one of the widths.
        DataError: the corpus is not the driver's.
    """
    config = check_config(config, extent)
    torch.set_num_threads(config.threads)
    tags = build_meta(config.model, width=config.base_width, base_width=config.base_width).tags
    measured: dict[int, list[dict[int, dict[str, float]]]] = {}

    def measure(extent: Extent) -> CoordCheck:
        for trial in check_trials(config, point, extent):
            measured.setdefault(trial.width, []).append(_measure(config, trial, extent.steps))
        quantities = _by_quantity(measured, extent.steps)
        check = judge(
            quantities,
            widths=tuple(measured),
            steps=extent.steps,
            seeds=extent.seeds,
            rule=config.optimizer.rule,
            point=point,
        )
        return replace(check, unwatched=_unwatched(tags, quantities))

    check = measure(extent)
    if _is_clear(check):
        return check
    more = tuple(max(extent.seeds) + 1 + i for i in range(len(extent.seeds)))
    return replace(measure(replace(extent, seeds=more)), seeds=extent.seeds + more)


def _is_clear(check: CoordCheck) -> bool:
    """Whether more seeds could not change the verdict: all is flat, or something is far from it."""
    if check.passed:
        return not check.uncertain
    lines = [(check.slopes[name], check.errors[name]) for name in check.problems]
    return any(
        value is None or error is None or abs(value) - CLEAR_ERRORS * error > check.threshold
        for value, error in lines
    )


def _unwatched(tags: Mapping[str, Tag], quantities: Collection[str]) -> tuple[str, ...]:
    """The matrices and tables that are in no module with a quantity of its own."""
    watched = {quantity.removesuffix(INNER) for quantity in quantities}

    def is_watched(name: str) -> bool:
        parts = name.split(".")[:-1]
        return any(".".join(parts[: i + 1]) in watched for i in range(len(parts)))

    return tuple(n for n, tag in tags.items() if len(tag.shape) > 1 and not is_watched(n))


def _measure(
    config: TrialConfig, trial: Trial, steps: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Step → quantity → size of one width and seed."""
    setup = set_up(config, trial)
    model, watched = setup.model, _watched(setup.model, setup.tags, config.model, trial.width)
    multipliers = _multipliers(model, setup.tags)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    drawn = {name: value for name, value in start.items() if setup.tags[name].role in DRAWN}
    at_start = _parameter_sizes(drawn, setup.tags, multipliers, "start")
    with _blamed(config, trial.width):
        before, _ = _activations(setup, watched)
    sizes: dict[int, dict[str, float]] = {}
    for step in range(max(steps)):
        is_measured = step + 1 in steps
        with _blamed(config, trial.width), _gradients(watched if is_measured else ()) as gradients:
            take_step(model, setup.optimizers, setup.batches, setup.train, step, setup.device)
        if not is_measured:
            continue
        with _blamed(config, trial.width):
            now, sizes[step + 1] = _activations(setup, watched)
        updates = {name: p.detach() - start[name] for name, p in model.named_parameters()}
        sizes[step + 1] |= {
            **_changes(before, now),
            **{name: value * trial.width for name, value in gradients.items()},
            **_parameter_sizes(updates, setup.tags, multipliers, "update"),
            **at_start,
        }
    return sizes


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

    name: str
    module: nn.Module
    width: int
    """The model's."""
    is_block: bool
    """Whether it has hidden matrices and is not the end of a branch: then what it adds to its input
    says something."""
    ends_branch: bool


def _watched(
    model: nn.Module, tags: Mapping[str, Tag], config: ModelConfig, width: int
) -> tuple[_Watched, ...]:
    """The model's parts, the items of every container, and what looks up, reads out, ends a branch.

    A readout onto something else than the vocabulary, a router, is named "… (inner)".
    """
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    holders = (m for m in model.modules() if m is model or isinstance(m, containers))
    parts = {id(part) for holder in holders for part in holder.children()}
    outlets = {id(module) for module, _ in readouts(model)}
    hidden = {id(p) for name, p in model.named_parameters() if tags[name].role.is_hidden}
    watched = []
    for name, module in model.named_modules():
        is_readout = id(module) in outlets
        ends_branch = bool(getattr(module, "residual_output", False))
        if name and (
            id(module) in parts or is_readout or ends_branch or isinstance(module, nn.Embedding)
        ):
            is_inner = is_readout and len(module.weight) != config.kwargs["vocab_size"]
            is_block = not ends_branch and any(id(p) in hidden for p in module.parameters())
            name += INNER if is_inner else ""
            watched.append(_Watched(name, module, width, is_block, ends_branch))
    return tuple(watched)


@torch.no_grad()
def _activations(
    setup: Setup, watched: Sequence[_Watched]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Outputs on the held-out batch, of the watched modules and of the model; and all sizes.

    The sizes are those of every output, of every input, and of what each block adds to its input.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, float] = {}
    added: dict[str, float] = {}

    def see(part: _Watched, given: Tensor | None, output: Tensor) -> None:
        outputs[part.name] = output.clone()
        if given is not None:
            inputs[f"{part.name} input"] = _rms(given)
            if part.is_block and given.shape == output.shape:
                added[f"{part.name} added"] = _rms(output - given)

    setup.model.eval()
    with _seen(watched, see):
        outputs["output"] = setup.model(setup.held_out[0])
    setup.model.train()
    sizes = {name: _rms(output) for name, output in outputs.items()}
    # An input that is another module's output as it was says nothing new.
    passed_on = set(sizes.values())
    new = {name: size for name, size in inputs.items() if size not in passed_on}
    return outputs, sizes | new | added


@contextmanager
def _gradients(watched: Sequence[_Watched]) -> Iterator[dict[str, float]]:
    """The size of the loss's gradient where blocks and branches end, once it has been taken.

    Elsewhere it need not go with one over the width: at logits it is the same at all widths.
    """
    sizes: dict[str, float] = {}

    def see(part: _Watched, given: Tensor | None, output: Tensor) -> None:
        is_stream = part.is_block and given is not None and given.shape == output.shape
        if output.requires_grad and (is_stream or part.ends_branch):
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: sizes.update({f"{part.name} gradient": _rms(gradient)})
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


def _changes(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """The size of every output's change; only where the shape stays.

    An expert that other tokens are routed to has another shape: then there is nothing to compare.
    """
    return {
        f"{name} change": _rms(value - before[name])
        for name, value in now.items()
        if name in before and before[name].shape == value.shape
    }


def _multipliers(model: nn.Module, tags: Mapping[str, Tag]) -> dict[str, float]:
    """Readout weight → the factor that its module puts on the logits."""
    return {
        name: module.output_mult / module.width_mult()
        for module, name in readouts(model)
        if tags[name].role is Role.READOUT
    }


def _parameter_sizes(
    values: Mapping[str, Tensor],
    tags: Mapping[str, Tag],
    multipliers: Mapping[str, float],
    kind: str,
) -> dict[str, float]:
    """Role → RMS over its parameters of their size, or of all updates so far.

    A matrix counts by the most that it can do to the RMS of an activation, √(in/out) times its
    spectral norm, whatever its rank: arXiv 2310.17813. All else counts by its RMS.

    Args:
        values: name → the parameter, or its update.
        tags: name → tag.
        multipliers: see `_multipliers`.
        kind: the last word of the quantities' names.
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
        squares.setdefault(f"{role} {kind}", []).append(size**2)
    return {name: math.sqrt(float(np.mean(sizes))) for name, sizes in squares.items()}


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
        name: max(
            (_slope(name, step, widths, by_step[step]) for step in steps), key=lambda s: s.certain
        )
        for name, by_step in measured.items()
    }
    worst_first = sorted(slopes.items(), key=lambda item: -item[1].certain)
    problems = {name: slope.problem for name, slope in worst_first if slope.problem}
    moves = [slopes[name] for name in measured if name.rsplit(" ", 1)[-1] in MOVES]
    if all(slope.value is None for slope in moves or slopes.values()) and not problems:
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
        slope_steps={name: slope.step for name, slope in slopes.items()},
        problems=problems,
        uncertain=tuple(name for name, slope in slopes.items() if slope.is_uncertain),
    )


@dataclass(frozen=True, slots=True)
class _Slope:
    """The slope of log2 size against log2 width at one step."""

    step: int
    value: float | None = None
    """None where there is no line to fit."""
    error: float | None = None
    certain: float = -math.inf
    """How far from 0 it is at least, by its standard errors; infinite where sizes make no line."""
    problem: str = ""
    """Why it fails; empty where it does not."""
    is_uncertain: bool = False
    """Whether it lies on neither side of the threshold by its standard errors."""


def _slope(name: str, step: int, widths: Sequence[int], sizes: Sequence[Sequence[float]]) -> _Slope:
    """The slope of log2 size against log2 width, and what it says.

    An idle expert is exactly 0 at some width or seed: the rest makes the line. The model's output,
    what starts and what is updated must be there at every width.

    Args:
        name: the quantity's.
        step: after which it was measured.
        widths: rising.
        sizes: per width, one per seed.
    """
    values = np.asarray(sizes, dtype=float)
    if not np.isfinite(values).all():
        return _Slope(step, certain=math.inf, problem="is not finite")
    still = [str(width) for width, row in zip(widths, values, strict=True) if not row.all()]
    is_whole = name == "output" or name.endswith((" start", " update"))
    if is_whole and still and values.any():
        problem = f"moves at some widths but not at {', '.join(still)}"
        return _Slope(step, certain=math.inf, problem=problem)
    value, error = _fit(np.log2(widths), values)
    if value is None or error is None:
        return _Slope(step)
    margin = STANDARD_ERRORS * error
    certain = abs(value) - margin
    if INNER in name and value < 0:
        return _Slope(step, value, error, certain)
    verb = "grows" if value > 0 else "shrinks"
    problem = f"{verb} with the width, slope {value:+.2f} ± {error:.2f}"
    return _Slope(
        step,
        value,
        error,
        certain,
        problem if certain > THRESHOLD else "",
        is_uncertain=certain < THRESHOLD < abs(value) + margin,
    )


def _fit(
    log_widths: NDArray[np.float64], sizes: NDArray[np.float64]
) -> tuple[float, float] | tuple[None, None]:
    """Slope and its standard error, of a line for all seeds with an offset for each.

    A seed sets the batches, which move all widths together: without the offsets that would count
    as noise. Two None where too little is above 0 for a line and its error.

    Args:
        log_widths: (widths,), log2.
        sizes: (widths, seeds).
    """
    seeds = [(log_widths[seed > 0], np.log2(seed[seed > 0])) for seed in sizes.T if seed.any()]
    freedom = sum(len(x) - 1 for x, _ in seeds) - 1
    if freedom < 1:
        return None, None
    x = np.concatenate([x - x.mean() for x, _ in seeds])
    y = np.concatenate([y - y.mean() for _, y in seeds])
    value = float(x @ y / (x @ x))
    residuals = y - value * x
    return value, math.sqrt(float(residuals @ residuals) / freedom / float(x @ x))


def _geometric_mean(values: Sequence[float]) -> float:
    """Exactly 0 where one of them is; NaN where one of them is not finite."""
    if not all(math.isfinite(value) for value in values):
        return math.nan
    return math.exp(np.mean(np.log(values))) if all(values) else 0.0
