"""Inputs of softmax: worked out as torch's own formula has it, and judged by their growth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt_config
from torch import Tensor, nn
from torch.nn import functional

from telescope.check import softmax as coordcheck_softmax
from telescope.check.coordcheck import Extent, coordinate_check
from telescope.check.softmax import SoftmaxInputs
from telescope.check.verdict import CoordCheck, Quantity
from telescope.config import (
    PYTHON_STDLIB,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrialConfig,
)
from telescope.data.corpus import load_corpus
from telescope.records import Point
from telescope.sweep.checking import describe_verdict

LENGTH, SIZE = 6, 5
LOGITS = Quantity("attention", is_softmax=True)
SEEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def heads(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, LENGTH, SIZE, generator=generator)


Q, K, V = heads(4, 0), heads(4, 1), heads(4, 2)


class Attention(nn.Module):
    """Calls what it is given, and splits its features as attention does."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k = (x.transpose(1, 2).flatten(2).unflatten(2, (-1, SIZE)) for x in (q, k))  # type: ignore[no-untyped-call]
        return self.attend(q.transpose(1, 2), k.transpose(1, 2), v)


def watched(attend: Any, q: Tensor = Q, k: Tensor = K, v: Tensor = V) -> SoftmaxInputs:
    model = nn.ModuleDict({"attention": Attention(attend)})
    inputs = SoftmaxInputs(model, __file__)
    with inputs.watching(), torch.no_grad():
        model["attention"](q, k, v)
    return inputs


def by_hand(scale: float = SIZE**-0.5, q: Tensor = Q, k: Tensor = K) -> Tensor:
    """Logits of what is seen, in order."""
    return torch.einsum("bhqe,bhke->bhqk", q, k)[SEEN.expand(2, 4, -1, -1)] * scale


def sdpa(*args: Any, **kwargs: Any) -> Any:
    return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, *args, **kwargs)


def product(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(SIZE)).masked_fill(~SEEN, -math.inf)


@pytest.mark.parametrize(
    "attend",
    [
        sdpa(is_causal=True),
        sdpa(SEEN),
        sdpa(attn_mask=torch.zeros(LENGTH, LENGTH).masked_fill(~SEEN, -math.inf)),
        sdpa(torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~SEEN, -1e4)),
        sdpa(SEEN, scale=SIZE**-0.5),
        lambda q, k, v: functional.softmax(product(q, k), dim=-1) @ v,
        lambda q, k, v: torch.softmax(product(q, k), 3) @ v,
        lambda q, k, v: product(q, k).softmax(dim=-1) @ v,
        lambda q, k, v: torch.softmax(input=product(q, k), dim=-1) @ v,
        lambda q, k, v: nn.Softmax(-1)(product(q, k).clamp(min=-1e9)) @ v,
        lambda q, k, v: product(q, k).mT.softmax(-2).mT @ v,
    ],
)
def test_the_logits_of_attention_in_every_spelling(attend: Any) -> None:
    found = watched(attend).logits
    assert list(found) == [LOGITS]
    torch.testing.assert_close(found[LOGITS], by_hand())


def test_another_scale_and_grouped_heads() -> None:
    scaled = watched(sdpa(is_causal=True, scale=1 / SIZE)).logits
    torch.testing.assert_close(scaled[LOGITS], by_hand(1 / SIZE))
    k, v = heads(2, 1), heads(2, 2)
    grouped = watched(sdpa(is_causal=True, enable_gqa=True), k=k, v=v).logits
    expected = by_hand(k=k[:, [0, 0, 1, 1]])  # two queries of four share a key
    torch.testing.assert_close(grouped[LOGITS], expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_own_module(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4 * SIZE, 4, batch_first=batch_first, bias=bias).eval()
    x = torch.randn(2, LENGTH, 4 * SIZE)
    inputs = SoftmaxInputs(module, __file__)
    given = x if batch_first else x.transpose(0, 1)
    with inputs.watching(), torch.no_grad():
        module(given, given, given, attn_mask=~SEEN, need_weights=False)
    projected = functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, _ = (part.unflatten(-1, (4, SIZE)).transpose(1, 2) for part in projected.chunk(3, -1))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(inputs.logits[Quantity("", is_softmax=True)], by_hand(q=q, k=k))


def test_what_is_taken_of_a_long_sequence_is_even_and_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordcheck_softmax, "ELEMENTS", 2 * 4 * LENGTH * 2)
    every = [2, 5]  # two of six queries, the last among them
    expected = torch.cat(
        [
            (Q[b, h, i] @ K[b, h, : i + 1].T) * SIZE**-0.5
            for b in range(2)
            for h in range(4)
            for i in every
        ]
    )
    for attend in (sdpa(is_causal=True), lambda q, k, v: product(q, k).softmax(-1) @ v):
        found = watched(attend).logits[LOGITS]
        torch.testing.assert_close(found, expected)


