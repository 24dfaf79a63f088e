"""One trial, from its seed to its held-out loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from telescope.errors import DataError
from telescope.records import CurvePoint, Result, Status, Trial
from telescope.train.checkpoint import Position, checkpoints_of
from telescope.train.config import TrainConfig, TrialConfig
from telescope.train.data import Batches, held_out_batch, load_corpus
from telescope.train.groups import parameter_groups
from telescope.train.model import build_model
from telescope.train.optim import build_optimizers, schedule, set_lr
from telescope.train.rules import Tag

DIVERGED_ABOVE = 2.0
"""A batch loss above this multiple of the first one ends the trial. An assumption: a zero readout
starts at ln(vocabulary), and a healthy trial never comes near twice that."""
CURVE_ROWS = 50
"""About how many rows a training curve has."""


@dataclass(frozen=True)
class TelescopeTrainer:
    """The built-in trainer: muP models with Muon. Picklable; call it once per trial."""

    config: TrialConfig

    def __call__(self, trial: Trial) -> Result:
        """Train one trial to its end, or to where it diverges.

        Raises:
            DataError: this machine's corpus is not the driver's.
            ModelError: the model file fails.
        """
        torch.set_num_threads(self.config.threads_at.get(trial.width, self.config.threads))
        return train(self.config, trial)


def train(config: TrialConfig, trial: Trial) -> Result:
    """Train `trial` as `config` says, from its last checkpoint on; see `TelescopeTrainer`."""
    start = time.perf_counter()
    setup = set_up(config, trial)
    parts = (setup.model, setup.optimizers, setup.device)
    checkpoints = checkpoints_of(config, trial)
    position = checkpoints.restore(*parts) if checkpoints else Position()
    start -= position.seconds

    def keep() -> None:
        if checkpoints and position.step % config.train.checkpoint_every == 0:
            position.seconds = time.perf_counter() - start
            checkpoints.save(*parts, position)

    reason = _run_steps(setup, position, keep)
    loss = None if reason else position.curve[-1].held_out_loss
    if loss is not None and not math.isfinite(loss):
        loss, reason = None, f"held-out loss {loss} after {position.step} steps"
    return Result(
        trial,
        Status.DIVERGED if reason else Status.COMPLETE,
        loss=loss,
        reason=reason,
        flops=position.step * config.flops_per_step.get(trial.width, 0.0),
        seconds=time.perf_counter() - start,
        curve=tuple(position.curve),
    )


@dataclass(frozen=True)
class Setup:
    """What the loop steps over."""

    model: nn.Module
    tags: Mapping[str, Tag]
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    held_out: tuple[Tensor, ...]
    train: TrainConfig
    device: str


def set_up(config: TrialConfig, trial: Trial) -> Setup:
    """Build what a trial steps over; see `TelescopeTrainer` for what it raises."""
    device = resolve_device(config.device)
    corpus = load_corpus(config.data)
    if corpus.digest != config.corpus_digest:
        raise DataError(
            f"data.source: this worker reads a corpus with hash {corpus.digest[:12]}, the driver's "
            f"is {config.corpus_digest[:12]}; use the same files, and for python-stdlib the same "
            "Python version, on every machine"
        )
    torch.manual_seed(trial.seed)
    tagged = build_model(
        config.model,
        width=trial.width,
        base_width=config.base_width,
        seed=trial.seed,
        optimizer=config.optimizer.name,
        rule=config.optimizer.rule,
        device=device,
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
        # A grid around a long warm-up may reach past 1: then it lasts the whole run.
        train=replace(
            config.train, warmup=min(1.0, trial.point.get("warmup", config.train.warmup))
        ),
        device=device,
    )


def _run_steps(setup: Setup, position: Position, keep: Callable[[], None]) -> str:
    """Take every step from `position` on, moving it; returns why it diverged, or "".

    `keep` is called after every step but the last.
    """
    steps, evals = setup.train.steps, setup.train.evals
    eval_steps = {round(steps * (i + 1) / evals) for i in range(evals)}
    row_steps = {round(steps * (i + 1) / CURVE_ROWS) for i in range(CURVE_ROWS)} | eval_steps
    for step in range(position.step, steps):
        loss = take_step(
            setup.model, setup.optimizers, setup.batches, setup.train, step, setup.device
        )
        position.step += 1
        first = position.first_loss = loss if position.first_loss is None else position.first_loss
        if not math.isfinite(loss) or loss > DIVERGED_ABOVE * first:
            finite = loss if math.isfinite(loss) else None
            position.curve.append(CurvePoint(step + 1, finite, None))
            return f"loss {loss:.4g} at step {step + 1} of {steps}, from {first:.4g}"
        position.recent.append(loss)
        if step + 1 in row_steps:
            held_out = None
            if step + 1 in eval_steps:
                held_out = held_out_loss(setup.model, setup.held_out, setup.train.batch_size)
            mean = sum(position.recent) / len(position.recent)
            position.curve.append(CurvePoint(step + 1, mean, held_out))
            position.recent = []
        if step + 1 < steps:
            keep()
    return ""


def take_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: Batches,
    config: TrainConfig,
    step: int,
    device: str,
) -> float:
    """One optimizer step; returns the batch's loss before it, nats per token."""
    inputs, targets = batches.at(step)
    loss = token_loss(model, inputs.to(device), targets.to(device))
    loss.backward()  # type: ignore[no-untyped-call]
    set_lr(optimizers, schedule(step, config))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (batch, sequence) tokens, nats per token."""
    logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: tuple[Tensor, ...], batch_size: int) -> float:
    """Mean loss over the held-out sequences, in chunks of the training batch's size."""
    model.eval()
    total = 0.0
    for inputs, targets in zip(*(torch.split(t, batch_size) for t in held_out), strict=True):
        total += token_loss(model, inputs, targets).item() * inputs.numel()
    model.train()
    return total / held_out[0].numel()


def resolve_device(device: str) -> str:
    """The device that "auto" means on this machine: an accelerator where torch finds one."""
    if device != "auto":
        return device
    if not torch.accelerator.is_available():
        return "cpu"
    return str(torch.accelerator.current_accelerator())
