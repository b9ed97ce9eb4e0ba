"""Adapters of hypercomplex layers (Karimi Mahabadi et al. 2021):  W = Σ_i A_i ⊗ (s_i t_iᵀ), i = 1..N.

`A_i [N, N]` are shared by both matrices of all adapters; `s_i [D/N, R]` and `t_i [R, M/N]` belong to one matrix.
Legend: D width, M bottleneck, N terms, R rank of the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multitune.deltas import Delta
from multitune.methods.base import Layers, check, check_positive
from multitune.methods.serial_adapter import Activation, Reads, SerialAdapter
from multitune.methods.size import Size

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

SHARED = "A"
"""Name of the shared tensor `[N, N, N]`."""


@dataclass(frozen=True, kw_only=True)
class PHMAdapter(SerialAdapter):
    """A serial adapter both of whose matrices are sums of Kronecker products; made dense before they are used."""

    size: ClassVar[Size | None] = Size(  # phm_dim must divide it
        fields=("bottleneck",), settings=lambda n, _, fixed: {"bottleneck": n * int(fixed.get("phm_dim", 4))}
    )

    bottleneck: int = 24
    """Width M of the bottleneck; a multiple of phm_dim. The paper divides the width by 32."""
    phm_dim: int = 4
    """Number N of Kronecker products; divides the bottleneck and the backbone's width."""
    rank: int = 1
    """Rank R of their second factors."""
    activation: Activation = "gelu_new"
    """Non-linearity between the two matrices."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""
    layer_norms: bool = False
    """Also train the layer norms, as the released code does."""
    reads: Reads = "output"
    """What it reads: the sub-layer's output, or what the frozen norm behind the residual sum makes of it (AdapterHub's
    library)."""

    def __post_init__(self) -> None:
        check_positive(self, "bottleneck", "phm_dim", "rank")
        self.check_reads()
        n, m = self.phm_dim, self.bottleneck
        nearest = max(n, round(m / n) * n)
        check(m % n == 0, self, f"bottleneck={m} is not a multiple of phm_dim={n}", f"give for example {nearest}")

    def width(self, backbone: Backbone) -> int:
        return self.bottleneck

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        d, n = backbone.hidden_size, self.phm_dim
        fits = [k for k in range(1, d + 1) if d % k == 0 and self.bottleneck % k == 0]
        check(d % n == 0, self, f"phm_dim={n} does not divide the width {d}", f"give one of {fits}")
        return {SHARED: torch.randn(n, n, n, generator=generator) * 0.01} | super().init(backbone, generator)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        if site.kind == "norm":
            return super().init_site(site, backbone, generator)
        n, r, d, m = self.phm_dim, self.rank, site.in_features, self.bottleneck

        def glorot(rows: int, columns: int) -> Tensor:
            factor = torch.empty(n, rows, columns)
            for term in factor:
                nn.init.xavier_uniform_(term, generator=generator)
            return factor

        return {
            "down_left": glorot(d // n, r),
            "down_right": glorot(r, m // n),
            "down_bias": torch.zeros(m),
            "up_left": glorot(m // n, r),
            # The released code draws this one too; an exactly zero last factor makes a fresh adapter the identity.
            "up_right": torch.zeros(n, r, d // n),
            "up_bias": torch.zeros(d),
        }

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        if site.kind == "norm":
            return super().delta(params, site, backbone)
        dense = {k: phm(params[SHARED], params[f"{k}_left"], params[f"{k}_right"]) for k in ("down", "up")}
        return super().delta({**params, **dense}, site, backbone)

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        shared = params[SHARED]
        sites = {name.rsplit(".", 1)[0] for name in params if name != SHARED}
        own = {name: t for name, t in params.items() if name != SHARED}
        return super().deltas(own | {f"{site}.{SHARED}": shared for site in sites}, backbone)


def phm(shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`Σ_i A_i ⊗ (s_i t_i)` as a matrix `[N·a, N·b]` (arXiv 2106.04647, eq. 4 and 5).

    Args:
        shared: `A [N, N, N]`, the first dimension counts the terms.
        left: `s [N, a, R]`.
        right: `t [N, R, b]`.
    """
    return torch.einsum("ipq,iar,irb->paqb", shared, left, right).flatten(2, 3).flatten(0, 1)
