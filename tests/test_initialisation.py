"""Owners of the start: the program of what muP scales, the model file of all else."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line, trial_config
from own_models import OWN, own
from torch import Tensor

from telescope.config import ModelConfig, OptimizerConfig, TrainConfig
from telescope.errors import ModelError
from telescope.packs.fused import obstacle, train_pack
from telescope.records import Point, Result, Trial
from telescope.rules.groups import parameter_groups
from telescope.train.flops import step_cost
from telescope.train.loop import Setup, set_up, take_step, train
from telescope.train.model import TaggedModel, build_meta, build_model

FROZEN = {"positions.weight", "plain_table", "features", "codes"}
POINT = Point.of(lr=0.02, weight_decay=0.3)


def built(config: ModelConfig, width: int = 32, seed: int = 0) -> TaggedModel:
    return build_model(
        config, width=width, base_width=16, seed=seed, optimizer="muon", rule="mup", device="cpu"
    )


def values_of(config: ModelConfig, width: int = 32, seed: int = 0) -> dict[str, Tensor]:
    module = built(config, width, seed).module
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [16, 64])
def test_what_mup_does_not_scale_starts_as_the_file_has_it(width: int, tied: bool) -> None:
    values = values_of(own(tied=tied), width)
    constants = {
        "norm.weight": 0.0,  # x · (1 + weight)
        "layer_norm.weight": 1.0,
        "layer_norm.bias": 0.0,
        "slope.weight": 0.25,
        "layer_scale": 1e-4,
        "alpha": 0.0,
        "gate.bias": -2.0,
        "scalars.0": 0.0,
        "scalars.1": 0.1,
        "scalars.2": 0.2,
        # torch's own draw, or a copy of it, is no wish of the file
        "first.bias": 0.0,
        "down.bias": 0.0,
        "by_hand.bias": 0.0,
        **({} if tied else {"readout.bias": 0.0}),
    }
    for name, value in constants.items():
        assert torch.equal(values[name], torch.full_like(values[name], value)), name
    assert torch.equal(values["decay"], torch.linspace(-6, -1, width))
    for name in ("token", "other", "dice"):
        assert len(set(values[name].tolist())) == width
    assert torch.equal(values["plain_table"][:, 1], torch.arange(64.0).cos())
    assert torch.equal(values["positions.weight"], values["plain_table"])
    assert values["features"].std().item() == pytest.approx(1 / width, rel=0.2)


@pytest.mark.parametrize("tied", [False, True])
def test_what_mup_scales_starts_as_the_rules_say(tied: bool) -> None:
    values = values_of(own(tied=tied), 64)
    embedding = values["embedding.weight"]
    assert not embedding[3].any()  # the padding row
    rest = torch.cat((embedding[:3], embedding[4:]))
    assert rest.std().item() == pytest.approx(0.02 if tied else 1.0, rel=0.05)
    for name in ("first.weight", "gate.weight", "by_hand.weight", "up.weight"):
        assert values[name].std().item() == pytest.approx(1 / 8, rel=0.1)
    assert not values["down.weight"].any()
    assert tied or not values["readout.weight"].any()


def test_a_seed_is_the_same_start_whatever_was_drawn_before() -> None:
    config = own()
    first = values_of(config, seed=5)
    torch.randn(7), random.random(), np.random.rand()
    assert random.random() != random.Random(5).random()  # the global state is not left seeded
    again, other = values_of(config, seed=5), values_of(config, seed=6)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    for name in ("token", "other", "dice", "features", "embedding.weight", "up.weight"):
        assert not torch.equal(first[name], other[name]), name


def test_a_file_that_seeds_itself_still_has_no_drawn_biases() -> None:
    text = OWN.replace("    return Own(", "    torch.manual_seed(0)\n    return Own(")
    assert "manual_seed" in text
    values = values_of(own(text))
    assert not values["first.bias"].any()
    assert not values["by_hand.bias"].any()
    assert (values["gate.bias"] == -2).all()
    assert torch.equal(values["decay"], torch.linspace(-6, -1, 32))


def test_a_vector_that_nobody_gave_a_value_is_refused() -> None:
    text = OWN.replace("nn.Parameter(torch.zeros(width))", "nn.Parameter(torch.empty(width))")
    with pytest.raises(ModelError, match=r"^own.py: norm.weight: has no start: ") as caught:
        built(own(text))
    one_line(caught.value)
    # A bias beside a matrix has one: zero.
    text = OWN.replace("nn.init.uniform_(self.bias, -(width**-0.5), width**-0.5)", "pass")
    assert not values_of(own(text))["by_hand.bias"].any()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_frozen_has_no_group_and_is_not_counted() -> None:
    tags = build_meta(own(), width=32, base_width=16).tags
    names = {name for name, _ in built(own()).module.named_parameters()}
    assert set(tags) == names - FROZEN
    groups = parameter_groups(tags, POINT, OptimizerConfig())
    assert {name for group in groups for name in group.names} == set(tags)
    thawed = own(OWN.replace(", requires_grad=False)\n        self.codes", ")\n        self.codes"))
    train = TrainConfig(steps=1, batch_size=1, sequence_length=16)
    frozen_cost, thawed_cost = (
        step_cost(config, train, OptimizerConfig(), width=32, base_width=16)
        for config in (own(), thawed)
    )
    assert thawed_cost.parameters - frozen_cost.parameters == 32 * 32  # the features
    assert thawed_cost.model - frozen_cost.model == 2 * 16 * 32 * 32  # their gradient
    assert thawed_cost.optimizer > frozen_cost.optimizer


def test_a_frozen_readout_is_multiplied_as_the_rule_says() -> None:
    head = "    def forward(self, tokens):"
    text = OWN.replace(head, f"        self.readout.weight.requires_grad_(False)\n\n{head}")
    for tied in (False, True):
        tagged = built(own(text, tied=tied), 64)
        readout: Any = tagged.module.get_submodule("readout")
        assert "readout.weight" not in tagged.tags
        assert ("embedding.weight" in tagged.tags) == (not tied)
        assert readout.weight.any()  # as the file has it
        x = torch.randn(3, 64)
        bias = 0 if tied else readout.bias
        torch.testing.assert_close(readout(x), x @ readout.weight.T / 4 + bias)


def test_a_model_without_anything_to_train_is_refused() -> None:
    text = OWN.replace(
        "    return Own(width, vocab_size, tied)",
        "    return nn.Linear(width, width).requires_grad_(False)",
    )
    with pytest.raises(ModelError, match="no parameter is trained"):
        built(own(text))


def frozen_of(setup: Setup) -> dict[str, Tensor]:
    named = setup.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if not p.requires_grad}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_what_is_frozen_stays_in_training(corpus_file: Path, name: Any) -> None:
    optimizer = OptimizerConfig(name=name)
    config = trial_config(corpus_file, model=own(), optimizer=optimizer)
    setup = set_up(config, Trial(32, POINT, 0))
    before, row = frozen_of(setup), setup.model.get_parameter("embedding.weight")[3]
    assert set(before) == FROZEN
    for step in range(3):
        take_step(setup.model, setup.optimizers, setup.batches, setup.train, step, setup.device)
    for parameter, value in frozen_of(setup).items():
        assert torch.equal(value, before[parameter]), parameter
    assert not row.any()
    assert setup.model.get_parameter("alpha").item() != 0


def losses(result: Result) -> list[float | None]:
    return [row.train_loss for row in result.curve] + [result.loss]


@pytest.mark.parametrize("tied", [False, True])
def test_a_pack_starts_and_freezes_as_its_trials_alone(corpus_file: Path, tied: bool) -> None:
    """Frozen features are drawn, so that each seed has its own."""
    config = trial_config(
        corpus_file, model=own(tied=tied), optimizer=OptimizerConfig(ns_dtype="fp32")
    )
    trials = [Trial(32, replace_lr(lr), seed) for lr, seed in ((0.01, 0), (0.03, 1), (0.02, 2))]
    assert obstacle(config, trials[0]) == ""
    alone = {trial: losses(train(config, trial)) for trial in trials}
    for result in train_pack(config, trials):
        assert losses(result) == pytest.approx(alone[result.trial], rel=2e-4)


def replace_lr(lr: float) -> Point:
    return Point.of({**POINT, "lr": lr})


def test_a_resumed_trial_has_the_same_start(corpus_file: Path, tmp_path: Path) -> None:
    config = trial_config(corpus_file, model=own(), checkpoint_every=2)
    trial = Trial(32, POINT, 1)
    alone = losses(train(config, trial))
    kept = replace(config, checkpoint_folder=str(tmp_path))
    assert losses(train(kept, trial)) == alone
    assert losses(train(kept, trial)) == alone  # from its last checkpoint


PARAMETRIZED = """
import mup, torch
from torch import nn
from torch.nn.utils import parametrizations

