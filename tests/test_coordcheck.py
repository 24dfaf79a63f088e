"""The coordinate check: right models pass, each known mistake fails, slopes are hand-made lines.

Mistakes are made where people make them: in the rule, in the model file's forward, and, patched in
because the program overwrites a file's own initialisation, in the tables of the program itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GPT, gpt_config, tiny_spec

from telescope.check import coordcheck
from telescope.check.coordcheck import (
    SHORT,
    Extent,
    check_config,
    check_trials,
    coordinate_check,
)
from telescope.check.judge import THRESHOLD, judge
from telescope.check.measure import Measured
from telescope.check.verdict import CoordCheck, Kind, Quantity
from telescope.config import (
    PYTHON_STDLIB,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrialConfig,
)
from telescope.data.corpus import load_corpus
from telescope.errors import ModelError
from telescope.records import Point, Trial
from telescope.report.figures import check_figure
from telescope.rules import groups, parametrization
from telescope.rules import scaling as rules
from telescope.rules.scaling import Role, Scaling
from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.modelcheck import check_point, expected_seconds, seconds_at_most

POINT = Point.of(lr=0.004, weight_decay=0.1)
MUP = OptimizerConfig()
ADAMW = OptimizerConfig(name="adamw")

MIXER = '''
import torch
from mup import MuReadout
from torch import nn

class Stack(nn.Module):
    """A matrix per expert, used as a batch."""
    def __init__(self, experts, out, in_, residual_output=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out, in_))
        self.residual_output = residual_output
    def forward(self, x):
        return x @ self.weight.mT

class Block(nn.Module):
    """Each token sees the mean of its past; then a mixture of two experts."""
    def __init__(self, width):
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.out.residual_output = True
        self.router = MuReadout(width, 2)
        self.up = Stack(2, 2 * width, width)
        self.down = Stack(2, width, 2 * width, residual_output=True)
    def forward(self, x):
        past = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.out(torch.tanh(self.mix(self.norm(x).cumsum(1) / past)))
        h = self.second_norm(x)
        share = self.router(h).softmax(-1).movedim(-1, 1)[..., None]
        return x + (share * self.down(torch.relu(self.up(h[:, None])))).sum(1), share

class Mixer(nn.Module):
    def __init__(self, width, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.readout = MuReadout(width, vocab_size)
    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x, _ = block(x)
        return self.readout(self.norm(x))

def build(width, *, vocab_size):
    return Mixer(width, vocab_size)
'''


def mixer() -> ModelConfig:
    return ModelConfig(name="mixer.py", text=MIXER, kwargs={"vocab_size": 256})


def gpt_with(before: str, after: str) -> ModelConfig:
    """The bundled model with one line changed."""
    text = GPT.read_text()
    assert text.count(before) == 1
    return replace(gpt_config(depth=2), text=text.replace(before, after))


NARROW = replace(SHORT, width_factors=(1, 2, 4))
"""Enough to see a mistake of half a power, at a third of the cost."""


def check(
    model: ModelConfig,
    optimizer: OptimizerConfig = MUP,
    extent: Extent = NARROW,
    point: Point = POINT,
) -> CoordCheck:
    data = DataConfig(source=PYTHON_STDLIB)
    config = TrialConfig(
        model=model,
        optimizer=optimizer,
        train=TrainConfig(steps=50, batch_size=8, sequence_length=32),
        data=data,
        base_width=16,
        corpus_digest=load_corpus(data).digest,
    )
    return coordinate_check(config, point, extent)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (gpt_config(depth=2), MUP),
        (gpt_config(depth=2, tied=True), MUP),
        (gpt_config(depth=2, head_dim=16, tied=True), MUP),  # one head at base width
        (gpt_config(depth=2, head_dim=4, heads_per_kv=2), MUP),
        (gpt_config(depth=2), replace(MUP, ns="polar-express")),
        (gpt_config(depth=2), ADAMW),
        (gpt_config(depth=2, tied=True), ADAMW),
        (mixer(), MUP),
        (mixer(), ADAMW),
    ],
)
def test_right_models_pass(model: ModelConfig, optimizer: OptimizerConfig) -> None:
    checked = check(model, optimizer, SHORT)
    assert checked.verdict == "PASS", checked.problems
    moved = {name for name, slope in checked.slopes.items() if slope is not None}
    assert {"output", "output change", "embedding change", "blocks.1 change"} <= moved
    assert {"hidden update", "residual update", "vector update"} <= moved
    assert {"hidden start", "blocks.1 added", "blocks.1 gradient"} <= moved
    assert checked.unwatched == ()


@pytest.mark.parametrize(
    ("optimizer", "name", "slope"),
    [
        # A hidden update that is off by √r or by r, as SCIENCE's table has it.
        (replace(MUP, rule="paper"), "hidden update", -0.5),
        (replace(MUP, rule="moonlight"), "hidden update", 0.5),
        (replace(MUP, rule="standard"), "readout update", 1.0),
        (replace(ADAMW, rule="standard"), "hidden update", 1.0),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_wrong_rules_fail(optimizer: OptimizerConfig, name: str, slope: float, tied: bool) -> None:
    checked = check(gpt_config(depth=2, tied=tied), optimizer)
    assert checked.verdict == "FAIL"
    if not (tied and name == "readout update"):  # a tied readout's update is the embedding's
        assert name in checked.problems
        assert checked.slopes[name] == pytest.approx(slope, abs=0.2)


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (
            "x_BTD = self.embedding(tokens_BT)\n",
            "x_BTD = self.embedding(tokens_BT) * self.embedding.weight.shape[1] ** 0.5\n",
            "blocks.0",
        ),
        (
            "return self.readout(self.norm(x_BTD))",
            "return self.readout(self.norm(x_BTD) / x_BTD.shape[-1] ** 0.5)",
            "output",
        ),
        (
            "return x_BTD + self.mlp(self.mlp_norm(x_BTD))",
            "return x_BTD + x_BTD.shape[-1] ** 0.5 * self.mlp(self.mlp_norm(x_BTD))",
            "blocks.0 change",
        ),
    ],
    ids=["embedding", "norm", "block"],
)
def test_a_part_that_scales_with_the_width_fails(before: str, after: str, name: str) -> None:
    checked = check(gpt_with(before, after))
    assert name in checked.problems, checked.slopes


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (
            "x_BTD = self.embedding(tokens_BT)\n",
            "x_BTD = self.embedding(tokens_BT) * self.embedding.weight.shape[1] ** -0.5\n",
            "blocks.0 input",
        ),
        (
            "self.mlp(self.mlp_norm(x_BTD))",
            "self.mlp(self.mlp_norm(x_BTD) * x_BTD.shape[-1] ** -0.5)",
            "blocks.1.mlp.down",
        ),
        (
            "self.attention(self.attention_norm(x_BTD), cos_TE",
            "self.attention(self.attention_norm(x_BTD) * x_BTD.shape[-1] ** -0.5, cos_TE",
            "blocks.1.attention.output",
        ),
        (
            "return x_BTD + self.mlp(self.mlp_norm(x_BTD))",
            "return x_BTD + x_BTD.shape[-1] ** -0.5 * self.mlp(self.mlp_norm(x_BTD))",
            "blocks.1.mlp.down gradient",
        ),
        (
            "x_BTD = block(x_BTD, cos_TE, sin_TE)",
            "x_BTD = x_BTD + x_BTD.shape[-1] ** -0.5 * (block(x_BTD, cos_TE, sin_TE) - x_BTD)",
            "blocks.1 gradient",
        ),
    ],
    ids=["embedding", "mlp norm", "attention norm", "branch", "block"],
)
@pytest.mark.parametrize("optimizer", [MUP, ADAMW], ids=["muon", "adamw"])
def test_what_shrinks_in_a_sum_fails(
    optimizer: OptimizerConfig, before: str, after: str, name: str
) -> None:
    checked = check(gpt_with(before, after), optimizer)
    assert "shrinks" in checked.problems[name], checked.slopes


def test_adams_eps_is_not_taken_for_a_width_rule() -> None:
    """At lr 1e-4 the first gradients are near 1e-8: with eps the hidden update's slope is -0.6."""
    low = Point.of(lr=1e-4, weight_decay=0.1)
    checked = check(gpt_config(depth=2), ADAMW, point=low)
    assert checked.passed, checked.problems
    assert checked.slopes["hidden update"] == pytest.approx(0, abs=0.1)
    large = check(gpt_config(depth=2), replace(ADAMW, eps=1e-3))
    assert large.passed, large.problems


