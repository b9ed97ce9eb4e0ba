"""Domain residual adapter (Xu et al. 2022):  x + Attn(LN x) + δ_a,  x + FFN(LN x) + δ_f.   Legend: D width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Bias, Delta
from multitune.methods.base import Layers, Recipe, Roles, SiteMethod
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class DRA(SiteMethod):
    """An offset `δ [D]` on the output of each sub-layer, zero at first: BitFit on the two biases that end them.

    Shapes:
        Per chosen linear `δ [O]`, stored as `b`, added to its output `[.., O]`; O is the backbone's width.
    Parameters:
        `2 · L · D`. RoBERTa-base: 18,432.
    Use it when:
        There are few examples, an adapter must be tiny and free to serve; it pairs with AttnScale, as `attn_scale+dra`.
    Pitfalls:
        - It shifts every token by one vector: what depends on the text has to come from elsewhere.
        - Where the output maps have no bias there is nothing to merge it into.
        - On backbones with biases it is a part of BitFit; do not count the two as separate evidence.
    Published:
        Basu et al. 2023, abstract: for self-supervised vision backbones AttnScale with DRA is the best on Meta-Dataset,
        with about a ninth of eTT's parameters. No figure of the tables could be verified, and none is for text.
    """

    name: ClassVar[str] = "dra"
    title: ClassVar[str] = "Domain residual adapter"
    paper: ClassVar[str] = "Xu et al. 2022 (eTT, TMLR); with AttnScale: Basu et al. 2023, arXiv 2304.01917"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3, source="not swept yet: that of BitFit, which trains these vectors and more"
    )

    targets: Roles = ("attention_output", "ffn_out")
    """Roles of the linear maps that end a sub-layer: attention_output, ffn_out."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("linear", self.targets, self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {"b": torch.zeros(site.out_features)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return Bias(b=params["b"])
