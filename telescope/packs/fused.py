"""A pack: trials of one width that train as one stacked model, each as it would alone.

Every trial keeps its own data, schedule, curve, checkpoints and end. A trial that ends or diverges
leaves the pack, and its memory is freed. A pack that is begun again resumes from the latest step
that all unfinished trials have checkpointed, without trials that had ended by then, so that it
rounds as before. Trials that were not a pack before resume each from its own step.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from telescope.config import TrainConfig, TrialConfig
from telescope.data.corpus import Batches
from telescope.dispatch.device import is_out_of_memory
from telescope.packs.graph import Recorder
from telescope.packs.stack import Stack
from telescope.records import Result, Trial
from telescope.train.checkpoint import Checkpoints, Position, checkpoints_of, random_states
from telescope.train.loop import (
    Setup,
    diagnoses,
    held_out_loss,
    moved,
    must_be_read,
    note_step,
    reads_every,
    result_of,
    set_up,
    token_loss,
)
from telescope.train.optim import schedule
from telescope.train.rows import Rows, rows_of

AGREEMENT = 0.05
"""Largest relative difference of loss or gradients between a stacked and a single model: far above
rounding, also in bf16, and far below the effect of a different computation."""
ROUNDING = {"fp32": 1e-4, "bf16": 3e-3}
"""Precision → additional difference that is allowed, as a share of the RMS of all gradients. A
gradient that is exactly zero in theory, such as that of the keys' bias in plain attention, consists
of rounding only: measured on a CPU at widths 16 to 256 up to 3e-8 (fp32) and 4e-4 (bf16); the
smallest of the other gradients were 1e-2."""


@dataclass
class Member:
    """One trial of a pack."""

    trial: Trial
    batches: Batches
    train: TrainConfig
    checkpoints: Checkpoints | None
    position: Position
    rows: Rows


def train_pack(config: TrialConfig, trials: Sequence[Trial]) -> Iterator[Result]:
    """Train trials of one width as one; yield each result as soon as its trial has ended.

    A result equals that of `loop.train` up to rounding. Its seconds are the trial's share of the
    time: each step's time is divided evenly among the trials that still train.

    Args:
        config: the sweep's training.
        trials: trials of one width, each at most once; seeds may differ.

    Raises:
        DataError, ModelError: see `loop.train`.
    """
    pack = Pack(config, trials)
    yield from pack.ended
    while pack.members:
        yield from pack.step()


class Pack:
    """The trials that still train, and their stacked model."""

    def __init__(self, config: TrialConfig, trials: Sequence[Trial]) -> None:
        """Set every trial up, or restore it, one after the other."""
        self._config = config
        self.members: list[Member] = []
        self._unread: list[Tensor] = []  # the losses of the last steps, (K,) each
        self._clock = 0.0
        kept = [checkpoints_of(config, trial) for trial in trials]
        ends = [each.end() if each else None for each in kept]
        going_on = [each for each, end in zip(kept, ends, strict=True) if each and not end]
        start = _common_start(going_on, config.train.checkpoint_every)
        over = [end is not None and end[0].step <= start for end in ends]
        self.ended = [
            result_of(config, trial, *end)
            for trial, end, is_over in zip(trials, ends, over, strict=True)
            if end and is_over
        ]
        """Results of trials that had ended before, if the pack is begun again."""
        for trial, checkpoints, is_over in zip(trials, kept, over, strict=True):
            if not is_over:
                self._add(trial, checkpoints, start, len(trials) - len(self.ended))
        if self.members:
            self._begin_recording()

    def _begin_recording(self) -> None:
        """Record the stack's step, and its measurement, anew: its tensors are new ones."""
        self._take_step = Recorder(self.stack.step)
        self._measure = Recorder(functools.partial(self.stack.losses, shared=True))

    def _add(
        self, trial: Trial, checkpoints: Checkpoints | None, at_most: float, size: int
    ) -> None:
        """Add a trial to a pack of `size` members, restored from a step of `at_most` or less."""
        start = time.perf_counter()
        setup = set_up(self._config, trial)
        parts = (setup.model, setup.optimizers)
        position = Position()
        if checkpoints:
            position = checkpoints.restore(*parts, setup.device, at_most=at_most)
        if not self.members:
            self._shell = setup  # its module is called, and it carries checkpoints in and out
            self.stack = stack_of(setup, size)
        self.stack.load(len(self.members), *parts)
        position.seconds += time.perf_counter() - start
        rows = rows_of(self._config, trial)
        self.members.append(Member(trial, setup.batches, setup.train, checkpoints, position, rows))

    def step(self) -> list[Result]:
        """Take every trial's next step; return the results of trials known to have ended."""
        self._clock = time.perf_counter()
        steps = [member.position.step + len(self._unread) for member in self.members]
        shares = [schedule(s, m.train) for s, m in zip(steps, self.members, strict=True)]
        factors = self.stack.factors(shares, [step + 1 for step in steps])
        self._unread.append(self._take_step(*self._batches(steps), factors))
        due = any(
            must_be_read(m.train, step + 1) for step, m in zip(steps, self.members, strict=True)
        )
        if due or len(self._unread) == reads_every(self._shell.device):
            return self.read()
        self._charge()
        return []

    def read(self) -> list[Result]:
        """Read the losses of the last steps; return the results of trials that have ended."""
        if not self._unread:
            return []
        reasons = self._note(torch.stack(self._unread).T.tolist())
        self._unread = []
        self._charge()
        self._save(reasons)
        self._charge()
        left: list[int] = []
        ended: list[tuple[Member, str]] = []
        for k, (member, reason) in enumerate(zip(self.members, reasons, strict=True)):
            if reason or member.position.step == member.train.steps:
                ended.append((member, reason))
            else:
                left.append(k)
        if left and ended:
            self.stack.keep(left)
            self._begin_recording()
            for member, reason in ended:
                if member.checkpoints:
                    member.checkpoints.save_end(member.position, reason)
        self.members = [self.members[k] for k in left]
        return [result_of(self._config, m.trial, m.position, reason) for m, reason in ended]

    def _batches(self, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (K, batch, sequence); move a shared batch only once."""
        seen: dict[tuple[int, int], int] = {}
        distinct: list[tuple[Tensor, Tensor]] = []
        rows = []
        for step, member in zip(steps, self.members, strict=True):
            key = (member.trial.seed, step)
            if key not in seen:
                seen[key] = len(distinct)
                distinct.append(member.batches.at(step))
            rows.append(seen[key])
        device = self._shell.device
        both = [moved(torch.stack(tensors), device) for tensors in zip(*distinct, strict=True)]
        if len(distinct) < len(rows):
            index = moved(torch.tensor(rows), device)
            both = [tokens.index_select(0, index) for tokens in both]
        return both[0], both[1]

    def _note(self, losses: Sequence[Sequence[float]]) -> list[str]:
        """Record every trial's losses; return for each the reason of divergence, or ""."""
        held_out: list[float] = []

        def measure(k: int) -> float:
            if not held_out:
                held_out.extend(self._held_out_losses())
            return held_out[k]

        reasons = []
        for k, (member, own) in enumerate(zip(self.members, losses, strict=True)):
            notes = (
                note_step(member.position, loss, member.train, functools.partial(measure, k))
                for loss in own
            )
            reasons.append(next(filter(None, notes), ""))
            member.rows.update(member.position.curve)
        return reasons

    @torch.no_grad()
    def _held_out_losses(self) -> list[float]:
        """Measure every trial's held-out loss; see `loop.held_out_loss`."""
        size, model = self._config.train.batch_size, self._shell.model
        chunks = list(zip(*(torch.split(t, size) for t in self._shell.held_out), strict=True))
        model.eval()
        losses = [self._measure(*chunk) for chunk in chunks]
        model.train()
        sizes = torch.tensor([inputs.numel() for inputs, _ in chunks], dtype=torch.float64)
        means: list[float] = (sizes @ torch.stack(losses).cpu().double() / sizes.sum()).tolist()
        return means

    def _charge(self) -> None:
        """Divide the time since the last call among the trials that train."""
        now = time.perf_counter()
        for member in self.members:
            member.position.seconds += (now - self._clock) / len(self.members)
        self._clock = now

    def _save(self, reasons: Sequence[str]) -> None:
        """Write the checkpoints that are due, as if each trial were trained alone."""
        every = self._config.train.checkpoint_every
        parts = (self._shell.model, self._shell.optimizers)
        for k, (member, reason) in enumerate(zip(self.members, reasons, strict=True)):
            step = member.position.step
            is_last = bool(reason) or step == member.train.steps
            if member.checkpoints and not is_last and step % every == 0:
                self.stack.put(k, step, *parts)
                member.checkpoints.save(*parts, self._shell.device, member.position)


def _common_start(kept: Sequence[Checkpoints], every: int) -> float:
    """Return the latest step that every unfinished trial has checkpointed.

    Trials of one pack are never further apart than two checkpoints of a trial. Trials that are
    further apart were not a pack before and have no common step: then it is infinity, and each
    resumes from its own.
    """
    newest = [each.newest() for each in kept]
    if not newest or max(newest) - min(newest) > every:
        return math.inf
    return min(newest)


def stack_of(setup: Setup, size: int) -> Stack:
    """Make room for `size` trials like this one, whose module will be called."""
    _fill_tables(setup)
    loss = functools.partial(token_loss, precision=setup.train.precision)
    return Stack.empty(setup.model, setup.optimizers, size, loss=loss, device=setup.device)


@torch.no_grad()
def _fill_tables(setup: Setup) -> None:
    """Call the model without a stack first, so that a table that it caches is a plain one.

    A table cached from K trials would have K copies and not fit a smaller stack.
    """
    inputs, targets = setup.held_out
    size, precision = setup.train.batch_size, setup.train.precision
    rows = torch.arange(size, device=inputs.device) % len(inputs)
    token_loss(setup.model, inputs[rows], targets[rows], precision)
    last = (len(inputs) - 1) // size * size  # the last chunk of a measurement may be smaller
    held_out_loss(setup.model, (inputs[last:], targets[last:]), size, precision)


@dataclass(frozen=True)
class _Outcome:
    """Loss and gradients of a trial's first batch."""

    loss: float
    grads: Mapping[str, Tensor]
    """Parameter → gradient."""


def obstacle(config: TrialConfig, trial: Trial) -> str:
    """Say why trials like this one cannot train as one; "" if they can.

    Two trials with different weights and tokens are computed alone and as a stack of two; the first
    also as a stack of one, as when the other has ended.

    Raises:
        DataError, ModelError: see `loop.train`.
    """
    if config.train.compile:
        return "train.compile is on, and compiles the step of one trial"
    setups = [set_up(config, each) for each in (trial, replace(trial, seed=trial.seed + 1))]
    for number, setup in enumerate(setups):
        _shake(setup, number)
    if why := _trait(setups[1]):
        return why
    # The first module is stacked before it is called with its own tensors, as in a pack.
    stack = stack_of(setups[0], 2)
    for k, setup in enumerate(setups):
        stack.load(k, setup.model, setup.optimizers)
    tokens = [_first_batch(setup) for setup in setups]
    try:
        stacked = _stacked(stack, tokens)
        stack.keep([0])
        stacked += _stacked(stack, tokens[:1])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200]
        return f"its forward does not take stacked parameters ({type(error).__name__}: {said})"
    first, second = (_alone(setup) for setup in setups)
    alone = (first, second, first)
    noise = ROUNDING[config.train.precision]
    differences = (_difference(*pair, noise) for pair in zip(stacked, alone, strict=True))
    return next(filter(None, differences), "")


