"""AoT P-Tuning, FC form (arXiv 2305.10835, eq. 1 and 3):  h + P[token],  P = f(E W₁ + b₁) W₂ + b₂ per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from multitune.deltas import Delta, FCRows, TokenBias
from multitune.methods.base import Method, Recipe, check_positive, check_probability
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class AoTFC(Method):
    """A bias per layer and token id, made from the frozen word embeddings; `W₂` and `b₂` are zero at first.

    Shapes:
        Per layer `W₁ [E, R]`, `b₁ [R]`, `W₂ [R, D]`, `b₂ [D]`; a row of T tokens gets `[T, D]` at every layer's input.
        Fused: one table `[V, L, D]`.
    Parameters:
        `L · (E·R + R + R·D + D)`. RoBERTa-base: R=20 378,096, R=128 2,370,048, R=256 4,730,880.
    Use it when:
        Many tasks share a batch and latency counts: fused, it costs one gather and one addition per layer.
    Pitfalls:
        - A fused table is large (RoBERTa-base: 463,242,240 values a task); unfused, the factors are small.
        - The bias depends on the token id and not on its context.
        - Special tokens own rows too; that of the first token is a bias on the pooled vector.
    Published:
        The abstract of arXiv 2305.10835: better than BitFit, comparable to or better than its other baselines on GLUE
        and SuperGLUE. No figure of its tables has been checked, so none stands here.
    """

    name: ClassVar[str] = "aot_fc"
    title: ClassVar[str] = "AoT P-Tuning (FC)"
    paper: ClassVar[str] = "Gavrilov & Balagansky 2023, arXiv 2305.10835, eq. 1 and 3"
    fuses_to_table: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="sweep on small tasks (docs/results.md)")

    r: int = 64
    """Inner width R."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """The function f (GELU is not confirmed by the paper's readable part)."""
    dropout: float = 0.0
    """Probability of dropping an entry of P, in training."""

    def __post_init__(self) -> None:
        check_positive(self, "r")
        check_probability(self, "dropout")

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        width, layers, d = backbone.word_embeddings.shape[1], backbone.num_layers, backbone.hidden_size
        w1 = torch.empty(layers * self.r, width)
        nn.init.kaiming_uniform_(w1, a=math.sqrt(5), generator=generator)
        return {
            "w1": w1.T.contiguous().view(width, layers, self.r),
            "b1": torch.zeros(layers, self.r),
            "w2": torch.zeros(layers, self.r, d),
            "b2": torch.zeros(layers, d),
        }

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        rows = FCRows(embedding=backbone.word_embeddings, **params, activation=self.activation, dropout=self.dropout)
        return {"layers": [TokenBias(source=rows)]}