class Model(nn.Module):
    def __init__(self, width, vocab_size, kind):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.hidden, self.end = nn.Linear(width, width), nn.Linear(width, width)
        self.end.residual_output = True
        self.readout = mup.MuReadout(width, vocab_size)
        if kind == "spectral":
            parametrizations.spectral_norm(self.hidden)
        elif kind == "weight norm":
            parametrizations.weight_norm(self.hidden)
        elif kind == "readout":
            parametrizations.spectral_norm(self.readout)
        elif kind == "end":
            torch.nn.utils.parametrize.register_parametrization(self.end, "weight", nn.Identity())

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.readout(x + self.end(self.hidden(x)))

def build(width, *, vocab_size, kind):
    return Model(width, vocab_size, kind)
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weight norm", r"parametrizations.weight.original0: .*a factor per output"),
        ("readout", r"readout.bias: a readout under a torch param"),
    ],
)
def test_a_parametrization_that_has_no_role_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        built(own(PARAMETRIZED, kind=kind))
    one_line(caught.value)


def test_what_a_parametrization_makes_a_weight_of_is_the_layers() -> None:
    spectral = built(own(PARAMETRIZED, kind="spectral"))
    name = "hidden.parametrizations.weight.original"
    assert spectral.tags[name].role == "hidden"
    assert spectral.module.get_parameter(name).std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert not spectral.module.get_parameter("hidden.bias").any()
    end = built(own(PARAMETRIZED, kind="end"))
    assert end.tags["end.parametrizations.weight.original"].role == "residual"


def test_attentions_own_vectors_are_kept() -> None:
    text = """
import mup, torch
from torch import nn

def build(width, *, vocab_size):
    attention = nn.MultiheadAttention(width, 2, batch_first=True)
    attention.out_proj.residual_output = True
    return nn.ModuleList((nn.Embedding(vocab_size, width), attention, nn.LSTM(width, width),
        nn.BatchNorm1d(width), nn.GroupNorm(2, width), mup.MuReadout(width, vocab_size)))
"""
    tagged = built(own(text))
    roles = {name: str(tag.role) for name, tag in tagged.tags.items()}
    assert roles["1.in_proj_weight"] == "hidden"
    assert roles["1.out_proj.weight"] == "residual"
    values = dict(tagged.module.named_parameters())
    for name in ("1.in_proj_bias", "1.out_proj.bias", "2.bias_ih_l0", "2.bias_hh_l0", "3.bias"):
        assert not values[name].any(), name
    assert (values["3.weight"] == 1).all()
    assert (values["4.weight"] == 1).all()
