"""`Bias`: y += b at a linear site.   Legend: O out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from multitune.deltas.base import Delta, weight_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Bias(Delta):
    """A vector added to a linear map's output (BitFit, Ben-Zaken et al. 2021, arXiv 2106.10199).

    Semantics, one row `y [T, O]`:  `y + b`
    """

    kind: ClassVar[str] = "Bias"
    site_kind: ClassVar[str] = "linear"
    dims: ClassVar[Mapping[str, str]] = {"b": "O"}

    b: Tensor
    """`[O]`"""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        return y + self.b if torch.is_grad_enabled() else y.add_(self.b)

    def why_not_merge(self, module: nn.Module) -> str | None:
        return "the frozen linear map has no bias to add it to" if module.bias is None else None

    def merge(self, module: nn.Module) -> None:
        weight_of(module, "bias").add_(self.b)
