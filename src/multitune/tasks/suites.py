"""Tasks by name: the small demo tasks that ship with the library, and public suites in a folder of yours.

The folder, `data_dir` or the environment variable MULTITUNE_DATA, holds <collection>/<task>/<split>.parquet.
`SPECS` says what cannot be told from the columns; a task that it lacks is inferred, where its columns leave
no doubt. A new task is a new row of the table.
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
from multitune.tasks.readers import list_splits, read_table
from multitune.tasks.schema import Task
from multitune.tasks.splits import split_table
from multitune.tasks.templates import Template

if TYPE_CHECKING:
    from datasets import Dataset, Features

VARIABLE = "MULTITUNE_DATA"
_NAME = re.compile(r"[\w-]+/[\w-]+")
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task and its tables."""

    task: Task
    """What is read and predicted."""
    train: "Dataset"
    """Rows to learn from."""
    validation: "Dataset"
    """Rows to choose settings by."""
    test: "Dataset | None" = None
    """Rows to report on, where the suite publishes their labels."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One row of the table of tasks; what is left empty is inferred from the columns."""

    template: tuple[str, ...] = ()
    """Parts of the template."""
    label: str = ""
    """Column of the answer."""
    labels: tuple[str, ...] = ()
    """Label names in id order; empty for those of the class labels."""
    choices: tuple[str, ...] = ()
    """Multiple choice only: a part of a template per choice."""
    metric: str = ""
    """Headline metric; empty for the usual one of the kind."""
    folder: str = ""
    """Folder of the task, when it is not its name."""
    validation: str = "validation"
    """Name of the validation split."""
    shipped: bool = False
    """Whether the task comes with the library."""
    train: str = "train"
    """Name of the split to learn from."""
    kind: str = ""
    """Kind of task, where it cannot be told from the columns: generation."""
    format: str = ""
    """Generation only: how prompt and answer are written out, see `Task.format`."""


_STANCE = Spec(metric="stance_f1")
_WRITE = Spec(kind="generation", label="output")
_TITLED = Spec(template=("title", "content"), label="label")

