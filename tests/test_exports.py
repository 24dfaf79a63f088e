"""Every format's export is read back, and says what the groups say.

A reader here knows its trainer's own formula, written down from the trainer's source and not from
the exporter: per parameter it gives the step per unit of the update and the decay per step, or None
where the trainer has no decay. Both must be those of the groups that the transfer gives.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT, gpt_config, trial_config
from test_cli import telescope
from torch import nn

import telescope as package
from telescope.config import OptimizerConfig, TrainConfig
from telescope.errors import RefusedError, SpecError
from telescope.export.formats import FORMATS, NAMES, check_format, export
from telescope.export.handover import Handover
from telescope.records import Point, Trial
from telescope.rules.scaling import Role, Tag
from telescope.train.loop import set_up, take_step, token_loss
from telescope.train.optim import schedule as share_of_peak
from telescope.transfer.settings import transfer_settings

WIDTH, BASE, VOCABULARY, STEPS = 64, 16, 11, 40
POINT = Point.of(lr=0.03, weight_decay=0.2)
Read = dict[str, tuple[float, float | None]]
"""Parameter → step per unit of its update, and decay per step."""


def tags(up: tuple[int, int] = (4 * WIDTH, 4 * BASE), readout: str = "lm_head.weight") -> list[Tag]:
    """A small decoder; `up` is the longer side of the MLP, at `WIDTH` and at `BASE`."""
    wide, wide0 = up
    return [
        Tag("embed.weight", Role.EMBEDDING, (VOCABULARY, WIDTH), (VOCABULARY, BASE)),
        *(
            tag
            for i in (0, 1)
            for tag in (
                Tag(f"layers.{i}.norm.weight", Role.VECTOR, (WIDTH,), (BASE,)),
                Tag(f"layers.{i}.query_norm.weight", Role.FINITE, (8,), (8,)),
                Tag(f"layers.{i}.query.weight", Role.HIDDEN, (WIDTH, WIDTH), (BASE, BASE)),
                Tag(f"layers.{i}.up.weight", Role.HIDDEN, (wide, WIDTH), (wide0, BASE)),
                Tag(f"layers.{i}.down.weight", Role.RESIDUAL, (WIDTH, wide), (BASE, wide0)),
            )
        ),
        Tag(readout, Role.READOUT, (VOCABULARY, WIDTH), (VOCABULARY, BASE)),
    ]


UNIFORM = tags()
ROUNDED = tags(up=(176, 40))
"""Of 8/3 of the width, rounded to a multiple of 8: ×4.4 where the width grows by 4."""
TRAIN = TrainConfig(steps=STEPS, batch_size=2, sequence_length=8)


def handed_over(
    parameters: list[Tag] = UNIFORM,
    *,
    rule: str = "mup",
    name: str = "muon",
    train: TrainConfig | None = TRAIN,
    point: Point = POINT,
    fold: bool = False,
    approximate: bool = False,
    **optimizer: Any,
) -> Handover:
    config = OptimizerConfig(name=name, rule=rule, **optimizer)  # type: ignore[arg-type]
    transfer = transfer_settings(
        point,
        width=WIDTH,
        steps=STEPS,
        train=train,
        optimizer=config,
        tags={tag.name: tag for tag in parameters},
        fold=fold,
    )
    return Handover("sweep", transfer, config, BASE, approximate)


def asked_for(handover: Handover) -> dict[str, tuple[float, float]]:
    """Step and decay of each parameter, by torch's own formula for the groups."""
    found = {}
    for group in handover.groups:
        scale = 0.2 * math.sqrt(max(group["shape"])) if group["optimizer"] == "Muon" else 1.0
        for name in group["names"]:
            found[name] = scale * group["lr"], group["lr"] * group["weight_decay"]
    return found


# One reader per format. `parameters` says what the trainer would see of the model.


def executed(text: str, modules: dict[str, ModuleType] | None = None) -> dict[str, Any]:
    """The names of an export that is a Python file."""
    names: dict[str, Any] = {"__name__": "exported"}
    with mock.patch.dict(sys.modules, modules or {}):
        exec(compile(text, "export.py", "exec"), names)
    return names


class Part(nn.Module):
    """A module whose parameters are put in by name."""


def model_of(parameters: list[Tag]) -> nn.Module:
    """A model with parameters of these names and shapes."""
    model = Part()
    for tag in parameters:
        *path, last = tag.name.split(".")
        place: nn.Module = model
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, Part())
            place = place.get_submodule(part)
        place.register_parameter(last, nn.Parameter(torch.randn(tag.shape)))
    return model


