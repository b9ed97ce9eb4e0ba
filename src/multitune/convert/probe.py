"""The same-outputs check that ends every conversion: both forms on the same random rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune import heads
from multitune.errors import AdapterError
from multitune.plan import DeltaSet, Plan

if TYPE_CHECKING:
    from multitune.adapter import Adapter
    from multitune.backbone import Backbone

#: Largest difference, relative to the largest value, that another order of sums may make.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}

NUM_ROWS, LENGTH = 8, 24

#: Outputs of the other form for `input_ids`, `attention_mask [B, T]`: hidden states `[B, T, D]` or logits.
Outputs = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Check:
    """How far the outputs before and after a conversion are apart."""

    by: str
    """What computed the other form's outputs."""
    outputs: str
    """What was compared: logits or hidden states."""
    max_difference: float
    """Largest absolute difference."""
    max_magnitude: float
    """Largest absolute value, to judge the difference by."""


def probe_rows(backbone: Backbone, room: int) -> tuple[Tensor, Tensor]:
    """Rows of random ordinary ids, half of them shorter: `input_ids` and `attention_mask`, int64 `[B, T]`."""
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, room)
    ids = torch.randint(backbone.vocab_size, (NUM_ROWS, length), generator=generator)
    ids[ids == backbone.pad_id] = backbone.placeholder_id  # some models derive positions from padding ids
    lengths = torch.tensor([length] * (NUM_ROWS // 2) + [max(1, length - 1 - i) for i in range(NUM_ROWS // 2)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids[mask == 0] = backbone.pad_id
    return ids.to(backbone.device), mask.to(backbone.device)


def ours(adapter: Adapter, backbone: Backbone, ids: Tensor, mask: Tensor, *, hidden: bool) -> Tensor:
    """Outputs of an adapter as it is served."""
    with torch.no_grad():
        deltas: DeltaSet = adapter.delta_set(backbone)
        states = backbone.run(Plan([deltas] * len(ids)), ids, mask)
        if hidden:
            return states
        tensors = {k: t.to(backbone.device) for k, t in adapter.head_params.items()}
        return heads.logits(backbone, adapter.head, tensors, states, mask, training=False)


def compare(
    adapter: Adapter, backbone: Backbone, theirs: Outputs, *, by: str | Callable[[], str], hidden: bool
) -> Check:
    """Run both forms on the same rows.

    Args:
        by: what computes the other form's outputs; may be called for, after `theirs`.

    Raises:
        AdapterError: they differ by more than rounding; nothing should be written then.
    """
    room = backbone.max_length - adapter.delta_set(backbone).num_positions
    ids, mask = probe_rows(backbone, room)
    found = ours(adapter, backbone, ids, mask, hidden=hidden).double()
    with torch.no_grad():
        expected = theirs(ids, mask).double()
    if not hidden:  # a regression's mean says nothing about agreement, and would widen what is allowed
        found, expected = ((x - adapter.head.target_mean) / adapter.head.target_std for x in (found, expected))
    if found.ndim == 3:  # what stands at padding is nobody's output
        found, expected = found[mask.bool()], expected[mask.bool()]
    check = Check(
        by=by if isinstance(by, str) else by(),
        outputs="hidden states" if hidden else "logits",
        max_difference=float((found - expected).abs().max()),
        max_magnitude=float(expected.abs().max()),
    )
    limit = TOLERANCES[backbone.dtype] * check.max_magnitude
    if not check.max_difference <= limit < math.inf:  # NaN is no agreement either, nor are two infinities
        raise AdapterError(
            f"the converted adapter does not compute the same: its {check.outputs} differ by up to "
            f"{check.max_difference:.1e} of values up to {check.max_magnitude:.1f} ({check.by}). Is '{backbone.name}' "
            f"the very backbone that it was trained on?"
        )
    return check
