"""Scores of predictions for the labelled rows of a task: what a metric needs beside ids is taken from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multitune.tasks.metrics import Scores, compute, lookup
from multitune.tasks.schema import Example, Task


def judge(task: Task, predictions: Sequence[Any], examples: Sequence[Example]) -> Scores:
    """Scores by the task's metric; the first is the headline.

    predictions: one per row in the form that `compute` takes for the kind; of a multiple choice ids of choices, also
        where the metric reads their texts. Of tagging those of the words that were read; the rest is not judged.
    examples: the rows with their targets.

    Raises DataError as `compute` does.
    """
    metric = lookup(task.metric)
    if metric.of_choices:
        texts = [example.choices[int(chosen)] for example, chosen in zip(examples, predictions, strict=True)]
        right = [tuple(e.choices[place] for place in _places(e)) for e in examples]
        return compute(task.metric, texts, right)
    groups = [example.group for example in examples] if metric.grouped else None
    return compute(task.metric, predictions, _targets(task, predictions, examples), task.labels, groups=groups)


def _targets(task: Task, predictions: Sequence[Any], examples: Sequence[Example]) -> list[Any]:
    """The rows' targets in the form of their predictions, so that a row is right where both are equal.

    Of tagging those of the words that were read. Where several choices of a list are right, the chosen one if it is
    among them, else the first.
    """
    if task.kind == "tagging":
        return [(e.target or ())[: len(read)] for e, read in zip(examples, predictions, strict=True)]  # type: ignore[index]
    if task.lists_choices:
        rights = [_places(example) for example in examples]
        return [int(p) if p in right else right[0] for p, right in zip(predictions, rights, strict=True)]
    return [example.target for example in examples]


def _places(example: Example) -> tuple[int, ...]:
    """Which choices of a list are right."""
    assert isinstance(example.target, tuple)
    return tuple(int(place) for place in example.target)
