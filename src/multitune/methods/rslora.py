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
    """LoRA scaled by alpha / √r, the scale at which neither output nor gradient shrinks or grows with the rank.

    Shapes:
        Those of LoRA: per chosen linear `A [I, R]`, `B [R, O]`; `x [.., I]` adds `(alpha / √r) · x A B [.., O]`. With
        `embedding` among the targets `A [V, R]`, `B [R, E]`, looked up by token.
    Parameters:
        `R · (I + O)` per chosen linear, `R · (V + E)` for the word embeddings. RoBERTa-base, query and value: r=8
        294,912.
    Use it when:
        You raise the rank of LoRA well beyond the usual 8, or compare ranks and want one learning rate to suit them
        all.
    Pitfalls:
        - At the same `alpha` its scale is √r times LoRA's: settings carried over from LoRA want a smaller rate or
          `alpha`.
        - It gives what `lora` with `rank_stabilised` gives; two names do not make two methods to compare.
    Published:
        Hugging Face PEFT's method comparison (Llama-3.2-3B trained on MetaMathQA, accuracy on GSM8K): at r=64 51.3,
        LoRA with alpha / r 47.4. No figure of Kalajdzievski 2023 has been checked, so none stands here.
    """

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
