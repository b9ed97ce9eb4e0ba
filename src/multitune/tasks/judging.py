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
    targets: list[Any] = [example.target for example in examples]
    groups = [example.group for example in examples] if metric.grouped else None
    if task.kind == "tagging":
        targets = [tags[: len(read)] for tags, read in zip(targets, predictions, strict=True)]
    elif task.lists_choices and metric.of_choices:
        texts = [example.choices[int(chosen)] for example, chosen in zip(examples, predictions, strict=True)]
        right = [tuple(e.choices[place] for place in places) for e, places in zip(examples, targets, strict=True)]
        return compute(task.metric, texts, right)
    elif task.lists_choices:  # any of the right choices will do
        targets = [int(p) if p in right else right[0] for p, right in zip(predictions, targets, strict=True)]
    return compute(task.metric, predictions, targets, task.labels, groups=groups)
