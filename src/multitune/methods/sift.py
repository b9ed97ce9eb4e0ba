"""SIFT (Song et al. 2024): the entries of W with the largest gradients at the start are trained, W + Δ, supp Δ ⊆ Ω."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from multitune.methods.base import Recipe, WeightGradients, check_positive
from multitune.methods.registry import register
from multitune.methods.sparse_update import SparseUpdate, largest_places

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class SIFT(SparseUpdate):
    """Sparse increment fine-tuning. Before the first step the gradient of every target weight is computed on training
    rows and reduced at once to its largest entries; their places are kept and only their values are trained.

    A fresh adapter that has seen no rows has random places. Gradient and optimizer state have the size of the values,
    and decay acts on the increment. The released code steps one iteration late and loses the last step; here an
    increment is an ordinary tensor of the optimizer. It keeps `floor(density * size) + 1` entries of every weight,
    here a layer's weights share `floor(density * size of all)`.
    """

    name: ClassVar[str] = "sift"
    title: ClassVar[str] = "SIFT"
    paper: ClassVar[str] = "Song et al. 2024, arXiv 2312.11875, sections 3 and 4"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3, source="one small task (demo/intent); Song et al. use 7e-5 on GLUE with RoBERTa-large"
    )
    needs_gradients: ClassVar[bool] = True

    batches: int = 1
    """Training batches whose gradients are added up to choose the entries; at most one pass over the rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "batches")

    def calibrate(
        self, params: Mapping[str, Tensor], backbone: Backbone, gradients: WeightGradients
    ) -> Mapping[str, Tensor]:
        chosen = dict(params)

        def keep_largest(site: Site, gradient: Tensor) -> None:
            count = len(params[f"{site.name}.values"])
            chosen[f"{site.name}.indices"] = largest_places(gradient.abs(), count)

        gradients(self.sites(backbone), self.batches, keep_largest)
        return chosen
