"""Rank classification: of a row's possible answers, the one that the language model finds likeliest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from multitune.adapter import Adapter
from multitune.answers import Answered
from multitune.backbone import Backbone, check_is_backbone
from multitune.deltas import Memory
from multitune.errors import BackboneError, ConfigError, DataError
from multitune.plan import DeltaSet
from multitune.prompting.judged import JudgedRow, save_judged
from multitune.prompting.selection import Examples, Row
from multitune.ranked import answer_ids, prompt_ids, text_ids
from multitune.tasks import Example, Task, TaskData, judge
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
    rows: tuple[JudgedRow, ...]
    """What was read and chosen."""

    def save(self, folder: str | Path, title: str = "ranked answers") -> Path:
        """Write predictions.jsonl, predictions.html (one file that needs no other) and scores.json into a folder."""
        return save_judged(folder, self.rows, title=title, scores=self.metrics)


def rank(
    backbone: Backbone,
    task: Task,
    pattern: Pattern,
    table: Any,
    *,
    examples: Examples | None = None,
    adapter: Adapter | str | Path | None = None,
    normalised: bool = True,
    batch_size: int = 32,
) -> Ranking:
    """Choose among the answers of every row by their log-probability under the pattern.

    Semantics:  `argmax_y β(x, y)`, `β(x, y) = (1/T) Σ_t log p(y_t | x, y_<t)` (Liu et al. 2022, arXiv 2205.05638,
    section 3.3); without `normalised` the plain sum, which favours short answers. A label that several texts say has
    the mean over them.

    Rows with one instruction and the same examples read these once: their keys and values are computed for the first
    and are attended to by all (of the bare backbone without sliding windows; else they are read with every row).

    Args:
        task: classification or multiple choice; says the labels or choices, and the metric.
        table: rows; judged where all have their answers.
        examples: what stands in front of every row; `None` for zero-shot.
        adapter: an adapter that writes, or its folder, to use instead of the bare backbone.
        batch_size: most sequences in a forward pass; a row has one per answer.

    Raises:
        TaskError: a pattern that does not fit the task.
        DataError: a row that lacks a column or does not fit the backbone's positions; names it, counted from 0.
        ConfigError: a batch size below 1, or no backbone or task.
        BackboneError: no language model that writes, with its head and a tokenizer.
        AdapterError: as `Adapter.load`.
    """
    check_is_backbone("rank", backbone)
    if not isinstance(task, Task):
        of_data = "; give its task: data.task" if isinstance(task, TaskData) else ""
        raise ConfigError(f"rank takes a Task, not a {type(task).__name__}{of_data}")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not possible; give at least 1")
    pattern.check(task)
    pattern.check_end()
    rows = task.rows(table)
    if not rows:
        raise DataError("there are no rows to rank the answers of; give a table with at least one")
    if examples is not None:
        examples.name_labels(task)
        examples.prepare(pattern)
    loaded = adapter if adapter is None or isinstance(adapter, Adapter) else Adapter.load(adapter, backbone)
    reader = _Reader(backbone, loaded)
    asked = _ask(task, pattern, rows, examples)
    scores, shared = reader.scores(asked, normalised, batch_size)
    predictions = tuple(max(range(len(s)), key=lambda k: (s[k], -k)) for s in scores)
    judged = task.examples(rows) if all(task.label in row for row in rows) else None
    return Ranking(
        scores=tuple(scores),
        predictions=predictions,
        metrics={} if judged is None else judge(task, predictions, judged),
        num_shared=shared,
        rows=_judged(asked, scores, predictions, judged),
    )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One row in words."""

    prefix: str
    """The instruction and the examples."""
    text: str
    """Its own prompt."""
    answers: tuple[tuple[str, ...], ...]
    """Of every label or choice the texts that say it."""


def _judged(
    asked: Sequence[_Asked],
    scores: Sequence[tuple[float, ...]],
    predictions: Sequence[int],
    judged: Sequence[Example] | None,
) -> tuple[JudgedRow, ...]:
    """What was read and chosen, beside what is right where that is known."""
    found = []
    for i, (row, place) in enumerate(zip(asked, predictions, strict=True)):
        target = () if judged is None else judged[i].target
        right = [k for k in (target if isinstance(target, tuple) else (target,)) if isinstance(k, int)]
        options = tuple(texts[0].strip() for texts in row.answers)
        found.append(
            JudgedRow(
                prompt=row.prefix + row.text,
                answer=options[place],
                answers=tuple(options[k] for k in right),
                right=None if judged is None else place in right,
                options=options,
                scores=scores[i],
            )
        )
    return tuple(found)