def read_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Read:
    """What torch's own classes make of their groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: Read = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                scale = 1.0
                if "adjust_lr_fn" in group:
                    assert group["adjust_lr_fn"] == "match_rms_adamw"
                    assert (group["momentum"], group["nesterov"]) == (0.95, True)
                    scale = 0.2 * math.sqrt(max(tensor.shape))
                found[names[id(tensor)]] = scale * group["lr"], group["lr"] * group["weight_decay"]
    return found


def read_torch(text: str, parameters: list[Tag]) -> Read:
    model = model_of(parameters)
    return read_optimizers(model, executed(text)["make_optimizers"](model))


def read_hf(text: str, parameters: list[Tag]) -> Read:
    model = model_of(parameters)
    return read_optimizers(model, [executed(text)["Factory"]()(model)])


MEGATRON = argparse.ArgumentParser()
for flag, default in (
    ("lr", None),
    ("min-lr", 0.0),
    ("weight-decay", 0.01),
    ("decoupled-lr", None),
):
    MEGATRON.add_argument(f"--{flag}", type=float, default=default)
MEGATRON.add_argument("--decoupled-min-lr", type=float)
MEGATRON.add_argument("--optimizer", default="adam", choices=["adam", "sgd", "muon", "dist_muon"])
MEGATRON.add_argument("--muon-scale-mode", default="spectral")
MEGATRON.add_argument("--muon-extra-scale-factor", type=float, default=1.0)
MEGATRON.add_argument("--muon-momentum", type=float, default=0.9)
MEGATRON.add_argument("--muon-nesterov", action="store_true")
MEGATRON.add_argument("--muon-num-ns-steps", type=int, default=5)
MEGATRON.add_argument("--muon-coefficient-type", default="quintic")
MEGATRON.add_argument("--muon-scalar-optimizer", default="adam")
for flag, default in (("adam-beta1", 0.9), ("adam-beta2", 0.999), ("adam-eps", 1e-8)):
    MEGATRON.add_argument(f"--{flag}", type=float, default=default)
MEGATRON.add_argument("--clip-grad", type=float, default=1.0)
MEGATRON.add_argument("--lr-decay-style", default="linear")
MEGATRON.add_argument("--lr-wsd-decay-style", default="exponential")
for flag in ("train-iters", "lr-decay-iters", "lr-warmup-iters", "lr-wsd-decay-iters"):
    MEGATRON.add_argument(f"--{flag}", type=int)
MEGATRON.add_argument("--use-mup", action="store_true")
MEGATRON.add_argument("--mup-base-hidden-size", type=int)
MEGATRON.add_argument("--mup-attn-scale-power", type=float, default=1.0)
"""Megatron-LM's arguments with its defaults, from megatron/training/arguments.py."""


def parsed(text: str) -> argparse.Namespace:
    return MEGATRON.parse_args(shlex.split(text, comments=True))


def megatrons(args: argparse.Namespace, weight_decay: float, parameters: list[Tag]) -> Read:
    """Megatron-LM's groups: `_get_param_groups` and the overrides of muP and decoupled lr."""
    found: Read = {}
    width_mult = WIDTH / args.mup_base_hidden_size if args.use_mup else 1.0
    for tag in parameters:
        is_table = tag.name in ("embed.weight", "lm_head.weight", "head.weight")
        lr, decay = args.lr, weight_decay
        if len(tag.shape) == 1:
            found[tag.name] = lr, None
            continue
        if is_table and args.decoupled_lr is not None:
            lr = args.decoupled_lr
        if args.optimizer == "muon" and not is_table:
            assert args.muon_scale_mode == "spectral"
            assert args.muon_momentum == 0.95
            assert args.muon_nesterov
            step = args.muon_extra_scale_factor * math.sqrt(max(tag.shape)) * lr
        else:
            lr = lr if is_table else lr / width_mult
            step = lr
        found[tag.name] = step, lr * decay
    return found


def read_megatron(text: str, parameters: list[Tag]) -> Read:
    args = parsed(text)
    return megatrons(args, args.weight_decay, parameters)


def read_megatron_bridge(text: str, parameters: list[Tag]) -> Read:
    """The scheduler writes its own decay into every group."""
    rows = [line for line in text.splitlines() if not line.startswith("#")]
    values = dict(row.split("=", 1) for row in rows)
    assert values["scheduler.start_weight_decay"] == values["scheduler.end_weight_decay"]
    assert values["scheduler.weight_decay_incr_style"] == "constant"
    flags = []
    for key, value in values.items():
        section, name = key.split(".")
        assert section in ("optimizer", "scheduler", "model", "train")
        if "weight_decay" not in name and value != "false":
            flags += [f"--{name.replace('_', '-')}"] + ([value] if value != "true" else [])
    args = MEGATRON.parse_args(flags)
    return megatrons(args, float(values["scheduler.start_weight_decay"]), parameters)


