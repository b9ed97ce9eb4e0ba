"""Bottleneck adapters:  A(h) = h + f(h W_d + b_d) W_u + b_u.   Legend: D width, M bottleneck.

Houlsby puts one behind each sub-layer, Pfeiffer one behind the feed-forward only; the two share everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from multitune.deltas import Affine, Bottleneck, Delta
from multitune.methods.base import Layers, Recipe, SiteMethod, check_positive
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

Activation = Literal["gelu", "relu", "silu", "tanh"]


class SerialAdapter(SiteMethod):
    """What both adapters share: a near-identity bottleneck whose up-projection starts at zero."""

    sublayers: ClassVar[tuple[str, ...]]
    """Roles of the sub-layers that get one."""
    layers: Layers
    layer_norms: bool
    activation: Activation

    def width(self, backbone: Backbone) -> int:
        """The bottleneck M."""
        raise NotImplementedError

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        chosen = backbone.find_sites("sublayer", self.sublayers, self.layers)
        norms = ("attention_norm", "ffn_norm")
        return chosen + (backbone.find_sites("norm", norms, self.layers) if self.layer_norms else ())

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        d = site.in_features
        if site.kind == "norm":
            return {"gain": torch.zeros(d), "offset": torch.zeros(d)}
        m = self.width(backbone)
        down = torch.empty(d, m)
        # The released code draws both matrices with std 1e-3; an exactly zero second matrix is the identity.
        nn.init.trunc_normal_(down, std=d**-0.5, generator=generator)
        return {"down": down, "down_bias": torch.zeros(m), "up": torch.zeros(m, d), "up_bias": torch.zeros(d)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        if site.kind == "norm":
            return Affine(gain=params["gain"], offset=params["offset"])
        return Bottleneck(
            down=params["down"],
            down_bias=params["down_bias"],
            up=params["up"],
            up_bias=params["up_bias"],
            activation=self.activation,
        )


@register
@dataclass(frozen=True, kw_only=True)
class Houlsby(SerialAdapter):
    """One adapter behind attention and one behind the feed-forward, each before the residual sum."""

    name: ClassVar[str] = "houlsby"
    title: ClassVar[str] = "Houlsby adapter"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751, section 2.1"
    sublayers: ClassVar[tuple[str, ...]] = ("attention", "ffn")
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3, source="sweep on demo tasks, benchmarks/sweep.py; the released example uses 3e-4"
    )

    bottleneck: int = 64
    """Width M of the bottleneck."""
    activation: Activation = "gelu"
    """Non-linearity between the two matrices."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""
    layer_norms: bool = False
    """Also train the layer norms, as the released code does."""

    def __post_init__(self) -> None:
        check_positive(self, "bottleneck")

    def width(self, backbone: Backbone) -> int:
        return self.bottleneck


@register
@dataclass(frozen=True, kw_only=True)
class Pfeiffer(SerialAdapter):
    """One adapter behind the feed-forward, half the added depth of Houlsby's."""

    name: ClassVar[str] = "pfeiffer"
    title: ClassVar[str] = "Pfeiffer adapter"
    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv 2005.00247, section 3"
    sublayers: ClassVar[tuple[str, ...]] = ("ffn",)
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, source="sweep on demo tasks, benchmarks/sweep.py")

    reduction_factor: int = 16
    """The bottleneck is the width divided by this."""
    activation: Activation = "relu"
    """Non-linearity between the two matrices."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""
    layer_norms: bool = False
    """Also train the layer norms."""

    def __post_init__(self) -> None:
        check_positive(self, "reduction_factor")

    def width(self, backbone: Backbone) -> int:
        return max(1, backbone.hidden_size // self.reduction_factor)
