"""Prompt tuning (Lester et al. 2021):  X' = [P ; X], P trained, input layer only.   Legend: P length, E width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from multitune.deltas import Delta, Prompt
from multitune.methods.base import Method, Recipe, check, check_positive
from multitune.methods.registry import register
from multitune.methods.size import Size, size_field
from multitune.methods.starts import embeddings_of, repeat_to, token_ids

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
        - The default `length` is 16, for encoders whose rows are short; the paper's is 100, on T5, and it finds little
          gain beyond 20.
        - Every position costs a token in every layer, and room for the text: P=20 beside 128 tokens is 16 % more work.
        - Lester et al. sample words from the 5,000 most frequent ones; tokenizers do not say which those are, so
          `vocabulary` draws from all. `text` is a common start elsewhere, and not one of theirs.
        - The soft prompt of instruction prompt tuning (Singhal et al. 2022, arXiv 2212.13138) is this method with
          `length=100, start=uniform` at a rate of 3e-3 and a weight decay of 1e-5, in front of a text that already
          holds instructions and examples, as `--examples` writes it (docs/instructions.md).
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
    size: ClassVar[Size | None] = size_field("length", takes_positions=True)
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2,
        source="sweep on small tasks (docs/results.md), without weight decay; Lester et al. use 0.3 with Adafactor and "
        "a weight decay of 1e-5",
    )

    length: int = 16
    """Number of vectors P."""
    start: Literal["vocabulary", "uniform", "text", "labels"] = "vocabulary"
    """Start from the embeddings of random words, from U(-0.5, 0.5), from those of `text`, or from those of `labels`."""
    text: str | None = None
    """With start=text: a text whose tokens, repeated or cut to `length`, are the start."""
    labels: tuple[str, ...] | None = None
    """With start=labels: a word or words for each class; each starts one vector, random words start the others. None
    takes the task's own labels in training."""
    position: int = 0
    """The word the vectors stand in front of; 0 is before all, 1 behind the first token, -1 behind the last."""

    def __post_init__(self) -> None:
        check_positive(self, "length")
        check(self.position >= -1, self, f"position={self.position} is not possible", "give -1, 0, 1, ...")
        for name, given in (("text", self.text), ("labels", self.labels)):
            if self.start == name:
                asks_task = name == "labels" and given is None
                check(asks_task or bool(given), self, f"start={name} has no {name} to start from", f"give {name}=...")
            else:
                check(given is None, self, f"{name}={given!r} without start={name}", f"give start={name} as well")
        few = self.labels is None or len(self.labels) <= self.length
        check(few, self, f"{len(self.labels or ())} labels do not fit length={self.length}", "give a larger length")

    def with_labels(self, labels: tuple[str, ...]) -> PromptTuning:
        asks = self.start == "labels" and self.labels is None and labels
        return replace(self, labels=labels) if asks else self

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        named = self.start != "labels" or self.labels is not None
        check(named, self, "start=labels has no labels to start from", "give labels=..., or train a task that has some")
        shape = self.shapes(backbone)["vectors"]
        if self.start == "uniform":
            return {"vectors": torch.rand(*shape, generator=generator) - 0.5}
        if self.text is not None:
            ids = token_ids(self, backbone, "text", self.text)
            return {"vectors": embeddings_of(backbone, repeat_to(ids, self.length))}
        of_words = embeddings_of(
            backbone, torch.randint(backbone.vocab_size, (self.length,), generator=generator).tolist()
        )
        for i, label in enumerate(self.labels or ()):  # section 3.2: a label of several tokens is their mean
            of_words[i] = embeddings_of(backbone, token_ids(self, backbone, "labels", label)).mean(0)
        return {"vectors": of_words}

    def shapes(self, backbone: Backbone) -> dict[str, torch.Size]:
        room = backbone.max_length - 2
        check(self.length <= room, self, f"length={self.length} leaves no room", f"give at most {room}")
        return {"vectors": torch.Size((self.length, backbone.word_embeddings.shape[1]))}

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        return {"embedding": [Prompt(vectors=params["vectors"], at=(self.position,) * self.length)]}
