"""LoRA+ (Hayou et al. 2024):  LoRA's y + (alpha / r) · B A x, with B's learning rate λ times that of A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Recipe, check
from multitune.methods.low_rank import LowRankMethod
from multitune.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LowRankMethod):
    """LoRA whose two matrices learn at different rates; what is served is the same. `learning_rate` is that of A.

    The head learns at the rate of A, too.

    Shapes:
        Those of LoRA: per chosen linear `A [I, R]`, `B [R, O]`; `x [.., I]` adds `(alpha / r) · x A B [.., O]`.
    Parameters:
        `R · (I + O)` per chosen linear, as LoRA. RoBERTa-base, query and value: r=8 294,912.
    Use it when:
        LoRA learns too slowly for you: only the optimizer differs, serving and merging are LoRA's.
    Pitfalls:
        - `learning_rate` is that of A; at LoRA's own rate, B would learn `ratio` times too fast. Choose A's rate first.
        - AdamW's decay is multiplied by the rate, so B is pulled towards zero `ratio` times as strongly.
        - `ratio=1` is LoRA; a sweep should include it.
    Published:
        No figure of Hayou et al. 2024 could be verified, and neither could the ratio they recommend.
    """

    name: ClassVar[str] = "lora_plus"
    title: ClassVar[str] = "LoRA+"
    paper: ClassVar[str] = "Hayou et al. 2024, arXiv 2402.12354, section 4"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=5e-4, source="not swept: lies so that A learns more slowly and B faster than at LoRA's 3e-3"
    )

    ratio: float = 16.0
    """λ: the learning rate of B over that of A; 2^4 is the authors' rule of thumb (second-hand)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.ratio >= 1, self, f"ratio={self.ratio} slows B down", "give ratio of at least 1")

    def learning_rate_factor(self, name: str) -> float:
        return self.ratio if name.endswith(".B") else 1.0
