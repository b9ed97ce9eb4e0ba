"""Quantised backbones: the weights of the layers' linear maps held in 8 or 4 bits (torchao).

The weights are frozen, so they are quantised once, row by row or block by block, with no look at data. A product
makes the weight in the model's dtype from its bits and drops it again, in the backward pass too; activations are not
quantised, so that a row still does not depend on its neighbours. Embeddings, norms, biases, poolers and heads stay
as they are.

Deltas that work on activations never notice. What reads the frozen weight (DoRA's norm, PiSSA's start, places of a
sparse update) reads the dequantised one, which is the weight that the model computes with. What would write it is
refused.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multitune.errors import BackboneError, ConfigError, suggest
from multitune.sites import Site, find_sites

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.methods import Method

#: How weights can be held.
SCHEMES = {
    "int8": "8 bits a value and a scale a row",
    "nf4": "4 bits a value (normal float), an 8-bit scale a block of 64",
}
#: Values of `nf4` that share a scale, and at most so many scales that share one in turn (QLoRA, arXiv 2305.14314).
BLOCK, SCALES = 64, 256

_KEY = "_multitune_quantized"
_NAME = re.compile(rf"(?P<base>.+)\+(?P<scheme>{'|'.join(SCHEMES)})", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """How a backbone was quantised."""

    scheme: str
    """A key of `SCHEMES`."""
    original: str
    """Fingerprint of the backbone before."""

    @classmethod
    def of(cls, model: nn.Module) -> Quantized | None:
        """How a model was quantised, or `None` if it was not."""
        found = model.__dict__.get(_KEY)
        assert isinstance(found, cls | None)
        return found

    def refusal(self, name: str, what: str) -> str:
        """Why a backbone of this name cannot do something to its weights, and what can."""
        whole = name.removesuffix(f"+{self.scheme}")
        return (
            f"backbone '{name}' cannot {what}: it holds them as {self.scheme}, {SCHEMES[self.scheme]}, which cannot be "
            f"written to or trained. Use the backbone that it was made from, Backbone.load({whole!r}); "
            f"Adapter.moved_to(backbone) takes an adapter there"
        )


def quantize(backbone: Backbone, scheme: str) -> Backbone:
    """A copy of a backbone whose layers' linear weights are quantised; `Backbone.load(..., quantize=...)` needs none.

    Args:
        backbone: the backbone, which stays as it is.
        scheme: "int8" (a scale per output row) or "nf4" (QLoRA's 4-bit normal float with blocks of 64 and quantised
            scales).

    Returns:
        A backbone with a fingerprint of its own, whose name `Backbone.load` takes: `minilm+int8`. Adapters trained on
        it belong to it; `Adapter.moved_to` takes them to the original or back.

    Raises:
        ConfigError: an unknown scheme, or torchao is missing.
        BackboneError: a backbone that is quantised already, or weights that the scheme cannot hold.
    """
    _check_scheme(scheme)
    copied = backbone.clone()
    quantize_in_place(copied, scheme)
    return copied


def quantize_in_place(backbone: Backbone, scheme: str) -> None:
    """`quantize` without the copy."""
    _check_scheme(scheme)
    if backbone.quantized is not None:
        raise BackboneError(f"backbone '{backbone.name}' is quantised already, as {backbone.quantized.scheme}")
    original = backbone.fingerprint
    model = backbone.model
    backbone.detach()
    for site in backbone.sites:
        module = model.get_submodule(site.module)
        if site.kind == "linear" and not isinstance(module, QuantizedLinear):
            model.set_submodule(site.module, QuantizedLinear(module, scheme, site.module))
    model.__dict__[_KEY] = Quantized(scheme=scheme, original=original)
    backbone.sites = find_sites(model, backbone.architecture)  # a weight that was transposed is not any more
    backbone.name += f"+{scheme}"
    # The bits follow from the original and the scheme, and so does the fingerprint, whatever the dtype.
    digest = hashlib.sha256(f"{original} quantized {scheme}".encode())
    backbone.__dict__["fingerprint"] = digest.hexdigest()[:32]
    backbone.attach()


def split_scheme(name: str, asked: str | None) -> tuple[str, str | None]:
    """`"minilm+int8"` as the name of the original and the scheme; the name of a folder that exists is the original's.

    Raises:
        ConfigError: an unknown scheme, or another one in the name than was asked for.
    """
    if asked is not None:
        _check_scheme(asked)
    found = None if Path(name).exists() else _NAME.fullmatch(name)
    if found is None:
        return name, asked
    if asked not in (None, found["scheme"]):
        raise ConfigError(f"backbone '{name}' is asked for as {asked} too; give one of the two: {found['base']!r}")
    return found["base"], found["scheme"]


def check_trains(backbone: Backbone, method: Method) -> None:
    """Raise `ConfigError` if a method cannot be trained on this backbone because its weights are quantised."""
    if backbone.quantized is None:
        return
    problem = None
    if method.changes_weights:
        problem = "trains the backbone's own weights"
    elif method.needs_gradients:
        problem = "chooses what it trains by the gradients of the backbone's own weights"
    if problem is not None:
        raise ConfigError(
            f"{method.title} {problem}: {backbone.quantized.refusal(backbone.name, 'give those')}, or a method whose "
            f"deltas leave the weights alone, such as LoRA"
        )


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        known = ", ".join(f"'{name}' ({what})" for name, what in SCHEMES.items())
        raise ConfigError(f"quantize='{scheme}' is unknown.{suggest(scheme, SCHEMES)} Choose {known}")
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"quantize='{scheme}' needs torchao; install it: pip install 'multitune[quant]'") from error


# ---------------------------------------------------------------- the linear map


class QuantizedLinear(nn.Linear):
    """A frozen linear map whose weight is held in few bits."""

    def __init__(self, linear: nn.Module, scheme: str, path: str) -> None:
        """
        Args:
            linear: the map as it was, torch's `nn.Linear` or transformers' `Conv1D`; its bias is shared.
            scheme: a key of `SCHEMES`.
            path: what messages call it.
        """
        whole = linear.get_parameter("weight").detach()
        weight = whole.T.contiguous() if isinstance(linear, Conv1D) else whole  # [O, I]
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.bias = linear.bias  # type: ignore[assignment]
        self.scheme = scheme
        held = _int8(weight) if scheme == "int8" else _nf4(weight, path)
        self.weight = nn.Parameter(held, requires_grad=False)
        if not bool(torch.isfinite(self.dequantized()).all()):
            raise BackboneError(f"'{path}' cannot be held as {scheme}: its values leave the range; try another scheme")
        self.train(linear.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        # The bits never change, so copies share them; torchao's own copy of nf4 would round a second time.
        memo[id(self.weight)] = self.weight
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., I]` to `[..., O]`."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(x, self)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.dequantized(), self.bias)

    def dequantized(self) -> Tensor:
        """The weight `[O, I]` in the model's dtype, made anew."""
        held: Any = self.weight.data
        weight: Tensor = held.dequantize() if self.scheme == "int8" else held.get_original_weight()
        return weight


