"""LayerNorm tuning: γ and β of every layer norm are trained, with the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Affine, Delta
from multitune.methods.base import Layers, Recipe, SiteMethod
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(SiteMethod):
    """Trains the change of gain and offset of the norms inside the layers; zero at first."""

    name: ClassVar[str] = "layernorm"
    title: ClassVar[str] = "LayerNorm tuning"
    paper: ClassVar[str] = "Basu et al. 2023, arXiv 2304.01492 (LN-Tune); Zhao et al. 2023, arXiv 2312.11420"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="sweep on small tasks (docs/results.md)")

    layers: Layers = None
    """Layers whose norms are trained; none stands for all."""
    embedding_norm: bool = False
    """Also train the norm behind the embeddings."""

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        chosen = backbone.find_sites("norm", ("attention_norm", "ffn_norm"), self.layers)
        return chosen + (backbone.find_sites("norm", ("embedding_norm",)) if self.embedding_norm else ())

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.zeros(site.in_features), "offset": torch.zeros(site.in_features)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return Affine(gain=params["gain"], offset=params["offset"])
