"""Several calls in one forward pass: the frozen model runs over the rows of all, everything else over each call's own.

Training many adapters together, the rows of all jobs go through the frozen linear maps, norms and activations as one
batch. A job's deltas, its attention and its dropout masks are computed on its own rows, cut to its own width, by the
same code in the same shapes as if it ran alone, and its random numbers come from its own stream. So one job's values,
NaN included, have no way to another's; what is left of the others is the number of rows and columns that the frozen
operations see, whose results for a row do not depend on it beyond the rounding of a matrix product.

Legend: J jobs, B rows of all jobs, T columns of the widest, K rows and W columns of one job, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multitune.call import Call, Stream
from multitune.current import active, current_call
from multitune.deltas import Bottleneck, Delta
from multitune.inputs import Batch
from multitune.plan import Group, Plan, Step

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: Functions that draw random numbers in a forward pass of the supported models.
_DRAWING = frozenset({F.dropout, torch.dropout, F.scaled_dot_product_attention, torch.rand})


@dataclass(frozen=True, kw_only=True)
class JointBatch:
    """One job's part of a joint forward pass."""

    plan: Plan
    """Its K rows."""
    input_ids: Tensor
    """int64 `[K, W]`"""
    attention_mask: Tensor | None = None
    """`[K, W]`, 1 for real tokens; `None` for no padding."""
    token_type_ids: Tensor | None = None
    """int64 `[K, W]` or `None`."""
    slots: Tensor | None = None
    """int64 `[K, S]` as `Backbone.run` takes them."""
    pieces: Tensor | None = None
    """int64 `[K, W]` as `Backbone.run` takes them."""
    stream: Stream | None = None
    """Where its random numbers come from; `None` where none are drawn."""

    @property
    def batch(self) -> Batch:
        """What its forward pass reads."""
        return Batch(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            token_type_ids=self.token_type_ids,
            slots=self.slots,
            pieces=self.pieces,
        )


@dataclass(frozen=True, eq=False)
class _Part:
    """One call's place in the joint batch."""

    call: Call
    start: int
    rows: int
    width: int
    """Columns it has by itself: prompts and global tokens included, the other calls' padding not."""

    def cut(self, t: Tensor) -> Tensor:
        """`t [K, T, ...]` to `[K, W, ...]`."""
        return t if t.shape[1] == self.width else t[:, : self.width].contiguous()

    def square(self, t: Tensor | None) -> Tensor | None:
        """`t [B or 1, ..., Q or 1, S]`, such as a mask or a bias by distance, for its rows and columns."""
        if t is None:
            return None
        own = t if t.shape[0] == 1 else t[self.start : self.start + self.rows]
        return own[..., : self.width, : self.width]