SEQUENTIAL = MIXER.replace(
    "self.blocks = nn.ModuleList(Block(width) for _ in range(2))",
    "self.blocks = nn.Sequential(*(Block(width) for _ in range(2)))\n"
    "        self.mixing = nn.Parameter(torch.empty(width, width))",
).replace(
    "        for block in self.blocks:\n            x, _ = block(x)\n",
    "        x = self.blocks({'aux': None, 'x': x @ self.mixing})['x']\n",
)
"""Blocks in an nn.Sequential that take and give dicts, and a matrix in no module of its own."""
for before, after in (
    (
        "    def forward(self, x):\n        past",
        "    def forward(self, of):\n        x = of['x']\n        past",
    ),
    (".sum(1), share", ".sum(1)\n        return {'aux': share, 'x': x}"),
    ("return x + (share", "x = x + (share"),
):
    assert SEQUENTIAL.count(before) == 1
    SEQUENTIAL = SEQUENTIAL.replace(before, after)


def test_blocks_in_a_sequential_with_dicts_are_watched_and_what_is_not_is_named() -> None:
    right = check(replace(mixer(), text=SEQUENTIAL))
    assert right.passed, right.problems
    assert {"blocks.0 input", "blocks.1", "blocks.1 added", "blocks.1 gradient"} <= set(
        right.slopes
    )
    assert right.unwatched == ("mixing",)
    before = "x = x + (share"
    wrong = SEQUENTIAL.replace(before, "x = x + x.shape[-1] ** 0.5 * (share")
    assert "blocks.1 added" in check(replace(mixer(), text=wrong)).problems


