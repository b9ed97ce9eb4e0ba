"""AttnScale (Basu et al. 2023):  A' = S ⊙ softmax(Q Kᵀ / √K), one factor per head.   Legend: H heads, K head width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta, InputScale
from multitune.methods.base import Layers, Recipe, SiteMethod
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class AttnScale(SiteMethod):
    """A factor per attention head, stored as its difference from one, `s [H]`, zero at first.

    A factor on a head's whole attention matrix is that factor on the head's output, `(S_h A_h) V_h = S_h (A_h V_h)`,
    so it scales the head's K inputs of the output projection, and merges into it. The form with a factor per entry
    of the matrix, `S [T, T]`, is not offered: it fixes the length of the text to the T it was trained on, which
    suits images of one size and not rows of different lengths, and it cannot be merged.

    Shapes:
        Per layer `s [H]`; head h of the attention output's input `[.., H·K]` is multiplied by `1 + s_h`.
    Parameters:
        `L · H`. RoBERTa-base: 144.
    Use it when:
        You want the smallest adapter that acts in every layer, or to see which heads a task needs; the authors pair it
        with DRA, here `attn_scale+dra`.
    Pitfalls:
        - A head's weights no longer sum to one; that is intended.
        - It can only strengthen or weaken what heads already do: alone it has little room.
        - Whether the authors share a factor per head or per entry of the matrix could not be read; see above.
    Published:
        Basu et al. 2023, abstract: for self-supervised vision backbones AttnScale with DRA is the best on Meta-Dataset,
        with about a ninth of eTT's parameters. No figure of the tables could be verified, and none is for text.
    """

    name: ClassVar[str] = "attn_scale"
    title: ClassVar[str] = "AttnScale"
    paper: ClassVar[str] = "Basu et al. 2023, arXiv 2304.01917"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2, source="not swept yet: that of (IA)³, which also trains factors next to one"
    )

    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("linear", ("attention_output",), self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {"s": torch.zeros(backbone.heads_at(site)[0])}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return InputScale(s=params["s"].repeat_interleave(site.in_features // backbone.heads_at(site)[0]))
