"""Which rows of a task a trial sees: draws that are the same everywhere, and a fingerprint of what was drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from multitune.errors import ConfigError, DataError
from multitune.tasks import Task, TaskData

_VALIDATION_SEED = 0  # one and the same for all draws of training rows, so that their scores can be paired by row


def draw(
    data: TaskData,
    *,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    subset_seed: int = 0,
    per_class: int | None = None,
) -> TaskData:
    """Some rows of a task, in the order of their tables; the test rows stay as they are.

    Args:
        train_rows: how many to learn from; every label has its share of them. As many as there are, or none, takes all.
        validation_rows: how many to judge by, drawn the same way whatever `subset_seed` is.
        subset_seed: draws the rows to learn from; a smaller draw of one seed is part of a larger one.
        per_class: instead of `train_rows`, so many rows of every label (classification only).

    Rows that are judged as one group (`Task.group`), such as the answers to one question, are drawn together among the
    rows to judge by: as many whole groups as fit into the number, and at least one.

    Raises:
        ConfigError: both `train_rows` and `per_class`, a number below 1, or `per_class` for another kind of task.
        DataError: a label with fewer than `per_class` rows; names it.
    """
    for name, value in {"train_rows": train_rows, "validation_rows": validation_rows, "per_class": per_class}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not possible; give at least 1, or leave it out for all rows")
    if per_class is not None and train_rows is not None:
        raise ConfigError(f"per_class={per_class} and train_rows={train_rows} both say what to draw; give one of them")
    train = data.train
    if per_class is not None:
        train = _take(train, _per_class(data.task, train, per_class, subset_seed))
    elif train_rows is not None:
        train = _take(train, _some(data.task, train, train_rows, subset_seed))
    validation = data.validation
    if validation_rows is not None:
        some = _whole_groups if data.task.group else _some
        validation = _take(validation, some(data.task, validation, validation_rows, _VALIDATION_SEED))
    return replace(data, train=train, validation=validation)


def rows_fingerprint(data: TaskData) -> str:
    """20 hexadecimal digits that depend on the task and on what it reads from every row to learn from and judge by.

    Columns that the task does not read do not matter, nor do the files that the rows come from.

    Raises:
        DataError: a row that does not fit the task.
    """
    digest = hashlib.sha256(json.dumps(data.task.to_dict(), sort_keys=True).encode())
    for table in (data.train, data.validation):
        digest.update(b"\nrows\n")
        for example in data.task.examples(table):
            row = [example.texts, example.target, example.choices, example.group]
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:20]


def _some(task: Task, table: Any, count: int, seed: int) -> list[int]:
    """So many rows of a table."""
    if count >= len(table):
        return list(range(len(table)))
    strata = _by_label(task, table)
    ranked: list[tuple[float, int]] = []
    for label, rows in strata.items():
        # The k-th drawn of n rows stands at (k + u) / n: cut anywhere, every label has its share to within a row.
        offset = int.from_bytes(_digest(seed, "offset", label)[:6], "big") / 2**48
        order = _shuffled(rows, seed, label)
        ranked += [((place + offset) / len(rows), row) for place, row in enumerate(order)]
    return [row for _, row in sorted(ranked)[:count]]


def _whole_groups(task: Task, table: Any, count: int, seed: int) -> list[int]:
    """Rows of whole groups, in the order drawn, as long as they fit; at least one group."""
    if count >= len(table):
        return list(range(len(table)))
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, example in enumerate(task.examples(table)):
        groups.setdefault(example.group, []).append(row)
    members = list(groups.values())
    found: list[int] = []
    for number in _shuffled(range(len(members)), seed, "groups"):
        if found and len(found) + len(members[number]) > count:
            break
        found += members[number]
    return found


def _per_class(task: Task, table: Any, count: int, seed: int) -> list[int]:
    """So many rows of every label."""
    if task.kind != "classification":
        raise ConfigError(
            f"per_class={count} draws rows by label, and task '{task.name}' is of kind {task.kind}; give train_rows"
        )
    strata = _by_label(task, table)
    few = {task.labels[i]: len(strata.get(str(i), ())) for i in range(len(task.labels))}
    short = min(few, key=lambda label: few[label])
    if few[short] < count:
        raise DataError(
            f"task '{task.name}' has {few[short]} rows to learn from with the label '{short}', fewer than "
            f"per_class={count}; give " + (f"at most {few[short]}" if few[short] else "train_rows instead")
        )
    return [row for label, rows in strata.items() for row in _shuffled(rows, seed, label)[:count]]


def _by_label(task: Task, table: Any) -> dict[str, list[int]]:
    """Row numbers by label; all under one name where a task has no labels of which every row has one."""
    if task.kind != "classification":
        return {"": list(range(len(table)))}
    cells: dict[Any, list[int]] = {}
    for row, cell in enumerate(_column(table, task.label)):
        cells.setdefault(cell, []).append(row)
    # One row of each cell is read by the task, which knows its label by any of its spellings.
    firsts = task.examples(_take(table, [rows[0] for rows in cells.values()]))
    strata: dict[str, list[int]] = {}
    for example, rows in zip(firsts, cells.values(), strict=True):
        strata.setdefault(str(example.target), []).extend(rows)
    return {label: sorted(rows) for label, rows in strata.items()}


def _column(table: Any, name: str) -> list[Any]:
    if hasattr(table, "select"):
        return list(table[name]) if name in table.column_names else []
    return [row.get(name) for row in table]


def _shuffled(items: Sequence[int], seed: int, name: str) -> list[int]:
    """The items in an order that depends on seed, name and their number alone, on every machine and version."""
    order = sorted(range(len(items)), key=lambda place: _digest(seed, name, place))
    return [items[place] for place in order]


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _take(table: Any, rows: list[int]) -> Any:
    """These rows of a `Dataset` or a list, in the table's order."""
    rows = sorted(rows)
    if hasattr(table, "select"):
        return table.select(rows)
    taken: list[Mapping[str, Any]] = [table[row] for row in rows]
    return taken
