"""`Affine`: γ += δγ, β += δβ at a norm site.   Legend: D width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.deltas.base import Delta, weight_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Delta):
    """A change of a layer norm's gain and offset (LayerNorm tuning; the norm biases of BitFit).

    Semantics, one row `x [T, D]`:  `normalise(x) * (γ + gain) + (β + offset)`
    """

    kind: ClassVar[str] = "Affine"
    site_kind: ClassVar[str] = "norm"
    attaches: ClassVar[str] = "serial"

    gain: Tensor | None = None
    """`[D]`, added to γ; `None` leaves γ alone."""
    offset: Tensor | None = None
    """`[D]`, added to β; `None` leaves β alone."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        if self.gain is not None:
            # x̂ is recomputed from x: getting it back from y would divide by γ, which may be near zero.
            normalised = F.layer_norm(x, x.shape[-1:], eps=module.eps)  # type: ignore[arg-type]
            y = torch.addcmul(y, normalised, self.gain)
        if self.offset is not None:
            y = y + self.offset
        return y

    def merge(self, module: nn.Module) -> None:
        if self.gain is not None:
            weight_of(module, "weight").add_(self.gain)
        if self.offset is not None:
            weight_of(module, "bias").add_(self.offset)
