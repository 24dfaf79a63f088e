"""Measure a dense grid at the target width, which the sweep never trains: `python grid.py`.

Writes grid.csv: every learning rate with every seed, on one CPU in about half a minute.
"""

from __future__ import annotations

import contextlib
import csv
import os
from pathlib import Path

from train import train

WIDTH, BASE_WIDTH, WEIGHT_DECAY = 256, 32, 0.1
SEEDS = (0, 1, 2)
RATES = [round(0.002 * 2 ** (i / 2), 6) for i in range(13)]


def main() -> None:
    """Train the whole grid."""
    with (Path(__file__).parent / "grid.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("lr", "seed", "loss"))
        for lr in RATES:
            for seed in SEEDS:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    loss = train(WIDTH, BASE_WIDTH, seed, lr, WEIGHT_DECAY)
                rows.writerow((lr, seed, round(loss, 6)))


if __name__ == "__main__":
    main()
