"""Frozen modules in the form that deltas read and merge into, whatever the model makes of them.

A delta knows a linear map as `weight [O, I]` and `bias [O]`, and a norm as something that normalises and then
multiplies by a gain. A model may keep several maps in one module, keep a weight transposed, or norm by the root
mean square; the stand-ins here hide that. Their tensors are views, so that merging into them writes to the model.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from multitune.sites import Site


class FrozenLinear:
    """A linear map that is a part of a module's output, or whose module keeps its weight as `[I, O]`."""

    def __init__(self, module: nn.Module, part: tuple[int, int] | None, transposed: bool) -> None:
        self._module = module
        self._rows = slice(*part) if part is not None else slice(None)
        self._transposed = transposed

    @property
    def weight(self) -> Tensor:
        """`[O, I]`, a view."""
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return (weight.T if self._transposed else weight)[self._rows]

    @property
    def bias(self) -> Tensor | None:
        """`[O]`, a view, if the module has one."""
        bias = getattr(self._module, "bias", None)
        return bias[self._rows] if isinstance(bias, Tensor) else None

    @property
    def in_features(self) -> int:
        """Width I of what goes in."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width O of what comes out."""
        return self.weight.shape[0]

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self._module.training


class FrozenNorm:
    """A norm that is not torch's own `LayerNorm`. A gain stored as the difference from one is changed alike."""

    def __init__(self, module: nn.Module, centred: bool) -> None:
        self._module = module
        self._centred = centred

    @property
    def weight(self) -> Tensor:
        """`[D]`: the gain, or its difference from one."""
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """`[D]`: the offset, if the norm has one."""
        bias = getattr(self._module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def eps(self) -> float:
        """What is added to the variance or mean square."""
        own = getattr(self._module, "variance_epsilon", None)
        return float(cast(float, self._module.eps if own is None else own))

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self._module.training

    def normalise(self, x: Tensor) -> Tensor:
        """`x [..., D]` before gain and offset; in float32 at least, as the models do."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self._centred:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


def frozen_view(module: nn.Module, site: Site) -> nn.Module:
    """What the deltas of `site` get as the frozen module: the module itself where it has the common form."""
    stand_in: FrozenLinear | FrozenNorm | None = None
    if site.kind == "linear" and (site.part is not None or site.transposed):
        stand_in = FrozenLinear(module, site.part, site.transposed)
    elif site.kind == "norm" and not isinstance(module, nn.LayerNorm):
        stand_in = FrozenNorm(module, centred=site.centred)
    return module if stand_in is None else cast(nn.Module, stand_in)
