"""How well a model does tasks that it is only told about: ranked where there are options, written otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from multitune.adapter import Adapter
from multitune.answers import encode_answered, settle_format
from multitune.backbone import Backbone
from multitune.bank import Bank
from multitune.errors import ConfigError, DataError
from multitune.generation.evaluation import evaluate_texts
from multitune.generation.prompts import AnySettings
from multitune.prompting.exemplars import prompt_task
from multitune.prompting.instructions import InstructedTask
from multitune.prompting.judged import JudgedRow, save_judged
from multitune.prompting.mixture import rows_of
from multitune.tasks import Example
from multitune.tasks.p3 import Asked
from multitune.training.language import answer_losses, served


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task, zero-shot."""

    task: str
    metric: str
    """`accuracy` where options were ranked, else the task's metric of what was written."""
    score: float
    """The median over the wordings."""
    by_wording: tuple[float, ...]
    num_rows: int
    chance: float | None
    """Accuracy of a blind choice among the options; `None` where there are none."""
    rows: tuple[JudgedRow, ...]
    """What was chosen or written, of every wording."""

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON values, without the rows."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}


def save_scores(folder: str | Path, scores: Sequence[TaskScore], title: str = "zero-shot") -> Path:
    """Write predictions.jsonl, predictions.html (one file that needs no other) and scores.json into a folder."""
    return save_judged(
        folder,
        [row for score in scores for row in score.rows],
        title=title,
        scores={score.task: score.score for score in scores},
        facts=[score.to_dict() for score in scores],
    )


def score_tasks(
    backbone: Backbone,
    tasks: Sequence[InstructedTask],
    adapter: Adapter | str | Path | None = None,
    *,
    num_rows: int = 50,
    num_wordings: int = 1,
    settings: AnySettings | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    report: Callable[[TaskScore], None] | None = None,
) -> list[TaskScore]:
    """Judge tasks zero-shot: by the answer that is likeliest per token of the options, or by what is written.

    Semantics:  `argmax_y (1/T) Σ_t log p(y_t | x, y_<t)` over a row's options y, their end of text included.

    Args:
        adapter: trained on such rows; `None` for the bare backbone.
        num_rows: rows of each task; the same ones whatever the model.
        num_wordings: how many of a task's wordings; the score is their median, and never the best one's.
        settings: how to write; by default greedily with at most 64 tokens.
        max_length: tokens of a prompt and an option; longer prompts lose their front.
        report: called with each score.

    Raises:
        ConfigError: numbers below 1.
        DataError: a task without wordings, or of whose rows one fits none.
    """
    for name, value in (("num_rows", num_rows), ("num_wordings", num_wordings)):
        if value < 1:
            raise ConfigError(f"{name}={value} is not possible; give at least 1")
    silent = next((task.name for task in tasks if not task.wordings), None)
    if silent is not None:
        raise DataError(f"task '{silent}' has no wording that puts its rows; give it one, such as by_pattern(...)")
    loaded = adapter if adapter is None or isinstance(adapter, Adapter) else Adapter.load(adapter, backbone)
    judge = _Judge(backbone, loaded, settings or {"max_new_tokens": 64}, max_length, batch_size)
    found = []
    for task in tasks:
        numbers = range(min(num_wordings, len(task.wordings)))
        scores = [judge.score(task, rows_of(task, num_rows, wording, seed), wording) for wording in numbers]
        values, rows = tuple(s.score for s in scores), tuple(row for s in scores for row in s.rows)
        found.append(replace(scores[0], score=statistics.median(values), by_wording=values, rows=rows))
        if report is not None:
            report(found[-1])
    return found


class _Judge:
    def __init__(
        self, backbone: Backbone, adapter: Adapter | None, settings: AnySettings, max_length: int, batch_size: int
    ) -> None:
        self.backbone = backbone
        self.settings = settings
        self.batch_size = batch_size
        self.on, self.deltas = (backbone, None) if adapter is None else served(backbone, adapter)
        self.max_length = min(
            max_length, self.on.max_length - (0 if self.deltas is None else self.deltas.num_positions)
        )
        self.bank = Bank(backbone)
        self.name = None if adapter is None else "it"
        if adapter is not None:
            self.bank.add("it", adapter)
        format = "auto" if adapter is None else adapter.task.format
        self.task = settle_format(backbone, prompt_task("zero-shot", metric="rouge_l", format=format))

    def score(self, task: InstructedTask, rows: Sequence[Asked], wording: int) -> TaskScore:
        if all(row.options for row in rows):
            judged = self._ranked(rows)
            chance = statistics.mean(len(set(r.answers) & set(r.options)) / len(r.options) for r in rows)
            name, value = "accuracy", statistics.fmean(bool(row.right) for row in judged)
        else:
            chance = None
            name = task.metric
            value, judged = self._written(task, rows)
        return TaskScore(
            task=task.name,
            metric=name,
            score=value,
            by_wording=(value,),
            num_rows=len(rows),
            chance=chance,
            rows=tuple(replace(row, task=task.name, wording=wording) for row in judged),
        )

    def _ranked(self, rows: Sequence[Asked]) -> list[JudgedRow]:
        """Per row the likeliest option."""
        examples = [Example(texts=((row.prompt,),), target=row.options) for row in rows]
        encoded = encode_answered(self.on, self.task, examples, max_length=self.max_length, split="given")
        losses = iter(answer_losses(self.on, self.deltas, encoded, batch_size=self.batch_size))
        found = []
        for row in rows:
            scores = tuple(-loss / count for loss, count in (next(losses) for _ in row.options))
            chosen = row.options[scores.index(max(scores))]
            found.append(
                JudgedRow(
                    prompt=row.prompt,
                    answer=chosen,
                    answers=row.answers,
                    right=chosen in row.answers,
                    options=row.options,
                    scores=scores,
                )
            )
        return found

    def _written(self, task: InstructedTask, rows: Sequence[Asked]) -> tuple[float, list[JudgedRow]]:
        """The task's metric of what is written for the rows, those with one prompt together, and the texts."""
        table = [{"prompt": row.prompt, "answers": list(row.answers)} for row in rows]
        judged = replace(self.task, metric=task.metric)
        done = evaluate_texts(self.bank, self.name, table, self.settings, task=judged, batch_size=self.batch_size)
        texts = [JudgedRow(prompt=w.prompt, answer=w.text, answers=w.references, texts=(w.text,)) for w in done.rows]
        return next(iter(done.scores.values())), texts
