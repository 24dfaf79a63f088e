"""The trackers there are, and the packages that they need; nothing of them is imported here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from telescope.errors import SpecError


@dataclass(frozen=True)
class Package:
    """The package of a tracker."""

    module: str
    """Name under which Python imports it."""
    install: str
    """Argument of `pip install`."""


PACKAGES = {
    "tensorboard": Package("tensorboardX", "tensorboardX"),
    "wandb": Package("wandb", "wandb"),
    "mlflow": Package("mlflow", "mlflow-skinny"),
    "trackio": Package("trackio", "trackio"),
}
"""Name in ``[log] to`` → its package."""


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        SpecError: one line per package, with the command that installs it.
    """
    missing = [name for name in names if not _is_installed(PACKAGES[name].module)]
    if missing:
        raise SpecError(
            *(
                f"log.to: got {name!r}, whose package is not installed: "
                f"pip install {PACKAGES[name].install}"
                for name in missing
            )
        )


def _is_installed(module: str) -> bool:
    """Tell whether Python finds a package, without importing it.

    A folder of that name, such as the one that wandb leaves where it has run, is no package.
    """
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None