SPECS: dict[str, Spec] = {
    "demo/sentiment": Spec(shipped=True, template=("text",), label="label", labels=("negative", "positive")),
    "demo/topic": Spec(shipped=True, template=("text",), label="label"),
    "demo/acceptability": Spec(
        shipped=True,
        template=("text",),
        label="label",
        labels=("unacceptable", "acceptable"),
        metric="matthews",
    ),
    "demo/intent": Spec(shipped=True, template=("text",), label="label"),
    "demo/paraphrase": Spec(
        shipped=True, template=("sentence1", "sentence2"), label="label", labels=("different", "paraphrase")
    ),
    "demo/urgency": Spec(shipped=True, template=("text",), label="score"),
    "demo/trails": Spec(shipped=True, kind="generation", template=("facts",), label="text", metric="bleu"),
    "glue/cola": Spec(template=("sentence",), label="label", metric="matthews"),
    "glue/sst2": Spec(template=("sentence",), label="label"),
    "glue/mrpc": Spec(template=("sentence1", "sentence2"), label="label", metric="accuracy_and_f1"),
    "glue/stsb": Spec(template=("sentence1", "sentence2"), label="label"),
    "glue/qqp": Spec(template=("question1", "question2"), label="label", metric="accuracy_and_f1"),
    "glue/mnli": Spec(template=("premise", "hypothesis"), label="label", validation="validation_matched"),
    "glue/qnli": Spec(template=("question", "sentence"), label="label"),
    "glue/rte": Spec(template=("sentence1", "sentence2"), label="label"),
    "glue/wnli": Spec(template=("sentence1", "sentence2"), label="label"),
    "super_glue/boolq": Spec(template=("question", "passage"), label="label"),
    "super_glue/cb": Spec(template=("premise", "hypothesis"), label="label", metric="accuracy_and_macro_f1"),
    "super_glue/copa": Spec(
        template=("{premise} What was the {question}?",), label="label", choices=("choice1", "choice2")
    ),
    "super_glue/multirc": Spec(template=("paragraph", "{question} {answer}"), label="label", metric="f1"),
    "super_glue/rte": Spec(template=("premise", "hypothesis"), label="label"),
    # the word stands before the text, for a pair of sentences alone does not say which word is meant
    "super_glue/wic": Spec(template=("{word}: {sentence1}", "{sentence2}"), label="label"),
    "super_glue/wsc": Spec(template=("{text}", "{span2_text} stands for {span1_text}"), label="label"),
    "text_classification/trec": Spec(label="coarse_label"),
    "text_classification/trec_fine": Spec(label="fine_label", folder="text_classification/trec"),
    "text_classification/dbpedia_14": _TITLED,
    "text_classification/amazon_review_full": _TITLED,
    "tweet_eval/hate": Spec(metric="macro_f1"),
    "tweet_eval/offensive": Spec(metric="macro_f1"),
    "tweet_eval/emoji": Spec(metric="macro_f1"),
    "tweet_eval/stance_abortion": _STANCE,
    "tweet_eval/stance_atheism": _STANCE,
    "tweet_eval/stance_climate": _STANCE,
    "tweet_eval/stance_feminist": _STANCE,
    "tweet_eval/stance_hillary": _STANCE,
    # table to text
    "nlg/e2e_nlg": Spec(
        kind="generation", template=("{meaning_representation}",), label="human_reference", metric="bleu"
    ),
    "nlg/webnlg_2017": Spec(kind="generation", template=("{modified_triple_sets}",), label="references", metric="bleu"),
    # its own training rows are not in the folder of suites: the validation split trains, a tenth of it is held out
    "nlg/dart": Spec(
        kind="generation", template=("{tripleset}",), label="references", metric="bleu", train="validation"
    ),
    "summarization/dialogsum": Spec(
        kind="generation", template=("{dialogue}\nSummary:",), label="references", metric="rouge_l"
    ),
    "instruction/alpaca": replace(_WRITE, template=("{instruction}\n{input}",), metric="rouge_l", format="auto"),
    "instruction/self_instruct_seed": replace(
        _WRITE, template=("{instruction}\n{input}",), metric="rouge_l", format="auto"
    ),
    "reasoning/gsm8k": Spec(
        kind="generation", template=("{question}",), label="answer", metric="number_match", format="auto"
    ),
    "reasoning/coin_flip": Spec(kind="generation", template=("{question}",), label="answer", metric="exact_match"),
    "reasoning/last_letters": Spec(kind="generation", template=("{question}",), label="answer", metric="exact_match"),
    "code/bug_fix_java": Spec(kind="generation", template=("{buggy}",), label="fixed", metric="bleu"),
    "code/java_to_cs": Spec(kind="generation", template=("{java}",), label="cs", metric="bleu"),
}

FAMILIES: dict[str, Spec] = {
    "commonsense": replace(_WRITE, template=("{instruction}",), metric="exact_match"),
    "super_natural_instructions": Spec(
        kind="generation",
        template=("{definition}\n\n{inputs}",),
        label="references",
        metric="rouge_l",
        format="auto",
    ),
    "instruction_induction": Spec(
        kind="generation", template=("Input: {input}\nOutput:",), label="references", metric="exact_match"
    ),
}
"""Collections all of whose tasks are read in one way, where `SPECS` does not name the task."""


