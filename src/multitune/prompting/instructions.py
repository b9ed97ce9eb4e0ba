"""Tasks as instructions: every row a prompt in words, its right answers, and the options where there are some.

`instructed("super_glue/rte")` reads a task from the folder of suites with the instructions that are known for it: the
templates of P3, a task's own definition (Super-NaturalInstructions, instruction induction, BIG-Bench Hard), or the
names of its labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from multitune.errors import DataError, TaskError
from multitune.tasks import Task, Template, list_splits, load_task, read_table
from multitune.tasks.p3 import Asked, P3Template, p3_templates
from multitune.tasks.pattern import Pattern
from multitune.tasks.suites import data_root

Row = Mapping[str, Any]
Wording = Callable[[Row], Asked | None]

#: A set of answers is one of options where it is small and its members come up again and again.
_MOST_OPTIONS, _LEAST_REPEATS = 10, 5
#: Rows that tell whether a template fits: some are for a part of the rows only.
_LOOKED_AT = 32

_BBH_LETTER = re.compile(r"^(\([A-Z]\))", re.MULTILINE)
_BBH_ITEM = re.compile(r"^- (.+?)\s*$", re.MULTILINE)

_P3 = {
    "super_glue/wsc": ("super_glue", "wsc.fixed"),
    "nlg/e2e_nlg": ("e2e_nlg_cleaned", ""),
    "reasoning/commonsense_qa": ("commonsense_qa", ""),
    **{
        f"text_classification/{name}": (name, "")
        for name in ("trec", "ag_news", "dbpedia_14", "imdb", "rotten_tomatoes", "yelp_review_full")
    },
    "intent/banking77": ("banking77", ""),
}
"""Names of data sets in P3 where they are not those of collection and task."""

_CLUSTERS = {
    "inference": "glue/rte glue/mnli glue/qnli super_glue/rte super_glue/cb",
    "paraphrase": "glue/mrpc glue/qqp glue/stsb",
    "sentiment": "glue/sst2 text_classification/imdb text_classification/rotten_tomatoes text_classification/sst5 "
    "text_classification/yelp_review_full text_classification/amazon_review_full instruction_induction/sentiment",
    "topic": "text_classification/trec text_classification/ag_news text_classification/dbpedia_14 "
    "text_classification/yahoo_answers_topics",
    "reading": "super_glue/boolq super_glue/multirc super_glue/record",
    "commonsense": "super_glue/copa reasoning/commonsense_qa",
    "coreference": "super_glue/wsc glue/wnli",
    "word sense": "super_glue/wic instruction_induction/word_in_context",
    "data to text": "nlg/e2e_nlg nlg/webnlg_2017 nlg/dart",
}
_CLUSTER_OF = {name: cluster for cluster, names in _CLUSTERS.items() for name in names.split()}
"""Groups of tasks that are so alike that one teaches another, after FLAN's; held out together. Else the collection, of
Super-NaturalInstructions the category."""


@dataclass(frozen=True, kw_only=True)
class InstructedTask:
    """One task of a mixture."""

    name: str
    cluster: str
    """Its group: tasks that are held out together."""
    wordings: tuple[Wording, ...]
    """Ways to put a row."""
    metric: str
    """Judges what is written freely; where there are options, accuracy judges what is chosen."""
    train: Any | None
    """Rows to learn from; `None` for a task that is for testing only."""
    test: Any
    """Rows to judge by."""

    def asked(self, row: Row, wording: int = 0) -> Asked | None:
        """A row by one of the wordings; `None` where it is not for such a row.

        Raises:
            DataError: the row lacks something that the wording reads.
        """
        try:
            return self.wordings[wording](row)
        except DataError as error:
            raise DataError(f"task '{self.name}': {error}") from error


def cluster_of(name: str, data_dir: str | Path | None = None) -> str:
    """The group of a task of the suites, whose tasks are held out together; its rows are not read.

    Raises:
        DataError: the folder of suites is not set.
    """
    collection, _, short = name.partition("/")
    return _CLUSTER_OF.get(name) or _about(collection, short, data_dir).cluster or collection


def instructed(name: str, data_dir: str | Path | None = None) -> InstructedTask:
    """A task of the suites as instructions.

    BIG-Bench Hard is for testing only, as its makers ask. Where a suite has a labelled test split that judges, else its
    validation split, else a tenth of its training rows.

    Raises:
        TaskError: an unknown task, or one for which no instruction is known.
        DataError: the folder is not set, or its files cannot be read.
    """
    collection, _, short = name.partition("/")
    if collection == "bbh":
        return _bbh(name, short, data_dir)
    templates = _p3(name, data_dir)
    if templates and name == "reasoning/commonsense_qa":
        return _commonsense_qa(name, templates, data_dir)
    data = load_task(name, data_dir)
    validated = collection in ("nlg", "glue", "super_glue") and len(data.validation)
    test = data.validation if data.test is None or validated else data.test
    found = InstructedTask(
        name=name,
        cluster=cluster_of(name, data_dir),
        wordings=(),
        metric="rouge_l" if data.task.metric == "perplexity" else data.task.metric,
        train=data.train if len(data.train) else None,
        test=test,
    )
    some = data.train if len(data.train) else test
    if templates:
        free = data.task.metric if data.task.kind == "generation" else "exact_match"
        fitting = _fitting(templates, some)
        if fitting:
            return replace(found, wordings=fitting, metric=free)
    if data.task.kind == "generation":
        about = _about(collection, short, data_dir)
        options = _options_of(data.task, some)
        wordings = tuple(_defined(data.task, said, options) for said in about.instructions or ("",))
        return replace(found, wordings=wordings)
    if data.task.kind in ("classification", "multiple_choice"):
        return replace(found, wordings=(_by_labels(data.task),), metric="exact_match")
    raise TaskError(f"task '{name}' is of kind {data.task.kind}, for which no instruction is known; leave it out")


# ---------------------------------------------------------------- ways to put a row


def by_pattern(task: Task, pattern: Pattern) -> Wording:
    """Rows of a classification or a multiple choice by a pattern of yours.

    A row's label is a name or an id of the task's; the rows of a table with class labels of its own are `Task.rows`.

    Raises:
        TaskError: a pattern that does not fit the task.
    """
    pattern.check(task)

    def put(row: Row) -> Asked:
        options = tuple(option.strip() for option in pattern.answers(task, row))
        prompt = pattern.prefix(task, ()) + pattern.text(row)
        return Asked(prompt=prompt, answers=(options[pattern.target(task, row)],), options=options)

    return put


def by_template(task: Task, template: str = "", instruction: str = "") -> Wording:
    """Rows of a task that writes by a template of yours, such as "Question: {question}\\nAnswer:".

    Args:
        template: by default the task's own.
        instruction: what stands in front, with an empty line between.

    Raises:
        TaskError: a task of another kind, or a template that is none.
    """
    if task.kind != "generation":
        raise TaskError(
            f"task '{task.name}' is of kind {task.kind}; a template puts rows of tasks that write. "
            f"by_pattern(task, Pattern(...)) puts those of a classification or a multiple choice"
        )
    return _defined(replace(task, template=Template((template,))) if template else task, instruction, ())


def _by_labels(task: Task) -> Wording:
    """The texts of a row and the options it has, in words: FLAN's list of options."""

    def put(row: Row) -> Asked:
        example = task.encode(row)
        texts = example.texts[0] if task.kind == "classification" else example.texts[0][:1]
        choices = example.choices or tuple(t[-1] for t in example.texts)
        options = task.labels if task.kind == "classification" else choices
        right = (example.target,) if isinstance(example.target, int) else example.target
        if not isinstance(right, tuple):
            raise DataError(f"the row has no answer in column {task.label!r}")
        said = [option.replace("_", " ") for option in options]
        prompt = "\n".join([*texts, "", "Options:", *(f"- {option}" for option in said), "Answer with one of them."])
        return Asked(prompt=prompt, answers=tuple(said[int(place)] for place in right), options=tuple(said))

    return put


