"""A race of two optimizers whose truth is known: a trainer of microseconds, and its frontier.

To a loss, Muon takes D_min · (1 + B/2000) tokens and AdamW 1.25 times as many, at the best lr,
which is 0.05. Off it, the loss is a parabola. A seed moves the losses of a run by about 0.2 %,
half of it alike at all lr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

RACE = """
import json, math, os, random, time


def race(width, lr, seed, optimizer, batch_size, steps):
    time.sleep(float(os.environ.get("NAP", "0")))
    with open("runs.jsonl", "a") as file:
        file.write(json.dumps([optimizer, batch_size, steps, lr, seed]) + chr(10))
    luck = random.Random(f"{optimizer} {batch_size} {seed}").gauss(0, 0.004)
    luck += random.Random(f"{optimizer} {batch_size} {seed} {lr}").gauss(0, 0.004)
    batch = batch_size * 16
    factor = (1.25 if optimizer == "adamw" else 1.0) * (1 + batch / 2000)
    rows = []
    for part in range(1, 11):
        step = round(part * steps / 10)
        loss = 2 + 3 * (step * batch / factor / 1000) ** -0.4 + luck
        loss += 0.03 * math.log2(lr / 0.05) ** 2
        rows.append({"step": step, "val_loss": loss})
    return {"loss": rows[-1]["val_loss"], "step": steps, "curve": rows}


def even(width, lr, seed, optimizer, batch_size, steps):
    return race(width, lr, seed, "muon", batch_size, steps)
"""


def race_spec(folder: Path, **tables: Any) -> dict[str, Any]:
    """A frontier over batches of 128 to 8,192 tokens."""
    (folder / "races_here.py").write_text(RACE)
    spec = {
        "name": "race",
        "trainer": {
            "function": "races_here:race",
            "folder": str(folder),
            "arguments": {"optimizer": "muon", "batch_size": 8},
            "steps": 100,
        },
        "cost": {"parameters": {"8": 100, "32": 1000}},
        "ladder": {"widths": [8]},
        "target": {"width": 32, "steps": 100_000},
        "axes": {"lr": {"low": 0.0125, "high": 0.2, "points": 5}},
        "frontier": {
            "batch_sizes": [8, 64, 512],
            "tokens": 40_000,
            "steps": 20,
            "sequence_length": 16,
            "trials": 6,
            "repeats": 3,
        },
    }
    for name, table in tables.items():
        merges = isinstance(table, dict) and isinstance(spec.get(name), dict)
        spec[name] = {**spec[name], **table} if merges else table  # type: ignore[dict-item]
    return spec
