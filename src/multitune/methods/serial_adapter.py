"""What serial adapters share:  A(h) = h + f(h W_d + b_d) W_u + b_u.   Legend: D width, M bottleneck."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from multitune.deltas import Affine, Bottleneck, Delta
from multitune.methods.base import Layers, SiteMethod

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

Activation = Literal["gelu", "relu", "silu", "tanh", "gelu_new"]


class SerialAdapter(SiteMethod):
    """A near-identity bottleneck whose up-projection starts at zero."""

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
        norms = backbone.find_sites("norm", layers=self.layers) if self.layer_norms else ()
        return chosen + tuple(s for s in norms if s.layer is not None)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        d = site.in_features
        if site.kind == "norm":
            return {key: torch.zeros(d) for key in (("gain", "offset") if site.bias else ("gain",))}
        m = self.width(backbone)
        down = torch.empty(d, m)
        # The released code draws both matrices with std 1e-3; an exactly zero second matrix is the identity.
        nn.init.trunc_normal_(down, std=d**-0.5, generator=generator)
        return {"down": down, "down_bias": torch.zeros(m), "up": torch.zeros(m, d), "up_bias": torch.zeros(d)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        if site.kind == "norm":
            return Affine(gain=params["gain"], offset=params.get("offset"))
        return Bottleneck(
            down=params["down"],
            down_bias=params["down_bias"],
            up=params["up"],
            up_bias=params["up_bias"],
            activation=self.activation,
        )
