"""Distance of right and wrong models from the coordinate check's threshold.

    python benchmarks/coordcheck.py         about seven minutes on 2 cores

The quickstart model and variants of it, each checked in full. The threshold is 0.25: half way from
a right model's 0 to the half power of the width that every known mistake amounts to.
"""

from __future__ import annotations

import time

from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.modelcheck import run_check

VARIANTS = (
    "",
    "model.tied=true",
    "model.head_dim=32",
    "model.tied=true model.head_dim=32",
    "model.heads_per_kv=2",
    "model.depth=4",
    "optimizer.ns=polar-express",
    "optimizer.name=adamw",
    "optimizer.name=adamw model.tied=true",
    "optimizer.rule=paper",
    "optimizer.rule=paper model.tied=true",
    "optimizer.rule=moonlight",
    "optimizer.rule=moonlight model.tied=true",
    "optimizer.rule=standard",
    "optimizer.rule=standard model.tied=true",
    "optimizer.name=adamw optimizer.rule=standard",
)


def main() -> None:
    """Print a row per variant."""
    print("| quickstart with | verdict | hidden update | blocks.1 change | output | steepest | s |")
    print("|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        spec = Spec.load("quickstart", variant.split())
        start = time.perf_counter()
        check = run_check(BuiltIn.of(spec), say=print)
        columns = [
            f"{check.slopes[name]:+.2f} ± {check.errors[name]:.2f}"
            for name in ("hidden update", "blocks.1 change", "output")
        ]
        name, slope = check.steepest
        print(
            f"| {variant or 'nothing changed'} | {check.verdict} | {' | '.join(columns)} "
            f"| {slope:+.2f} ({name}) | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
