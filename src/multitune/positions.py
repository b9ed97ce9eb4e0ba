"""Where the tokens of a batch stand in their rows, and whether the backbone has so many positions.

Legend: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune.errors import PlanError
from multitune.plan import Plan

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def _shift(plan: Plan, device: torch.device) -> Tensor | None:
    """`[B]`: how many positions further on each row's tokens count; `None` where none does."""
    shifts = [0 if r is None else r.position_shift for r in plan.ordered]
    return torch.tensor(shifts, device=device) if any(shifts) else None


def check_length(plan: Plan, backbone: Backbone, ids: Tensor, mask: Tensor | None) -> None:
    """Raise `PlanError` where a row has more positions than the backbone; names the row, and what its prompt takes.

    Args:
        ids: int64 `[B, T]` in the plan's order, with what is inserted.
        mask: `[B, T]` as `Batch.attention_mask`.
    """
    width = ids.shape[1]
    shift = _shift(plan, ids.device)
    ends = None
    if width > backbone.max_length or shift is not None:
        ends = torch.full_like(ids, width)[:, 0] if mask is None else row_ends(mask)
        ends = ends if shift is None else ends + shift
    if ends is not None and (width > backbone.max_length or int(ends.max()) > backbone.max_length):
        place = int(ends.argmax())
        row = plan.number(place)
        delta_set = plan.ordered[place]
        prompt = 0 if delta_set is None else delta_set.num_positions
        raise PlanError(
            f"row {row}: {int(ends[place])} positions, {prompt} of them its prompt, in a batch of {width}, but the "
            f"backbone has {backbone.max_length}; truncate its text to {backbone.max_length - prompt} tokens"
        )


def position_inputs(
    plan: Plan, backbone: Backbone, ids: Tensor, mask: Tensor | None, pieces: Tensor | None = None
) -> dict[str, Tensor]:
    """Positions where the model's own would not do.

    They count from each row's first real token, where padding on the left would shift them; padding on the right
    shifts nothing. In rows of several texts, `pieces [B, T]`, they count from each text's first token. And they are
    shifted by a memory that counts as positions.
    """
    shift = _shift(plan, ids.device)
    if backbone.architecture.own_positions and mask is not None and not bool((mask[:, 0] > 0).all()):
        lead = ((mask > 0).cumsum(1) == 0).sum(1)
        shift = -lead if shift is None else shift - lead
    if pieces is not None:
        starts = text_starts(pieces)
        shift = -starts if shift is None else shift.unsqueeze(1) - starts
    return {} if shift is None else {"position_ids": backbone.position_ids(ids, shift)}


def text_starts(pieces: Tensor) -> Tensor:
    """`pieces [B, T]` of `Batch` to `[B, T]`: where in its row the text of each token begins."""
    columns = torch.arange(pieces.shape[1], device=pieces.device)
    begins = pieces.diff(dim=1, prepend=pieces[:, :1]) != 0
    return (begins * columns).cummax(1).values


def row_ends(mask: Tensor) -> Tensor:
    """`mask [B, T]` to `[B]`: the position behind each row's last real token."""
    return ((mask > 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
