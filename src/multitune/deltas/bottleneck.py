"""`Bottleneck`: h += s · f(W_down z) W_up at a sub-layer's output.   Legend: D width, M bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.deltas.base import Delta, round_up_power_of_two

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
"""Activation functions by name; every one of them maps 0 to 0, so that padded columns stay silent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bottleneck(Delta):
    """A small two-layer network around a sub-layer (Houlsby et al. 2019, arXiv 1902.00751).

    Semantics, one row `h [T, D]`, with `z = h` (serial) or the sub-layer's input (parallel):
    `h + scale * (f(z @ down + down_bias) @ up + up_bias)`
    """

    kind: ClassVar[str] = "Bottleneck"
    site_kind: ClassVar[str] = "sublayer"
    cannot_merge: ClassVar[str | None] = "it has a non-linearity between its two matrices"

    down: Tensor
    """`[D, M]`"""
    down_bias: Tensor
    """`[M]`"""
    up: Tensor
    """`[M, D]`"""
    up_bias: Tensor
    """`[D]`"""
    activation: str = "gelu"
    """A key of `ACTIVATIONS`."""
    placement: Literal["serial", "parallel"] = "serial"
    """Whether it reads the sub-layer's output or its input."""
    scale: float = 1.0
    """The branch is multiplied by this."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        z = y if self.placement == "serial" else x
        hidden = ACTIVATIONS[self.activation](z @ self.down + self.down_bias)
        if self.up.ndim == 3 and not torch.is_grad_enabled():
            return y.baddbmm_(hidden, self.up, alpha=self.scale).add_(self.up_bias, alpha=self.scale)
        update = hidden @ self.up + self.up_bias
        return y + (update if self.scale == 1.0 else update * self.scale)

    def canonical(self) -> Self:
        width = self.down.shape[1]
        pad = round_up_power_of_two(width) - width
        return replace(
            self,
            down=F.pad(self.down, (0, pad)),
            down_bias=F.pad(self.down_bias, (0, pad)),
            up=F.pad(self.up * self.scale, (0, 0, 0, pad)),
            up_bias=self.up_bias * self.scale,
            scale=1.0,
        )
