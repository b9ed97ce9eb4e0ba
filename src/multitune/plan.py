"""Plans: which rows of one batch use which deltas, and the tensors packed for them.

A plan is made from one `DeltaSet` (or `None`, the bare backbone) per row. Rows are ordered so that the rows
of one slot, and the slots of one kind and shape, lie side by side; the order is undone at the end. Deltas of
one kind and shape are packed into one stacked tensor, so that the work at a site is one batched product per
kind of delta, however many tasks there are.

Legend: B rows, G slots in a group, K rows per slot, T tokens, S shared shape ("signature").
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from multitune.deltas import ORDER, Delta, Memory, Prompt, TableRows, TokenBias
from multitune.errors import ConfigError
from multitune.workspace import Buffer, Workspace

#: A group whose rows per slot differ is packed once per row while that copy stays below this many bytes, and is
#: split by rows per slot above it. Both forms give the same result; the limit only trades memory for time.
PER_ROW_BYTES = 256 * 2**20

#: Rows with and without prompts run as two pieces when running them together would lengthen the rows by more than
#: this many positions in all: below it a second pass costs more than the positions do.
SPLIT_POSITIONS = 256

#: Stands for a kind, its settings and the shapes at every site; interned, because comparing the long tuple for
#: each row of each batch would cost more than the plan.
Signature = int
_SIGNATURES: dict[tuple[Any, ...], Signature] = {}
_SIGNATURES_LOCK = threading.Lock()


def _intern(key: tuple[Any, ...]) -> Signature:
    with _SIGNATURES_LOCK:
        return _SIGNATURES.setdefault(key, len(_SIGNATURES))


#: Per site: its name, an example delta, and of its tensors the name, the number of the piece and the place in it.
Layout = tuple[tuple[str, Delta, tuple[tuple[str, int, int], ...]], ...]


@dataclass(frozen=True, eq=False)
class Pack:
    """All tensors of one adapter that share a kind and settings, those of one shape in one piece.

    Stacked with other adapters' pieces, what one site reads of all slots lies together, which matters: a product of
    single tokens takes twice the time where every slot's matrix is a megabyte from the next one's.
    """

    signature: Signature
    layout: Layout
    """What is packed, in order."""
    pieces: tuple[Tensor, ...]
    """`[N, *shape]`, N tensors of one shape each; whole numbers (places of a sparse update) apart."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(t.numel() * t.element_size() for t in self.pieces)


