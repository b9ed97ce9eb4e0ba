"""Top-layer tuning: the uppermost layers of the backbone are trained, embeddings and lower layers frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from multitune.methods.base import Recipe, check, check_positive
from multitune.methods.partial import PartialTuning
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class TopLayers(PartialTuning):
    """Trains every weight of the top `count` layers; a norm behind the last layer, where there is one, stays frozen.

    Shapes:
        Those of the weights of the top `count` layers.
    Parameters:
        `count · (4·D² + 2·D·F + 9·D + F)` for layers of BERT's kind. RoBERTa-base: 1 layer 7,087,872, 2 layers
        14,175,744, 4 layers 28,351,488.
    Use it when:
        You need a quick baseline: the backward pass ends at the lowest trained layer.
    Pitfalls:
        - It changes weights, so rows of its task cannot share a batch with other tasks.
        - It holds up on texts like those of the training set and falls behind on others; see the figures for WebNLG.
        - It trains more parameters than most adapters do, and every task stores them.
    Published:
        Li and Liang 2021, Table 1, GPT-2 medium, two layers, BLEU (full fine-tuning in brackets): E2E 68.1 (68.2),
        WebNLG 53.6 on seen, 18.9 on unseen, 36.0 on all categories (64.2, 27.7, 46.5), DART 41.0 (46.2).
    """

    name: ClassVar[str] = "top_layers"
    title: ClassVar[str] = "Top-layer tuning"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685, section 5.1 (FT-Top2)"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-4, weight_decay=0.01, source="that of full fine-tuning (docs/results.md)"
    )

    count: int = 2
    """Layers to train, counted from the top."""

    def __post_init__(self) -> None:
        check_positive(self, "count")

    def trained_layers(self, backbone: Backbone) -> range:
        n = backbone.num_layers
        check(self.count <= n, self, f"count={self.count} is more than the {n} layers", f"give at most {n}")
        return range(n - self.count, n)
