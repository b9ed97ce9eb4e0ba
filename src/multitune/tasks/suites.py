"""Tasks by name: the small demo tasks that ship with the library, and public suites in a folder of yours.

The folder, `data_dir` or the environment variable MULTITUNE_DATA, holds <collection>/<task>/<split>.parquet.
`SPECS` says what cannot be told from the columns; a task that it lacks is inferred, where its columns leave
no doubt.
"""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from multitune.errors import DataError, TaskError
from multitune.tasks import columns
from multitune.tasks.files import parquet_features, read_file
from multitune.tasks.infer import infer_task
from multitune.tasks.pattern import Pattern
from multitune.tasks.readers import list_splits, read_table
from multitune.tasks.schema import Task
from multitune.tasks.specs import SPECS, Spec, find_spec
from multitune.tasks.splits import split_table
from multitune.tasks.templates import Template

if TYPE_CHECKING:
    from datasets import Dataset, Features

VARIABLE = "MULTITUNE_DATA"
_NAME = re.compile(r"[\w-]+/[\w-]+")


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task and its tables."""

    task: Task
    """What is read and predicted."""
    train: "Dataset"
    """Rows to learn from; none in a task that is for judging alone."""
    validation: "Dataset"
    """Rows to choose settings by; none where there are none to learn from."""
    test: "Dataset | None" = None
    """Rows to report on, where the suite publishes their labels."""

    def with_pattern(self, pattern: Pattern) -> "TaskData":
        """The same rows, put to a language model in a pattern; its own head then ranks the answers as texts.

        Raises TaskError when the pattern does not fit the task.
        """
        return replace(self, task=replace(self.task, pattern=pattern))


def load_task(name: str, data_dir: str | Path | None = None) -> TaskData:
    """A task and its tables, by name.

    name: "demo/…" for one that ships with the library; else "collection/task", a folder below `data_dir`.
    data_dir: folder of the public suites; None takes MULTITUNE_DATA from the environment. Where neither names one,
        tasks that the Hugging Face hub has in the same form are read from there.

    Every fourth row of each label of a demo task is its validation split. Where a suite has no validation
    split, a share of its training rows, the same each time, is held out for it: a tenth, and of the fifty rows of a
    RAFT task half. Tasks that are published for judging alone have no rows but those of the test split.

    Raises TaskError for a name that is unknown or cannot be inferred, DataError when the folder is not set or
    its files cannot be read.
    """
    spec = find_spec(name) or Spec()
    if spec.shipped:
        return _load_shipped(name, spec)
    root = _root(data_dir)
    if root is None and spec.hub:
        return _load(name, spec, spec.hub.format(task=name.partition("/")[2]))
    folder = root / (spec.folder or name) if root and _NAME.fullmatch(name) else None
    if root is None or folder is None or not folder.is_dir():
        raise _unknown(name, root)
    return _load(name, spec, folder)


def list_tasks(data_dir: str | Path | None = None) -> tuple[str, ...]:
    """The names that `load_task` can load offline: the demo tasks, and those below `data_dir` or MULTITUNE_DATA."""
    shipped = [name for name, spec in SPECS.items() if spec.shipped]
    root = _root(data_dir)
    if root is None:
        return tuple(shipped)
    told = {name for name, spec in SPECS.items() if not spec.shipped and _is_there(root / (spec.folder or name), spec)}
    folders = {"/".join(file.parts[-3:-1]): file.parent for file in root.glob("*/*/*.parquet")}
    found = {name for name, folder in folders.items() if name not in SPECS and _is_readable(name, folder)}
    return (*shipped, *sorted(told | found))


def _load(name: str, spec: Spec, source: str | Path) -> TaskData:
    """A task in a folder or on the hub."""
    try:
        splits = list_splits(source)
    except DataError as error:
        if isinstance(source, Path):
            raise
        raise DataError(f"task {name!r}: {error}; or, with the data in a folder, {_how_to_set(name)}") from error
    _check_splits(name, spec, source, splits)

    def read(split: str) -> "Dataset":
        table = read_table(source, split=split)
        return table if spec.prepare is None else spec.prepare(table)

    test = read("test") if "test" in splits else None
    if not spec.train:
        assert test is not None
        nothing = test.select([])
        return TaskData(task=_task(name, spec, test), train=nothing, validation=nothing, test=test)
    train = read(spec.train)
    if find_spec(name) is None and not _is_plain(train.features):
        raise TaskError(
            f"task {name!r} cannot be told from its columns ({columns.named(train.features)}); read it with "
            f"read_table({str(source)!r}, split='train') and write its Task(…)"
        )
    task = _task(name, spec, train)
    if spec.validation in splits and spec.validation != spec.train:
        validation = read(spec.validation)
    else:
        stratified = None if spec.kind == "generation" else spec.label or None
        train, validation = split_table(train, spec.held_out, seed=0, label=stratified)
    return TaskData(task=task, train=train, validation=validation, test=None if _is_secret(test, task) else test)


def _check_splits(name: str, spec: Spec, source: str | Path, splits: Iterable[str]) -> None:
    """DataError when a split is missing without which the task cannot be loaded."""
    for split in _needed(spec):
        if split in splits:
            continue
        lacks = "has nothing to train on" if split == spec.train else f"is judged by split {split!r}, which is missing"
        raise DataError(f"task {name!r} {lacks}; {str(source)!r} holds {', '.join(splits)}")


def _needed(spec: Spec) -> tuple[str, ...]:
    """The splits without which a task cannot be loaded."""
    if not spec.train:
        return ("test",)
    stated = spec.validation != Spec.validation  # where the usual one is missing, rows are held out
    return (spec.train, spec.validation) if stated else (spec.train,)


def _is_there(folder: Path, spec: Spec) -> bool:
    return folder.is_dir() and set(_needed(spec)) <= set(list_splits(folder))


def _is_readable(name: str, folder: Path) -> bool:
    """Whether the task in a folder, which `SPECS` does not name, can be loaded."""
    spec = find_spec(name)
    if spec is not None:
        return _is_there(folder, spec)
    train = folder / "train.parquet"
    return train.is_file() and _is_plain(parquet_features(train))


def _is_secret(table: "Dataset | None", task: Task) -> bool:
    """Whether a split has no labels to judge by: where they are kept secret, the hub has -1 or empty lists."""
    if table is None or task.label not in table.column_names:
        return table is not None
    return all(label in (-1, [], "", None) for label in table[task.label])


def _load_shipped(name: str, spec: Spec) -> TaskData:
    with resources.as_file(resources.files("multitune.tasks") / f"{name}.jsonl") as path:
        if not path.is_file():
            raise DataError(f"the file of task {name!r} is missing: {path}. Reinstall multitune")
        table = read_file(path)
    held = set(_every_fourth(table, spec.label, spec.kind == "generation"))
    train, validation = (
        table.select([i for i in range(len(table)) if (i in held) is wanted]) for wanted in (False, True)
    )
    return TaskData(task=_task(name, spec, table), train=train, validation=validation)


def _every_fourth(table: "Dataset", label: str, texts: bool) -> Iterable[int]:
    """Every fourth row of each label; counted over all rows, a file with labels in turn would lose some.

    texts: whether the label is a text to write; then every fourth of all rows.
    """
    seen: dict[object, int] = {}
    for row, value in enumerate(table[label]):
        group = None if isinstance(value, float) or texts else value
        seen[group] = seen.get(group, 0) + 1
        if seen[group] % 4 == 0:
            yield row


def _task(name: str, spec: Spec, table: "Dataset") -> Task:
    """The task of a spec, with what the spec leaves open read from the table."""
    if spec.choices:
        return Task(
            name=name,
            kind="multiple_choice",
            template=Template(spec.template),
            label=spec.label,
            choices=spec.choices,
            metric=spec.metric,
            group=spec.group,
        )
    if spec.kind:
        return Task(
            name=name,
            kind=spec.kind,  # type: ignore[arg-type]  # the task checks it
            template=Template(spec.template),
            label=spec.label,
            metric=spec.metric,
            group=spec.group,
            format=spec.format,  # type: ignore[arg-type]
        )
    text, pair = (*spec.template, None, None)[:2]
    task = infer_task(table, text=text, text_pair=pair, label=spec.label or None, name=name)
    return replace(task, labels=spec.labels or task.labels, metric=spec.metric or task.metric, group=spec.group)


def data_root(data_dir: str | Path | None = None) -> Path:
    """The folder of the suites. Raises DataError when neither argument nor environment names one that exists."""
    root = _root(data_dir)
    if root is None:
        raise DataError(f"{VARIABLE} is not set; export {VARIABLE}=/path/to/data, or pass data_dir")
    return root


def _root(data_dir: str | Path | None) -> Path | None:
    """The folder of the suites; None when neither argument nor environment names one."""
    given = data_dir or os.environ.get(VARIABLE)
    if not given:
        return None
    root = Path(given).expanduser()
    if not root.is_dir():
        asked = "data_dir" if data_dir else VARIABLE
        raise DataError(f"{asked} is {str(given)!r}, which is no folder. It holds <collection>/<task>/train.parquet")
    return root


def _is_plain(features: "Features") -> bool:
    """Whether columns leave no doubt: one class label, and texts that are all read."""
    try:
        label = columns.guess_label(features)
        texts = columns.guess_texts(features, label)
    except DataError:
        return False
    unread = [name for name in features if name not in (*texts, *columns.IDS, label)]
    worded = any(columns.is_text(features, name) or columns.is_list(features, name) for name in unread)
    return bool(columns.class_names(features, label)) and not columns.is_list(features, label) and not worded


def _unknown(name: str, root: Path | None) -> TaskError | DataError:
    """The error for a name whose data cannot be found."""
    known = SPECS if root is None else list_tasks(root)
    if root is None and name in SPECS:
        return DataError(f"task {name!r} is read from the folder that {VARIABLE} names; {_how_to_set(name)}")
    near = _near(name, known)
    likely = f"Near it: {', '.join(near)}" if near else f"Some that are: {', '.join(list(known)[:10])}"
    where = f"in {str(root)!r}" if root else f"among those known without {VARIABLE}, which is not set"
    return TaskError(f"no task {name!r} {where}. {likely}. A name is <collection>/<task>")


def _how_to_set(name: str) -> str:
    return f"set {VARIABLE} (export {VARIABLE}=/path/to/data, which holds {name}/train.parquet), or pass data_dir"


def _near(name: str, known: Iterable[str]) -> list[str]:
    """Known names like this one, as a whole or in what follows the slash."""
    tails = {full.rpartition("/")[2] for full in known}
    close = difflib.get_close_matches(name.rpartition("/")[2], tails, n=5)
    whole = difflib.get_close_matches(name, known, n=5, cutoff=0.7)
    return list(dict.fromkeys([*whole, *(full for full in known if full.rpartition("/")[2] in close)]))[:5]
