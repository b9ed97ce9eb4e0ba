"""Guess a task from a user's own table, or say which flag settles what cannot be guessed."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from multitune.errors import DataError, DataWarning, TaskError
from multitune.tasks import columns
from multitune.tasks.readers import Source, read_table
from multitune.tasks.schema import Kind, Task, check_kind
from multitune.tasks.targets import as_integer, shown, split_names
from multitune.tasks.templates import Template

if TYPE_CHECKING:
    from datasets import Dataset, Features

MAX_CLASSES = 100
"""More different values than this in a label column call for a second look."""

_FEW_ROWS = 20
"""In a table of fewer rows, labels of one row each are no surprise."""

_SCORES = ("score", "similarity", "rating", "stars")  # whole numbers here may be classes or amounts


def infer_task(
    source: Source,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    kind: str | None = None,
    labels: Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    name: str = "task",
) -> Task:
    """The task that a table seems to hold. What is given is taken as it is; the rest is guessed.

    source: a table, or anything else that `read_table` reads without a split.
    text, text_pair: the column of the text, and of a second text; or a part of a template, "{title} {body}".
    label: the column of the answer.
    kind: "generation" where the answer is a text to write, which is never guessed. Floats are a regression; class
        labels, names, truth values and whole numbers a classification; lists are tagging where the text is a list of
        words, else multilabel.
    labels: label names in the order of their ids; the second of two is the positive one. A column of whole numbers
        has ids where these names are no numbers.
    choices: the columns of a multiple choice's choices, or parts of a template, or one column of lists, see
        `Task.choices`. They make the kind a multiple choice.

    Label names that are not given come from the table's class labels, or are its values, sorted by name, numbers by
    size.
    Raises DataError when columns or kind are ambiguous or the label column cannot be right; TaskError when the kind has
    no labels or choices, or lacks them.
    """
    table = read_table(source)
    template = _template(text, text_pair)
    for column in template.columns if template else ():
        columns.require(table.column_names, column, "--text and --text-pair (text=…, text_pair=…)")
    chosen_from = tuple(dict.fromkeys(c for choice in choices or () for c in Template((choice,)).columns))
    for column in chosen_from:
        columns.require(table.column_names, column, "--choices (choices=…)")
    if choices and kind is None:
        kind = "multiple_choice"
    if label is None:
        taken = (*(template.columns if template else ()), *chosen_from)
        if kind == "generation":
            label = columns.guess_answer(table.features, taken)
        else:
            label = columns.guess_label(table.features, taken, variety=lambda column: _variety(table, column))
    columns.require(table.column_names, label, "--label (label=…)")
    given: dict[str, Any] = {"labels": tuple(labels or ()), "choices": tuple(choices or ())}
    if kind == "generation":
        template = template or Template((columns.guess_prompt(table.features, label),))
        return Task(name=name, kind="generation", template=template, label=label, **given)
    rest = {column: feature for column, feature in table.features.items() if column not in chosen_from}
    template = template or Template(columns.guess_texts(cast("Features", rest), label))
    if kind is None:
        kind = _kind(table, template, label, named=labels is not None)
    check_kind(kind)
    if kind == "multiple_choice":
        _check_choices(template, choices)
    elif labels is None and kind != "regression":
        given["labels"] = _labels(table, label, kind)
    return Task(name=name, kind=cast(Kind, kind), template=template, label=label, **given)


def _check_choices(template: Template, choices: Sequence[str] | None) -> None:
    """Raise TaskError where a multiple choice lacks what cannot be guessed."""
    if not choices:
        raise TaskError(
            "the choices of a multiple choice are not guessed; set --choices (choices=…) to their columns, such as "
            "--choices first,second, or to one column of lists"
        )
    if len(template.parts) != 1:
        raise TaskError(
            f"a multiple choice has one text beside its choices, not {columns.named(template.parts)}; write it as one: "
            f'--text "{" ".join(f"{{{column}}}" for column in template.columns)}" (text=…)'
        )


def _variety(table: "Dataset", column: str) -> float:
    """How many different values a column has, as a share of the rows; 1 where values are lists."""
    values = table[column]
    return 1.0 if any(isinstance(v, (list, dict)) for v in values) else len(set(values)) / max(len(values), 1)


def _template(text: str | None, text_pair: str | None) -> Template | None:
    if text is None and text_pair is not None:
        raise DataError(f"a second text {text_pair!r} needs a first one. Set --text (text=…) too")
    return Template(tuple(part for part in (text, text_pair) if part is not None)) if text is not None else None


def _kind(table: "Dataset", template: Template, label: str, *, named: bool) -> str:
    """The kind of task that a label column asks for; `named`: its labels were given."""
    features = table.features
    if columns.is_list(features, label):
        words = len(template.columns) == 1 and columns.is_words(features, template.columns[0])
        return "tagging" if words else "multilabel"
    if named or columns.class_names(features, label):
        return "classification"
    if columns.is_float(features, label):
        return "regression"
    if columns.is_integer(features, label):
        num_values = len(set(table[label]))
        rare = len(table) >= _FEW_ROWS and num_values > len(table) / 2
        if label in _SCORES or num_values > MAX_CLASSES or rare:
            raise DataError(
                f"column {label!r} holds {num_values} different whole numbers: classes, or an amount? Set "
                "--kind (kind=…) to classification or regression"
            )
    _warn_of_several(table, label)
    return "classification"


def _warn_of_several(table: "Dataset", label: str) -> None:
    """Warn of labels such as "a|b" where cells seem to hold several: apart they are fewer than together."""
    together = {cell for cell in table[label] if isinstance(cell, str)}
    joined = sorted(cell for cell in together if "|" in cell)
    if joined and len({name.strip() for cell in together for name in cell.split("|")}) < len(together):
        warnings.warn(
            f"column {label!r} holds {shown(joined[:3])}, each of which is taken for one label. Where '|' stands "
            f"between several labels of a row, set --kind multilabel (kind=…)",
            DataWarning,
            stacklevel=2,
        )


def _labels(table: "Dataset", label: str, kind: str) -> tuple[str, ...]:
    """The label names of a column, in id order."""
    names = columns.class_names(table.features, label)
    if names:
        return names
    cells = list(table[label])
    if kind == "classification":
        _refuse_empty(cells, label)
    found: dict[str, None] = {}  # in order of appearance, which sorting then makes irrelevant
    for row, value in enumerate(cells, start=1):
        found.update(dict.fromkeys(_name(item, label, row) for item in _items(value, kind, label, row)))
    if kind == "classification":
        _check_classes(table, label, list(found), len(cells))
    return _in_order(found)


def _refuse_empty(cells: Sequence[object], label: str) -> None:
    """Raise DataError where several cells are empty, which names them; a single one is met on the way."""
    empty = [cell is None or (isinstance(cell, str) and not cell.strip()) for cell in cells]
    rows = [row for row, lacks in enumerate(empty, start=1) if lacks]
    if len(rows) > 1:
        first = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        raise DataError(
            f"rows {first}: the label in column {label!r} is empty in {len(rows)} of {len(cells)} rows. Fill them in "
            f"or drop the rows"
        )


def _items(value: object, kind: str, label: str, row: int) -> Sequence[object]:
    """The labels in one cell: one, or those of a list or of a text such as "a|b"."""
    if kind == "classification":
        return [value]
    if kind == "multilabel" and isinstance(value, str):
        return split_names(value)
    if isinstance(value, list):
        return value
    raise DataError(f"row {row}: {kind} needs a list of labels in column {label!r}, not {value!r}")


def _name(value: object, label: str, row: int) -> str:
    """The name of one label: the text itself, or the whole number as it is written."""
    if isinstance(value, bool):
        return str(value)
    number = as_integer(value) if not isinstance(value, str) else None
    name = value.strip() if isinstance(value, str) else "" if number is None else str(number)
    if name:
        return name
    if value is None or isinstance(value, str):
        raise DataError(f"row {row}: the label in column {label!r} is empty. Fill it in or drop the row")
    raise DataError(f"row {row}: a label is a name or a whole number, not {value!r}. Set --label or --kind")


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted: by size when all of them are numbers, else by name."""
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _check_classes(table: "Dataset", label: str, names: Sequence[str], num_rows: int) -> None:
    if len(names) == 1:
        raise DataError(f"every row has the label {names[0]!r} in column {label!r}; two labels are needed to learn")
    if label in names and not any(columns.is_usual(column) for column in table.column_names if column != label):
        warnings.warn(
            f"column {label!r} is called as one of its own labels, so the first line of the file may be a row that was "
            f"taken for the names of the columns. If so, put a line with names in front of it, such as text,label",
            DataWarning,
            stacklevel=2,
        )
    if len(names) > MAX_CLASSES and len(names) > num_rows / 2:
        raise DataError(
            f"column {label!r} holds {len(names)} different values in {num_rows} rows, such as "
            f"{shown(names[:3])}; that is a text or an id, not a label. {_better(table, label)}. If a model is to "
            "write such texts, set --kind generation (kind=…)"
        )
    if num_rows >= _FEW_ROWS and len(names) > 0.8 * num_rows:
        warnings.warn(
            f"column {label!r} holds {len(names)} different values in {num_rows} rows, such as {shown(names[:3])}, so "
            f"that hardly a label has two rows to learn it from. If a model is to write such texts, set --kind "
            f"generation (kind=…)",
            DataWarning,
            stacklevel=2,
        )


def _better(table: "Dataset", label: str) -> str:
    """The end of that message: the column that is more likely the label."""
    few: Mapping[str, int] = {
        column: count for column in table.column_names if column != label and (count := _count(table, column))
    }
    likely = sorted(few, key=lambda column: (column not in columns.LABELS, few[column]))
    if likely:
        return f"Did you mean {likely[0]!r} ({few[likely[0]]} values)? Set --label {likely[0]} (label=…)"
    return f"No other column looks like one: {columns.named(table.column_names)}. Set --label (label=…)"


def _count(table: "Dataset", column: str) -> int:
    """How many different values a column has that may hold labels; 0 for one that does not."""
    cells: list[Any] = list(table[column]) if not columns.is_list(table.features, column) else []
    count = len({cell for cell in cells if isinstance(cell, (str, int))})
    return count if 2 <= count <= MAX_CLASSES and column not in columns.IDS else 0
