"""Imports of the server of `faults.py`, done before it forks its first process."""

from __future__ import annotations

import faults

faults.warm_up()
