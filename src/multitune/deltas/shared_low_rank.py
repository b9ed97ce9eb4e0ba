"""`SharedLowRank`: y += ((x A) ⊙ d) B ⊙ b at a linear site, A and B shared.   Legend: I in, O out, R rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from multitune.deltas.base import Delta, weight_of


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedLowRank(Delta):
    """A low-rank update of which only two vectors are an adapter's own (VeRA, Kopiczko et al. 2024, arXiv 2310.11454).

    Semantics, one row `x [T, I]`, `y [T, O]`:  `y + (((x @ A) * d) @ B) * b`

    Slots whose matrices have one origin share two plain matrix products, so `A` and `B` are never packed or gathered.
    """

    kind: ClassVar[str] = "SharedLowRank"
    site_kind: ClassVar[str] = "linear"
    dims: ClassVar[Mapping[str, str]] = {"A": "IR", "B": "RO", "d": "R", "b": "O"}

    A: Tensor
    """`[I, R]`, frozen, in the backbone's dtype and on its device; belongs to no adapter."""
    B: Tensor
    """`[R, O]`, likewise."""
    d: Tensor
    """`[R]`"""
    b: Tensor
    """`[O]`"""
    origin: tuple[Any, ...]
    """What A and B were made from; equal origins mean equal matrices. Hashable."""
    dropout: float = 0.0
    """Probability of dropping an entry of `x`, in training only."""

    def tensors(self) -> dict[str, Tensor]:
        return {"d": self.d, "b": self.b}

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        if self.dropout and module.training:
            x = F.dropout(x, self.dropout)
        return y + ((x @ self.A) * self.d @ self.B) * self.b

    def merge(self, module: nn.Module) -> None:
        weight_of(module, "weight").add_(((self.A * self.d) @ (self.B * self.b)).T)

    def served(self) -> Self:
        return replace(self, dropout=0.0)
