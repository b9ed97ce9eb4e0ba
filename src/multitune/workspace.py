"""Buffers in which plans keep stacked tensors, handed on from plan to plan with what is in them.

Two costs are saved. A fresh allocation of tens of megabytes takes several times the copy into it, because the system
hands out pages one fault at a time. And a batch that follows another mostly shares adapters with it: a buffer
remembers which adapter each of its slots holds, and the next plan copies only those that are not there yet.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

#: Stacks of fewer bytes are copied whole: finding what is there already would take longer.
SMALL_BYTES = 2**16


class Stackable(Protocol):
    """What fills one slot: tensors that no one changes."""

    @property
    def pieces(self) -> tuple[Tensor, ...]:
        """`[N, *shape]`, N tensors of one shape each; the same shapes in every slot."""


class Buffer:
    """Room for the pieces of `capacity` slots, `[N, C, *shape]` each."""

    def __init__(self, example: Stackable, capacity: int) -> None:
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
            self._pieces = [p.new_empty(p.shape[0], capacity, *p.shape[1:]) for p in example.pieces]
        self._held: list[weakref.ref[Stackable] | None] = [None] * capacity
        self.capacity = capacity
        self.views: dict[int, Any] = {}
        """What plans made of the pieces, by the number of slots: views need no making anew when contents change."""
        self.nbytes = sum(p.numel() * p.element_size() for p in self._pieces)

    def held(self) -> list[Stackable | None]:
        """What each slot holds: nothing, or something that may since have been dropped."""
        return [None if ref is None else ref() for ref in self._held]

    def fill(self, slots: Sequence[Stackable]) -> list[Tensor]:
        """The pieces of these slots `[N, G, *shape]`; copies what is not in its place already."""
        parts = [piece[:, : len(slots)] for piece in self._pieces]
        missing = [
            (g, wanted) for g, (wanted, here) in enumerate(zip(slots, self.held(), strict=False)) if wanted is not here
        ]
        for g, _ in missing:
            self._held[g] = None  # should copying break off, the slot holds nothing
        if missing and self.nbytes <= SMALL_BYTES:
            for part, *same in zip(parts, *(s.pieces for s in slots), strict=True):
                part.copy_(torch.stack(same, 1))
        else:
            for g, wanted in missing:
                for part, piece in zip(parts, wanted.pieces, strict=True):
                    part[:, g].copy_(piece)
        for g, wanted in missing:
            self._held[g] = weakref.ref(wanted)
        return parts


class Workspace:
    """Lends buffers; safe under threads."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        """
        Args:
            max_bytes: most bytes kept for later; beyond it the buffers that were given back first are freed.
        """
        self._max_bytes = max_bytes
        self._free: list[tuple[object, Buffer]] = []  # what they are for, and they; the oldest first
        self._lock = threading.RLock()  # the garbage collector may give a buffer back while this thread takes one

    def lend(self, key: object, slots: Sequence[Stackable], owner: object) -> Buffer:
        """A buffer with room for `slots`, lent until `owner` is collected; of several, the one that holds most of them.

        Args:
            key: equal for slots whose pieces have equal shapes, dtypes and devices. On a GPU a buffer stays with the
                stream that it was first lent on: on another one, what still reads it might not have run yet.
        """
        key, capacity = (key, _stream(slots[0])), _round_up(len(slots))
        with self._lock:
            fits = [b for k, b in self._free if k == key and b.capacity == capacity]
            wanted = set(map(id, slots))
            best = max(fits, key=lambda b: sum(id(s) in wanted for s in b.held() if s is not None), default=None)
            self._free = [pair for pair in self._free if pair[1] is not best]
        buffer = Buffer(slots[0], capacity) if best is None else best
        weakref.finalize(owner, self._give_back, key, buffer)
        return buffer

    @property
    def free_bytes(self) -> int:
        """Bytes of the buffers that no plan has."""
        return sum(buffer.nbytes for _, buffer in self._free)

    def _give_back(self, key: object, buffer: Buffer) -> None:
        with self._lock:
            kept, room = [], self._max_bytes
            for pair in [(key, buffer), *reversed(self._free)]:  # newest first
                room -= pair[1].nbytes
                if room < 0:
                    break
                kept.append(pair)
            self._free = kept[::-1]


def _stream(slot: Stackable) -> int | None:
    """The stream that works on a GPU's tensors now; `None` for those of a CPU, which has none."""
    device = slot.pieces[0].device
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else None


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done what it was given on this thread's stream; for a CPU, at once."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _round_up(num_slots: int) -> int:
    """Slots to make room for, so that batches of nearly equal size can follow each other in one buffer."""
    if num_slots <= 8:
        return 1 << (num_slots - 1).bit_length()
    return -(-num_slots // 8) * 8
