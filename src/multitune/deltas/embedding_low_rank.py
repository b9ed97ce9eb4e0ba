"""`EmbeddingLowRank`: E[token] += s · A[token] B at the word embeddings.   Legend: V vocabulary, E width, R rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from multitune.deltas.base import Delta, round_up_power_of_two, weight_of


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingLowRank(Delta):
    """A low-rank update of the word embeddings (LoRA, Hu et al. 2021, arXiv 2106.09685, released code).

    Semantics, one row of ids `x [T]` (int64), `y [T, E]`:  `y + scale * A[x] @ B`, times what the model multiplies its
    embeddings by, since it is the table that changes.

    Vectors that a prompt inserts are not words and stay as they are.
    """

    kind: ClassVar[str] = "EmbeddingLowRank"
    site_kind: ClassVar[str] = "embedding"
    dims: ClassVar[Mapping[str, str]] = {"A": "VR", "B": "RO"}

    A: Tensor
    """`[V, R]`"""
    B: Tensor
    """`[R, E]`"""
    scale: float = 1.0
    """The update is multiplied by this."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        if self.A.ndim == 3:
            rows = self.A.gather(1, x.unsqueeze(-1).expand(-1, -1, self.A.shape[-1]))  # [G, N, R]
        else:
            rows = F.embedding(x, self.A)
        multiplier = getattr(module, "embed_scale", 1.0)  # a number or a tensor of one; Gemma and BART have it
        if isinstance(multiplier, Tensor):
            multiplier = multiplier.to(y.dtype)  # rounded as the model rounds it
        return y + rows @ self.B * (self.scale * multiplier)

    def merge(self, module: nn.Module) -> None:
        weight_of(module, "weight").add_(self.scale * (self.A @ self.B))

    def canonical(self) -> Self:
        rank = self.A.shape[1]
        pad = round_up_power_of_two(rank) - rank
        return replace(self, A=F.pad(self.A, (0, pad)), B=F.pad(self.B * self.scale, (0, 0, 0, pad)), scale=1.0)
