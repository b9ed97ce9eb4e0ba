"""DoRA (Liu et al. 2024, eq. 5):  W' = m ⊙ (W + s·AB) / ‖W + s·AB‖, one norm per output feature.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Bias, Delta, Scale
from multitune.methods.base import Recipe
from multitune.methods.low_rank import LowRankMethod, frozen_weight
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankMethod):
    """LoRA for the direction of each output feature's weights, and a magnitude `‖W‖ + m`, `m [O]` zero at first.

    Served as `LowRank`, `Scale` and `Bias`: `g ⊙ (x W + b + s·x A B) + (1 - g) b`, where `g = (‖W‖ + m) / ‖W + s·AB‖`
    is constant once training is over; the frozen bias b is not scaled.

    Shapes:
        Per chosen linear `A [I, R]`, `B [R, O]` and `m [O]`, the change of the magnitude; the gain `g [O]` is computed
        from them and the frozen weight. `x [.., I]` leads to `[.., O]`.
    Parameters:
        `R · (I + O) + O` per chosen linear. RoBERTa-base, query and value: r=8 313,344.
    Use it when:
        LoRA at a small rank falls short and a slower training run is acceptable; merged, it serves at no cost.
    Pitfalls:
        - Every training step computes the norm of the updated weight; serving does not.
        - With `constant_norm` off the gradient is exact and takes more memory; the two runs are not the same.
        - It reads the frozen weight, so a gain belongs to one backbone; of a quantised one, the dequantised weight.
        - Unmerged it rescales the frozen output too: it is no longer a term that is added to it.
    Published:
        Hugging Face PEFT's method comparison (Llama-3.2-3B trained on MetaMathQA, accuracy on GSM8K): r=32 46.9 in
        1,191 seconds of training, LoRA r=32 47.8 in 942. No figure of Liu et al. 2024 has been checked, so none stands
        here.
    """

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2402.09353, eq. 5; constant norm: section 4.3"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3, source="not swept: LoRA's, from the sweep on small tasks (docs/results.md)"
    )

    constant_norm: bool = True
    """Treat the norm as a constant in the backward pass, which saves memory (section 4.3)."""

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return super().init_site(site, backbone, generator) | {"m": torch.zeros(site.out_features)}

    def site_deltas(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> list[Delta]:
        weight, bias = frozen_weight(site, backbone)
        A, B = params["A"], params["B"]
        before = weight_norm(weight)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.constant_norm):
            after = weight_norm(weight, A, B, self.scale)
        # A row of zeros has no direction to rescale; any finite norm will do for it.
        gain = (before + params["m"]) / after.clamp_min(torch.finfo(after.dtype).tiny)
        found = [self.delta(params, site, backbone), Scale(s=(gain - 1).to(B.dtype))]
        return found if bias is None else [*found, Bias(b=((1 - gain) * bias).to(B.dtype))]


def weight_norm(weight: Tensor, A: Tensor | None = None, B: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """‖W + s·AB‖ of each output feature, `[O]`, in float32 or better, without building the `[O, I]` sum.

    `‖w + s·A b‖² = ‖w‖² + 2s·(A w)·b + s²·bᵀ(AᵀA)b` for an output feature's frozen weights w and column b of B.

    Args:
        weight: `[O, I]`.
        A, B: `[I, R]` and `[R, O]`; none stand for no update.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        weight = weight.to(dtype)
        squares = weight.square().sum(1)
        if A is not None and B is not None:
            A, B = A.to(dtype), B.to(dtype)
            cross = 2 * scale * (weight @ A) + scale**2 * (B.T @ (A.T @ A))  # [O, R]
            squares = squares + (cross * B.T).sum(1)
        return squares.clamp_min(0).sqrt()