def _defined(task: Task, instruction: str, options: tuple[str, ...]) -> Wording:
    """A task that writes, by its own template, behind an instruction."""

    def put(row: Row) -> Asked:
        example = task.encode(row)
        if not isinstance(example.target, tuple):
            raise DataError(f"the row has no answer in column {task.label!r}")
        prompt = "\n\n".join(part for part in (instruction, example.texts[0][0].strip()) if part)
        answers = tuple(map(str, example.target))
        return Asked(prompt=prompt, answers=answers, options=options if set(answers) & set(options) else ())

    return put


def _fitting(templates: Iterable[P3Template], rows: Any) -> tuple[Wording, ...]:
    """The templates that fit the columns of the rows."""
    some = [row for row, _ in zip(rows, range(_LOOKED_AT), strict=False)]

    def fits(template: P3Template) -> bool:
        try:
            return any([template.put(row) is not None for row in some])
        except DataError:
            return False

    return tuple(template.put for template in templates if fits(template))


def _options_of(task: Task, rows: Any) -> tuple[str, ...]:
    """The answers of a task that has few, each of them often; none for free texts."""
    found = Counter(str(text) for e in task.examples(rows) if isinstance(e.target, tuple) for text in e.target)
    few = 2 <= len(found) <= _MOST_OPTIONS and min(found.values()) >= _LEAST_REPEATS
    return tuple(sorted(found)) if few else ()