class DeltaSet:
    """The deltas of one adapter, by site. Immutable; identity is what tells two slots apart."""

    def __init__(self, by_site: Mapping[str, Sequence[Delta]]) -> None:
        """
        Args:
            by_site: names of sites to their deltas, in any order; they apply in that of `deltas.ORDER`.

        Raises:
            ConfigError: several deltas of a kind of which a site has room for one.
        """
        self.by_site: dict[str, tuple[Delta, ...]] = {
            site: tuple(sorted(deltas, key=lambda d: ORDER.index(type(d)))) for site, deltas in by_site.items()
        }
        for site, deltas in self.by_site.items():
            only = [d.kind for d in deltas if d.one_per_site]
            twice = [kind for kind in only if only.count(kind) > 1]
            if twice:
                raise ConfigError(f"an adapter has one {twice[0]} at a site, but {site} would get several")
        self.prompt_length = sum(d.vectors.shape[0] for _, d in self.of(Prompt) if isinstance(d, Prompt))
        """How many vectors this adapter inserts into a row."""
        self.position_shift = max((d.shift for _, d in self.of(Memory) if isinstance(d, Memory)), default=0)
        """How many positions further on a row's own tokens count."""
        self.num_positions = self.prompt_length + self.position_shift
        """Positions that a row of this adapter takes beside its tokens."""
        self.tables: tuple[TableRows, ...] = tuple(
            d.source for _, d in self.of(TokenBias) if isinstance(d, TokenBias) and isinstance(d.source, TableRows)
        )
        """Tables its token rows are read from."""

    def of(self, kind: type[Delta]) -> list[tuple[str, Delta]]:
        """Every (site, delta) of one kind, in site order."""
        return [(site, d) for site, deltas in self.by_site.items() for d in deltas if type(d) is kind]

    @cached_property
    def packs(self) -> dict[Signature, Pack]:
        """The packable deltas in canonical form; prompts and tables are handled by the call itself."""
        grouped: dict[Any, list[tuple[str, Delta]]] = defaultdict(list)
        for site, deltas in self.by_site.items():
            for delta in deltas:
                if isinstance(delta, Prompt) or _is_table(delta):
                    continue
                c = delta.canonical()
                grouped[(type(c).__name__, c.settings())].append((site, c))
        packs = (_pack(key, members) for key, members in grouped.items())
        return {p.signature: p for p in packs}

    def fused(self, dtype: torch.dtype, device: torch.device) -> DeltaSet:
        """A copy for serving: canonical, detached, in `dtype` on `device`, its packs already made."""

        def move(t: Tensor) -> Tensor:
            return t.detach().to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)

        with torch.no_grad():
            served = DeltaSet(
                {
                    site: [d if _is_table(d) else d.served().map(move) for d in deltas]
                    for site, deltas in self.by_site.items()
                }
            )
            for pack in served.packs.values():
                assert not any(piece.requires_grad for piece in pack.pieces)
            return served._views_of_packs()

    def _views_of_packs(self) -> DeltaSet:
        """The same set with its tensors replaced by views of the packs, so that nothing is held twice."""
        views: dict[str, list[Delta]] = defaultdict(list)
        for site, deltas in self.by_site.items():
            views[site] = [d for d in deltas if isinstance(d, Prompt) or _is_table(d)]
        for pack in self.packs.values():
            for site, delta in _deltas(pack.layout, [piece.unbind() for piece in pack.pieces]):
                views[site].append(delta)
        kept = DeltaSet(views)
        kept.packs = self.packs
        return kept

    def nbytes(self) -> int:
        """Bytes of the tensors this set holds in memory (a memory-mapped table counts as none)."""
        total = sum(p.nbytes for p in self.packs.values())
        for deltas in self.by_site.values():
            for d in deltas:
                if isinstance(d, Prompt):
                    total += d.vectors.numel() * d.vectors.element_size()
                elif isinstance(d, TokenBias) and isinstance(d.source, TableRows) and not d.source.mapped:
                    total += d.source.nbytes
        return total


def _is_table(delta: Delta) -> bool:
    return isinstance(delta, TokenBias) and isinstance(delta.source, TableRows)


def _pack(key: tuple[str, Any], members: list[tuple[str, Delta]]) -> Pack:
    alike: dict[tuple[torch.Size, bool], list[Tensor]] = {}
    layout = []
    for site, delta in members:
        places = []
        for name, t in delta.tensors().items():
            same = alike.setdefault((t.shape, t.is_floating_point()), [])
            places.append((name, list(alike).index((t.shape, t.is_floating_point())), len(same)))
            same.append(t)
        layout.append((site, _hollow(delta), tuple(places)))
    signature = _intern((*key, tuple(alike), tuple((site, places) for site, _, places in layout)))
    return Pack(signature=signature, layout=tuple(layout), pieces=tuple(torch.stack(same) for same in alike.values()))


def _hollow(delta: Delta) -> Delta:
    """The delta with empty tensors: an example of its kind and settings that keeps no memory alive."""
    return delta.with_tensors({name: t.new_empty(0) for name, t in delta.tensors().items()})


def unpack(layout: Layout, pieces: Sequence[Tensor]) -> list[tuple[str, Delta]]:
    """Per site the delta whose tensors are views of stacked pieces `[N, G, *shape]`; vectors become `[G, 1, n]`."""
    return _deltas(layout, [(piece.unsqueeze(2) if piece.ndim == 3 else piece).unbind() for piece in pieces])


