"""`Affine`: γ += δγ, β += δβ at a norm site.   Legend: D width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.deltas.base import Delta, weight_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Delta):
    """A change of a norm's gain and offset (LayerNorm tuning; the norm biases of BitFit).

    Semantics, one row `x [T, D]`:  `normalise(x) * (γ + gain) + (β + offset)`, with whatever the frozen norm does
    to normalise. A norm that stores its gain as `γ = 1 + weight` is no other case: `weight` changes by as much.
    """

    kind: ClassVar[str] = "Affine"
    site_kind: ClassVar[str] = "norm"
    dims: ClassVar[Mapping[str, str]] = {"gain": "O", "offset": "O"}
    attaches: ClassVar[str] = "serial"

    gain: Tensor | None = None
    """`[D]`, added to γ; `None` leaves γ alone."""
    offset: Tensor | None = None
    """`[D]`, added to β; `None` leaves β alone."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        if self.gain is not None:
            # x̂ is recomputed from x: getting it back from y would divide by γ, which may be near zero.
            y = torch.addcmul(y, normalise(module, x), self.gain)
        if self.offset is not None:
            y = y + self.offset
        return y

    def why_not_merge(self, module: nn.Module) -> str | None:
        if self.offset is not None and module.bias is None:
            return "the frozen norm has no offset to add it to"
        return None

    def merge(self, module: nn.Module) -> None:
        if self.gain is not None:
            weight_of(module, "weight").add_(self.gain)
        if self.offset is not None:
            weight_of(module, "bias").add_(self.offset)


def normalise(module: nn.Module, x: Tensor) -> Tensor:
    """`x [..., D]` as the frozen norm has it before its gain: by its own `normalise`, or as torch's layer norm."""
    own = getattr(module, "normalise", None)
    if own is None:
        return F.layer_norm(x, x.shape[-1:], eps=module.eps)  # type: ignore[arg-type]
    normalised: Tensor = own(x)
    return normalised