@dataclass(frozen=True, eq=False)
class _JointStep(Step):
    """What all calls apply at one site, each to its own rows."""

    parts: tuple[tuple[_Part, tuple[Step, ...]], ...]

    def __call__(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        counts = [part.rows for part, _ in self.parts]
        ys = y.split(counts)
        xs = ys if x is y else x.split(counts)
        out = []
        for (part, steps), x_own, y_own in zip(self.parts, xs, ys, strict=True):
            if not steps:
                out.append(y_own)
                continue
            with active(part.call):
                new = part.cut(y_own)
                read = new if x_own is y_own else part.cut(x_own)
                for step in steps:
                    new = step(read, new, module)
            out.append(_widen(new, y.shape[1]).to(y.dtype))
        return _stacked(out)


class _JointPlan(Plan):
    """The steps of all calls; every call keeps the plan it has alone."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.num_rows = sum(part.rows for part in parts)
        plans = [part.call.plan for part in parts]
        everyone = Group(rows=slice(0, self.num_rows), num_slots=len(parts), rows_per_slot=1)
        self.steps = _merge_steps(everyone, parts, [p.steps for p in plans])
        self.input_steps = _merge_steps(everyone, parts, [p.input_steps for p in plans])


def _merge_steps(
    everyone: Group, parts: Sequence[_Part], of_parts: Sequence[dict[str, list[Step]]]
) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for site in dict.fromkeys(site for steps in of_parts for site in steps):
        each = [tuple(steps.get(site, ())) for steps in of_parts]
        deltas = [step.delta for steps in each for step in steps]
        shown = max(deltas, key=_reads_input)  # the site asks whether anyone reads the sub-layer's input
        found[site] = [_JointStep(everyone, shown, tuple(zip(parts, each, strict=True)))]
    return found


def _reads_input(delta: Delta) -> bool:
    return isinstance(delta, Bottleneck) and delta.reads_input


class JointCall(Call):
    """Calls that share a forward pass; made anew for every one."""

    def __init__(self, backbone: Backbone, batches: Sequence[JointBatch]) -> None:
        """
        Args:
            batches: every part of it as `Call` takes it. A plan in it has one slot for all its rows, or none.

        Raises:
            PlanError: as `Call`, for any of them.
        """
        extra = 0 if backbone.lsg is None else backbone.lsg.num_global
        self.parts: list[_Part] = []
        start = 0
        for b in batches:
            assert not b.plan.parts and b.plan.order is None, "one slot for all rows has no order and no pieces"
            with nullcontext() if b.stream is None else b.stream.drawing():  # token rows may draw masks
                call = Call(backbone, b.plan, b.batch, b.stream)
            ids = call.inputs["input_ids"]
            self.parts.append(_Part(call, start, ids.shape[0], ids.shape[1] + extra))
            start += ids.shape[0]
        self._begin(backbone, _JointPlan(self.parts))  # not Call.__init__: this call has no token ids of its own
        self.lsg_open = self.parts[0].call.lsg_open  # only says whether there are blocks
        self.inputs = _joint_inputs(backbone, [part.call.inputs for part in self.parts], self.lsg_open is None)
        self.pieces = _joint_pieces([part.call for part in self.parts])
        self._mode: list[_Draws] = []

    def enter(self) -> None:
        self._mode.append(_Draws())
        self._mode[-1].__enter__()

    def leave(self) -> None:
        self._mode.pop().__exit__(None, None, None)

    def enter_layer(self, layers: tuple[int, ...]) -> int:
        for part in self.parts:
            self.layer = part.call.enter_layer(layers)
        return self.layer

    def snapshot(self) -> JointCall:
        copied = copy.copy(self)
        copied.captured, copied._mode = {}, []
        copied.parts = [replace(part, call=part.call.snapshot()) for part in self.parts]
        copied.plan = _JointPlan(copied.parts)
        return copied

    @property
    def has_token_bias(self) -> bool:
        return any(part.call.has_token_bias for part in self.parts)

    def add_token_bias(self, layer: int, hidden: Tensor) -> Tensor:
        return _each(self.parts, hidden, lambda call, own: call.add_token_bias(layer, own))

    def insert_prompts(self, embedded: Tensor) -> Tensor:
        if all(part.call.prompts is None for part in self.parts):
            return embedded
        return _each(self.parts, embedded, lambda call, own: call.insert_prompts(own))

    def split(self, hidden: Tensor) -> list[Tensor]:
        """`hidden [B, T, D]` to each call's own `[K, W, D]`, in its own order and without its prompts."""
        pieces = zip(self.parts, hidden.split([part.rows for part in self.parts]), strict=True)
        return [part.call.restore(part.cut(own)) for part, own in pieces]


class _Widen(torch.autograd.Function):
    """`[K, W, ...]` to `[K, T, ...]` with zeros behind. The gradient is laid out as it is without the padding, so that
    sums over it add up in the same order."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, width: int) -> Tensor:
        ctx.own = t.shape[1]
        return F.pad(t, (*(0, 0) * (t.ndim - 2), 0, width - ctx.own))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][:, : ctx.own].contiguous(), None


def _widen(t: Tensor, width: int) -> Tensor:
    if t.shape[1] == width:
        return t
    widened: Tensor = _Widen.apply(t, width)
    return widened


def _each(parts: Sequence[_Part], t: Tensor, function: Callable[[Call, Tensor], Tensor]) -> Tensor:
    """`function` applied to every call's own part of `t [B, T, ...]`."""
    pieces = zip(parts, t.split([part.rows for part in parts]), strict=True)
    return _stacked([_widen(function(part.call, part.cut(own)), t.shape[1]) for part, own in pieces])


def _stacked(pieces: Sequence[Tensor]) -> Tensor:
    """The rows of all; a single piece is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))


def _joint_inputs(backbone: Backbone, inputs: Sequence[dict[str, Any]], masked: bool) -> dict[str, Any]:
    """One batch of all calls' inputs, padded on the right to the widest."""
    ids = [i["input_ids"] for i in inputs]
    width = max(i.shape[1] for i in ids)
    found: dict[str, Any] = {"input_ids": _padded(ids, width, backbone.pad_id)}
    masks = [i.get("attention_mask") for i in inputs]
    if masked and (any(m is not None for m in masks) or any(i.shape[1] < width for i in ids)):
        whole = [torch.ones_like(i) if m is None else m for i, m in zip(ids, masks, strict=True)]
        found["attention_mask"] = _padded(whole, width, 0)
    if any("token_type_ids" in i for i in inputs):
        types = [i.get("token_type_ids", torch.zeros_like(own)) for i, own in zip(inputs, ids, strict=True)]
        found["token_type_ids"] = _padded(types, width, 0)
    if any("position_ids" in i for i in inputs):
        positions = [
            i["position_ids"] if "position_ids" in i else backbone.position_ids(own, torch.zeros_like(own[:, 0]))
            for i, own in zip(inputs, ids, strict=True)
        ]
        found["position_ids"] = _padded(positions, width, int(positions[0][0, 0]))
    if backbone.causal:
        found["use_cache"] = False
    return found


def _joint_pieces(calls: Sequence[Call]) -> Tensor | None:
    """The texts of all calls' rows, `[B, T]`; one text in a row of a call that does not say."""
    if all(call.pieces is None for call in calls):
        return None
    ids = [call.inputs["input_ids"] for call in calls]
    own = [torch.zeros_like(i) if call.pieces is None else call.pieces for call, i in zip(calls, ids, strict=True)]
    return _padded(own, max(i.shape[1] for i in ids), 0)


def _padded(parts: Sequence[Tensor], width: int, fill: int) -> Tensor:
    return torch.cat([F.pad(t, (0, width - t.shape[1]), value=fill) for t in parts])


# -------------------------------------------------------------------- attention


def attend_apart(call: JointCall, tensors: Sequence[Tensor], columns: int, attend: Callable[..., Tensor]) -> Tensor:
    """Attention of every call by itself, as `[B, T, ...]`.

    Args:
        tensors: such as query, key and value, `[B, H, T, K]`.
        columns: which dimension of the tensors counts tokens.
        attend: takes a part and its own rows and columns of the tensors, and returns `[K, W, ...]`; runs under the
            part's call.
    """
    pieces = [t.split([part.rows for part in call.parts]) for t in tensors]
    width = tensors[0].shape[columns]
    out = []
    for part, *own in zip(call.parts, *pieces, strict=True):
        with active(part.call):
            out.append(_widen(attend(part, *(t.narrow(columns, 0, part.width) for t in own)), width))
    return _stacked(out)


# -------------------------------------------------------------------- random numbers


class _Draws(TorchFunctionMode):
    """Every random number of a joint forward pass comes from the stream of the call it is for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWING or kwargs.get("dropout_p") == 0:
            return func(*args, **kwargs)
        call = current_call()
        if not isinstance(call, JointCall):
            with call.drawing():  # of attention all of it, because it draws its mask in its midst
                return func(*args, **kwargs)
        if func is F.dropout or func is torch.dropout:
            return _dropout(call, func, *args, **kwargs)
        if func is torch.rand:  # a layer's chance of being left out, which is none: only the streams must go on
            drawn = []
            for part in call.parts:
                with part.call.drawing():
                    drawn.append(func(*args, **kwargs))
            return drawn[0]
        return func(*args, **kwargs)


def _dropout(
    call: JointCall,
    func: Callable[..., Tensor],
    input: Tensor,
    p: float = 0.5,
    train: bool = True,
    *rest: Any,
    training: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """`func` on `input [B, T, ...]`, with the masks that every call would draw by itself."""
    if not (train if training is None else training) or p == 0:
        return input
    if input.shape[0] != call.plan.num_rows:  # some models flatten rows and tokens
        wide = input.unflatten(0, (call.plan.num_rows, -1))
        return _dropout(call, func, wide, p).flatten(0, 1)
    if len(call.parts) == 1:
        with call.parts[0].call.drawing():
            return func(input, p, True)
    masks = []
    with torch.no_grad():
        for part in call.parts:
            ones = input.new_ones(part.rows, part.width, *input.shape[2:])
            with part.call.drawing():
                masks.append(_widen(func(ones, p, True), input.shape[1]))
        mask = torch.cat(masks)
    return input * mask
