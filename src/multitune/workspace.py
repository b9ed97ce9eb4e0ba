"""A pool of buffers for packed tensors.

A fresh allocation of tens of megabytes costs several times the copy into it, because the system hands out
pages one fault at a time. Buffers are lent to a plan and come back when the plan is dropped.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes at whose multiples tensors start in a shared buffer: those of a cache line.
_ALIGNMENT = 64


class Workspace:
    """Lends buffers; safe under threads."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        """
        Args:
            max_bytes: most bytes kept for later; a buffer returned beyond it is freed.
        """
        self._max_bytes = max_bytes
        self._free: list[Tensor] = []
        self._lock = threading.RLock()  # the garbage collector may give a buffer back while this thread takes one

    def take(self, num_bytes: int, device: torch.device, owner: object) -> Tensor:
        """Uninitialised bytes `[num_bytes]`, lent until `owner` is collected."""
        with self._lock:
            fits = [b for b in self._free if b.numel() >= num_bytes and b.device == device]
            buffer = min(fits, key=lambda b: b.numel()) if fits else None
            if buffer is not None:
                self._free = [b for b in self._free if b is not buffer]
        if buffer is None:
            with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
                buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        weakref.finalize(owner, self._give_back, buffer)
        return buffer[:num_bytes]

    def stack(self, pieces: Sequence[Sequence[Tensor]], owner: object) -> list[Tensor]:
        """`torch.stack(same, 1)` for the tensors `same` of each piece, all in one lent buffer."""
        sizes = [len(same) * same[0].numel() * same[0].element_size() for same in pieces]
        room = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        buffer = self.take(sum(room), pieces[0][0].device, owner)
        stacked = []
        for same, size, part in zip(pieces, sizes, buffer.split(room), strict=True):
            first, *rest = same[0].shape
            out = part[:size].view(same[0].dtype).view(first, len(same), *rest)
            stacked.append(torch.stack(list(same), 1, out=out))
        return stacked

    def _give_back(self, buffer: Tensor) -> None:
        with self._lock:
            if sum(b.numel() for b in self._free) + buffer.numel() <= self._max_bytes:
                self._free.append(buffer)
