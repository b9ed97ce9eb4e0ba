"""Context distillation: what the frozen backbone says when it reads a context, as a target for one that does not.

The teacher of Askell et al. 2021 (arXiv 2112.00861, section 2.1) is the frozen backbone with the context: an
instruction, examples, or both. It runs once, before training, and without dropout. The examples are the same for all
rows, except where one of them is the row itself or reads like it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from multitune.answers import PromptFormat
from multitune.backbone import Backbone
from multitune.batching import Encoded
from multitune.errors import DataError
from multitune.generation.settings import GenerationSettings
from multitune.language_loss import likeliest_words
from multitune.plan import Plan
from multitune.prompting.exemplars import ExemplarPrompts
from multitune.prompting.ranking import rank
from multitune.prompting.selection import RandomExamples
from multitune.tasks import Task, TaskData
from multitune.tasks.targets import answers
from multitune.training.config import TrainConfig
from multitune.training.data import Collator, Item, TaskRows, TaughtWords
from multitune.training.written import write_rows

#: Words of a distribution over the vocabulary that are kept, the likeliest; all others are one, so that the student
#: learns how much they have together. That is half a kilobyte per token of an answer, whatever the vocabulary, where
#: whole distributions of a data set would fill the memory; to make these anew per batch, the teacher would have to read
#: its context in every epoch.
NUM_WORDS = 64


def teacher_scores(backbone: Backbone, task: Task, table: Any, config: TrainConfig) -> tuple[tuple[float, ...], ...]:
    """Per row the scores β of its answers behind the teacher's context; the task has a pattern.

    Raises:
        DataError: fewer rows than examples, or a context that does not fit the backbone's positions; names the row.
    """
    assert task.pattern is not None
    pattern = task.pattern
    if config.distill_instruction is not None:
        said = [config.distill_instruction, *([pattern.instruction] if pattern.instruction else [])]
        pattern = replace(pattern, instruction=pattern.separator.join(said))
    rows = task.rows(table)
    distinct = {_key(row): row for row in rows}  # a table may hold a row many times, which the teacher reads once
    asked = list(distinct.values())
    k = config.distill_examples
    examples = None if k is None else RandomExamples(asked, k, seed=config.seed)
    with _judging(backbone):
        found = rank(backbone, task, pattern, asked, examples=examples, batch_size=config.eval_batch_size)
    scores = dict(zip(distinct, found.scores, strict=True))
    return tuple(scores[_key(row)] for row in rows)


class TextTeacher:
    """The frozen backbone with its context, on the rows of one split of a task that writes."""

    def __init__(self, backbone: Backbone, data: TaskData, split: str, config: TrainConfig) -> None:
        """
        Args:
            data: of kind generation, its format settled. Training rows that have an answer can be examples; where the
                teacher writes (`config.distill_new_tokens`), no row needs one.
            split: "train" or "validation".

        Raises:
            DataError: fewer such rows than examples, or a row that does not fit the task or lacks its answer; names it.
        """
        self.backbone, self.task, self.split, self.config = backbone, data.task, split, config
        rows = data.task.rows(data.train if split == "train" else data.validation)
        if config.distill_new_tokens is None:
            self._check_answers(rows)
        examples = None
        if config.distill_examples is not None:
            examples = RandomExamples(self._pool(data), config.distill_examples, seed=config.seed)
        context = ExemplarPrompts(data.task, examples, instruction=config.distill_instruction or "")
        self.prompts = PromptFormat(backbone, data.task).prompts(context.texts(rows))
        """Per row the token ids of the context and the row's own prompt, none of which is cut."""

    def _pool(self, data: TaskData) -> list[dict[str, Any]]:
        rows = data.task.rows(data.train)
        if self.config.distill_new_tokens is not None:
            rows = [row for row in rows if not _missing(row.get(data.task.label))]
        return list({_key(row): row for row in rows}.values())

    def _check_answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise `DataError` for a row without an answer at whose tokens to distil."""
        for number, row in enumerate(rows):
            problem = _missing(row.get(self.task.label))
            if problem:
                raise DataError(
                    f"{self._named(number)}: {problem}; or have the teacher write the answers of all rows, "
                    f"distill_new_tokens=64 (--distill-new-tokens 64)"
                )

    def write(self) -> list[tuple[int, ...]]:
        """Per row the token ids of a text, with the end of text where it came to one within `distill_new_tokens`.

        Texts are drawn from the teacher's own distribution and are not its likeliest ones: the divergences at a text's
        tokens then add up, in the mean over texts, to that between all that teacher and student could write.

        Raises:
            DataError: a context that leaves no room for so many tokens, or scores that are no numbers; names the row.
        """
        config = self.config
        assert config.distill_new_tokens is not None
        settings = []
        first = 0 if self.split == "train" else 2**29
        for row, prompt in enumerate(self.prompts):
            self._check_room(row, len(prompt), config.distill_new_tokens)
            seed = config.seed * 2**30 + first + row  # rows that read alike get texts of their own
            settings.append(GenerationSettings(max_new_tokens=config.distill_new_tokens, temperature=1.0, seed=seed))
        with _judging(self.backbone):
            found = write_rows(self.backbone, None, self.prompts, settings, batch_size=config.eval_batch_size)
        for row, written in enumerate(found):
            self._check_finite(row, written.finish_reason != "not_finite")
        return [written.token_ids for written in found]

    def teach(self, rows: TaskRows) -> list[TaughtWords]:
        """What the teacher says at every token of every item's answer.

        Args:
            rows: those of the split, as the student reads them.

        Raises:
            DataError: a row that does not fit the backbone's positions with its context, or of which the teacher's
                scores are no numbers; names it.
        """
        read: list[tuple[tuple[int, ...], int]] = []
        for item in rows.items:
            prompt, answer = self.prompts[item.row], item.sequences[0].input_ids[-item.target :]
            self._check_room(item.row, len(prompt), len(answer))
            read.append(((*prompt, *answer), item.target))
        # A table may hold a row many times, which the teacher reads once; rows of similar length run together.
        distinct = sorted(dict.fromkeys(read), key=lambda sequence: len(sequence[0]), reverse=True)
        found: dict[tuple[tuple[int, ...], int], TaughtWords] = {}
        step = self.config.eval_batch_size
        with _judging(self.backbone):
            for start in range(0, len(distinct), step):
                picked = distinct[start : start + step]
                found |= zip(picked, self._said(picked), strict=True)
        for item, sequence in zip(rows.items, read, strict=True):
            self._check_finite(item.row, bool(torch.isfinite(found[sequence].log_probs).all()))
        return [found[sequence] for sequence in read]

    def _said(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> list[TaughtWords]:
        """Of token ids, of which so many at the end are the answer, what the teacher says at these."""
        backbone = self.backbone
        items = [Item(sequences=(Encoded(input_ids=list(ids)),), target=count) for ids, count in sequences]
        batch = Collator("generation", backbone.pad_id, start_ids=backbone.start_ids)(items)
        batch = {name: t.to(backbone.device) for name, t in batch.items()}
        targets = batch.pop("targets")
        with torch.no_grad():
            hidden = backbone.run(Plan([None] * len(items)), **batch)
            words, log_probs = likeliest_words(backbone.lm_head, hidden, targets, NUM_WORDS)
        counts = [count for _, count in sequences]
        parts = zip(words.to("cpu", torch.int32).split(counts), log_probs.cpu().split(counts), strict=True)
        return [TaughtWords(*part) for part in parts]

    def _check_room(self, row: int, prompt: int, answer: int) -> None:
        """Raise `DataError` where a row's prompt, context included, and its answer have more tokens than positions."""
        most = self.backbone.max_length
        needed = max(prompt, answer) if self.backbone.decodes else prompt + answer
        if needed > most:
            shorter = "" if self.config.distill_new_tokens is None else ", a smaller distill_new_tokens"
            raise DataError(
                f"{self._named(row)}: with the context that its teacher reads, prompt and answer are {needed} tokens, "
                f"but backbone '{self.backbone.name}' has {most} positions; take fewer or shorter examples, a shorter "
                f"instruction{shorter}, or drop the row"
            )

    def _check_finite(self, row: int, finite: bool) -> None:
        if not finite:
            name, dtype = self.backbone.name, self.backbone.dtype
            why = f"as happens where {dtype} is too narrow for backbone '{name}'; load it with dtype='float32'"
            if dtype == torch.float32:
                why = f"though backbone '{name}' computes in float32; look for weights of it that are not finite"
            raise DataError(f"{self._named(row)}: the teacher's scores are not finite numbers, {why}, or drop the row")

    def _named(self, row: int) -> str:
        return f"{self.split} row {row} of task '{self.task.name}'"


@contextmanager
def _judging(backbone: Backbone) -> Iterator[None]:
    """Without dropout, though other runs may be training on the backbone."""
    was_training = backbone.model.training
    backbone.model.eval()
    try:
        yield
    finally:
        backbone.model.train(was_training)


def _missing(answer: Any) -> str:
    """What is wrong with a row's answer; empty where it has one."""
    try:
        answers(answer)
    except DataError as error:
        return str(error)
    return ""


def _key(row: Mapping[str, Any]) -> str:
    return repr(sorted(row.items()))
