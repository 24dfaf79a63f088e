"""Shapes of other people's models: roles against what the same model has under mup, files, errors.

The settings are checked against those of the bundled model file, which come another way: mup's own
base shapes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt_config, tiny_spec
from foreign_specs import finished, foreign_spec
from torch import nn

from telescope import Shapes, Spec
from telescope.cli import _roles
from telescope.config import OptimizerConfig
from telescope.errors import ModelError, SpecError
from telescope.records import Point
from telescope.rules.groups import parameter_groups
from telescope.rules.scaling import Role
from telescope.train.model import build_meta
from telescope.transfer.settings import group_settings
from telescope.transfer.shapes import GROWING, LAYOUT, write_shapes

POINT = Point.of(lr=0.05, weight_decay=0.3)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)


class Net(nn.Module):
    """A typical user's model: plain torch, no mup."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def roles(shapes: Shapes) -> dict[str, str]:
    return {name: str(tag.role) for name, tag in shapes.tags.items()}


@pytest.mark.parametrize("width", [16, 32, 128])
def test_roles_of_a_plain_model_are_found_at_every_width(width: int) -> None:
    shapes = Shapes.of(Net, width=width, base_width=16, roles={"*.down.weight": "residual"})
    block = {
        **{"norm.weight": "vector", "norm.bias": "vector"},
        **{"up.weight": "hidden", "up.bias": "vector", "down.weight": "residual"},
    }
    assert roles(shapes) == {
        "gain": "finite",
        "embed.weight": "embedding",
        **{f"blocks.{i}.{name}": role for i in (0, 1) for name, role in block.items()},
        "head.weight": "readout",
    }
    assert shapes.tags["blocks.0.up.weight"].shape == (4 * width, width)
    assert shapes.tags["blocks.0.up.weight"].base_shape == (64, 16)


def test_a_table_that_a_linear_shares_is_tied() -> None:
    shapes = Shapes.of(lambda width: Net(width, tied=True), width=32, base_width=16)
    assert roles(shapes)["embed.weight"] == "tied"
    assert "head.weight" not in shapes.tags


def test_nothing_is_allocated() -> None:
    def build(width: int) -> nn.Module:
        model = Net(width)
        assert model.embed.weight.is_meta
        return model

    assert Shapes.of(build, width=1 << 20, base_width=16).tags["embed.weight"].shape[1] == 1 << 20


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw"}, {"rule": "paper"}])
def test_settings_are_those_of_the_model_file(optimizer: dict[str, Any], tmp_path: Path) -> None:
    """Through a file, for the bundled model: mup's base shapes give the same groups."""
    tags = build_meta(gpt_config(depth=2), width=48, base_width=16).tags
    config = OptimizerConfig(**optimizer)
    expected = group_settings(parameter_groups(tags, POINT, config), config)
    write_shapes(tmp_path / "shapes.json", [Shapes(48, 16, tags)])
    loaded = Shapes.load(tmp_path / "shapes.json", width=48, base_width=16)
    assert list(loaded.groups(POINT, optimizer=optimizer)) == expected
    assert loaded.as_dict() == Shapes(48, 16, tags).as_dict()


@pytest.mark.parametrize(
    ("tail", "factor"), [("finite", 1.0), ("tied", 1.0), ("hidden", 0.5), ("input", 1.0)]
)
def test_steps_by_hand_at_r_4(tail: str, factor: float, tmp_path: Path) -> None:
    """Muon's hidden lr is lr/√r, decay rising as much; all else keeps both."""
    shapes = {
        "finite": ([8], [8]),
        "tied": ([50, 64], [50, 16]),
        "hidden": ([3, 64, 64], [3, 16, 16]),
        "input": ([64, 9], [16, 9]),
    }
    entry = dict(zip(("shape", "base_shape"), shapes[tail], strict=True))
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"w": {"role": tail, **entry}}))
    (group,) = Shapes.load(path, width=64, base_width=16).groups(POINT)
    assert group["lr"] == pytest.approx(0.05 * factor)
    assert group["weight_decay"] == pytest.approx(0.3 / factor)
    std = {"finite": 0, "tied": 0.02, "hidden": 1 / 8, "input": 1 / 3}
    assert group["init_std"] == pytest.approx(std[tail])
    assert group["multiplier"] == (0.25 if tail == "tied" else 1)
    if tail == "hidden":  # a stack, of which torch's Muon takes the single matrices
        assert group["optimizer"] == "Muon"
        assert "unbind it" in group["note"]


