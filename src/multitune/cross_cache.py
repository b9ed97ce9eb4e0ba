"""The cache of an encoder-decoder that generates: beside what its decoder wrote, what it attends to in the encoder.

Keys and values of the encoder's output are computed once, when a row enters, and are the same for all beams of a text.
A row's memory in this attention (prefix-tuning) stands in its own first columns, its encoder's tokens behind it;
neither has an order here, so a mask only says how many columns a row has.

Legend: N slots, B rows of a pass, H heads, S columns in use, C columns, K head width, Q queries of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from multitune.kv_cache import Attend, MemoryOfRow, RowCache


@dataclass(eq=False)
class _Layer:
    """One layer's keys and values by slot."""

    lengths: list[int] = field(default_factory=list)
    """By slot: columns in use."""
    starts: list[int] = field(default_factory=list)
    """By slot: how many of them are a memory's."""
    held: tuple[Tensor, Tensor] | None = None
    """Keys and values `[N, H, C, K]`."""

    @property
    def keys(self) -> Tensor:
        """`[N, H, S, K]`, as models ask for them."""
        return self._used(0)

    @property
    def values(self) -> Tensor:
        """`[N, H, S, K]`, as models ask for them."""
        return self._used(1)

    def _used(self, which: int) -> Tensor:
        assert self.held is not None, "a row's encoder runs before its decoder steps"
        return self.held[which][: len(self.lengths), :, : max(self.lengths)]

    def make_room(self, columns: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with room for all slots and so many columns; zeros where nothing was written."""
        rows = len(self.lengths)
        if self.held is not None:
            old = self.held[0].shape
            if old[0] >= rows and old[2] >= columns:
                return self.held
            rows, columns = max(rows, old[0]), max(columns, old[2])
        grown = []
        for which, like in enumerate((key, value)):
            new = like.new_zeros(rows, like.shape[1], columns, like.shape[3])
            if self.held is not None:
                new[: old[0], :, : old[2]] = self.held[which]
            grown.append(new)
        self.held = grown[0], grown[1]
        return self.held


class CrossCache(Cache):
    """Keys and values of the encoder's output by slot and layer. Not safe under threads: one batch owns it."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.layers: list[_Layer] = [_Layer() for _ in range(num_layers)]  # type: ignore[assignment]
        self.device = device
        self._memories: Sequence[MemoryOfRow] = ()
        self._rows = slice(0, 0)
        self._order: Tensor | None = None
        self._inverse: Tensor | None = None
        self._masks: dict[tuple[tuple[int, ...], torch.dtype], Tensor | None] = {}

    def enter(self, counts: Sequence[int], memories: Sequence[MemoryOfRow]) -> None:
        """Give the next pass's rows the next slots, in the order of its plan.

        Args:
            counts: of every row the encoder's tokens, inserted vectors included; they are padded on the right.
            memories: of every row its memory by layer.
        """
        first = len(self.layers[0].lengths)
        for i, layer in enumerate(self.layers):
            own = [m[i][0].shape[1] if i in m else 0 for m in memories]
            layer.starts += own
            layer.lengths += [start + count for start, count in zip(own, counts, strict=True)]
        self._memories = memories
        self._begin(slice(first, first + len(counts)), None)

    def step(self, order: Tensor | None) -> None:
        """Make ready for a pass of all rows; `order [B]` is the plan's order of the slots, `None` for their own."""
        self._begin(slice(0, len(self.layers[0].lengths)), order)

    def _begin(self, rows: slice, order: Tensor | None) -> None:
        self._rows, self._order = rows, order
        self._inverse = None if order is None else order.argsort()
        self._masks = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep one layer's `[B, H, T, K]` of rows that enter; returns what they attend to, `[B, H, S, K]`."""
        layer, first = self.layers[layer_idx], self._rows.start
        starts = torch.tensor(layer.starts[self._rows], device=self.device)
        length = key_states.shape[2]
        held = layer.make_room(max(layer.starts[self._rows]) + length, key_states, value_states)
        slots = torch.arange(first, first + len(starts), device=self.device)
        columns = starts[:, None] + torch.arange(length, device=self.device)
        for which, (buffer, new) in enumerate(zip(held, (key_states, value_states), strict=True)):
            for row, memory in enumerate(self._memories):
                if layer_idx in memory:
                    entries = memory[layer_idx][which]
                    buffer[first + row, :, : entries.shape[1]] = entries
            buffer[slots[:, None], :, columns] = new.transpose(1, 2).to(buffer.dtype)
        width = max(layer.lengths[self._rows])
        return held[0][self._rows, :, :width], held[1][self._rows, :, :width]

    def attend(self, layer: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer, `[B, Q, H, K]`, rows in the plan's order.

        Args:
            attend: the model's attention from query, keys, values and an additive mask, or none.
            query: `[B, H, Q, K]` in the plan's order.
            key, value: `[B, H, S, K]` by slot.
        """
        mask = self._mask(layer, query.dtype)
        if self._order is None:
            return attend(query, key, value, mask)
        assert self._inverse is not None
        return attend(query.index_select(0, self._inverse), key, value, mask).index_select(0, self._order)

    def _mask(self, layer: int, dtype: torch.dtype) -> Tensor | None:
        """`[B, 1, 1, S]`, 0 where a row has a column and the least number where not; rows by slot."""
        lengths = tuple(self.layers[layer].lengths[self._rows])
        if (lengths, dtype) not in self._masks:
            width, mask = max(lengths), None
            if min(lengths) < width:
                closed = torch.arange(width, device=self.device) >= torch.tensor(lengths, device=self.device)[:, None]
                # Models take the softmax in float32, where the least float64 is -inf.
                least = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
                mask = torch.zeros(closed.shape, dtype=dtype, device=self.device).masked_fill_(closed, least)
                mask = mask[:, None, None]
            self._masks[lengths, dtype] = mask
        return self._masks[lengths, dtype]

    def repeat(self, slot: int, times: int) -> None:
        """Give `times` new slots at the end the content of `slot`."""
        for layer in self.layers:
            first = len(layer.lengths)
            layer.lengths += [layer.lengths[slot]] * times
            layer.starts += [layer.starts[slot]] * times
            assert layer.held is not None, "a row is repeated after its encoder has run"
            for t in layer.make_room(0, *layer.held):
                t[first : first + times] = t[slot]

    def remove(self, slot: int) -> None:
        """Take a row out; the last one moves into its slot."""
        for layer in self.layers:
            last = len(layer.lengths) - 1
            layer.lengths[slot], layer.starts[slot] = layer.lengths[last], layer.starts[last]
            del layer.lengths[last], layer.starts[last]
            for t in layer.held or ():  # wiped: a masked NaN would reach the next row here
                if slot != last:
                    t[slot].copy_(t[last])
                t[last].fill_(0)


class PairedCache(EncoderDecoderCache):
    """What an encoder-decoder's rows hold: a `RowCache` of what the decoder wrote, and a `CrossCache`."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.own = RowCache(num_layers, device)
        self.cross = CrossCache(num_layers, device)
        self.self_attention_cache = self.own  # type: ignore[assignment]
        self.cross_attention_cache = self.cross  # type: ignore[assignment]
        self.is_updated: dict[int, bool] = {}
        self._num_layers = num_layers

    def num_tokens(self, slot: int) -> int:
        """As `RowCache.num_tokens`."""
        return self.own.num_tokens(slot)

    def enter(
        self,
        lengths: Sequence[int],
        memories: Sequence[MemoryOfRow],
        sources: Sequence[int],
        cross: Sequence[MemoryOfRow],
    ) -> None:
        """As `RowCache.enter`, of the decoder; `sources` and `cross` are what `CrossCache.enter` takes."""
        self.own.enter(lengths, memories)
        self.cross.enter(sources, cross)
        self.is_updated = {}

    def step(self, order: Tensor | None) -> None:
        """As `RowCache.step`."""
        self.own.step(order)
        self.cross.step(order)
        self.is_updated = dict.fromkeys(range(self._num_layers), True)

    def finish(self, advanced: Sequence[int] = ()) -> None:
        """As `RowCache.finish`."""
        self.own.finish(advanced)

    def repeat(self, slot: int, times: int) -> None:
        """As `RowCache.repeat`."""
        self.own.repeat(slot, times)
        self.cross.repeat(slot, times)

    def reorder(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """As `RowCache.reorder`; the slots of one text attend to one encoder's output, which stays where it is."""
        self.own.reorder(targets, sources)

    def remove(self, slot: int) -> None:
        """As `RowCache.remove`."""
        self.own.remove(slot)
        self.cross.remove(slot)
