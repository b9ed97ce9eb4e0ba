"""Rows of a task as tensors: tokenized once, ordered by seed and epoch alone, padded per batch."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from multitune.answers import encode_answered
from multitune.backbone import Backbone
from multitune.batching import Encoded, encode, pad
from multitune.errors import DataError, DataWarning
from multitune.heads import IGNORED
from multitune.ranked import RankedRow, encode_ranked, index_of
from multitune.tasks import Example, Task
from multitune.training.packing import together

if TYPE_CHECKING:
    from multitune.training.config import TrainConfig
    from multitune.training.frozen_states import FrozenStates

#: Batches of one length-sorted pool; larger pools pad less, smaller ones mix more.
_POOL = 50


class TaughtWords(NamedTuple):
    """What a teacher says of an answer's T tokens, as `likeliest_words` gives it."""

    words: Tensor
    """int32 `[T, K]`."""
    log_probs: Tensor
    """float32 `[T, K + 1]`, or `[T, V]`."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row: its sequences (one, or one per choice) and its target. Generation: a row with one of its answers."""

    sequences: tuple[Encoded, ...]
    target: Any
    """As `Example.target`; generation: how many tokens at the end of the sequence are the answer, which an
    encoder-decoder's decoder reads and the encoder does not."""
    ranked: RankedRow | None = None
    """Of a task with a pattern: its choices, and where they stand in the sequences."""
    teacher: tuple[float, ...] | TaughtWords | None = None
    """What is distilled, if anything is: of a task with a pattern the scores of its choices; generation: words."""
    row: int = 0
    """Generation: the number of its row, from 0; a row with several answers is there several times."""

    def __len__(self) -> int:
        return max(len(s) for s in self.sequences)


def warn_of_empty(task: Task, split: str, examples: Sequence[Example]) -> None:
    """Warn of rows in which a text is empty or blank: they are read as they are, and seldom meant."""
    lacks: Callable[[Iterable[bool]], bool] = all if task.kind == "tagging" else any  # the texts of tagging are words
    empty = [i for i, e in enumerate(examples) if any(lacks(not text.strip() for text in texts) for texts in e.texts)]
    if empty:
        shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        warnings.warn(
            f"task '{task.name}': {len(empty)} of {len(examples)} {split} rows have an empty text (rows {shown}, "
            f"counted from 0); fill them in or drop them",
            DataWarning,
            stacklevel=4,
        )