@dataclass
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class OptimizersConfig:
    param_groups: list[ParamGroupConfig]
    implementation: str = "fused"
    optimizer_factory_kwargs_by_name: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SchedulersConfig:
    warmup_steps: int = 200
    total_steps: int | None = None
    decay_ratio: float | None = None
    decay_type: str = "linear"
    min_lr_factor: float = 0.0


def torchtitan_modules() -> dict[str, ModuleType]:
    """What an export imports of torchtitan, with the fields of version 0.3.0."""
    module = ModuleType("torchtitan.components.optimizer")
    module.__dict__["ParamGroupConfig"] = ParamGroupConfig
    for name, config in (
        ("OptimizersContainer", OptimizersConfig),
        ("LRSchedulersContainer", SchedulersConfig),
    ):
        module.__dict__[name] = type(name, (), {"Config": config})
    parents = ("torchtitan", "torchtitan.components")
    return {**{name: ModuleType(name) for name in parents}, module.__name__: module}


def read_torchtitan(text: str, parameters: list[Tag]) -> Read:
    """`OptimizersContainer._build_param_groups`: the first pattern that matches has it."""
    names = executed(text, torchtitan_modules())
    muon = "bucket_configs" in text
    config = names["optimizers"](*(["buckets", "shardings"] if muon else []))
    assert ("DistMuon" in config.optimizer_factory_kwargs_by_name) == muon
    found: Read = {}
    kinds = []
    for group in config.param_groups:
        kwargs = group.optimizer_kwargs
        matched = [t for t in parameters if re.search(group.pattern, t.name)]
        matched = [tag for tag in matched if tag.name not in found]
        assert matched, f"{group.pattern} matches nothing"
        kinds.append(group.optimizer_name)
        for tag in matched:
            scale = 1.0
            if group.optimizer_name == "DistMuon":
                assert (kwargs["adjust_lr_fn"], kwargs["nesterov"]) == ("match_rms_adamw", True)
                assert kwargs["foreach"] is False
                scale = 0.2 * math.sqrt(max(tag.shape))
            found[tag.name] = scale * kwargs["lr"], kwargs["lr"] * kwargs["weight_decay"]
    assert kinds.count("DistMuon") <= 1, "DistMuon requires exactly one parameter group"
    return found


def deepspeeds(shape: tuple[int, ...]) -> float:
    """`_aspect_ratio_scale` of DeepSpeed."""
    rows, columns = shape
    return math.sqrt(rows / columns) if rows > columns else 1.0


class MuonWithAuxAdam:
    """Takes DeepSpeed's arguments, and keeps them."""

    def __init__(self, param_groups: list[dict[str, Any]], adam_optimizer: Any = None) -> None:
        self.param_groups = param_groups
        assert adam_optimizer is torch.optim.AdamW


def deepspeed_modules() -> dict[str, ModuleType]:
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    parts = name.split(".")
    modules = {".".join(parts[: i + 1]): ModuleType(part) for i, part in enumerate(parts)}
    modules[name].__dict__["MuonWithAuxAdam"] = MuonWithAuxAdam
    return modules


def read_deepspeed(text: str, parameters: list[Tag]) -> Read:
    model = model_of(parameters)
    names = {id(p): name for name, p in model.named_parameters()}
    with mock.patch.dict(sys.modules, deepspeed_modules()):
        optimizer = executed(text)["make_optimizer"](model)
    found: Read = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            scale = 1.0
            if group.get("use_muon"):
                assert tensor.use_muon
                assert group["ns_method"] == "standard"
                scale = deepspeeds(tensor.shape)
            found[names[id(tensor)]] = scale * group["lr"], group["lr"] * group["weight_decay"]
    return found


def read_deepspeed_json(text: str, parameters: list[Tag]) -> Read:
    """`set_optimizer_flags` and `_muon_param_groups`."""
    table = json.loads(text)["optimizer"]
    params = table["params"]
    found: Read = {}
    for tag in parameters:
        named = any(part in tag.name.lower() for part in ("embed", "lm_head"))
        lr, scale = params.get("adam_lr", params["lr"]), 1.0
        if table["type"] == "Muon" and len(tag.shape) >= 2 and not named:
            lr, scale = params["muon_lr"], deepspeeds(tag.shape)
        found[tag.name] = scale * lr, lr * params["weight_decay"]
    return found