def test_a_forward_that_fails_is_a_line_with_its_place() -> None:
    """A table of positions that is too short: shapes alone, on the meta device, do not show it."""
    text = MIXER.replace(
        "x = self.embedding(tokens)",
        "x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))",
    ).replace(
        "self.readout = MuReadout",
        "self.positions = nn.Embedding(8, width)\n        self.readout = MuReadout",
    )
    with pytest.raises(ModelError, match=r"^mixer.py:\d+: IndexError: .*width 16; .*--no-check"):
        check(replace(mixer(), text=text))


def twice(rule: Callable[..., Scaling], by: Callable[[Scaling, Scaling], float]) -> Any:
    """A table of rules in which hidden matrices get one more factor of the width."""

    def wrong(role: Role, shape: tuple[int, ...], base_shape: tuple[int, ...], **names: str) -> Any:
        right = rule(role, shape, base_shape, **names)
        at_base = rule(role, base_shape, base_shape, **names)
        return replace(right, lr=right.lr * by(right, at_base)) if role.is_hidden else right

    return wrong


def test_the_adam_rule_applied_twice_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    again = twice(rules.scaling, lambda right, base: right.lr / base.lr)
    monkeypatch.setattr(groups, "scaling", again)
    checked = check(gpt_config(depth=2), ADAMW)
    assert checked.slopes["hidden update"] == pytest.approx(-1.0, abs=0.1)
    assert "hidden update" in checked.problems


def test_torchs_factor_applied_twice_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's step already has 0.2·√max in it; once more is √r too much."""

    def with_torchs_factor(role: Role, shape: Any, base_shape: Any, **names: str) -> Scaling:
        right = rules.scaling(role, shape, base_shape, **names)
        factor = math.sqrt(max(shape[-2:]) / max(base_shape[-2:])) if role.is_hidden else 1.0
        return replace(right, lr=right.lr * factor)

    monkeypatch.setattr(groups, "scaling", with_torchs_factor)
    checked = check(gpt_config(depth=2))
    assert checked.slopes["hidden update"] == pytest.approx(0.5, abs=0.1)
    assert "hidden update" in checked.problems


