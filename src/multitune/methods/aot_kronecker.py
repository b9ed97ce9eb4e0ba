"""AoT P-Tuning, Kronecker form (arXiv 2305.10835, eq. 1 and 2):  h + P[token],  P = (W_L ⊗ W_M) W_R per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta, KroneckerRows, TokenBias
from multitune.methods.base import Method, Recipe, check, check_positive, check_probability
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class AoTKronecker(Method):
    """A bias per layer and token id from three factors, `[a, R]`, `[b, R]` and `[R², D]`; the last starts at zero.

    Shapes:
        Per layer `W_L [a, R]`, `W_M [b, R]`, `W_R [R², D]` with `a · b >= V`; token `v = i·b + j` gets
        `vec(W_L[i]ᵀ W_M[j]) W_R [D]`. Fused: one table `[V, L, D]`.
    Parameters:
        `L · ((a + b) · R + R² · D)`. RoBERTa-base, a=256, b=200: R=5 257,760, R=10 976,320, R=20 3,795,840.
    Use it when:
        As the FC form, and the word embeddings should not decide which tokens share a bias.
    Pitfalls:
        - Parameters grow with R², so useful ranks are much smaller than the FC form's.
        - Tokens are paired by their ids, which says nothing about their meaning.
        - A fused table is as large as the FC form's.
    Published:
        As the FC form: the abstract of arXiv 2305.10835, and no figure of its tables.
    """

    name: ClassVar[str] = "aot_kronecker"
    title: ClassVar[str] = "AoT P-Tuning (Kronecker)"
    paper: ClassVar[str] = "Gavrilov & Balagansky 2023, arXiv 2305.10835, eq. 1 and 2"
    fuses_to_table: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="sweep on small tasks (docs/results.md)")

    r: int = 16
    """Rank R; the parameters grow with R²."""
    a: int | None = None
    """Rows of the left factor; none picks a near-square pair for the vocabulary."""
    b: int | None = None
    """Rows of the middle factor; a · b must cover the vocabulary."""
    dropout: float = 0.0
    """Probability of dropping an entry of P, in training."""

    def __post_init__(self) -> None:
        check_positive(self, "r")
        check_probability(self, "dropout")
        check((self.a is None) == (self.b is None), self, "only one of a and b is given", "give both or none")
        if self.a is not None:
            check_positive(self, "a", "b")

    def factors(self, vocab_size: int) -> tuple[int, int]:
        """The pair (a, b): as given, or the most nearly square pair that covers the vocabulary."""
        if self.a is not None and self.b is not None:
            enough = self.a * self.b >= vocab_size
            check(
                enough,
                self,
                f"a·b = {self.a * self.b} rows do not cover {vocab_size} ids",
                "give larger factors",
            )
            return self.a, self.b
        a = math.isqrt(vocab_size - 1) + 1
        return a, -(-vocab_size // a)

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        layers, d = backbone.num_layers, backbone.hidden_size
        a, b = self.factors(backbone.vocab_size)
        std = self.r**-0.5  # the R² products of a token then have unit norm
        return {
            "left": torch.randn(a, layers, self.r, generator=generator) * std,
            "middle": torch.randn(b, layers, self.r, generator=generator) * std,
            "right": torch.zeros(layers, self.r**2, d),
        }

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        return {"layers": [TokenBias(source=KroneckerRows(**params, dropout=self.dropout))]}
