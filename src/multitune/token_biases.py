"""The token biases of one batch: the rows of factors or tables for the tokens that are there, and where they are added.

Legend: B rows, T tokens of the longest row, R rows of one bias, G slots, N token rows, L layers, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multitune.deltas import TableRows, TokenBias
from multitune.plan import Group, Plan


@dataclass(eq=False)
class TokenRowsOfBatch:
    """The token biases of some rows of one batch, for all layers."""

    rows: slice | Tensor | None
    """Which rows: all (`None`), a range, or indices `[R]`."""
    values: Tensor
    """`[N, L, D]`, L layers; N may be the whole vocabulary of a table."""
    index: Tensor | None
    """`[R, T]` into N, or `None` when N is already `R * T` in order."""
    shape: tuple[int, int]
    """(R, T)."""
    keep: Tensor | None = None
    """`[R, T, 1]`, 0 where an inserted vector stands."""

    def at(self, layer: int) -> Tensor:
        """Biases `[R, T, D]` of one layer."""
        values = self.values[:, layer]
        bias = F.embedding(self.index, values) if self.index is not None else values.view(*self.shape, -1)
        return bias if self.keep is None else bias * self.keep

    def silence(self, inserted: Tensor) -> None:
        """No bias where `inserted [B, T]` says that a prompt vector stands."""
        mine = inserted if self.rows is None else inserted[self.rows]
        if bool(mine.any()):
            self.keep = (~mine).unsqueeze(-1).to(self.values.dtype)


def token_biases(plan: Plan, ids: Tensor, inserted: Tensor | None, *, training: bool) -> list[TokenRowsOfBatch]:
    """The biases that a plan has for the tokens `ids [B, T]`, in the plan's order.

    Args:
        inserted: bool `[B, T]`, where prompt vectors stand, which get no bias; `None` where there are none.
        training: whether a training run asks, so that masks may be drawn.
    """
    found: list[TokenRowsOfBatch] = []
    for step in plan.steps.get("layers", ()):
        assert isinstance(step.delta, TokenBias)
        found.append(_rows_from_factors(step.group, step.delta, ids, training))
    if plan.tables:
        found.append(_rows_from_tables(plan, ids))
    if inserted is not None:
        for part in found:
            part.silence(inserted)
    return found


def add_biases(found: Sequence[TokenRowsOfBatch], layer: int, hidden: Tensor) -> Tensor:
    """`hidden [B, T, D]` at a layer's input with the biases of that layer, of which there are some; never in place."""
    only = found[0]
    if len(found) == 1 and only.rows is None:
        return hidden + _addend(only.at(layer), hidden)
    hidden = hidden.clone()  # the layer below may have handed out the same tensor
    for part in found:
        bias = part.at(layer)
        if isinstance(part.rows, Tensor):
            hidden.index_add_(0, part.rows, bias.to(hidden.dtype))
        else:
            hidden[part.rows if part.rows is not None else slice(None)] += _addend(bias, hidden)
    return hidden


def _addend(bias: Tensor, hidden: Tensor) -> Tensor:
    """`bias` as it is where adding it keeps the hidden states' type, in one pass over them; else in that type."""
    return bias if torch.promote_types(bias.dtype, hidden.dtype) == hidden.dtype else bias.to(hidden.dtype)


def _rows_from_factors(group: Group, delta: TokenBias, ids: Tensor, training: bool) -> TokenRowsOfBatch:
    mine = ids if group.rows is None else ids[group.rows]
    shape = (mine.shape[0], mine.shape[1])
    if group.rows is None:
        unique, index = mine.unique(return_inverse=True)
        return TokenRowsOfBatch(None, delta.source.rows(unique, training), index, shape)
    per_slot = mine.reshape(group.num_slots, -1)  # [G, K*T]
    if shape[1] == 1:  # a step of decoding, in which little repeats
        return TokenRowsOfBatch(group.rows, delta.source.rows(per_slot, training).flatten(0, 1), None, shape)
    distinct, index = _distinct(per_slot)
    values = delta.source.rows(distinct, training)  # [G, N, L, D]
    index += distinct.shape[1] * torch.arange(group.num_slots, device=ids.device)[:, None]
    return TokenRowsOfBatch(group.rows, values.flatten(0, 1), index.view(shape), shape)


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids of every slot, and where each id is among them.

    Args:
        ids: int64 `[G, M]`.

    Returns:
        int64 `[G, N]`, N being the most that a slot has, with id 0 where it has fewer; and int64 `[G, M]`, numbers
        below N: `distinct[g, index[g, m]] == ids[g, m]`.
    """
    ordered, order = ids.sort(dim=1)
    is_new = torch.zeros_like(ordered)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    number = is_new.cumsum(1)
    distinct = ids.new_zeros(ids.shape[0], int(number[:, -1].max()) + 1).scatter_(1, number, ordered)
    return distinct, torch.empty_like(ids).scatter_(1, order, number)


def _rows_from_tables(plan: Plan, ids: Tensor) -> TokenRowsOfBatch:
    """The rows of the tables in use: of one in memory layer by layer where they are added, else all of them now."""
    start, stop = plan.tables[0][0].start, plan.tables[-1][0].stop
    rows = None if (start, stop) == (0, len(ids)) else slice(start, stop)
    shape = (stop - start, ids.shape[1])
    (where, only), *others = plan.tables
    if not others and not only.mapped and only.scale is None and only.table.device == ids.device:
        return TokenRowsOfBatch(rows, only.table, ids[where], shape)
    return TokenRowsOfBatch(rows, _read_tables(plan.tables, ids).to(ids.device), None, shape)


def _read_tables(tables: Sequence[tuple[slice, TableRows]], ids: Tensor) -> Tensor:
    """Token rows `[R * T, L, D]` of all rows from the first table's to the last's, zero where there is none; each
    table is read once, a mapped file once per token.
    """
    first, width = tables[0][1].table, ids.shape[1]
    start, stop = tables[0][0].start, tables[-1][0].stop
    contiguous = sum(r.stop - r.start for r, _ in tables) == stop - start
    values = torch.empty if contiguous else torch.zeros
    dtype = functools.reduce(torch.promote_types, (source.dtype for _, source in tables))
    out = values((stop - start) * width, *first.shape[1:], dtype=dtype, device=first.device)
    for where, source in tables:
        part = out[(where.start - start) * width : (where.stop - start) * width]
        source.rows_into(ids[where].reshape(-1).to(first.device), part)
    return out
