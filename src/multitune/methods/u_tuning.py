"""U-Tuning (Jiang et al. 2023):  x' = OP(x) + U-Tuner(x) for any frozen operation OP.   Legend: D width, M bottleneck.

OP is attention, the feed-forward or a whole layer ("block"); the tuner is one of

- `bottleneck`: `f(x W_d + b_d) W_u + b_u`;
- `low_rank`: `x A B`;
- `prefix`: `Σ_h softmax(q_h P_k,hᵀ / √K) P_v,h W_o,h` with `q = x W_q + b_q`: what the layer's own attention, its
  frozen query and output projections, gives over M trained keys and values alone, head by head (H heads of width K).
  Folded, that is a bottleneck of width H·M whose function is a softmax over the M columns of each head:
  `W_d = W_q,h P_k,hᵀ / √K`, `b_d = b_q,h P_k,hᵀ / √K`, `W_u = P_v,h W_o,h`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from multitune.deltas import SOFTMAX, Bottleneck, Delta
from multitune.methods.base import Layers, Recipe, Roles, SiteMethod, check, check_positive
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.frozen import FrozenLinear
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class UTuning(SiteMethod):
    """A small trained module in parallel with each chosen operation; its last matrix is zero at first.

    Shapes:
        Per chosen operation, `bottleneck`: `W_d [D, M]`, `b_d [M]`, `W_u [M, D]`, `b_u [D]`; `low_rank`: `W_d` and
        `W_u` alone (A and B above); `prefix`: `keys [M, H·K]`, `values [M, H·K]`. The operation's input `[.., D]` adds
        `[.., D]` to its output.
    Parameters:
        Per operation `2·D·M + M + D`, `2·D·M` or `2·M·H·K`. RoBERTa-base, M=16: bottleneck at all three 912,960,
        low-rank at all three 884,736, prefix at attention 294,912.
    Use it when:
        You want to compare where to tune and with what form of tuner, all else being equal.
    Pitfalls:
        - All three operations at once are not independent: a block contains the other two.
        - No form merges, the linear one neither, since its operation is not a linear map.
        - The `prefix` tuner has a softmax of its own; prefix-tuning shares one with the text, so the two differ.
    Published:
        Jiang et al. 2023, abstract: on par with or better than earlier methods on CIFAR-100 and fine-grained image
        classification; second-hand, above full fine-tuning on the average of the latter. No figure could be verified.
    """

    name: ClassVar[str] = "u_tuning"
    title: ClassVar[str] = "U-Tuning"
    paper: ClassVar[str] = "Jiang et al. 2023, arXiv 2303.00690"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3, source="not swept yet: that of Houlsby's adapter, the nearest method that was"
    )

    operations: Roles = ("attention", "ffn", "block")
    """Frozen operations that get a tuner: attention, ffn, block (the whole layer)."""
    tuner: Literal["bottleneck", "low_rank", "prefix"] = "bottleneck"
    """Form of the tuner."""
    width: int = 16
    """M: width of the bottleneck, rank, or number of keys and values."""
    activation: Activation = "gelu"
    """Non-linearity of the bottleneck; the other tuners do not use it."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        check_positive(self, "width")
        used = self.tuner == "bottleneck" or self.activation == "gelu"
        problem = f"tuner={self.tuner} has no use for activation={self.activation}"
        check(used, self, problem, "leave activation out, or give tuner=bottleneck")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("sublayer", self.operations, self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        d, m = site.in_features, self.width
        if self.tuner == "prefix":
            _, output = _projections(site, backbone)
            shape = (m, output.in_features)
            # Keys of the size of queries, so that the entries differ from the first step.
            return {"keys": torch.randn(shape, generator=generator), "values": torch.zeros(shape)}
        down = torch.empty(m, d)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        fresh = {"down": down.T.contiguous(), "up": torch.zeros(m, d)}
        return fresh if self.tuner == "low_rank" else fresh | {"down_bias": torch.zeros(m), "up_bias": torch.zeros(d)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        if self.tuner == "prefix":
            return _prefix_branch(params["keys"], params["values"], site, backbone)
        down, up = params["down"], params["up"]
        low_rank = self.tuner == "low_rank"
        return Bottleneck(
            down=down,
            down_bias=down.new_zeros(down.shape[1]) if low_rank else params["down_bias"],
            up=up,
            up_bias=up.new_zeros(up.shape[1]) if low_rank else params["up_bias"],
            activation="identity" if low_rank else self.activation,
            placement="parallel",
        )


def _projections(site: Site, backbone: Backbone) -> tuple[FrozenLinear, FrozenLinear]:
    """The frozen query and output projections of a site's attention."""
    names = (f"{site.prefix}{role}" for role in ("query", "attention_output"))
    query, output = (cast("FrozenLinear", backbone.frozen(name)) for name in names)
    return query, output


def _prefix_branch(keys: Tensor, values: Tensor, site: Site, backbone: Backbone) -> Bottleneck:
    """The `prefix` tuner from `keys` and `values [M, H·K]`, folded with the frozen projections."""
    query, output = _projections(site, backbone)
    heads = backbone.heads_at(site)[0]
    size = output.in_features // heads
    keys = keys.unflatten(-1, (heads, size)) / math.sqrt(size)
    values = values.unflatten(-1, (heads, size))
    down = torch.einsum("hkd,mhk->dhm", query.weight.to(keys.dtype).unflatten(0, (heads, size)), keys)
    if query.bias is None:
        bias = keys.new_zeros(heads, keys.shape[0])
    else:
        bias = torch.einsum("hk,mhk->hm", query.bias.to(keys.dtype).unflatten(0, (heads, size)), keys)
    up = torch.einsum("mhk,dhk->hmd", values, output.weight.to(values.dtype).unflatten(1, (heads, size)))
    return Bottleneck(
        down=down.flatten(1),
        down_bias=bias.flatten(),
        up=up.flatten(0, 1),
        up_bias=up.new_zeros(up.shape[-1]),
        activation=SOFTMAX,
        placement="parallel",
        groups=heads,
    )
