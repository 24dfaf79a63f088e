"""A target run's model for other programs: a checkpoint's weights in the run's model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from telescope.data.tokenizer import load_tokenizer
from telescope.errors import ResumeError, SpecError
from telescope.export.hf_model import check_free, export_model
from telescope.target.checkpoint import MODEL_FILE, STATE_FILE, model_tensors
from telescope.target.folder import RUN_FILE, TARGETS, RunFolder, runs_of
from telescope.target.train import read_run
from telescope.train.model import build_model

SPEC_FILE = "spec.json"
TOKENIZER_KEY = "data.tokenizer (hash)"
"""Key of the sweep's fingerprint with the hash of its tokenizer's file."""


def find_run(run: str, results: Path) -> RunFolder:
    """Find the folder of a target run.

    Args:
        run: a path to it; a sweep, by name or path, with one target run; or SWEEP/RUN.
        results: the folder of all results.

    Raises:
        SpecError: there is no such run, or the sweep has several.
    """
    sweep, _, name = run.rpartition("/")
    for folder in (Path(run), *(root / sweep / TARGETS / name for root in (results, Path()))):
        if (folder / RUN_FILE).is_file():
            return RunFolder(folder)
    for folder in (results / run, Path(run)):
        found = runs_of(folder)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f"{run.rstrip('/')}/{one.path.name}" for one in found)
            raise SpecError(f"{run}: has {len(found)} target runs; name one: {names}")
        if (folder / SPEC_FILE).is_file():
            raise SpecError(f"{run}: has no target run; `telescope launch {run}` trains one")
    raise SpecError(
        f"{run}: no target run of that name under {results}, nor a path to one; give SWEEP, "
        "SWEEP/RUN, or the run's folder, which has a run.json"
    )


def export_run(
    folder: RunFolder, out: Path, *, step: int | None = None, tokenizer: str | None = None
) -> dict[str, Any]:
    """Write a run's model as a folder for transformers; see `export_model`.

    Args:
        folder: of the run.
        out: the folder to write.
        step: of the checkpoint; by default the last one.
        tokenizer: "bytes" or a tokenizer's file, in place of the run's.

    Returns:
        The content of the folder's ``telescope.json``.

    Raises:
        SpecError: there is no such checkpoint, the tokenizer is another one than the run's, the
            folder cannot be written, or the run is of a trainer of the user's own.
        RefusedError: transformers has no layout for the model.
        ModelError: the model file fails.
        ResumeError: run or checkpoint are damaged, or the checkpoint does not fit the model.
    """
    check_free(out)
    if "config" not in (folder.read_run() or {"config": None}):
        raise SpecError(
            f"{folder.path}: the run is of a trainer of your own; export-model is for models that "
            "telescope trains"
        )
    run = read_run(folder)
    config, width = run.config, run.trial.width
    checkpoint = _checkpoint(folder, step)
    name = tokenizer or config.data.tokenizer_name
    _check_tokenizer(folder, name, given=tokenizer is not None)
    model = build_model(
        config.model,
        width=width,
        base_width=config.base_width,
        seed=0,
        optimizer=config.optimizer.name,
        rule=config.optimizer.rule,
        device="cpu",
    ).module
    _load(model, checkpoint / MODEL_FILE)
    about = {
        "sweep": run.sweep,
        "run": folder.path.resolve().name,
        "state": folder.state,
        "width": width,
        "step": _step(checkpoint),
        "steps": run.steps,
    }
    length = config.train.sequence_length
    return export_model(model, out, sequence_length=length, tokenizer=name, about=about)


def _step(checkpoint: Path) -> int:
    found = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    """Return the whole checkpoint of a step, or the last one.

    Raises:
        SpecError: there is none.
    """
    states = folder.checkpoints.glob(f"step-*/{STATE_FILE}")
    whole = {_step(path.parent): path.parent for path in states}
    whole.pop(-1, None)
    if not whole:
        raise SpecError(
            f"{folder.path}: has no whole checkpoint yet; the run writes them as it trains"
        )
    step = max(whole) if step is None else step
    if step not in whole:
        there = ", ".join(map(str, sorted(whole)))
        raise SpecError(f"--step: got {step}, must be one of the checkpoints: {there}")
    return whole[step]


def _check_tokenizer(folder: RunFolder, name: str | None, *, given: bool) -> None:
    """Check that a tokenizer can be read and is the one of the run's sweep, if that is known.

    Raises:
        SpecError: it cannot be read, or is another one.
    """
    if name is None:
        return
    try:
        digest = load_tokenizer(name).digest
    except SpecError as error:
        if given:
            raise SpecError(str(error).replace("data.tokenizer", "--tokenizer", 1)) from error
        raise SpecError(f"{error}; or give the run's tokenizer with --tokenizer FILE") from error
    wanted = _sweeps_tokenizer(folder.path.resolve().parent.parent / SPEC_FILE)
    if wanted and digest != wanted:
        raise SpecError(
            f"--tokenizer: {name} is not the one that the run was trained with: its hash is "
            f"{digest}, the run's {wanted}"
        )


def _sweeps_tokenizer(spec: Path) -> str | None:
    """Return the hash of a sweep's tokenizer; None if it has none, or the run lies elsewhere."""
    try:
        comparable = json.loads(spec.read_bytes())["comparable_if_equal"]
        return str(comparable[TOKENIZER_KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def _load(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint's tensors into the model, one at a time.

    Raises:
        ResumeError: the file is damaged, or has other tensors than the model.
    """
    from safetensors import SafetensorError, safe_open

    own = model_tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            if odd := sorted(own.keys() ^ set(file.keys())):
                raise ResumeError(f"{path}: and the model file differ in {', '.join(odd[:5])}")
            for name, tensor in own.items():
                values = file.get_tensor(name)
                if values.shape != tensor.shape:
                    shapes = f"{tuple(values.shape)}, the model's {tuple(tensor.shape)}"
                    raise ResumeError(f"{path}: {name}: is {shapes}")
                tensor.copy_(values)
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path}: cannot be read: {error}") from error
