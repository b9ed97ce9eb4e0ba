"""The key/value cache of a batch that generates: rows of different lengths, each from column 0 on.

A row's memory (prefix-tuning) stands in its own first columns, so that a decoding step knows nothing of memories; its
tokens follow, inserted prompt vectors among them, and every new token takes the next column. Each column knows which of
the row's tokens it holds, which is all that masks are made of: the columns of a memory are seen by every query, however
narrow its window. Rows lie in *slots* 0, 1, ... without gaps; a plan may run them in another order.

transformers' own caches cannot serve here: they pad all rows to one length, keep sliding windows of one length, and
cannot take a row out or in. This one is given to the models as any other, and makes the masks itself.

Legend: N slots, B rows of a pass, H key/value heads, Q queries of a pass, C columns, S columns in use, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

#: What a column that holds nothing has for a token: later than every query.
_NOTHING = torch.iinfo(torch.int32).max
#: What a column of a memory has for a token: earlier than every query, and outside of windows.
_MEMORY = -1
#: Columns are added by so many at least, so that growing copies seldom.
_GROWTH = 64

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
#: Distances from a query to what it sees, `[B, Q, S]`, to what that adds to its scores, `[B, Q, S, H]`.
DistanceBias = Callable[[Tensor], Tensor]
#: Layer -> keys and values `[H, M, K]` of a row's memory there.
MemoryOfRow = Mapping[int, tuple[Tensor, Tensor]]


@dataclass
class _Pass:
    """Where one forward pass reads and writes; rows in the plan's order."""

    rows: slice
    """The slots of its rows."""
    slots: Tensor
    """`[B]`: every row's slot."""
    columns: Tensor
    """`[B, Q]`: where every token's keys and values go."""
    width: int
    """Columns in use, S."""
    queries: Tensor
    """`[B, Q]`: which of their rows' tokens the queries are, rows in the order of the slots."""
    order: Tensor | None
    """`[B]`: every row's slot, counted from the first of the pass, if the plan has another order than the slots."""
    memories: Sequence[MemoryOfRow] = ()
    """Of rows that enter: their memories."""
    own_keys: bool = False
    """Of rows that enter without memories: attention needs nothing from the cache."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """Masks made so far, by table of tokens and window."""
    biases: dict[int, Tensor] = field(default_factory=dict)
    """Masks with a bias by distance made so far, by table of tokens."""
    inverse: Tensor | None = None
    """Undoes `order`."""


class RowCache(Cache):
    """Keys and values by slot and layer. Not safe under threads: one batch owns it."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.num_layers = num_layers
        self.device = device
        self.lengths: list[int] = []
        """By slot: columns in use."""
        self.memory_lengths: list[int] = []
        """By slot: how many of them are a memory's."""
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        # One table for all layers as long as memories are as long in every layer.
        self._tokens: list[Tensor] = [torch.full((0, 0), _NOTHING, dtype=torch.int32, device=device)] * num_layers
        self._pass: _Pass | None = None

    @property
    def num_rows(self) -> int:
        """Slots in use."""
        return len(self.lengths)

    def num_tokens(self, slot: int) -> int:
        """Tokens that a slot's row holds, inserted vectors among them and its memory not."""
        return self.lengths[slot] - self.memory_lengths[slot]

    # ---------------------------------------------------------------- passes

    def enter(self, lengths: Sequence[int], memories: Sequence[MemoryOfRow]) -> None:
        """Give the next forward pass's rows the next slots, in the order of its plan.

        Args:
            lengths: of every row its tokens, inserted vectors included; the pass pads them on the right.
            memories: of every row its memory by layer; empty for none.
        """
        first, num = self.num_rows, len(lengths)
        own = [max((k.shape[1] for k, _ in m.values()), default=0) for m in memories]
        longest = max(lengths)
        width = max(own) + longest
        self.lengths += [m + n for m, n in zip(own, lengths, strict=True)]
        self.memory_lengths += own
        self._make_room(first + num, width)
        starts = torch.tensor(own, device=self.device)[:, None]
        steps = torch.arange(longest, device=self.device)[None]
        self._note_tokens(first, memories, own, lengths)
        self._pass = _Pass(
            rows=slice(first, first + num),
            slots=torch.arange(first, first + num, device=self.device),
            columns=starts + steps,
            width=width,
            queries=steps.expand(num, -1),
            order=None,
            memories=memories,
            own_keys=not any(own),
        )

    def step(self, order: Tensor | None) -> None:
        """Make ready for one token of every row.

        Args:
            order: `[B]`, the slots in the order in which the plan runs them; `None` for that of the slots.
        """
        columns = torch.tensor(self.lengths, device=self.device)
        width = max(self.lengths) + 1
        self._make_room(self.num_rows, width)
        tokens = columns - torch.tensor(self.memory_lengths, device=self.device)
        slots = torch.arange(self.num_rows, device=self.device)
        for table in self._tables():
            table[slots, columns] = tokens.int()
        self._pass = _Pass(
            rows=slice(0, self.num_rows),
            slots=slots if order is None else order,
            columns=(columns if order is None else columns[order])[:, None],
            width=width,
            queries=tokens[:, None],
            order=order,
            inverse=None if order is None else order.argsort(),
        )

    def extend(self, first: int, counts: Sequence[int], order: Tensor | None) -> None:
        """Make ready for several tokens of every row from slot `first` on.

        Args:
            counts: how many of each, in the order of the slots; the pass pads them on the right.
            order: `[B]`, these slots, counted from `first`, in the plan's order; `None` for their own.
        """
        rows = slice(first, first + len(counts))
        lengths = self.lengths[rows]
        self._make_room(self.num_rows, max(lengths) + max(counts))
        starts = torch.tensor(lengths, device=self.device)[:, None]
        own = starts - torch.tensor(self.memory_lengths[rows], device=self.device)[:, None]
        steps = torch.arange(max(counts), device=self.device)[None]
        for table in self._tables():
            for row, (start, count) in enumerate(zip(lengths, counts, strict=True)):
                table[first + row, start : start + count] = (own[row] + steps[0, :count]).int()
        self.lengths[rows] = [n + count for n, count in zip(lengths, counts, strict=True)]
        slots, columns = torch.arange(first, first + len(counts), device=self.device), starts + steps
        self._pass = _Pass(
            rows=rows,
            slots=slots if order is None else slots[order],
            columns=columns if order is None else columns[order],
            width=max(self.lengths[rows]),
            queries=own + steps,
            order=order,
            inverse=None if order is None else order.argsort(),
        )

    def finish(self, advanced: Sequence[int] = ()) -> None:
        """End a pass; `advanced` are the slots whose new token stays, of the others the next one takes its place."""
        for slot in advanced:
            self.lengths[slot] += 1
        self._pass = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep one layer's `[B, H, Q, K]`; returns what its queries may see, `[B, H, S, K]`, rows by slot."""
        now = self._pass
        assert now is not None, "a forward pass with this cache begins with enter() or step()"
        held = []
        for buffers, new, which in ((self._keys, key_states, 0), (self._values, value_states, 1)):
            buffer = self._buffer(buffers, layer_idx, new)
            for row, memory in enumerate(now.memories):
                if layer_idx in memory:
                    entries = memory[layer_idx][which]
                    buffer[now.rows.start + row, :, : entries.shape[1]] = entries
            buffer[now.slots[:, None], :, now.columns] = new.transpose(1, 2)
            held.append(buffer[now.rows, :, : now.width])
        return (key_states, value_states) if now.own_keys else (held[0], held[1])

    def attend(
        self,
        layer: int,
        attend: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        always: bool,
        bias: DistanceBias | None = None,
    ) -> Tensor:
        """Attention of one layer, `[B, Q, H, K]`, rows in the plan's order.

        Args:
            attend: the model's attention from query, keys, values and an additive mask.
            query: `[B, H, Q, K]` in the plan's order.
            key, value: what `update` returned.
            window: how many tokens back a query sees, itself included; `None` for all.
            always: whether `attend` takes no mask for no mask at all, rather than for a causal one.
            bias: what is added to the scores by distance; 0 for a memory.
        """
        now = self._pass
        assert now is not None
        num_queries = query.shape[2]
        if now.own_keys and not always and bias is None and (window is None or window >= num_queries):
            return attend(query, key, value, None)  # padding is on the right, where no query of a row looks
        mask = self._mask(layer, window, query.dtype)
        if bias is not None:
            mask = self._biased(layer, mask, bias)
        if now.order is None:
            return attend(query, key, value, mask)
        assert now.inverse is not None
        return attend(query.index_select(0, now.inverse), key, value, mask).index_select(0, now.order)

    def _biased(self, layer: int, mask: Tensor, bias: DistanceBias) -> Tensor:
        """`mask` with a bias by distance, `[B, H, Q, S]`; rows by slot."""
        now = self._pass
        assert now is not None
        table = self._tokens[layer]
        if id(table) not in now.biases:
            tokens = table[now.rows, None, : now.width]
            added = bias(tokens - now.queries[..., None]).masked_fill((tokens == _MEMORY)[..., None], 0)
            now.biases[id(table)] = mask + added.movedim(-1, 1).to(mask.dtype)
        return now.biases[id(table)]

    def _mask(self, layer: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[B, 1, Q, S]`, 0 where a query sees a column and the least number where not; rows by slot."""
        now = self._pass
        assert now is not None
        table = self._tokens[layer]
        mask = now.masks.get((id(table), window))
        if mask is None:
            tokens = table[now.rows, None, : now.width]
            queries = now.queries[..., None]
            seen = tokens <= queries
            if window is not None:
                seen &= (tokens > queries - window) | (tokens == _MEMORY)
            # Models take the softmax in float32, where the least float64 is -inf, and a row of them NaN.
            least = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, least)[:, None]
            now.masks[id(table), window] = mask
        return mask

    # ---------------------------------------------------------------- rows

    def repeat(self, slot: int, times: int) -> None:
        """Give `times` new slots at the end the content of `slot`."""
        first = self.num_rows
        new = slice(first, first + times)
        self.lengths += [self.lengths[slot]] * times
        self.memory_lengths += [self.memory_lengths[slot]] * times
        self._make_room(self.num_rows, 0)
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                assert buffer is not None, "a row is repeated after its prompt has run"
                self._buffer(buffers, layer, buffer)
        self._change(lambda t: t[new].copy_(t[slot].expand_as(t[new])))

    def reorder(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Give every slot of `targets` what the slot of `sources` at its place holds, all at once."""
        to, of = (torch.tensor(list(s), device=self.device) for s in (targets, sources))
        for slot, length in zip(targets, [self.lengths[s] for s in sources], strict=True):
            self.lengths[slot] = length
        self._change(lambda t: t.index_copy_(0, to, t.index_select(0, of)))

    def remove(self, slot: int) -> None:
        """Take a row out; the last one moves into its slot."""
        last = self.num_rows - 1
        self.lengths[slot], self.memory_lengths[slot] = self.lengths[last], self.memory_lengths[last]
        del self.lengths[last], self.memory_lengths[last]
        for t in self._buffers():  # all columns: a masked NaN still enters products, and would reach the next row here
            if slot != last:
                t[slot].copy_(t[last])
            t[last].fill_(0)
        for table in self._tables():
            table[slot].copy_(table[last])
            table[last].fill_(_NOTHING)

    def _buffers(self) -> list[Tensor]:
        """Every buffer `[N, H, C, K]` that was written to."""
        return [t for t in (*self._keys, *self._values) if t is not None]

    def _tables(self) -> list[Tensor]:
        """Every table of tokens `[N, C]`, once."""
        return list({id(t): t for t in self._tokens}.values())

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Call `function` on every buffer's columns in use and on every table of tokens; it changes rows in place."""
        width = max(self.lengths)
        for t in self._buffers():
            function(t[:, :, :width])
        for table in self._tables():
            function(table)

    # ---------------------------------------------------------------- room

    def _make_room(self, rows: int, columns: int) -> None:
        """Tables of tokens for so many slots and columns; the buffers follow when they are written to."""
        old_rows, old_columns = self._tokens[0].shape
        if rows <= old_rows and columns <= old_columns:
            return
        rows = rows if rows <= old_rows else max(rows, min(2 * old_rows, rows + 8))
        if columns > old_columns:
            columns = -(-max(columns, columns + columns // 4) // _GROWTH) * _GROWTH
        shape = (max(rows, old_rows), max(columns, old_columns))
        grown: dict[int, Tensor] = {}
        for table in self._tokens:
            if id(table) not in grown:
                new = torch.full(shape, _NOTHING, dtype=torch.int32, device=self.device)
                new[:old_rows, :old_columns] = table
                grown[id(table)] = new
        self._tokens = [grown[id(table)] for table in self._tokens]

    def _buffer(self, buffers: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        """One layer's buffer `[N, H, C, K]`, as large as the tables of tokens; zeros where nothing was written."""
        rows, columns = self._tokens[layer].shape
        old = buffers[layer]
        if old is not None and old.shape[0] >= rows and old.shape[2] >= columns:
            return old
        new = like.new_zeros(rows, like.shape[1], columns, like.shape[3])
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        buffers[layer] = new
        return new

    def _note_tokens(
        self, first: int, memories: Sequence[MemoryOfRow], own: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Write down what the columns of entering rows hold, by layer where memories differ."""
        by_layer = [[m[layer][0].shape[1] if layer in m else 0 for m in memories] for layer in range(self.num_layers)]
        if any(of_layer != list(own) for of_layer in by_layer) and len(self._tables()) == 1:
            self._tokens = [self._tokens[0].clone() for _ in range(self.num_layers)]
        done: set[int] = set()
        for table, of_layer in zip(self._tokens, by_layer, strict=True):
            if id(table) in done:
                continue
            done.add(id(table))
            for row, (here, start, length) in enumerate(zip(of_layer, own, lengths, strict=True)):
                columns = table[first + row]
                columns[:here] = _MEMORY
                columns[start : start + length] = torch.arange(length, dtype=torch.int32, device=self.device)

    # ---------------------------------------------------------------- what models ask a cache for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use; positions are given to the models, so that none counts from this."""
        return 0 if self._pass is None else self._pass.width - self._pass.columns.shape[1]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0