def read_optax(text: str, parameters: list[Tag]) -> Read:
    """`optax.contrib.muon`'s scale_by_shape, and `optax.adamw`."""
    data = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if node.targets[0].id in ("SETTINGS", "NAMES")
    }
    shapes = {tag.name: tag.shape for tag in parameters}
    found: Read = {}
    for label, (kind, settings) in data["SETTINGS"].items():
        for name in data["NAMES"][label]:
            lr, scale = settings["learning_rate"], 1.0
            if kind == "muon":
                scale = settings["consistent_rms"] * math.sqrt(max(shapes[name]))
                assert settings["nesterov"] is True
            else:
                assert settings["nesterov"] is False
            found[name] = scale * lr, lr * settings["weight_decay"]
    return found


def read_maxtext(text: str, parameters: list[Tag]) -> Read:
    """`optimizers.get_optimizer`: one lr; Muon's decay is 0 if left out."""
    keys = yaml.safe_load(text)
    found: Read = {}
    for tag in parameters:
        lr, scale, decay = keys["learning_rate"], 1.0, keys["adam_weight_decay"]
        is_table = tag.name in ("embed.weight", "lm_head.weight", "head.weight")
        if keys["opt_type"] == "muon" and len(tag.shape) == 2 and not is_table:
            scale = keys["muon_consistent_rms"] * math.sqrt(max(tag.shape))
            decay = keys.get("muon_weight_decay", 0.0)
        found[tag.name] = scale * lr, lr * decay
    return found


def read_levanter(text: str, parameters: list[Tag]) -> Read:
    """`MuonConfig.build`: the schedule is of learning_rate, never of ``lr``."""
    keys = yaml.safe_load(text)["optimizer"]
    assert "lr" not in keys
    assert keys["default_weight_decay_mask"] is False, "else norms and embeddings do not decay"
    found: Read = {}
    for tag in parameters:
        is_table = tag.name in ("embed.weight", "lm_head.weight", "head.weight")
        lr, scale, decay = keys["learning_rate"], 1.0, keys["weight_decay"]
        if keys["type"] == "muon":
            if len(tag.shape) == 2 and not is_table:
                assert keys["use_kimi_scaling"] is True
                scale = 0.2 * math.sqrt(max(tag.shape))
            else:
                lr, decay = keys["adam_lr"], keys["adam_weight_decay"]
        found[tag.name] = scale * lr, lr * decay
    return found


READERS: dict[str, Callable[[str, list[Tag]], Read]] = {
    "torch": read_torch,
    "hf": read_hf,
    "megatron": read_megatron,
    "megatron-bridge": read_megatron_bridge,
    "torchtitan": read_torchtitan,
    "deepspeed": read_deepspeed,
    "deepspeed-json": read_deepspeed_json,
    "optax": read_optax,
    "maxtext": read_maxtext,
    "levanter": read_levanter,
}
BY_GROUP = {"torch", "hf", "deepspeed", "optax"}
"""Formats with settings for each group: nothing is out of their reach."""
MEGATRONS = {"megatron", "megatron-bridge"}
SINGLE = set(READERS) - BY_GROUP - {"deepspeed-json"}


def off(handover: Handover, format: str, parameters: list[Tag]) -> dict[str, tuple[float, float]]:
    """Parameter → step and decay as read back, over those that were asked for; 1 where none."""
    read, asked = READERS[format](export(handover, format), parameters), asked_for(handover)
    assert read.keys() == asked.keys(), "every parameter has its settings"
    ratios = {}
    for name, (step, decay) in read.items():
        wanted_step, wanted_decay = asked[name]
        if decay is None:
            assert format in MEGATRONS
        ratios[name] = step / wanted_step, 1.0 if decay is None else decay / wanted_decay
    return ratios


def assert_exact(ratios: dict[str, tuple[float, float]]) -> None:
    for name, pair in ratios.items():
        assert pair == pytest.approx((1.0, 1.0), rel=1e-6), name


def test_every_format_has_a_reader() -> None:
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("rule", ["mup", "moonlight", "standard"])
@pytest.mark.parametrize("format", sorted(SINGLE | BY_GROUP))
def test_what_is_read_back_is_what_the_groups_say(format: str, rule: str) -> None:
    assert_exact(off(handed_over(rule=rule), format, UNIFORM))


@pytest.mark.parametrize("format", sorted(BY_GROUP | {"torchtitan", "maxtext", "levanter"}))
def test_the_papers_decay_is_said_where_each_optimizer_has_its_own(format: str) -> None:
    assert_exact(off(handed_over(rule="paper"), format, UNIFORM))
    ratio = handed_over(rule="mup", adamw_lr_ratio=0.25)
    assert_exact(off(ratio, format, UNIFORM))


@pytest.mark.parametrize("rule", ["mup", "paper"])
@pytest.mark.parametrize("format", sorted(BY_GROUP))
def test_matrices_that_grew_differently_have_settings_of_their_own(format: str, rule: str) -> None:
    handover = handed_over(ROUNDED, rule=rule)
    lrs = {group["lr"] for group in handover.muon}
    assert len(lrs) > 1, "the case is one"
    assert_exact(off(handover, format, ROUNDED))


