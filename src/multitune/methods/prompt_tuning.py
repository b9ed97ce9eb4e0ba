"""Prompt tuning (Lester et al. 2021):  X' = [P ; X], P trained, input layer only.   Legend: P length, E width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from multitune.deltas import Delta, Prompt
from multitune.methods.base import Method, Recipe, check, check_positive
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trained vectors `[P, E]` among the word embeddings. They are attended to, so a fresh prompt is no identity.

    Shapes:
        `vectors [P, E]`; a row of T tokens becomes T + P in every layer, and P are taken out again at the end.
    Parameters:
        `P · E`. RoBERTa-base: P=1 768, P=20 15,360, P=100 76,800.
    Use it when:
        The adapter must be as small as it can be, or the backbone is large (billions of parameters) and frozen behind
        an interface that takes embeddings. Small encoders do better with P-tuning v2 or any method inside the layers.
    Pitfalls:
        - It wants large learning rates (the paper: 0.3, with Adafactor), and accuracy on held-out rows can swing from
          one evaluation to the next: keep the best step.
        - Every position costs a token in every layer, and room for the text: P=20 beside 128 tokens is 16 % more work.
        - Lester et al. sample words from the 5,000 most frequent ones; tokenizers do not say which those are, so
          `vocabulary` draws from all.
    Published:
        Lester et al. 2021: on SuperGLUE it equals full fine-tuning of T5-XXL (11B) and falls behind as models shrink;
        the start matters for small models (labels, then words, then uniform) and no longer at 11B; beyond 20 vectors
        gains are small. Ding et al. 2023 (Nature Machine Intelligence), Table 2, RoBERTa-large without a template: 77.7
        on average, against 87.4 for adapters.
    """

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691, section 2"
    identity_at_init: ClassVar[bool] = False
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2, source="sweep on small tasks (docs/results.md); Lester et al. use 0.3 with Adafactor"
    )

    length: int = 16
    """Number of vectors P."""
    start: Literal["vocabulary", "uniform"] = "vocabulary"
    """Start from the embeddings of random words, or from U(-0.5, 0.5)."""
    position: int = 0
    """The word the vectors stand in front of; 0 is before all, 1 behind the first token, -1 behind the last."""

    def __post_init__(self) -> None:
        check_positive(self, "length")
        check(self.position >= -1, self, f"position={self.position} is not possible", "give -1, 0, 1, ...")

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        words = backbone.word_embeddings
        room = backbone.max_length - 2
        check(self.length <= room, self, f"length={self.length} leaves no room", f"give at most {room}")
        if self.start == "uniform":
            return {"vectors": torch.rand(self.length, words.shape[1], generator=generator) - 0.5}
        ids = torch.randint(words.shape[0], (self.length,), generator=generator)
        return {"vectors": backbone.embed(ids).float().cpu().clone()}

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        return {"embedding": [Prompt(vectors=params["vectors"], at=(self.position,) * self.length)]}