class Odd(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda w: Odd(conv=nn.Conv2d(w, w, 3)), "conv.weight: of a Conv2d, has no clear role"),
        (
            lambda w: Odd(k=nn.Linear(w, 8), v=nn.Linear(w, 8), head=nn.Linear(w, 50)),
            "3 matrices grow in their input alone; .*key-value heads as a ratio",
        ),
        (lambda w: Odd(a=nn.Linear(w, int(w**0.5))), "a.weight: a side is 8 at width 64"),
        (lambda w: Odd(**{f"l{w}": nn.Linear(w, w)}), "exists at one width only"),
        (lambda w: Odd(e=nn.Embedding(w, 7)), "e.weight: role embedding must have shape"),
        (lambda w: Odd(f=nn.Linear(3, 5)), "f.weight: of a Linear, has no clear role"),
    ],
)
def test_what_has_no_clear_role_says_what_to_do(build: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Shapes.of(build, width=64, base_width=16)


def test_given_roles_are_checked() -> None:
    for given, message in [
        ({"*.nothing": "hidden"}, r"roles: '\*.nothing' matches no parameter"),
        ({"head.*": "output"}, "roles: got 'output', must be one of hidden, residual"),
        ({"head.*": "hidden"}, r"head.weight: role hidden must have shape \(…, out, in\)"),
    ]:
        with pytest.raises(ModelError, match=message):
            Shapes.of(Net, width=64, base_width=16, roles=given)


def entry(role: str = "hidden", shape: Any = (64, 64), base: Any = (16, 16)) -> dict[str, Any]:
    return {"role": role, "shape": list(shape), "base_shape": list(base)}


BAD_FILES = [
    ("{", "shapes.json: is not JSON"),
    ("[]", "shapes.json: must be a table of parameters, each with role, shape, base_shape"),
    ("{}", "must be a table of parameters"),
    ('{"w": 3}', "w: got int, must be a table of role, shape, base_shape"),
    ('{"w": {"role": "hidden", "shape": [1]}}', "w: got role, shape, must be a table of"),
    ('{"a": 1, "a": 2}', "shapes.json: a occurs twice; remove one of the two"),
    ({"w": entry("matrix")}, "w: role: got 'matrix', must be one of hidden, residual, embedding"),
    ({"w": {**entry(), "shape": [64, "64"]}}, r"w: shape: got \[64, '64'\], must be a list of pos"),
    ({"w": {**entry(), "shape": [64, 0]}}, "must be a list of positive integers"),
    ({"w": entry(shape=(64, 64, 1))}, "must have the same number of sides"),
    ({"w": entry(shape=(64, 16))}, r"w: role hidden must have shape \(…, out, in\), the last two"),
    ({"w": entry(shape=(64, 32))}, "w: a side is 32 at width 64, 16 at width 16"),
    ({"w": entry("readout", (64, 50), (16, 50))}, r"role readout must have shape \(outputs, width"),
    ({"w": entry("vector", (8,), (8,))}, "role vector must have shape"),
    ({"w": entry("tied", (50, 64, 1), (50, 16, 1))}, "role tied must have shape"),
    ({"32": {"w": entry()}}, "has no shapes of width 64, only of 32; add them"),
    ({"64": {}}, "width 64: must be a table of parameters"),
    ({"64": {"w": entry(shape=(16, 16))}}, "role hidden must have shape"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_bad_file_is_a_line_that_says_what_to_do(
    content: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SpecError, match=message) as caught:
        Shapes.load(path, width=64, base_width=16)
    assert "\n" not in str(caught.value)


def test_a_file_of_one_width_is_the_targets(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"w": entry()}))
    with pytest.raises(SpecError, match=r"the target's \(64\), got width 128; give them by width"):
        Shapes.load(path, width=128, base_width=16, only_width=64)
    with pytest.raises(SpecError, match="must be base_shape"):
        Shapes.load(path, width=16, base_width=16)
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        Shapes.load(tmp_path / "none.json", width=64, base_width=16)


def test_transfer_with_shapes_gives_groups_at_several_widths(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    write_shapes(path, [Shapes.of(Net, width=width, base_width=16) for width in (64, 256)])
    ladder = finished(Spec.from_dict(foreign_spec()))
    assert ladder.transfer().groups is None
    for width in (64, 256):
        groups = ladder.transfer(width, shapes=path).groups
        assert groups is not None
        (head,) = [group for group in groups if group["role"] == "readout"]
        assert head["multiplier"] == 16 / width
        folded = ladder.transfer(width, shapes=path, fold_readout=True).groups
        assert folded is not None
        (head,) = [group for group in folded if group["role"] == "readout"]
        assert head["lr"] == pytest.approx(0.04 * 16 / width)
    with pytest.raises(SpecError, match="has no shapes of width 128, only of 64, 256"):
        ladder.transfer(128, shapes=path)
    with pytest.raises(SpecError, match="of width 64 and base width 16, must be of 128 and 16"):
        ladder.transfer(128, shapes=Shapes.of(Net, width=64, base_width=16))


def test_groups_need_to_know_the_rule_and_both_axes() -> None:
    shapes = Shapes.of(Net, width=64, base_width=16)
    data = foreign_spec()
    del data["optimizer"]
    with pytest.raises(SpecError, match=r"optimizer\.rule: missing; with shapes it must be given"):
        finished(Spec.from_dict(data)).transfer(shapes=shapes)
    data = foreign_spec(axes={"lr": {"low": 0.01, "high": 0.16, "points": 3}})
    with pytest.raises(SpecError, match=r"axes\.weight_decay: missing; with shapes"):
        finished(Spec.from_dict(data)).transfer(shapes=shapes)


def test_a_model_file_has_its_own_shapes(corpus_file: Path) -> None:
    ladder = finished(Spec.from_dict(tiny_spec(corpus_file)))
    with pytest.raises(SpecError, match="left out where the spec has a model file"):
        ladder.transfer(shapes=Shapes.of(Net, width=64, base_width=16))
    groups = ladder.transfer(fold_readout=True).groups
    assert groups is not None
    assert {group["multiplier"] for group in groups} == {1}


def test_settings_need_no_torch() -> None:
    """A trainer in another framework pays for none."""
    code = (
        "import sys; from telescope import Shapes; from telescope.rules.scaling import Role, Tag\n"
        "shapes = Shapes(64, 16, {'w': Tag('w', Role.HIDDEN, (64, 64), (16, 16))})\n"
        "print(shapes.groups(lr=0.1, weight_decay=0.1)[0]['lr'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"0\.05\d* False\n", done.stdout)


def test_every_role_has_a_layout() -> None:
    assert set(GROWING) == set(LAYOUT) == set(Role)


RAW: dict[str, dict[str, list[int]]] = {
    "16": {"embed": [50, 16], "gain": [8], "norm": [16], "in": [16, 9], "up": [64, 16]},
    "64": {"embed": [50, 64], "gain": [8], "norm": [64], "in": [64, 9], "up": [256, 64]},
}
"""By width, names and shapes, as any framework can list them."""
for _width, _table in RAW.items():
    _table["down"] = [int(_width), 4 * int(_width)]
    _table["experts.w"] = [3, int(_width), int(_width)]


def raw(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps({width: {**table, **more} for width, table in RAW.items()}))
    return path


def test_roles_by_patterns_complete_plain_shapes(tmp_path: Path) -> None:
    """Sides that tell the role need no pattern; the first pattern that matches counts."""
    given = {"embed": "tied", "in": "input", "do*": "residual", "*w*": "hidden"}
    shapes = Shapes.load(raw(tmp_path), width=64, base_width=16, roles=given)
    assert roles(shapes) == {
        **{"embed": "tied", "gain": "finite", "norm": "vector", "in": "input", "up": "hidden"},
        **{"down": "residual", "experts.w": "hidden"},
    }
    assert shapes.tags["up"].base_shape == (64, 16)
    write_shapes(tmp_path / "whole.json", [shapes])
    again = Shapes.load(tmp_path / "whole.json", width=64, base_width=16)
    assert again.groups(POINT) == shapes.groups(POINT)


def test_a_pattern_is_before_the_files_own_role(tmp_path: Path) -> None:
    head = entry("embedding", (50, 64), (50, 16))
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"head": head, "up": entry()}))
    shapes = Shapes.load(path, width=64, base_width=16, roles={"head": "readout"})
    assert roles(shapes) == {"head": "readout", "up": "hidden"}


