"""`Bottleneck`: h += s · f(W_down z) W_up at a sub-layer's output.   Legend: D width, M bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
}
"""Activation functions by name; every one of them maps 0 to 0, so that padded columns stay silent."""

SOFTMAX = "softmax"
"""The one activation beside them: over the columns of each of `groups` equal parts, where a bias of -inf is silence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bottleneck(Delta):
    """A small two-layer network around a sub-layer (Houlsby et al. 2019, arXiv 1902.00751).

    Semantics, one row `h [T, D]`, with `z = h` (serial), the sub-layer's input `x` (parallel) or `x + h` (sum), each
    normalised first where `eps` is set:  `h + scale * (f(z @ down + down_bias) @ up + up_bias)`
    """

    kind: ClassVar[str] = "Bottleneck"
    site_kind: ClassVar[str] = "sublayer"
    dims: ClassVar[Mapping[str, str]] = {"down": "IM", "down_bias": "M", "up": "MO", "up_bias": "O"}
    one_per_site: ClassVar[bool] = True
    cannot_merge: ClassVar[str | None] = "it is a network around a whole sub-layer, not a change of one linear map"

    down: Tensor
    """`[D, M]`"""
    down_bias: Tensor
    """`[M]`"""
    up: Tensor
    """`[M, D]`"""
    up_bias: Tensor
    """`[D]`"""
    activation: str = "gelu"
    """A key of `ACTIVATIONS`, or `SOFTMAX`."""
    placement: Literal["serial", "parallel", "sum"] = "serial"
    """Whether it reads the sub-layer's output, its input, or the sum of both."""
    eps: float | None = None
    """Normalise what it reads: centred, and divided by the root of the variance plus this. A gain and an offset behind
    that are linear, and belong into `down` and `down_bias`. `None` reads it as it is."""
    scale: float = 1.0
    """The branch is multiplied by this."""
    groups: int = 1
    """Softmax only: the M columns are this many runs of M / groups columns, with a softmax over each (heads)."""

    @property
    def reads_input(self) -> bool:
        """Whether it needs the sub-layer's input."""
        return self.placement != "serial"

    def _read(self, x: Tensor, y: Tensor) -> Tensor:
        z = x + y if self.placement == "sum" else x if self.placement == "parallel" else y
        return z if self.eps is None else F.layer_norm(z, z.shape[-1:], eps=self.eps)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.activation == SOFTMAX:
            return hidden.unflatten(-1, (self.groups, -1)).softmax(-1).flatten(-2)
        return ACTIVATIONS[self.activation](hidden)

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        hidden = self._activate(self._read(x, y) @ self.down + self.down_bias)
        if self.up.ndim == 3 and not torch.is_grad_enabled():
            return y.baddbmm_(hidden, self.up, alpha=self.scale).add_(self.up_bias, alpha=self.scale)
        update = hidden @ self.up + self.up_bias
        return y + (update if self.scale == 1.0 else update * self.scale)

    def canonical(self) -> Self:
        width = self.down.shape[1] // self.groups
        pad = round_up_power_of_two(width) - width
        silent = -torch.inf if self.activation == SOFTMAX else 0.0

        def widen(t: Tensor, value: float = 0.0) -> Tensor:  # along the last dimension, in each group
            return F.pad(t.unflatten(-1, (self.groups, width)), (0, pad), value=value).flatten(-2)

        return replace(
            self,
            down=widen(self.down),
            down_bias=widen(self.down_bias, silent),
            up=widen((self.up * self.scale).T).T,
            up_bias=self.up_bias * self.scale,
            scale=1.0,
        )
