"""PiSSA (Meng et al. 2024, eq. 2-4):  y = x (W - s A₀B₀) + s · (x A) B, A₀B₀ the principal part of W.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta, LowRank
from multitune.methods.base import Layers, Recipe, Roles, SiteMethod, check, check_positive
from multitune.methods.low_rank import frozen_weight
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

#: Columns that the randomised decomposition has beyond the rank, as Halko et al. 2011 (section 1.3) advise.
_OVERSAMPLING = 8


@register
@dataclass(frozen=True, kw_only=True)
class PiSSA(SiteMethod):
    """Trains the principal singular triplets of each frozen weight, `A = A_start + A_change`, `B` likewise.

    The backbone is shared, so its weights stay whole: the delta is `s (A B - A_start B_start)`, of rank 2R, computed
    as `s (A_change B + A_start B_change)`, which is exactly zero at first. The starts `A_start [I, R]` and
    `B_start [R, O]` are stored with the adapter, because another machine's decomposition may differ in sign and order.

    Shapes:
        Per chosen linear `A_change [I, R]`, `B_change [R, O]`, and stored beside them, not trained, `A_start [I, R]`,
        `B_start [R, O]`; `x [.., I]` adds `[.., O]`, by a product of rank 2R.
    Parameters:
        `R · (I + O)` per chosen linear are trained, as many again are stored. RoBERTa-base, query and value: r=8
        294,912.
    Use it when:
        LoRA's start from zero converges too slowly and the adapter may be twice as large; merged, it costs nothing.
    Pitfalls:
        - A and B start at the size of the weights, not at zero: LoRA's learning rates are too large for it.
        - The exact decomposition of every target takes a while on wide backbones; `niter` makes it faster and rougher.
        - Adapters of other libraries may hold A and B for a backbone from which `A₀B₀` was taken away; on the whole
          backbone they are wrong.
        - Weight decay pulls towards the start, which is the backbone, and not A and B towards zero.
        - It decomposes the frozen weight; of a quantised backbone, the dequantised one.
    Published:
        No figure of Meng et al. 2024 could be verified; they claim faster convergence than LoRA's.
    """

    name: ClassVar[str] = "pissa"
    title: ClassVar[str] = "PiSSA"
    paper: ClassVar[str] = "Meng et al. 2024, arXiv 2404.02948, eq. 2-4"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=5e-4,
        source="not swept: below LoRA's, A and B start large; the paper has 2e-5 for 7B models",
    )

    r: int = 8
    """Rank of the trained part; the delta that is served has twice this rank."""
    alpha: float | None = None
    """The product A B is scaled by alpha / r; none stands for r, as in the paper. The start takes it into account."""
    niter: int | None = None
    """Power iterations of a randomised decomposition, which is faster; none stands for the exact one."""
    targets: Roles = ("query", "value")
    """Roles of the linear sites to adapt: query, key, value, attention_output, ffn_in, ffn_out,
    and where the feed-forward is gated ffn_gate."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        check_positive(self, "r")
        check(self.scale > 0, self, f"alpha={self.alpha} gives no start", "give a positive alpha, or none")
        check(self.niter is None or self.niter >= 0, self, f"niter={self.niter} is not possible", "give at least 0")

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("linear", self.targets, self.layers)

    def shapes(self, backbone: Backbone) -> dict[str, torch.Size]:
        """As `init` makes them, without a decomposition."""
        found: dict[str, torch.Size] = {}
        for site in self.sites(backbone):
            self._check_rank(site)
            by_key = {"A": (site.in_features, self.r), "B": (self.r, site.out_features)}
            for part in ("change", "start"):
                found |= {f"{site.name}.{key}_{part}": torch.Size(shape) for key, shape in by_key.items()}
        return found

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        self._check_rank(site)
        weight = frozen_weight(site, backbone)[0].float().cpu()  # [O, I]
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            U, S, Vh = randomised_svd(weight, self.r, self.niter, generator)
        root = (S[: self.r] / self.scale).sqrt()
        A = (Vh[: self.r].T * root).contiguous()
        B = (U[:, : self.r] * root).T.contiguous()
        return {"A_change": torch.zeros_like(A), "B_change": torch.zeros_like(B), "A_start": A, "B_start": B}

    def _check_rank(self, site: Site) -> None:
        largest = min(site.in_features, site.out_features)
        check(self.r <= largest, self, f"r={self.r} exceeds the {largest} singular values of {site.name}", "lower r")

    def trains(self, name: str) -> bool:
        return name.endswith("_change")

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        A = torch.cat([params["A_change"], params["A_start"]], dim=1)
        B = torch.cat([params["B_start"] + params["B_change"], params["B_change"]])
        return LowRank(A=A, B=B, scale=self.scale)


def randomised_svd(weight: Tensor, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by a random range finder with power iterations (Halko et al. 2011, alg. 4.4 and 5.1).

    Args:
        weight: `[O, I]`.
        rank: how many triplets are wanted.
        niter: power iterations; more of them separate triplets whose singular values are close.

    Returns:
        `U [O, K]`, `S [K]`, `Vh [K, I]` with K at least `rank`.
    """
    width = min(rank + _OVERSAMPLING, *weight.shape)
    Q = torch.linalg.qr(weight @ torch.randn(weight.shape[1], width, generator=generator)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
    return Q @ U, S, Vh