# ---------------------------------------------------------------- collections


def _p3(name: str, data_dir: str | Path | None) -> tuple[P3Template, ...]:
    if not (data_root(data_dir) / "p3_templates").is_dir():
        return ()
    collection, _, short = name.partition("/")
    return p3_templates(*_P3.get(name, (collection, short)), data_dir=data_dir)


@dataclass(frozen=True, kw_only=True)
class _About:
    """What a collection states of a task beside its rows."""

    instructions: tuple[str, ...] = ()
    cluster: str = ""


def _about(collection: str, short: str, data_dir: str | Path | None) -> _About:
    file = data_root(data_dir) / collection / "tasks.parquet"
    row = next((row for row in _table(file) if row["task"] == short), None) if file.is_file() else None
    match collection:
        case _ if row is None:
            return _About()
        case "super_natural_instructions":  # every row holds the definition itself
            category = str(row["category"]).lower()
            return _About(cluster="sentiment" if "sentiment" in category else category)
        case "instruction_induction":
            return _About(instructions=tuple(dict.fromkeys(row["instructions"])))
        case "bbh":
            return _About(instructions=(row["description"],))
    return _About()


def _bbh(name: str, short: str, data_dir: str | Path | None) -> InstructedTask:
    folder = data_root(data_dir) / name
    if not folder.is_dir():
        known = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise TaskError(f"no task '{name}'; bbh has {', '.join(known) or 'nothing here'}")
    test = read_table(folder, split="test")
    front = _about("bbh", short, data_dir).instructions
    answers = Counter(test["target"])
    closed = tuple(sorted(answers)) if len(answers) <= _MOST_OPTIONS else ()

    def put(row: Row) -> Asked:
        text, answer = row["input"].strip(), row["target"].strip()
        listed = text.partition("Options:")[2]
        options = tuple(_BBH_LETTER.findall(listed) or _BBH_ITEM.findall(listed) or closed)
        prompt = "\n\n".join([*front, f"Q: {text}\nA:"])
        return Asked(prompt=prompt, answers=(answer,), options=options if answer in options else ())

    return InstructedTask(name=name, cluster="bbh", wordings=(put,), metric="answer_match", train=None, test=test)


def _commonsense_qa(name: str, templates: Iterable[P3Template], data_dir: str | Path | None) -> InstructedTask:
    """Its rows in the form that they have in P3's source."""
    folder = data_root(data_dir) / name
    letters = "ABCDE"

    def renamed(row: Row) -> dict[str, Any]:
        choices = {"text": row["choices"], "label": list(letters[: len(row["choices"])])}
        return {**row, "choices": choices, "answerKey": letters[row["label"]]}

    def wording(template: P3Template) -> Wording:
        return lambda row: template.put(renamed(row))

    splits = {split: read_table(folder, split=split) for split in list_splits(folder)}
    first = renamed(splits["train"][0])
    fitting = [t for t in templates if _fitting([t], [first])]
    return InstructedTask(
        name=name,
        cluster=_CLUSTER_OF[name],
        wordings=tuple(map(wording, fitting)),
        metric="exact_match",
        train=splits["train"],
        test=splits["validation"],
    )


@cache
def _table(file: Path) -> Any:
    return read_table(file)
