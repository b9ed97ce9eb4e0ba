"""Parallel adapter (He et al. 2022):  h = FFN(x) + s · (f(x W_d + b_d) W_u + b_u).   Legend: D width, M bottleneck."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multitune.deltas import Bottleneck, Delta
from multitune.methods.base import Layers, Recipe, Roles, SiteMethod, check_positive
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(SiteMethod):
    """A bottleneck that reads the sub-layer's input; `W_d` is Kaiming-uniform and `W_u` zero at first.

    Shapes:
        Per chosen sub-layer `W_d [D, M]`, `b_d [M]`, `W_u [M, D]`, `b_u [D]`, and with `learn_scale` `s [1]`; the
        sub-layer's input `[.., D]` adds `[.., D]` to its output.
    Parameters:
        `L · (2·D·M + M + D)`, one more per layer with `learn_scale`. RoBERTa-base: M=384 7,091,712, M=512 9,452,544,
        with `learn_scale` 9,452,556.
    Use it when:
        You can afford a wide bottleneck, and want it to read the feed-forward's input and not wait for its output.
    Pitfalls:
        - `scale` multiplies the learning rate's effect: change one and the other has to be found again.
        - It does not merge; in products it widens the feed-forward by M.
        - The default width is an eighth of the largest in the paper.
    Published:
        Second-hand from AdapterHub, scaled parallel adapter: XSum R-1/R-2/R-L 44.35/20.98/35.98, En-Ro BLEU 37.1.
        AdapterHub's own runs, one seed, RoBERTa-base: SST-2 94.61, MNLI 86.41; XSum R-2 21.53, En-Ro 36.4.
    """

    name: ClassVar[str] = "parallel"
    title: ClassVar[str] = "Parallel adapter"
    paper: ClassVar[str] = "He et al. 2022, arXiv 2110.04366, sections 3.2 and 4.6 (scaled parallel adapter)"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3,
        source="not swept yet: that of Houlsby's adapter, without weight decay; the released scripts train MAM, which "
        "has one, with 1e-4 and on GLUE a weight decay of 0.1",
    )

    bottleneck: int = 64
    """Width M of the bottleneck; the paper goes up to 512."""
    scale: float = 2.0
    """Factor s of the branch: 2 in the released GLUE script, 4 for generation."""
    learn_scale: bool = False
    """Train s, one per adapter, from `scale` on."""
    activation: Activation = "relu"
    """Non-linearity between the two matrices."""
    sublayers: Roles = ("ffn",)
    """Roles of the sub-layers that get one: attention, ffn, or block for whole layers."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        check_positive(self, "bottleneck")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("sublayer", self.sublayers, self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        d, m = site.in_features, self.bottleneck
        down = torch.empty(m, d)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        fresh = {"down": down.T.contiguous(), "down_bias": torch.zeros(m)}
        fresh |= {"up": torch.zeros(m, d), "up_bias": torch.zeros(d)}
        return fresh | ({"scale": torch.full((1,), self.scale)} if self.learn_scale else {})

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        factor = params["scale"] if self.learn_scale else 1.0
        return Bottleneck(
            down=params["down"],
            down_bias=params["down_bias"],
            up=params["up"] * factor,
            up_bias=params["up_bias"] * factor,
            activation=self.activation,
            placement="parallel",
            scale=1.0 if self.learn_scale else self.scale,
        )
