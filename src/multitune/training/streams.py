"""A run's own random numbers, so that runs that take turns draw what each would draw alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomStream:
    """Torch's global generators as one run sees them: it draws on, whatever others draw in between."""

    def __init__(self, device: torch.device) -> None:
        """Goes on from what the global generators of the CPU and of `device` would draw next."""
        self.device = device
        self._cpu: Tensor = torch.get_rng_state()
        self._cuda: Tensor | None = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While it lasts, the global generators are this stream's. They are not put back: streams take turns."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.device)
        try:
            yield
        finally:
            self._cpu = torch.get_rng_state()
            if self._cuda is not None:
                self._cuda = torch.cuda.get_rng_state(self.device)

    def copy(self) -> RandomStream:
        """A stream that goes on from here by itself."""
        copied = object.__new__(RandomStream)
        copied.device, copied._cpu, copied._cuda = self.device, self._cpu, self._cuda
        return copied
