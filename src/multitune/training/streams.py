"""A run's own random numbers, so that runs that take turns, or run side by side, draw what each would draw alone."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: The global generators are one for all threads: while a stream draws, others wait. The same thread may draw within.
_DRAWING = threading.RLock()


class RandomStream:
    """The global generators as one run sees them: it draws on, whatever others draw in between."""

    def __init__(self, device: torch.device) -> None:
        """Goes on from what the global generators of Python, NumPy, and torch's CPU and `device` would draw next."""
        self.device = device
        self._python: Any = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._cpu: Tensor = torch.get_rng_state()
        self._cuda: Tensor | None = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While it lasts, torch's global generators are this stream's, and other threads that would draw wait.

        They are not put back: every stream sets its own.
        """
        with _DRAWING, self._torchs():
            yield

    @contextmanager
    def drawing_all(self) -> Iterator[None]:
        """`drawing`, and Python's and NumPy's generators too: for a method's own code.

        No model draws from those, and they take too long to change for every mask of a dropout.
        """
        with _DRAWING, self.only_one():
            yield

    @contextmanager
    def only_one(self) -> Iterator[None]:
        """`drawing_all` where no other stream draws, so that nobody need wait: other threads may do so themselves."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            with self._torchs():
                yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()

    @contextmanager
    def _torchs(self) -> Iterator[None]:
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
        return copy.copy(self)  # states are replaced and never changed
