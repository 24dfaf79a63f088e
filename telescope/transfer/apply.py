"""A transfer's settings applied to a torch model: its initial values, optimizers and schedulers."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from telescope.errors import ModelError, RefusedError, SpecError
from telescope.rules.groups import Group
from telescope.rules.parametrization import draw, set_multiplier
from telescope.rules.scaling import Role, Start, layer_biases, owners_of
from telescope.rules.schedule import share_of_peak
from telescope.transfer.settings import Transfer, fold_readout
from telescope.transfer.stacks import StackMuon

OPTIMIZERS = {"Muon": StackMuon, "AdamW": torch.optim.AdamW}
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Parts of a parameter's name that torch.compile and activation checkpointing add anywhere."""
MOST_NAMES = 20
"""Names that one message lists of each fault; of more it gives the number."""


@dataclass(frozen=True)
class Training:
    """The torch optimizers of a model, with their learning-rate schedulers."""

    optimizers: list[torch.optim.Optimizer]
    """One of each class, with a param group per group of the settings."""
    schedulers: list[LambdaLR]
    """One per optimizer; none where the settings have no schedule, which is then the caller's."""

    def step(self) -> None:
        """Take one step with every optimizer, then with every scheduler."""
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def zero_grad(self) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, to be saved beside the model's."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            ValueError: it is the state of other settings.
        """
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)


def apply(
    model: nn.Module,
    settings: Transfer | Mapping[str, Any] | str | Path,
    *,
    seed: int = 0,
    fold: bool = False,
) -> Training:
    """Initialise a model by role, set its readout's multiplier, and make its optimizers.

    The model has the width of the settings. It may be wrapped by torch.compile or DDP; load a
    checkpoint after this, not before. On any error the model is as it was.

    Args:
        model: plain torch, or with mup's readouts, which then need no base shapes.
        settings: the file of `telescope transfer --out`, its content, or what `transfer` returned.
        seed: of the initial values. A trial with this seed has the same on the same model.
        fold: put the readout's multiplier into its settings instead of the forward pass; for code
            that uses the readout's weight without calling its module. See `fold_readout`.

    Returns:
        The optimizers and schedulers, before the first step.

    Raises:
        SpecError: the settings cannot be read, or are not those of a transfer.
        RefusedError: they need an optimizer that torch has not, or `fold` and the readout is tied.
        ModelError: model and settings have not the same parameters; it lists all that differ.
    """
    data, where = _read(settings)
    groups = _groups(data, where)
    if fold:
        groups = [fold_readout(group) for group in groups]
    parameters = _matched(model, groups, data.get("width"), where)
    outputs = list(_outputs(model, groups, parameters))
    schedule = _schedule(data, where)
    optimizers = _optimizers(groups, parameters, where)
    schedulers = [LambdaLR(optimizer, schedule) for optimizer in optimizers] if schedule else []
    _initialise(model, groups, parameters, seed)
    for module, multiplier in outputs:
        set_multiplier(module, multiplier)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled before does not know of the multiplier
    return Training(optimizers, schedulers)


def _read(settings: Transfer | Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    """Return the JSON's keys, and what to call them in messages."""
    if isinstance(settings, Transfer):
        return settings.as_dict(), "the settings"
    if isinstance(settings, Mapping):
        return settings, "the settings"
    path = Path(settings)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path}: is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: must be the output of `telescope transfer --out`")
    return data, path.name


