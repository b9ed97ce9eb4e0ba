"""The batch that is decoded: rows enter by a prefill and leave when they are done; in between, one step for all.

Legend: B rows of the batch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multitune.backbone import Backbone
from multitune.call import Call, StepCall, active, cache_inputs
from multitune.deltas import Memory
from multitune.errors import PlanError
from multitune.generation.prompts import make_sequence
from multitune.generation.sampling import choose
from multitune.generation.sequences import BeamSequence, SingleSequence
from multitune.generation.settings import Generation, GenerationSettings
from multitune.kv_cache import MemoryOfRow, RowCache
from multitune.plan import DeltaSet, Plan
from multitune.workspace import Workspace

#: Rows that are done run along until they are more than one in so many: a new plan copies the adapters in use, which
#: costs more than a few idle rows do.
IDLE_ONE_IN = 8

#: Prompts run together up to so many positions, padding included, so that no mask grows without bounds.
PROMPT_POSITIONS = 8192

AnySequence = SingleSequence | BeamSequence


@dataclass(eq=False)
class _Lane:
    """One row of the batch."""

    sequence: AnySequence
    token: int
    """What it goes on with."""
    position: int
    """Where that stands in its row, counted from 0."""
    beam: int = 0
    """Which of its sequence's beams it is."""


