"""Pieces of the exports that are Python files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from telescope.export.handover import Handover

LINE = 80
"""Of plain data, without its key."""


def literal(name: str, value: Any) -> str:
    """An assignment of plain data, laid out as a formatter would."""
    return f"{name} = {laid_out(value)}\n"


def laid_out(value: Any, indent: int = 0) -> str:
    """Plain data as Python source.

    >>> laid_out({"a": [1.5, True, None], "b": ("c",)})
    '{"a": [1.5, True, None], "b": ["c"]}'
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (Mapping, list, tuple)):
        return repr(value)
    inner = indent + 4
    if isinstance(value, Mapping):
        opened, closed = "{", "}"
        parts = [f"{laid_out(key)}: {laid_out(of, inner)}" for key, of in value.items()]
    else:
        opened, closed = "[", "]"
        parts = [laid_out(of, inner) for of in value]
    line = opened + ", ".join(parts) + closed
    if len(line) + indent <= LINE and "\n" not in line:
        return line
    lines = "".join(f"{' ' * inner}{part},\n" for part in parts)
    return f"{opened}\n{lines}{' ' * indent}{closed}"


def share_of_peak(schedule: Mapping[str, Any] | None, steps: int | None) -> str:
    """Source of a function from the step, counted from 0, to its share of the peak lr.

    It is `telescope.train.optim.schedule` with this run's numbers in it.
    """
    if schedule is None:
        return (
            "def share_of_peak(step):\n"
            '    """Put your schedule here, the one that the sweep was trained with."""\n'
            "    return 1.0\n"
        )
    assert steps is not None
    warmup, final, last = schedule["warmup_steps"], schedule["final_lr"], steps - 1
    match schedule["name"]:
        case "constant":
            after = ["return 1.0"]
        case "cosine":
            start = max(warmup - 1, 0)
            after = [
                f"progress = min((step - {start}) / {max(last - start, 1)}, 1)",
                f"return {final!r} + {1 - final!r} * (1 + math.cos(math.pi * progress)) / 2",
            ]
        case _:
            start = max(last - schedule["decay_steps"], warmup - 1)
            after = [
                f"progress = min(max(step - {start}, 0) / {max(last - start, 1)}, 1)",
                f"return 1 - {1 - final!r} * progress",
            ]
    before = [f"if step < {warmup}:", f"    return (step + 1) / {warmup}"] if warmup else []
    return "\n".join(
        [
            "def share_of_peak(step):",
            f'    """Schedule {schedule["name"]}: the share of the peak lr; steps from 0."""',
            *(f"    {line}" for line in [*before, *after]),
            "",
        ]
    )


def imports(code: str) -> str:
    """The imports of an export for torch with this code in it."""
    return ("import math\n\n" if "math." in code else "") + "import torch\n"


CLAIM = '''\
def claim(model):
    """The model's tensors by name. Each must have a group, and each name in a group a tensor."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = {name for group in GROUPS for name in group["names"]}
    if named != tensors.keys():
        odd = sorted(named ^ tensors.keys())
        raise ValueError(f"names that the model or the groups lack: {', '.join(odd[:5])}")
    return tensors
'''

START = '''\
def start(model):
    """Initialise the parameters as the sweep did; the others stay as the model has them."""
    tensors = claim(model)
    for group in GROUPS:
        for name in group["names"]:
            if group["init"] == "normal":
                torch.nn.init.normal_(tensors[name], std=group["init_std"])
            elif group["init"] in ("zeros", "ones"):
                torch.nn.init.constant_(tensors[name], float(group["init"] == "ones"))
'''


def groups_literal(handover: Handover) -> str:
    """The groups as data of an export for torch."""
    keys = (
        "role",
        "shape",
        "optimizer",
        "lr",
        "weight_decay",
        "kwargs",
        "init",
        "init_std",
        "names",
    )
    return literal("GROUPS", [{key: group[key] for key in keys} for group in handover.groups])