def _groups(data: Mapping[str, Any], where: str) -> list[Group]:
    """Return the settings' groups.

    Raises:
        SpecError: there are none, or they are not those of a transfer.
        RefusedError: torch has no optimizer for some of them.
    """
    if not data.get("groups"):
        raise SpecError(
            f"{where}: has no groups; `telescope transfer` gives them for a spec with a model "
            "file, or with --shapes FILE"
        )
    missing = {
        f"{entry['role']}: {entry['note']}"
        for entry in data["groups"]
        if isinstance(entry, Mapping) and entry.get("optimizer", "") is None
    }
    if missing:
        raise RefusedError(
            f"{where}: torch.optim has no optimizer for {'; '.join(sorted(missing))}; build the "
            "optimizer of these groups yourself"
        )
    groups = []
    for number, entry in enumerate(data["groups"], 1):
        try:
            groups.append(_group(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise SpecError(
                f"{where}: group {number}: is not one of `telescope transfer` ({why})"
            ) from error
    return groups


def _group(entry: Mapping[str, Any]) -> Group:
    """Return one group of the JSON; an older one without `init` leaves a vector's open."""
    if entry["optimizer"] not in OPTIMIZERS:
        raise ValueError(f"optimizer {entry['optimizer']!r}, must be {' or '.join(OPTIMIZERS)}")
    role, std, start = Role(entry["role"]), float(entry["init_std"]), entry.get("init")
    if start is None and not role.is_vector:
        start = Start.NORMAL if std else Start.ZEROS
    return Group(
        role=role,
        shape=tuple(entry["shape"]),
        names=tuple(entry["names"]),
        is_muon=entry["optimizer"] == "Muon",
        lr=float(entry["lr"]),
        weight_decay=float(entry["weight_decay"]),
        kwargs={
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entry["kwargs"].items()
        },
        init_std=std,
        multiplier=float(entry["multiplier"]),
        start=Start(start) if start else None,
    )


def _plain(name: str) -> str:
    """Return a parameter's name without what wrappers add to it.

    >>> _plain("_orig_mod.module.blocks.0._orig_mod.weight")
    'blocks.0.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _matched(
    model: nn.Module, groups: list[Group], width: int | None, where: str
) -> list[list[nn.Parameter]]:
    """Find the parameters of every group.

    Raises:
        ModelError: one or more are unknown, missing, or of another kind than the settings say.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    plain = {_plain(name): parameter for name, parameter in every.items()}
    found = {
        name: every.get(name, plain.get(_plain(name))) for group in groups for name in group.names
    }
    present = {name: parameter for name, parameter in found.items() if parameter is not None}
    known = {id(parameter) for parameter in present.values()}
    times = Counter(id(parameter) for parameter in present.values())
    shapes = {name: group.shape for group in groups for name in group.names}
    faults = {
        "no settings for {}, which the model trains": [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in known
        ],
        "the model has no {}": [name for name in found if name not in present],
        "other shapes in the model: {}": [
            f"{name} {list(p.shape)}, not {list(shapes[name])}"
            for name, p in present.items()
            if tuple(p.shape) != shapes[name]
        ],
        "frozen in the model: {}": [n for n, p in present.items() if not p.requires_grad],
        "one parameter of the model under several names: {}": [
            name for name, p in present.items() if times[id(p)] > 1
        ],
        "on the meta device, without values (call model.to_empty(device=...) first): {}": [
            name for name, p in present.items() if p.is_meta
        ],
        "sharded (apply before sharding): {}": [
            name for name, p in present.items() if hasattr(p, "device_mesh")
        ],
    }
    said = [text.format(_listed(names)) for text, names in faults.items() if names]
    if said:
        settings = f"{where}, of width {width}," if width else where
        raise ModelError(f"{settings} and the model do not fit: {'; '.join(said)}")
    return [[present[name] for name in group.names] for group in groups]


def _listed(names: list[str]) -> str:
    """List names for a message; of very many the first, and how many more there are."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _outputs(
    model: nn.Module, groups: list[Group], parameters: list[list[nn.Parameter]]
) -> Iterator[tuple[nn.Module, float]]:
    """Yield every module that computes logits, with the multiplier of its output.

    Raises:
        ModelError: a readout with a multiplier is in no module that can be given one.
    """
    owners = owners_of(model)
    for group, members in zip(groups, parameters, strict=True):
        if group.role not in (Role.READOUT, Role.TIED):
            continue
        for name, parameter in zip(group.names, members, strict=True):
            modules = [m for m in owners[id(parameter)] if not isinstance(m, nn.Embedding)]
            are_linear = all(isinstance(module, nn.Linear) for module in modules)
            if group.multiplier != 1 and not (modules and are_linear):
                raise ModelError(
                    f"{name}: its logits must be multiplied by {group.multiplier:g}, and no "
                    "nn.Linear has this weight; multiply them in forward, and set the group's "
                    "multiplier to 1 in the settings"
                    + ("" if group.role is Role.TIED else ", or pass fold=True")
                )
            yield from ((m, group.multiplier) for m in modules if isinstance(m, nn.Linear))


def _initialise(
    model: nn.Module, groups: list[Group], parameters: list[list[nn.Parameter]], seed: int
) -> None:
    """Give every parameter its initial values, in the model's order, as a trial does."""
    group_of = {
        id(parameter): group
        for group, members in zip(groups, parameters, strict=True)
        for parameter in members
    }
    biases = set(layer_biases(model))
    drawn = []
    for name, parameter in model.named_parameters():
        group = group_of.get(id(parameter))
        if group is None or group.start is Start.AS_BUILT:
            continue
        if group.start is Start.ONES:
            nn.init.ones_(parameter)
        elif group.start is not None or name in biases:
            drawn.append((parameter, group.init_std if group.start is Start.NORMAL else 0.0))
    draw(model, drawn, seed=seed)


def _schedule(data: Mapping[str, Any], where: str) -> Callable[[int], float] | None:
    """Return the learning rate's share of its peak as a function of the step, if there is one."""
    if not data.get("schedule"):
        return None
    schedule: Callable[[int], float] = partial(
        share_of_peak, **{**data["schedule"], "steps": data.get("steps")}
    )
    try:
        for step in (0, data["schedule"]["warmup_steps"]):
            schedule(step)
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(
            f"{where}: schedule: is not one of `telescope transfer`: {error}"
        ) from error
    return schedule


def _optimizers(
    groups: list[Group], parameters: list[list[nn.Parameter]], where: str
) -> list[torch.optim.Optimizer]:
    """Make one optimizer of each class that the groups name.

    Raises:
        SpecError: torch does not take a group's settings.
    """
    made: list[torch.optim.Optimizer] = []
    for name, kind in OPTIMIZERS.items():
        own = [
            {
                "params": members,
                "lr": group.lr,
                "weight_decay": group.weight_decay,
                **group.kwargs,
            }
            for group, members in zip(groups, parameters, strict=True)
            if group.is_muon == (name == "Muon")
        ]
        try:
            made += [kind(own)] if own else []
        except (TypeError, ValueError) as error:
            raise SpecError(f"{where}: torch.optim.{name} refuses it: {error}") from error
    return made
