"""What a process holds, and the most it has held."""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path

import psutil
import torch


def memory_in_use(device: torch.device) -> int:
    """Bytes of the process, or of tensors on the device if it is a GPU; free heap pages are handed back first."""
    if device.type == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated(device)
    _give_back_free_pages()
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory() -> None:
    """Let the kernel count this process's peak of memory from here (Linux).

    Free heap pages are handed back first (glibc): a process that has many, as one forked from a large one may, would
    fill them without growing.
    """
    _give_back_free_pages()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int | None:
    """Most bytes of memory this process has held since the reset; none where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _give_back_free_pages() -> None:
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
