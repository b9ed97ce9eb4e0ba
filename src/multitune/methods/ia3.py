"""(IA)³ (Liu et al. 2022, section 3.3): keys, values and feed-forward activations rescaled by learned vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta, InputScale, Scale
from multitune.methods.base import Layers, Recipe, Roles, SiteMethod, check
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class IA3(SiteMethod):
    """`l_k ⊙ K`, `l_v ⊙ V` and `(l_ff ⊙ γ(W₁ x)) W₂`; stored as the difference from one, zero at first.

    Shapes:
        Per layer `l_k [H·K]`, `l_v [H·K]`, `l_ff [F]`.
    Parameters:
        `L · (2·H·K + F)`. RoBERTa-base: 55,296.
    Use it when:
        There are few examples, or very many tasks: it is among the smallest methods that act in every layer, and
        it merges.
    Pitfalls:
        - It needs large rates; at 1e-4 it hardly moves.
        - With a bias on key or value, the bias is rescaled too; a merge that forgets it is another function.
        - T-Few's numbers include two more losses and a start pretrained on many tasks.
    Published:
        Liu et al. 2022, Table 1: T-Few (T0-11B with (IA)³) 72.4 on the tasks held out from T0; GPT-3 175B in context
        66.6. Table 2, RAFT: 75.8, the human baseline 73.5.
    """

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "(IA)³"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2205.05638, section 3.3"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2, source="sweep on small tasks (docs/results.md); T-Few uses 3e-3"
    )

    outputs: Roles = ("key", "value")
    """Roles of the linear sites whose output is rescaled."""
    inputs: Roles = ("ffn_out",)
    """Roles of the linear sites whose input is rescaled."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        both = sorted(set(self.outputs) & set(self.inputs))
        check(not both, self, f"{both} are in outputs and in inputs", "name each role in one of them")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("linear", self.outputs + self.inputs, self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {"s": torch.zeros(site.in_features if site.has_role(self.inputs) else site.out_features)}

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return InputScale(s=params["s"]) if site.has_role(self.inputs) else Scale(s=params["s"])
