"""Sources of per-token rows for `TokenBias`: factors evaluated on demand, or a table.

Legend: V vocabulary, L layers, D width, E embedding width, N ids, R rank, G slots (many-slot form only).
Every source maps ids `[N]` to rows `[N, L, D]`; factor sources stacked over slots map `[G, N]` to `[G, N, L, D]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from multitune.deltas.bottleneck import ACTIVATIONS


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """One adapter's vectors per layer and token id."""

    def rows(self, ids: Tensor, training: bool = False) -> Tensor:
        """Rows `[N, L, D]` for `ids [N]` (int64)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that belong to the adapter, by name."""
        return {}

    def settings(self) -> tuple[Any, ...]:
        """What two sources must share to be evaluated in one batched product; hashable."""
        return (type(self).__name__,)

    def map(self, function: Any) -> Self:
        """A copy with `function` applied to every tensor that belongs to the adapter."""
        return replace(self, **{name: function(t) for name, t in self.tensors().items()})

    def served(self) -> Self:
        """An equal source for serving: no dropout."""
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class FactorRows(TokenRows):
    """Rows computed from factors: small to keep, and only the ids asked for are evaluated."""

    dropout: float = 0.0
    """Probability of dropping an entry of the rows, in training only."""

    def compute(self, ids: Tensor) -> Tensor:
        """`[N, L, D]` for `ids [N]`, or `[G, N, L, D]` for `[G, N]` when stacked."""
        raise NotImplementedError

    def rows(self, ids: Tensor, training: bool = False) -> Tensor:
        return F.dropout(self.compute(ids), self.dropout, training=training)

    def served(self) -> Self:
        return replace(self, dropout=0.0)

    def tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "embedding"}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def settings(self) -> tuple[Any, ...]:
        found = ((f.name, getattr(self, f.name)) for f in fields(self))
        return (type(self).__name__, *((n, None if isinstance(v, Tensor) else v) for n, v in found))


@dataclass(frozen=True, kw_only=True, eq=False)
class FCRows(FactorRows):
    """`f(E[ids] W1 + b1) W2 + b2` per layer (AoT P-Tuning, eq. 3)."""

    embedding: Tensor
    """`[V, E]`, the backbone's frozen word embeddings; belongs to the backbone, so it is never packed or saved."""
    w1: Tensor
    """`[E, L, R]`"""
    b1: Tensor
    """`[L, R]`"""
    w2: Tensor
    """`[L, R, D]`"""
    b2: Tensor
    """`[L, D]`"""
    activation: str = "gelu"
    """A key of `ACTIVATIONS`."""

    def compute(self, ids: Tensor) -> Tensor:
        words = F.embedding(ids, self.embedding).to(self.w1.dtype)
        stacked = ids.ndim == 2
        b1, b2 = (b.unsqueeze(1) if stacked else b for b in (self.b1, self.b2))
        hidden = ACTIVATIONS[self.activation](torch.einsum("...ne,...elr->...nlr", words, self.w1) + b1)
        return torch.einsum("...nlr,...lrd->...nld", hidden, self.w2) + b2


@dataclass(frozen=True, kw_only=True, eq=False)
class KroneckerRows(FactorRows):
    """`vec(WL[i]ᵀ WM[j]) WR` per layer with `id = i · b + j` (AoT P-Tuning, eq. 2, one row of `(WL ⊗ WM) WR`)."""

    left: Tensor
    """`[a, L, R]`"""
    middle: Tensor
    """`[b, L, R]`"""
    right: Tensor
    """`[L, R·R, D]`"""

    def compute(self, ids: Tensor) -> Tensor:
        stacked = ids.ndim == 2
        b = self.middle.shape[-3]
        i, j = ids // b, ids % b
        if stacked:
            slot = torch.arange(ids.shape[0], device=ids.device)[:, None]
            left, middle = self.left[slot, i], self.middle[slot, j]
        else:
            left, middle = self.left[i], self.middle[j]
        pairs = (left.unsqueeze(-1) * middle.unsqueeze(-2)).flatten(-2)  # [..., N, L, R·R]
        return torch.einsum("...nlk,...lkd->...nld", pairs, self.right)