class TaskRows(Dataset[Item]):
    """The labelled rows of one split, tokenized."""

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        table: Any,
        *,
        max_length: int,
        split: str,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """
        Args:
            answers: generation: the token ids of an answer to each row, whose own is then not read.

        Raises:
            DataError: no rows, or a row that does not fit the task; names the split.
        """
        try:
            examples = task.examples(table, labelled=answers is None)
        except DataError as error:
            raise DataError(f"{split} rows of {error}") from error
        if not examples:
            raise DataError(f"task '{task.name}' has no {split} rows; give a table with at least one")
        warn_of_empty(task, split, examples)
        self.task = task
        self.max_length = max_length
        """Most tokens of a row."""
        self.examples = examples
        self.items: list[Item]
        if task.kind == "generation":
            answered = encode_answered(backbone, task, examples, max_length=max_length, split=split, answers=answers)
            self.items = [
                Item(sequences=(Encoded(input_ids=a.input_ids),), target=a.num_answer, row=a.row) for a in answered
            ]
            return
        if task.pattern is not None:
            ranked = encode_ranked(backbone, task, [dict(row) for row in table], max_length=max_length, split=split)
            self.items = [
                Item(sequences=r.sequences, target=e.target, ranked=r) for r, e in zip(ranked, examples, strict=True)
            ]
            return
        texts = [t for e in examples for t in e.texts]
        encoded = iter(encode(backbone, texts, max_length=max_length, words=task.kind == "tagging"))
        self.items = [Item(sequences=tuple(next(encoded) for _ in e.texts), target=e.target) for e in examples]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def with_teacher(self, said: Sequence[tuple[float, ...] | TaughtWords]) -> TaskRows:
        """The same rows, each item with what is to be distilled: the scores of its choices, or words."""
        taught = copy.copy(self)
        taught.items = [replace(item, teacher=t) for item, t in zip(self.items, said, strict=True)]
        return taught

    @property
    def num_cut(self) -> int:
        """Rows of which a text is longer than what is read of it; of prompts, which warn of it, none."""
        return sum(any(s.cut for s in item.sequences) for item in self.items)

    @property
    def sequences(self) -> list[Encoded]:
        """All sequences, row after row."""
        return [s for item in self.items for s in item.sequences]

    @property
    def digest(self) -> str:
        """Hash of every token id and target; tells whether two runs see the same rows."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(repr(([s.input_ids for s in item.sequences], item.target)).encode())
            digest.update(repr(item.ranked.choices).encode() if item.ranked is not None else b"")
        return digest.hexdigest()[:32]


class Collator:
    """Rows to one padded batch, the arguments of `TuningModel.forward`."""

    def __init__(
        self,
        kind: str,
        pad_id: int,
        states: FrozenStates | None = None,
        start_ids: Sequence[int] = (),
        room: int | None = None,
    ) -> None:
        """
        Args:
            start_ids: what an encoder-decoder's decoder begins with.
            states: what the frozen layers give for each sequence, if it is kept.
            room: generation on a causal backbone: items share rows of at most so many tokens; by default none does.
        """
        self.kind = kind
        self.pad_id = pad_id
        self.states = states
        self.start_ids = list(start_ids)
        self.room = room

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        if self.start_ids and self.kind == "generation":
            return self._two_sided(items)
        if self.room is not None:
            rows = together([len(item) for item in items], self.room)
            if len(rows) < len(items):
                return self._packed([[items[i] for i in row] for row in rows])
        sequences = [s for item in items for s in item.sequences]
        batch = pad(sequences, self.pad_id)
        found: dict[str, Tensor | None] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "token_type_ids": batch.token_type_ids,
            "slots": batch.slots,
            "decoder_input_ids": batch.decoder_input_ids,
            "targets": self._targets(items, batch.input_ids.shape[1]),
            "states": None if self.states is None else self.states.batch([[s] for s in sequences]),
        }
        ranked = [item.ranked for item in items if item.ranked is not None]
        if ranked:
            found["index"] = index_of(ranked)
            found["teacher"] = _taught(items)
        return {name: t for name, t in found.items() if t is not None} | _taught_words(items)

    def _packed(self, rows: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        """Rows of several texts, one behind the other; padding counts to the last."""
        sequences = [[item.sequences[0] for item in row] for row in rows]
        batch = pad([Encoded(input_ids=[i for s in row for i in s.input_ids]) for row in sequences], self.pad_id)
        targets, pieces = torch.full_like(batch.input_ids, IGNORED), torch.empty_like(batch.input_ids)
        for place, row in enumerate(rows):
            end = 0
            for number, item in enumerate(row):
                pieces[place, end:] = number
                end += len(item)
                answer = slice(end - item.target, end)
                targets[place, answer] = batch.input_ids[place, answer]
        found = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pieces": pieces,
            "targets": targets,
            "states": None if self.states is None else self.states.batch(sequences),
        }
        taught = _taught_words([item for row in rows for item in row])
        return {name: t for name, t in found.items() if t is not None} | taught

    def _two_sided(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The prompts for the encoder; for the decoder its start and the answer, whose every token it is to find."""
        whole = [item.sequences[0].input_ids for item in items]
        read = pad(
            [Encoded(input_ids=ids[: -item.target]) for ids, item in zip(whole, items, strict=True)], self.pad_id
        )
        answers = [
            Encoded(input_ids=[*self.start_ids, *ids[-item.target :]]) for ids, item in zip(whole, items, strict=True)
        ]
        written = pad(answers, self.pad_id)
        targets = written.input_ids.clone()
        targets[:, : len(self.start_ids)] = IGNORED
        if written.attention_mask is not None:
            targets[written.attention_mask == 0] = IGNORED
        found = {
            "input_ids": read.input_ids,
            "attention_mask": read.attention_mask,
            "decoder_input_ids": written.input_ids,
            "targets": targets,
        }
        return {name: t for name, t in found.items() if t is not None} | _taught_words(items)

    def _targets(self, items: Sequence[Item], width: int) -> Tensor:
        if self.kind == "tagging":
            out = torch.full((len(items), width), IGNORED)
            for row, item in zip(out, items, strict=True):
                # Words that were cut off have no start. A word without tokens shares the start of the next, which wins.
                for start, tag in zip(item.sequences[0].word_starts, item.target, strict=False):
                    row[start] = tag
            return out
        if self.kind == "generation":
            out = torch.full((len(items), width), IGNORED)
            for row, item in zip(out, items, strict=True):
                ids = item.sequences[0].input_ids
                row[len(ids) - item.target : len(ids)] = torch.tensor(ids[-item.target :])
            return out
        if self.kind == "multiple_choice" and isinstance(items[0].target, tuple):
            counts = [len(item.sequences if item.ranked is None else item.ranked.choices) for item in items]
            out = torch.full((len(items), max(counts)), IGNORED)
            for row, item, count in zip(out, items, counts, strict=True):
                row[:count] = 0
                row[list(item.target)] = 1
            return out
        dtype = torch.float32 if self.kind in ("regression", "multilabel") else torch.long
        return torch.tensor([item.target for item in items], dtype=dtype)


