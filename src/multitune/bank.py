"""The bank: many adapters on one backbone, and batches whose rows use any mix of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from multitune.adapter import Adapter
from multitune.backbone import Backbone, check_is_backbone
from multitune.errors import AdapterError, ConfigError, DataError, MixError, PlanError, suggest
from multitune.plan import DeltaSet, Plan
from multitune.prediction import Prediction, Served, predict
from multitune.sharing import first_touched
from multitune.workspace import Workspace, wait_for

if TYPE_CHECKING:
    from multitune.generation import Engine, Generation, Request
    from multitune.generation.prompts import AnySettings

AotStore = Literal["factors", "ram", "mmap"]
Row = tuple[str | None, Any]


class _Entry:
    """One adapter in the bank: on disk, and in memory while the budget allows."""

    def __init__(self, name: str, adapter: Adapter, drop_layers: tuple[int, ...] = ()) -> None:
        self.name = name
        self.adapter = adapter
        self.drop_layers = drop_layers
        self.served: Served | None = None
        self.loading = threading.Lock()
        """Held while this adapter is read or its backbone copied; taken before the bank's own lock, never under it."""
        self.alone: Bank | None = None
        """Fully tuned adapters: a bank on a backbone of their own, made when a row first asks for it."""


class Bank:
    """Adapters on one backbone, held under a byte budget, routed row by row.

    Adding and removing takes the same time however many are loaded, and never touches the backbone. All methods
    may be called from several threads at once: a batch that is running keeps the adapters it started with.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        aot_store: AotStore = "factors",
        memory_budget: int | None = None,
    ) -> None:
        """
        Args:
            aot_store: where the token rows of AoT adapters come from: "factors" (computed for the tokens of each
                batch; smallest), or the table that `multitune fuse` has written: "ram" (all of it in memory) or "mmap"
                (of which only the rows in use are read).
            memory_budget: bytes of adapter tensors kept in memory; beyond it the adapter used longest ago is
                dropped and read again from its folder when a row asks for it. `None` keeps all. Not counted: the
                packed tensors of running plans, and backbones of fully tuned adapters.

        Raises:
            ConfigError: an unknown store, or no backbone.
        """
        check_is_backbone("a Bank", backbone)
        if aot_store not in ("factors", "ram", "mmap"):
            raise ConfigError(f"aot_store '{aot_store}' is unknown; choose 'factors', 'ram' or 'mmap'")
        self.backbone = backbone
        self.aot_store = aot_store
        self.memory_budget = memory_budget
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()
        self.workspace = Workspace()
        """Lends plans their packed tensors."""
        self._droppable: OrderedDict[_Entry, None] = OrderedDict()
        """The adapters in memory that can be read again, the one used longest ago first."""
        self._resident_bytes = 0

    # ---------------------------------------------------------------- contents

    def add(self, name: str, adapter: Adapter | str | Path, *, drop_layers: Sequence[int] = ()) -> None:
        """Put an adapter into the bank under a name.

        Args:
            drop_layers: layers, from 0, in which the adapter is left out (AdapterDrop, arXiv 2010.11918): faster
                there, and little worse where these are the lowest.

        Raises:
            ConfigError: a layer in `drop_layers` in which the adapter has nothing that could be left out.
            AdapterError: the name is taken, or the adapter's files are missing or damaged.
            BackboneError: the adapter belongs to another backbone.
        """
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter, self.backbone)
        adapter.check_backbone(self.backbone)
        adapter.head.check(self.backbone)
        entry = _Entry(name, adapter, tuple(drop_layers))
        self._check_free(name)
        if drop_layers and adapter.method.changes_weights:
            raise ConfigError(
                f"drop_layers: adapter '{name}' uses {adapter.method.title}, which changes the backbone's own "
                f"weights: there is nothing that could be left out; serve it whole"
            )
        served = None if adapter.method.changes_weights else self._load(entry)
        with self._lock:
            self._check_free(name)
            self._entries[name] = entry
            if served is not None:
                self._keep(entry, served)

    def _check_free(self, name: str) -> None:
        if name in self._entries:
            raise AdapterError(f"the bank already has an adapter '{name}'; remove it first: bank.remove({name!r})")

    def remove(self, name: str) -> None:
        """Take an adapter out; batches that are running finish with it.

        Raises:
            AdapterError: a name the bank does not have.
        """
        with self._lock:
            entry = self._find(name)
            self._drop(entry)
            del self._entries[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they were added."""
        with self._lock:
            return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def adapter(self, name: str) -> Adapter:
        """The adapter under a name; without its tensors where the bank can read them again from its folder.

        Raises:
            AdapterError: a name the bank does not have.
        """
        with self._lock:
            return self._find(name).adapter

    def serving(self, name: str | None) -> Bank:
        """The bank that answers the rows of an adapter (`None`: bare rows).

        It is this one, but for a fully tuned adapter, which has a backbone and a bank of its own; made at the first
        call.
        """
        alone = self._served_alone([(name, None)], 0)
        return self if alone is None else alone

    @property
    def resident_bytes(self) -> int:
        """Bytes of adapter tensors in memory now."""
        with self._lock:
            return self._resident_bytes

    def _find(self, name: str, where: str = "") -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = tuple(self._entries)
            shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            raise AdapterError(
                f"{where}the bank has no adapter '{name}'.{suggest(name, known)} It has: {shown or 'none'}. "
                f"Add it: bank.add({name!r}, FOLDER)"
            )
        return entry

    def _get(self, entry: _Entry) -> Served:
        """The adapter in memory, read again from its folder if the budget had dropped it."""
        with entry.loading:  # the other adapters' rows do not wait for this one's file
            with self._lock:
                if entry.served is not None:
                    self._touch(entry)
                    return entry.served
            served = self._load(entry)
            with self._lock:
                if self._entries.get(entry.name) is entry:  # it may have been removed meanwhile
                    self._keep(entry, served)
            return served

    def _load(self, entry: _Entry) -> Served:
        """The served form of an adapter; leaves the entry only what cannot be read again."""
        adapter = entry.adapter
        if not adapter.head_params and adapter.path is not None:
            adapter = adapter.reload(self.backbone)
        delta_set = adapter.delta_set(self.backbone, aot_store=self.aot_store, drop_layers=entry.drop_layers)
        device, dtype = self.backbone.device, self.backbone.dtype
        head_params = {k: t.to(device=device, dtype=dtype) for k, t in adapter.head_params.items()}
        wait_for(device)  # a thread with a stream of its own may be the first to use them
        if adapter.path is not None:
            entry.adapter = replace(adapter, params={}, head_params={})
        return Served(entry.name, entry.adapter, delta_set, head_params, first_touched(delta_set, self.backbone))

    def _touch(self, entry: _Entry) -> None:
        if entry in self._droppable:
            self._droppable.move_to_end(entry)

    def _keep(self, entry: _Entry, served: Served) -> None:
        """Count an adapter in, and drop others if the budget asks for it; under the lock.

        What it costs does not depend on how many adapters the bank has.
        """
        entry.served = served
        if entry.adapter.path is not None:
            self._droppable[entry] = None
        self._resident_bytes += served.nbytes()
        while self.memory_budget is not None and self._resident_bytes > self.memory_budget:
            oldest = next(iter(self._droppable), entry)
            if oldest is entry:  # the newest of all, so that there is no other
                return
            self._drop(oldest)

    def _drop(self, entry: _Entry) -> None:
        if entry.served is not None:
            self._resident_bytes -= entry.served.nbytes()
            entry.served = None
            self._droppable.pop(entry, None)

    # ---------------------------------------------------------------- plans

    def plan(self, names: Sequence[str | None]) -> Plan:
        """A plan for a batch whose row i uses adapter `names[i]` (`None`: the bare backbone); reusable.

        Raises:
            AdapterError: a name the bank does not have.
            MixError: a row's method cannot be mixed; names the row.
            PlanError: `names` is a single text.
        """
        if isinstance(names, str):
            raise PlanError(f"a plan takes one name per row, not a single text; give bank.plan([{names!r}])")
        with torch.no_grad():
            return Plan([s.delta_set if s is not None else None for s in self.served(names)], self.workspace)

    def served(self, names: Sequence[str | None], first: int = 0) -> list[Served | None]:
        """The adapters of a batch's rows as they are now, so that later removals do not reach it.

        Args:
            first: messages number the rows from it.

        Raises:
            AdapterError, MixError: as `plan`.
        """
        entries: dict[str, _Entry] = {}
        with self._lock:
            for row, name in enumerate(names, start=first):
                if name is None or name in entries:
                    continue
                entry = self._find(name, f"row {row}: ")
                if entry.adapter.method.changes_weights:
                    raise MixError(_cannot_mix(row, entry))
                entries[name] = entry
        found = {name: self._get(entry) for name, entry in entries.items()}
        return [None if name is None else found[name] for name in names]

    def delta_sets(self, names: Sequence[str | None], first: int = 0) -> list[DeltaSet | None]:
        """The deltas of a batch's rows as they are now; messages number the rows from `first`.

        Raises:
            AdapterError, MixError: as `plan`.
        """
        return [None if s is None else s.delta_set for s in self.served(names, first)]

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        rows: Sequence[Row],
        settings: AnySettings | Sequence[AnySettings] | None = None,
        *,
        batch_size: int = 32,
        **same: Any,
    ) -> list[Generation]:
        """Text for rows of any mix of adapters, in the order given; each as if alone.

        Args:
            rows: pairs of an adapter's name (or `None`) and a prompt: a text, a list of chat messages (`role`,
                `content`), or a list of token ids. With an adapter whose task writes texts, a text or a mapping is a
                row of that task, put into its template; one that is too long loses words at its front.
            settings: how to decode, for all rows or one per row (`GenerationSettings`, or a mapping); by default
                greedily.
            batch_size: most rows decoded together; where one is done, the next takes its place.
            **same: settings of all rows, in place of `settings`: `max_new_tokens=20`.

        Raises:
            BackboneError: the backbone is no causal language model, or has no head.
            AdapterError, ConfigError, DataError, MixError, PlanError: before any forward pass, naming the row.
        """
        engine, requests = self._submit(rows, settings, same, batch_size)
        engine.run()
        return [r.result() for r in requests]

    def generate_stream(
        self,
        rows: Sequence[Row],
        settings: AnySettings | Sequence[AnySettings] | None = None,
        *,
        batch_size: int = 32,
        **same: Any,
    ) -> Iterator[tuple[int, str]]:
        """`generate`, piece by piece: pairs of a row's number and a piece of its text, as they come.

        A row's pieces together are its text. Beam searches give theirs in one piece, since the best may change.

        Args:
            rows, settings, batch_size, **same: as `generate` takes them.

        Returns:
            An iterator, which decodes as it is read; rows are checked, and their adapters looked up, before.

        Raises:
            AdapterError, BackboneError, ConfigError, DataError, MixError, PlanError: as `generate`, naming the row.
        """
        return self._pieces(*self._submit(rows, settings, same, batch_size))

    @staticmethod
    def _pieces(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        left = True
        while left:
            left = engine.step()
            for row, request in enumerate(requests):
                yield from ((row, piece) for piece in request.ready())

    def _submit(
        self, rows: Sequence[Row], settings: Any, same: Mapping[str, Any], batch_size: int
    ) -> tuple[Engine, list[Request]]:
        from multitune.generation import Engine
        from multitune.generation.prompts import settings_per_row
        from multitune.generation.settings import check_beams

        if same and settings is not None:
            names = ", ".join(same)
            raise ConfigError(f"give {names} in `settings`, or no `settings` but names alone; both are given")
        rows = [self._pair(row, pair, "a prompt") for row, pair in enumerate(rows)]
        per_row = settings_per_row(same or settings, len(rows))
        check_beams([(f"row {row}", own) for row, own in enumerate(per_row)], batch_size)
        alone = self._served_alone(rows, 0)
        engine = Engine(self if alone is None else alone, max_rows=batch_size)
        return engine, engine.submit_all(rows, per_row)

    @staticmethod
    def _pair(row: int, pair: Any, what: str) -> Row:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str | None):
            raise DataError(
                f"row {row}: {pair!r} is not a pair of an adapter's name (or None) and {what}; give a list of pairs, "
                f"such as [(None, 'a text')]"
            )
        return pair[0], pair[1]

    # ---------------------------------------------------------------- prediction

    def predict(self, rows: Sequence[Row], *, batch_size: int = 32) -> list[Prediction]:
        """Answer rows of any mix of tasks and methods, in the order given.

        Args:
            rows: pairs of an adapter's name (or `None`) and the row: a text, a pair of texts, or a mapping with
                the columns of the task's template. A bare row is a text or a pair of texts.
            batch_size: most sequences in one forward pass; sequences of similar length go together.

        Raises:
            ConfigError: batch_size is not at least 1.
            AdapterError, BackboneError, MixError, DataError, PlanError: before any forward pass, naming the row.
        """
        return self._predict(list(rows), batch_size, first=0)

    def _predict(self, rows: Sequence[Row], batch_size: int, first: int) -> list[Prediction]:
        """`predict`; messages number the rows from `first`."""
        _check_at_least_one("batch_size", batch_size)
        for row, pair in enumerate(rows, start=first):
            self._pair(row, pair, "a row")
        alone = self._served_alone(rows, first)
        if alone is not None:
            return alone._predict(rows, batch_size, first)
        self.backbone.check_idle()
        found = self.served([name for name, _ in rows], first)
        return predict(self.backbone, [row for _, row in rows], found, batch_size, self.workspace, first)

    def predict_stream(self, rows: Iterable[Row], *, batch_size: int = 32, window: int = 512) -> Iterator[Prediction]:
        """`predict` for rows without end: answers come in order, `window` rows are read ahead to pack by length.

        Args:
            rows, batch_size: as `predict` takes them.
            window: rows read ahead, at least 1; by length they are packed into batches of `batch_size`.

        Returns:
            An iterator of one answer per row. It reads `window` rows when the first of their answers is asked for.

        Raises:
            ConfigError: batch_size or window is not at least 1; at the call.
            AdapterError, BackboneError, MixError, DataError, PlanError: as `predict`, when the first answer of a window
                is asked for.
        """
        _check_at_least_one("batch_size", batch_size)
        _check_at_least_one("window", window)
        return self._predict_windows(iter(rows), batch_size, window)

    def _predict_windows(self, rows: Iterator[Row], batch_size: int, window: int) -> Iterator[Prediction]:
        first = 0
        while chunk := list(islice(rows, window)):
            yield from self._predict(chunk, batch_size, first)
            first += len(chunk)

    def _served_alone(self, rows: Sequence[Row], first: int) -> Bank | None:
        """The bank of a fully tuned backbone, if all rows ask for one and the same; `None` if none does.

        Raises:
            MixError: some rows do and some do not; names the first that cannot be mixed.
        """
        with self._lock:
            names = {name for name, _ in rows}
            full = {n for n in names if n is not None and n in self._entries and self._changes_weights(n)}
            if not full:
                return None
            if len(names) > 1:
                row = next(i for i, (name, _) in enumerate(rows) if name in full)
                raise MixError(_cannot_mix(first + row, self._entries[str(rows[row][0])]))
            entry = self._entries[full.pop()]
        with entry.loading:
            if entry.alone is None:
                entry.alone = _bank_of_full(self.backbone, entry)
            return entry.alone

    def _changes_weights(self, name: str) -> bool:
        return self._entries[name].adapter.method.changes_weights


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value} is not possible; give at least 1")


def _cannot_mix(row: int, entry: _Entry) -> str:
    return (
        f"row {row}: adapter '{entry.name}' uses {entry.adapter.method.title}, which changes the backbone's own "
        f"weights, so it cannot share a batch with rows of other tasks. Send its rows in a batch of their own, or "
        f"train the task with a method that can be mixed, such as LoRA"
    )


def _bank_of_full(backbone: Backbone, entry: _Entry) -> Bank:
    """A bank with a backbone of its own, on which the fully tuned adapter is a head."""
    from multitune.methods.head import HeadOnly

    adapter = entry.adapter
    tuned = backbone.with_weights(adapter.params)
    bank = Bank(tuned)
    bank.add(entry.name, replace(adapter, method=HeadOnly(), params={}, backbone=tuned.describe(), path=None))
    return bank