class DecodingBatch:
    """Rows under one plan, and their cache. Not safe under threads."""

    def __init__(self, backbone: Backbone, workspace: Workspace | None = None) -> None:
        """
        Raises:
            BackboneError: no causal language model, or one without its head.
            PlanError: the backbone is detached.
        """
        self.backbone = backbone
        self._head = backbone.lm_head
        self._workspace = workspace
        self._attention = {s.name: s.layer for s in backbone.sites if s.kind == "attention" and s.layer is not None}
        self._memories: dict[DeltaSet, MemoryOfRow] = {}
        self._plan: Plan | None = None
        self._order: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._lanes: list[_Lane] = []
        """The row in every slot of the cache."""
        self._cache = RowCache(self.backbone.num_layers, self.backbone.device)
        self._forget_plan()

    @property
    def sequences(self) -> list[AnySequence]:
        """Those that are not done."""
        return list(dict.fromkeys(lane.sequence for lane in self._lanes if lane.sequence.finish_reason is None))

    @property
    def num_rows(self) -> int:
        """Rows that are not done."""
        return sum(lane.sequence.finish_reason is None for lane in self._lanes)

    def _check_idle(self) -> None:
        """Checked before every pass: a run that starts meanwhile would put dropout into the text."""
        if self.backbone.model.training:
            raise PlanError("the backbone is in training mode (a training run is using it); wait for it to end")
        self.backbone.check_attached()

    # ---------------------------------------------------------------- entering

    def enter(self, sequences: Sequence[AnySequence], plan: Plan | None = None) -> None:
        """Run the prompts of new sequences, and choose their first tokens.

        Args:
            plan: the plan of these rows; by default it is made.
        """
        if not sequences:
            return
        self._check_idle()
        self._sweep(all_idle=True)
        self._forget_plan()
        alone = not self._lanes and all(s.num_rows == 1 for s in sequences)
        pieces = _by_length(sequences) if plan is None else [list(sequences)]
        with torch.no_grad():
            for piece in pieces:
                own = Plan([s.deltas for s in piece], self._workspace) if plan is None else plan
                for rows, part in own.parts or ((list(range(len(piece))), own),):
                    self._prefill([piece[i] for i in rows], part)
        if alone and len(pieces) == 1 and not own.parts:  # the rows are in its order, so the next steps need no other
            self._plan = own

    def _prefill(self, sequences: list[AnySequence], plan: Plan) -> None:
        ids, mask, lengths = self._padded(sequences)
        call = Call(self.backbone, plan, ids, mask, None)
        order = range(len(sequences)) if plan.order is None else plan.order.tolist()
        ordered = [sequences[i] for i in order]
        prompts = [0 if s.deltas is None else s.deltas.prompt_length for s in ordered]
        taken = [lengths[i] + n for i, n in zip(order, prompts, strict=True)]
        shifts = [0 if s.deltas is None else s.deltas.position_shift for s in ordered]
        first = len(self._lanes)
        self._cache.enter(taken, [self._memory_of(s.deltas) for s in ordered])
        entered = call.inputs["input_ids"]
        positions = self.backbone.position_ids(entered, torch.tensor(shifts, device=entered.device))
        call.cache, call.inputs = self._cache, cache_inputs(self._cache, entered, positions)
        with active(call):
            hidden = self.backbone.running(**call.inputs).last_hidden_state
        self._cache.finish()
        self._lanes += [_Lane(s, 0, n + shift) for s, n, shift in zip(ordered, taken, shifts, strict=True)]
        ends = torch.tensor(taken, device=hidden.device) - 1
        last = hidden.gather(1, ends[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        self._choose(list(range(first, len(self._lanes))), self._head(last).float())
        for slot in range(first, first + len(ordered)):
            self._spread_beams(slot)

    def _padded(self, sequences: list[AnySequence]) -> tuple[Tensor, Tensor | None, list[int]]:
        """Prompts as ids `[B, T]` and mask `[B, T]`, padded on the right."""
        lengths = [len(s.prompt) for s in sequences]
        width, pad = max(lengths), self.backbone.pad_id
        device = self.backbone.device
        ids = torch.tensor([[*s.prompt, *[pad] * (width - len(s.prompt))] for s in sequences], device=device)
        if min(lengths) == width:
            return ids, None, lengths
        return ids, (torch.arange(width) < torch.tensor(lengths)[:, None]).long().to(device), lengths

    def _memory_of(self, deltas: DeltaSet | None) -> MemoryOfRow:
        """By layer the memory's keys and values `[H, M, K]`, without what only pads it to a common length."""
        if deltas is None:
            return {}
        if deltas not in self._memories:
            found: dict[int, tuple[Tensor, Tensor]] = {}
            for site, delta in deltas.of(Memory):
                assert isinstance(delta, Memory)
                keys, values, is_open = delta.keys, delta.values, delta.open > 0
                count = int(is_open.sum())
                if bool(is_open[:count].all()):
                    keys, values = keys[:count], values[:count]
                else:
                    keys, values = keys[is_open], values[is_open]
                found[self._attention[site]] = keys.transpose(0, 1), values.transpose(0, 1)
            self._memories[deltas] = found
        return self._memories[deltas]

    def _spread_beams(self, slot: int) -> None:
        """After a prefill: as many rows as there are beams, all with the prompt's keys and values."""
        lane = self._lanes[slot]
        sequence = lane.sequence
        if not isinstance(sequence, BeamSequence) or sequence.finish_reason is not None:
            return
        tokens = sequence.next_tokens()
        self._cache.repeat(slot, len(tokens) - 1)
        lane.token = tokens[0]
        self._lanes += [_Lane(sequence, token, lane.position, beam) for beam, token in enumerate(tokens[1:], start=1)]

    # ---------------------------------------------------------------- stepping

    def step(self) -> None:
        """One more token for every row that is not done."""
        self._check_idle()
        self._sweep()
        if not self.num_rows:
            return
        with torch.no_grad():
            plan = self._current_plan()
            order = None if self._order is None else self._order.to(self.backbone.device)
            ids, positions = (
                torch.tensor(values, device=self.backbone.device)
                for values in ([lane.token for lane in self._lanes], [lane.position for lane in self._lanes])
            )
            if order is not None:
                ids, positions = ids[order], positions[order]
            self._cache.step(order)
            call = StepCall(self.backbone, plan, ids[:, None], positions, self._cache)
            with active(call):
                hidden = self.backbone.running(**call.inputs).last_hidden_state[:, 0]
            going = [i for i, lane in enumerate(self._lanes) if lane.sequence.finish_reason is None]
            self._cache.finish(going)
            for slot in going:
                self._lanes[slot].position += 1
            if order is not None:
                hidden = hidden.index_select(0, order.argsort())
            if len(going) < len(self._lanes):
                hidden = hidden[going]
            self._choose(going, self._head(hidden).float())

    def _current_plan(self) -> Plan:
        if self._plan is None:
            self._plan = Plan([lane.sequence.deltas for lane in self._lanes], self._workspace, split=False)
            self._order = self._plan.order
        return self._plan

    def _forget_plan(self) -> None:
        self._plan, self._order = None, None  # first of all, so that its buffers are free for the next one

    def _choose(self, slots: Sequence[int], logits: Tensor) -> None:
        """Give the sequences in these slots the token that follows, from `logits [len(slots), V]`."""
        single = [(i, slot) for i, slot in enumerate(slots) if isinstance(self._lanes[slot].sequence, SingleSequence)]
        if single:
            mine = logits if len(single) == len(slots) else logits[[i for i, _ in single]]
            sequences = [self._lanes[slot].sequence for _, slot in single]
            choosers = [s.chooser for s in sequences if isinstance(s, SingleSequence)]
            tokens, logprobs = choose(mine, choosers, any(s.settings.logprobs for s in sequences))
            for (_, slot), sequence, token, logprob in zip(single, sequences, tokens, logprobs, strict=True):
                assert isinstance(sequence, SingleSequence)
                sequence.push(token, logprob)
                self._lanes[slot].token = token
        by_beam: dict[BeamSequence, list[tuple[int, int]]] = {}
        for i, slot in enumerate(slots):
            sequence = self._lanes[slot].sequence
            if isinstance(sequence, BeamSequence):
                by_beam.setdefault(sequence, []).append((i, slot))
        self._choose_beams(by_beam, logits)

    def _choose_beams(self, by_beam: dict[BeamSequence, list[tuple[int, int]]], logits: Tensor) -> None:
        targets: list[int] = []
        sources: list[int] = []
        for sequence, places in by_beam.items():
            places.sort(key=lambda place: self._lanes[place[1]].beam)  # rows that left may have moved these
            sequence.push(logits[[i for i, _ in places]])
            mine = [slot for _, slot in places]
            if sequence.finish_reason is not None or len(mine) < sequence.num_rows:
                continue  # done, or just entered with one row for all beams
            for slot, source, token in zip(mine, sequence.sources(), sequence.next_tokens(), strict=True):
                self._lanes[slot].token = token
                if mine[source] != slot:
                    targets.append(slot)
                    sources.append(mine[source])
        if targets:
            self._cache.reorder(targets, sources)

    # ---------------------------------------------------------------- leaving

    def _sweep(self, *, all_idle: bool = False) -> None:
        """Take out the rows that are done, once they are many or with `all_idle`."""
        done = [i for i, lane in enumerate(self._lanes) if lane.sequence.finish_reason is not None]
        if len(done) == len(self._lanes):
            if self._lanes:
                self._clear()
            self._memories.clear()
            return
        if not done or (not all_idle and len(done) * IDLE_ONE_IN <= len(self._lanes)):
            return
        for slot in reversed(done):
            self._cache.remove(slot)
            self._lanes[slot] = self._lanes[-1]
            del self._lanes[-1]
        self._forget_plan()


def _by_length(sequences: Sequence[AnySequence]) -> list[list[AnySequence]]:
    """Sequences whose prompts run together: of similar length, so that little of a pass is padding."""
    pieces: list[list[AnySequence]] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.prompt)):
        width = len(pieces[-1][0].prompt) if pieces else 0
        if not pieces or (len(pieces[-1]) + 1) * width > PROMPT_POSITIONS or len(sequence.prompt) * 2 < width:
            pieces.append([])
        pieces[-1].append(sequence)
    return pieces


