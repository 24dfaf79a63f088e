"""The training of a target run on each of its ranks, from its latest checkpoint to its result.

One rank on a CPU in fp32 computes what a trial of the same width, point and seed does, bit for bit:
model, batches, schedule, groups and evaluation are the trials' own. Several ranks share the rows of
the same batches, so that neither the data nor their order depend on their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from telescope.config import TrainConfig
from telescope.errors import ResumeError
from telescope.files import remove_unfinished
from telescope.records import CurvePoint
from telescope.rules.groups import parameter_groups
from telescope.target.checkpoint import Checkpoints, Optimizers
from telescope.target.folder import RunFolder
from telescope.target.fully_sharded import FullyShardedOptimizers, divide, kept_apart
from telescope.target.layers import recompute_layers
from telescope.target.ranks import Ranks
from telescope.target.record import SCHEMA, Manner, TargetRun
from telescope.target.sharding import ShardedOptimizers
from telescope.target.speed import Speed, device_name, peak_of
from telescope.train.checkpoint import Position
from telescope.train.loop import (
    Setup,
    compiled_token_loss,
    held_out_loss,
    moved,
    must_be_read,
    note_step,
    reads_every,
    set_up,
    token_loss,
)
from telescope.train.optim import schedule

CURVE_ROWS = 2000
"""Approximate number of rows of the curve."""
EVALS = 10
"""Most measurements of the held-out loss, unless the sweep's trials have more."""
EVAL_SHARE = 0.1
"""Most that they cost together, as a share of the training; the last one always takes place."""
RANK_SEED = 1_000_003
"""Distance between the random states of two ranks, far beyond the seeds that people choose."""
STATUS_SECONDS = 0.5
"""Least time between two writes of the progress."""


@dataclass
class TargetPosition(Position):
    """The progress of a run, with the time of each of the curve's rows."""

    times: list[float] = field(default_factory=list)


def read_run(folder: RunFolder) -> TargetRun:
    """Read what a folder's run trains.

    Raises:
        ResumeError: there is none, or it is damaged.
    """
    data = folder.read_run()
    if data is None:
        raise ResumeError(f"{folder.path}: holds no run.json; `telescope launch` makes it")
    try:
        return TargetRun.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResumeError(
            f"{folder.path}: its run.json cannot be read: {type(error).__name__}: {error}; restore "
            "it, or launch under another --run"
        ) from error


def train_target(
    path: Path,
    manner: Manner,
    ranks: Ranks,
    show: Callable[[dict[str, Any]], None] = lambda status: None,
) -> dict[str, Any]:
    """Train a run to its end; called on every rank.

    Args:
        path: the run's folder, with its `run.json`; all ranks see the same one.
        manner: the manner of this start.
        ranks: this process's place.
        show: called on the first rank with each progress that is written.

    Returns:
        The content of `result.json`.

    Raises:
        TelescopeError: on all ranks, if one cannot do its part.
    """
    folder = RunFolder(path)
    with ExitStack() as stack:

        def prepare() -> _Training:
            if ranks.is_first:
                stack.enter_context(folder.writing())
            return _Training(folder, read_run(folder), manner, ranks, show)

        if not (result := folder.read_result()):
            result = ranks.together(prepare).to_its_end()
        return result


def evals_of(train: TrainConfig, eval_tokens: int) -> int:
    """Return the number of measurements of the held-out loss in a run.

    A token costs a third in a forward pass of what it costs in a step, which has a backward pass
    of twice as much.

    >>> train = TrainConfig(steps=1000, batch_size=16, sequence_length=64)
    >>> evals_of(train, eval_tokens=16_384), evals_of(train, eval_tokens=100_000)
    (10, 3)
    """
    affordable = int(EVAL_SHARE * 3 * train.tokens / eval_tokens)
    return min(train.steps, max(train.evals, 1, min(EVALS, affordable)))


