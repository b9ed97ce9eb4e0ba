"""Which rows of a task a trial learns from and is judged by: drawn by a seed, and known by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from multitune.errors import ConfigError, DataError
from multitune.tasks import TaskData

if TYPE_CHECKING:
    from datasets import Dataset


def draw(
    data: TaskData,
    *,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    subset_seed: int = 0,
    per_class: int | None = None,
) -> TaskData:
    """A part of a task's rows, in the order of their table; the same arguments give the same rows.

    Args:
        train_rows: how many rows to learn from; none, or more than there are, takes all.
        validation_rows: how many rows to judge by, likewise; the same for every `subset_seed`.
        subset_seed: draws the rows to learn from.
        per_class: instead of `train_rows`, rows of each label.

    Raises:
        ConfigError: both numbers, a number below 1, or `per_class` of a task without labels.
        DataError: a label with fewer rows.
    """
    for name, value in (("train_rows", train_rows), ("validation_rows", validation_rows), ("per_class", per_class)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not possible; give at least 1")
    if train_rows is not None and per_class is not None:
        raise ConfigError("train_rows and per_class both say how many rows to learn from; give one of them")
    train = data.train
    if per_class is not None:
        train = _per_class(data, per_class, subset_seed)
    elif train_rows is not None:
        train = _some(train, train_rows, subset_seed)
    validation = data.validation if validation_rows is None else _some(data.validation, validation_rows, 0)
    return replace(data, train=train, validation=validation)


def rows_fingerprint(data: TaskData) -> str:
    """20 hexadecimal digits of the task and all rows to learn from and to judge by, in their order."""
    found = hashlib.sha256(json.dumps(data.task.to_dict(), sort_keys=True, default=str).encode())
    for table in (data.train, data.validation):
        names = sorted(set(data.task.columns) | {data.task.label}) if data.task.label else list(data.task.columns)
        found.update(repr((names, len(table))).encode())
        for row in table:
            found.update(repr([row.get(name) for name in names]).encode())
    return found.hexdigest()[:20]


def _some(table: Dataset, count: int, seed: int) -> Dataset:
    if count >= len(table):
        return table
    return table.select(sorted(np.random.default_rng(seed).permutation(len(table))[:count].tolist()))


def _per_class(data: TaskData, per_class: int, seed: int) -> Dataset:
    task = data.task
    if task.kind != "classification":
        raise ConfigError(f"per_class needs one label a row, and task '{task.name}' is of kind {task.kind}")
    targets: dict[Any, list[int]] = {}
    for row, example in enumerate(task.examples(data.train)):
        targets.setdefault(example.target, []).append(row)
    rng = np.random.default_rng(seed)
    kept: list[int] = []
    for target in sorted(targets):
        rows = targets[target]
        if len(rows) < per_class:
            raise DataError(
                f"task '{task.name}' has {len(rows)} rows of label '{task.labels[target]}', not {per_class}; give a "
                f"smaller per_class"
            )
        kept += rng.permutation(rows)[:per_class].tolist()
    return data.train.select(sorted(kept))
