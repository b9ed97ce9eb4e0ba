"""What serial adapters share:  A(h) = h + f(z W_d + b_d) W_u + b_u.   Legend: D width, M bottleneck.

z is h, the sub-layer's output; or, with `reads="norm"`, `LN(x + h) = n(x + h) ⊙ γ + β`, what the frozen norm behind the
residual sum makes of it, x being the sub-layer's input. γ and β are frozen and linear, so they are folded:
`z W_d + b_d = n(x + h) (γ ⊙ W_d) + (b_d + β W_d)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from multitune.deltas import Affine, Bottleneck, Delta
from multitune.methods.base import Layers, SiteMethod, check

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.frozen import FrozenNorm
    from multitune.sites import Site

Reads = Literal["output", "norm"]
Activation = Literal["gelu", "relu", "silu", "tanh", "gelu_new"]


class SerialAdapter(SiteMethod):
    """A near-identity bottleneck whose up-projection starts at zero."""

    sublayers: ClassVar[tuple[str, ...]]
    """Roles of the sub-layers that get one."""
    layers: Layers
    layer_norms: bool
    activation: Activation
    reads: Reads

    def check_reads(self) -> None:
        """Raise `ConfigError` where the adapters would read norms that are trained beside them."""
        problem = "reads=norm reads the layer norms as they are frozen, and layer_norms=true trains them"
        check(not (self.layer_norms and self.reads == "norm"), self, problem, "give one of the two")

    def width(self, backbone: Backbone) -> int:
        """The bottleneck M."""
        raise NotImplementedError

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        name = backbone.model.config.model_type
        problem = f"reads=norm needs models that norm behind a sub-layer, and {name} norms in front of it"
        check(self.reads == "output" or backbone.architecture.post_norm, self, problem, "give reads=output")
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
        plain = Bottleneck(
            down=params["down"],
            down_bias=params["down_bias"],
            up=params["up"],
            up_bias=params["up_bias"],
            activation=self.activation,
        )
        return plain if self.reads == "output" else _behind_norm(plain, site, backbone)


def _behind_norm(plain: Bottleneck, site: Site, backbone: Backbone) -> Bottleneck:
    """The adapter of a sub-layer that reads what the norm behind its residual sum makes of its output."""
    norm = cast("FrozenNorm", backbone.frozen(f"{site.prefix}{site.role}_norm"))
    down, offset = plain.down, plain.down_bias
    if norm.bias is not None:
        offset = offset + norm.bias.to(down.dtype) @ down
    return replace(
        plain, down=norm.weight.to(down.dtype)[:, None] * down, down_bias=offset, placement="sum", eps=norm.eps
    )
