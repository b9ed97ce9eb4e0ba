"""LoRA (Hu et al. 2021, eq. 3):  y + (alpha / r) · B A x.   Legend: I in, O out, R rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Recipe
from multitune.methods.low_rank import LowRankWithEmbedding
from multitune.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankWithEmbedding):
    """A low-rank update of chosen linear maps; `A [I, R]` is Kaiming-uniform and `B [R, O]` zero at first.

    On a backbone with quantised weights this is QLoRA (Dettmers et al. 2023, arXiv 2305.14314): nothing here reads
    the frozen weights.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685, eq. 3; rank stabilised: arXiv 2312.03732"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3, source="sweep on small tasks (docs/results.md); RoBERTa-base scripts use 4e-4 to 5e-4"
    )

    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r) instead, so that larger ranks are not damped."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)
