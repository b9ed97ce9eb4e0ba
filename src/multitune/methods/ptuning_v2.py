"""P-tuning v2 (Liu et al. 2022): trained keys and values in front of every layer's own.   Legend: M length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta, Memory
from multitune.methods.base import Layers, Recipe, SiteMethod, check_positive
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class PTuningV2(SiteMethod):
    """Deep prompts: `keys, values [M, H·K]` per layer. They take attention mass, so a fresh one is no identity.

    Shapes:
        Per layer `keys [M, H·K]` and `values [M, H·K]`; each head's queries see M more entries, rows keep their length.
    Parameters:
        `2 · L · M · H·K`. RoBERTa-base: M=8 147,456, M=20 368,640, M=128 2,359,296.
    Use it when:
        You want prompts on a backbone of ordinary size: they act in every layer and cost no positions.
    Pitfalls:
        - The length matters by task: below 20 for simple classification, about 100 for sequence labelling.
        - The authors call search a part of the method; RTE with short prompts and few epochs stays near chance.
        - Positions do not shift here. A prefix trained elsewhere with shifted positions is another function.
    Published:
        The authors' repository, RoBERTa-large, dev: BoolQ 84.0, COPA 92.0, RTE 86.6, WiC 73.7, WSC 64.4, CoNLL04 88.4,
        OntoNotes 90.1, CoNLL12 84.7, SQuAD 1.1 88.1 / 94.2 (EM / F1).
    """

    name: ClassVar[str] = "ptuning_v2"
    title: ClassVar[str] = "P-tuning v2"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2110.07602, section 3.2"
    identity_at_init: ClassVar[bool] = False
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2, source="sweep on small tasks (docs/results.md); released scripts use 5e-3 to 1e-2"
    )

    length: int = 16
    """Number of key/value pairs M per layer."""
    layers: Layers = None
    """Layers that get them; none stands for all."""
    std: float = 0.02
    """Standard deviation of the start; small values keep a fresh prefix near an empty one."""

    def __post_init__(self) -> None:
        check_positive(self, "length")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("attention", layers=self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "keys": torch.randn(self.length, site.in_features, generator=generator) * self.std,
            "values": torch.randn(self.length, site.out_features, generator=generator) * self.std,
        }

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        heads = backbone.num_key_value_heads
        keys, values = (params[k].view(self.length, heads, -1) for k in ("keys", "values"))
        return Memory(keys=keys, values=values, open=torch.ones(self.length, device=keys.device))