@pytest.mark.parametrize("format", sorted(SINGLE))
def test_moonlights_matrices_need_no_settings_of_their_own(format: str) -> None:
    assert_exact(off(handed_over(ROUNDED, rule="moonlight"), format, ROUNDED))


@pytest.mark.parametrize("format", sorted(SINGLE))
def test_one_setting_for_matrices_that_grew_differently_is_refused(format: str) -> None:
    with pytest.raises(RefusedError, match=r"one|all parameters at once") as caught:
        export(handed_over(ROUNDED), format)
    message = str(caught.value)
    assert "\n" not in message
    for named in ("hidden 176×64 (layers.0.up.weight and 1 more): step ×", "--approximate"):
        assert named in message


@pytest.mark.parametrize("format", sorted(SINGLE))
def test_the_closest_setting_says_how_far_off_each_group_is(format: str) -> None:
    handover = handed_over(ROUNDED, approximate=True)
    ratios = off(handover, format, ROUNDED)
    steps = {name: step for name, (step, _) in ratios.items() if "norm" not in name}
    assert max(steps.values()) == pytest.approx(1.0, abs=0.08)
    assert min(steps.values()) == pytest.approx(1.0, abs=0.08)
    shown = " ".join(export(handover, format).replace("#", " ").split())
    assert "APPROXIMATE" in shown
    for group in handover.groups:
        step, decay = ratios[group["names"][0]]
        for what, ratio in (("step", step), ("decay", decay)):
            said = re.search(
                rf"{group['role']} {'×'.join(map(str, group['shape']))} \([^)]*\):"
                rf"(?:(?! - ).)*?{what} ×([\d.e-]+)",
                shown,
            )
            if abs(ratio - 1) > 1e-6:
                assert said, (group["role"], group["shape"], what)
                assert float(said[1]) == pytest.approx(ratio, rel=1e-3)
    logs = [math.log(ratios[g["names"][0]][0]) for g in handover.muon]
    assert sum(logs) == pytest.approx(0, abs=1e-9), "their geometric mean"


def test_what_megatron_lacks_is_refused_by_the_names_of_the_norms() -> None:
    """Its norms have the matrices' lr, and all have one decay: AdamW's own lr leaves them out."""
    for handover in (handed_over(adamw_lr_ratio=0.25), handed_over(rule="paper")):
        with pytest.raises(RefusedError, match=r"vector 64 \(layers\.0\.norm\.weight") as caught:
            export(handover, "megatron")
        assert "hidden" not in str(caught.value)
        assert "embedding" not in str(caught.value)
        allowed = replace(handover, approximate=True)
        ratios = off(allowed, "megatron", UNIFORM)
        assert_exact({name: pair for name, pair in ratios.items() if "norm" not in name})
        factor = 4.0 if handover.optimizer.rule == "mup" else 0.25
        assert ratios["layers.0.norm.weight"][0] == pytest.approx(factor)


@pytest.mark.parametrize("format", sorted(READERS))
def test_adamw_alone_is_said_or_refused(format: str) -> None:
    assert_exact(off(handed_over(name="adamw", rule="standard"), format, UNIFORM))
    handover = handed_over(name="adamw", rule="mup")
    if format in BY_GROUP | {"torchtitan"}:
        assert_exact(off(handover, format, UNIFORM))
        return
    with pytest.raises(RefusedError, match=r"hidden 64×64 .*(step|decay) ×"):
        export(handover, format)
    closest = off(replace(handover, approximate=True), format, UNIFORM)
    if format in MEGATRONS:  # its own muP has the hidden lr; the decay is one for all
        assert [step for step, _ in closest.values()] == pytest.approx([1.0] * len(UNIFORM))


def test_deepspeeds_json_alone_is_refused_where_it_cannot_say_it() -> None:
    with pytest.raises(RefusedError, match="residual 64×256") as caught:
        export(handed_over(rule="moonlight"), "deepspeed-json")
    assert "decay ×" in str(caught.value)
    ratios = off(handed_over(approximate=True), "deepspeed-json", UNIFORM)
    up, down = ratios["layers.0.up.weight"][0], ratios["layers.0.down.weight"][0]
    assert up / down == pytest.approx(2), (
        "√max(1, out/in) has half of what the down projection asks"
    )
    renamed = tags(readout="head.weight")
    with pytest.raises(RefusedError, match=r"gives head\.weight to the wrong optimizer"):
        export(handed_over(renamed), "deepspeed-json")
    assert_exact(off(handed_over(renamed), "deepspeed", renamed))


