"""Compacter++ (Karimi Mahabadi et al. 2021): Compacter's adapters behind the feed-forward only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Layers, Recipe
from multitune.methods.phm_adapter import PHMAdapter
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation


@register
@dataclass(frozen=True, kw_only=True)
class CompacterPP(PHMAdapter):
    """One adapter per layer, half of Compacter's parameters and depth; see Compacter for the form."""

    name: ClassVar[str] = "compacter_pp"
    title: ClassVar[str] = "Compacter++"
    paper: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv 2106.04647, section 4"
    sublayers: ClassVar[tuple[str, ...]] = ("ffn",)
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="the released code (T5-base, GLUE); not swept yet")

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
