"""One forward pass: a plan bound to one batch. Routing is data of the call, never of the model.

Sites find it through `current.py`, which says how long a call is the current one.

Legend: B rows, T tokens of the longest row, T' with what is inserted, E embedding width, D width.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from multitune.batch_checks import check_ids, check_sites
from multitune.errors import PlanError
from multitune.inputs import Batch
from multitune.inserted import Prompts
from multitune.plan import Plan, Step
from multitune.positions import check_length, position_inputs
from multitune.token_biases import TokenRowsOfBatch, add_biases, token_biases

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.cross_cache import PairedCache
    from multitune.kv_cache import RowCache
    from multitune.lsg import LSG


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

    pieces: Tensor | None
    """Where rows hold several texts: int64 `[B, T]` in plan order, as `Batch.pieces`."""

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
        check_sites(plan, backbone)
        check_ids(plan, backbone, batch.input_ids)
        batch = batch.map(lambda t: _in_order(t, plan.order))
        ids, mask, types = batch.input_ids, batch.attention_mask, batch.token_type_ids
        self._unshift: Tensor | None = None
        """LSG: where each token `[B, T]` stands now that padding on the left is taken off; `None` if there was none."""
        if backbone.lsg is not None:
            ids, mask, types = self._to_the_left(ids, mask, types)
        self.prompts: Prompts | None = None
        self.pieces = batch.pieces
        if any(r is not None and r.prompt_length for r in plan.ordered):
            _refuse_pieces(plan, batch.pieces)
            self.prompts = Prompts(plan, backbone.placeholder_id, ids, mask, types, batch.slots)
            ids, mask, types = (
                self.prompts.input_ids,
                self.prompts.attention_mask,
                self.prompts.token_type_ids,
            )
        check_length(plan, backbone, ids, mask)
        self.lsg_open = None if backbone.lsg is None else self._open_tokens(ids, mask, backbone.lsg)
        """LSG: bool `[B, T']`, which tokens may be attended to; `None` for a backbone that was not converted."""
        self.inputs = self._model_inputs(ids, mask, types)
        self._bias = self._token_bias(ids, self.prompts)
        if backbone.decodes:
            self._read_decoder(batch.decoder_input_ids)

    def _model_inputs(self, ids: Tensor, mask: Tensor | None, types: Tensor | None) -> dict[str, Any]:
        """What the model is called with; mask, token types and positions where it needs them."""
        backbone = self.backbone
        inputs: dict[str, Any] = {"input_ids": ids}
        if mask is not None and self.lsg_open is None:
            inputs["attention_mask"] = mask
        if types is not None and backbone.takes_token_types:
            inputs["token_type_ids"] = types
        if backbone.writes:
            inputs["use_cache"] = False
        return inputs | position_inputs(self.plan, backbone, ids, mask, self.pieces)

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
        self.pieces = None
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
        inserted = None if prompts is None else prompts.inserted
        return token_biases(self.plan, ids, inserted, training=self.backbone.model.training)

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
        found = self._bias_at(layer)
        if not found:
            return hidden
        lsg = self.backbone.lsg
        if lsg is not None and lsg.num_global:  # they stand for no token
            front, rest = hidden[:, : lsg.num_global], hidden[:, lsg.num_global :]
            return torch.cat([front, add_biases(found, layer, rest)], dim=1)
        return add_biases(found, layer, hidden)

    def _bias_at(self, layer: int) -> list[TokenRowsOfBatch]:
        """The biases of the tokens that a layer's stack reads."""
        in_decoder = self.backbone.decodes and layer >= self.backbone.num_encoder_layers
        return self._decoder_bias if in_decoder else self._bias

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


def _refuse_pieces(plan: Plan, pieces: Tensor | None) -> None:
    """Raise `PlanError` where rows whose adapters insert vectors hold several texts; names the row."""
    if pieces is None:
        return
    place = next(i for i, r in enumerate(plan.ordered) if r is not None and r.prompt_length)
    raise PlanError(
        f"row {plan.number(place)}: its adapter inserts vectors into a row (a prompt), which have one place there, and "
        f"pieces puts several texts into it; give every text a row of its own"
    )


def _in_order(t: Tensor, order: Tensor | None) -> Tensor:
    return t if order is None else t.index_select(0, order.to(t.device))
