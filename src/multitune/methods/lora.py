"""LoRA (Hu et al. 2021, eq. 3):  y + (alpha / r) · B A x.   Legend: I in, O out, R rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multitune.deltas import Delta, LowRank
from multitune.methods.base import Layers, Recipe, Roles, SiteMethod, check_positive, check_probability
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(SiteMethod):
    """A low-rank update of chosen linear maps; `A [I, R]` is Kaiming-uniform and `B [R, O]` zero at first."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685, eq. 3; rank stabilised: arXiv 2312.03732"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3, source="sweep on small tasks (docs/results.md); RoBERTa-base scripts use 4e-4 to 5e-4"
    )

    r: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an entry of the input of A, in training."""
    targets: Roles = ("query", "value")
    """Roles of the linear sites to adapt: query, key, value, attention_output, ffn_in, ffn_out,
    and where the feed-forward is gated ffn_gate."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r) instead, so that larger ranks are not damped."""

    def __post_init__(self) -> None:
        check_positive(self, "r")
        check_probability(self, "dropout")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("linear", self.targets, self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        A = torch.empty(self.r, site.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        return {"A": A.T.contiguous(), "B": torch.zeros(self.r, site.out_features)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        scale = self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)
        return LowRank(A=params["A"], B=params["B"], scale=scale, dropout=self.dropout)
