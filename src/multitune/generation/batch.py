"""The batch that is decoded: rows enter by a prefill and leave when they are done; in between, one step for all.

Legend: B rows of the batch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from multitune.backbone import Backbone
from multitune.batch_checks import check_beside_ids
from multitune.call import Call, StepCall, cache_inputs
from multitune.cross_cache import PairedCache
from multitune.current import active
from multitune.deltas import Memory, Prompt
from multitune.deltas.prompt import FIRST_SLOT
from multitune.errors import PlanError
from multitune.generation.prompts import make_sequence
from multitune.generation.sampling import choose
from multitune.generation.sequences import BeamSequence, SingleSequence
from multitune.generation.settings import Generation, GenerationSettings
from multitune.inputs import Batch
from multitune.kv_cache import MemoryOfRow, RowCache
from multitune.plan import DeltaSet, Plan
from multitune.workspace import Workspace

#: Rows that are done run along until they are more than one in so many: a new plan copies the adapters in use, which
#: costs more than a few idle rows do.
IDLE_ONE_IN = 8

#: Prompts run together up to so many positions, padding included, so that no mask grows without bounds.
PROMPT_POSITIONS = 8192

#: What prompts have in common is run once where that saves so many positions; below it a second pass costs more.
SHARED_POSITIONS = 64

#: Logits of words beside the one that a text is made to begin with.
_UNLIKELY = -1.0e9

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
        first = backbone.num_encoder_layers if backbone.decodes else 0
        at = [(s, s.layer - first) for s in backbone.sites if s.kind == "attention" and s.layer is not None]
        self._attention = {s.name: layer for s, layer in at if s.stack in (None, "decoder")}
        """By site whose keys and values every step adds to: the cache's layer."""
        self._cross = {s.name: layer for s, layer in at if s.stack == "cross"}
        """The same of attention to an encoder's output."""
        self._start = backbone.start_ids
        # Kept no longer than their adapters are: a batch that is never empty sees many come and go.
        self._memories: MutableMapping[DeltaSet, tuple[MemoryOfRow, MemoryOfRow]] = WeakKeyDictionary()
        self._plan: Plan | None = None
        self._order: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._lanes: list[_Lane] = []
        """The row in every slot of the cache."""
        layers, device = self.backbone.num_layers, self.backbone.device
        self._cache: RowCache | PairedCache
        if self.backbone.decodes:
            self._cache = PairedCache(layers - self.backbone.num_encoder_layers, device)
        else:
            self._cache = RowCache(layers, device)
        self._forget_plan()

    @property
    def sequences(self) -> list[AnySequence]:
        """Those that are not done."""
        return list(dict.fromkeys(lane.sequence for lane in self._lanes if lane.sequence.finish_reason is None))

    @property
    def num_rows(self) -> int:
        """Rows that are not done."""
        return sum(lane.sequence.finish_reason is None for lane in self._lanes)

    def _check_ready(self) -> None:
        """Checked before every pass: a run that starts meanwhile would put dropout into the text."""
        self.backbone.check_idle()
        self.backbone.check_attached()

    # ---------------------------------------------------------------- entering

    def enter(self, sequences: Sequence[AnySequence], plan: Plan | None = None) -> None:
        """Run the prompts of new sequences, and choose their first tokens.

        What the prompts of one adapter have in common (instructions, examples) runs once for all of them.

        Args:
            plan: the plan of these rows; by default it is made.
        """
        if not sequences:
            return
        self._check_ready()
        self._sweep(all_idle=True)
        self._forget_plan()
        alone = not self._lanes and all(s.num_rows == 1 for s in sequences)
        shares = plan is None and not self.backbone.decodes
        groups, others = _sharing(sequences) if shares else ([], list(sequences))
        pieces = _by_length(others) if plan is None else [others]
        own = plan
        with torch.no_grad():
            if groups:
                self._prefill_shared(groups)
            for piece in pieces:
                own = Plan([s.deltas for s in piece], self._workspace) if plan is None else plan
                for rows, part in own.parts or ((list(range(len(piece))), own),):
                    self._prefill([piece[i] for i in rows], part)
        if alone and not groups and len(pieces) == 1 and own is not None and not own.parts:
            self._plan = own  # the rows are in its order, so the next steps need no other

    def _prefill(self, sequences: list[AnySequence], plan: Plan) -> None:
        """Run whole prompts, and choose the first tokens."""
        first = len(self._lanes)
        hidden, order = self._read([s.prompt for s in sequences], plan)
        for slot, i in enumerate(order, start=first):
            self._lanes.append(_Lane(sequences[i], 0, self._next_position(slot, sequences[i].deltas)))
        counts = [self._cache.num_tokens(slot) for slot in range(first, len(self._lanes))]
        self._begin(first, _last(hidden, counts))

    def _prefill_shared(self, groups: list[_Sharing]) -> None:
        """Run what the prompts of a group have in common once, copy its keys and values, and run the rest of each."""
        first = len(self._lanes)
        assert isinstance(self._cache, RowCache)  # an encoder sees all of a prompt, so that nothing of it is shared
        groups = sorted(groups, key=lambda g: -len(g.prefix))
        waiting: list[list[AnySequence]] = []
        for at in _runs([len(g.prefix) for g in groups]):
            _, order = self._read([g.prefix for g in groups[at]], self._plan_of(groups[at]))
            waiting += [sorted(groups[at][i].sequences, key=lambda s: -len(s.prompt)) for i in order]
        sequences = [members[0] for members in waiting]
        for slot, members in enumerate(waiting, start=first):
            self._cache.repeat(slot, len(members) - 1)
            sequences += members[1:]
        rest = [s.prompt[self._cache.num_tokens(first + i) - _inserted(s) :] for i, s in enumerate(sequences)]
        starts = [self._next_position(first + i, s.deltas) for i, s in enumerate(sequences)]
        last = []
        for at in _runs([len(r) for r in rest]):
            plan, counts = self._plan_of(sequences[at]), [len(r) for r in rest[at]]
            self._cache.extend(first + at.start, counts, self._on_device(plan.order))
            ids, _ = self._padded(rest[at])
            hidden = self._run_step(plan, ids, torch.tensor(starts[at], device=self.backbone.device), plan.order)
            self._cache.finish()
            last.append(_last(hidden, counts))
        self._lanes += [_Lane(s, 0, start + len(r)) for s, start, r in zip(sequences, starts, rest, strict=True)]
        self._begin(first, torch.cat(last))

    def _plan_of(self, rows: Sequence[AnySequence | _Sharing]) -> Plan:
        return Plan([row.deltas for row in rows], self._workspace, split=False)

    def _read(self, prompts: list[tuple[int, ...]], plan: Plan) -> tuple[Tensor, list[int]]:
        """Run prompts from their beginning in new slots; an encoder-decoder's decoder then reads its first token.

        Returns:
            Last hidden states `[B, T, D]` of what the slots now hold, with inserted vectors, padded on the right, rows
            in the order of the slots; and for every slot the prompt that is in it.
        """
        ids, mask = self._padded(prompts)
        start = ids.new_tensor([self._start]).expand(len(ids), -1) if self.backbone.decodes else None
        call = Call(self.backbone, plan, Batch(input_ids=ids, attention_mask=mask, decoder_input_ids=start))
        order = list(range(len(prompts))) if plan.order is None else plan.order.tolist()
        taken = [len(prompts[i]) + (d.prompt_length if d else 0) for i, d in zip(order, plan.ordered, strict=True)]
        own, cross = zip(*(self._memory_of(d) for d in plan.ordered), strict=True)
        call.cache = self._cache
        if isinstance(self._cache, PairedCache):
            self._cache.enter([len(self._start)] * len(order), own, taken, cross)
            call.inputs |= {"past_key_values": self._cache, "use_cache": True}
            # The model counts from the cache's columns, some of which may be memories.
            call.decoder_positions = torch.arange(len(self._start), device=ids.device).expand(len(ids), -1)
        else:
            self._cache.enter(taken, own)
            shifts = [d.position_shift if d else 0 for d in plan.ordered]
            entered = call.inputs["input_ids"]
            positions = self.backbone.position_ids(entered, torch.tensor(shifts, device=entered.device))
            call.inputs = cache_inputs(self._cache, entered, positions)
        with active(call):
            hidden: Tensor = self.backbone.running(**call.inputs).last_hidden_state
        self._cache.finish()
        return hidden, order

    def _begin(self, first: int, last: Tensor) -> None:
        """Choose the first tokens of the sequences from slot `first` on, and give beams their rows.

        Args:
            last: last hidden states of their prompts' ends `[B, D]`, rows by slot.
        """
        slots = range(first, len(self._lanes))
        logits, forced = self._head(last).float(), self.backbone.parts.first_id
        if forced is not None:  # for sure, and every other word with hardly a chance: beams need finite scores
            logits = torch.full_like(logits, _UNLIKELY).index_fill(1, torch.tensor(forced, device=logits.device), 0.0)
        self._choose(slots, logits)
        for slot in slots:
            self._spread_beams(slot)

    def _next_position(self, slot: int, deltas: DeltaSet | None) -> int:
        """Where a slot's next token stands."""
        return self._cache.num_tokens(slot) + (deltas.position_shift if deltas is not None else 0)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Ids `[B, T]` and mask `[B, T]`, padded on the right."""
        lengths = [len(p) for p in prompts]
        width, pad = max(lengths), self.backbone.pad_id
        device = self.backbone.device
        ids = torch.tensor([[*p, *[pad] * (width - len(p))] for p in prompts], device=device)
        if min(lengths) == width:
            return ids, None
        return ids, (torch.arange(width) < torch.tensor(lengths)[:, None]).long().to(device)

    def _on_device(self, order: Tensor | None) -> Tensor | None:
        return None if order is None else order.to(self.backbone.device)

    def _run_step(self, plan: Plan, ids: Tensor, positions: Tensor, order: Tensor | None) -> Tensor:
        """Last hidden states `[B, Q, D]` of ids `[B, Q]` that follow what the cache holds, all of them by slot."""
        order = self._on_device(order)
        if order is not None:
            ids, positions = ids[order], positions[order]
        call = StepCall(self.backbone, plan, ids, positions, self._cache)
        with active(call):
            hidden: Tensor = self.backbone.stepping(**call.inputs).last_hidden_state
        return hidden if order is None else hidden.index_select(0, order.argsort())

    def _memory_of(self, deltas: DeltaSet | None) -> tuple[MemoryOfRow, MemoryOfRow]:
        """By layer the memory's keys and values `[H, M, K]`, without what only pads it to a common length.

        Returns:
            Those of attention to what the row holds, and those of attention to an encoder's output.
        """
        if deltas is None:
            return {}, {}
        if deltas not in self._memories:
            found: dict[int, tuple[Tensor, Tensor]] = {}
            cross: dict[int, tuple[Tensor, Tensor]] = {}
            memories = [(site, d) for site, d in deltas.of(Memory) if isinstance(d, Memory)]
            # One look at the values for all layers, because a device is waited for at each.
            flags = torch.cat([d.open > 0 for _, d in memories]).tolist() if memories else []
            for site, delta in memories:
                is_open, flags = flags[: len(delta.open)], flags[len(delta.open) :]
                count = sum(is_open)
                kept: slice | list[int] = slice(count)  # a view, but where entries between others are closed
                if not all(is_open[:count]):
                    kept = [i for i, whole in enumerate(is_open) if whole]
                keys, values = delta.keys[kept], delta.values[kept]
                for layers, into in ((self._attention, found), (self._cross, cross)):
                    if site in layers:
                        into[layers[site]] = keys.transpose(0, 1), values.transpose(0, 1)
            self._memories[deltas] = found, cross
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
        self._check_ready()
        self._sweep()
        if not self.num_rows:
            return
        with torch.no_grad():
            plan = self._current_plan()
            self._cache.step(self._on_device(self._order))
            ids, positions = (
                torch.tensor(values, device=self.backbone.device)
                for values in ([lane.token for lane in self._lanes], [lane.position for lane in self._lanes])
            )
            hidden = self._run_step(plan, ids[:, None], positions, self._order)[:, 0]
            going = [i for i, lane in enumerate(self._lanes) if lane.sequence.finish_reason is None]
            self._cache.finish(going)
            for slot in going:
                self._lanes[slot].position += 1
            if len(going) < len(self._lanes):
                hidden = hidden[going]
            self._choose(going, self._head(hidden).float())

    def _current_plan(self) -> Plan:
        if self._plan is None:
            self._plan = self._plan_of([lane.sequence for lane in self._lanes])
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


@dataclass(frozen=True)
class _Sharing:
    """Sequences of one adapter whose prompts begin alike."""

    prefix: tuple[int, ...]
    sequences: list[AnySequence]

    @property
    def deltas(self) -> DeltaSet | None:
        return self.sequences[0].deltas


def _sharing(sequences: Sequence[AnySequence]) -> tuple[list[_Sharing], list[AnySequence]]:
    """Groups that share enough of their prompts' beginnings to run it once, and the other sequences."""
    by_deltas: dict[DeltaSet | None, list[AnySequence]] = {}
    for s in sequences:
        by_deltas.setdefault(s.deltas, []).append(s)
    groups, others = [], []
    for deltas, members in by_deltas.items():
        prompts = [s.prompt[:-1] for s in members]  # at least one token of each is left to run
        low, high = min(prompts), max(prompts)  # what these two share, all share
        count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        # Inserted vectors must stand in the part that is shared, or in front of what follows it.
        places = [a for _, d in deltas.of(Prompt) if isinstance(d, Prompt) for a in d.at] if deltas is not None else []
        if count * (len(members) - 1) >= SHARED_POSITIONS and all(0 <= a <= count for a in places):
            groups.append(_Sharing(low[:count], members))
        else:
            others += members
    return groups, others


