"""Most memory in use during one trial, where others ran before it in the same process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> bool:
    """Begin to measure anew, after what is no longer needed was given back; whether that is possible here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the largest trial so far would count for all that follow
        _CLEAR.write_text("5")  # proc(5): the peak becomes what is resident now
    except (OSError, AttributeError):
        return False
    return True


def peak(device: torch.device) -> int | None:
    """Bytes since `reset_peak`: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        line = next(line for line in _STATUS.read_text("utf-8").splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