def load_task(name: str, data_dir: str | Path | None = None) -> TaskData:
    """A task and its tables, by name.

    name: "demo/…" for one that ships with the library; else "collection/task", a folder below `data_dir`.
    data_dir: folder of the public suites; None takes MULTITUNE_DATA from the environment.

    Every fourth row of each label of a demo task is its validation split. Where a suite has no validation
    split, a tenth of its training rows, the same each time, is held out for it.

    Raises TaskError for a name that is unknown or cannot be inferred, DataError when the folder is not set or
    its files cannot be read.
    """
    spec = _spec(name) or Spec()
    if spec.shipped:
        return _load_shipped(name, spec)
    root = _root(data_dir)
    folder = root / (spec.folder or name) if root and _NAME.fullmatch(name) else None
    if root is None or folder is None or not folder.is_dir():
        raise _unknown(name, root)
    splits = list_splits(folder)
    if spec.train not in splits:
        raise DataError(f"task {name!r} has nothing to train on; {str(folder)!r} holds {', '.join(splits)}")
    train = read_table(folder, split=spec.train)
    if _spec(name) is None and not _is_plain(train.features):
        raise TaskError(
            f"task {name!r} cannot be told from its columns ({columns.named(train.features)}); read it with "
            f"read_table({str(folder)!r}, split='train') and write its Task(…)"
        )
    test = read_table(folder, split="test") if "test" in splits else None
    if spec.validation in splits and spec.validation != spec.train:
        validation = read_table(folder, split=spec.validation)
    else:
        stratified = None if spec.kind == "generation" else spec.label or None
        train, validation = split_table(train, _HELD_OUT, seed=0, label=stratified)
    return TaskData(task=_task(name, spec, train), train=train, validation=validation, test=test)


def list_tasks(data_dir: str | Path | None = None) -> tuple[str, ...]:
    """The names that `load_task` can load: the demo tasks, and those below `data_dir` or MULTITUNE_DATA."""
    shipped = [name for name, spec in SPECS.items() if spec.shipped]
    root = _root(data_dir)
    if root is None:
        return tuple(shipped)
    told = {
        name for name, spec in SPECS.items() if not spec.shipped and _trains(root / (spec.folder or name), spec.train)
    }
    files = {"/".join(file.parts[-3:-1]): file for file in root.glob("*/*/train.parquet")}
    inferred = {name for name, file in files.items() if _spec(name) or _is_plain(parquet_features(file))}
    return (*shipped, *sorted(told | inferred))


def _spec(name: str) -> Spec | None:
    """What is known of a task beside its columns: of itself, or of all in its collection."""
    return SPECS.get(name) or FAMILIES.get(name.partition("/")[0])


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
        )
    if spec.kind:
        return Task(
            name=name,
            kind=spec.kind,  # type: ignore[arg-type]  # the task checks it
            template=Template(spec.template),
            label=spec.label,
            metric=spec.metric,
            format=spec.format,  # type: ignore[arg-type]
        )
    text, pair = (*spec.template, None, None)[:2]
    task = infer_task(table, text=text, text_pair=pair, label=spec.label or None, name=name)
    return replace(task, labels=spec.labels or task.labels, metric=spec.metric or task.metric)


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


def _trains(folder: Path, split: str) -> bool:
    return folder.is_dir() and split in list_splits(folder)


def _unknown(name: str, root: Path | None) -> TaskError | DataError:
    """The error for a name whose data cannot be found."""
    known = SPECS if root is None else list_tasks(root)
    if root is None and name in SPECS:
        return DataError(
            f"task {name!r} is read from the folder that {VARIABLE} names, and it is not set. Set it "
            f"(export {VARIABLE}=/path/to/data, which holds {name}/train.parquet), or pass data_dir"
        )
    near = _near(name, known)
    likely = f"Near it: {', '.join(near)}" if near else f"Some that are: {', '.join(list(known)[:10])}"
    where = f"in {str(root)!r}" if root else f"among those known without {VARIABLE}, which is not set"
    return TaskError(f"no task {name!r} {where}. {likely}. A name is <collection>/<task>")


def _near(name: str, known: Iterable[str]) -> list[str]:
    """Known names like this one, as a whole or in what follows the slash."""
    tails = {full.rpartition("/")[2] for full in known}
    close = difflib.get_close_matches(name.rpartition("/")[2], tails, n=5)
    whole = difflib.get_close_matches(name, known, n=5, cutoff=0.7)
    return list(dict.fromkeys([*whole, *(full for full in known if full.rpartition("/")[2] in close)]))[:5]