def test_a_folded_readout_is_said_where_groups_have_their_own_settings() -> None:
    folded = handed_over(fold=True)
    for format in sorted(BY_GROUP | {"torchtitan"}):
        assert_exact(off(folded, format, UNIFORM))
        assert "the logits ×" not in export(folded, format)
        assert f"{folded.adamw[-1]['kwargs']['eps']!r}" in export(folded, format)
    for format in sorted(SINGLE - {"torchtitan"}):
        with pytest.raises(RefusedError, match=r"readout 11×64 \(lm_head\.weight\): step ×"):
            export(folded, format)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_export_says_where_it_comes_from_and_what_is_left(format: str) -> None:
    handover = handed_over(approximate=True)
    text = export(handover, format)
    if format == "deepspeed-json":
        text = "\n".join(json.loads(text)["telescope"])
    shown = " ".join(text.replace("#", " ").split())
    for part in (
        "rule mup, base width 16, width 64, r 4",
        "lr 0.03, weight_decay 0.2 (base-width units)",
        "factor ",
        "schedule cosine",
        "not expressed here: -",
    ):
        assert part in shown
    starts = "init_std" if format in ("torch", "hf", "deepspeed") else "residual 64×256 zeros"
    assert starts in shown
    if format not in MEGATRONS:
        assert "the logits × 0.25" in shown
    else:
        assert "the logits" not in shown, "its own muP has it"
        assert "decay on norm gains" in shown


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_muon_that_no_trainer_has_is_refused_with_the_reason(format: str) -> None:
    for odd in ({"ns_dtype": "fp32"}, {"ns": "polar-express"}):
        with pytest.raises(RefusedError, match=r"hidden 64×64 .*needs a Muon with"):
            export(handed_over(**odd), format)  # type: ignore[arg-type]
    without = replace(handed_over().transfer, groups=None)
    with pytest.raises(RefusedError, match=r"no groups.*--shapes"):
        export(replace(handed_over(), transfer=without), format)


def test_a_muon_that_some_trainers_lack_is_refused_by_those() -> None:
    for format in ("maxtext", "deepspeed", "deepspeed-json"):
        with pytest.raises(RefusedError, match="nesterov is off") as caught:
            export(handed_over(nesterov=False, ns_steps=6), format)
        assert "5 Newton–Schulz steps, not 6" in str(caught.value), "all reasons at once"
    assert "nesterov: false" in export(handed_over(nesterov=False), "levanter")
    text = export(handed_over(nesterov=False, ns_steps=6), "megatron")
    assert (parsed(text).muon_nesterov, parsed(text).muon_num_ns_steps) == (False, 6)


# Schedules: in the trainer's own words, or as a function, which must be telescope's.

SCHEDULES = {
    "cosine": replace(TRAIN, warmup=0.1, final_lr=0.2),
    "constant": replace(TRAIN, schedule="constant", warmup=0.1),
    "wsd": replace(TRAIN, schedule="wsd", warmup=0.1, decay=0.25, final_lr=0.1),
}


