"""Telescoping muP sweeps for Muon: tune small, transfer to the one large run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telescope.api import Ladder
    from telescope.api import open as open
    from telescope.export.hf_model import export_model as export_model
    from telescope.records import Choice, Point, Result, Status, Trial
    from telescope.spec.spec import Spec
    from telescope.transfer.apply import apply as apply
    from telescope.transfer.shapes import Shapes

__version__ = "0.1.0"
"""The version: the only place that states it."""

_PUBLIC = {
    "Choice": "telescope.records",
    "Ladder": "telescope.api",
    "Point": "telescope.records",
    "Result": "telescope.records",
    "Shapes": "telescope.transfer.shapes",
    "Spec": "telescope.spec.spec",
    "Status": "telescope.records",
    "Trial": "telescope.records",
    "apply": "telescope.transfer.apply",
    "export_model": "telescope.export.hf_model",
    "open": "telescope.api",
}
"""Name → its module. `open` is not in `__all__`: `import *` would hide Python's own `open`."""

__all__ = ["Choice", "Ladder", "Point", "Result", "Shapes", "Spec", "Status", "Trial"]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use, so that `import telescope` is fast."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'telescope' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
