"""Exemplars in prompts: every row of a task that writes gets the most similar training rows in front of it.

Training a soft prompt on such rows is instruction prompt tuning (Singhal et al. 2022, arXiv 2212.13138, section 3.3.3):
`[soft prompt; instruction and exemplars; question]`, of which the soft prompt alone is trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multitune.answers import PromptFormat, settle_format
from multitune.errors import ConfigError, DataError, TaskError
from multitune.prompting.selection import BM25Examples, Examples, Row
from multitune.tasks import Task, TaskData, Template

if TYPE_CHECKING:
    from multitune.backbone import Backbone


EXAMPLE_SEPARATOR = "\n\n"
"""What stands between exemplars unless another is given."""


WHOLE_PROMPT = ("prompt",)
"""The columns that a task of `prompt_task` reads."""


@dataclass(frozen=True, kw_only=True)
class _TaskText:
    """Rows as a task of generation puts them."""

    task: Task

    def text(self, row: Row) -> str:
        return self.task.encode({c: v for c, v in row.items() if c != self.task.label}).texts[0][0]


class ExemplarPrompts:
    """Writes a row's prompt with exemplars in front of it."""

    def __init__(
        self,
        task: Task,
        examples: Examples | None,
        *,
        instruction: str = "",
        separator: str = EXAMPLE_SEPARATOR,
        backbone: Backbone | None = None,
        max_prompt: int | None = None,
    ) -> None:
        """
        Args:
            task: of kind generation.
            examples: the pool, rows of the task with their answers; of several answers the first is shown. `None` for
                an instruction alone.
            instruction: what stands in front of everything.
            separator: what stands between the instruction, the exemplars and the row.
            backbone, max_prompt: leave the least similar exemplars out until the prompt has at most so many tokens on
                this backbone; without them prompts may be cut at their front later, amid an exemplar.

        Raises:
            TaskError: a task of another kind.
            ConfigError: one of `backbone` and `max_prompt` without the other.
            DataError: a row of the pool that does not fit the task, or has no answer.
        """
        if task.kind != "generation":
            raise TaskError(
                f"task '{task.name}' is of kind {task.kind}; exemplars stand in prompts of tasks that write. "
                f"as_generation(data, pattern) makes one of it"
            )
        if (backbone is None) != (max_prompt is None):
            raise ConfigError("backbone and max_prompt go together: tokens are counted by the backbone's tokenizer")
        self.task = task
        self.examples = examples
        self._separator = separator
        self._instruction = [instruction] if instruction else []
        self._reader = _TaskText(task=task)
        self._limit = None if backbone is None else _Counter(backbone, task, max_prompt or 0)
        if examples is not None:
            task.examples(examples.rows)  # every row of the pool has an answer, or is named here
            examples.prepare(self._reader)

    def text(self, row: Row, shuffled: random.Random | None = None) -> str:
        """The row's prompt.

        Args:
            shuffled: puts the exemplars in a random order, as training wants them; by default the best stands last.
        """
        return self.texts([row], shuffled)[0]

    def texts(self, rows: Sequence[Row], shuffled: random.Random | None = None) -> list[str]:
        """`text` of several rows, whose exemplars are looked up together."""
        own = [self._reader.text(row) for row in rows]
        chosen: list[list[Row]] = [[] for _ in own] if self.examples is None else self.examples.choose_all(own)
        return [self._written(text, shown, shuffled) for text, shown in zip(own, chosen, strict=True)]

    def _written(self, own: str, chosen: list[Row], shuffled: random.Random | None) -> str:
        while True:
            shown = chosen if shuffled is None else shuffled.sample(chosen, len(chosen))
            prompt = self._separator.join([*self._instruction, *map(self._shown, shown), own])
            if not chosen or self._limit is None or self._limit.fits(prompt):
                return prompt
            chosen = chosen[1:]  # the first is the least similar

    def _shown(self, row: Row) -> str:
        own = self._reader.text(row)
        target = self.task.encode(row).target
        assert isinstance(target, tuple)
        return f"{own}{'' if own[-1:].isspace() else chr(10)}{target[0]}"