def test_what_no_pattern_names_is_said_at_once(tmp_path: Path) -> None:
    path = raw(tmp_path, conv=[3, 3])
    with pytest.raises(SpecError, match=r"no role for embed, in, conv: .*--roles 'embed=ROLE'"):
        Shapes.load(path, width=64, base_width=16)
    with pytest.raises(SpecError, match="no role for embed, gain, norm"):
        Shapes.load(path, width=16, base_width=16)  # nothing has grown
    wrong = {"embed": "output", "nothing*": "hidden", "down": "end"}
    with pytest.raises(SpecError) as caught:
        Shapes.load(path, width=64, base_width=16, roles=wrong)
    assert [fault.split("roles: ")[1][:16] for fault in caught.value.faults] == [
        "'nothing*' match",
        "got 'output', mu",
        "got 'end', must ",
    ]
    given = {"embed": "tied", "in": "input", "down": "readout", "conv": "tied"}
    with pytest.raises(SpecError, match=r"down: role readout must have shape"):
        Shapes.load(path, width=64, base_width=16, roles=given)


def test_shapes_alone_without_those_of_the_first_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    for data in (RAW["64"], {"64": RAW["64"]}, {"64": RAW["64"], "16": {"up": [64, 16]}}):
        path.write_text(json.dumps(data))
        with pytest.raises(SpecError, match=r'embed, .*no base shape.*"16": {\.\.\.}, "64"'):
            Shapes.load(path, width=64, base_width=16, roles={"embed": "tied"})


