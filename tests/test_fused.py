"""A fused trial against the same trial alone: in float64 to rounding, whatever its pack holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt_config, trial_config
from torch.nn import functional

from telescope.config import ModelConfig, OptimizerConfig, TrainConfig, TrialConfig
from telescope.dispatch.device import is_out_of_memory
from telescope.packs import fused
from telescope.packs.folding import Folded
from telescope.packs.fused import Pack, obstacle, train_pack
from telescope.packs.probe import pack_probe
from telescope.packs.stack import Stack
from telescope.packs.trainer import PackedTrainer
from telescope.records import CurvePoint, Point, Result, Status, Trial
from telescope.train import checkpoint, loop, muon
from telescope.train.checkpoint import Position, checkpoints_of
from telescope.train.loop import train

AXES = {
    # lr, weight decay, warm-up, init scale, AdamW's share, seed: no two of a pack agree in any
    "calm": (0.01, 0.5, 0.1, 1.0, 1.0, 0),
    "warm": (0.03, 0.2, 0.4, 0.7, 0.5, 0),
    "wild": (0.06, 0.05, 0.2, 1.3, 2.0, 3),
}
BAG = """
import mup, torch

def build(width, *, vocab_size):
    return torch.nn.Sequential(
        torch.nn.Embedding(vocab_size, width),
        torch.nn.Linear(width, width, bias={bias}),
        {layer},
        mup.MuReadout(width, vocab_size, bias=False),
    )

class Own(torch.nn.Module):
    def __init__(self, spare=None):
        super().__init__()
        self.spare = spare
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        {body}
"""


SPARE = "Own(torch.nn.Parameter(torch.zeros(width)))"
"""A layer with a vector that its forward leaves out."""


def pack_of(width: int = 16, *, muon_axes: bool = True) -> list[Trial]:
    names = ("lr", "weight_decay", "warmup", "init_scale", "adamw_lr_ratio")
    return [
        Trial(
            width, Point.of(dict(zip(names[: 5 if muon_axes else 4], values, strict=False))), seed
        )
        for *values, seed in AXES.values()
    ]


def bag(layer: str = "torch.nn.GELU()", body: str = "return x", bias: bool = False) -> ModelConfig:
    text = BAG.format(layer=layer, body=body, bias=bias)
    return ModelConfig(name="bag.py", text=text, kwargs={"vocab_size": 256})


def losses(result: Result) -> list[float | None]:
    return [loss for row in result.curve for loss in (row.train_loss, row.held_out_loss)]


def check_alike(fused: Sequence[Result], alone: Sequence[Result], tolerance: float) -> None:
    by_trial = {result.trial: result for result in fused}
    assert len(by_trial) == len(fused) == len(alone)
    for wanted in alone:
        result = by_trial[wanted.trial]
        assert (result.status, result.flops) == (wanted.status, wanted.flops)
        assert [row.step for row in result.curve] == [row.step for row in wanted.curve]
        for mine, theirs in zip(losses(result), losses(wanted), strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or mine == pytest.approx(theirs, rel=tolerance)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64, Newton–Schulz's "fp32" too."""
    monkeypatch.setitem(muon.DTYPES, "fp32", torch.float64)
    monkeypatch.setitem(muon.BATCHED_SIDE, torch.float64, 64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


OPTIMIZERS = [
    *({"rule": rule, "ns_dtype": "fp32"} for rule in ("mup", "paper", "moonlight", "standard")),
    {"ns": "polar-express", "ns_steps": 4, "ns_dtype": "fp32"},
    {"nesterov": False, "momentum": 0.8, "ns_dtype": "bf16"},
    *({"name": "adamw", "rule": rule, "betas": (0.8, 0.9)} for rule in ("mup", "standard")),
]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("settings", "schedule", "model"),
    [
        (settings, schedule, {"tied": number % 2 == 0, "heads_per_kv": 1 + number % 2})
        for number, (settings, schedule) in enumerate(
            zip(OPTIMIZERS, itertools.cycle(("cosine", "wsd", "constant")), strict=False)
        )
    ],
)
def test_a_pack_trains_as_its_trials_alone(
    corpus_file: Path, settings: Any, schedule: str, model: Any
) -> None:
    """Ten steps in float64, where another computation cannot hide in the rounding."""
    config = trial_config(
        corpus_file,
        model=gpt_config(**model),
        optimizer=OptimizerConfig(**settings),
        steps=10,
        evals=2,
        schedule=schedule,
    )
    trials = pack_of(32, muon_axes=config.optimizer.name == "muon")
    assert not obstacle(config, trials[0])
    alone = [train(config, trial) for trial in trials]
    assert len({result.loss for result in alone}) == 3
    # bf16 rounds differences of 1e-16 to the next of its numbers, rarely; the rest is exact
    tolerance = 1e-4 if settings.get("ns_dtype") == "bf16" else 1e-11
    check_alike(list(train_pack(config, trials)), alone, tolerance)


