"""The device that trials compute on, found without importing torch where that is certain.

Importing torch takes seconds, and commands that train nothing need the device too.
"""

from __future__ import annotations

import functools
import runpy
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

BUILT_FOR = ("cuda", "hip", "xpu")
"""The accelerators of Linux, as `torch/version.py` names them: None where the build has it not."""
EXTENSIONS = "torch.backends"
"""The entry points by which a package adds an accelerator to any build of torch."""


def resolve_device(device: str) -> str:
    """Resolve "auto" to this machine's accelerator if torch finds one, else to the CPU."""
    if device != "auto":
        return device
    if "torch" not in sys.modules and is_built_for_cpu_alone():
        return "cpu"
    import torch  # here, as it takes seconds

    if not torch.accelerator.is_available():
        return "cpu"
    return str(torch.accelerator.current_accelerator())


@functools.cache
def is_built_for_cpu_alone() -> bool:
    """Tell whether the installed torch can use no accelerator, on any machine.

    Read from torch's own record of its build, and not from the machine: only torch itself can find
    out if a driver works, and if this process may use a device. False where in doubt.
    """
    if sys.platform != "linux" or entry_points(group=EXTENSIONS):  # a Mac's GPU is not in BUILT_FOR
        return False
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        built = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    except Exception:  # nothing is certain then; to import torch raises what there is to raise
        return False
    return all(name in built and built[name] is None for name in BUILT_FOR)
