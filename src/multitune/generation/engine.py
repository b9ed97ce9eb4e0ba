"""Continuous batching: requests come at any time, each with its own adapter, and leave when they are done.

transformers has a continuous batch of its own, but it joins all rows into one long sequence, in which a plan could not
tell rows apart; so this one keeps rows, and everything below it is the same as for a batch that is given at once.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from multitune.errors import ConfigError, MultituneError, PlanError
from multitune.generation.batch import AnySequence, DecodingBatch, check_room
from multitune.generation.prompts import (
    AnySettings,
    encode_for_task,
    encode_prompt,
    make_sequence,
    prompt_room,
    room_limit,
    settings_per_row,
)
from multitune.generation.settings import Generation, GenerationSettings

if TYPE_CHECKING:
    from multitune.bank import Bank
    from multitune.prediction import Served


class Request:
    """One request on its way: iterate over it for pieces of text as they come, or wait for its `result`."""

    def __init__(self, sequence: AnySequence) -> None:
        self.sequence = sequence
        self.cancelled = False
        """Whether it is to leave before it is done."""
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has its result, or failed."""
        return self._done.is_set()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, which together are the result's; waits for a thread that calls the engine's `step`.

        Raises:
            Exception: what the step raised in which the request failed, or the tokenizer over its text.
        """
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for whoever iterates again
        if self._error is not None:
            raise self._error

    def ready(self) -> list[str]:
        """The pieces that have come and were not read; never waits."""
        found: list[str] = []
        while True:
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                return found
            if piece is None:
                self._pieces.put(None)
                return found
            found.append(piece)

    def result(self, timeout: float | None = None) -> Generation:
        """What was generated; waits for it.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it is not done by then.
            Exception: what the step raised in which the request failed.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the request is not done after {timeout} seconds; is a thread calling Engine.step()?")
        if self._error is not None:
            raise self._error
        return self.sequence.result()

    def _deliver(self) -> None:
        """Hand out what came with the last step."""
        try:
            piece = self.sequence.piece()
        except Exception as error:  # of this one's text, so that the others go on
            self.sequence.finish_reason = "cancelled"
            self._finish(error)
            return
        if piece:
            self._pieces.put(piece)
        if self.sequence.finish_reason is not None:
            self._finish()

    def _finish(self, error: BaseException | None = None) -> None:
        self._error = error
        self._done.set()
        self._pieces.put(None)


