"""The table of width rules against hand-written numbers, exponents visible; roles and starts.

Other routes: SCIENCE's table as literal numbers at r = 4, mup's own infshapes, sampled standard
deviations.
"""

from __future__ import annotations

import math

import mup
import pytest
import torch
from conftest import gpt_config
from torch import Tensor, nn

from telescope.config import ModelConfig
from telescope.errors import ModelError
from telescope.rules.parametrization import tag
from telescope.rules.scaling import Role, scaling
from telescope.train.model import build_meta, build_model

SQUARE = ((64, 64), (16, 16))  # r = 4
TALL = ((256, 64), (64, 16))  # r = 4, out/in stays 4

HAND = [
    # optimizer, rule, shapes, step per unit lr, decay per unit lr·wd
    ("muon", "mup", SQUARE, 0.2 * 16**0.5, 1),
    ("muon", "mup", TALL, 0.2 * 64**0.5, 1),
    ("muon", "paper", SQUARE, 0.2 * 64**0.5 / 4, 1 / 4),
    ("muon", "paper", TALL, 0.2 * 256**0.5 / 4, 1 / 4),
    ("muon", "moonlight", SQUARE, 0.2 * 64**0.5, 1),
    ("muon", "moonlight", TALL, 0.2 * 256**0.5, 1),
    ("muon", "standard", SQUARE, 0.2 * 64**0.5, 1),
    ("adamw", "mup", SQUARE, 1 / 4, 1),
    ("adamw", "mup", TALL, 1 / 4, 1),
    ("adamw", "standard", SQUARE, 1, 1),
]


@pytest.mark.parametrize(("optimizer", "rule", "shapes", "lr", "decay"), HAND)
@pytest.mark.parametrize("role", [Role.HIDDEN, Role.RESIDUAL])
def test_hidden_matrices(
    role: Role,
    optimizer: str,
    rule: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    lr: float,
    decay: float,
) -> None:
    got = scaling(role, *shapes, optimizer=optimizer, rule=rule)
    assert got.lr == pytest.approx(lr, rel=1e-12)
    assert got.decay == pytest.approx(decay, rel=1e-12)
    assert got.init_std == (64**-0.5 if role is Role.HIDDEN else 0)
    assert got.multiplier == 1


@pytest.mark.parametrize(
    ("rule", "multiplier"), [("mup", 1 / 4), ("paper", 1 / 4), ("standard", 1)]
)
@pytest.mark.parametrize(("role", "std"), [(Role.READOUT, 0.0), (Role.TIED, 0.02)])
def test_readouts(role: Role, std: float, rule: str, multiplier: float) -> None:
    got = scaling(role, (256, 64), (256, 16), optimizer="muon", rule=rule)
    assert (got.lr, got.decay, got.init_std, got.multiplier) == (1, 1, std, multiplier)


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [("muon", rule) for rule in ("paper", "moonlight", "standard")] + [("adamw", "standard")],
)
def test_all_rules_agree_at_base_width(optimizer: str, rule: str) -> None:
    for role, shape in [(Role.HIDDEN, (64, 16)), (Role.READOUT, (256, 16)), (Role.VECTOR, (16,))]:
        got = scaling(role, shape, shape, optimizer=optimizer, rule=rule)
        assert got == scaling(role, shape, shape, optimizer=optimizer, rule="mup")


def test_a_stack_scales_as_its_matrices() -> None:
    stack = scaling(Role.HIDDEN, (8, 256, 64), (8, 64, 16), optimizer="muon", rule="mup")
    assert stack == scaling(Role.HIDDEN, *TALL, optimizer="muon", rule="mup")


def test_roles_of_the_bundled_model() -> None:
    tags = build_meta(gpt_config(), width=64, base_width=16).tags
    roles = {name: t.role for name, t in tags.items()}
    assert roles == {
        "embedding.weight": Role.EMBEDDING,
        "blocks.0.attention_norm.weight": Role.VECTOR,
        "blocks.0.attention.query.weight": Role.HIDDEN,
        "blocks.0.attention.key.weight": Role.HIDDEN,
        "blocks.0.attention.value.weight": Role.HIDDEN,
        "blocks.0.attention.query_norm.weight": Role.FINITE,
        "blocks.0.attention.key_norm.weight": Role.FINITE,
        "blocks.0.attention.output.weight": Role.RESIDUAL,
        "blocks.0.mlp_norm.weight": Role.VECTOR,
        "blocks.0.mlp.gate.weight": Role.HIDDEN,
        "blocks.0.mlp.up.weight": Role.HIDDEN,
        "blocks.0.mlp.down.weight": Role.RESIDUAL,
        "norm.weight": Role.VECTOR,
        "readout.weight": Role.READOUT,
    }
    assert tags["blocks.0.mlp.down.weight"].base_shape == (16, 64)
    assert tags["embedding.weight"].base_shape == (256, 16)


