"""Rank classification: of a row's possible answers, the one that the language model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from multitune.adapter import Adapter
from multitune.answers import Answered
from multitune.backbone import Backbone
from multitune.deltas import Memory
from multitune.errors import BackboneError, DataError
from multitune.plan import DeltaSet
from multitune.prompting.selection import Examples
from multitune.ranked import text_ids
from multitune.tasks import Task, judge
from multitune.tasks.pattern import Pattern
from multitune.training.language import answer_losses, served


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a model chose."""

    scores: tuple[tuple[float, ...], ...]
    """Per row and answer: its log-probability, over its number of tokens unless that was not wanted."""
    predictions: tuple[int, ...]
    """Per row the answer with the highest score; the first of equals."""
    metrics: dict[str, float]
    """The task's metric; empty where the rows have no answers."""
    num_shared: int
    """Rows whose instruction and examples were read once for several rows."""


def rank(
    backbone: Backbone,
    task: Task,
    pattern: Pattern,
    table: Any,
    *,
    examples: Examples | None = None,
    adapter: Adapter | None = None,
    normalised: bool = True,
    batch_size: int = 32,
) -> Ranking:
    """Choose among the answers of every row by their log-probability under the pattern.

    Semantics:  `argmax_y β(x, y)`, `β(x, y) = (1/T) Σ_t log p(y_t | x, y_<t)` (Liu et al. 2022, arXiv 2205.05638,
    section 3.3); without `normalised` the plain sum, which favours short answers.

    Rows with one instruction and the same examples read these once: their keys and values are computed for the first
    and are attended to by all (of the bare backbone without sliding windows; else they are read with every row).

    Args:
        task: classification or multiple choice; says the labels or choices, and the metric.
        table: rows; judged where all have their answers.
        examples: what stands in front of every row; `None` for zero-shot.
        adapter: an adapter that writes, to use instead of the bare backbone.
        batch_size: most sequences in a forward pass; a row has one per answer.

    Raises:
        TaskError: a pattern that does not fit the task.
        DataError: a row that lacks a column or does not fit the backbone's positions; names it, counted from 0.
        BackboneError: no causal language model with its head and a tokenizer.
    """
    pattern.check(task)
    pattern.check_end()
    rows = task.rows(table)
    if not rows:
        raise DataError("there are no rows to rank the answers of; give a table with at least one")
    if examples is not None:
        examples.name_labels(task)
        examples.prepare(pattern)
    reader = _Reader(backbone, adapter)
    by_prefix: dict[str, list[int]] = {}
    asked: list[tuple[str, tuple[str, ...]]] = []
    for i, row in enumerate(rows):
        try:
            text = pattern.text(row)
            prefix = pattern.prefix(task, examples.choose(text) if examples is not None else ())
            asked.append((text, pattern.answers(task, row)))
        except DataError as error:
            raise DataError(f"row {i}: {error}") from error
        by_prefix.setdefault(prefix, []).append(i)
    scores: list[tuple[float, ...]] = [()] * len(rows)
    shared = 0
    for prefix, places in by_prefix.items():
        found, once = reader.scores(prefix, [asked[i] for i in places], places, normalised, batch_size)
        shared += len(places) * once
        for i, of_row in zip(places, found, strict=True):
            scores[i] = of_row
    predictions = tuple(max(range(len(s)), key=lambda k: (s[k], -k)) for s in scores)
    labelled = all(task.label in row for row in rows)
    metrics = judge(task, predictions, task.examples(rows)) if labelled else {}
    return Ranking(scores=tuple(scores), predictions=predictions, metrics=metrics, num_shared=shared)


class _Reader:
    """Scores answers behind prompts on one backbone."""

    def __init__(self, backbone: Backbone, adapter: Adapter | None) -> None:
        _ = backbone.lm_head
        self.backbone, self.deltas = (backbone, None) if adapter is None else served(backbone, adapter)
        if backbone.tokenizer is None:
            raise BackboneError(
                f"backbone '{backbone.name}' has no tokenizer, so that it cannot read texts; give one: "
                f"Backbone(model, tokenizer)"
            )

    @property
    def _shares(self) -> bool:
        """Whether the keys and values of a prefix can be handed to other rows."""
        windowed = getattr(self.backbone.model.config, "sliding_window", None)
        return self.deltas is None and self.backbone.takes_position_ids and not windowed

    def scores(
        self,
        prefix: str,
        asked: Sequence[tuple[str, tuple[str, ...]]],
        numbers: Sequence[int],
        normalised: bool,
        batch_size: int,
    ) -> tuple[list[tuple[float, ...]], bool]:
        """Per prompt the scores of its answers, all behind one prefix; and whether that was read once for all."""
        front, prompts = self._prompts(prefix, [text for text, _ in asked])
        once = bool(front) and len(asked) > 1 and self._shares
        rows: list[Answered] = []
        room = self.backbone.max_length - (0 if self.deltas is None else self.deltas.num_positions)
        for number, prompt, (_, answers) in zip(numbers, prompts, asked, strict=True):
            for answer in answers:
                ids = text_ids(self.backbone, answer, first=False)
                needed = len(front) + len(prompt) + len(ids)
                if self.backbone.decodes:  # the answer has the decoder to itself
                    needed = max(len(prompt), len(ids))
                if needed > room:
                    raise DataError(
                        f"row {number}: its examples, prompt and answer are {needed} tokens, but backbone "
                        f"'{self.backbone.name}' has {self.backbone.max_length} positions; take fewer or shorter "
                        f"examples"
                    )
                whole = [*([] if once else front), *prompt, *ids]
                rows.append(Answered(input_ids=whole, num_answer=len(ids), row=number))
        deltas = self._memory(front) if once else self.deltas
        found = iter(answer_losses(self.backbone, deltas, rows, batch_size=batch_size))
        out: list[tuple[float, ...]] = []
        for _, answers in asked:
            pairs = [next(found) for _ in answers]
            out.append(tuple(-loss / (count if normalised else 1) for loss, count in pairs))
        return out, once

    def _prompts(self, prefix: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of what all texts have in front, and of each; an encoder reads both as one text."""
        backbone = self.backbone
        if not backbone.decodes:
            front = text_ids(backbone, prefix, first=True)
            return front, [text_ids(backbone, text, first=not prefix) for text in texts]
        assert backbone.tokenizer is not None
        with backbone.tokenizer_lock:
            found = backbone.tokenizer([prefix + text for text in texts], truncation=False, return_attention_mask=False)
        return [], [list(ids) for ids in found["input_ids"]]

    def _memory(self, ids: list[int]) -> DeltaSet:
        """The keys and values of tokens that all rows have in front, at their positions."""
        sites = self.backbone.keys_and_values(ids)
        some = next(iter(sites.values()))[0]
        is_open = some.new_ones(len(ids))
        memories = {site: [Memory(keys=k, values=v, open=is_open, shift=len(ids))] for site, (k, v) in sites.items()}
        return DeltaSet(memories).fused(self.backbone.dtype, self.backbone.device)
