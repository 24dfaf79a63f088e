"""What the server of `faults.py` loads before it forks its first process."""

from __future__ import annotations

import faults

faults.warm_up()