@pytest.mark.parametrize("std", [0.25, 0.02])
def test_an_initialisation_that_ignores_fan_in_fails(
    std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small one moves next to nothing in a few steps: it shows in the matrices themselves."""
    right = rules.init_std

    def constant(role: Role, shape: tuple[int, ...]) -> float:
        return std if role is Role.HIDDEN else right(role, shape)

    monkeypatch.setattr(parametrization, "init_std", constant)
    checked = check(gpt_config(depth=2))
    assert "hidden start" in checked.problems, checked.slopes
    assert checked.slopes["hidden start"] == pytest.approx(0.5, abs=0.1)


WIDTHS = (16, 32, 64, 128)


OUTPUT, CHANGE = Quantity(""), Quantity("", Kind.CHANGE)
HIDDEN_UPDATE = Quantity("hidden", Kind.UPDATE)
EXPERT = Quantity("experts.0")


def judged(sizes: dict[Quantity, list[list[float]]]) -> CoordCheck:
    """Quantity → seeds' sizes per width, after one step."""
    measured = {name: {3: values} for name, values in sizes.items()}
    return judge(measured, widths=WIDTHS, steps=(3,), seeds=(0, 1), rule="mup", point=POINT)


def line(slope: float, noise: float = 0.0) -> list[list[float]]:
    """Sizes along width^slope, the seeds `noise` octaves above and below, in turn, and 4 apart."""
    return [
        [width**slope * 2 ** (noise * sign), 16 * width**slope * 2 ** (-noise * sign)]
        for width, sign in zip(WIDTHS, (1, -1, -1, 1), strict=True)
    ]


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.5, 1.0])
def test_a_line_has_its_slope_and_half_a_power_fails(slope: float) -> None:
    checked = judged({OUTPUT: line(slope)})
    assert checked.slopes["output"] == pytest.approx(slope)
    assert checked.verdict == "FAIL"
    assert f"slope {slope:+.2f}" in checked.problems["output"]
    assert ("grows" if slope > 0 else "shrinks") in checked.problems["output"]


def test_half_way_between_right_and_half_a_power_is_the_border() -> None:
    assert judged({OUTPUT: line(THRESHOLD - 0.01)}).passed
    assert not judged({OUTPUT: line(THRESHOLD + 0.01)}).passed


def test_noise_alone_does_not_fail_but_cannot_hide_a_half() -> None:
    """Slope error by hand: residuals ±0.3 around each seed's own line, Σ(x−x̄)² = 10.

    Of 8 points 5 degrees of freedom are left: a slope and two offsets are fitted. That the seeds
    lie four octaves apart is no error of the slope.
    """
    noisy = judged({OUTPUT: line(0.3, noise=0.3)})
    assert noisy.errors["output"] == pytest.approx(math.sqrt(8 * 0.09 / 5 / 10))
    assert noisy.passed  # 0.3 − 2 · 0.12 is below the threshold
    assert noisy.uncertain == ("output",)
    assert not judged({OUTPUT: line(0.5, noise=0.3)}).passed
    flat = judged({OUTPUT: line(0.0, noise=0.3)})
    assert (flat.passed, flat.uncertain) == (True, ())