@pytest.mark.parametrize(
    ("optimizer", "precision", "tolerance"),
    [
        ({"ns_dtype": "fp32"}, "fp32", 1e-5),
        ({}, "fp32", 5e-3),
        ({}, "bf16", 2e-2),
        ({"name": "adamw"}, "fp32", 1e-5),
    ],
)
def test_in_single_precision_within_what_the_readme_states(
    corpus_file: Path, optimizer: Any, precision: str, tolerance: float
) -> None:
    config = trial_config(
        corpus_file, optimizer=OptimizerConfig(**optimizer), steps=20, precision=precision
    )
    trials = pack_of(muon_axes="name" not in optimizer)
    assert not obstacle(config, trials[0])
    alone = [train(config, trial) for trial in trials]
    check_alike(list(train_pack(config, trials)), alone, tolerance)


@pytest.mark.usefixtures("double")
def test_one_that_diverges_leaves_and_the_others_do_not_notice(corpus_file: Path) -> None:
    config = trial_config(corpus_file, steps=12, optimizer=OptimizerConfig(ns_dtype="fp32"))
    calm, warm, wild = pack_of()
    burst = replace(wild, point=Point.of({**wild.point, "lr": 1e9}))
    pack = Pack(config, [calm, burst, warm])
    sizes, results = [], []
    while pack.members:
        results += pack.step()
        sizes.append(pack.stack.size if pack.members else 0)
    assert results[0].trial == burst
    assert results[0].status is Status.DIVERGED
    assert sizes[0] == 3
    assert sizes[-2] == 2
    assert all(block.value.shape[1] == 2 for block in pack.stack.blocks)  # the memory is freed
    check_alike(results, [train(config, trial) for trial in (calm, burst, warm)], 1e-9)


@pytest.mark.usefixtures("double")
def test_a_nan_stays_where_it_is(corpus_file: Path) -> None:
    """A trial whose weights are NaN: the losses of the others are those without it."""
    config = trial_config(corpus_file, steps=5, optimizer=OptimizerConfig(ns_dtype="fp32"))
    trials = pack_of()
    pack = Pack(config, trials)
    with torch.no_grad():
        for block in pack.stack.blocks:
            block.value[:, 1] = torch.nan
    results: list[Result] = []
    while pack.members:
        results += pack.step()
    assert results[0].trial == trials[1]
    assert "nan at step 1 " in results[0].reason
    check_alike(results[1:], [train(config, trial) for trial in (trials[0], trials[2])], 1e-11)


