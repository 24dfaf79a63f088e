"""One trial, from its seed to its held-out loss."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from telescope.config import TrainConfig, TrialConfig
from telescope.data.corpus import Batches, Corpus, held_out_batch, load_corpus
from telescope.errors import DataError, ModelError
from telescope.records import CURVE_COLUMNS, CurvePoint, Result, Status, Trial
from telescope.rules.groups import parameter_groups
from telescope.rules.scaling import Tag
from telescope.train.checkpoint import Position, checkpoints_of
from telescope.train.device import resolve_device
from telescope.train.model import blamed_on, build_model
from telescope.train.optim import build_optimizers, schedule, set_lr
from telescope.train.rows import rows_of

DIVERGED_ABOVE = 2.0
"""Multiple of the first batch loss above which a trial has diverged. Assumption: a zero readout
starts at ln(vocabulary), and a healthy trial never comes near twice that."""
CURVE_ROWS = 50
"""Approximate number of rows of a training curve."""
READ_EVERY = 16
"""Steps between two readings of the losses from an accelerator; each reading waits for all steps.
A diverging trial trains on for up to this many; its result is that of the step of divergence."""
RECOMPILE_LIMIT = 64
"""Number of widths and shapes for which torch keeps a compiled step before it stops compiling."""


@dataclass(frozen=True)
class TelescopeTrainer:
    """The built-in trainer: muP models with Muon. Picklable; call it once per trial."""

    config: TrialConfig

    def __call__(self, trial: Trial) -> Result:
        """Train one trial to its end or its divergence.

        Raises:
            DataError: this machine's corpus is not the driver's.
            ModelError: the model file fails.
        """
        return train(self.config, trial)

    def warm(self) -> None:
        """Do in advance what a process's first trial needs: read the corpus, finish imports."""
        load_corpus(self.config.data)
        torch.optim.SGD([torch.zeros(1)])  # the first optimizer triggers imports of about a second


def train(config: TrialConfig, trial: Trial) -> Result:
    """Train `trial` from its latest checkpoint on; see `TelescopeTrainer`."""
    checkpoints = checkpoints_of(config, trial)
    if checkpoints and (end := checkpoints.end()):
        return result_of(config, trial, *end)  # it ended inside a pack that was interrupted later
    start = time.perf_counter()
    setup = set_up(config, trial)
    parts = (setup.model, setup.optimizers, setup.device)
    position = checkpoints.restore(*parts) if checkpoints else Position()
    start -= position.seconds
    rows = rows_of(config, trial)
    steps, read_every, reason = setup.train.steps, reads_every(setup.device), ""
    unread: list[Tensor] = []
    for step in range(position.step, steps):
        unread.append(
            take_step(setup.model, setup.optimizers, setup.batches, setup.train, step, setup.device)
        )
        is_row = diagnoses(setup.model) and step + 1 in _evenly_spaced(steps, CURVE_ROWS)
        if len(unread) < read_every and not (is_row or must_be_read(setup.train, step + 1)):
            continue
        reason, unread = _note_steps(setup, position, unread), []
        if is_row and not reason:
            row = replace(position.curve[-1], diagnostics=diagnostics_of(config, setup.model))
            position.curve[-1] = row
        rows.update(position.curve)
        if reason:
            break
        # The last step needs no checkpoint.
        if checkpoints and step + 1 < steps and (step + 1) % config.train.checkpoint_every == 0:
            position.seconds = time.perf_counter() - start
            checkpoints.save(*parts, position)
    position.seconds = time.perf_counter() - start
    return result_of(config, trial, position, reason)


def result_of(config: TrialConfig, trial: Trial, position: Position, reason: str) -> Result:
    """Make the result of a trial that has ended at `position`.

    Args:
        config: the training.
        trial: the trial.
        position: the trial's position at its end.
        reason: the reason of its divergence, or "".
    """
    loss = None if reason else position.curve[-1].held_out_loss
    return Result(
        trial,
        Status.DIVERGED if reason else Status.COMPLETE,
        loss=loss,
        reason=reason,
        flops=position.step * config.flops_per_step.get(trial.width, 0.0),
        seconds=position.seconds,
        curve=tuple(position.curve),
    )