def _deltas(layout: Layout, tensors: Sequence[Sequence[Tensor]]) -> list[tuple[str, Delta]]:
    """Per site its delta, from the tensors of each piece."""
    return [
        (site, example.with_tensors({name: tensors[piece][place] for name, piece, place in places}))
        for site, example, places in layout
    ]


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of the ordered batch that share one stacked delta: G slots with K rows each."""

    rows: slice | Tensor | None
    """Which rows: all (`None`), a range, or indices `[G*K]`."""
    num_slots: int
    rows_per_slot: int
    covers_batch: bool = False
    """Whether a range is the whole batch, so that nothing needs cutting out or putting back."""

    @property
    def first(self) -> int:
        """The first row of a range; 0 for what is none."""
        return int(self.rows.start) if isinstance(self.rows, slice) else 0

    def take(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[G, K*T, F]`: a view unless the rows are scattered."""
        if self.rows is None or (self.covers_batch and self.rows_per_slot == 1):
            return x
        picked = x.index_select(0, self.rows) if isinstance(self.rows, Tensor) else x[self.rows]
        return picked.reshape(self.num_slots, self.rows_per_slot * x.shape[1], *x.shape[2:])

    def put(self, y: Tensor, new: Tensor) -> Tensor:
        """`y [B, T, F]` with this group's rows replaced by `new [G, K*T, F]`; in place when gradients are off."""
        if self.rows is None:
            return new
        new = new.reshape(-1, *y.shape[1:]).to(y.dtype)
        if isinstance(self.rows, Tensor):
            return y.index_copy(0, self.rows, new) if torch.is_grad_enabled() else y.index_copy_(0, self.rows, new)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler sees to it that nothing is copied
            return y.slice_scatter(new, 0, self.rows.start, self.rows.stop)
        target = y[self.rows]
        if target.data_ptr() != new.data_ptr():  # in place already when the delta reused y's memory
            target.copy_(new)
        return y

    def spread(self, t: Tensor) -> Tensor:
        """`t [G, ...]` repeated to one entry per row, `[G*K, ...]`."""
        return t if self.rows_per_slot == 1 else t.repeat_interleave(self.rows_per_slot, dim=0)


