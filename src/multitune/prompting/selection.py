"""Which rows stand in a prompt as examples. None is ever the row that is asked, nor one that reads like it."""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch

from multitune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.tasks import Task

Row = Mapping[str, Any]

#: Marks of a sentence that make no other question of it; those of arithmetic do, and so do points within numbers.
_MARKS = re.compile(r"[\"'’‘“”`!?;:…]|[.,](?!\d)")


class Puts(Protocol):
    """What puts a row to a model: a `Pattern`, or a task's own template."""

    def text(self, row: Row) -> str:
        """The row's prompt."""


class Examples(ABC):
    """A pool of labelled rows, of which every question gets `k`; the one that fits best stands last, next to it."""

    def __init__(self, table: Any, k: int) -> None:
        """
        Args:
            table: labelled rows; not those that are judged.
            k: examples in a prompt.

        Raises:
            ConfigError: k below 1.
            DataError: fewer rows than k.
        """
        if k < 1:
            raise ConfigError(f"k={k} examples are not possible; give at least 1, or no examples at all for zero-shot")
        self.rows: list[Row] = [dict(row) for row in table]
        self._table = table if hasattr(table, "features") else self.rows
        self.k = k
        if len(self.rows) < k:
            raise DataError(f"{len(self.rows)} rows are too few for {k} examples; give more rows, or a smaller k")

    def name_labels(self, task: Task) -> None:
        """Have a task's labels in the pool's rows by name, where its table has ids in a column of class labels."""
        self.rows = list(task.rows(self._table))

    def prepare(self, pattern: Puts) -> None:
        """Read the pool as it is put to the model; called once before `choose`."""
        self._texts = [pattern.text(row) for row in self.rows]
        self._plain = [_plain(text) for text in self._texts]

    def choose(self, text: str) -> list[Row]:
        """The examples for a question, whose prompt alone is `text`; fewer than k where the pool has no other."""
        return self.choose_all([text])[0]

    def choose_all(self, texts: Sequence[str]) -> list[list[Row]]:
        """`choose` for several questions."""
        return [self._pick(text, order) for text, order in zip(texts, self._ranked(texts), strict=True)]

    def _pick(self, text: str, order: Iterable[int]) -> list[Row]:
        asked, found, seen = _plain(text), [], set()
        for i in order:
            if self._plain[i] != asked and self._plain[i] not in seen:
                seen.add(self._plain[i])
                found.append(self.rows[i])
            if len(found) == self.k:
                break
        return found[::-1]

    @abstractmethod
    def _ranked(self, texts: Sequence[str]) -> Iterable[Iterable[int]]:
        """For every question the numbers of the pool's rows, the best for it first."""


class RandomExamples(Examples):
    """The same rows for every question, drawn once; where one of them is the question itself, the next one."""

    def __init__(self, table: Any, k: int, seed: int = 0) -> None:
        super().__init__(table, k)
        self._order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()

    def _ranked(self, texts: Sequence[str]) -> Iterable[Iterable[int]]:
        return [self._order] * len(texts)


class BM25Examples(Examples):
    """The rows whose words are most like the question's (Okapi BM25, by bm25s)."""

    def prepare(self, pattern: Puts) -> None:
        super().prepare(pattern)
        known = "bm25s" in sys.modules
        try:
            self._bm25s: Any = import_module("bm25s")
        except ImportError as error:
            raise ConfigError("BM25 is bm25s's, which is not installed: pip install 'multitune[generation]'") from error
        if not known:  # its import sets its own logger to tell of every index, wherever anything logs to standard error
            logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._index = self._bm25s.BM25()
        self._index.index(self._words(self._texts), show_progress=False)

    def _words(self, texts: Sequence[str]) -> Any:
        return self._bm25s.tokenize(list(texts), stopwords=None, show_progress=False)

    def _ranked(self, texts: Sequence[str]) -> Iterable[Iterable[int]]:
        for text in texts:
            words = self._bm25s.tokenize([text], stopwords=None, show_progress=False, return_ids=False)[0]
            scores = torch.from_numpy(self._index.get_scores(words).copy()) if words else torch.zeros(len(self.rows))
            yield scores.argsort(descending=True, stable=True).tolist()


class NeighbourExamples(Examples):
    """The rows whose embeddings have the largest cosine with the question's."""

    def __init__(self, table: Any, k: int, backbone: Backbone) -> None:
        """
        Args:
            backbone: embeds texts: the mean of its last hidden states, such as `Backbone.load("minilm")`.
        """
        from multitune.bank import Bank

        super().__init__(table, k)
        self.backbone = backbone
        self._bank = Bank(backbone)

    def prepare(self, pattern: Puts) -> None:
        super().prepare(pattern)
        self._vectors = self._embed(self._texts)

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        found = [p.embedding for p in self._bank.predict([(None, text) for text in texts])]
        return torch.nn.functional.normalize(torch.stack([v for v in found if v is not None]), dim=1)

    def _ranked(self, texts: Sequence[str]) -> Iterable[Iterable[int]]:
        for vector in self._embed(texts):
            yield (self._vectors @ vector).argsort(descending=True, stable=True).tolist()


def _plain(text: str) -> str:
    """A text without case, runs of white space, marks of sentences and forms of characters: rows that differ in no more
    are one."""
    return " ".join(_MARKS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())
