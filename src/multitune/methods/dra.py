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
    """An offset `δ [D]` on the output of each sub-layer, zero at first: BitFit on the two biases that end them."""

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