def _taught(items: Sequence[Item]) -> Tensor | None:
    """The teacher's scores `[R, choices]`, -inf where a row has fewer choices; `None` where nothing is distilled."""
    scores = [torch.tensor(item.teacher) for item in items if item.teacher is not None]
    return pad_sequence(scores, batch_first=True, padding_value=-torch.inf) if scores else None


def _taught_words(items: Sequence[Item]) -> dict[str, Tensor]:
    """Generation: what is distilled at the tokens that count, row after row; empty where nothing is."""
    said = [item.teacher for item in items if isinstance(item.teacher, TaughtWords)]
    if not said:
        return {}
    return {"index": torch.cat([t.words for t in said]).long(), "teacher": torch.cat([t.log_probs for t in said])}


class BatchOrder(Sampler[list[int]]):
    """Batches of row numbers: a function of seed, epoch and lengths, and of nothing else."""

    def __init__(self, lengths: Sequence[int], batch_size: int, *, accumulation: int, seed: int, grouped: bool) -> None:
        """
        Args:
            accumulation: batches per optimizer step; rows are grouped per step, so that 2 x 8 sees the rows of 1 x 16.
            grouped: rows of similar length together.
        """
        self.lengths = lengths
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.grouped = grouped
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        step = self.batch_size * self.accumulation
        if self.grouped:
            order = self._group(order, step, generator)
        return iter([order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)])

    def _group(self, order: list[int], step: int, generator: torch.Generator) -> list[int]:
        # The rows that fill no whole step stay as they are drawn: they must come last, and be no length in particular.
        whole = len(order) - len(order) % step
        pool = min(_POOL, max(1, whole // step // 4)) * step
        steps: list[list[int]] = []
        for start in range(0, whole, pool):
            part = sorted(order[start : min(start + pool, whole)], key=lambda i: self.lengths[i], reverse=True)
            steps += [part[i : i + step] for i in range(0, len(part), step)]
        shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        return [i for rows in shuffled for i in rows] + order[whole:]


def order_of(rows: TaskRows, config: TrainConfig) -> BatchOrder:
    """The batches of a run."""
    return BatchOrder(
        [len(item) for item in rows.items],
        config.batch_size,
        accumulation=config.gradient_accumulation,
        seed=config.seed,
        grouped=config.length_grouped,
    )


class RowLoader(DataLoader[Item]):
    """A loader whose order follows the epoch and which draws nothing from the global random state."""

    def __init__(self, rows: TaskRows, order: BatchOrder, collator: Collator) -> None:
        super().__init__(rows, batch_sampler=order, collate_fn=collator, generator=torch.Generator())
        self.order = order

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.order.set_epoch(epoch)


def num_targets(kind: str, targets: Tensor) -> int:
    """How many terms the mean loss of a batch has, up to a factor that all batches share."""
    return int((targets != IGNORED).sum()) if kind in ("tagging", "generation") else len(targets)
