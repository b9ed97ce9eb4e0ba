"""One forward pass: a plan bound to one batch. Routing is data of the call, never of the model.

The call is found by the sites through a context variable that is set for the duration of the forward pass and
reset in a `finally`, so that other threads, a failed batch, and the next batch never see it. Layers that are
recomputed in the backward pass get their own call back (`recompute_context`), because that runs later and
perhaps on another thread.

Legend: B rows, T tokens of the longest row, P inserted vectors in all, E embedding width, L layers, D width.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.deltas import Prompt, TokenBias
from multitune.deltas.prompt import FIRST_SLOT
from multitune.errors import PlanError, suggest
from multitune.inputs import Batch
from multitune.plan import Group, Plan, Step

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.cross_cache import PairedCache
    from multitune.kv_cache import RowCache
    from multitune.lsg import LSG

_CURRENT: ContextVar[Call] = ContextVar("multitune_call")


class _Traced:
    """Where the call stands for the compiler, which cannot follow a context variable.

    It is written at the top of the function that is compiled and read by the sites inside it, so that the compiler
    replaces what they read by that function's argument: no compiled code holds a call, and none reads this one.
    """

    call: Call | None = None


_TRACED = _Traced()


def current_call() -> Call:
    """The call that the running forward pass belongs to.

    Raises:
        PlanError: the model was called directly, around the backbone that instruments it.
    """
    if torch.compiler.is_compiling() and _TRACED.call is not None:
        return _TRACED.call
    call = _CURRENT.get(None)
    if call is None:
        raise PlanError(
            "this model is instrumented by multitune, but its forward pass was called without a plan; call "
            "Backbone.run(plan, ...) or Bank.predict(...), or Backbone.detach() to get the bare model back"
        )
    return call


def run_traced(running: nn.Module, call: Call) -> Tensor:
    """The forward pass as `torch.compile` follows it: the last hidden states `[B, T', D]` of one call."""
    _TRACED.call = call
    try:
        hidden: Tensor = running(**call.inputs).last_hidden_state
        return hidden
    finally:
        _TRACED.call = None


class active:
    """Make `call` the current one for this thread until the block ends, however it ends.

    May be entered again: a graph that is kept recomputes its layers in every backward pass.
    """

    def __init__(self, call: Call, *, again: bool = False) -> None:
        """
        Args:
            again: for recomputation: each time, a fresh copy of the call as it stands now.
        """
        self._call = call.snapshot() if again else call
        self._again = again
        self._tokens: list[Token[Call]] = []

    def __enter__(self) -> None:
        call = self._call.snapshot() if self._again else self._call
        self._tokens.append(_CURRENT.set(call))
        call.enter()

    def __exit__(self, *exception: object) -> None:
        current_call().leave()
        _CURRENT.reset(self._tokens.pop())


def recompute_context() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For `torch.utils.checkpoint(context_fn=...)`: the recomputed forward runs under the call of the first one.

    That includes how often each shared module had run by then: by the backward pass the call itself is past its last
    layer.
    """
    return contextlib.nullcontext(), active(current_call(), again=True)


@dataclass(eq=False)
class Section:
    """The layers `first <= i < stop` of a forward pass; the layers outside hand on the states they are given."""

    stop: int
    """The layer that the pass ends in front of."""
    first: int = 0
    """The layer that the pass begins with."""
    states: Tensor | None = None
    """`[B, T', D]`, rows in plan order: what goes into `first`; `None` where that is the bottom."""
    reached: Tensor | None = None
    """`[B, T', D]`, rows in plan order: what goes into `stop`, once the pass was there."""
    extras: tuple[Any, ...] | None = None
    """What the layers of this pass return beside hidden states, once one has run."""

    def runs(self, layer: int) -> bool:
        """Whether a layer belongs to this section."""
        return self.first <= layer < self.stop


