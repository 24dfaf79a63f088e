"""The state of this process's accelerator after a failed trial: out of memory, or lost.

After some errors (an illegal access, a device-side assert, a memory fault) CUDA refuses every later
call of the process. Such a worker would fail every trial at once, and so would get most of them.
torch is used only if a trainer has imported it.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from telescope.errors import LostError

NO_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")
"""Parts of the messages of drivers, CPU allocators, cuBLAS and cuDNN, whose errors are untyped."""


def check_device(error: BaseException) -> None:
    """Check that the devices in use still compute, after a trial has raised `error`.

    Raises:
        LostError: one does not, so this process can train nothing more.
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
    """Return the CUDA devices with memory of this process; a call to others would occupy them."""
    if torch.cuda.is_initialized():
        used = [n for n in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(n)]
        if used:
            return [f"cuda:{n}" for n in used]
    # Without memory anywhere, the very first call may have failed.
    return ["cuda"] if isinstance(error, torch.AcceleratorError) else []


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that there is no memory left, of torch's own type or not."""
    torch: Any = sys.modules.get("torch")
    is_torchs = torch is not None and isinstance(error, torch.OutOfMemoryError)
    says_so = isinstance(error, RuntimeError) and any(said in str(error) for said in NO_MEMORY)
    return is_torchs or says_so or isinstance(error, MemoryError)


def free_memory() -> None:
    """Free unused memory: unreachable cycles, and the allocator's cache."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
