"""What a failed trial has left of this process's accelerator: its memory, or nothing at all.

After some errors (an illegal access, a device-side assert, a memory fault) CUDA refuses every call
of the process for good. Such a worker would fail whatever it is handed, and at once, so that it
would be handed most. torch is looked at only where a trainer has brought it in.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from telescope.errors import LostError

NO_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")
"""What a driver, a CPU's allocator, and cuBLAS or cuDNN say in errors of no type of their own."""


def check_device(error: BaseException) -> None:
    """Check that the devices in use compute; to be called with what a trial has raised.

    Raises:
        LostError: one does not, so that this process is of no more use.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    for device in _in_use(torch, error):
        try:
            torch.zeros(1, device=device).add_(1)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            continue
        except RuntimeError as refusal:
            if "out of memory" in str(refusal):
                continue
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise LostError(
                f"{device}: refuses every call of process {os.getpid()} since: {said}; what "
                "finished is kept, the same command goes on"
            ) from error


def _in_use(torch: Any, error: BaseException) -> list[str]:
    """The CUDA devices that hold something of this process; to ask others would occupy them."""
    if torch.cuda.is_initialized():
        used = [n for n in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(n)]
        if used:
            return [f"cuda:{n}" for n in used]
    # Nothing is held: the very first call may have failed.
    return ["cuda"] if isinstance(error, torch.AcceleratorError) else []


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that there is no memory left, of torch's own type or not."""
    torch: Any = sys.modules.get("torch")
    is_torchs = torch is not None and isinstance(error, torch.OutOfMemoryError)
    says_so = isinstance(error, RuntimeError) and any(said in str(error) for said in NO_MEMORY)
    return is_torchs or says_so or isinstance(error, MemoryError)


def free_memory() -> None:
    """Give back what nobody uses any more: unreachable cycles, and the allocator's cache."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
