"""The command `telescope plan`: the costs of a spec, and the time they take."""

from __future__ import annotations

from typing import Any

from telescope.spec.spec import Spec
from telescope.sweep.machine import workers
from telescope.sweep.prepare import prepare


def make_plan(
    spec: Spec, *, probe: bool, devices: int | None = None
) -> tuple[dict[str, Any], str | None]:
    """The plan in its JSON keys, and why `run` would refuse it, or None.

    Args:
        spec: the sweep.
        probe: time a few real steps at every width instead of assuming a rate, and each arithmetic.
        devices: say also what the target needs on so many; None: do not.

    Raises:
        TelescopeError: the spec, its model file or its corpus is wrong.
    """
    at_once = workers(spec, None, is_cluster=False)
    sweep = prepare(spec)
    plan = sweep.as_plan(at_once, probe=probe)
    if devices:
        from telescope.sweep.devices import on_devices

        plan["devices"] = on_devices(sweep, devices)
    return plan, sweep.refused