@dataclass(frozen=True, eq=False)
class Step:
    """One delta to apply at a site to one group of rows."""

    group: Group
    delta: Delta

    def __call__(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        """`y [B, T, O]` with the delta applied to this step's rows."""
        if self.group.rows is None:
            return self.delta.apply(x, y, module)
        if self.group.covers_batch:
            return self.delta.apply(self.group.take(x), self.group.take(y), module).view(y.shape)
        return self.group.put(y, self.delta.apply(self.group.take(x), self.group.take(y), module))


@dataclass(eq=False)
class _Block:
    """Slots that any order suits: they have the same packs' shapes and equally many rows; side by side in a batch."""

    rows_per_slot: int
    slots: list[DeltaSet]
    start: int = 0
    """Place of its first row in the ordered batch."""
    arranged: bool = False
    """Whether a buffer has decided the order."""

    @property
    def num_rows(self) -> int:
        return self.rows_per_slot * len(self.slots)

    def arrange(self, signature: Signature, held: Sequence[object]) -> None:
        """Put slots where a buffer holds their packs already; `held` is what it has in this block's places."""
        self.arranged = True
        each = len(held) // len(self.slots)
        at = {id(held[i * each]): i for i in range(len(self.slots)) if held[i * each] is not None}
        placed: dict[int, DeltaSet] = {}
        for s in self.slots:
            if (i := at.get(id(s.packs[signature]))) is not None:
                placed[i] = s
        there = set(placed.values())
        others = iter([s for s in self.slots if s not in there])
        self.slots = [placed[i] if i in placed else next(others) for i in range(len(self.slots))]


@dataclass(eq=False)
class _Stack:
    """Blocks whose packs of one signature are stacked into one delta per site."""

    signature: Signature
    blocks: list[_Block]
    rows_per_slot: int
    buffer: Buffer | None = None

    def packs(self) -> list[Pack]:
        """What to stack, in order; repeated where rows of one slot get a copy each."""
        return [
            s.packs[self.signature]
            for block in self.blocks
            for s in block.slots
            for _ in range(block.rows_per_slot // self.rows_per_slot)
        ]

    def borrow(self, workspace: Workspace, owner: object) -> None:
        """Take a buffer, and order the slots by what it holds."""
        packs = self.packs()
        if len(packs) == 1:
            return
        self.buffer = workspace.lend(self.signature, packs, owner)
        held, start = self.buffer.held(), 0
        for block in self.blocks:
            stop = start + block.num_rows // self.rows_per_slot
            if not block.arranged:
                block.arrange(self.signature, held[start:stop])
            start = stop

    def deltas(self, packs: Sequence[Pack]) -> list[tuple[str, Delta]]:
        """Per site the stacked delta of every slot."""
        layout = packs[0].layout
        if len(packs) == 1:
            return unpack(layout, [piece.unsqueeze(1) for piece in packs[0].pieces])
        if self.buffer is None:
            return unpack(layout, [torch.stack(same, 1) for same in zip(*(p.pieces for p in packs), strict=True)])
        pieces, views = self.buffer.fill(packs), self.buffer.views
        if len(packs) not in views:
            views[len(packs)] = unpack(layout, pieces)
        made: list[tuple[str, Delta]] = views[len(packs)]
        return made


def _stacks(signature: Signature, blocks: Sequence[_Block]) -> list[_Stack]:
    """How to stack the packs of one signature; see `PER_ROW_BYTES`."""
    mine = [block for block in blocks if signature in block.slots[0].packs]
    used = sorted({block.rows_per_slot for block in mine})
    if len(used) == 1:
        return [_Stack(signature, mine, used[0])]
    if mine[0].slots[0].packs[signature].nbytes * sum(block.num_rows for block in mine) <= PER_ROW_BYTES:
        return [_Stack(signature, mine, 1)]
    return [_Stack(signature, [block for block in mine if block.rows_per_slot == n], n) for n in used]


class Plan:
    """Which rows use which deltas, ready to run any number of batches with that assignment.

    Thread-safe: immutable once made. Holds its packed tensors until it is dropped.
    """

    def __init__(
        self,
        rows: Sequence[DeltaSet | None],
        workspace: Workspace | None = None,
        numbers: Sequence[int] | None = None,
        split: bool = True,
    ) -> None:
        """
        Args:
            rows: per row of the batch, its deltas, or `None` for the bare backbone.
            workspace: where packed tensors may be kept between plans; used only when gradients are off.
            numbers: what messages call the rows; by default 0, 1, ...
            split: whether rows with and without prompts may run as two pieces; not where no prompt is inserted.
        """
        self.num_rows = len(rows)
        self.rows = tuple(rows)
        """The rows' deltas in the order given."""
        self.numbers = range(len(rows)) if numbers is None else numbers
        self.order: Tensor | None = None
        """Rows in the order they are run in, as indices `[B]`; `None` for the order given."""
        self.ordered: list[DeltaSet | None] = list(rows)
        """The rows' deltas in that order."""
        self.parts: tuple[tuple[list[int], Plan], ...] = ()
        """Rows and plans of the pieces this batch is run in; empty for one piece."""
        self.steps: dict[str, list[Step]] = defaultdict(list)
        """By site: what to apply to its output."""
        self.input_steps: dict[str, list[Step]] = defaultdict(list)
        """By site: what to apply to its input."""
        self.tables: list[tuple[slice, TableRows]] = []
        """Row ranges whose token rows come from a table."""
        self._workspace = workspace if not torch.is_grad_enabled() else None
        slots = list(dict.fromkeys(r for r in rows if r is not None))
        if split and self._worth_splitting(rows):
            self.parts = tuple(self._part(rows, workspace, prompted) for prompted in (True, False))
        elif len(slots) == 1 and all(r is slots[0] for r in rows):
            self._plan_one(slots[0])
        else:
            self._plan_many(rows, slots)
        self.steps, self.input_steps = dict(self.steps), dict(self.input_steps)

    @staticmethod
    def _worth_splitting(rows: Sequence[DeltaSet | None]) -> bool:
        lengths = [r.prompt_length if r is not None else 0 for r in rows]
        return 0 in lengths and max(lengths) * lengths.count(0) > SPLIT_POSITIONS

    def _part(
        self, rows: Sequence[DeltaSet | None], workspace: Workspace | None, prompted: bool
    ) -> tuple[list[int], Plan]:
        """The rows with a prompt, or those without, and their plan."""
        mine = [b for b, r in enumerate(rows) if (r is not None and r.prompt_length > 0) == prompted]
        return mine, Plan([rows[b] for b in mine], workspace, [self.numbers[b] for b in mine])

    def _plan_one(self, only: DeltaSet) -> None:
        """One slot for all rows: its own tensors, no gather, no copy, no order."""
        everyone = Group(rows=None, num_slots=1, rows_per_slot=self.num_rows)
        for site, deltas in only.by_site.items():
            for delta in deltas:
                if isinstance(delta, TokenBias) and isinstance(delta.source, TableRows):
                    self.tables.append((slice(0, self.num_rows), delta.source))
                elif not isinstance(delta, Prompt):
                    self._add_step(site, Step(everyone, delta))

    def _plan_many(self, rows: Sequence[DeltaSet | None], slots: list[DeltaSet]) -> None:
        rows_of: dict[DeltaSet | None, list[int]] = {None: [], **{s: [] for s in slots}}
        for b, r in enumerate(rows):
            rows_of[r].append(b)
        ids = {signature: i for i, signature in enumerate(dict.fromkeys(g for s in slots for g in s.packs))}
        alike: dict[tuple[tuple[int, ...], int], list[DeltaSet]] = defaultdict(list)
        for s in slots:
            alike[tuple(sorted(ids[g] for g in s.packs)), len(rows_of[s])].append(s)
        blocks = [_Block(len(rows_of[slots_[0]]), slots_) for _, slots_ in sorted(alike.items(), key=lambda a: a[0])]
        stacks = [stack for signature in ids for stack in _stacks(signature, blocks)]
        if self._workspace is not None:
            for stack in stacks:
                stack.borrow(self._workspace, owner=self)
        order = rows_of[None] + [b for block in blocks for s in block.slots for b in rows_of[s]]
        if order != sorted(order):
            self.order = torch.tensor(order)
            self.ordered = [rows[b] for b in order]
        start = len(rows_of[None])
        for block in blocks:
            block.start, start = start, start + block.num_rows
        for stack in stacks:
            self._add_stack(stack)
        self._plan_tables()
        for steps in self.steps.values():
            # Of a kind that follows itself the order stands; the others go by rows, as attention wants them.
            steps.sort(key=lambda s: (ORDER.index(type(s.delta)), s.group.first if s.delta.one_per_site else 0))

    def _add_stack(self, stack: _Stack) -> None:
        rows = [b for block in stack.blocks for b in range(block.start, block.start + block.num_rows)]
        packs = stack.packs()
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        group = Group(
            rows=slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows, device=packs[0].pieces[0].device),
            num_slots=len(packs),
            rows_per_slot=stack.rows_per_slot,
            covers_batch=contiguous and len(rows) == self.num_rows,
        )
        for site, delta in stack.deltas(packs):
            self._add_step(site, Step(group, delta))

    def _add_step(self, site: str, step: Step) -> None:
        (self.input_steps if step.delta.changes_input else self.steps)[site].append(step)

    def _plan_tables(self) -> None:
        start = 0
        for b in range(1, self.num_rows + 1):
            if b < self.num_rows and self.ordered[b] is self.ordered[start]:
                continue
            slot = self.ordered[start]
            self.tables += [(slice(start, b), table) for table in (slot.tables if slot is not None else ())]
            start = b

    def number(self, place: int) -> int:
        """What messages call the row at a place of the ordered batch."""
        return self.numbers[place if self.order is None else int(self.order[place])]

    @cached_property
    def open_memories(self) -> frozenset[int]:
        """Ids of the memories all of whose entries are open: one look at the values for all layers."""
        memories = [s.delta for steps in self.steps.values() for s in steps if isinstance(s.delta, Memory)]
        if not memories:
            return frozenset()
        is_open = torch.stack([(m.open > 0).all() for m in memories]).tolist()
        return frozenset(id(m) for m, whole in zip(memories, is_open, strict=True) if whole)

    @cached_property
    def inverse(self) -> Tensor | None:
        """Undoes `order`."""
        return None if self.order is None else self.order.argsort()
