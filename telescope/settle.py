"""Settles what a spec leaves to the machine: `auto` becomes a value, once in the life of a sweep.

The first run measures; every worker, every resume and every other machine takes what was settled
then, from spec.json, and the fingerprint has the settled value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from telescope.errors import SpecError
from telescope.prepare import Prepared, check_usable
from telescope.records import Point
from telescope.train.choose import Measured, decided, measure, undecided


def settled(
    prepared: Prepared,
    record: Mapping[str, Any] | None,
    *,
    is_cluster: bool = False,
    say: Callable[[str], None],
) -> tuple[Prepared, dict[str, Any]]:
    """A sweep without `auto`, and what was measured for it, as spec.json keeps it.

    Args:
        prepared: the sweep.
        record: what spec.json holds; None for a sweep that has none yet.
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
    prepared, measured = settled_here(prepared)
    for key, figures in measured.items():
        say(f"{prepared.spec.name}: {describe(key, figures)}")
    return prepared, {key: asdict(figures) for key, figures in measured.items()}


def settled_here(prepared: Prepared) -> tuple[Prepared, dict[str, Measured]]:
    """Time every undecided key on this machine, and decide; see `settled` for what it raises."""
    if not undecided(prepared.trial_config):
        return prepared, {}
    check_usable(prepared.spec.compute.device)
    point = Point.of({axis.name: axis.low for axis in prepared.spec.ladder_spec.axes})
    trials = {stage.width: stage.trials for stage in prepared.plan.stages}
    measured = measure(prepared.trial_config, trials, point)
    return _with(prepared, {key: figures.choice for key, figures in measured.items()}), measured


def describe(key: str, figures: Measured) -> str:
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
    return str(spec[table].get(name, "fp32" if name == "precision" else "bf16"))


def _with(prepared: Prepared, choices: Mapping[str, str]) -> Prepared:
    config = decided(prepared.trial_config, choices)
    spec = prepared.spec.model_copy(update={"train": config.train, "optimizer": config.optimizer})
    return replace(prepared, spec=spec, trial_config=config)