def _shake(setup: Setup, seed: int) -> None:
    """Move every parameter a little, because a readout of zeros passes no gradient back."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, setup.model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.02)


def _trait(setup: Setup) -> str:
    """Name a behaviour of the model in training that a stack cannot reproduce; "" if none."""
    model, device = setup.model, setup.device
    random = random_states(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = token_loss(model, *_first_batch(setup), setup.train.precision)
    loss.backward()  # type: ignore[no-untyped-call]
    if any(not torch.equal(state, random[key]) for key, state in random_states(device).items()):
        return "it draws random numbers in training, and they would not be those of a trial alone"
    if any(not torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers()):
        return "it changes its buffers in training"
    if diagnoses(model):
        return "it reports diagnostics, which are those of one trial"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            return f"{name} has no part in its loss"
    return ""


def _first_batch(setup: Setup) -> tuple[Tensor, Tensor]:
    inputs, targets = setup.batches.at(0)
    return inputs.to(setup.device), targets.to(setup.device)


def _alone(setup: Setup) -> _Outcome:
    """Compute the first batch of a trial alone."""
    named = {name: p for name, p in setup.model.named_parameters() if p.requires_grad}
    loss = token_loss(setup.model, *_first_batch(setup), setup.train.precision)
    grads = torch.autograd.grad(loss, list(named.values()))
    return _Outcome(loss.item(), dict(zip(named, grads, strict=True)))


def _stacked(stack: Stack, tokens: Sequence[tuple[Tensor, Tensor]]) -> list[_Outcome]:
    """Compute the first batch of every trial in a stack."""
    inputs, targets = (torch.stack(tensors) for tensors in zip(*tokens, strict=True))
    losses = stack.losses(inputs, targets)
    grads = stack.gradients(losses)
    named = {
        name: grad
        for block, of_block in zip(stack.blocks, grads, strict=True)
        for name, grad in zip(block.names, of_block, strict=True)
    }
    return [
        _Outcome(loss, {name: grad[k] for name, grad in named.items()})
        for k, loss in enumerate(losses.tolist())
    ]


def _difference(stacked: _Outcome, alone: _Outcome, noise: float) -> str:
    """Describe the difference between a stacked trial and the same trial alone; "" if none.

    Args:
        stacked: the outcome as part of a stack.
        alone: the outcome alone, with the same weights and tokens.
        noise: difference that every gradient element may have, as a share of the RMS of all.
    """
    if not abs(stacked.loss - alone.loss) <= AGREEMENT * abs(alone.loss):
        return f"stacked, its loss is {stacked.loss:.4g}, alone {alone.loss:.4g}"
    count = sum(grad.numel() for grad in alone.grads.values())
    mean = (sum(grad.square().sum().item() for grad in alone.grads.values()) / count) ** 0.5
    for name, own in alone.grads.items():
        allowed = AGREEMENT * own.norm().item() + noise * mean * own.numel() ** 0.5
        if not (stacked.grads[name] - own).norm().item() <= allowed:
            return f"stacked, the gradient of {name} is another"
    return ""
