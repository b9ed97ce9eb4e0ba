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

    def take(self, num_elements: int, like: Tensor, owner: object) -> Tensor:
        """An uninitialised vector with the dtype and device of `like`, lent until `owner` is collected."""
        num_bytes = num_elements * like.element_size()
        with self._lock:
            fits = [b for b in self._free if b.numel() >= num_bytes and b.device == like.device]
            buffer = min(fits, key=lambda b: b.numel()) if fits else None
            if buffer is not None:
                self._free = [b for b in self._free if b is not buffer]
        if buffer is None:
            with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
                buffer = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
        weakref.finalize(owner, self._give_back, buffer)
        return buffer[:num_bytes].view(like.dtype)

    def stack(self, tensors: Sequence[Tensor], owner: object) -> Tensor:
        """`torch.stack(tensors)` into a lent buffer."""
        shape = tensors[0].shape
        out = self.take(len(tensors) * shape.numel(), tensors[0], owner).view(len(tensors), *shape)
        return torch.stack(list(tensors), out=out)

    def _give_back(self, buffer: Tensor) -> None:
        with self._lock:
            if sum(b.numel() for b in self._free) + buffer.numel() <= self._max_bytes:
                self._free.append(buffer)
