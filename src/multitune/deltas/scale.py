"""`Scale`: y *= 1 + s, or x *= 1 + s, elementwise per feature at a linear site.   Legend: F features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from multitune.deltas.base import Delta, weight_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Delta):
    """A factor per output feature of a linear map ((IA)³ on keys and values, DoRA's magnitude).

    Semantics, one row `y [T, F]`:  `y * (1 + s)`
    """

    kind: ClassVar[str] = "Scale"
    site_kind: ClassVar[str] = "linear"
    dims: ClassVar[Mapping[str, str]] = {"s": "O"}
    attaches: ClassVar[str] = "serial"

    s: Tensor
    """`[F]`; 0 leaves the row unchanged."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        if not torch.is_grad_enabled():
            return y.addcmul_(y, self.s)
        return torch.addcmul(y, y, self.s)

    def merge(self, module: nn.Module) -> None:
        weight_of(module, "weight").mul_(1 + self.s[:, None])
        if module.bias is not None:
            weight_of(module, "bias").mul_(1 + self.s)


@dataclass(frozen=True, kw_only=True, eq=False)
class InputScale(Scale):
    """A factor per input feature of a linear map ((IA)³ on the feed-forward activation).

    Semantics, one row `x [T, F]`:  `linear(x * (1 + s))`
    """

    kind: ClassVar[str] = "InputScale"
    dims: ClassVar[Mapping[str, str]] = {"s": "I"}
    changes_input: ClassVar[bool] = True
    attaches: ClassVar[str] = "input"

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        # Both arguments are the site's input; it is changed in place only where the site owns it.
        return super().apply(x, y, module)

    def merge(self, module: nn.Module) -> None:
        weight_of(module, "weight").mul_(1 + self.s)
