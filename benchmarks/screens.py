"""Time that a person waits for a screen, as a multiple of `python -c "import torch"`.

    python benchmarks/screens.py [--first-trial]

Each command runs in a process of its own, with byte code in place and after one run that is not
counted, in turns with the import; the fastest of `ROUNDS` counts. The sweep is the kept quickstart.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5
ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results" / "reference" / "quickstart"
TELESCOPE = [sys.executable, "-m", "telescope"]
COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "--help": [*TELESCOPE, "--help"],
    "ls": [*TELESCOPE, "ls"],
    "show": [*TELESCOPE, "show", "quickstart"],
    "transfer": [*TELESCOPE, "transfer", "quickstart"],
    "plan": [*TELESCOPE, "plan", "quickstart"],
    "run, finished": [*TELESCOPE, "run", "quickstart"],
}


def seconds(command: list[str], place: Path) -> float:
    """Wall time of one process."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(ROOT)
    start = time.perf_counter()
    subprocess.run(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def first_trial(place: Path) -> float:
    """Seconds from the command to the first result of a new quickstart."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    command = [*TELESCOPE, "run", "quickstart", "--results", "new"]
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        line = next(line for line in run.stdout if line.startswith("["))
        taken = time.perf_counter() - start
        print(line.strip())
        run.terminate()
        run.stdout.read()
    return taken


def main() -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(REFERENCE, place / "results" / "quickstart")
        for command in COMMANDS.values():
            seconds(command, place)
        rounds = [
            {name: seconds(command, place) for name, command in COMMANDS.items()}
            for _ in range(ROUNDS)
        ]
        best = {name: min(times[name] for times in rounds) for name in COMMANDS}
        for name, fastest in best.items():
            print(f"{name:14} {fastest:6.2f} s  {fastest / best['import torch']:5.2f} x")
        if "--first-trial" in sys.argv:
            print(f"first trial    {first_trial(place):6.2f} s")


if __name__ == "__main__":
    main()
