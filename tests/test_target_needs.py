"""Memory of a target run's device: counted by hand, and by torch while a model runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import output, telescope
from conftest import gpt_config, trial_config
from torch.autograd.graph import saved_tensors_hooks

from telescope.config import ModelConfig
from telescope.records import Point
from telescope.target.needs import needs_of
from telescope.train.loop import token_loss
from telescope.train.model import build_model

POINT = Point.of(lr=0.02, weight_decay=0.1)
LINEAR = """
from mup import MuReadout
from torch import nn

class Model(nn.Module):
    def __init__(self, width, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.readout = MuReadout(width, vocab_size, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.readout(x)

def build(width, *, vocab_size):
    return Model(width, vocab_size)
"""


def test_counted_by_hand(corpus_file: Path) -> None:
    """Width 32, 256 tokens of vocabulary, 16 tokens a sequence, three linear layers, fp32."""
    config = trial_config(
        corpus_file, model=ModelConfig(name="linear.py", text=LINEAR, kwargs={"vocab_size": 256})
    )
    needs = needs_of(config, width=32, point=POINT, ranks=1)
    tables, hidden = 2 * 256 * 32, 3 * 32 * 32
    assert needs.parameters == needs.gradients == 4 * (tables + hidden)
    assert needs.optimizer_state == 4 * (2 * tables + hidden), "AdamW's two averages, Muon's one"
    activations = 4 * 16 * 32 * 4  # inputs of the three layers and of the readout
    loss = 4 * 16 * 256  # logarithms of the probabilities
    tokens = 8 * 16 * 1  # the embedding's, which are the targets too
    small = needs.per_sequence - (activations + loss + tokens)
    assert 0 <= small < 64, "what cross-entropy keeps besides"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("heads_per_kv", [1, 2])
def test_as_much_as_torch_saves_while_it_runs(
    precision: str, heads_per_kv: int, corpus_file: Path
) -> None:
    """But for attention, whose fused form on a CPU keeps the same kinds of tensors."""
    config = trial_config(
        corpus_file,
        model=gpt_config(depth=2, heads_per_kv=heads_per_kv),
        precision=precision,
        sequence_length=64,
    )
    needs = needs_of(config, width=32, point=POINT, ranks=1)
    model = build_model(
        config.model, width=32, base_width=16, seed=0, optimizer="muon", rule="mup", device="cpu"
    ).module
    found: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        found[base.untyped_storage().data_ptr()] = base
        return tensor

    tokens = torch.zeros(8, 64, dtype=torch.int64)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with saved_tensors_hooks(note, lambda tensor: tensor):
        token_loss(model, tokens, tokens, precision)
    real = sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in own)
    assert needs.casts + 8 * needs.per_sequence == pytest.approx(real, rel=0.1)


def test_layers_computed_twice_and_ranks_need_less(corpus_file: Path) -> None:
    config = trial_config(corpus_file, model=gpt_config(depth=8), sequence_length=64)
    alone = needs_of(config, width=64, point=POINT, ranks=1)
    assert alone.per_sequence_recomputed is not None
    assert alone.per_sequence_recomputed < 0.5 * alone.per_sequence
    eight = needs_of(config, width=64, point=POINT, ranks=8)
    assert eight.optimizer_state < 1.1 * alone.optimizer_state / 8
    assert replace(eight, optimizer_state=alone.optimizer_state) == alone


def test_the_plan_says_what_devices_need(tmp_path: Path) -> None:
    # Two layers of the large one, which is as wide, and a policy whose plan simulates no ladder.
    keys = ("train.precision=bf16", "model.depth=2", "ladder.policy=paper")
    large = ("essential-4b", *(word for key in keys for word in ("--set", key)))
    done = telescope("plan", *large, "--devices", "64", "--json", cwd=tmp_path)
    found, target = (json.loads(done.stdout)[key] for key in ("devices", "target"))
    assert found["number"] == 64
    assert found["bytes"]["parameters"] == pytest.approx(4 * target["parameters"], rel=1e-2)
    assert found["bytes"]["casts"] == pytest.approx(found["bytes"]["parameters"] / 2, rel=1e-2)
    assert found["seconds"] == pytest.approx(target["flops"] / (64 * 4e14))
    small = ("plan", "quickstart", "--set", "train.precision=bf16")
    said = output(tmp_path, *small, "--devices", "64")
    assert "each of 64 in bf16: 0.00577 GB of parameters" in said
    assert "devices" not in json.loads(output(tmp_path, *small, "--json"))
