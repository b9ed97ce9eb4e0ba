"""`LowRank`: y += s · (x A) B at a linear site.   Legend: I in, O out, R rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.deltas.base import Delta, round_up_power_of_two, weight_of


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Delta):
    """A low-rank update of a linear map (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3).

    Semantics, one row `x [T, I]`, `y [T, O]`:  `y + scale * (x @ A) @ B`
    """

    kind: ClassVar[str] = "LowRank"
    site_kind: ClassVar[str] = "linear"
    dims: ClassVar[Mapping[str, str]] = {"A": "IR", "B": "RO"}

    A: Tensor
    """`[I, R]`"""
    B: Tensor
    """`[R, O]`"""
    scale: float = 1.0
    """The update is multiplied by this."""
    dropout: float = 0.0
    """Probability of dropping an entry of `x`, in training only."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        if self.dropout and module.training:
            x = F.dropout(x, self.dropout)
        if self.A.ndim == 3 and not torch.is_grad_enabled():
            return y.baddbmm_(torch.bmm(x, self.A), self.B, alpha=self.scale)
        update = x @ self.A @ self.B
        return y + (update if self.scale == 1.0 else update * self.scale)

    def merge(self, module: nn.Module) -> None:
        weight_of(module, "weight").add_((self.scale * (self.A @ self.B)).T)

    def canonical(self) -> Self:
        rank = self.A.shape[1]
        pad = round_up_power_of_two(rank) - rank
        return replace(
            self,
            A=F.pad(self.A, (0, pad)),
            B=F.pad(self.B * self.scale, (0, 0, 0, pad)),
            scale=1.0,
        )

    def served(self) -> Self:
        return replace(self.canonical(), dropout=0.0)