class _Training:
    """A run on one rank."""

    def __init__(
        self,
        folder: RunFolder,
        run: TargetRun,
        manner: Manner,
        ranks: Ranks,
        show: Callable[[dict[str, Any]], None],
    ) -> None:
        """Build model and optimizers; other ranks may not have come so far."""
        self.folder, self.run, self.ranks, self.show = folder, run, ranks, show
        self.manner = manner.fitted(run.steps)
        train = run.config.train
        self.train_config = replace(
            train,
            evals=evals_of(train, run.config.data.eval_tokens),
            checkpoint_every=self.manner.checkpoint_every,
        )
        config = replace(
            run.config, train=self.train_config, device=ranks.device, threads=manner.threads
        )
        self.rows = ranks.rows(train.batch_size)
        # A model that fits no single device is built beside it, and moved there layer by layer.
        setup = set_up(config, run.trial, build_on="cpu" if manner.shard else None)
        # The trials' own optimizers would hold on to parameters that are divided.
        self.setup: Setup = replace(setup, optimizers=[])
        del setup
        self.train_config = self.setup.train  # with the point's warm-up
        self.optimizers = self._divided()
        self.checkpoints = Checkpoints(folder.checkpoints, ranks, keep_every=manner.keep_every)
        if ranks.rank:  # dropout differs between ranks; the first one's is a trial's
            torch.manual_seed(run.trial.seed + RANK_SEED * ranks.rank)
        self.device_name = device_name(ranks.device)
        self._written = 0.0

    def _divided(self) -> Optimizers:
        """Prepare the model as this start wants it; return its optimizers."""
        model, point, config = self.setup.model, self.run.trial.point, self.run.config.optimizer
        groups = parameter_groups(self.setup.tags, point, config)
        if self.manner.activation_checkpointing:
            recompute_layers(model)
        if not self.manner.shard:
            return ShardedOptimizers(model, groups, config, self.ranks)
        divide(model, self.ranks)
        return FullyShardedOptimizers(model, groups, config, self.ranks)

    def to_its_end(self) -> dict[str, Any]:
        """Train from the latest checkpoint to the end, on all ranks together."""
        position = self._restored()
        self.parallel = self._parallel()
        train, steps = self.train_config, self.run.steps
        read_every, reason = reads_every(self.ranks.device), ""
        start = time.perf_counter() - position.seconds
        self.speed = Speed(position.step, steps)
        unread: list[Tensor] = []
        for step in range(position.step, steps):
            unread.append(self._take_step(step))
            if len(unread) < read_every and not must_be_read(train, step + 1):
                continue
            reason, unread = self._note(position, unread), []
            position.seconds = time.perf_counter() - start
            position.times += [position.seconds] * (len(position.curve) - len(position.times))
            self._show(position, reason)
            if reason:
                break
            # The last one is for whoever goes on with the model.
            if (step + 1) % train.checkpoint_every == 0 or step + 1 == steps:
                self._save(position)
        return self._end(position, reason)

    def _restored(self) -> TargetPosition:
        """Restore the latest whole checkpoint on all ranks; return its position, or the start."""
        if self.ranks.is_first:
            remove_unfinished(self.folder.path)
            self.checkpoints.clear_unfinished()
        newest = self.ranks.first_says(self.checkpoints.newest() if self.ranks.is_first else 0)
        if not newest:
            return TargetPosition()
        facts = self.checkpoints.restore(newest, self.setup.model, self.optimizers)
        return TargetPosition(**{**facts, "curve": [CurvePoint(*row) for row in facts["curve"]]})

    def _parallel(self) -> nn.Module:
        """Return the model whose backward pass averages the gradients over the ranks."""
        if self.ranks.size == 1 or self.manner.shard:
            return self.setup.model
        return DistributedDataParallel(self.setup.model, gradient_as_bucket_view=True)

    def _take_step(self, step: int) -> Tensor:
        """Take one step; return this rank's part of the batch's mean loss before it."""
        train, device = self.train_config, self.ranks.device
        loss_of = compiled_token_loss() if train.compile else token_loss
        pieces = self._micro_batches()
        parts = []
        for number, rows in enumerate(pieces):
            inputs, targets = (moved(t, device) for t in self.setup.batches.at(step, rows))
            share = len(rows) / train.batch_size
            with self._no_exchange(is_last=number == len(pieces) - 1):
                loss = loss_of(self.parallel, inputs, targets, train.precision)
                # DDP divides the sum over ranks by their number.
                weight = share * self.ranks.size
                (loss if weight == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]
            parts.append(loss.detach() if share == 1 else loss.detach() * share)
        if self.run.clip:
            nn.utils.clip_grad_norm_(self.setup.model.parameters(), self.run.clip)
        self.optimizers.step(schedule(step, train))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _micro_batches(self) -> list[range]:
        """Return this rank's rows in parts that a forward pass takes at once."""
        size = self.manner.micro_batch or len(self.rows)
        return [self.rows[start : start + size] for start in range(0, len(self.rows), size)]

    def _no_exchange(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients stay on this rank, until the last part."""
        if isinstance(self.parallel, DistributedDataParallel) and not is_last:
            return self.parallel.no_sync()
        if isinstance(self.parallel, FSDPModule) and not is_last:
            return kept_apart(self.parallel)
        return nullcontext()

    def _note(self, position: TargetPosition, losses: Sequence[Tensor]) -> str:
        """Record steps by each rank's part of their losses; return why it diverged, or ""."""
        for loss in self.ranks.sum(torch.stack(list(losses))).tolist():
            if reason := note_step(
                position, loss, self.train_config, self._held_out_loss, rows=CURVE_ROWS
            ):
                return reason
        self.speed.note(position.step)
        return ""

    def _held_out_loss(self) -> float:
        """Measure the held-out loss, the chunks divided over the ranks."""
        train, setup, ranks = self.train_config, self.setup, self.ranks
        chunk = min(self.manner.micro_batch or train.batch_size, -(-train.batch_size // ranks.size))
        if ranks.size == 1:
            return held_out_loss(setup.model, setup.held_out, chunk, train.precision)
        return shared_held_out_loss(setup.model, setup.held_out, chunk, train.precision, ranks)

    def _save(self, position: TargetPosition) -> None:
        facts = {**asdict(position), "curve": [list(asdict(p).values()) for p in position.curve]}
        self.ranks.together(lambda: self.checkpoints.save(self.setup.model, self.optimizers, facts))

    def _show(self, position: TargetPosition, reason: str) -> None:
        """Write progress and curve, not too often."""
        now = time.monotonic()
        is_end = bool(reason) or position.step == self.run.steps
        if not self.ranks.is_first or (now - self._written < STATUS_SECONDS and not is_end):
            return
        self._written = now
        self.folder.write_curve(self._rows_of_curve(position))
        losses = [row.train_loss for row in position.curve[-1:]] or position.recent[-1:]
        status = {
            "step": position.step,
            "steps": self.run.steps,
            "loss": (position.recent or losses)[-1],
            "seconds": position.seconds,
            "tokens_per_second": self._tokens_per(self.speed.steps_per_second),
            "mfu": self._mfu(self.speed.steps_per_second),
            "eta_seconds": self.speed.eta_seconds,
            "ranks": self.ranks.size,
            "device": self.device_name,
        }
        self.folder.write_status(status)
        self.show(status)

    def _rows_of_curve(self, position: TargetPosition) -> list[tuple[Any, ...]]:
        train, lr = self.train_config, self.run.trial.point.lr
        return [
            (
                row.step,
                row.step * train.tokens_per_step,
                row.train_loss,
                row.held_out_loss,
                schedule(row.step - 1, train) * lr,
                round(seconds, 3),
            )
            for row, seconds in zip(position.curve, position.times, strict=True)
        ]

    def _tokens_per(self, steps_per_second: float | None) -> float | None:
        return steps_per_second and steps_per_second * self.train_config.tokens_per_step

    def _mfu(self, steps_per_second: float | None) -> float | None:
        """Return the share of all devices' peak, by the FLOPs of model and attention."""
        peak = peak_of(self.device_name, self.train_config.precision)
        flops = self.run.flops.get("model", 0.0) + self.run.flops.get("attention", 0.0)
        if not (peak and flops and steps_per_second):
            return None
        return steps_per_second * flops / (peak * self.ranks.size)

    def _end(self, position: TargetPosition, reason: str) -> dict[str, Any]:
        """Write the result; return it on all ranks."""
        self.ranks.together(self.checkpoints.finish)
        state = torch.zeros(self.ranks.size, device=self.ranks.device, dtype=torch.float64)
        state[self.ranks.rank] = self.optimizers.elements
        elements = [int(n) for n in self.ranks.sum(state).tolist()]
        last = position.curve[-1]
        result = {
            "schema": SCHEMA,
            "sweep": self.run.sweep,
            "width": self.run.trial.width,
            "seed": self.run.trial.seed,
            "point": dict(self.run.trial.point),
            "step": position.step,
            "steps": self.run.steps,
            "tokens": position.step * self.train_config.tokens_per_step,
            "loss": None if reason else last.held_out_loss,
            "train_loss": last.train_loss,
            "diverged": bool(reason),
            "reason": reason,
            "seconds": position.seconds,
            "tokens_per_second": self._tokens_per(self.speed.overall),
            "mfu": self._mfu(self.speed.overall),
            "flops": position.step * sum(self.run.flops.values()),
            "parameters": self.run.parameters,
            "device": self.device_name,
            "ranks": self.ranks.size,
            "precision": self.train_config.precision,
            "optimizer_state": elements,
            "peak_memory_bytes": self._peak_memory(),
        }
        if self.ranks.is_first:
            self.folder.write_curve(self._rows_of_curve(position))
            self.folder.write_result(result)
        return result

    def _peak_memory(self) -> int | None:
        """Return the most memory that this rank's GPU has held; None for other devices."""
        is_cuda = torch.device(self.ranks.device).type == "cuda"
        return torch.cuda.max_memory_allocated(self.ranks.device) if is_cuda else None


@torch.no_grad()
def shared_held_out_loss(
    model: nn.Module,
    held_out: tuple[Tensor, ...],
    chunk: int,
    precision: str,
    ranks: Ranks,
) -> float:
    """Compute `held_out_loss` in chunks that are divided over the ranks.

    Every rank computes as many chunks, the last ones perhaps for nothing: a model whose parameters
    are divided needs all ranks in each forward pass.
    """
    chunks = list(zip(*(torch.split(t, chunk) for t in held_out), strict=True))
    means = torch.zeros(len(chunks), device=ranks.device)
    model.eval()
    for first in range(0, len(chunks), ranks.size):
        number = first + ranks.rank
        inputs, targets = chunks[min(number, len(chunks) - 1)]
        mean = token_loss(model, inputs, targets, precision)
        if number < len(chunks):
            means[number] = mean
    model.train()
    sizes: list[int] = [inputs.numel() for inputs, _ in chunks]
    found: list[float] = ranks.sum(means).tolist()
    total = 0.0
    for its_mean, size in zip(found, sizes, strict=True):
        total += its_mean * size
    return total / sum(sizes)
