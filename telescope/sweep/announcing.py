"""The text that a driver announces to workers, and its check on a worker, before a trial.

A worker gets the whole sweep from the database: spec, model file, fingerprint and versions. It
builds its own trainer on its own corpus, and refuses to train what the driver would not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from telescope.dispatch.packing import Packer
from telescope.dispatch.process import ended_if_hung
from telescope.errors import SpecError
from telescope.files import this_machine
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.machine import check_compiler, check_this_machine
from telescope.sweep.prepare import prepare
from telescope.sweep.runnable import Trainable
from telescope.sweep.versions import versions

OWN_PACKAGES = ("telescope", "torch", "mup", "numpy")
"""Packages whose versions change losses of the built-in trainer."""


def announcement(sweep: Trainable, folder: Folder, *, lease: float) -> str:
    """Return the JSON from which workers train a sweep's trials.

    Args:
        sweep: the sweep.
        folder: its results folder.
        lease: seconds without a beat after which a worker counts as lost.
    """
    data = {
        "spec": sweep.spec.as_dict(),
        "model": sweep.spec.model_source,
        "comparable": sweep.comparable,
        "codes": {key: source.code for key, source in sweep.program_texts.items()},
        "versions": _versions(sweep.spec),
        "fingerprint": folder.read_spec()["fingerprint"],
        "pack": sweep.pack_size(is_cluster=True),
        "lease": lease,
        "machine": this_machine(),
        "threads": max(map(sweep.spec.compute.cpus_at, sweep.spec.ladder.widths)),
        "worker_prints": sweep.worker_prints,
        "checkpoints": bool(sweep.spec.train and sweep.spec.train.checkpoint_every),
    }
    return json.dumps(data)


def _versions(spec: Spec) -> dict[str, str]:
    """Return package → version, without what tells builds of one version apart, such as +cpu."""
    names = OWN_PACKAGES if spec.trainer is None else OWN_PACKAGES[:1]
    found = versions()
    return {name: found[name].partition("+")[0] for name in names}


def packer_here(record: Mapping[str, Any], folder: Folder) -> Packer:
    """Build what trains a sweep's trials on this machine.

    Args:
        record: an `announcement`.
        folder: where its trials leave their files.

    Raises:
        SpecError: this machine would train something else, or lacks what a trial needs.
        ModelError, DataError: see `prepare`.
    """
    source = record["model"]
    spec = Spec.from_dict(record["spec"], model_source=tuple(source) if source else None)
    _check_same(record["versions"], _versions(spec), spec.name)
    sweep = prepare(spec)
    _check_same(record["comparable"], _comparable(sweep, record), spec.name)
    sweep.check_inputs(is_cluster=False)
    check_this_machine(spec)
    check_compiler(spec)
    trainer = sweep.make_trainer(folder)
    gpus = spec.compute.gpus_at(spec.base_width)
    packer = Packer(
        lambda: trainer,
        record["pack"],
        timeout=sweep.timeout,
        share=min(1.0, gpus) if gpus else 1.0,
        guard=ended_if_hung,
    )
    packer.warm()
    return packer


def _comparable(sweep: Trainable, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal here; a trainer's file that differs in layout alone is the same."""
    found = dict(sweep.comparable)
    for key, source in sweep.program_texts.items():
        if source.code == record["codes"].get(key):
            found[key] = record["comparable"].get(key)
    return found


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str) -> None:
    """Refuse to train what is not comparable with the driver's, naming all that differs."""
    now = json.loads(json.dumps(dict(ours)))  # what the driver announced has been JSON too
    keys = sorted(theirs.keys() | now.keys())
    if differing := [key for key in keys if theirs.get(key) != now.get(key)]:
        shown = ", ".join(f"{k} is {now.get(k)}, the driver's {theirs.get(k)}" for k in differing)
        raise SpecError(
            f"{name}: this worker's results would not be comparable: {shown}; use the same "
            "versions and files on every machine"
        )
