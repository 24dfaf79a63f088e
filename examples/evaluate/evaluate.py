"""A model that `telescope export-model` has written, on a local task of lm-evaluation-harness.

    python evaluate.py FOLDER            the share of lines that it completes rightly
    python evaluate.py FOLDER --json     the same, and the log likelihood of every choice

Nothing is downloaded: the task is python_lines.yaml here, its eight lines are python_lines.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# transformers imports torchvision where it finds it; a language model has no use for it, and the
# one that comes along with mup need not fit this torch.
sys.modules["torchvision"] = None

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

HERE = Path(__file__).parent
TASK = "python_lines"


def main() -> None:
    """Evaluate, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    os.chdir(HERE)  # the task's file names its data relative to it
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu"},
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
        batch_size=8,
    )
    accuracy = found["results"][TASK]["acc,none"]
    if asked.json:
        samples = [
            {"text": text, "choice": choice, "log_likelihood": log_likelihood}
            for sample in found["samples"][TASK]
            for (text, choice), (log_likelihood, _) in zip(
                sample["arguments"], sample["filtered_resps"], strict=True
            )
        ]
        print(json.dumps({"accuracy": accuracy, "samples": samples}))
    else:
        print(f"accuracy    {accuracy:.3f} of {len(found['samples'][TASK])} lines; by chance 0.5")


if __name__ == "__main__":
    main()
