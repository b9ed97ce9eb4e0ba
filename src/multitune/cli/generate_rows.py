"""`multitune generate --task` and `--data`: texts for the rows of a task, beside what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multitune.adapter import Adapter
from multitune.answers import settle_format
from multitune.bank import Bank
from multitune.cli import shared
from multitune.cli.shared import note, print_json, score, show
from multitune.errors import ConfigError, DataError
from multitune.generation import GenerationSettings, evaluate_texts
from multitune.generation.pages import PAGE_FILE
from multitune.prompting import with_examples
from multitune.prompting.exemplars import EXAMPLE_SEPARATOR, WHOLE_PROMPT
from multitune.tasks import Task, TaskData, any_split, infer_task, list_splits, load_task, read_table
from multitune.tasks.reasoning import READERS, question_rows

SPLIT = "validation"


@dataclass(frozen=True)
class Judged:
    """The options of writing for the rows of a task."""

    task: str | None
    data: str | None
    split: str | None
    rows: int | None
    examples: int
    out: Path | None
    metric: str | None
    put: Mapping[str, Any]
    """What was given of text, label and format: how rows of `data` are put, where no adapter says it."""

    @property
    def asked(self) -> bool:
        """Whether a task's rows are to be written for."""
        return self.task is not None or self.data is not None

    def check(self, has_adapters: bool) -> None:
        """Refuse what would not be honoured."""
        if self.task is not None and self.data is not None:
            raise ConfigError("--task and --data both say which rows to write for; give one of them")
        for name in ("out", "rows", "split", "metric"):
            if not self.asked and getattr(self, name) is not None:
                raise ConfigError(f"--{name} is for the rows of a task; give --task NAME or --data FILE too")
        for name, least in (("rows", 1), ("examples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} {value} is not possible; give {least} or more")
        if self.examples and not self.asked:
            raise ConfigError("--examples are rows of a task; give --task NAME or --data FILE too")
        lone = next(iter(self.put), None)
        if lone is not None and self.data is None:
            raise ConfigError(f"--{lone} says how the rows of --data are put; give --data FILE too")
        if lone is not None and has_adapters and not self.examples:
            raise ConfigError(f"--{lone}: the adapter says how its rows are put; leave it out")
        if has_adapters and "format" in self.put:
            raise ConfigError("--format: the adapter has the format that it was trained on; leave it out")


def sole(bank: Bank, what: str) -> str | None:
    """The one adapter; `None` for the bare backbone where there is none."""
    if len(bank) > 1:
        raise ConfigError(f"{what} is for one adapter, not {len(bank)}; pass rows as JSON lines: --input rows.jsonl")
    return next(iter(bank.names), None)


def judge(bank: Bank, judged: Judged, settings: GenerationSettings, batch_size: int, as_json: bool) -> None:
    name = sole(bank, "judging texts")
    own, table = _rows_to_judge_by(None if name is None else bank.adapter(name), judged)
    if judged.examples and name is None and not settings.stop:
        settings = _stopping_behind_answer(bank, own, table, settings)
    num_rows = min(len(table), judged.rows or len(table))
    note(f"writing for {num_rows} rows, at most {settings.max_new_tokens} tokens each")
    limits: dict[str, Any] = {"batch_size": batch_size, "num_rows": judged.rows}
    done = evaluate_texts(bank, name, table, settings, task=own, metric=judged.metric, **limits)
    if judged.out is not None:
        note(f"texts and references stand in {done.save(judged.out) / PAGE_FILE}")
    shown: dict[str, Any] = dict(done.scores)
    if done.interval is not None:
        shown |= {"bleu_low": done.interval.low, "bleu_high": done.interval.high}
    if as_json:
        print_json({"adapter": name, "task": done.task.name, "rows": len(done.rows), **shown})
        return
    cells = [(done.adapter, done.task.name, metric, score(value)) for metric, value in shown.items()]
    show(shared.table(cells, ("adapter", "task", "metric", "value"), right=("value",)))


def _stopping_behind_answer(
    bank: Bank, task: Task | None, table: Any, settings: GenerationSettings
) -> GenerationSettings:
    """Settings with which the bare model ends where it would write another example behind its answer.

    Examples stand an empty line apart, and a model that was not trained on them goes on with more of their kind. In a
    chat it ends its turn instead, and where answers have empty lines themselves nothing tells their end.
    """
    assert task is not None, "rows with examples bring the task that puts them"
    plain = settle_format(bank.backbone, task).format == "plain"
    if not plain or any(EXAMPLE_SEPARATOR in answer for row in table for answer in row[task.label]):
        return settings
    note("a text ends at an empty line, as the examples in front of it do; give --stop to have it end elsewhere")
    return replace(settings, stop=(EXAMPLE_SEPARATOR,))


def _rows_to_judge_by(adapter: Adapter | None, judged: Judged) -> tuple[Task | None, Any]:
    """The rows, and the task that puts and judges them where it is not the adapter's own."""
    split = judged.split or SPLIT
    if judged.data is not None:
        if adapter is None or judged.examples:
            return _table_to_judge_by(adapter, judged, split)
        return None, any_split(judged.data, split)
    name = str(judged.task)
    loaded = load_task(name)
    if not len(loaded.train) and _are_questions(name):
        found, rows = question_rows(name, split)
        return _put_as(found, adapter), rows
    tables = {"train": loaded.train, "validation": loaded.validation, "test": loaded.test}
    if tables.get(split) is None:
        raise DataError(f"task '{name}' has no {split} split; it has {', '.join(k for k, t in tables.items() if t)}")
    if judged.examples:
        made = with_examples(replace(loaded, validation=tables[split], test=None), judged.examples)
        return _put_as(made.task, adapter), made.validation
    if adapter is None:
        return loaded.task, tables[split]
    _check_columns(adapter.task, loaded.task, tables[split].column_names)
    return None, tables[split]


def _check_columns(own: Task, asked: Task, columns: Sequence[str]) -> None:
    """Raise `DataError` for rows of a task that lack what an adapter reads: no column of theirs can be renamed."""
    lacking = [column for column in own.columns if column not in columns]
    if lacking:
        by_name = f"--task {own.name}, or " if "/" in own.name else ""
        if own.columns == WHOLE_PROMPT:
            raise DataError(
                f"the adapter reads whole prompts, such as --examples makes of rows of '{asked.name}': give --examples "
                f"with the number that it was trained with"
            )
        raise DataError(
            f"rows of task '{asked.name}', of kind {asked.kind}, have the columns {', '.join(columns)}, and not "
            f"{', '.join(lacking)}, which the adapter reads: it was trained on task '{own.name}'. Give "
            f"{by_name}--data with a table that has its columns"
        )


def _table_to_judge_by(adapter: Adapter | None, judged: Judged, split: str) -> tuple[Task, Any]:
    """The rows of `--data` and the task that its options make of them, with examples in front if wanted.

    Examples are training rows where the table has such, else its other rows; never the row itself.
    """
    place = str(judged.data)
    rows = any_split(place, split)
    columns = {name: judged.put[name] for name in ("text", "label") if name in judged.put}
    task = infer_task(rows, kind="generation", name=Path(place).stem, **columns)
    if len(columns) < 2:
        note(f"reading the prompt from {' | '.join(task.template.parts)} and the answer from {task.label}")
    metric = task.metric if adapter is None else adapter.task.metric
    task = _put_as(replace(task, metric=metric, format=judged.put.get("format", task.format)), adapter)
    if not judged.examples:
        return task, rows
    pool = read_table(place, split="train") if "train" in list_splits(place) else rows
    made = with_examples(TaskData(task=task, train=pool, validation=rows), judged.examples)
    return made.task, made.validation


def _put_as(task: Task, adapter: Adapter | None) -> Task:
    """A task in the format of the prompts that an adapter was trained on."""
    return task if adapter is None else replace(task, format=adapter.task.format, system=adapter.task.system)


def _are_questions(task: str) -> bool:
    """Whether a task is one of the sets of questions, whose final answers can be judged whatever an adapter reads."""
    collection, _, name = task.partition("/")
    return collection == "reasoning" and name in READERS
