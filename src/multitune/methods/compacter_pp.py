"""Compacter++ (Karimi Mahabadi et al. 2021): Compacter's adapters behind the feed-forward only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Recipe
from multitune.methods.phm_adapter import PHMAdapter
from multitune.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class CompacterPP(PHMAdapter):
    """One adapter per layer, half of Compacter's parameters and depth; see Compacter for the form.

    Shapes:
        Once per model `A [N, N, N]`; per layer `down_left [N, D/N, R]`, `down_right [N, R, M/N]`, `down_bias [M]`,
        `up_left [N, M/N, R]`, `up_right [N, R, D/N]`, `up_bias [D]`, made dense to `W_d [D, M]` and `W_u [M, D]` before
        use.
    Parameters:
        `L · (2·R·(D + M) + D + M) + N³`, and `4 · L · D` with `layer_norms`. RoBERTa-base: 28,576.
    Use it when:
        Compacter is small enough but too slow: this one adds half as many products in series.
    Pitfalls:
        - Fewer parameters, same arithmetic: served, it is a Pfeiffer adapter of width M, and not mergeable.
        - It wants a larger rate than dense adapters: 3e-3 against 3e-4 in the released code.
        - N must divide both the bottleneck and the backbone's width.
    Published:
        Second-hand, T5-base, in brackets AdapterHub's own run: CoLA 61.27 (58.45), SST-2 93.81 (94.61), MRPC accuracy
        90.69 (87.99), MNLI 85.71 (85.32), QNLI 93.08 (91.63), RTE 74.82 (77.25).
    """

    name: ClassVar[str] = "compacter_pp"
    title: ClassVar[str] = "Compacter++"
    paper: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv 2106.04647, section 4"
    sublayers: ClassVar[tuple[str, ...]] = ("ffn",)
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="the released code (T5-base, GLUE); not swept yet")
