"""Versions of what trains and decides, for the records of a sweep and of a target run."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import telescope

PACKAGES = ("torch", "mup", "optuna", "ray", "numpy")


def versions() -> dict[str, str]:
    """Return name → version of Python, of this program and of the packages that are installed."""
    found = {"python": platform.python_version(), "telescope": telescope.__version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