def test_tied_and_grouped_query_roles() -> None:
    tags = build_meta(gpt_config(tied=True, heads_per_kv=2), width=64, base_width=16).tags
    assert tags["embedding.weight"].role is Role.TIED
    assert "readout.weight" not in tags
    assert tags["blocks.0.attention.key.weight"].shape == (32, 64)


@pytest.mark.parametrize("width", [16, 64, 256])  # r = 1, 4, 16
def test_sampled_standard_deviations(width: int) -> None:
    for tied in (False, True):
        model = _build(gpt_config(tied=tied), width)
        values = dict(model.named_parameters())
        embedding = 0.02 if tied else 1.0
        assert values["embedding.weight"].std().item() == pytest.approx(embedding, rel=0.05)
        gate = values["blocks.0.mlp.gate.weight"]
        assert gate.std().item() == pytest.approx(width**-0.5, rel=0.1)
        for name in ("blocks.0.attention.output.weight", "blocks.0.mlp.down.weight"):
            assert not values[name].any()
        assert tied or not values["readout.weight"].any()
        assert (values["norm.weight"] == 1).all()


@pytest.mark.parametrize(("width", "hidden"), [(16, 3 / 4), (64, 3 / 8)])  # r = 1, 4
@pytest.mark.parametrize(("tied", "embedding"), [(False, 3.0), (True, 0.06)])
def test_init_scale_is_a_factor_of_what_starts_random(
    width: int, hidden: float, tied: bool, embedding: float
) -> None:
    model = _build(gpt_config(tied=tied), width, init_scale=3.0)
    for name, value in model.named_parameters():
        if name == "embedding.weight":
            assert value.std().item() == pytest.approx(embedding, rel=0.05)
        elif name.endswith(("query.weight", "key.weight", "value.weight", "gate.weight")):
            assert value.std().item() == pytest.approx(hidden, rel=0.2)
        elif name.endswith(("output.weight", "down.weight", "readout.weight")):
            assert not value.any()
        elif name.endswith("norm.weight"):
            assert (value == 1).all()


def _build(
    config: ModelConfig, width: int, *, seed: int = 0, rule: str = "mup", init_scale: float = 1.0
) -> nn.Module:
    return build_model(
        config,
        width=width,
        base_width=16,
        seed=seed,
        optimizer="muon",
        rule=rule,
        device="cpu",
        init_scale=init_scale,
    ).module


def test_a_seed_sets_the_initialisation() -> None:
    one, same, other = (_build(gpt_config(), 16, seed=s) for s in (1, 1, 2))
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(
        one.get_parameter("embedding.weight"), other.get_parameter("embedding.weight")
    )


