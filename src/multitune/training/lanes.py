"""Passes that run side by side, each on its share of torch's threads.

Two threads on one pass of some hundred tokens help little: between its many small operations both wait for Python.
Two passes at a time, one thread each, fill those gaps for one another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Lanes:
    """The caller's thread and others beside it, each of which does one thing at a time."""

    def __init__(self, count: int) -> None:
        """
        Args:
            count: of lanes, the caller's included. They share the torch threads that the caller's has when it asks.
        """
        self._count = count
        self._others: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._count > 1:
            self._others = ThreadPoolExecutor(self._count - 1, thread_name_prefix="multitune-pass")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._others is not None:
            self._others.shutdown()
            self._others = None

    def side_by_side(self, items: Sized) -> bool:
        """Whether `map` does several of so many items at a time."""
        return self._count > 1 and len(items) > 1

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """`function` of every item, in the order of the items.

        The caller's lane begins with the first, the next with the last, and so on by turns: of items in the order of
        their size, a large one runs beside a small one, which bounds the memory of both.

        Raises:
            BaseException: what `function` raised, in the caller's lane before others, or Ctrl-C. By then nothing runs
                any more, and what had not begun does not begin.
        """
        waiting = deque(enumerate(items))
        if self._others is None or not self.side_by_side(waiting):
            return [function(item) for _, item in waiting]
        found: dict[int, _Result] = {}
        before = torch.get_num_threads()
        lanes = min(self._count, len(waiting))
        share = max(1, before // lanes)
        ends = (waiting.popleft, waiting.pop)
        others: list[Future[None]] = []
        try:
            for i in range(1, lanes):
                others.append(self._others.submit(_work, function, waiting, ends[i % 2], found, share))
            _work(function, waiting, ends[0], found, share)
            for other in others:
                other.result()
        finally:
            waiting.clear()
            try:
                wait(others)
            finally:  # also where Ctrl-C came a second time
                torch.set_num_threads(before)
        return [found[number] for number in sorted(found)]


def _work(
    function: Callable[[_Item], _Result],
    waiting: deque[tuple[int, _Item]],
    take: Callable[[], tuple[int, _Item]],
    found: dict[int, _Result],
    threads: int,
) -> None:
    """What one lane does: the next item, until none waits.

    Args:
        waiting: numbered, and shared by all lanes.
        take: takes one of them; raises `IndexError` where none is left.
        threads: of torch. The number belongs to the thread that sets it, and to those that begin later.
    """
    torch.set_num_threads(threads)
    while True:
        try:
            number, item = take()
        except IndexError:  # another lane took the last one
            return
        try:
            found[number] = function(item)
        except BaseException:
            waiting.clear()  # for the other lanes
            raise
