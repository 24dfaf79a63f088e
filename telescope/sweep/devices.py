"""The target run on a number of devices: memory of each, and time at the sweep's stated rate."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from telescope.errors import SpecError
from telescope.records import Point
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.counting import target_train
from telescope.sweep.runnable import Trainable
from telescope.target.needs import needs_of

NO_RATE = "needs compute.flop_rate"


def on_devices(sweep: Trainable, devices: int) -> dict[str, Any]:
    """Return the key `devices` of `plan --json`, for a target whose ranks have a device each.

    Raises:
        SpecError: another trainer trains it, whose memory is not known here.
    """
    if not isinstance(sweep, BuiltIn):
        raise SpecError("--devices: counts models that telescope trains; this spec has a trainer")
    spec = sweep.spec
    train = target_train(spec, sweep.trial_config.train)
    needs = needs_of(
        replace(sweep.trial_config, train=train),
        width=spec.target.width,
        point=Point.of({axis.name: axis.low for axis in spec.ladder_spec.axes}),
        ranks=devices,
    )
    rate, seconds, basis = spec.compute.flop_rate, None, NO_RATE
    if rate:
        per_device = rate / max(1.0, spec.compute.gpus_at(spec.ladder.widths[-1]))
        seconds = sweep.target_flops / (devices * per_device)
        basis = f"{per_device:.3g} FLOP/s per device (compute.flop_rate)"
    return {
        "number": devices,
        "precision": train.precision,
        "bytes": asdict(needs),
        "sequences_per_device": train.batch_size / devices,
        "seconds": seconds,
        "basis": basis,
    }
