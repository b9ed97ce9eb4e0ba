"""Frozen modules in the form that deltas read and merge into, whatever the model makes of them.

A delta knows a linear map as `weight [O, I]` and `bias [O]`, and a norm as something that normalises and then
multiplies by a gain. A model may keep several maps in one module, keep a weight transposed, or norm by the root
mean square; the stand-ins here hide that. Their tensors are views, or where no view can be had copies: write to them
inside `writable`, and what is written reaches the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from multitune.quantized import QuantizedLinear
from multitune.sites import Site


def part_of_weight(whole: Tensor, site: Site) -> Tensor:
    """`[O, I]`: what belongs to a linear site of its module's weight, or of anything shaped like it.

    A view, or a copy where the features take turns with those of other parts.
    """
    weight = whole.T if site.transposed else whole
    rows = slice(*site.part) if site.part is not None else slice(None)
    if site.blocks == 1:
        return weight[rows]
    return weight.unflatten(0, (site.blocks, -1))[:, rows].flatten(0, 1)


def whole_weight(module: nn.Module) -> Tensor:
    """A linear module's weight; where it is quantised, made anew in the model's dtype, to read and not to write."""
    return module.dequantized() if isinstance(module, QuantizedLinear) else module.get_parameter("weight")


class FrozenLinear:
    """A linear map that is a part of a module's output, whose module keeps its weight as `[I, O]`, or is quantised."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self._site = site
        self._module = model.get_submodule(site.module)
        self._rows = slice(*site.part) if site.part is not None else slice(None)
        self._blocks = site.blocks
        self._transposed = site.transposed
        owner, _, self._bias_name = (site.bias_path or f"{site.module}.bias").rpartition(".")
        self._bias_owner = model.get_submodule(owner)
        self._bias_apart = site.bias_path is not None
        self._copy: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """`[O, I]`: a view, or a copy where it is quantised or its features take turns with those of other parts."""
        if self._copy is not None:
            return self._copy
        return part_of_weight(whole_weight(self._module), self._site)

    @property
    def bias(self) -> Tensor | None:
        """`[O]`, a view, if there is one."""
        bias = getattr(self._bias_owner, self._bias_name, None)
        if not isinstance(bias, Tensor) or self._bias_apart:
            return bias
        assert self._blocks == 1, "no supported model has a bias whose features take turns"
        return bias[self._rows]

    @property
    def bias_apart(self) -> Tensor | None:
        """`[O]`: the bias, if the model adds it later than the module runs."""
        return self.bias if self._bias_apart else None

    def _whole(self) -> Tensor:
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight.T if self._transposed else weight

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write to the model, at the end, what the block writes to `weight`."""
        if self._blocks == 1:
            yield  # a view, so it is there already
            return
        self._copy = self.weight
        try:
            yield
            blocks = self._whole().unflatten(0, (self._blocks, -1))
            blocks[:, self._rows] = self._copy.unflatten(0, (self._blocks, -1))
        finally:
            self._copy = None

    @property
    def in_features(self) -> int:
        """Width I of what goes in."""
        return self._site.in_features

    @property
    def out_features(self) -> int:
        """Width O of what comes out."""
        return self._site.out_features

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


def frozen_view(model: nn.Module, site: Site) -> nn.Module:
    """What the deltas of `site` get as the frozen module: the module itself where it has the common form."""
    module = model.get_submodule(site.module)
    stand_in: FrozenLinear | FrozenNorm | None = None
    if site.kind == "linear" and (site.part is not None or site.transposed or isinstance(module, QuantizedLinear)):
        stand_in = FrozenLinear(model, site)
    elif site.kind == "norm" and not isinstance(module, nn.LayerNorm):
        stand_in = FrozenNorm(module, centred=site.centred)
    return module if stand_in is None else cast(nn.Module, stand_in)


@contextmanager
def writable(frozen: nn.Module) -> Iterator[nn.Module]:
    """The frozen module of a copied backbone, to be written to: its tensors reach the model by the end of the block."""
    view: object = frozen
    if isinstance(view, FrozenLinear):
        with view.written():
            yield frozen
    else:
        yield frozen