class _Product(torch.autograd.Function):
    """`x Wᵀ` that keeps neither operand: the backward pass makes the weight anew instead of holding it meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantized())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Under mixed precision the product was in another dtype than the weight is made in.
        return grad @ ctx.linear.dequantized().to(grad.dtype), None


def _int8(weight: Tensor) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow

    held: Tensor = Int8Tensor.from_hp(weight.contiguous(), granularity=PerRow())
    return held


def _nf4(weight: Tensor, path: str) -> Tensor:
    from torchao.quantization import NF4Tensor

    if weight.numel() % BLOCK:
        raise BackboneError(
            f"'{path}' cannot be held as nf4: its {weight.numel()} values are no whole blocks of {BLOCK}; try int8"
        )
    blocks = weight.numel() // BLOCK
    shared = min(SCALES, blocks & -blocks)  # the largest power of two that divides them
    held: Tensor = NF4Tensor.from_tensor(weight.contiguous(), BLOCK, shared)
    return held


def check_weights(model: nn.Module, sites: tuple[Site, ...]) -> None:
    """Raise `BackboneError` if a linear map's weight is in a form that deltas cannot read."""
    for site in sites:
        module = model.get_submodule(site.module)
        if site.kind == "linear" and not isinstance(module, QuantizedLinear):
            weight = module.get_parameter("weight")
            if type(weight.data) is not Tensor or not weight.is_floating_point():
                raise BackboneError(
                    f"'{site.module}' has its weight as {type(weight.data).__name__} of {weight.dtype}, quantised by "
                    f"another library; load the model as it was and quantise it here: "
                    f"Backbone.load(NAME, quantize='int8')"
                )


# ---------------------------------------------------------------- memory


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of: itself, or what a quantised one holds."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from plain_tensors(getattr(tensor, name))


def bytes_of(model: nn.Module, *, buffers: bool = True) -> int:
    """Bytes of a model's parameters and buffers in memory; what is shared counts once."""
    found: dict[int, int] = {}
    for whole in [*model.parameters(), *(model.buffers() if buffers else ())]:
        for t in plain_tensors(whole):
            found[t.data_ptr()] = t.numel() * t.element_size()
    return sum(found.values())
