"""What the LoRA family shares:  y + s · (x A) B at chosen linear maps.   Legend: I in, O out, R rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from multitune.deltas import Delta, EmbeddingLowRank, LowRank
from multitune.methods.base import Layers, Roles, SiteMethod, check, check_positive, check_probability

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@dataclass(frozen=True, kw_only=True)
class RankMethod(SiteMethod):
    """What is adapted, and at which rank."""

    r: int
    """Rank of the update."""
    dropout: float = 0.0
    """Probability of dropping an entry of the input of A, in training."""
    targets: Roles = ("query", "value")
    """Roles of the linear sites to adapt: query, key, value, attention_output, ffn_in, ffn_out,
    and where the feed-forward is gated ffn_gate."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        check_positive(self, "r")
        check_probability(self, "dropout")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("linear", self.targets, self.layers)


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(RankMethod):
    """A trained `A [I, R]`, Kaiming-uniform at first, and `B [R, O]`, zero at first."""

    r: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return self.alpha / self.r

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        A = torch.empty(self.r, site.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        return {"A": A.T.contiguous(), "B": torch.zeros(self.r, site.out_features)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return LowRank(A=params["A"], B=params["B"], scale=self.scale, dropout=self.dropout)


def frozen_weight(site: Site, backbone: Backbone) -> tuple[Tensor, Tensor | None]:
    """The frozen weight `[O, I]` and bias `[O]` of a linear site: to read, never to write."""
    module = backbone.frozen(site.name)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor | None)
    return weight.detach(), None if bias is None else bias.detach()


@dataclass(frozen=True, kw_only=True)
class LowRankWithEmbedding(LowRankMethod):
    """The same, and the word embeddings where asked for: `E[token] + s · A[token] B`, `A [V, R]`, `B [R, E]`."""

    dropout: float = 0.0
    """Probability of dropping an entry of the input of A, in training; at linear sites only, since the word embeddings
    look A up by token."""
    targets: Roles = ("query", "value")
    """Roles to adapt: query, key, value, attention_output, ffn_in, ffn_out, where the feed-forward is gated ffn_gate,
    and embedding for the word embeddings."""
    layers: Layers = None
    """Layers whose linear sites are adapted; none stands for all. The embedding belongs to no layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        linear = any(role != "embedding" for role in self.targets)
        for name, unset in (("dropout", 0.0), ("layers", None)):
            value = getattr(self, name)
            problem = f"{name}={value!r} is for linear sites, and targets={self.targets!r} has none"
            fix = f"leave {name} out, or give targets such as ('embedding', 'query')"
            check(linear or not self.targets or value == unset, self, problem, fix)

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        linear = tuple(role for role in self.targets if role != "embedding")
        embedding = backbone.find_sites("embedding") if "embedding" in self.targets else ()
        return embedding + (backbone.find_sites("linear", linear, self.layers) if linear or not embedding else ())

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        if site.kind != "embedding":
            return super().init_site(site, backbone, generator)
        # The other way round than at a linear map, as in the released code: most rows of A never get a gradient, and
        # a token that was not seen in training then stays exactly as it was.
        B = torch.randn(self.r, site.out_features, generator=generator)
        return {"A": torch.zeros(backbone.vocab_size, self.r), "B": B}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        if site.kind != "embedding":
            return super().delta(params, site, backbone)
        return EmbeddingLowRank(A=params["A"], B=params["B"], scale=self.scale)
