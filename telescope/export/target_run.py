"""A target run's model, rebuilt from the run's folder with the weights of a checkpoint.

results/<sweep>/target/<run>/
    run.json                      width, steps, and the training's configuration
    checkpoints/step-N/           whole if it has a state.json
        model.safetensors         parameters and buffers by name
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from telescope.config import DataConfig, ModelConfig, SourceConfig
from telescope.data.tokenizer import load_tokenizer
from telescope.errors import ResumeError, SpecError
from telescope.export.hf_model import check_free, export_model
from telescope.train.model import build_model

TARGETS = "target"
RUN_FILE = "run.json"
SPEC_FILE = "spec.json"
TOKENIZER_KEY = "data.tokenizer (hash)"
"""Key of the sweep's fingerprint with the hash of its tokenizer's file."""


@dataclass(frozen=True)
class TrainedRun:
    """A target run that telescope has trained."""

    folder: Path
    width: int
    steps: int
    model: ModelConfig
    optimizer: str
    rule: str
    base_width: int
    sequence_length: int
    tokenizer: str | None
    """"bytes", a path, or None for tokens of an unknown tokenizer."""


def find_run(run: str, results: Path) -> Path:
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
            return folder
    for folder in (results / run, Path(run)):
        found = sorted(path.parent for path in folder.glob(f"{TARGETS}/*/{RUN_FILE}"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f"{run.rstrip('/')}/{path.name}" for path in found)
            raise SpecError(f"{run}: has {len(found)} target runs; name one: {names}")
        if (folder / SPEC_FILE).is_file():
            raise SpecError(f"{run}: has no target run; `telescope launch {run}` trains one")
    raise SpecError(
        f"{run}: no target run of that name under {results}, nor a path to one; give SWEEP, "
        "SWEEP/RUN, or the run's folder, which has a run.json"
    )


def read_run(folder: Path) -> TrainedRun:
    """Read a target run's `run.json`.

    Raises:
        ResumeError: it is damaged.
        SpecError: a trainer of the user's own has trained the run.
    """
    path = folder / RUN_FILE
    record = _read(path)
    if not record.get("config"):
        raise SpecError(
            f"{path}: has no `config`: the run is of a trainer of your own; export-model is for "
            "models that telescope trains"
        )
    try:
        config = record["config"]
        return TrainedRun(
            folder=folder,
            width=int(record["width"]),
            steps=int(record["steps"]),
            model=ModelConfig(**config["model"]),
            optimizer=str(config["optimizer"]["name"]),
            rule=str(config["optimizer"]["rule"]),
            base_width=int(config["base_width"]),
            sequence_length=int(config["train"]["sequence_length"]),
            tokenizer=_data(config["data"]).tokenizer_name,
        )
    except (KeyError, TypeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ResumeError(f"{path}: is damaged or of another version ({why})") from error


def export_run(
    run: TrainedRun, out: Path, *, step: int | None = None, tokenizer: str | None = None
) -> dict[str, Any]:
    """Write a run's model as a folder for transformers; see `hf_model.export_model`.

    Args:
        run: the run.
        out: the folder to write.
        step: of the checkpoint; by default the last one.
        tokenizer: "bytes" or a tokenizer's file, in place of the run's.

    Returns:
        The content of the folder's ``telescope.json``.

    Raises:
        SpecError: there is no such checkpoint, the tokenizer is another one than the run's, or the
            folder cannot be written.
        RefusedError: transformers has no layout for the model.
        ModelError: the model file fails.
        ResumeError: the checkpoint is damaged, or does not fit the model.
    """
    check_free(out)
    checkpoint = _checkpoint(run.folder, step)
    name = tokenizer or run.tokenizer
    _check_tokenizer(run, name, given=tokenizer is not None)
    module = build_model(
        run.model,
        width=run.width,
        base_width=run.base_width,
        seed=0,
        optimizer=run.optimizer,
        rule=run.rule,
        device="cpu",
    ).module
    _load(module, checkpoint / "model.safetensors")
    about = {
        "sweep": run.folder.resolve().parent.parent.name,
        "run": run.folder.resolve().name,
        "width": run.width,
        "step": _step(checkpoint),
        "steps": run.steps,
    }
    return export_model(
        module, out, sequence_length=run.sequence_length, tokenizer=name, about=about
    )


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file with an object in it.

    Raises:
        ResumeError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResumeError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(data, dict):
        raise ResumeError(f"{path}: is damaged: holds no object")
    return data


def _data(table: Mapping[str, Any]) -> DataConfig:
    sources = tuple(SourceConfig(**_with_tuples(source)) for source in table["sources"])
    return DataConfig(**{**_with_tuples(table), "sources": sources})


def _with_tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _checkpoint(folder: Path, step: int | None) -> Path:
    """Return the whole checkpoint of a step, or the last one.

    Raises:
        SpecError: there is none.
    """
    whole = {
        _step(path.parent): path.parent for path in folder.glob("checkpoints/step-*/state.json")
    }
    whole.pop(-1, None)
    if step is None and whole:
        return whole[max(whole)]
    if step in whole:
        return whole[step]
    there = ", ".join(map(str, sorted(whole)))
    if step is None:
        raise SpecError(f"{folder}: has no whole checkpoint yet; the run writes them as it trains")
    raise SpecError(
        f"--step: got {step}, must be one of the checkpoints: {there or 'none is whole'}"
    )


def _check_tokenizer(run: TrainedRun, name: str | None, *, given: bool) -> None:
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
    spec = run.folder.resolve().parent.parent / SPEC_FILE
    known = _read(spec).get("comparable_if_equal", {}) if spec.is_file() else {}
    wanted = known.get(TOKENIZER_KEY)
    if wanted and digest != wanted:
        raise SpecError(
            f"--tokenizer: {name} is not the one that the run was trained with: its hash is "
            f"{digest}, the run's {wanted}"
        )


@torch.no_grad()
def _load(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint's tensors into the model, one at a time.

    Raises:
        ResumeError: the file is damaged, or has other tensors than the model.
    """
    from safetensors import SafetensorError, safe_open

    every = dict(model.named_parameters(remove_duplicate=False)).keys()
    tied = every - dict(model.named_parameters()).keys()
    kept: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if n not in tied}
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            odd = sorted(kept.keys() ^ (there - tied))
            if odd:
                raise ResumeError(f"{path}: and the model file differ in {', '.join(odd[:5])}")
            for name, tensor in kept.items():
                values = file.get_tensor(name)
                if values.shape != tensor.shape:
                    shapes = f"{tuple(values.shape)}, the model's {tuple(tensor.shape)}"
                    raise ResumeError(f"{path}: {name}: is {shapes}")
                tensor.copy_(values)
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path}: cannot be read: {error}") from error