def test_two_softmaxes_in_a_module_are_told_apart_by_their_lines(tmp_path: Path) -> None:
    file = str(tmp_path / "mine.py")
    scope: dict[str, Any] = {}
    text = "def attend(q, k, v):\n    a = q.softmax(-1)\n    return a + v.softmax(-1)\n"
    exec(compile(text, file, "exec"), scope)
    model = nn.ModuleDict({"attention": Attention(scope["attend"])})
    inputs = SoftmaxInputs(model, file)
    with inputs.watching():
        model["attention"](Q, K, V)
    names = [f"attention line {line} softmax input" for line in (2, 3)]
    assert [quantity.name for quantity in inputs.logits] == names
    torch.testing.assert_close(next(iter(inputs.logits.values())), Q.flatten())


def test_heads_are_named_where_no_softmax_is_seen() -> None:
    unseen = watched(lambda q, k, v: (q @ k.mT).exp() @ v)
    assert unseen.unseen_heads == {"attention": SIZE}
    assert not unseen.logits
    assert not watched(sdpa()).unseen_heads


def test_what_does_not_take_being_watched_still_knows_its_heads() -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        product(q, k).softmax(-1)
        raise NotImplementedError("under a function mode")

    model = nn.ModuleDict({"attention": Attention(kernel)})
    inputs = SoftmaxInputs(model, __file__)
    with pytest.raises(NotImplementedError), inputs.watching():
        model["attention"](Q, K, V)
    assert (inputs.logits, inputs.unseen_heads) == ({}, {"attention": SIZE})


MODEL = '''
import torch
from mup import MuReadout
from torch import nn
from torch.nn import functional as F

class Attention(nn.Module):
    """Four heads, which grow with the width."""
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.out.residual_output = True
    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = ATTEND
        return self.out(mixed.transpose(1, 2).flatten(-2))

class Model(nn.Module):
    def __init__(self, width, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.layers = nn.ModuleList(Attention(width) for _ in range(2))
        self.readout = MuReadout(width, vocab_size, bias=False)
    def forward(self, tokens):
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.readout(self.norms[2](x))

def build(width, *, vocab_size):
    return Model(width, vocab_size)
'''


def checked(attend: str, extent: Extent) -> CoordCheck:
    text = MODEL.replace("ATTEND", attend)
    data = DataConfig(source=PYTHON_STDLIB)
    config = TrialConfig(
        model=ModelConfig(name="attention.py", text=text, kwargs={"vocab_size": 256}),
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(steps=50, batch_size=16, sequence_length=64),
        data=data,
        base_width=32,
        corpus_digest=load_corpus(data).digest,
    )
    return coordinate_check(config, Point.of(lr=0.004, weight_decay=0.1), extent)


def test_logits_that_grow_fail_and_divided_by_head_dim_they_pass() -> None:
    attend = "F.scaled_dot_product_attention(q, k, v, is_causal=True, scale={})"
    extent = Extent(steps=(3,), seeds=(0, 1))
    wrong = checked(attend.format("None"), extent)
    name = "layers.0 softmax input change"
    assert wrong.slopes[name] == pytest.approx(0.5, abs=0.2)
    assert "grows" in wrong.problems[name]
    assert "divide q·k by head_dim, not by its root" in wrong.problems[name]
    right = checked(attend.format("1 / q.shape[-1]"), extent)
    assert right.passed, right.problems
    assert right.steepest[1] < 0.25  # what may shrink is not called steep


def test_a_softmax_that_cannot_be_seen_is_warned_of() -> None:
    extent = Extent(width_factors=(1, 2), steps=(3,), seeds=(0, 1))
    unseen = checked("((q @ k.mT / q.shape[-1]).exp() @ v) / q.shape[2]", extent)
    assert unseen.unseen_heads == ("layers.0", "layers.1")
    assert "softmax in layers.0 and 1 others not seen" in unseen.blind_spot
    assert unseen.as_dict()["unseen_heads"] == ["layers.0", "layers.1"]
    if unseen.passed:
        assert unseen.blind_spot in describe_verdict(unseen)


def test_the_bundled_models_logits_are_watched_and_have_no_blind_spot() -> None:
    data = DataConfig(source=PYTHON_STDLIB)
    config = TrialConfig(
        model=gpt_config(heads_per_kv=2),
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=50, batch_size=8, sequence_length=32),
        data=data,
        base_width=16,
        corpus_digest=load_corpus(data).digest,
    )
    extent = Extent(width_factors=(1, 2, 4), steps=(3, 10), seeds=(0,))
    measured = coordinate_check(config, Point.of(lr=0.004, weight_decay=0.1), extent)
    assert measured.blind_spot == ""
    for kind in ("softmax input", "softmax input change"):
        assert measured.slopes[f"blocks.0.attention {kind}"] == pytest.approx(0, abs=0.15)
