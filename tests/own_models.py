"""A model file of a user's own, in which parameters start in every way there is."""

from __future__ import annotations

from typing import Any

from telescope.config import ModelConfig

OWN = """
import math, random
import mup, numpy, torch
from torch import nn
from torch.nn import functional as F

class ZeroCentred(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)

class OwnLinear(nn.Module):
    "As nn.Linear draws, written by hand."
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width))
        nn.init.uniform_(self.bias, -(width**-0.5), width**-0.5)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

class Own(nn.Module):
    def __init__(self, width, vocab_size, tied):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=3)
        self.positions = nn.Embedding(64, width)
        angles = torch.outer(torch.arange(64), 1e-4 ** (torch.arange(0, width, 2) / width))
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
        self.positions = nn.Embedding.from_pretrained(table)
        self.plain_table = nn.Parameter(table.clone(), requires_grad=False)
        self.features = nn.Parameter(torch.randn(width, width) / width, requires_grad=False)
        self.codes = nn.Parameter(torch.arange(5), requires_grad=False)
        self.first, self.norm = nn.Linear(width, width), ZeroCentred(width)
        self.gate, self.by_hand = nn.Linear(width, width), OwnLinear(width)
        nn.init.constant_(self.gate.bias, -2.0)
        self.down = nn.Linear(2 * width, width)
        self.down.residual_output = True
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.slope, self.layer_norm = nn.PReLU(), nn.LayerNorm(2 * width)
        self.layer_scale = nn.Parameter(1e-4 * torch.ones(width))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.scalars = nn.ParameterList(nn.Parameter(torch.full((1,), 0.1 * i)) for i in range(3))
        self.decay = nn.Parameter(torch.linspace(-6, -1, width))
        self.token = nn.Parameter(torch.randn(width))
        self.other = nn.Parameter(torch.from_numpy(numpy.random.rand(width).astype("float32")))
        self.dice = nn.Parameter(torch.tensor([random.random() for _ in range(width)]))
        self.no_gains = nn.LayerNorm(width, elementwise_affine=False)
        self.readout = (
            mup.MuSharedReadout(self.embedding.weight, bias=False)
            if tied
            else mup.MuReadout(width, vocab_size)
        )

    def forward(self, tokens):
        x = self.embedding(tokens) + self.token + self.other + self.dice
        x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = x + self.plain_table[: tokens.shape[1]] + x @ self.features + self.codes.sum() * 0
        h = self.norm(x)
        h = self.first(h) * self.gate(h).sigmoid() * self.decay.exp() + self.by_hand(h)
        h = self.down(self.layer_norm(self.slope(self.up(h))))
        x = x + self.alpha * self.layer_scale * h + sum(self.scalars) * h
        return self.readout(self.no_gains(x))

def build(width, *, vocab_size, tied=False):
    return Own(width, vocab_size, tied)
"""


def own(text: str = OWN, **kwargs: Any) -> ModelConfig:
    """A model file of this text, as the trainer takes it."""
    return ModelConfig(name="own.py", text=text, kwargs={"vocab_size": 256, **kwargs})
