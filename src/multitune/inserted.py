"""A batch whose rows are lengthened by the vectors of their prompts.

Legend: B rows, T tokens of the longest row, T' with what is inserted, P inserted vectors in all, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multitune.deltas import Prompt
from multitune.deltas.prompt import FIRST_SLOT
from multitune.errors import PlanError
from multitune.plan import Plan
from multitune.positions import row_ends


def _check_whole(plan: Plan, mask: Tensor, end: Tensor) -> None:
    """Raise `PlanError` for a hole in `mask [B, T]`, whose rows would end at `end [B]` without one; names the row."""
    holes = end != row_ends(mask)
    if bool(holes.any()):
        raise PlanError(
            f"row {plan.number(int(holes.nonzero()[0]))}: its attention_mask has a hole, so that a prompt has no "
            f"place in it; put the padding at the row's ends"
        )


def _slot_places(plan: Plan, slots: Tensor | None, row: Tensor, number: Tensor) -> Tensor:
    """The words `[P]` in front of which slots `number [P]` of the rows `row [P]` stand.

    Raises:
        PlanError: a row has no such slot; names it.
    """
    known = torch.full_like(row, -1)
    if slots is not None:
        there = number < slots.shape[1]
        known[there] = slots.to(row.device)[row[there], number[there]]
    if bool((known < 0).any()):
        first = int((known < 0).nonzero()[0])
        have = 0 if slots is None else int((slots[int(row[first])] >= 0).sum())
        raise PlanError(
            f"row {plan.number(int(row[first]))}: its prompt has vectors for slot {int(number[first])}, from 0, but "
            f"the row's text has {have} slots; write {{|}} into the task's template where they stand"
        )
    return known


class Prompts:
    """A batch lengthened by inserted vectors: per-row lengths and places, right masks and positions."""

    def __init__(
        self,
        plan: Plan,
        placeholder_id: int,
        ids: Tensor,
        mask: Tensor | None,
        types: Tensor | None,
        slots: Tensor | None = None,
    ) -> None:
        device = ids.device
        num_rows, width = ids.shape
        mask = torch.ones_like(ids) if mask is None else mask.long()
        prompts = [[d for _, d in r.of(Prompt)] if r is not None else [] for r in plan.ordered]
        parts = [d for row in prompts for d in row if isinstance(d, Prompt)]
        lengths = torch.tensor(
            [sum(d.vectors.shape[0] for d in row if isinstance(d, Prompt)) for row in prompts], device=device
        )
        self.vectors = torch.cat([d.vectors for d in parts])
        """`[P, E]`, row after row."""
        at = torch.tensor([a for d in parts for a in d.at], device=device)
        self.row = torch.arange(num_rows, device=device).repeat_interleave(lengths)
        """`[P]`: the row each vector goes into."""
        lead = (mask.cumsum(1) == 0).sum(1)  # left padding stays left of everything
        end = lead + mask.sum(1)
        _check_whole(plan, mask, end)
        before, in_slot = self._place(plan, at, lead, end, slots, width)
        index_in_row = torch.arange(len(at), device=device) - (lengths.cumsum(0) - lengths)[self.row]
        self.column = before + index_in_row
        """`[P]`: where in the lengthened row each vector stands."""
        inserted = torch.zeros(num_rows, width + 1, dtype=torch.long, device=device)
        inserted.index_put_((self.row, before), torch.ones_like(before), accumulate=True)
        shifted = torch.arange(width, device=device) + inserted[:, :width].cumsum(1)
        new_width = int((end + lengths).max())
        # Padding that would move past the new end has nowhere to go and nothing to say: it lands in a spare column.
        target = shifted.clamp(max=new_width)

        def spread(values: Tensor, fill: int, inserted_value: int) -> Tensor:
            out = torch.full((num_rows, new_width + 1), fill, dtype=values.dtype, device=device)
            out.scatter_(1, target, values)
            out[self.row, self.column] = inserted_value
            return out[:, :new_width]

        # The places of the vectors hold an ordinary id, so that models which count positions from ids count them.
        pad = int(ids[mask == 0][0]) if bool((mask == 0).any()) else 0
        self.input_ids = spread(ids, pad, placeholder_id)
        self.attention_mask = spread(mask, 0, 1)
        self.token_type_ids = None if types is None else spread(types, 0, 0)
        if self.token_type_ids is not None and types is not None and bool(in_slot.any()):  # of the text around them
            inside = types[self.row, before.clamp(max=width - 1)] * in_slot
            self.token_type_ids[self.row, self.column] = inside
        self.positions = shifted.clamp(max=new_width - 1)
        """`[B, T]`: where each original token now stands (padding: anywhere)."""
        self.inserted = torch.zeros(num_rows, new_width, dtype=torch.bool, device=device)
        self.inserted[self.row, self.column] = True

    def _place(
        self, plan: Plan, at: Tensor, lead: Tensor, end: Tensor, slots: Tensor | None, width: int
    ) -> tuple[Tensor, Tensor]:
        """Put the vectors in the order of their places.

        Args:
            at: int64 `[P]`, where `Prompt.at` says they stand.
            lead, end: int64 `[B]`, each row's first real token and the place behind its last.
            width: T, of the rows as they are given.

        Returns:
            int64 `[P]`, the tokens of the rows as given that they stand in front of; bool `[P]`, which are in slots.
        """
        before = torch.where(at < 0, end[self.row], lead[self.row] + at)
        before = torch.minimum(before, end[self.row])
        in_slot = at <= FIRST_SLOT
        if bool(in_slot.any()):
            row = self.row[in_slot]
            place = lead[row] + _slot_places(plan, slots, row, FIRST_SLOT - at[in_slot])
            before[in_slot] = torch.minimum(place, end[row])
            order = (self.row * (width + 1) + before).argsort(stable=True)
            self.vectors, before, in_slot = self.vectors[order], before[order], in_slot[order]
        return before, in_slot

    def insert(self, embedded: Tensor) -> Tensor:
        """`embedded [B, T', E]` with the vectors in their places."""
        return embedded.index_put((self.row, self.column), self.vectors.to(embedded.dtype))
