"""SoTU (Ning et al. 2024): a random sparse update per task; updates of many tasks hardly overlap and add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.methods.base import Recipe, check
from multitune.methods.registry import register
from multitune.methods.size import DENSITY, Size
from multitune.methods.sparse_update import SparseUpdate

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class SoTU(SparseUpdate):
    """Sparse orthogonal parameters tuning. The places are random, and only their values are trained.

    Two tasks with places of their own share `density²` of all, so that the cosine of their updates is near zero and
    their sum changes little for either: `multitune.continual` adds them up and reads the sum with class means. Give
    every task another `mask_seed`. The paper trains all weights and drops most of the change afterwards; here the
    others are never trained, which takes the memory of a sparse update. Its equations could not be read: this form is
    ours.

    Shapes:
        Per chosen linear `values [N]`, trained, and `indices [N]`, int32, random places in the weight `[O, I]`; `x [..,
        I]` adds `x Δᵀ [.., O]`.
    Parameters:
        `floor(density · Σ I·O)` per layer, the sum over its targets. RoBERTa-base: 10 % of all six linears 8,493,456,
        1 % of query and value 141,552. A stored entry takes 8 bytes.
    Use it when:
        Tasks come one after another and one set of weights is to serve them all, without a choice of the adapter
        (docs/continual.md).
    Pitfalls:
        - Tasks that share a `mask_seed` share all places, and without one it is the seed of the run, which may be the
          same for all tasks; updates then collide.
        - The cosine of two updates falls with the density: a dense one defeats the purpose.
        - In a mixed batch its time grows with N; the sum of all tasks is meant to be served.
        - Class means made before a further task was added are slightly off afterwards.
    Published:
        No figure of Ning et al. 2024 could be verified.
    """

    name: ClassVar[str] = "sotu"
    title: ClassVar[str] = "SoTU"
    paper: ClassVar[str] = "Ning et al. 2024, arXiv 2411.02813, from its abstract"
    size: ClassVar[Size | None] = DENSITY
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, source="one small task (demo/intent)")

    density: float = 0.1
    """Share of each layer's target weights that is trained."""
    mask_seed: int | None = None
    """Seed of the random places; none takes the seed of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.mask_seed is None or self.mask_seed >= 0,
            self,
            f"mask_seed={self.mask_seed} is not a seed",
            "give a whole number of at least 0",
        )

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = generator if self.mask_seed is None else torch.Generator().manual_seed(self.mask_seed)
        return super().init(backbone, chosen)