@pytest.mark.parametrize("warmup", [0.0, 0.025, 0.1, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("format", ["torch", "deepspeed"])
def test_the_schedule_of_a_torch_file_is_telescopes(format: str, name: str, warmup: float) -> None:
    train = replace(SCHEDULES[name], warmup=warmup)
    share = executed(export(handed_over(train=train), format))["share_of_peak"]
    for step in range(STEPS):
        assert share(step) == pytest.approx(share_of_peak(step, train), rel=1e-12), step
    if warmup < 1:
        assert share(STEPS) == pytest.approx(share(STEPS - 1)), "schedulers look a step ahead"


def test_the_schedule_in_other_words() -> None:
    words = {name: handed_over(train=train) for name, train in SCHEDULES.items()}
    style = {name: parsed(export(of, "megatron")) for name, of in words.items()}
    assert [style[n].lr_decay_style for n in SCHEDULES] == ["cosine", "constant", "WSD"]
    for name, args in style.items():
        iters = args.train_iters, args.lr_decay_iters, args.lr_warmup_iters
        assert (iters, args.clip_grad) == ((40, 40, 4), 0.0)
        final = {"cosine": 0.2, "constant": 1.0, "wsd": 0.1}[name]
        assert args.min_lr == pytest.approx(final * args.lr)
    assert style["wsd"].lr_wsd_decay_iters == 10
    assert style["wsd"].lr_wsd_decay_style == "linear"

    titan = {
        name: executed(export(of, "torchtitan"), torchtitan_modules())["lr_scheduler"]()
        for name, of in words.items()
    }
    assert titan["cosine"] == SchedulersConfig(
        warmup_steps=4, total_steps=40, decay_type="cosine", min_lr_factor=0.2
    )
    assert titan["wsd"].decay_ratio == 0.25
    assert titan["constant"].min_lr_factor == 1.0

    maxtext = {name: yaml.safe_load(export(of, "maxtext")) for name, of in words.items()}
    assert [maxtext[n]["lr_schedule_type"] for n in SCHEDULES] == ["cosine", "cosine", "wsd"]
    assert maxtext["constant"]["learning_rate_final_fraction"] == 1.0
    assert maxtext["wsd"]["wsd_decay_steps_fraction"] == 0.25
    for keys in maxtext.values():
        assert keys["warmup_steps_fraction"] == 0.1
        assert keys["steps"] == keys["learning_rate_schedule_steps"] == 40

    levanter = {name: yaml.safe_load(export(of, "levanter")) for name, of in words.items()}
    kinds = [levanter[n]["optimizer"]["lr_schedule"] for n in SCHEDULES]
    assert kinds == ["cosine", "constant", "linear"]
    assert levanter["wsd"]["optimizer"]["decay"] == 0.25
    assert levanter["cosine"]["optimizer"]["min_lr_ratio"] == 0.2
    assert all(keys["trainer"] == {"num_train_steps": 40} for keys in levanter.values())

    hf = {name: executed(export(of, "hf"))["ARGUMENTS"] for name, of in words.items()}
    assert hf["cosine"] == {
        "max_steps": 40,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
        "warmup_steps": 4,
        "max_grad_norm": 0.0,
    }
    assert hf["wsd"]["lr_scheduler_kwargs"]["num_decay_steps"] == 10
    assert hf["constant"]["lr_scheduler_type"] == "constant_with_warmup"

    for name, train in SCHEDULES.items():
        text = export(handed_over(train=train, name="adamw", rule="standard"), "deepspeed-json")
        table = json.loads(text)
        if name == "wsd":
            assert "scheduler" not in table
            assert "no scheduler" in "\n".join(table["telescope"])
        else:
            final = 0.2 if name == "cosine" else 1.0
            assert table["scheduler"]["params"]["cos_min_ratio"] == final


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_schedule_of_another_trainer_is_left_to_it(format: str) -> None:
    text = export(handed_over(train=None, approximate=True), format)
    assert "own trainer: lr is its peak" in " ".join(text.replace("#", " ").split())
    for word in ("clip-grad", "warmup_steps:", "max_grad_norm", "lr_decay_style"):
        assert word not in text


# What torch runs of it.


def test_the_torch_file_starts_a_model_and_refuses_another() -> None:
    names = executed(export(handed_over(), "torch"))
    torch.manual_seed(0)
    model = model_of(UNIFORM)
    names["start"](model)
    tensors = dict(model.named_parameters())
    for group in handed_over().groups:
        tensor = tensors[group["names"][0]].detach()
        if group["role"] not in ("vector", "finite"):
            assert float(tensor.std()) == pytest.approx(group["init_std"], rel=0.15)
        else:
            assert float(tensor.abs().sum()) > 0, "as the model has it"
    other = model_of([*UNIFORM, Tag("layers.2.new.weight", Role.VECTOR, (8,), (8,))])
    with pytest.raises(ValueError, match=r"lack: layers\.2\.new\.weight"):
        names["make_optimizers"](other)


def reference() -> dict[str, Any]:
    """The published answer at a width that was never swept, for a run of 20 steps."""
    sweep = package.open(ROOT / "results" / "reference" / "quickstart")
    assert 64 * 3 // 4 not in sweep.spec.ladder.widths
    return {"transfer": sweep.transfer(48, 20), "spec": sweep.spec}


def test_the_torch_file_trains_as_telescope_does(corpus_file: Path) -> None:
    """Twenty steps at a width that was never swept; agreement as a share of the distance moved."""
    given = reference()
    spec, answer = given["spec"], given["transfer"]
    text = export(Handover("quickstart", answer, spec.optimizer, spec.base_width), "torch")
    names = executed(text)
    keywords = {"vocab_size": 256, "depth": 2, "head_dim": 16, "mlp_ratio": 2}
    config = trial_config(corpus_file, model=gpt_config(**keywords), steps=20, sequence_length=32)
    config = replace(config, base_width=spec.base_width)
    trial = Trial(48, answer.point, 0)
    ours, plain = set_up(config, trial), set_up(config, trial)
    before = [p.detach().clone() for p in ours.model.parameters()]
    optimizers = names["make_optimizers"](plain.model)
    schedulers = names["make_schedulers"](optimizers)
    for step in range(20):
        take_step(ours.model, ours.optimizers, ours.batches, ours.train, step, "cpu")
        token_loss(plain.model, *plain.batches.at(step)).backward()  # type: ignore[no-untyped-call]
        for part in (*optimizers, *schedulers):
            part.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    pairs = zip(before, ours.model.parameters(), plain.model.parameters(), strict=True)
    gaps = [float(((p - q).norm() / (p - start).norm()).item()) for start, p, q in pairs]
    assert max(gaps) <= 1e-3


def test_the_optimizer_of_the_hf_factory_steps_as_the_torch_files_do() -> None:
    """A scheduler's lr reaches both parts of it, and a checkpoint brings their state back."""
    first = model_of(UNIFORM)
    second = model_of(UNIFORM)
    second.load_state_dict(first.state_dict())
    plain = executed(export(handed_over(), "torch"))
    whole = executed(export(handed_over(), "hf"))["Factory"]
    optimizers = plain["make_optimizers"](first)
    optimizer = whole()(second)
    lambdas = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.5**s) for o in optimizers]
    of_it = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for part in (*optimizers, *lambdas):
            part.step()
        optimizer.step()
        of_it.step()
        if step == 1:  # go on from a checkpoint
            kept = optimizer.state_dict()
            optimizer = whole()(second)
            optimizer.load_state_dict(kept)
            of_it = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s, last_epoch=1)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