@pytest.mark.parametrize(("rule", "factor"), [("mup", 1 / 4), ("standard", 1.0)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_readout_multiplies_as_its_rule_says(tied: bool, rule: str, factor: float) -> None:
    model = _build(gpt_config(tied=tied), 64, rule=rule)
    readout = model.get_submodule("readout")
    assert isinstance(readout, mup.MuReadout)
    with torch.no_grad():
        readout.weight.normal_()
        x = torch.randn(3, 64)
        torch.testing.assert_close(readout(x), factor * (x @ readout.weight.T))


class Body(nn.Module):
    """A model with one odd part, to be refused."""

    def __init__(self, width: int, odd: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.hidden = nn.Linear(width, width, bias=False)
        self.readout: nn.Module = mup.MuReadout(width, 256, bias=False)
        if odd == "plain readout":
            self.readout = nn.Linear(width, 256, bias=False)
        elif odd == "tied plainly":
            self.readout = nn.Linear(width, 256, bias=False)
            self.readout.weight = self.embedding.weight
        elif odd == "shared with bias":
            self.readout = mup.MuSharedReadout(self.embedding.weight)
        elif odd == "fixed side":
            self.hidden = nn.Linear(width, 64, bias=False)
        elif odd == "input table":
            self.table = nn.Parameter(torch.zeros(width, 64))
        elif odd == "growing vocabulary":
            self.embedding = nn.Embedding(width, width)
        elif odd == "finite matrix":
            self.hidden = nn.Linear(64, 64, bias=False)
        elif odd == "growing stack":
            self.stack = nn.Parameter(torch.zeros(width, width, width))
        elif odd == "shared without embedding":
            self.table = nn.Parameter(torch.zeros(256, width))
            self.readout = mup.MuSharedReadout(self.table, bias=False)
        elif odd == "ends a branch sometimes":
            self.second = nn.Linear(width, width, bias=False)
            self.second.weight = self.hidden.weight
            self.second.residual_output = True  # type: ignore[assignment]
        elif odd == "positions":
            self.positions = nn.Parameter(torch.zeros(64, width))
        elif odd == "capped":
            self.hidden = nn.Linear(width, min(width, 24), bias=False)
        elif odd == "falling":
            self.hidden = nn.Linear(4096 // width, width, bias=False)
        elif odd == "wide gain":
            self.gain = nn.Parameter(torch.ones(width**2))
        elif odd == "convolution":
            self.hidden = nn.Conv1d(width, width, 3)  # type: ignore[assignment]
        elif odd == "depthwise":
            self.hidden = nn.Conv1d(width, width, 3, groups=width)  # type: ignore[assignment]
        elif odd == "lazy":
            self.hidden = nn.LazyLinear(width)
        elif odd == "only when wide" and width > 16:
            self.extra = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        raise AssertionError("never run")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("plain readout", r"readout.weight: .*must be mup.MuReadout"),
        ("tied plainly", r"embedding.weight: .*needs mup.MuSharedReadout"),
        ("shared with bias", r"readout.bias: MuSharedReadout takes bias=False"),
        ("fixed side", r"hidden.weight: .*hidden layer's output must grow"),
        ("growing vocabulary", r"embedding.weight: .*in its last dimension alone"),
        ("finite matrix", r"hidden.weight: .*no clear role"),
        ("input table", r"table: .*must be nn.Embedding, .*say latent = True on its module"),
        ("growing stack", r"stack: .*no clear role"),
        ("shared without embedding", r"table: .*no nn.Embedding's weight"),
        ("ends a branch sometimes", r"hidden.weight: .*only some say residual_output"),
        ("positions", r"positions: .*positional table nn.Embedding"),
        ("capped", r"hidden.weight: a side is 24 at width 64, 16 at width 16, 24 at width 32; "),
        ("falling", r"hidden.weight: a side is 64 at width 64, 256 at .*proportional to the width"),
        ("wide gain", r"gain: a side is 4096 at width 64"),
        ("convolution", r"hidden.weight: .*convolution's; .*stack of matrices \(taps, out, in\)"),
        ("depthwise", r"hidden.weight: .*depthwise one as one nn.Parameter \(width,\) per tap"),
        ("lazy", r"hidden.weight: has no shape before the first batch"),
        ("only when wide", r"extra.bias: exists at one width only"),
    ],
)
def test_unclear_parameters_are_refused_in_our_words(odd: str, message: str) -> None:
    model, base, delta = (Body(width, odd) for width in (64, 16, 32))
    with pytest.raises(ModelError, match=message):
        tag(model, base, delta, widths=(64, 16, 32))


def test_a_side_rounded_to_a_multiple_is_hidden() -> None:
    """8/3 of the width in eights, as gated layers have it: 48 at 16, 88 at 32, 176 at 64."""

    def model(width: int) -> nn.Module:
        body = Body(width, "")
        body.hidden = nn.Linear(width, (8 * width // 3 + 7) // 8 * 8, bias=False)
        return body

    tags = tag(model(64), model(16), model(32), widths=(64, 16, 32))
    assert tags["hidden.weight"].role is Role.HIDDEN


def test_one_table_looked_up_twice_is_an_embedding() -> None:
    def model(width: int) -> nn.Module:
        body = Body(width, "")
        body.second_embedding = nn.Embedding(256, width)
        body.second_embedding.weight = body.embedding.weight
        return body

    tags = tag(model(64), model(16), model(32), widths=(64, 16, 32))
    assert tags["embedding.weight"].role is Role.EMBEDDING


def test_biases_start_at_zero_and_stacks_are_hidden() -> None:
    text = (
        "import torch, mup\nfrom torch import nn\n"
        "class M(nn.Module):\n"
        "    def __init__(self, w, v):\n"
        "        super().__init__()\n"
        "        self.e = nn.Embedding(v, w)\n"
        "        self.experts = nn.Parameter(torch.empty(4, 2 * w, w))\n"
        "        self.h = nn.Linear(w, w)\n"
        "        self.r = mup.MuReadout(w, v)\n"
        "def build(width, *, vocab_size):\n    return M(width, vocab_size)\n"
    )
    config = ModelConfig(name="experts.py", text=text, kwargs={"vocab_size": 256})
    built = build_model(
        config, width=64, base_width=16, seed=0, optimizer="muon", rule="mup", device="cpu"
    )
    assert built.tags["experts"].role is Role.HIDDEN
    assert built.module.get_parameter("experts").std().item() == pytest.approx(1 / 8, rel=0.05)
    for bias in ("h.bias", "r.bias"):
        assert not built.module.get_parameter(bias).any()
    assert math.isclose(built.module.get_parameter("e.weight").std().item(), 1, rel_tol=0.05)
