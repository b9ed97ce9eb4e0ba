"""BitFit (Ben-Zaken et al. 2021): every bias of the backbone is trained, y = x W + (b + δ).

Linear maps without a bias get one, zero at first, as in the code of T-Few (Liu et al. 2022, arXiv 2205.05638) for T5;
it cannot be merged. Norms without an offset stay without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Affine, Bias, Delta
from multitune.methods.base import Layers, Recipe, Roles, SiteMethod, check
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class BitFit(SiteMethod):
    """Bias-only tuning. The trained tensor is δ, zero at first, so that weight decay does not pull towards -b.

    Shapes:
        `δ [O]` per chosen linear, `offset [D]` per chosen norm, added to the output.
    Parameters:
        `L · (8·D + F)` for all linears and norms of a layer, and D for the norm behind the embeddings. RoBERTa-base:
        102,144; query and ffn_in only 46,080.
    Use it when:
        The training set is small, or an adapter must be tiny, free to serve and mergeable.
    Pitfalls:
        - It needs a rate near 1e-3; that of full fine-tuning does nothing.
        - Linear maps without a bias (Llama, T5) get a new one, which works and mixes but cannot be merged; norms
          without an offset get none, and a `subset` of such norms alone is refused.
        - The figures for MRPC and QQP that other papers quote are probably F1, beside accuracies.
    Published:
        Hu et al. 2021, Table 2 (quoted there), RoBERTa-base, 0.1M parameters: MNLI 84.7, SST-2 93.7, CoLA 62.0, QNLI
        91.8, RTE 81.5, STS-B 90.8, average 85.2. Ding et al. 2023, Table 2, RoBERTa-large without a template: 86.6 on
        average.
    """

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    paper: ClassVar[str] = "Ben-Zaken et al. 2021, arXiv 2106.10199, section 3"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3, source="sweep on small tasks (docs/results.md); the released code uses 1e-3"
    )

    subset: Roles | None = None
    """Roles of the linears and norms whose bias is trained; none stands for all that the backbone has."""
    layers: Layers = None
    """Layers to adapt; none stands for all and the norms in front of and behind them."""

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        known = {role for s in backbone.sites if s.kind in ("linear", "norm") for role in s.roles}
        subset = known if self.subset is None else self.subset
        unknown = [role for role in subset if role not in known]
        check(
            not unknown,
            self,
            f"no linear or norm has the role {unknown}",
            f"choose from {', '.join(sorted(known))}",
        )
        if self.layers is not None:
            backbone.find_sites("linear", layers=self.layers)  # refuses a layer that does not exist
        chosen = [
            s
            for s in backbone.sites
            if s.kind in ("linear", "norm")
            and s.has_role(subset)
            and (s.bias or s.kind == "linear")
            and (self.layers is None or s.layer in self.layers)
        ]
        check(bool(chosen), self, "this backbone has no bias there", "choose other roles or layers")
        return chosen

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {"b": torch.zeros(site.out_features)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return Bias(b=params["b"]) if site.kind == "linear" else Affine(offset=params["b"])
