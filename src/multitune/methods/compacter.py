"""Compacter (Karimi Mahabadi et al. 2021): Houlsby's two adapters per layer, of low-rank hypercomplex matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Layers, Recipe
from multitune.methods.phm_adapter import PHMAdapter
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation


@register
@dataclass(frozen=True, kw_only=True)
class Compacter(PHMAdapter):
    """`W = Σ_i A_i ⊗ (s_i t_iᵀ)` for both matrices of each adapter; the `A_i` are shared by the whole model."""

    name: ClassVar[str] = "compacter"
    title: ClassVar[str] = "Compacter"
    paper: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv 2106.04647, section 4"
    sublayers: ClassVar[tuple[str, ...]] = ("attention", "ffn")
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
