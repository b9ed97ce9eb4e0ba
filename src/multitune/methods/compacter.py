"""Compacter (Karimi Mahabadi et al. 2021): Houlsby's two adapters per layer, of low-rank hypercomplex matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Recipe
from multitune.methods.phm_adapter import PHMAdapter
from multitune.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Compacter(PHMAdapter):
    """`W = Σ_i A_i ⊗ (s_i t_iᵀ)` for both matrices of each adapter; the `A_i` are shared by the whole model.

    Shapes:
        Once per model `A [N, N, N]`; twice per layer `down_left [N, D/N, R]`, `down_right [N, R, M/N]`, `down_bias
        [M]`, `up_left [N, M/N, R]`, `up_right [N, R, D/N]`, `up_bias [D]`, made dense to `W_d [D, M]` and `W_u [M, D]`
        before use.
    Parameters:
        `2 · L · (2·R·(D + M) + D + M) + N³`, and `4 · L · D` with `layer_norms`. RoBERTa-base: 57,088.
    Use it when:
        You want Houlsby's adapters at a sixteenth of the parameters that dense matrices of the same width have, and
        their cost in serving is affordable.
    Pitfalls:
        - Fewer parameters, same arithmetic: served, it is an adapter of width M, in series and not mergeable.
        - Each entry is a product of three small factors, so it learns slowly: the released code uses ten times its rate
          for dense adapters.
        - N must divide both the bottleneck and the backbone's width.
        - The released code trains the layer norms too; `layer_norms` does so here.
    Published:
        Karimi Mahabadi et al. 2021, abstract: with 0.047 % of the parameters trained, on par with full fine-tuning on
        GLUE, better on SuperGLUE and on small training sets. Liu et al. 2022 (T-Few) could not reproduce the latter
        with few examples on T0-3B.
    """

    name: ClassVar[str] = "compacter"
    title: ClassVar[str] = "Compacter"
    paper: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv 2106.04647, section 4"
    sublayers: ClassVar[tuple[str, ...]] = ("attention", "ffn")
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="the released code (T5-base, GLUE); not swept yet")
