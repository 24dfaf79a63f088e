"""Exports read back: what each trainer's own formula makes of an export, per parameter."""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from telescope.config import OptimizerConfig, TrainConfig
from telescope.export.formats import export
from telescope.export.handover import Handover
from telescope.records import Point
from telescope.rules.scaling import Role, Tag
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


@contextmanager
def standing_in(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Put modules in place of those of a trainer that is not installed.

    `mock.patch.dict(sys.modules)` would forget all that is imported meanwhile too: parts of torch
    come late, and cannot be imported twice.
    """
    with ExitStack() as stack:
        for name in modules:
            stack.callback(put_module, name, sys.modules.get(name))
        sys.modules.update(modules)
        yield


def put_module(name: str, module: ModuleType | None) -> None:
    """Make `import name` give this module; None forgets it."""
    if module is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = module


def executed(text: str, modules: dict[str, ModuleType] | None = None) -> dict[str, Any]:
    """The names of an export that is a Python file."""
    names: dict[str, Any] = {"__name__": "exported"}
    with standing_in(modules or {}):
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
    """Build torch's own optimizers from the groups."""
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
    """Stand-ins for the modules of torchtitan that an export imports, with the fields of 0.3.0."""
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
    with standing_in(deepspeed_modules()):
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


SCHEDULES = {
    "cosine": replace(TRAIN, warmup=0.1, final_lr=0.2),
    "constant": replace(TRAIN, schedule="constant", warmup=0.1),
    "wsd": replace(TRAIN, schedule="wsd", warmup=0.1, decay=0.25, final_lr=0.1),
}


def lines_of(text: str) -> Iterator[str]:
    """Lines that are no comments."""
    return (line for line in text.splitlines() if line and not line.startswith("#"))