def test_more_seeds_are_trained_where_a_slope_is_uncertain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One seed of two is off by an octave at the widest; the next two are flat."""
    trained: list[int] = []

    def measure(config: TrialConfig, trial: Trial, steps: Any) -> Any:
        trained.append(trial.seed)
        off = trial.seed == 1 and trial.width == 64
        return Measured({step: {CHANGE: 2.0 if off else 1.0} for step in steps}, {})

    monkeypatch.setattr(coordcheck, "measure_sizes", measure)
    checked = check(gpt_config())
    assert set(trained) == {0, 1, 2, 3}
    assert checked.seeds == (0, 1, 2, 3)
    assert checked.passed
    monkeypatch.setattr(
        coordcheck,
        "measure_sizes",
        lambda c, t, s: Measured({x: {Quantity("a", Kind.CHANGE): 1.0} for x in s}, {}),
    )
    assert check(gpt_config()).seeds == (0, 1)


def test_a_slope_says_which_step_it_is_from() -> None:
    sizes = {OUTPUT: {3: line(0.1), 10: line(-0.4), 20: line(0.2)}}
    checked = judge(sizes, widths=WIDTHS, steps=(3, 10, 20), seeds=(0, 1), rule="mup", point=POINT)
    assert checked.slope_steps == {"output": 10}
    assert checked.slopes["output"] == pytest.approx(-0.4)
    (panel, *_) = check_figure(checked, "drawn").axes
    drawn = next(line for line in panel.get_lines() if line.get_label() == "output")
    heights = np.asarray(drawn.get_ydata(), dtype=float)
    assert heights == pytest.approx([(w / 16) ** -0.4 for w in WIDTHS])


def test_a_router_may_shrink_but_not_grow() -> None:
    assert judged({Quantity("blocks.0.router", is_inner=True): line(-0.5), OUTPUT: line(0)}).passed
    assert not judged(
        {Quantity("blocks.0.router", is_inner=True): line(0.5), OUTPUT: line(0)}
    ).passed


def test_what_never_moves_is_null_and_passes() -> None:
    checked = judged({CHANGE: line(0), Quantity("frozen", Kind.UPDATE): [[0.0, 0.0]] * 4})
    assert checked.slopes == {"output change": pytest.approx(0), "frozen update": None}
    assert checked.errors["frozen update"] is None
    assert checked.passed


def test_what_moves_at_some_widths_only_fails() -> None:
    checked = judged({OUTPUT: [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]})
    assert checked.problems == {"output": "moves at some widths but not at 64"}


def test_an_idle_expert_is_judged_where_it_works() -> None:
    """Exact zeros at one width, and for one seed at another: the rest lies on a line, or not."""
    idle = [[0.0, 0.0], *line(0.1)[1:3], [0.0, line(0.1)[3][1]]]
    checked = judged({OUTPUT: line(0), EXPERT: idle, HIDDEN_UPDATE: line(0)})
    assert checked.passed
    assert checked.slopes["experts.0"] == pytest.approx(0.1)
    steep = [[0.0, 0.0], *line(1.0)[1:]]
    assert "experts.0" in judged({OUTPUT: line(0), EXPERT: steep}).problems
    alone = [[1.0, 1.0], *[[0.0, 0.0]] * 3]
    assert judged({CHANGE: line(0), EXPERT: alone}).slopes["experts.0"] is None
    update = [[0.0, 0.0], *line(0)[1:]]
    assert "hidden update" in judged({OUTPUT: line(0), HIDDEN_UPDATE: update}).problems


def test_nothing_moved_at_all_fails() -> None:
    """An embedding gives something all the same, and a hidden matrix is there at the start."""
    still = {CHANGE: [[0.0, 0.0]] * 4, HIDDEN_UPDATE: [[0.0, 0.0]] * 4}
    there = {Quantity("embedding"): line(0), Quantity("hidden", Kind.START): line(0)}
    assert judged({**there, **still}).problems == {"output": "nothing moved"}


def test_nan_fails_and_is_never_written() -> None:
    sizes = [[1.0, 1.0], [1.0, 1.0], [1.0, math.nan], [math.inf, 1.0]]
    checked = judged({OUTPUT: sizes})
    assert checked.problems == {"output": "is not finite"}
    assert checked.slopes["output"] is None
    written = json.loads(json.dumps(checked.as_dict(), allow_nan=False))
    assert written["sizes"]["output"]["3"] == [1.0, 1.0, None, None]


@pytest.mark.parametrize(
    "axis", [{"low": 0.1, "high": 1.0, "points": 3}, {"low": 1e-9, "high": 1e-4, "points": 3}]
)
def test_the_point_is_low_and_central(axis: dict[str, Any], corpus_file: Path) -> None:
    decay = {"low": 0.01, "high": 1.0, "points": 3}
    axes = {"lr": axis, "weight_decay": decay, "warmup": {"value": 0.2}}
    spec = Spec.from_dict({**tiny_spec(corpus_file), "axes": axes})
    assert check_point(spec) == Point.of(lr=0.004, weight_decay=0.1, warmup=0.2)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_spec_with_init_scale_passes(optimizer: str, corpus_file: Path) -> None:
    """Whatever its range: a tied embedding that is large barely moves, and then logits shrink."""
    spec = tiny_spec(corpus_file, optimizer={"name": optimizer}, model={"tied": True, "depth": 2})
    for axis in ({"value": 4.0}, {"low": 1.0, "high": 16.0, "points": 3}):
        spec["axes"]["init_scale"] = axis
        point = check_point(Spec.from_dict(spec))
        assert point["init_scale"] == 1
    model, optimized = gpt_config(depth=2, tied=True), OptimizerConfig(**spec["optimizer"])
    assert check(model, optimized, SHORT, point).passed
    assert not check(model, optimized, SHORT, Point.of({**point, "init_scale": 4.0})).passed


@pytest.mark.parametrize("optimizer", [MUP, ADAMW])
@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_an_init_scale_is_the_same_at_every_width(
    optimizer: OptimizerConfig, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So every start is as flat as without it, and untied all else too; of the same seeds."""
    monkeypatch.setattr(coordcheck, "is_clear", lambda check: True)
    checked = check(gpt_config(depth=2), optimizer, point=Point.of({**POINT, "init_scale": scale}))
    assert checked.passed, checked.problems
    plain = check(gpt_config(depth=2), optimizer)
    for name in ("hidden start", "embedding start"):
        assert checked.slopes[name] == pytest.approx(plain.slopes[name], abs=1e-4)
        expected = [scale * size for size in plain.sizes[name][3]]
        assert checked.sizes[name][3] == pytest.approx(expected, rel=1e-4)