def test_transfer_with_roles(tmp_path: Path, corpus_file: Path) -> None:
    ladder, given = finished(Spec.from_dict(foreign_spec())), {"embed": "embedding", "in": "input"}
    groups = ladder.transfer(shapes=raw(tmp_path), roles=given).groups
    assert groups is not None
    assert {name for group in groups for name in group["names"]} == RAW["64"].keys()
    with pytest.raises(SpecError, match="roles: they are for a file of shapes"):
        ladder.transfer(roles=given)
    with pytest.raises(SpecError, match="roles: they are for a file of shapes"):
        ladder.transfer(shapes=Shapes.of(Net, width=64, base_width=16), roles=given)
    with pytest.raises(SpecError, match="roles: left out where the spec has a model file"):
        finished(Spec.from_dict(tiny_spec(corpus_file))).transfer(roles=given)


def test_the_option_takes_patterns() -> None:
    assert _roles(["a*=hidden", " b = tied", "x=y=input"]) == {
        **{"a*": "hidden", "b": "tied", "x=y": "input"}
    }
    with pytest.raises(SpecError, match="--roles: got 'a', must be PATTERN=ROLE"):
        _roles(["a", "b=hidden"])
    with pytest.raises(SpecError, match="--roles: a pattern is given twice"):
        _roles(["a=tied", "a=hidden"])