@dataclass(frozen=True)
class Setup:
    """Everything that the training loop uses."""

    model: nn.Module
    tags: Mapping[str, Tag]
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    held_out: tuple[Tensor, ...]
    train: TrainConfig
    device: str


def set_up(config: TrialConfig, trial: Trial, *, build_on: str | None = None) -> Setup:
    """Build what a trial's loop uses, and set its threads; raises as `TelescopeTrainer` does.

    Args:
        config: the training.
        trial: the trial.
        build_on: the model's device, if it is another one than the trial's.
    """
    torch.set_num_threads(config.threads_at.get(trial.width, config.threads))
    device = resolve_device(config.device)
    corpus = _drivers_corpus(config)
    if config.train.precision == "bf16":
        # Autocast leaves a norm's gain in fp32 on purpose; torch warns of it.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    tagged = build_model(
        config.model,
        width=trial.width,
        base_width=config.base_width,
        seed=trial.seed,
        optimizer=config.optimizer.name,
        rule=config.optimizer.rule,
        device=build_on or device,
        init_scale=trial.point.get("init_scale", 1.0),
    )
    groups = parameter_groups(tagged.tags, trial.point, config.optimizer)
    length = config.train.sequence_length
    held_out = held_out_batch(corpus.held_out_tokens, count=config.data.eval_tokens, length=length)
    return Setup(
        model=tagged.module,
        tags=tagged.tags,
        optimizers=build_optimizers(tagged.module, groups, config.optimizer),
        batches=Batches(
            corpus.train_tokens, batch_size=config.train.batch_size, length=length, seed=trial.seed
        ),
        held_out=tuple(t.to(device) for t in held_out),
        # A grid around a long warm-up may exceed 1; the warm-up then lasts the whole run.
        train=replace(
            config.train, warmup=min(1.0, trial.point.get("warmup", config.train.warmup))
        ),
        device=device,
    )


def _drivers_corpus(config: TrialConfig) -> Corpus:
    """Load the corpus on this machine.

    Raises:
        DataError: it differs from the driver's.
    """
    corpus = load_corpus(config.data)
    if corpus.digest != config.corpus_digest:
        raise DataError(
            f"data.source: this worker reads a corpus with hash {corpus.digest[:12]}, the driver's "
            f"is {config.corpus_digest[:12]}; use the same files, and for python-stdlib the same "
            "Python version, on every machine"
        )
    return corpus


def _note_steps(setup: Setup, position: Position, losses: Sequence[Tensor]) -> str:
    """Record steps whose batches had these losses; return the reason of divergence, or ""."""
    for loss in torch.stack(list(losses)).tolist():
        if reason := note_step(position, loss, setup.train, lambda: held_out_loss_of(setup)):
            return reason
    return ""


def diagnoses(model: nn.Module) -> bool:
    """Tell whether a model file reports numbers of its own, by a method `diagnostics`."""
    return callable(getattr(model, "diagnostics", None))


def diagnostics_of(config: TrialConfig, model: nn.Module) -> dict[str, float]:
    """Ask a model for its own numbers, for a row of the curve; only finite ones are kept.

    Raises:
        ModelError: its method fails, or returns anything but a mapping of names to numbers.
    """
    with blamed_on(config.model):
        given = model.diagnostics()  # type: ignore[operator]
        if not isinstance(given, Mapping) or not set(given).isdisjoint(CURVE_COLUMNS):
            raise ModelError(
                f"{config.model.name}: diagnostics gave {given!r}, must be a mapping of names to "
                f"numbers, and the names none of {', '.join(CURVE_COLUMNS)}"
            )
        numbers = {str(name): float(number) for name, number in given.items()}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def reads_every(device: str) -> int:
    """Return the steps between two readings of the losses; a CPU has them after every step."""
    return 1 if torch.device(device).type == "cpu" else READ_EVERY


def must_be_read(train: TrainConfig, done: int) -> bool:
    """Tell whether losses must be read after `done` steps, for an evaluation or a checkpoint."""
    every = train.checkpoint_every
    return done in _evenly_spaced(train.steps, train.evals) or bool(every and done % every == 0)