def check_room(backbone: Backbone, sequence: AnySequence, name: str) -> None:
    """Raise `PlanError` for a prompt without tokens, with unknown ones, or too long with what it may generate.

    Args:
        name: what the message calls the row, such as "row 3".
    """
    if not sequence.prompt:
        raise PlanError(f"{name}: its prompt has no tokens; give at least one")
    wrong = next((i for i in sequence.prompt if not 0 <= i < backbone.vocab_size), None)
    if wrong is not None:
        raise PlanError(
            f"{name}: token id {wrong} is outside the vocabulary 0..{backbone.vocab_size - 1}; encode the text with "
            f"this backbone's own tokenizer"
        )
    if sequence.num_positions > backbone.max_length:
        new = sequence.settings.max_new_tokens
        beside = sequence.num_positions - new - len(sequence.prompt)
        prompt = f", {beside} of its adapter's prompt" if beside else ""
        raise PlanError(
            f"{name}: {len(sequence.prompt)} tokens{prompt} and up to {new} new ones are "
            f"{sequence.num_positions} positions, but backbone '{backbone.name}' has {backbone.max_length}; shorten "
            f"the text, or lower max_new_tokens by {sequence.num_positions - backbone.max_length}"
        )


def generate(
    backbone: Backbone,
    plan: Plan,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: Sequence[GenerationSettings],
) -> list[Generation]:
    """Decode one batch under a plan; see `Backbone.generate`."""
    if input_ids.ndim != 2 or len(input_ids) != plan.num_rows:
        raise PlanError(
            f"the plan is for {plan.num_rows} rows, but input_ids has shape {tuple(input_ids.shape)}; "
            f"make a plan with one entry per row of the batch"
        )
    sequences = []
    for row, (deltas, own) in enumerate(zip(plan.rows, settings, strict=True)):
        is_open = None if attention_mask is None else attention_mask[row] > 0
        if is_open is not None and int(is_open[0]) + int((is_open[1:] & ~is_open[:-1]).sum()) > 1:
            raise PlanError(f"row {row}: its attention_mask has a hole; put the padding at the row's ends")
        ids = input_ids[row] if is_open is None else input_ids[row][is_open]
        sequences.append(make_sequence(backbone, tuple(ids.tolist()), deltas, own))
        check_room(backbone, sequences[-1], f"row {row}")
    batch = DecodingBatch(backbone)
    batch.enter(sequences, plan)
    while batch.num_rows:
        batch.step()
    return [s.result() for s in sequences]
