"""Sweeps of trainers that the program does not know, finished by a made-up loss."""

from __future__ import annotations

from typing import Any

from telescope import Ladder, Spec


def foreign_spec(**tables: Any) -> dict[str, Any]:
    return {
        "name": "foreign",
        "ladder": {"widths": [16, 32], "policy": "paper"},
        "target": {"width": 64},
        "axes": {
            "lr": {"low": 0.01, "high": 0.16, "points": 3},
            "weight_decay": {"value": 0.3},
        },
        "optimizer": {"rule": "mup"},
        **tables,
    }


def finished(spec: Spec) -> Ladder:
    ladder = Ladder(spec)
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(trial, loss=1 + abs(trial.point["lr"] - 0.04))
    return ladder