def test_a_clusters_flop_rate_is_not_this_machines(corpus_file: Path) -> None:
    def seconds(rate: float | None) -> float:
        compute = {"device": "cpu", **({"flop_rate": rate} if rate else {})}
        spec = Spec.from_dict(tiny_spec(corpus_file, compute=compute))
        return expected_seconds(BuiltIn.of(spec), SHORT)

    assert seconds(3.2e15) == seconds(None)
    assert seconds(1e9) == pytest.approx(20 * seconds(None))  # ASSUMED_FLOP_RATE is 2e10


@pytest.mark.parametrize("widths", [[16], [16, 32], [16, 32, 64, 128, 256]])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_short_check_is_known_to_be_short_without_counting(
    corpus_file: Path, widths: list[int], name: str
) -> None:
    """The bound holds whatever was counted, and is no more than 25 times what counting finds."""
    data = tiny_spec(
        corpus_file,
        ladder={"widths": widths},
        optimizer={"name": name},
        target={"width": 256},
    )
    prepared = BuiltIn.of(Spec.from_dict(data))
    for extent in (SHORT, Extent()):
        counted = expected_seconds(prepared, extent)
        assert counted <= seconds_at_most(prepared, extent) <= 25 * counted


def test_an_expert_without_a_token_is_not_judged() -> None:
    """Two experts of which the second never gets one: nothing is measured where nothing is."""
    text = (
        MIXER.replace(
            "def forward(self, x):\n        return x @ self.weight.mT",
            "def forward(self, x):\n        return x @ self.weight.mT\n\n"
            "class Idle(nn.Module):\n    def forward(self, x):\n        return x[:0]\n",
        )
        .replace(
            "for block in self.blocks:\n",
            "self.idle[0](x)\n        for block in self.blocks:\n",
        )
        .replace(
            "self.norm = nn.LayerNorm(width)\n",
            "self.norm = nn.LayerNorm(width)\n        self.idle = nn.ModuleList([Idle()])\n",
        )
    )
    assert "self.idle[0](x)" in text
    assert "Idle()" in text
    checked = check(replace(mixer(), text=text))
    assert checked.passed
    assert "blocks.1" in checked.slopes
    assert "idle.0" not in checked.slopes


def test_of_many_blocks_the_steepest_is_shown() -> None:
    slopes = {Quantity(f"blocks.{i}", Kind.CHANGE): 0.01 * i for i in range(30)}
    many = judged({each: line(slope) for each, slope in slopes.items()} | {OUTPUT: line(0)})
    assert many.shown(24) == ["blocks.29 change", "output"]
    assert len(many.shown(31)) == 31
    name, slope = many.steepest
    assert name == "blocks.29 change"
    assert slope == pytest.approx(0.29)


def test_a_long_sequence_is_cut_to_2048_tokens_a_step() -> None:
    config = TrialConfig(
        model=gpt_config(),
        optimizer=MUP,
        train=TrainConfig(steps=9, batch_size=512, sequence_length=8192, warmup=0.5),
        data=DataConfig(source=PYTHON_STDLIB),
        base_width=256,
        corpus_digest="",
    )
    train = check_config(config, SHORT).train
    assert (train.batch_size, train.sequence_length) == (1, 2048)
    assert (train.schedule, train.warmup) == ("constant", 0.0)
    warm = Point.of(lr=0.1, weight_decay=0.1, warmup=0.5)
    trials = check_trials(config, warm, SHORT)
    assert [trial.width for trial in trials] == [256, 256, 512, 512, 1024, 1024, 2048, 2048]
    assert "warmup" not in trials[0].point
