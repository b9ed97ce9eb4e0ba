"""rsLoRA (Kalajdzievski 2023):  y + (alpha / √r) · B A x, LoRA whose gains from larger ranks are not damped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Recipe
from multitune.methods.low_rank import LowRankWithEmbedding
from multitune.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class RsLoRA(LowRankWithEmbedding):
    """LoRA scaled by alpha / √r, the scale at which neither output nor gradient shrinks or grows with the rank."""

    name: ClassVar[str] = "rslora"
    title: ClassVar[str] = "rsLoRA"
    paper: ClassVar[str] = "Kalajdzievski 2023, arXiv 2312.03732, section 3.2"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3, source="not swept: LoRA's 3e-3 less the factor √r by which the scale is larger at r=8"
    )

    alpha: float = 16.0
    """The update is scaled by alpha / sqrt(r)."""

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.r)