class Engine:
    """Generates for requests as they come, on one bank.

    `submit` and `cancel` may be called from any thread; one thread calls `step` over and over (or `run`). Requests
    enter in the order they came, as soon as there is room: a request's text is the one it would get alone.
    """

    def __init__(self, bank: Bank, *, max_rows: int = 32, max_tokens: int | None = None) -> None:
        """
        Args:
            bank: where adapters are looked up when a request comes; removing one later does not reach it.
            max_rows: most rows decoded together; a beam search takes as many as it has beams.
            max_tokens: most positions that the rows together may come to hold, prompts and all they may generate;
                `None` for no limit but `max_rows`.

        Raises:
            BackboneError: the backbone is no causal language model, or has no head.
            ConfigError: a limit below 1.
        """
        from multitune.bank import Bank  # which imports this module when it writes

        if not isinstance(bank, Bank):
            raise ConfigError(f"an Engine takes a Bank, not a {type(bank).__name__}; give Engine(Bank(backbone))")
        for name, limit in (("max_rows", max_rows), ("max_tokens", max_tokens)):
            if limit is not None and limit < 1:
                raise ConfigError(f"{name}={limit} is not possible; give at least 1")
        self.bank = bank
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self._batch = DecodingBatch(bank.backbone, bank.workspace)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._lock = threading.Lock()
        """Guards the two lists; never held while the model runs."""
        self._stepping = threading.Lock()

    # ---------------------------------------------------------------- requests

    def submit(self, prompt: Any, *, adapter: str | None = None, settings: AnySettings | None = None) -> Request:
        """Add a request; it enters the batch in a later step.

        Args:
            prompt: a text, a list of chat messages (`role`, `content`), or a list of token ids. With an adapter whose
                task writes texts, a text or a mapping is a row of that task, put into its template.
            adapter: the bank's adapter to use; `None` for the bare backbone.
            settings: how to decode; by default greedily.

        Raises:
            AdapterError, BackboneError, ConfigError, DataError, MixError, PlanError: a request that cannot be served.
        """
        return self.submit_all([(adapter, prompt)], settings, name="request")[0]

    def submit_all(
        self, rows: list[tuple[str | None, Any]], settings: Any = None, *, name: str = "row", first: int = 0
    ) -> list[Request]:
        """Add requests together, all or, where one cannot be served, none.

        Args:
            rows: pairs of an adapter's name (or `None`) and a prompt.
            settings: for all rows, or one per row.
            name: what messages call a row; "row" with its number, counted from `first`.

        Raises:
            AdapterError, BackboneError, ConfigError, DataError, MixError, PlanError: as `submit`, naming the row.
        """
        per_row = settings_per_row(settings, len(rows))
        try:
            served = self.bank.served([adapter for adapter, _ in rows], first)
        except MultituneError as error:
            if name == "row":
                raise
            raise type(error)(f"{name}: {str(error).removeprefix(f'row {first}: ')}") from error
        made: list[Request] = []
        for i, ((adapter, prompt), own, found) in enumerate(zip(rows, per_row, served, strict=True)):
            where = f"{name} {first + i}" if name == "row" else name
            of_row = None if found is None else found.delta_set
            try:
                ids = self._encode(found, prompt, own, where)
                sequence = make_sequence(self.bank.backbone, ids, of_row, own, adapter)
            except MultituneError as error:
                raise type(error)(f"{where}: {error}") from error
            check_room(self.bank.backbone, sequence, where)
            self._check_limits(sequence, where)
            made.append(Request(sequence))
        with self._lock:
            self._waiting.extend(made)
        return made

    def _encode(self, served: Served | None, prompt: Any, settings: GenerationSettings, where: str) -> tuple[int, ...]:
        """Token ids of a prompt; of an adapter trained on a task that writes, the ids training saw for such a row."""
        backbone = self.bank.backbone
        writes = served is not None and served.adapter.task.kind == "generation"
        if served is None or not writes or not isinstance(prompt, (str, Mapping)):
            return encode_prompt(backbone, prompt)
        own = served.adapter
        room = prompt_room(backbone, served.num_positions, settings.max_new_tokens, own.max_length)
        limit = room_limit(backbone, room, settings.max_new_tokens, own.max_length)
        return encode_for_task(backbone, own.task, prompt, room, where, limit)

    def _check_limits(self, sequence: AnySequence, where: str) -> None:
        if sequence.num_rows > self.max_rows:
            raise PlanError(
                f"{where}: {sequence.num_rows} beams are more rows than max_rows={self.max_rows}; lower num_beams"
            )
        needed = sequence.num_rows * sequence.num_positions
        if self.max_tokens is not None and needed > self.max_tokens:
            raise PlanError(
                f"{where}: it may come to hold {needed} positions, but max_tokens={self.max_tokens}; shorten the "
                f"prompt or lower max_new_tokens"
            )

    def cancel(self, request: Request) -> None:
        """Have a request leave in the next step, with the text it has; harmless when it is done."""
        request.cancelled = True

    @property
    def num_waiting(self) -> int:
        """Requests that have not entered."""
        with self._lock:
            return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are being decoded."""
        with self._lock:
            return len(self._running)

    # ---------------------------------------------------------------- decoding

    def step(self) -> bool:
        """Let waiting requests in, generate one token for every row, and hand out what came.

        Returns:
            Whether requests are left.

        Raises:
            Exception: what the model raised; the requests that were running get it too, and the engine goes on with
                those that wait.
        """
        with self._stepping:
            self._take_cancelled()
            entering = self._admit()
            try:
                self._batch.enter([r.sequence for r in entering])
                self._batch.step()
            except BaseException as error:
                self._fail(error)
                raise
            with self._lock:
                for request in self._running:
                    request._deliver()
                self._running = [r for r in self._running if not r.done]
                return bool(self._running or self._waiting)

    def run(self) -> None:
        """Step until no request is left."""
        while self.step():
            pass

    def _take_cancelled(self) -> None:
        with self._lock:
            for request in (*self._running, *self._waiting):
                if request.cancelled:
                    request.sequence.finish_reason = "cancelled"
                    request._deliver()
            self._running = [r for r in self._running if not r.done]
            self._waiting = deque(r for r in self._waiting if not r.done)

    def _admit(self) -> list[Request]:
        """The requests that enter now: in order, so that none waits forever behind smaller ones."""
        entering: list[Request] = []
        with self._lock:
            rows = sum(r.sequence.num_rows for r in self._running)
            tokens = sum(r.sequence.num_rows * r.sequence.num_positions for r in self._running)
            while self._waiting:
                sequence = self._waiting[0].sequence
                rows += sequence.num_rows
                tokens += sequence.num_rows * sequence.num_positions
                if rows > self.max_rows or (self.max_tokens is not None and tokens > self.max_tokens):
                    break
                entering.append(self._waiting.popleft())
            self._running += entering
        return entering

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            failed, self._running = self._running, []
        for request in failed:  # first of all, whatever comes next: someone may wait for them
            request._finish(error)
        self._batch = DecodingBatch(self.bank.backbone, self.bank.workspace)