class _Counter:
    """Whether a prompt has at most so many tokens."""

    def __init__(self, backbone: Backbone, task: Task, limit: int) -> None:
        self._writer = PromptFormat(backbone, settle_format(backbone, task))
        self._limit = limit

    def fits(self, prompt: str) -> bool:
        return len(self._writer.prompts([prompt])[0]) <= self._limit


def with_examples(
    data: TaskData,
    k: int = 2,
    *,
    find: Callable[[Any, int], Examples] = BM25Examples,
    instruction: str = "",
    separator: str = EXAMPLE_SEPARATOR,
    backbone: Backbone | None = None,
    max_prompt: int | None = None,
    seed: int = 0,
) -> TaskData:
    """A task that writes, with k training rows in front of every row; train it with any method.

    A row's exemplars are never the row itself nor a duplicate of it, of training rows as of those to judge by. Training
    rows have theirs in a random order, so that none is learnt by its place; the others have the most similar one last.

    Args:
        data: of kind generation, see `as_generation` for the others.
        k: exemplars in a prompt; a soft prompt that was trained with k is worse at another number.
        find: makes the pool from the training rows and k: `BM25Examples`, `RandomExamples`, or
            `lambda rows, k: NeighbourExamples(rows, k, backbone)`.
        instruction, separator, backbone, max_prompt: see `ExemplarPrompts`.
        seed: of the orders.

    Returns:
        The task with the columns `prompt` and `answers`.

    Raises:
        ConfigError, DataError, TaskError: see `Examples` and `ExemplarPrompts`.
    """
    writer = ExemplarPrompts(
        data.task,
        find(data.train, k),
        instruction=instruction,
        separator=separator,
        backbone=backbone,
        max_prompt=max_prompt,
    )
    rng = random.Random(seed)
    made = {"train": _rows(writer, data.train, rng), "validation": _rows(writer, data.validation, None)}
    test = None if data.test is None else _table(_rows(writer, data.test, None))
    task = prompt_task(data.task.name, metric=data.task.metric, format=data.task.format, system=data.task.system)
    return TaskData(task=task, train=_table(made["train"]), validation=_table(made["validation"]), test=test)


def prompt_task(name: str, *, metric: str, format: Any = "auto", system: str = "") -> Task:
    """A task whose rows hold their whole `prompt` and the `answers` that are right."""
    return Task(
        name=name,
        kind="generation",
        template=Template(("{prompt}",)),
        label="answers",
        metric=metric,
        format=format,
        system=system,
    )


def _rows(writer: ExemplarPrompts, table: Iterable[Row], rng: random.Random | None) -> list[dict[str, Any]]:
    rows = list(table)
    answers = []
    for number, row in enumerate(rows, start=1):
        target = writer.task.encode(row, number=number).target
        if target is None:
            raise DataError(
                f"task '{writer.task.name}', row {number}: it has no answer in column {writer.task.label!r}"
            )
        assert isinstance(target, tuple)
        answers.append(list(map(str, target)))
    return [{"prompt": p, "answers": a} for p, a in zip(writer.texts(rows, rng), answers, strict=True)]


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def as_generation(data: TaskData, pattern: Any, *, metric: str = "exact_match", format: Any = "auto") -> TaskData:
    """A classification or multiple choice as a task that writes its answers, by a `Pattern`.

    Raises:
        TaskError: a pattern that does not fit the task.
        DataError: a row without its answer.
    """
    pattern.check(data.task)

    def made(table: Iterable[Row]) -> Any:
        front = pattern.prefix(data.task, ())
        return _table(
            [
                {
                    "prompt": front + pattern.text(row),
                    "answers": [pattern.answers(data.task, row)[pattern.target(data.task, row)].strip()],
                }
                for row in data.task.rows(table)
            ]
        )

    task = prompt_task(data.task.name, metric=metric, format=format)
    test = None if data.test is None else made(data.test)
    return TaskData(task=task, train=made(data.train), validation=made(data.validation), test=test)
