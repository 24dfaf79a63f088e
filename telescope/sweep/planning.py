"""The command `telescope plan`: the costs of a spec, and the time they take."""

from __future__ import annotations

from typing import Any

from telescope.spec.spec import Spec
from telescope.sweep.machine import workers
from telescope.sweep.prepare import prepare


def make_plan(spec: Spec, *, probe: bool) -> tuple[dict[str, Any], str | None]:
    """The plan in its JSON keys, and why `run` would refuse it, or None.

    Args:
        spec: the sweep.
        probe: time a few real steps at every width instead of assuming a rate, and each arithmetic.

    Raises:
        TelescopeError: the spec, its model file or its corpus is wrong.
    """
    at_once = workers(spec, None, is_cluster=False)
    sweep = prepare(spec)
    return sweep.as_plan(at_once, probe=probe), sweep.refused