@dataclass(frozen=True, kw_only=True, eq=False)
class TableRows(TokenRows):
    """Rows read from a finished table, in memory or memory-mapped: no arithmetic at all."""

    table: Tensor
    """`[V, L, D]`: one token's rows for all layers lie side by side, so that a mapped file is read once per token."""
    scale: Tensor | None = None
    """`[V, L, 1]`, float32: what the whole numbers of an int8 table are multiplied by."""
    mapped: bool = False
    """Whether the table is a memory-mapped file, whose pages the system may drop at any time."""

    @property
    def dtype(self) -> torch.dtype:
        """The rows' number type."""
        return self.table.dtype if self.scale is None else self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the table and its scale."""
        held = (self.table,) if self.scale is None else (self.table, self.scale)
        return sum(t.numel() * t.element_size() for t in held)

    def in_memory(self, device: torch.device) -> TableRows:
        """A copy that is no mapped file."""
        table, scale = (None if t is None else t.clone().to(device) for t in (self.table, self.scale))
        assert table is not None
        return TableRows(table=table, scale=scale)

    def rows(self, ids: Tensor, training: bool = False) -> Tensor:
        found = self.table.index_select(0, ids)
        return found if self.scale is None else found * self.scale.index_select(0, ids)

    def rows_into(self, ids: Tensor, out: Tensor) -> None:
        """Write the rows of `ids [N]` into `out [N, L, D]`, both on the table's device."""
        if out.dtype == self.table.dtype:
            torch.index_select(self.table, 0, ids, out=out)
        else:
            out.copy_(self.rows(ids))


def build_table(source: TokenRows, vocab_size: int, dtype: torch.dtype, chunk: int = 4096) -> TableRows:
    """The table of a source on the CPU, evaluated `chunk` ids at a time so that the peak stays small.

    With `torch.int8` every row `t [D]` is held as whole numbers `round(t / s)`, `s = max |t| / 127`, and so is off by
    `s / 2 = max |t| / 254` at most.
    """
    with torch.no_grad():
        chunks = _chunks(source, vocab_size, chunk)
        layers, width = source.rows(chunks[0][:1]).shape[1:]
        table = torch.empty(vocab_size, layers, width, dtype=dtype)
        scale = torch.empty(vocab_size, layers, 1) if dtype == torch.int8 else None
        for ids in chunks:
            rows, here = source.rows(ids).cpu(), slice(int(ids[0]), int(ids[-1]) + 1)
            if scale is not None:
                scale[here] = rows.abs().amax(-1, keepdim=True) / 127
                rows = (rows / scale[here].where(scale[here] > 0, 1)).round()  # a row of zeros stays one
            table[here] = rows.to(dtype)
    return TableRows(table=table, scale=scale)


def table_error(source: TokenRows, table: TableRows, chunk: int = 4096) -> tuple[float, float]:
    """How far a table is from its source: the largest difference, and the norm of all by the norm of all rows."""
    largest, squares, total = 0.0, 0.0, 0.0
    with torch.no_grad():
        for ids in _chunks(source, len(table.table), chunk):
            rows = source.rows(ids).cpu().double()
            off = rows - table.rows(ids.cpu())
            largest = max(largest, float(off.abs().max()))
            squares, total = squares + float(off.square().sum()), total + float(rows.square().sum())
    return largest, math.sqrt(squares / total) if total else 0.0


def _chunks(source: TokenRows, vocab_size: int, chunk: int) -> tuple[Tensor, ...]:
    device = next(iter(source.tensors().values())).device
    return torch.arange(vocab_size, device=device).split(chunk)