def _ask(task: Task, pattern: Pattern, rows: Sequence[Any], examples: Examples | None) -> list[_Asked]:
    """The rows in words; the examples of all are looked up together."""
    texts: list[str] = []
    answers: list[tuple[tuple[str, ...], ...]] = []
    found: list[_Asked] = []
    for i, row in enumerate(rows):
        with _named(i):
            texts.append(pattern.text(row))
            answers.append(pattern.wordings(task, row))
    chosen: list[list[Row]] = [[] for _ in rows] if examples is None else examples.choose_all(texts)
    for i, (text, own, shown) in enumerate(zip(texts, answers, chosen, strict=True)):
        with _named(i):
            found.append(_Asked(prefix=pattern.prefix(task, shown), text=text, answers=own))
    return found


@contextmanager
def _named(row: int) -> Iterator[None]:
    """Say in a `DataError` which row it is of."""
    try:
        yield
    except DataError as error:
        raise DataError(f"row {row}: {error}") from error


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
        backbone = self.backbone
        windowed = getattr(backbone.model.config, "sliding_window", None)
        return self.deltas is None and backbone.takes_position_ids and not windowed and not backbone.decodes

    def scores(self, asked: Sequence[_Asked], normalised: bool, batch_size: int) -> tuple[list[tuple[float, ...]], int]:
        """Per row the scores of its answers; and how many rows had what stands in front of them read once for several.

        Rows that read everything by themselves run together, whatever stands in front of each.
        """
        fronts: dict[str, list[int]] = {}
        for row in asked:
            if row.prefix not in fronts:
                fronts[row.prefix] = [] if self.backbone.decodes else text_ids(self.backbone, row.prefix, first=True)
        encoded = [self._encode(i, row, fronts[row.prefix]) for i, row in enumerate(asked)]
        times = Counter(row.prefix for row in asked)
        once = {prefix for prefix, front in fronts.items() if front and times[prefix] > 1 and self._shares}
        found: list[tuple[float, ...]] = [()] * len(asked)
        together: dict[str | None, list[int]] = {}
        for i, row in enumerate(asked):
            together.setdefault(row.prefix if row.prefix in once else None, []).append(i)
        for prefix, places in together.items():
            front = [] if prefix is None else fronts[prefix]
            deltas = self.deltas if prefix is None else self._memory(front)
            rows = [replace(a, input_ids=a.input_ids[len(front) :]) for i in places for a in encoded[i]]
            losses = iter(answer_losses(self.backbone, deltas, rows, batch_size=batch_size))
            for i in places:
                pairs = [[next(losses) for _ in texts] for texts in asked[i].answers]
                found[i] = tuple(fmean(-loss / (count if normalised else 1) for loss, count in of) for of in pairs)
        return found, sum(times[prefix] for prefix in once)

    def _encode(self, number: int, row: _Asked, front: list[int]) -> list[Answered]:
        """A row with each text that says an answer, behind its prefix's token ids; an encoder reads it as one text.

        Raises:
            DataError: it does not fit the backbone's positions.
        """
        backbone = self.backbone
        room = backbone.max_length - (0 if self.deltas is None else self.deltas.num_positions)
        if backbone.decodes:
            prompt = prompt_ids(backbone, row.prefix + row.text)
        else:
            prompt = [*front, *text_ids(backbone, row.text, first=not row.prefix)]
        found = []
        for answer in (text for texts in row.answers for text in texts):
            ids = answer_ids(backbone, answer)
            # A decoder has the answer to itself.
            needed = max(len(prompt), len(ids)) if backbone.decodes else len(prompt) + len(ids)
            if needed > room:
                raise DataError(
                    f"row {number}: its examples, prompt and answer are {needed} tokens, but backbone "
                    f"'{backbone.name}' has {backbone.max_length} positions; take fewer or shorter examples"
                )
            found.append(Answered(input_ids=[*prompt, *ids], num_answer=len(ids), row=number))
        return found

    def _memory(self, ids: list[int]) -> DeltaSet:
        """The keys and values of tokens that all rows have in front, at their positions."""
        sites = self.backbone.keys_and_values(ids)
        some = next(iter(sites.values()))[0]
        is_open = some.new_ones(len(ids))
        memories = {site: [Memory(keys=k, values=v, open=is_open, shift=len(ids))] for site, (k, v) in sites.items()}
        return DeltaSet(memories).fused(self.backbone.dtype, self.backbone.device)