def note_step(
    position: Position,
    loss: float,
    train: TrainConfig,
    measure: Callable[[], float],
    *,
    rows: int = CURVE_ROWS,
) -> str:
    """Record a step whose batch had `loss`; return the reason if the trial diverged, else "".

    Args:
        position: updated in place; its curve grows where a row is due.
        loss: the batch's loss before the step, nats per token.
        train: the numbers of steps and evaluations.
        measure: measures the held-out loss; called only where it is due.
        rows: approximate number of rows of the whole curve.
    """
    position.step += 1
    first = position.first_loss = loss if position.first_loss is None else position.first_loss
    if not math.isfinite(loss) or loss > DIVERGED_ABOVE * first:
        finite = loss if math.isfinite(loss) else None
        position.curve.append(CurvePoint(position.step, finite, None))
        return f"loss {loss:.4g} at step {position.step} of {train.steps}, from {first:.4g}"
    position.recent.append(loss)
    eval_steps = _evenly_spaced(train.steps, train.evals)
    if position.step not in eval_steps | _evenly_spaced(train.steps, rows):
        return ""
    held_out = measure() if position.step in eval_steps else None
    is_finite = held_out is None or math.isfinite(held_out)
    mean = sum(position.recent) / len(position.recent)
    position.curve.append(CurvePoint(position.step, mean, held_out if is_finite else None))
    position.recent = []
    return "" if is_finite else f"held-out loss {held_out} after {position.step} steps"


@functools.lru_cache(maxsize=8)
def _evenly_spaced(steps: int, count: int) -> frozenset[int]:
    """Return `count` evenly spaced numbers from 1 to `steps`, `steps` among them."""
    return frozenset(round(steps * (i + 1) / count) for i in range(count))


def take_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: Batches,
    config: TrainConfig,
    step: int,
    device: str,
) -> Tensor:
    """Take one optimizer step; return the batch's loss before it, nats per token, on the device."""
    inputs, targets = (moved(tokens, device) for tokens in batches.at(step))
    loss_of = compiled_token_loss() if config.compile else token_loss
    loss = loss_of(model, inputs, targets, config.precision)
    loss.backward()  # type: ignore[no-untyped-call]
    set_lr(optimizers, schedule(step, config))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def moved(tokens: Tensor, device: str) -> Tensor:
    """Move tokens to a device; to a GPU without waiting, so that the next kernels are launched."""
    if not device.startswith("cuda"):
        return tokens.to(device)
    return tokens.contiguous().pin_memory().to(device, non_blocking=True)


def token_loss(
    model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, precision: str = "fp32"
) -> Tensor:
    """Compute the mean cross-entropy in fp32 or better, nats per token.

    Args:
        model: maps tokens to logits.
        inputs: (batch, sequence) int64.
        targets: the following tokens, of the same shape.
        precision: "fp32", or "bf16" for torch's autocast in the model; weights stay in fp32.
    """
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(inputs)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@functools.cache
def compiled_token_loss() -> Callable[..., Tensor]:
    """Return `token_loss` through torch.compile, compiled once per process and width.

    Optimizers are not compiled, so that no learning rate becomes a constant. Models of one width
    share the compiled code, so a worker compiles only for its first trial of a width.
    """
    torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
    return torch.compile(token_loss, dynamic=False)


def held_out_loss_of(setup: Setup) -> float:
    """Measure the held-out loss with a trial's batch size and precision."""
    train = setup.train
    return held_out_loss(setup.model, setup.held_out, train.batch_size, train.precision)


@torch.no_grad()  # inference mode would make tables that a model caches unusable in training
def held_out_loss(
    model: nn.Module, held_out: tuple[Tensor, ...], batch_size: int, precision: str = "fp32"
) -> float:
    """Compute the mean loss over the held-out sequences, in chunks of the training batch's size.

    Larger chunks are no faster: at the quickstart's sizes, 16 to 32 sequences are best on a CPU.
    """
    model.eval()
    chunks = list(zip(*(torch.split(t, batch_size) for t in held_out), strict=True))
    losses = [token_loss(model, inputs, targets, precision) for inputs, targets in chunks]
    model.train()
    sizes: list[int] = [inputs.numel() for inputs, _ in chunks]
    means: list[float] = torch.stack(losses).tolist()
    total = 0.0
    for mean, size in zip(means, sizes, strict=True):
        total += mean * size
    return total / sum(sizes)
