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
    """Trains the change of gain and offset of the norms; zero at first. A norm without offset gets none.

    Shapes:
        Per norm `gain [D]`, `offset [D]`.
    Parameters:
        `4 · L · D` for two norms a layer, and `2 · D` for the one behind the embeddings. RoBERTa-base: 36,864 (38,400).
    Use it when:
        An adapter must be tiny and free to serve, or as the baseline next to BitFit.
    Pitfalls:
        - It is sensitive to the rate: PEFT's own benchmark reports 0.0 on GSM8K for one setting of it.
        - It stretches features but does not mix them; tasks that need new directions stay behind.
    Published:
        None whose source has been checked.
    """

    name: ClassVar[str] = "layernorm"
    title: ClassVar[str] = "LayerNorm tuning"
    paper: ClassVar[str] = "Basu et al. 2023, arXiv 2304.01917 (LN-Tune); Zhao et al. 2023, arXiv 2312.11420"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="sweep on small tasks (docs/results.md)")

    layers: Layers = None
    """Layers whose norms are trained; none stands for all and the norm behind the last, where there is one."""
    embedding_norm: bool = False
    """Also train the norm behind the embeddings."""

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        chosen = tuple(s for s in backbone.find_sites("norm", layers=self.layers) if s.role != "embedding_norm")
        return chosen + (backbone.find_sites("norm", ("embedding_norm",)) if self.embedding_norm else ())

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {key: torch.zeros(site.in_features) for key in (("gain", "offset") if site.bias else ("gain",))}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return Affine(gain=params["gain"], offset=params.get("offset"))
