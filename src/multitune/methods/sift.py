"""SIFT (Song et al. 2024): the entries of W with the largest gradients at the start are trained, W + Δ, supp Δ ⊆ Ω."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from multitune.methods.base import Recipe, WeightGradients, check_positive
from multitune.methods.registry import register
from multitune.methods.size import DENSITY, Size
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

    Shapes:
        Per chosen linear `values [N]`, trained, and `indices [N]`, int32, places in the weight `[O, I]`; `x [.., I]`
        adds `x Δᵀ [.., O]`.
    Parameters:
        `floor(density · Σ I·O)` per layer, the sum over its targets. RoBERTa-base: 0.8 % of query, key, value and
        attention output 226,488, 1 % of all six linears 849,336. A stored entry takes 8 bytes.
    Use it when:
        You want full fine-tuning's kind of change with little optimizer memory, merged or swapped by scattering the
        values.
    Pitfalls:
        - The places are those of the first rows: a batch that is not like the task chooses badly; raise `batches`.
        - In a mixed batch its time grows with N, and sparse products are slow beside dense ones; merged it costs
          nothing.
        - The released code applies each step late and never the last, and its weight decay has no effect; expect other
          results from the same settings.
    Published:
        Song et al. 2024, Table 2, RoBERTa-large, 0.8M parameters (LoRA of the same size, quoted there, in brackets):
        MNLI 90.6 (90.6), SST-2 96.2 (96.2), MRPC 90.4 (90.2), CoLA 68.5 (68.2), QNLI 94.1 (94.8), QQP 91.0 (91.6), RTE
        85.9 (85.2), STS-B 92.3 (92.3), average 88.6 (88.6).
    """

    name: ClassVar[str] = "sift"
    title: ClassVar[str] = "SIFT"
    paper: ClassVar[str] = "Song et al. 2024, arXiv 2312.11875, sections 3 and 4"
    size: ClassVar[Size | None] = DENSITY
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