# The command line.

REFERENCE = ROOT / "results" / "reference" / "quickstart"


def test_a_format_that_is_not_there_has_its_nearest_named() -> None:
    for given, nearest in (("megatorn", "megatron"), ("torchtian", "torchtitan"), ("JSON", None)):
        with pytest.raises(SpecError, match=f"got '{given}', must be one of json, torch") as caught:
            check_format(given)
        assert str(caught.value).endswith(f"did you mean {nearest}?") == (nearest is not None)
    for name in NAMES:
        check_format(name)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "megatrn"], 2, "did you mean megatron?"),
        (["--format", "torch", "--json"], 2, "--json: left out beside --format torch"),
        (["--approximate"], 2, "--approximate: is for the --format"),
        (["--format", "deepspeed-json"], 1, "readout.weight to the wrong optimizer"),
        (["--format", "torch", "--out", "no/such/folder/x.py"], 2, "--out no/such/folder/x.py"),
    ],
)
def test_what_cannot_be_done_is_a_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = telescope("transfer", REFERENCE, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_json_is_what_it_was(tmp_path: Path) -> None:
    plain = telescope("transfer", REFERENCE, "--json", cwd=tmp_path).stdout
    assert telescope("transfer", REFERENCE, "--format", "json", cwd=tmp_path).stdout == plain
    for name, more in (("a", []), ("b", ["--format", "json"])):
        done = telescope("transfer", REFERENCE, *more, "--out", f"{name}.json", cwd=tmp_path)
        assert done.stdout == f"wrote {name}.json\n"
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(plain)


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - {"deepspeed-json"}))
def test_the_published_answer_is_exported(format: str, tmp_path: Path) -> None:
    done = telescope("transfer", REFERENCE, "--format", format, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rule mup, base width 32, width 256, r 8" in done.stdout
    kept = telescope("transfer", REFERENCE, "--format", format, "--out", "x", cwd=tmp_path)
    assert kept.stdout == "wrote x\n"
    assert (tmp_path / "x").read_text(encoding="utf-8") == done.stdout
    longest = max(len(line) for line in done.stdout.splitlines() if "\\." not in line)
    assert longest <= 100


def test_the_torch_file_runs_alone(tmp_path: Path) -> None:
    names = {"__name__": "__main__"}
    text = telescope("transfer", REFERENCE, "--format", "torch", cwd=tmp_path).stdout
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(text, "export.py", "exec"), names)
    assert "residual [256, 512] Muon" in shown.getvalue()


def lines_of(text: str) -> Iterator[str]:
    """Lines that are no comments."""
    return (line for line in text.splitlines() if line and not line.startswith("#"))


def test_megatrons_silent_defaults_are_written_out() -> None:
    """Momentum 0.9, Nesterov off, scale factor 1, attention 1/d, muP off."""
    rows = set(lines_of(export(handed_over(), "megatron")))
    assert {
        *("--muon-momentum 0.95", "--muon-nesterov", "--muon-scale-mode spectral"),
        *("--muon-num-ns-steps 5", "--muon-coefficient-type quintic", "--use-mup"),
        *("--mup-base-hidden-size 16", "--mup-attn-scale-power 0.5"),
    } <= rows
    assert "--muon-extra-scale-factor 0.1" in rows, "0.2/√4"
    assert "--use-mup" not in set(lines_of(export(handed_over(rule="standard"), "megatron")))
