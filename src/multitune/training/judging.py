"""Judge one adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitune import heads
from multitune.adapter import Adapter
from multitune.backbone import Backbone
from multitune.bank import Bank
from multitune.errors import ConfigError, DataError
from multitune.tasks import Task, TaskData, any_split, judge
from multitune.tasks.readers import Source
from multitune.tasks.schema import Example
from multitune.training.data import warn_of_empty
from multitune.training.language import answer_scores


def evaluate(
    backbone: Backbone,
    adapter: Adapter | str | Path,
    data: TaskData | Source,
    split: str = "validation",
    batch_size: int = 32,
    drop_layers: Sequence[int] = (),
    num_rows: int | None = None,
) -> dict[str, float]:
    """Metrics of an adapter, by the path that serves it.

    Args:
        data: a task's data or a source with several splits, of which `split` is read; or labelled rows, as anything
            that `read_table` reads: a file, a `datasets.Dataset`, a list of mappings.
        split: "train", "validation" or "test".
        drop_layers: layers in which the adapter is left out, see `Bank.add`.
        num_rows: judge by the first so many rows only, at least 1; where the metric judges groups of rows, by the
            whole groups of these.

    Raises:
        ConfigError: an impossible number of rows, or layers in which there is nothing to leave out.
        DataError: no such split, no rows, or a row that does not fit the adapter's task.
        AdapterError, BackboneError: as `Adapter.load`.
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter.load(adapter, backbone)
    task = adapter.task
    table = rows_to_judge(task, data, split, num_rows)
    if task.kind == "generation":
        return answer_scores(backbone, adapter, table, batch_size=batch_size, drop_layers=drop_layers)
    predictions, examples = predict_rows(backbone, adapter, table, batch_size=batch_size, drop_layers=drop_layers)
    return judge(task, predictions, examples)


def rows_to_judge(task: Task, data: TaskData | Source, split: str = "validation", num_rows: int | None = None) -> Any:
    """The labelled rows that `evaluate` judges an adapter of this task by; arguments and errors as there."""
    table = _split(data, split) if isinstance(data, TaskData) else _labelled(data, split)
    return table if num_rows is None else _first(task, table, num_rows)


def predict_rows(
    backbone: Backbone, adapter: Adapter, table: Any, *, batch_size: int = 32, drop_layers: Sequence[int] = ()
) -> tuple[list[Any], list[Example]]:
    """Predictions of an adapter for labelled rows, and what was read from these, both as `judge` takes them.

    Raises:
        DataError: no rows, or a row that does not fit the adapter's task.
    """
    task = adapter.task
    examples = task.examples(table)
    warn_of_empty(task, "given", examples)
    if not examples:
        raise DataError(f"there are no rows to judge adapter '{adapter.name}' by; give a table with at least one")
    bank = Bank(backbone)
    bank.add(adapter.name, adapter, drop_layers=drop_layers)
    predictions: list[Any] = []
    for answer in bank.predict([(adapter.name, dict(row)) for row in table], batch_size=batch_size):
        assert answer.logits is not None
        words = range(len(answer.logits)) if task.kind == "tagging" else ()
        predictions.append(heads.prediction(task, answer.logits, words))
    return predictions, examples


def _split(data: TaskData, split: str) -> Any:
    tables = {"train": data.train, "validation": data.validation, "test": data.test}
    if split not in tables:
        raise DataError(f"no split '{split}'; there are {', '.join(tables)}")
    if tables[split] is None:
        raise DataError(f"task '{data.task.name}' has no labelled {split} split; choose train or validation")
    return tables[split]


def _first(task: Task, table: Any, num_rows: int) -> Any:
    """The first rows of a table, and all others of their groups."""
    if num_rows < 1:
        raise ConfigError(f"num_rows={num_rows} is not possible; give at least 1")
    chosen: Sequence[int] = range(min(num_rows, len(table)))
    if task.group:
        groups = [tuple(str(row.get(column)) for column in task.group) for row in table]
        wanted = set(groups[:num_rows])
        chosen = [i for i, group in enumerate(groups) if group in wanted]
    return table.select(chosen) if hasattr(table, "select") else [table[i] for i in chosen]


def _labelled(data: Any, split: str) -> Any:
    """The labelled rows of a source; rows in memory as they are."""
    if isinstance(data, (str, Path, Mapping)):  # a file, a folder, a hub data set, or tables by split
        return any_split(data, split)
    if isinstance(data, Task) or not isinstance(data, Iterable):
        raise DataError(
            f"evaluate takes rows with labels, not a {type(data).__name__}; give load_task(NAME), a file, or a list of "
            f"mappings of columns to values"
        )
    return data if hasattr(data, "column_names") else list(data)
