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
    """Trains every weight of the top `count` layers; a norm behind the last layer, where there is one, stays frozen."""

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