class Stream(Protocol):
    """A source of random numbers of one's own."""

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, torch's global random numbers are this stream's, which goes on where it was."""
        ...

    def copy(self) -> Stream:
        """A stream that goes on from here by itself."""
        ...


class Call:
    """A plan bound to the token ids of one batch; made anew for every forward pass."""

    def __init__(
        self,
        backbone: Backbone,
        plan: Plan,
        batch: Batch,
        stream: Stream | None = None,
    ) -> None:
        """
        Args:
            batch: its rows in the caller's order.
            stream: where random numbers come from if this call is a part of a joint one (`multitune.joint`).

        Raises:
            PlanError: the batch has another number of rows than the plan, an id outside the vocabulary, or a
                row that is too long with its prompt, and names the row; or the plan names a site that the
                backbone lacks.
        """
        self._begin(backbone, plan, stream)
        assert not plan.parts, "a batch in pieces is run piece by piece"
        _check_sites(plan, backbone)
        check_ids(plan, backbone, batch.input_ids)
        batch = batch.map(lambda t: _in_order(t, plan.order))
        ids, mask, types = batch.input_ids, batch.attention_mask, batch.token_type_ids
        self._unshift: Tensor | None = None
        """LSG: where each token `[B, T]` stands now that padding on the left is taken off; `None` if there was none."""
        if backbone.lsg is not None:
            ids, mask, types = self._to_the_left(ids, mask, types)
        self.prompts: Prompts | None = None
        if any(r is not None and r.prompt_length for r in plan.ordered):
            self.prompts = Prompts(plan, backbone.placeholder_id, ids, mask, types, batch.slots)
            ids, mask, types = (
                self.prompts.input_ids,
                self.prompts.attention_mask,
                self.prompts.token_type_ids,
            )
        _check_length(plan, backbone, ids, mask)
        self.lsg_open = None if backbone.lsg is None else self._open_tokens(ids, mask, backbone.lsg)
        """LSG: bool `[B, T']`, which tokens may be attended to; `None` for a backbone that was not converted."""
        self.inputs: dict[str, Any] = {"input_ids": ids}
        if mask is not None and self.lsg_open is None:
            self.inputs["attention_mask"] = mask
        if types is not None and backbone.takes_token_types:
            self.inputs["token_type_ids"] = types
        if backbone.writes:
            self.inputs["use_cache"] = False
        self.inputs |= _positions(plan, backbone, ids, mask)
        self._bias = self._token_bias(ids, self.prompts)
        if backbone.decodes:
            self._read_decoder(batch.decoder_input_ids)

    def _begin(self, backbone: Backbone, plan: Plan, stream: Stream | None = None) -> None:
        """What every call starts with."""
        self.backbone = backbone
        self.plan = plan
        self.stream = stream
        """Where set: this call's own random numbers."""
        self.captured: dict[str, Tensor] = {}
        """Inputs of sub-layers that a parallel bottleneck will read, by site."""
        self.layer = -1
        """The layer that is running."""
        self._passes: dict[tuple[int, ...], int] = {}
        """How often a module that runs as several layers has run, by those layers."""
        self.recorded: dict[str, tuple[Tensor, Tensor]] | None = None
        """Where set: the first row's keys and values `[T, H, K]`, to be filled in by the attention sites."""
        self.cache: RowCache | PairedCache | None = None
        """Where text is generated: keys and values of what came before, the rows' memories among them."""
        self.section: Section | None = None
        """Where set: the layers that run; by default all."""
        self.decoding = False
        """Encoder-decoders: whether the decoder has begun."""
        self.decoder_positions: Tensor | None = None
        """Encoder-decoders with learned positions: where the decoder's tokens stand, int64 `[B, Q]`; by default they
        count from 0."""
        self._decoder_bias: list[TokenRowsOfBatch] = []

    def enter(self) -> None:
        """This call becomes the current one."""

    def leave(self) -> None:
        """This call is no longer the current one."""

    @property
    def reads_cache(self) -> bool:
        """Whether attention that runs now goes through the cache: an encoder's does not."""
        return self.cache is not None and (self.decoding or not self.backbone.decodes)

    def enter_layer(self, layers: tuple[int, ...]) -> int:
        """Note that the module that runs as `layers` starts its next pass; returns which layer that is."""
        if len(layers) == 1:
            self.layer = layers[0]
        else:
            done = self._passes.get(layers, 0)
            self._passes[layers] = done + 1
            self.layer = layers[done]
        return self.layer

    def snapshot(self) -> Call:
        """This call as it stands, from where a layer can be run again without a trace in this one."""
        copied = copy.copy(self)
        copied.captured, copied._passes = {}, dict(self._passes)
        copied.stream = None if self.stream is None else self.stream.copy()
        return copied

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, random numbers come from this call's own stream, if it has one."""
        return contextlib.nullcontext() if self.stream is None else self.stream.drawing()

    def record(self, site: str, key: Tensor, value: Tensor) -> None:
        """Note what a site attends to, `key, value [B, H, T, K]`, if this call was made to find that out.

        LSG's global tokens, which stand in front, are left out.
        """
        if self.recorded is not None:
            lsg = self.backbone.lsg
            first = 0 if lsg is None else lsg.num_global
            self.recorded[site] = key[0, :, first:].transpose(0, 1), value[0, :, first:].transpose(0, 1)

    def _to_the_left(
        self, ids: Tensor, mask: Tensor | None, types: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Every row begins with its first real token, because blocks count from there."""
        lead = None if mask is None else ((mask > 0).cumsum(1) == 0).sum(1, keepdim=True)
        if lead is None or not bool(lead.any()):
            return ids, mask, types
        width = ids.shape[1]
        columns = torch.arange(width, device=ids.device)
        self._unshift = (columns - lead) % width
        shifted = (columns + lead) % width
        moved = [None if t is None else t.gather(1, shifted) for t in (ids, mask, types)]
        assert moved[0] is not None
        return moved[0], moved[1], moved[2]

    def _open_tokens(self, ids: Tensor, mask: Tensor | None, lsg: LSG) -> Tensor:
        is_open = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask > 0
        if lsg.mask_first:
            first = torch.zeros_like(ids[:, :1]) if self.prompts is None else self.prompts.positions[:, :1]
            is_open = is_open.scatter(1, first, False)
        return is_open

    def steps(self, site: str) -> list[Step] | None:
        """What to apply at a site, or `None`."""
        return self.plan.steps.get(site)

    def _read_decoder(self, ids: Tensor | None) -> None:
        """Take in what the decoder reads, `ids [B, U]` in plan order."""
        backbone = self.backbone
        if ids is None:
            raise PlanError(
                f"backbone '{backbone.name}' runs its decoder, which needs decoder_input_ids; to read texts only, load "
                f"its encoder alone, by its name without '+decoder'"
            )
        check_ids(self.plan, backbone, ids)
        if ids.shape[1] > backbone.max_length:
            raise PlanError(
                f"the decoder reads {ids.shape[1]} tokens, but backbone '{backbone.name}' has {backbone.max_length} "
                f"positions; shorten the answers"
            )
        self.inputs["decoder_input_ids"] = ids
        self._decoder_bias = self._token_bias(ids, prompts=None)

    def _token_bias(self, ids: Tensor, prompts: Prompts | None) -> list[TokenRowsOfBatch]:
        found: list[TokenRowsOfBatch] = []
        training = self.backbone.model.training
        for step in self.plan.steps.get("layers", ()):
            assert isinstance(step.delta, TokenBias)
            found.append(_rows_from_factors(step.group, step.delta, ids, training))
        if self.plan.tables:
            found.append(_rows_from_tables(self.plan, ids))
        if prompts is not None:
            for part in found:
                part.silence(prompts.inserted)
        return found

    @property
    def has_token_bias(self) -> bool:
        """Whether any row has a bias at the layers' inputs."""
        return bool(self._bias or self._decoder_bias)

    def into_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """What goes into a layer, `[B, T', D]`, instead of `hidden`; never changed in place."""
        section = self.section
        if section is not None:
            if layer == section.stop:
                section.reached = hidden
            if layer == section.first and section.states is not None:
                hidden = section.states
            if not section.runs(layer):
                return hidden
        return self.add_token_bias(layer, hidden)

    def add_token_bias(self, layer: int, hidden: Tensor) -> Tensor:
        """`hidden [B, T, D]` at a layer's input with the token biases of that layer added; never in place."""
        if not self._bias_at(layer):
            return hidden
        lsg = self.backbone.lsg
        if lsg is not None and lsg.num_global:  # they stand for no token
            front, rest = hidden[:, : lsg.num_global], hidden[:, lsg.num_global :]
            return torch.cat([front, self._add_bias(layer, rest)], dim=1)
        return self._add_bias(layer, hidden)

    def _bias_at(self, layer: int) -> list[TokenRowsOfBatch]:
        """The biases of the tokens that a layer's stack reads."""
        in_decoder = self.backbone.decodes and layer >= self.backbone.num_encoder_layers
        return self._decoder_bias if in_decoder else self._bias

    def _add_bias(self, layer: int, hidden: Tensor) -> Tensor:
        found = self._bias_at(layer)
        only = found[0]
        if len(found) == 1 and only.rows is None:
            return hidden + only.at(layer).to(hidden.dtype)
        hidden = hidden.clone()  # the layer below may have handed out the same tensor
        for part in found:
            bias = part.at(layer).to(hidden.dtype)
            if isinstance(part.rows, Tensor):
                hidden.index_add_(0, part.rows, bias)
            else:
                hidden[part.rows if part.rows is not None else slice(None)] += bias
        return hidden

    def insert_prompts(self, embedded: Tensor) -> Tensor:
        """`embedded [B, T', E]` with the inserted vectors, if there are any, in their places."""
        return embedded if self.prompts is None else self.prompts.insert(embedded)

    def restore(self, hidden: Tensor) -> Tensor:
        """`[B, T', D]` in plan order with prompts to `[B, T, D]` in the caller's order without them.

        LSG: with the global tokens in front, `[B, G + T', D]`, which are taken off first.
        """
        if self.backbone.decodes:  # the decoder's, in whose rows no prompt stands
            return _in_order(hidden, self.plan.inverse)
        lsg = self.backbone.lsg
        first = hidden[:, :1]
        if lsg is not None:
            hidden = hidden[:, lsg.num_global :]
        if self.prompts is not None:
            index = self.prompts.positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)
        if lsg is not None and lsg.mask_first:
            hidden = torch.cat([first, hidden[:, 1:]], dim=1)
        if self._unshift is not None:
            hidden = hidden.gather(1, self._unshift.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return _in_order(hidden, self.plan.inverse)


class StepCall(Call):
    """A plan bound to one new token per row of a batch that generates; what came before lies in a cache."""

    def __init__(
        self, backbone: Backbone, plan: Plan, input_ids: Tensor, positions: Tensor, cache: RowCache | PairedCache
    ) -> None:
        """
        Args:
            input_ids: int64 `[B, 1]`, rows in the plan's order, unlike in other calls.
            positions: int64 `[B]`, where these tokens stand in their rows, counted from 0.
            cache: made ready for this step.
        """
        self._begin(backbone, plan)
        self.cache = cache
        self.prompts = None
        self.lsg_open = None
        self._unshift = None
        self._bias = []
        if backbone.decodes:
            self.decoder_positions = positions[:, None] + torch.arange(input_ids.shape[1], device=positions.device)
            nothing = torch.zeros(len(input_ids), 1, backbone.hidden_size, device=positions.device)  # read at first
            self.inputs = {"input_ids": input_ids, "encoder_hidden_states": nothing.to(backbone.dtype)}
            self.inputs |= {"past_key_values": cache, "use_cache": True}
            self._decoder_bias = self._token_bias(input_ids, prompts=None)
            return
        self.inputs = cache_inputs(cache, input_ids, backbone.position_ids(input_ids, positions))
        self._bias = self._token_bias(input_ids, prompts=None)


def cache_inputs(cache: RowCache | PairedCache, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """A causal model's inputs where a cache makes the masks."""
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": torch.ones_like(input_ids),  # of these tokens alone; without one, models look for padding
        "past_key_values": cache,
        "use_cache": True,
    }


def _in_order(t: Tensor, order: Tensor | None) -> Tensor:
    return t if order is None else t.index_select(0, order.to(t.device))


def _check_sites(plan: Plan, backbone: Backbone) -> None:
    unknown = sorted((plan.steps.keys() | plan.input_steps.keys()) - backbone.site_names)
    if unknown:
        raise PlanError(
            f"the plan has deltas at '{unknown[0]}', but backbone '{backbone.name}' has no such site."
            f"{suggest(unknown[0], backbone.site_names)} Its sites: Backbone.sites"
        )


def check_beside_ids(backbone: Backbone, batch: Batch) -> None:
    """Raise `PlanError` unless what stands beside `input_ids [B, T]` has their rows and tokens, and known token types.

    Not for a pass that continues from another library's cache, whose mask is longer than its ids.
    """
    shape, slots = tuple(batch.input_ids.shape), batch.slots
    for name, given in (("attention_mask", batch.attention_mask), ("token_type_ids", batch.token_type_ids)):
        if given is not None and tuple(given.shape) != shape:
            raise PlanError(
                f"{name} has shape {tuple(given.shape)}, but input_ids has shape {shape}; give it one entry per token, "
                f"or leave it out"
            )
    if slots is not None and (slots.ndim != 2 or slots.shape[0] != shape[0]):
        raise PlanError(f"slots has shape {tuple(slots.shape)}, but there are {shape[0]} rows; give [rows, slots]")
    types, count = batch.token_type_ids, int(getattr(backbone.model.config, "type_vocab_size", 0) or 0)
    if types is None or not backbone.takes_token_types:
        return
    if (found := _outside(types, count)) is not None:
        row, column, wrong = found
        raise PlanError(
            f"row {row}: token type {wrong} at position {column} is outside 0..{count - 1}, which are those of "
            f"backbone '{backbone.name}'; encode the text with this backbone's own tokenizer, or leave token_type_ids "
            f"out"
        )


def _outside(t: Tensor, count: int) -> tuple[int, int, int] | None:
    """Row, column and value of the first entry of `t [B, T]` that is not one of 0, 1, ..., count - 1, if any is."""
    if not t.numel():
        return None
    low, high = t.aminmax()
    if int(low) >= 0 and int(high) < count:
        return None
    row, column = (int(i) for i in ((t < 0) | (t >= count)).nonzero()[0])
    return row, column, int(t[row, column])


def check_ids(plan: Plan, backbone: Backbone, input_ids: Tensor) -> None:
    """Raise `PlanError` unless `input_ids [B, T]` has the plan's rows and ids of the vocabulary; names the row."""
    if input_ids.ndim != 2 or input_ids.shape[0] != plan.num_rows:
        raise PlanError(
            f"the plan is for {plan.num_rows} rows, but input_ids has shape {tuple(input_ids.shape)}; "
            f"make a plan with one entry per row of the batch"
        )
    if (found := _outside(input_ids, backbone.vocab_size)) is not None:
        row, column, wrong = found
        raise PlanError(
            f"row {row}: token id {wrong} at position {column} is outside the vocabulary "
            f"0..{backbone.vocab_size - 1}; encode the text with this backbone's own tokenizer"
        )


def _shift(plan: Plan, device: torch.device) -> Tensor | None:
    """`[B]`: how many positions further on each row's tokens count; `None` where none does."""
    shifts = [0 if r is None else r.position_shift for r in plan.ordered]
    return torch.tensor(shifts, device=device) if any(shifts) else None


def _check_length(plan: Plan, backbone: Backbone, ids: Tensor, mask: Tensor | None) -> None:
    width = ids.shape[1]
    shift = _shift(plan, ids.device)
    ends = None
    if width > backbone.max_length or shift is not None:
        ends = torch.full_like(ids, width)[:, 0] if mask is None else _ends(mask)
        ends = ends if shift is None else ends + shift
    if ends is not None and (width > backbone.max_length or int(ends.max()) > backbone.max_length):
        place = int(ends.argmax())
        row = plan.number(place)
        delta_set = plan.ordered[place]
        prompt = 0 if delta_set is None else delta_set.num_positions
        raise PlanError(
            f"row {row}: {int(ends[place])} positions, {prompt} of them its prompt, in a batch of {width}, but the "
            f"backbone has {backbone.max_length}; truncate its text to {backbone.max_length - prompt} tokens"
        )


def _positions(plan: Plan, backbone: Backbone, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Positions where the model's own would not do.

    They count from each row's first real token, where padding on the left would shift them; padding on the right
    shifts nothing. And they are shifted by a memory that counts as positions.
    """
    shift = _shift(plan, ids.device)
    if backbone.architecture.own_positions and mask is not None and not bool((mask[:, 0] > 0).all()):
        lead = ((mask > 0).cumsum(1) == 0).sum(1)
        shift = -lead if shift is None else shift - lead
    return {} if shift is None else {"position_ids": backbone.position_ids(ids, shift)}


def _ends(mask: Tensor) -> Tensor:
    """`mask [B, T]` to `[B]`: the position behind each row's last real token."""
    return ((mask > 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def _slot_places(plan: Plan, slots: Tensor | None, row: Tensor, number: Tensor) -> Tensor:
    """The words `[P]` in front of which slots `number [P]` of the rows `row [P]` stand.

    Raises:
        PlanError: a row has no such slot; names it.
    """
    known = torch.full_like(row, -1)
    if slots is not None:
        there = number < slots.shape[1]
        known[there] = slots.to(row.device)[row[there], number[there]]
    if bool((known < 0).any()):
        first = int((known < 0).nonzero()[0])
        have = 0 if slots is None else int((slots[int(row[first])] >= 0).sum())
        raise PlanError(
            f"row {plan.number(int(row[first]))}: its prompt has vectors for slot {int(number[first])}, from 0, but "
            f"the row's text has {have} slots; write {{|}} into the task's template where they stand"
        )
    return known


class Prompts:
    """A batch lengthened by inserted vectors: per-row lengths and places, right masks and positions."""

    def __init__(
        self,
        plan: Plan,
        placeholder_id: int,
        ids: Tensor,
        mask: Tensor | None,
        types: Tensor | None,
        slots: Tensor | None = None,
    ) -> None:
        device = ids.device
        num_rows, width = ids.shape
        mask = torch.ones_like(ids) if mask is None else mask.long()
        prompts = [[d for _, d in r.of(Prompt)] if r is not None else [] for r in plan.ordered]
        parts = [d for row in prompts for d in row if isinstance(d, Prompt)]
        lengths = torch.tensor(
            [sum(d.vectors.shape[0] for d in row if isinstance(d, Prompt)) for row in prompts], device=device
        )
        self.vectors = torch.cat([d.vectors for d in parts])
        """`[P, E]`, row after row."""
        at = torch.tensor([a for d in parts for a in d.at], device=device)
        self.row = torch.arange(num_rows, device=device).repeat_interleave(lengths)
        """`[P]`: the row each vector goes into."""
        lead = (mask.cumsum(1) == 0).sum(1)  # left padding stays left of everything
        end = lead + mask.sum(1)
        holes = end != _ends(mask)
        if bool(holes.any()):
            raise PlanError(
                f"row {plan.number(int(holes.nonzero()[0]))}: its attention_mask has a hole, so that a prompt has no "
                f"place in it; put the padding at the row's ends"
            )
        before = torch.where(at < 0, end[self.row], lead[self.row] + at)
        before = torch.minimum(before, end[self.row])
        in_slot = at <= FIRST_SLOT
        if bool(in_slot.any()):
            row = self.row[in_slot]
            place = lead[row] + _slot_places(plan, slots, row, FIRST_SLOT - at[in_slot])
            before[in_slot] = torch.minimum(place, end[row])
            order = (self.row * (width + 1) + before).argsort(stable=True)
            self.vectors, before, in_slot = self.vectors[order], before[order], in_slot[order]
        index_in_row = torch.arange(len(at), device=device) - (lengths.cumsum(0) - lengths)[self.row]
        self.column = before + index_in_row
        """`[P]`: where in the lengthened row each vector stands."""
        inserted = torch.zeros(num_rows, width + 1, dtype=torch.long, device=device)
        inserted.index_put_((self.row, before), torch.ones_like(before), accumulate=True)
        shifted = torch.arange(width, device=device) + inserted[:, :width].cumsum(1)
        new_width = int((end + lengths).max())
        # Padding that would move past the new end has nowhere to go and nothing to say: it lands in a spare column.
        target = shifted.clamp(max=new_width)

        def spread(values: Tensor, fill: int, inserted_value: int) -> Tensor:
            out = torch.full((num_rows, new_width + 1), fill, dtype=values.dtype, device=device)
            out.scatter_(1, target, values)
            out[self.row, self.column] = inserted_value
            return out[:, :new_width]

        # The places of the vectors hold an ordinary id, so that models which count positions from ids count them.
        pad = int(ids[mask == 0][0]) if bool((mask == 0).any()) else 0
        self.input_ids = spread(ids, pad, placeholder_id)
        self.attention_mask = spread(mask, 0, 1)
        self.token_type_ids = None if types is None else spread(types, 0, 0)
        if self.token_type_ids is not None and types is not None and bool(in_slot.any()):  # of the text around them
            inside = types[self.row, before.clamp(max=width - 1)] * in_slot
            self.token_type_ids[self.row, self.column] = inside
        self.positions = shifted.clamp(max=new_width - 1)
        """`[B, T]`: where each original token now stands (padding: anywhere)."""
        self.inserted = torch.zeros(num_rows, new_width, dtype=torch.bool, device=device)
        self.inserted[self.row, self.column] = True

    def insert(self, embedded: Tensor) -> Tensor:
        """`embedded [B, T', E]` with the vectors in their places."""
        return embedded.index_put((self.row, self.column), self.vectors.to(embedded.dtype))


@dataclass(eq=False)
class TokenRowsOfBatch:
    """The token biases of some rows of one batch, for all layers."""

    rows: slice | Tensor | None
    """Which rows: all (`None`), a range, or indices `[R]`."""
    values: Tensor
    """`[N, L, D]`, or `[L, N, D]` when `layer_first`."""
    index: Tensor | None
    """`[R, T]` into N, or `None` when N is already `R * T` in order."""
    shape: tuple[int, int]
    """(R, T)."""
    keep: Tensor | None = None
    """`[R, T, 1]`, 0 where an inserted vector stands."""

    def at(self, layer: int) -> Tensor:
        """Biases `[R, T, D]` of one layer."""
        values = self.values[:, layer]
        bias = F.embedding(self.index, values) if self.index is not None else values.view(*self.shape, -1)
        return bias if self.keep is None else bias * self.keep

    def silence(self, inserted: Tensor) -> None:
        """No bias where `inserted [B, T]` says that a prompt vector stands."""
        mine = inserted if self.rows is None else inserted[self.rows]
        if bool(mine.any()):
            self.keep = (~mine).unsqueeze(-1).to(self.values.dtype)


def _rows_from_factors(group: Group, delta: TokenBias, ids: Tensor, training: bool) -> TokenRowsOfBatch:
    mine = ids if group.rows is None else ids[group.rows]
    shape = (mine.shape[0], mine.shape[1])
    if group.rows is None:
        unique, index = mine.unique(return_inverse=True)
        return TokenRowsOfBatch(None, delta.source.rows(unique, training), index, shape)
    per_slot = mine.reshape(group.num_slots, -1)  # [G, K*T]
    if shape[1] == 1:  # a step of decoding, in which little repeats
        return TokenRowsOfBatch(group.rows, delta.source.rows(per_slot, training).flatten(0, 1), None, shape)
    distinct, index = _distinct(per_slot)
    values = delta.source.rows(distinct, training)  # [G, N, L, D]
    index += distinct.shape[1] * torch.arange(group.num_slots, device=ids.device)[:, None]
    return TokenRowsOfBatch(group.rows, values.flatten(0, 1), index.view(shape), shape)


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids of every slot, and where each id is among them.

    Args:
        ids: int64 `[G, M]`.

    Returns:
        int64 `[G, N]`, N being the most that a slot has, with id 0 where it has fewer; and int64 `[G, M]`, numbers
        below N: `distinct[g, index[g, m]] == ids[g, m]`.
    """
    ordered, order = ids.sort(dim=1)
    is_new = torch.zeros_like(ordered)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    number = is_new.cumsum(1)
    distinct = ids.new_zeros(ids.shape[0], int(number[:, -1].max()) + 1).scatter_(1, number, ordered)
    return distinct, torch.empty_like(ids).scatter_(1, order, number)


def _rows_from_tables(plan: Plan, ids: Tensor) -> TokenRowsOfBatch:
    """Reads each adapter's table once for its rows of the batch: as many reads as there are tables in use."""
    first = plan.tables[0][1].table
    start, stop = plan.tables[0][0].start, plan.tables[-1][0].stop
    width = ids.shape[1]
    rows = slice(start, stop)
    contiguous = sum(r.stop - r.start for r, _ in plan.tables) == stop - start
    values = torch.empty if contiguous else torch.zeros
    dtype = functools.reduce(torch.promote_types, (source.dtype for _, source in plan.tables))
    out = values((stop - start) * width, *first.shape[1:], dtype=dtype, device=first.device)
    for where, source in plan.tables:
        part = out[(where.start - start) * width : (where.stop - start) * width]
        source.rows_into(ids[where].reshape(-1).to(first.device), part)
    return TokenRowsOfBatch(rows, out.to(ids.device), None, (stop - start, width))
