"""What SIFT and SoTU share: a few entries of chosen weights are trained, W + Δ with Δ zero elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune.deltas import Delta, SparseWeight
from multitune.methods.base import Layers, Roles, SiteMethod, check

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@dataclass(frozen=True, kw_only=True)
class SparseUpdate(SiteMethod):
    """Per site `values [N]`, trained and zero at first, and `indices [N]` (int32, ascending), which stay."""

    density: float = 0.008
    """Share of each layer's target weights that is trained."""
    targets: Roles = ("query", "key", "value", "attention_output")
    """Roles of the linear sites to adapt: query, key, value, attention_output, ffn_in, ffn_out,
    and where the feed-forward is gated ffn_gate."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        check(0 < self.density <= 1, self, f"density={self.density} is not a share", "give 0 < density <= 1")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("linear", self.targets, self.layers)

    def trains(self, name: str) -> bool:
        return not name.endswith(".indices")

    def counts(self, backbone: Backbone) -> dict[str, int]:
        """Entries to train per site.

        A layer gets `floor(density * entries of its target weights)`, spread evenly, and every site at least one.
        """
        seen: dict[int | None, int] = defaultdict(int)
        counts = {}
        for site in self.sites(backbone):
            before = seen[site.layer]
            seen[site.layer] += site.in_features * site.out_features
            counts[site.name] = max(1, int(self.density * seen[site.layer]) - int(self.density * before))
        return counts

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        counts, tensors = self.counts(backbone), {}
        for site in self.sites(backbone):
            count = counts[site.name]
            tensors[f"{site.name}.values"] = torch.zeros(count)
            tensors[f"{site.name}.indices"] = random_places(count, site.in_features * site.out_features, generator)
        return tensors

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return sparse_weight(params, site)


def sparse_weight(params: Mapping[str, Tensor], site: Site, scale: float = 1.0) -> SparseWeight:
    """The delta of `values` and `indices` at a site."""
    shape = (site.out_features, site.in_features)
    return SparseWeight(values=params["values"], indices=params["indices"], shape=shape, scale=scale)


def random_places(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` different places below `size`, ascending, int32; every set of places is equally likely."""
    if 2 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values.int()
    places = torch.randint(size, (count,), generator=generator).unique()
    while len(places) < count:  # draw again what fell on a place already taken
        more = torch.randint(size, (count - len(places),), generator=generator)
        places = torch.cat([places, more]).unique()
    return places.int()


def largest_places(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest entries of `scores [O, I]`, ascending, int32."""
    return scores.flatten().topk(count, sorted=False).indices.sort().values.int()
