"""Settles what a spec leaves to the machine: `auto` becomes a value, once in the life of a sweep.

The first run measures, or the check before it; every worker, every resume and every other machine
takes what was settled then, from spec.json, and the fingerprint has the settled value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from telescope.dispatch.device import free_memory
from telescope.errors import SpecError
from telescope.records import Point
from telescope.sweep.prepare import Prepared, check_usable
from telescope.train.choose import ARITHMETICS, Timings, decided, measure, undecided
from telescope.train.loop import resolve_device


def settled(
    prepared: Prepared,
    record: Mapping[str, Any] | None,
    *,
    check: Mapping[str, Any] | None = None,
    is_cluster: bool = False,
    say: Callable[[str], None],
) -> tuple[Prepared, dict[str, Any]]:
    """A sweep without `auto`, and what was measured for it, as spec.json keeps it.

    Args:
        prepared: the sweep.
        record: what spec.json holds; None for a sweep that has none yet.
        check: what coordcheck.json holds, where `telescope check` keeps what it settled.
        is_cluster: whether trials run on other machines than this, where nothing can be timed.
        say: takes a line per key that is settled now.

    Raises:
        SpecError: "auto" on a cluster, or this machine has not the device.
        DataError, ModelError: the corpus or the model file fails.
    """
    known: dict[str, Any] = dict(record.get("measured", {})) if record else {}
    keys = undecided(prepared.trial_config)
    if not keys:
        return prepared, known
    if record:
        stored = {key: _stored(record["spec"], key) for key in keys}
        return _with(prepared, stored), known
    if is_cluster:
        raise SpecError(
            f"{keys[0]}: got 'auto', which is measured on the machine that trains; on a cluster "
            "set fp32 or bf16"
        )
    if check and (kept := settled_before(prepared, check)):
        values = ", ".join(f"{key} = auto: {_value(kept, key)}" for key in keys)
        say(f"{prepared.spec.name}: {values}, as the check has measured")
        return kept, dict(check["measured"])
    prepared, measured = settled_here(prepared)
    for key, figures in measured.items():
        say(f"{prepared.spec.name}: {describe(key, figures)}")
    return prepared, {key: asdict(figures) for key, figures in measured.items()}


def settlement(before: Prepared, after: Prepared, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a check keeps beside its verdict, for `settled` to find; empty where nothing was auto.

    Args:
        before: the sweep as its spec says.
        after: without `auto`.
        measured: what was measured for it.
    """
    values = {key: _value(after, key) for key in undecided(before.trial_config)}
    return {"settled": values, "measured": dict(measured)} if values else {}


def settled_before(prepared: Prepared, record: Mapping[str, Any] | None) -> Prepared | None:
    """The sweep with the values that a record has for its `auto`; None where it is no record of it.

    Args:
        prepared: the sweep.
        record: spec.json, or the coordcheck.json of a `telescope check`.
    """
    keys = undecided(prepared.trial_config)
    if not record or not keys:
        return None
    if "spec" in record:
        values = {key: _stored(record["spec"], key) for key in keys}
    else:
        kept, device = record.get("settled", {}), resolve_device(prepared.spec.compute.device)
        figures = record.get("measured", {}).values()
        if not set(keys) <= set(kept) or any(f.get("device") != device for f in figures):
            return None
        values = {key: str(kept[key]) for key in keys}
    if any(value not in ARITHMETICS for value in values.values()):
        return None
    found = _with(prepared, values)
    return found if found.fingerprint == record.get("fingerprint") else None


def settled_here(prepared: Prepared) -> tuple[Prepared, dict[str, Timings]]:
    """Time every undecided key on this machine, and decide; see `settled` for what it raises."""
    if not undecided(prepared.trial_config):
        return prepared, {}
    check_usable(prepared.spec.compute.device)
    point = Point.of({axis.name: axis.low for axis in prepared.spec.ladder_spec.axes})
    trials = {stage.width: stage.trials for stage in prepared.plan.stages}
    measured = measure(prepared.trial_config, trials, point)
    free_memory()  # which the workers need
    return _with(prepared, {key: figures.choice for key, figures in measured.items()}), measured


def describe(key: str, figures: Timings) -> str:
    """One line: what auto means, and why."""
    per_width = ", ".join(
        f"{width}: {figures.seconds['fp32'][width] * 1e3:.3g} and "
        f"{figures.seconds['bf16'][width] * 1e3:.3g}"
        for width in figures.trials
    )
    return (
        f"{key} = auto: {figures.choice}, {figures.gain:.2f}x as fast over the planned trials "
        f"(ms per step in fp32 and bf16 on {figures.device}, by width: {per_width})"
    )


def _stored(spec: Mapping[str, Any], key: str) -> str:
    """What an earlier run settled on, or what a sweep without the key was trained with."""
    table, name = key.split(".")
    return str(spec.get(table, {}).get(name, "fp32" if name == "precision" else "bf16"))


def _value(prepared: Prepared, key: str) -> str:
    config = prepared.trial_config
    return config.train.precision if key == "train.precision" else config.optimizer.ns_dtype


def _with(prepared: Prepared, choices: Mapping[str, str]) -> Prepared:
    config = decided(prepared.trial_config, choices)
    spec = prepared.spec.model_copy(update={"train": config.train, "optimizer": config.optimizer})
    return replace(prepared, spec=spec, trial_config=config)
