"""VeRA (Kopiczko et al. 2024, eq. 2):  y + ((x A) ⊙ d) B ⊙ b, with A and B random, frozen and shared.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multitune.deltas import Delta, SharedLowRank
from multitune.methods.base import Recipe, check
from multitune.methods.low_rank import RankMethod
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(RankMethod):
    """Trains `d [R]` and `b [O]` around two random matrices that are made from a seed and never stored.

    The matrices are as large as the largest target needs, and a smaller one uses their first rows and columns; all
    adapters of one seed, rank and width share them in memory. A row of a mixed batch adds its two vectors only, but
    multiplies at the full rank: 2·R·(I + O) operations a token and site, 32 times those of LoRA at r=8.

    Shapes:
        Per chosen linear `d [R]` and `b [O]`; `x [.., I]` adds `((x A) ⊙ d) B ⊙ b [.., O]`. `A [I, R]` and `B [R, O]`
        belong to the seed and no adapter.
    Parameters:
        `R + O` per chosen linear. RoBERTa-base, query and value: r=256 24,576, r=1024 43,008.
    Use it when:
        Very many adapters have to be stored or held in memory, and a larger product per token is affordable, or they
        are merged.
    Pitfalls:
        - Few parameters are not little work: unmerged, every token is multiplied at the full rank.
        - The matrices follow from the seed, the rank and the widest of the targets: other targets, other matrices.
        - They are drawn anew where the adapter is loaded: a generator that draws otherwise makes another adapter.
        - Weight decay pulls d from its start at 0.1 towards zero as well.
    Published:
        Hugging Face PEFT's method comparison (Llama-3.2-3B trained on MetaMathQA, accuracy on GSM8K), every learning
        rate 1e-4: 35.4 with 129,024 parameters, LoRA r=32 47.8 with 9,175,040. No figure of Kopiczko et al. 2024 has
        been checked, so none stands here.
    """

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "Kopiczko et al. 2024, arXiv 2310.11454, eq. 2"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=4e-3, source="not swept: RoBERTa-base on SST-2, from scripts of others"
    )

    r: int = 256
    """Rank R of the random matrices."""
    d_initial: float = 0.1
    """First value of every entry of d."""
    seed: int = 0
    """Seed of the random matrices; the same seed gives the matrices of Hugging Face PEFT's `projection_prng_key`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.seed >= 0, self, f"seed={self.seed} is not possible", "give seed of at least 0")

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {"d": torch.full((self.r,), self.d_initial), "b": torch.zeros(site.out_features)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        sites = backbone.find_sites("linear", self.targets)  # of every layer: `layers` does not change the matrices
        widths = max(s.in_features for s in sites), max(s.out_features for s in sites)
        A, B = random_matrices(self.seed, self.r, *widths, backbone.dtype, backbone.device)
        return SharedLowRank(
            A=A[: site.in_features],
            B=B[:, : site.out_features],
            d=params["d"],
            b=params["b"],
            origin=("vera", self.seed, self.r, *widths),
            dropout=self.dropout,
        )


@lru_cache(maxsize=16)
def random_matrices(
    seed: int, rank: int, num_in: int, num_out: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The frozen `A [I, R]` and `B [R, O]`, Kaiming-uniform from one CPU generator; shared, never write to them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        drawn = [torch.empty(rank, num_in), torch.empty(num_out, rank)]
        for matrix in drawn:
            nn.init.kaiming_uniform_(matrix, generator=generator)
        A, B = (matrix.T.contiguous().to(device=device, dtype=dtype) for matrix in drawn)
    return A, B
