"""A user's own table as a task with rows to learn from and rows to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitune.errors import ConfigError
from multitune.tasks.infer import infer_task
from multitune.tasks.readers import Source, list_splits, read_table
from multitune.tasks.schema import Format, Task
from multitune.tasks.splits import split_table
from multitune.tasks.suites import TaskData

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = 0.1
"""Share of the rows that are held out where nobody says which rows to judge by."""


def load_table(
    source: Source,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    kind: str | None = None,
    labels: Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    metric: str | None = None,
    format: Format | None = None,
    name: str | None = None,
    task: Task | None = None,
    validation: Source | float | None = None,
    seed: int = 0,
) -> TaskData:
    """Your own rows as a task that `train` takes; `multitune train --train FILE` reads them the same way.

        load_table("reviews.csv", text="review", label="verdict")

    source: a file, a folder, rows in memory or a hub data set, see `read_table`.
    text, text_pair, label, kind, labels, choices: what `infer_task` takes; what is not given is guessed.
    metric: the headline metric; by default the usual one of the kind.
    format: of a generation: plain, chat or auto, see `Task.format`.
    name: the task's name; by default that of the file.
    task: a task made by hand instead of all of these.
    validation: rows to judge by, as another source or as the share of the rows to hold out, 0.3 or "0.3"; by default
        the source's own validation split, or a tenth of the rows.
    seed: draws the rows that are held out, in equal shares of every label.

    Raises DataError when rows cannot be read or columns not be told apart, ConfigError when both a task and
    what would make one are given.
    """
    read_as = {"text": text, "text_pair": text_pair, "label": label, "kind": kind, "labels": labels, "choices": choices}
    stated: dict[str, Any] = {**read_as, "metric": metric, "format": format, "name": name}
    given = {key: value for key, value in stated.items() if value is not None}
    if task is not None and given:
        raise ConfigError(f"a task={task.name!r} already says {', '.join(given)}; give one of them")
    validation = _number(validation)
    splits = list_splits(source)
    table = read_table(source, split="train" if "train" in splits else None)
    if task is None:
        task = infer_task(table, **{key: given[key] for key in read_as if key in given}, name=name or _name(source))
        task = replace(task, metric=metric or task.metric, format=format or task.format)
    if isinstance(validation, (int, float)):
        train_rows, held_out = split_table(table, validation, seed, label=_stratified(task))
    elif validation is not None:
        train_rows, held_out = table, any_split(validation, "validation")
    elif "validation" in splits:
        train_rows, held_out = table, read_table(source, split="validation")
    else:
        train_rows, held_out = split_table(table, HELD_OUT, seed, label=_stratified(task))
    return TaskData(task=task, train=train_rows, validation=held_out)


def _number(validation: Source | float | None) -> Source | float | None:
    """A share that a recipe or the command line gives as a text, which else names a file, as a number."""
    if not isinstance(validation, str) or Path(validation).exists():
        return validation
    try:
        return float(validation)
    except ValueError:
        return validation


def any_split(source: Source, split: str) -> Dataset:
    """The named split of a source, or its only one. Raises DataError as `read_table` does."""
    return read_table(source, split=split if len(list_splits(source)) > 1 else None)


def _stratified(task: Task) -> str | None:
    """The column whose values are held out in equal shares; texts to write are all different."""
    return None if task.kind == "generation" else task.label or None


def _name(source: Source) -> str:
    return (Path(source).stem if isinstance(source, (str, Path)) else "") or "task"