def _last(hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """Of states `hidden [B, T, D]`, of which so many are each row's own, the last: `[B, D]`."""
    ends = torch.tensor(counts, device=hidden.device) - 1
    return hidden.gather(1, ends[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


def _runs(lengths: Sequence[int]) -> list[slice]:
    """Which neighbours run together: as many as fill, padded to the longest of them, `PROMPT_POSITIONS` at most."""
    found, start = [], 0
    for i in range(1, len(lengths)):
        if (i + 1 - start) * max(lengths[start : i + 1]) > PROMPT_POSITIONS:
            found.append(slice(start, i))
            start = i
    return [*found, slice(start, len(lengths))]


def _inserted(sequence: AnySequence) -> int:
    """How many vectors its adapter inserts."""
    return 0 if sequence.deltas is None else sequence.deltas.prompt_length


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
    """Raise `PlanError` for a prompt without tokens, with unknown ones, or too long with what it may generate, and for
    an adapter whose vectors have no place in it.

    Args:
        name: what the message calls the row, such as "row 3".
    """
    if not sequence.prompt:
        raise PlanError(f"{name}: its prompt has no tokens; give at least one")
    places = [] if sequence.deltas is None else sequence.deltas.of(Prompt)
    if any(place <= FIRST_SLOT for _, d in places if isinstance(d, Prompt) for place in d.at):
        raise PlanError(
            f"{name}: its adapter's vectors stand in slots of a task's text, and a prompt to write from has none; ask "
            f"an adapter whose vectors stand around the text, or none"
        )
    wrong = next((i for i in sequence.prompt if not 0 <= i < backbone.vocab_size), None)
    if wrong is not None:
        raise PlanError(
            f"{name}: token id {wrong} is outside the vocabulary 0..{backbone.vocab_size - 1}; encode the text with "
            f"this backbone's own tokenizer"
        )
    if backbone.decodes:
        _check_decoder_room(backbone, sequence, name)
        return
    if sequence.num_positions > backbone.max_length:
        new = sequence.settings.max_new_tokens
        beside = sequence.num_positions - new - len(sequence.prompt)
        prompt = f", {beside} of its adapter's prompt" if beside else ""
        over = sequence.num_positions - backbone.max_length
        fix = f", or lower max_new_tokens by {over}" if over < new else ", which leaves no room for a new token"
        raise PlanError(
            f"{name}: {len(sequence.prompt)} tokens{prompt} and up to {new} new ones are "
            f"{sequence.num_positions} positions, but backbone '{backbone.name}' has {backbone.max_length}; shorten "
            f"the text{fix}"
        )


def _check_decoder_room(backbone: Backbone, sequence: AnySequence, name: str) -> None:
    """`check_room` of an encoder-decoder, whose decoder has positions of its own."""
    new, most = sequence.settings.max_new_tokens, backbone.max_length
    beside = 0 if sequence.deltas is None else sequence.deltas.num_positions
    if len(sequence.prompt) + beside > most:
        raise PlanError(
            f"{name}: {len(sequence.prompt)} tokens and {beside} of its adapter's prompt, but the encoder of backbone "
            f"'{backbone.name}' has {most} positions; shorten the text"
        )
    if new > most:
        raise PlanError(
            f"{name}: up to {new} new tokens, but the decoder of backbone '{backbone.name}' has {most} positions; "
            f"give max_new_tokens={most} at most"
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
    check_beside_ids(backbone, Batch(input_ids=input_ids, attention_mask=attention_mask))
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
