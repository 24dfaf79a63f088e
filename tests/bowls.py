"""A sweep of a bowl, which a command of milliseconds trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import quiet

from telescope import Spec
from telescope.sweep.run import Options, run

BOWL = """
import json, math, os, sys, time
width, lr, seed = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
nap = float(os.environ.get("NAP", "0"))
start = time.time()
time.sleep(nap)
noise = math.sin(1e4 * (lr + seed)) / 1000
loss = 2 + math.log2(lr / 0.1 / (1 + 1 / width)) ** 2 / 50 + noise
cpus = os.environ.get("OMP_NUM_THREADS")
row = {"width": width, "start": start, "end": time.time(), "cpus": cpus, "parent": os.getppid()}
with open("runs.jsonl", "a") as file:
    file.write(json.dumps(row) + chr(10))
print(json.dumps({"step": 1, "train_loss": loss + 1}))
print(json.dumps({"loss": loss, "step": 2}))
"""
COMMAND = ["{python}", "-S", "bowl.py", "{width}", "{lr}", "{seed}"]


def bowl_spec(folder: Path, **tables: Any) -> dict[str, Any]:
    """A sweep of a bowl, trained by a script that takes milliseconds."""
    if not (folder / "bowl.py").exists():
        (folder / "bowl.py").write_text(BOWL)
    spec = {
        "name": "bowl",
        "trainer": {"command": COMMAND, "folder": str(folder)},
        "cost": {"parameters": {"8": 10, "16": 30, "32": 100}},
        "ladder": {"widths": [8, 16]},
        "target": {"width": 32},
        "axes": {"lr": {"low": 0.01, "high": 1.0, "points": 7}},
        "optimizer": {"rule": "mup"},
        "budget": {"max_over_target": 10.0},
    }
    for name, table in tables.items():
        merges = isinstance(table, dict) and isinstance(spec.get(name), dict)
        spec[name] = {**spec[name], **table} if merges else table  # type: ignore[dict-item]
    return {name: table for name, table in spec.items() if table is not None}


def run_bowl(folder: Path, **tables: Any) -> Any:
    """Run the sweep inline, into the folder of results beside the script."""
    spec = Spec.from_dict(bowl_spec(folder, **tables))
    ran = run(spec, Options(folder / "results", dispatcher="inline"), quiet)
    return ran.folder, ran.ladder
