"""The initialisation stated in the groups, against the values of models that were built.

`Shapes` watches what is written on the meta device; the same model built on the CPU is the other
route. A model file's groups are checked against a trial's own model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt_config
from own_models import own
from torch import Tensor, nn

from telescope import Shapes
from telescope.answer.derive import _tags_of_model
from telescope.config import ModelConfig
from telescope.errors import SpecError
from telescope.records import Point
from telescope.rules.groups import parameter_groups
from telescope.rules.scaling import Role, Tag
from telescope.train.model import build_model
from telescope.transfer.settings import group_settings
from telescope.transfer.shapes import optimizer_config, write_shapes

POINT = {"lr": 0.05, "weight_decay": 0.3}
BASE, WIDTH = 16, 48


class Vectors(nn.Module):
    """Every way in which people write how a vector starts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.gate, self.table, self.zeroed, self.drawn = (
            nn.Linear(width, width) for _ in range(5)
        )
        nn.init.constant_(self.gate.bias, -2.0)
        with torch.no_grad():
            self.table.bias.copy_(torch.linspace(0, 1, width))
        self.zeroed.bias.data.zero_()
        nn.init.trunc_normal_(self.drawn.bias)
        self.norm, self.batch = nn.LayerNorm(width), nn.BatchNorm1d(width)
        self.rms, self.slope = nn.RMSNorm(8), nn.PReLU()
        self.random = nn.Parameter(torch.randn(width))
        self.scale = nn.Parameter(1e-4 * torch.ones(width))
        self.one_changed = nn.Parameter(torch.ones(width))
        with torch.no_grad():
            self.one_changed[0] = 0.0
        self.later = nn.Parameter(torch.empty(width))
        nn.init.ones_(self.later)
        self.in_bf16 = nn.Parameter(torch.ones(width).to(torch.bfloat16))
        self.replaced = nn.Parameter(torch.ones(width))
        self.replaced.data = torch.zeros(width)
        self.scalar = nn.Parameter(torch.zeros(()))
        self.full = nn.Parameter(torch.full((width,), 1.0))


def true_start(values: Tensor) -> str:
    """Return a vector's initialisation by its values."""
    numbers = set(values.flatten().tolist())
    return {0.0: "zeros", 1.0: "ones"}.get(numbers.pop(), "as built") if len(numbers) == 1 else ""


def test_what_is_written_on_the_meta_device_is_what_the_cpu_has() -> None:
    shapes, built = Shapes.of(Vectors, width=WIDTH, base_width=BASE), Vectors(WIDTH)
    unset = {"layer.bias", "drawn.bias"}  # torch draws them; as biases of layers they start at 0
    for name, parameter in built.named_parameters():
        start = shapes.tags[name].start
        if parameter.ndim > 1:
            assert start is None
        else:
            expected = "zeros" if name in unset else true_start(parameter.data) or "as built"
            assert start == expected, name


def test_gains_and_biases_of_one_shape_are_groups_of_their_own() -> None:
    groups = Shapes.of(Vectors, width=WIDTH, base_width=BASE).groups(POINT)
    by_start = {g["init"]: g["names"] for g in groups if g["role"] == "vector"}
    assert set(by_start) == {"zeros", "ones", "as built"}
    assert "norm.weight" in by_start["ones"]
    assert "norm.bias" in by_start["zeros"]
    assert "gate.bias" in by_start["as built"]
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in Vectors(BASE).named_parameters())


def settings_of(config: ModelConfig) -> list[dict[str, Any]]:
    optimizer = optimizer_config({})
    tags = _tags_of_model(config, WIDTH, BASE)
    return group_settings(parameter_groups(tags, Point.of(POINT), optimizer), optimizer)


@pytest.mark.parametrize("config", [gpt_config(), gpt_config(tied=True), own(), own(tied=True)])
def test_the_groups_of_a_model_file_say_how_a_trial_starts(config: ModelConfig) -> None:
    built = build_model(
        config, width=WIDTH, base_width=BASE, seed=0, optimizer="muon", rule="mup", device="cpu"
    )
    parameters = dict(built.module.named_parameters())
    seen = set()
    for group in settings_of(config):
        seen.add(group["init"])
        for name in group["names"]:
            values, start = parameters[name].detach(), group["init"]
            if start == "normal":
                rows = values[values.abs().sum(-1) > 0]  # a padding row is the file's own
                assert rows.std().item() == pytest.approx(group["init_std"], rel=0.15), name
            elif start in ("zeros", "ones"):
                assert torch.equal(values, torch.full_like(values, float(start == "ones"))), name
            else:
                assert true_start(values) not in ("zeros", "ones"), name
    assert seen >= {"normal", "zeros", "ones"}
    assert ("as built" in seen) == (config.name == "own.py")


def test_a_file_of_shapes_keeps_how_vectors_start(tmp_path: Path) -> None:
    shapes, path = Shapes.of(Vectors, width=WIDTH, base_width=BASE), tmp_path / "shapes.json"
    write_shapes(path, [shapes])
    loaded = Shapes.load(path, width=WIDTH, base_width=BASE)
    assert loaded == shapes
    assert loaded.groups(POINT) == shapes.groups(POINT)


def test_a_file_that_does_not_say_it_leaves_it_open() -> None:
    tag = Tag("gain", Role.VECTOR, (WIDTH,), (BASE,))
    (group,) = Shapes(WIDTH, BASE, {"gain": tag}).groups(POINT)
    assert group["init"] is None
    assert group["note"] == "starts as the model's own code has it, a layer's bias at 0"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"role": "vector", "init": "one"},
            "init: got 'one', must be one of zeros, ones, as built",
        ),
        ({"role": "hidden", "init": "zeros"}, "a matrix starts by its role"),
        ({"role": "vector", "init": "normal"}, "init: got 'normal'"),
        ({"role": "vector", "transposed": True}, "true of a hidden or residual matrix alone"),
        ({"role": "hidden", "transposed": 1}, "transposed: got 1, must be true or false"),
        ({"role": "hidden", "start": "zeros"}, "must be a table of role, shape, base_shape"),
    ],
)
def test_a_wrong_entry_says_what_is_allowed(
    entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sides = 1 if entry["role"] == "vector" else 2
    whole = {"shape": [WIDTH] * sides, "base_shape": [BASE] * sides, **entry}
    (tmp_path / "shapes.json").write_text(json.dumps({"w": whole}))
    with pytest.raises(SpecError, match=message):
        Shapes.load(tmp_path / "shapes.json", width=WIDTH, base_width=BASE)


def test_a_matrix_that_is_kept_transposed(tmp_path: Path) -> None:
    """By hand: 64 in, 16·12 out at base width 16; fan-in is the first side as it is stored."""
    entry = {"role": "hidden", "shape": [64, 192], "base_shape": [16, 48], "transposed": True}
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"turned": entry}))
    shapes = Shapes.load(path, width=64, base_width=16)
    assert shapes.as_dict() == {"turned": entry}
    (group,) = shapes.groups(POINT)
    assert (group["shape"], group["init_std"]) == ([64, 192], 1 / 8)
    plain = Tag("turned", Role.HIDDEN, (192, 64), (48, 16))
    (other,) = Shapes(64, 16, {"turned": plain}).groups(POINT)
    assert (group["lr"], group["weight_decay"]) == (other["lr"], other["weight_decay"])
