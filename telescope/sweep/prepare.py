"""From a validated spec to a sweep that can run."""

from __future__ import annotations

from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.foreign import Foreign
from telescope.sweep.runnable import Trainable


def prepare(spec: Spec) -> Trainable:
    """Price a sweep, and check what it says of its model; a user's trainer is not looked at yet.

    Raises:
        SpecError, ModelError, DataError: see `BuiltIn.of`.
    """
    return Foreign.of(spec) if spec.trainer else BuiltIn.of(spec)