@pytest.mark.usefixtures("double")
def test_losses_that_are_read_late_end_a_trial_where_it_diverged(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where a trial trains on for some steps before anybody knows."""
    config = trial_config(corpus_file, steps=12, optimizer=OptimizerConfig(ns_dtype="fp32"))
    calm, warm, wild = pack_of()
    burst = replace(wild, point=Point.of({**wild.point, "lr": 1e9}))
    trials = [calm, burst, warm]
    pack = Pack(config, trials)
    monkeypatch.setattr("telescope.packs.fused.reads_every", lambda device: 5)
    results: list[Result] = []
    while pack.members:
        results += pack.step()
    check_alike(results, [train(config, trial) for trial in trials], 1e-9)


def test_the_seconds_of_a_pack_add_up(corpus_file: Path) -> None:
    import time

    start = time.perf_counter()
    results = list(train_pack(trial_config(corpus_file, steps=8), pack_of()))
    wall = time.perf_counter() - start
    total = sum(result.seconds for result in results)
    assert 0.5 * wall < total <= wall


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (bag("torch.nn.Dropout(0.1)"), "random numbers"),
        (bag("Own()", "self.mean += x.mean().detach()\n        return x"), "changes its buffers"),
        (bag("Own()", "return x if x.sum() > 0 else -x"), "does not take stacked parameters"),
        (bag("Own()", "return x * x.abs().max().item()"), "does not take stacked parameters"),
        (bag(SPARE), "no part"),
    ],
)
def test_a_model_that_cannot_be_stacked_says_why(
    corpus_file: Path, model: ModelConfig, reason: str
) -> None:
    config = trial_config(corpus_file, model=model)
    assert reason in obstacle(config, pack_of()[0])
    assert train(config, pack_of()[0]).loss is not None


def test_what_acts_otherwise_when_stacked_is_noticed(corpus_file: Path) -> None:
    body = "self.calls = getattr(self, 'calls', 0) + 1\n        return x * self.calls"
    config = trial_config(corpus_file, model=bag("Own()", body))
    assert "stacked, " in obstacle(config, pack_of()[0])


KEYS_WITH_BIAS = """
import mup, torch

class Attention(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q = torch.nn.Linear(width, width)
        self.k = torch.nn.Linear(width, width)
        self.v = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x):
        n = self.norm(x)
        heads = [p(n).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        mixed = attend(*heads, is_causal=True, scale=1 / 8)
        return x + mixed.transpose(1, 2).flatten(2)

def build(width, *, vocab_size):
    return torch.nn.Sequential(
        torch.nn.Embedding(vocab_size, width),
        Attention(width),
        Attention(width),
        mup.MuReadout(width, vocab_size, bias=False),
    )
"""


@pytest.mark.parametrize(("precision", "width"), [("fp32", 16), ("fp32", 64), ("bf16", 256)])
def test_a_gradient_of_nothing_but_rounding_is_no_obstacle(
    corpus_file: Path, precision: str, width: int
) -> None:
    """A bias of the keys moves all scores of a query alike, and softmax takes it away."""
    model = ModelConfig(name="keys.py", text=KEYS_WITH_BIAS, kwargs={"vocab_size": 256})
    config = trial_config(
        corpus_file, model=model, precision=precision, batch_size=16, sequence_length=64
    )
    assert not obstacle(config, pack_of(width)[0])


ONCE = "if not hasattr(self, 'table'):\n            self.table = "
TABLE = "torch.cos(self.mean + torch.arange(x.shape[-2]))[:, None]\n        return x * self.table"


@pytest.mark.usefixtures("double")
def test_a_table_that_is_computed_once_outlives_the_trials_that_leave(corpus_file: Path) -> None:
    """It depends on a buffer, of which a stack has one per trial."""
    settings = OptimizerConfig(ns_dtype="fp32")
    model = bag("Own()", ONCE + TABLE)
    config = trial_config(corpus_file, model=model, steps=5, optimizer=settings)
    calm, warm, wild = pack_of()
    trials = [calm, replace(wild, point=Point.of({**wild.point, "lr": 1e9})), warm]
    assert not obstacle(config, calm)
    alone = [train(config, trial) for trial in trials]
    assert alone[1].status is Status.DIVERGED
    check_alike(list(train_pack(config, trials)), alone, 1e-9)


def test_a_table_that_a_stack_fills_is_an_obstacle(corpus_file: Path) -> None:
    """At the third call: nothing has asked for it before."""
    count = "self.calls = getattr(self, 'calls', 0) + 1\n        "
    late = "if self.calls < 3:\n            return x * " + TABLE.split("\n")[0] + "\n        "
    config = trial_config(corpus_file, model=bag("Own()", count + late + ONCE + TABLE))
    assert "does not take stacked parameters" in obstacle(config, pack_of()[0])


def test_a_table_of_one_trials_weights_is_noticed(corpus_file: Path) -> None:
    body = ONCE + "1 + 10 * x.detach()[0, 0, 0].item()\n        return x * self.table"
    config = trial_config(corpus_file, model=bag("Own()", body))
    assert "stacked, " in obstacle(config, pack_of()[0])


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_out(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_a_batch_that_several_trials_see_is_moved_once(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack's seeds are 0, 0 and 3."""
    sizes: list[int] = []

    def noting(tokens: torch.Tensor, device: str) -> torch.Tensor:
        sizes.append(tokens.numel())
        return tokens.to(device)

    monkeypatch.setattr("telescope.packs.fused.moved", noting)
    pack = Pack(trial_config(corpus_file), pack_of())
    pack.step()
    assert sizes == [2 * 4 * 16, 2 * 4 * 16, 3]  # two batches, and whose each is
    inputs, targets = pack._batches([1, 1, 1])
    for k, member in enumerate(pack.members):
        assert torch.equal(inputs[k], member.batches.at(1)[0])
        assert torch.equal(targets[k], member.batches.at(1)[1])


def test_a_compiled_step_is_of_one_trial(corpus_file: Path) -> None:
    assert "train.compile" in obstacle(trial_config(corpus_file, compile=True), pack_of()[0])


@pytest.mark.usefixtures("double")
def test_a_model_of_plain_layers_with_biases_is_stacked(corpus_file: Path) -> None:
    config = trial_config(corpus_file, model=bag(bias=True))
    assert not obstacle(config, pack_of()[0])
    alone = [train(config, trial) for trial in pack_of()]
    check_alike(list(train_pack(config, pack_of())), alone, 1e-4)


def kept(config: TrialConfig, folder: Path, every: int) -> TrialConfig:
    folder.mkdir(exist_ok=True)
    train_table = replace(config.train, checkpoint_every=every)
    return replace(config, train=train_table, checkpoint_folder=str(folder))


@pytest.mark.usefixtures("double")
def test_checkpoints_are_those_of_a_trial_alone(corpus_file: Path, tmp_path: Path) -> None:
    """Stop a pack, and go on alone; stop trials alone at different steps, and go on as a pack."""
    plain = trial_config(corpus_file, steps=12, optimizer=OptimizerConfig(ns_dtype="fp32"))
    trials = pack_of()
    whole = [train(plain, trial) for trial in trials]

    config = kept(plain, tmp_path / "pack", 4)
    pack = Pack(config, trials)
    for _ in range(9):
        pack.step()
    check_alike([_resumed(config, trial, 8) for trial in trials], whole, 1e-11)

    config = kept(plain, tmp_path / "alone", 2)
    for trial, last in zip(trials[:2], (10, 4), strict=True):
        pack = Pack(config, [trial])  # and the third has none
        for _ in range(last):
            pack.step()
    pack = Pack(config, trials)
    assert [member.position.step for member in pack.members] == [10, 4, 0]
    results: list[Result] = []
    while pack.members:
        results += pack.step()
    assert [result.trial for result in results] == trials  # each ends when it is done
    check_alike(results, whole, 1e-11)


class Killed(BaseException):
    """No `Exception`: nothing is to handle it."""


def test_a_pack_killed_before_any_write_ends_as_it_would_have(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun again from what lies there, to the last bit, although a step depends on who is in it.

    On an accelerator its rounding does; here a step is made to.
    """
    take_step = Stack.update

    def update(stack: Stack, *arguments: Any) -> None:
        take_step(stack, *arguments)
        for block in stack.blocks:
            block.value.data.mul_(1 - 1e-4 * stack.size)

    def note_step(position: Position, loss: float, table: TrainConfig, *rest: Any) -> str:
        ends = table.warmup == AXES["warm"][2] and position.step == 4
        return loop.note_step(position, math.nan if ends else loss, table, *rest)

    writes, last = itertools.count(), 10**9

    def counted(write: Callable[..., None]) -> Callable[..., None]:
        def counting(*arguments: Any, **options: Any) -> None:
            if next(writes) == last:
                raise Killed
            write(*arguments, **options)

        return counting

    monkeypatch.setattr(Stack, "update", update)
    monkeypatch.setattr(fused, "note_step", note_step)
    for name in ("write_atomic", "write_json"):
        monkeypatch.setattr(checkpoint, name, counted(getattr(checkpoint, name)))
    plain = trial_config(corpus_file, steps=10)
    whole = {r.trial: r for r in train_pack(kept(plain, tmp_path / "whole", 2), pack_of())}
    assert [r.status for r in whole.values()].count(Status.DIVERGED) == 1
    for number in range(next(writes)):
        config = kept(plain, tmp_path / str(number), 2)
        writes, last = itertools.count(), number
        with pytest.raises(Killed):
            list(train_pack(config, pack_of()))
        last = 10**9
        results = list(train_pack(config, pack_of()))
        assert len(results) == len(whole)
        for result in results:
            assert replace(result, seconds=0.0) == replace(whole[result.trial], seconds=0.0)
            assert result.curve == whole[result.trial].curve


def test_alone_too_a_trial_that_had_ended_is_not_trained_again(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(trial_config(corpus_file, steps=4), flops_per_step={16: 7.0})
    config = kept(plain, tmp_path / "kept", 2)
    trial, other = pack_of()[:2]
    kept_by = checkpoints_of(config, trial)
    assert kept_by
    kept_by.save_end(Position(step=3, curve=[CurvePoint(3, None, None)], seconds=2.0), "by hand")
    assert train(config, trial) == Result(
        trial, Status.DIVERGED, reason="by hand", flops=21.0, seconds=2.0
    )
    assert train(config, other).status is Status.COMPLETE
    changed = replace(config, train=replace(config.train, batch_size=2))
    assert train(changed, trial).status is Status.COMPLETE  # another training's end is none of its


def _resumed(config: TrialConfig, trial: Trial, step: int) -> Result:
    assert Pack(config, [trial]).members[0].position.step == step
    return train(config, trial)


def test_a_probe_measures_a_pack(corpus_file: Path) -> None:
    probe = pack_probe(trial_config(corpus_file, steps=3), pack_of())
    assert probe.gain > 0
    assert probe.most(1.0) == float("inf")  # a CPU's memory is not measured
    assert PackedTrainer(trial_config(corpus_file)).probe_pack(pack_of()) is None


SHAPES = [
    # query, key and value, mask, per trial
    ((2, 4, 5, 8), (2, 4, 5, 8), None),
    ((2, 4, 5, 8), (2, 2, 5, 8), None),  # grouped
    ((2, 5, 8), (2, 7, 8), None),
    ((3, 2, 4, 5, 8), (1, 2, 4, 7, 8), (5, 7)),
    ((2, 4, 5, 8), (2, 4, 7, 8), (5, 7)),
    ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 5, 7)),
    ((3, 2, 5, 8), (2, 7, 8), None),  # no batch, and as many trials as the queries' batch has
    ((2, 4, 5, 8), (1, 7, 8), (2, 1, 5, 7)),
    ((2, 5, 8), (7, 8), None),
]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("query", "key", "mask"), SHAPES)
@pytest.mark.parametrize("per_trial", [(0, 0, 0, 0), (0, None, 1, None), (None, 0, 0, 0)])
def test_folded_attention_is_attention_trial_by_trial(
    query: Any, key: Any, mask: Any, per_trial: Any
) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Any, dim: int | None) -> torch.Tensor:
        size = list(shape)
        if dim is not None:
            size.insert(dim, 3)
        return torch.randn(size, generator=generator).requires_grad_()

    tensors = [drawn(s, d) for s, d in zip((query, key, key), per_trial, strict=False)]
    if mask:
        tensors.append(drawn(mask, per_trial[3]))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *m: torch.Tensor) -> torch.Tensor:
        grouped = len(query) == 4 and query[1] != key[1]
        return functional.scaled_dot_product_attention(
            q, k, v, m[0] if m else None, is_causal=not m, enable_gqa=grouped, scale=0.3
        )

    dims = per_trial[: len(tensors)]
    with Folded():
        folded = torch.vmap(attend, in_dims=dims)(*tensors)
    one_by_one = torch.stack(
        [
            attend(
                *(t if d is None else t.select(d, k) for t, d in zip(tensors, dims, strict=True))
            )
            for k in range(3)
        ]
    )
    torch.testing.assert_close(folded, one_by_one)
    weights = torch.randn(folded.shape, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad((folded * weights).sum(), tensors),
        torch.autograd.grad((one_by_one * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("per_trial", [0, None])
def test_attention_that_drops_out_is_not_folded(per_trial: int | None) -> None:
    """Its draws are one trial's: nothing that looks at random states must be what notices."""
    query = torch.ones(2, 1, 3, 4)
    shared = torch.ones(1, 3, 4)

    def attend(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        mixed = functional.scaled_dot_product_attention(q, shared, shared, dropout_p=0.5)
        return scale * mixed

    with Folded(), pytest.raises(NotImplementedError, match=r"dropout_p = 0\.5"):
        torch.vmap(attend, in_dims=(per_trial, 0))(query, torch.ones(2))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("per_trial", list(itertools.product((0, None), repeat=3))[:-1])
def test_folded_linear_is_linear_trial_by_trial(per_trial: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 4), (6, 4), (6,))
    tensors = [
        torch.randn(s if d is None else (3, *s), generator=generator).requires_grad_()
        for s, d in zip(shapes, per_trial, strict=True)
    ]
    with Folded():
        folded = torch.vmap(functional.linear, in_dims=per_trial)(*tensors)
    x, w, b = (
        t.expand(3, *t.shape) if d is None else t for t, d in zip(tensors, per_trial, strict=True)
    )
    product = torch.einsum("kbti,koi->kbto", x, w) + b[:, None, None]
    torch.testing.assert_close(folded, product)
    for mine, theirs in zip(
        torch.autograd.grad(folded.square().sum(), tensors),
        torch.autograd.grad(product.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("double")
def test_what_all_trials_share_has_its_gradient_too() -> None:
    """Calls in which nothing is per trial: vmap passes them to the plain functions."""
    shared = [torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3)]
    scales = torch.tensor([1.0, 2.0])

    def scaled(scale: torch.Tensor) -> torch.Tensor:
        mixed = functional.scaled_dot_product_attention(
            shared[0], shared[1], shared[2], is_causal=True
        )
        return scale * functional.linear(mixed, shared[0][0, 0]).square().sum()

    with Folded():
        folded = torch.vmap(scaled)(scales)
    plain = torch.stack([scaled(scale) for scale in scales])
    torch.testing.assert_close(folded, plain)
    for mine, theirs in zip(
        torch.autograd.grad(folded.sum(), shared),
        torch.autograd.grad(plain.sum(), shared),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("per_trial", [(0, 0), (0, None), (None, 0), (2, 1)])
def test_folded_norm_is_the_norm_trial_by_trial(per_trial: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for shape, dim in zip(((2, 5, 4), (4,)), per_trial, strict=True):
        size = list(shape)
        if dim is not None:
            size.insert(dim, 3)
        tensors.append(torch.randn(size, generator=generator).requires_grad_())

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (4,), gain, 1e-3)

    with Folded():
        folded = torch.vmap(norm, in_dims=per_trial)(*tensors)
    x, gain = (
        t.expand(3, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, per_trial, strict=True)
    )
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain[:, None, None]
    torch.testing.assert_close(folded, plain)
    weights = torch.randn(folded.shape, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad((folded * weights).sum(), tensors),
        torch.autograd.grad((plain * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
