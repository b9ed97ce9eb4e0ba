"""`Memory`: extra keys and values at an attention site.   Legend: M memory length, H key/value heads, K head width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from multitune.deltas.base import Delta, round_up_power_of_two


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory(Delta):
    """Keys and values put in front of a row's own (prefix-tuning, arXiv 2101.00190; P-tuning v2, arXiv 2110.07602).

    Semantics, one row and head:  `softmax(q [keys ; K]ᵀ / √K) [values ; V]`. Queries and the row's own mask do
    not change, positions by `shift`; entries whose `open` is 0 are never attended to.
    """

    kind: ClassVar[str] = "Memory"
    site_kind: ClassVar[str] = "attention"
    one_per_site: ClassVar[bool] = True
    attaches: ClassVar[str] = "inside"
    cannot_merge: ClassVar[str | None] = "attention over extra keys and values is not a change of any weight"

    keys: Tensor
    """`[M, H, K]`"""
    values: Tensor
    """`[M, H, K]`"""
    open: Tensor
    """`[M]`, 1 where an entry exists and 0 where it only pads to a common length."""
    shift: int = 0
    """How many positions further on the row's own tokens count: 0, or M for the convention of key/value caches."""

    def canonical(self) -> Self:
        length = self.keys.shape[0]
        pad = round_up_power_of_two(length) - length
        return replace(
            self,
            keys=F.pad(self.keys, (0, 0, 0, 0, 0, pad)),
            values=F.pad(self.values, (0, 0, 0, 0, 0, pad)),
            open=F.pad(self.open, (0, pad)),
        )
