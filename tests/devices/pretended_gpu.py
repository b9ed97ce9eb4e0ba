"""A GPU where there is none: tensors that compute on the CPU, say that they are on `cuda:0`, and keep CUDA's rules.

What CUDA refuses is refused here: one operation on tensors of both devices (but for copies, for indices, and for
scalars), `numpy()` of a device's tensor, random numbers for the device from a generator of the CPU. What makes the
host wait for the device is counted. Kernels, their rounding and their speed are not pretended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)

#: Copies from one device to another, and what looks at the other tensor's kind or shape alone.
_ACROSS = {
    Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type,
    Tensor.view_as, Tensor.expand_as, Tensor.reshape_as,
}  # fmt: skip
#: What reads values on the host, which waits until the device has computed them.
_READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
#: What finds out on the host how large its result is.
_SIZED = {Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique, torch.unique_consecutive, torch.masked_select}


class OnGPU(torch.Tensor):
    """A tensor of the pretended device."""

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")
        if torch._C._current_graph_task_id() == -1:  # gradients come from the engine, which knows of no pretending
            _check_devices(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return _mark(func(*args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = _as(self.detach().clone(), OnGPU).requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]


class PretendedGPU(TorchFunctionMode):
    """While it lasts, `device="cuda"` and `to("cuda")` give tensors of the pretended device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        """How often the host waited for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.data.__set__ and isinstance(args[1], OnGPU) != isinstance(args[0], OnGPU):
            return _move_in_place(args[0], args[1])  # how a module moves its parameters
        if func in (Tensor.backward, torch.autograd.backward):
            return self._backward(args[0])
        on_device = bool(args) and isinstance(args[0], OnGPU)
        if on_device and (func in _READS or func in _SIZED or _picks_by_mask(func, args)):
            self.waits += 1
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._transfer(func, args, kwargs)
        where = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if where != "cuda":
            made = func(*args, **kwargs)
            return _unmark(made) if where == "cpu" else made
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return _mark(func(*args, **kwargs | {"device": "cpu"}))

    def _backward(self, losses: Any) -> None:
        """Of scalars; pretending goes on meanwhile, because recomputed layers and custom functions make tensors."""
        losses = (losses,) if isinstance(losses, Tensor) else tuple(losses)
        ones = tuple(torch.ones_like(loss) for loss in losses)
        with self:
            _engine_run_backward(losses, ones, False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _transfer(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, there = args[0], isinstance(args[0], OnGPU)
        given = []
        for name, value in [*((None, a) for a in args[1:]), *kwargs.items()]:
            if isinstance(value, Tensor):
                there, value = isinstance(value, OnGPU), value.dtype
            elif name in (None, "device") and isinstance(value, (str, torch.device)):
                there, value = torch.device(value).type == "cuda", "cpu"
            given.append((name, value))
        there = func is Tensor.cuda or (func is Tensor.to and there)
        with torch._C.DisableTorchFunctionSubclass():
            plain = source.as_subclass(Tensor)
            if func is Tensor.to:
                positional = [v for name, v in given if name is None]
                plain = plain.to(*positional, **{name: v for name, v in given if name is not None})
        if there == isinstance(source, OnGPU):
            return source if plain.dtype == source.dtype and "copy" not in kwargs else _as(plain, type(source))
        self.waits += not there
        return _as(plain.clone(), OnGPU if there else Tensor)


def _as(t: Tensor, kind: type[Tensor]) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return t.as_subclass(Tensor if kind is nn.Parameter else kind)


def _mark(found: Any) -> Any:
    """Results of an operation on the device are on the device."""
    if isinstance(found, Tensor):
        return found if isinstance(found, OnGPU) else _as(found, OnGPU)
    if isinstance(found, (tuple, list)) and not isinstance(found, torch.Size):
        return type(found)(_mark(each) for each in found)
    return found


def _unmark(found: Any) -> Any:
    return _as(found, Tensor) if isinstance(found, OnGPU) else found


def _move_in_place(parameter: Tensor, values: Tensor) -> None:
    """`parameter.data = values`: the object stays, so that ties and references to it do."""
    with torch._C.DisableTorchFunctionSubclass():
        parameter.data = values.as_subclass(Tensor)
    parameter._is_param = isinstance(parameter, nn.Parameter)  # type: ignore[attr-defined]
    away = nn.Parameter if isinstance(parameter, nn.Parameter) else Tensor
    parameter.__class__ = OnGPU if isinstance(values, OnGPU) else away


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _picks_by_mask(func: Any, args: Any) -> bool:
    """Whether an index is a mask, whose number of hits says how large the result is."""
    return func is Tensor.__getitem__ and any(t.dtype == torch.bool for t in _tensors(args[1]))


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Raise what CUDA raises where an operation gets tensors of both devices."""
    if func in _ACROSS:
        return
    if func is Tensor.__getitem__ and isinstance(args[0], OnGPU):
        return  # indices of the CPU are copied over
    if func is Tensor.__setitem__:
        _check_assignment(*args)
        return
    given = list(_tensors((args, kwargs)))
    strangers = [t for t in given if not isinstance(t, OnGPU) and t.ndim]
    if strangers and len(strangers) < len(given):
        shapes = ", ".join(f"{'cuda:0' if isinstance(t, OnGPU) else 'cpu'} {tuple(t.shape)}" for t in given)
        name = getattr(func, "__qualname__", func)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {shapes}")


def _check_assignment(target: Tensor, index: Any, value: Any) -> None:
    indices = list(_tensors(index))
    if not isinstance(target, OnGPU) and any(isinstance(i, OnGPU) for i in indices):
        raise RuntimeError("indices should be on the CPU, where the indexed tensor is, but found cuda:0")
    scattered = bool(indices) or isinstance(index, list)
    if scattered and isinstance(value, Tensor) and value.ndim and isinstance(value, OnGPU) != isinstance(target, OnGPU):
        raise RuntimeError("expected the values where the indexed tensor is, but one is on cuda:0 and one on the CPU")
