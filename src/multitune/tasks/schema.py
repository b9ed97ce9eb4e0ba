"""A task: which columns are read, what is predicted from them, and how it is judged."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from multitune.errors import DataError, TaskError, suggest
from multitune.tasks import targets
from multitune.tasks.columns import class_names, named
from multitune.tasks.metrics import METRICS, lookup
from multitune.tasks.pattern import MASK, Pattern
from multitune.tasks.spans import is_bio
from multitune.tasks.templates import Row, Template, cell

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["classification", "regression", "multilabel", "multiple_choice", "tagging", "embedding", "generation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Target = int | float | tuple[int, ...] | tuple[str, ...]
Format = Literal["", "plain", "chat", "auto"]

_DEFAULT_METRIC = {
    "classification": "accuracy",
    "regression": "pearson_spearman",
    "multilabel": "micro_f1",
    "multiple_choice": "accuracy",
    "generation": "perplexity",
}
_LEAST_LABELS = {"classification": 2, "multilabel": 1, "tagging": 2}  # the other kinds have no label names


def usual_metric(kind: str, labels: Sequence[str] = ()) -> str:
    """What judges a kind of task unless it says otherwise; of an embedding nothing does."""
    if kind == "embedding":
        return ""
    if kind == "tagging":
        return "tag_f1" if is_bio(labels) else "token_accuracy"
    return _DEFAULT_METRIC[kind]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, ready to be tokenized."""

    texts: tuple[tuple[str, ...], ...]
    """The sequences of the row: one, or one per choice. Each is a text, a pair of texts, or for tagging its
    words."""
    target: Target | None = None
    """classification, multiple choice: an id. regression: a number. multilabel: a 0 or 1 per label. tagging:
    an id per word. generation: the answers that are right, one or more texts. Multiple choice over a list: the ids of
    all choices that are right, at least one. None when the row had no label column."""
    choices: tuple[str, ...] = ()
    """Multiple choice over a list: the row's choices, as the list has them."""
    group: tuple[str, ...] = ()
    """What the labelled row has in the columns of `Task.group`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to predict from a row of a table.

    Raises TaskError when fields are malformed, or at odds with the kind of task.
    """

    name: str
    """Name of the task, such as "glue/rte"; free, but not empty."""
    kind: Kind
    """"classification", "regression", "multilabel", "multiple_choice", "tagging", "generation": a text that a language
    model writes, or "embedding": a row's vector, which no label column trains and no metric judges (adapters that come
    without a head)."""
    template: Template
    """The text of a row: a Template, or its parts. For tagging, the column that holds the list of words. For
    generation the prompt, of one part; a column of it may hold a list, whose texts are joined by " && " (and the texts
    of a list in a list by " | "), the usual form of triples."""
    label: str = ""
    """Column that holds the answer; "" for a task that only predicts. For generation a text, or a list of texts all of
    which are right."""
    labels: tuple[str, ...] = ()
    """Label names in the order of their ids; none for regression and multiple choice."""
    choices: tuple[str, ...] = ()
    """Multiple choice only: one part of a template per choice, the second text of its sequence. A single part reads
    one column that holds a list, and makes a choice of each of its texts in turn, so that rows may differ in their
    number of choices; then the label is a position in the list, the text of a choice, or a list of these where several
    are right."""
    metric: str = ""
    """Name of the headline metric; "" stands for the usual one of the kind."""
    group: tuple[str, ...] = ()
    """Columns that say which rows are judged together, such as the answers to one question. Some metrics ask for whole
    groups, and draws of rows to judge by keep them whole."""
    format: Format = ""
    """Generation only: "plain" (the prompt, a line break unless it ends in white space, the answer), "chat" (a message
    of the user and one of the assistant, written out by the tokenizer's chat template), or "auto", which training
    settles: chat where the tokenizer has a template. "" stands for plain."""
    system: str = ""
    """Generation in chat format only: the system message; "" leaves it to the tokenizer's template."""
    pattern: Pattern | None = None
    """Classification and multiple choice: rows are put to a language model in this pattern instead of the template, and
    its own head ranks the answers as texts. `None` reads the template and trains a head."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise TaskError(f"a task needs a name, not {self.name!r}")
        check_kind(self.kind)
        for name in ("label", "metric"):
            if not isinstance(getattr(self, name), str):
                raise TaskError(f"{name} is a text, not {getattr(self, name)!r}")
        template = self.template if isinstance(self.template, Template) else Template(self.template)
        object.__setattr__(self, "template", template)
        for name in ("labels", "choices", "group"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        object.__setattr__(self, "metric", self.metric or usual_metric(self.kind, self.labels))
        self._check_format()
        self._check_labels()
        self._check_texts()
        self._check_metric()
        self._check_pattern()

    def encode(self, row: Row, *, number: int | None = None) -> Example:
        """Texts and target of one row.

        row: columns to values; or just the text or texts (see `Template.render`), for tagging just the list
            of words. Without the label column the target is None. Ids are positions in `labels`; for rows of
            a table with class labels of its own use `examples`, which goes by their names.
        number: the row's number, for messages; the first row is 1.

        Raises DataError when a column is missing, or a label is unknown, empty or of the wrong form.
        """
        return self._example(row, number, labelled=None)

    def examples(self, table: "Dataset | Iterable[Row]", *, labelled: bool = True) -> list[Example]:
        """Every row of a table, encoded.

        Ids in a column of class labels mean that column's own names, whatever their order in this task.
        labelled: False leaves the targets None and the label column unread.

        Raises DataError when a column is missing, or a row has no label or a wrong one; the row is named.
        """
        from datasets import Dataset

        if isinstance(table, Dataset):
            table = table.select_columns(self._columns(table.column_names, labelled))
        rows = self._named(table)
        return [self._example(row, number, labelled) for number, row in enumerate(rows, start=1)]

    def rows(self, table: "Dataset | Iterable[Mapping[str, Any]]") -> list[dict[str, Any]]:
        """Every row of a table as a mapping of its own, for what reads rows one by one.

        Ids in a column of class labels are replaced by that column's names, whose order this task's may differ from.
        """
        return [dict(row) for row in self._named(table)]

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON values; `from_dict` gives back an equal task."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.kind != "generation":
            del values["format"], values["system"]
        if not self.group:
            del values["group"]
        if self.pattern is None:  # so that files without one are as they ever were
            del values["pattern"]
        else:
            values["pattern"] = self.pattern.to_dict()
        as_lists: dict[str, Any] = {n: list(values[n]) for n in ("labels", "choices", "group") if n in values}
        return {**values, "template": list(self.template.parts), **as_lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Task":
        """The task that `to_dict` wrote. Raises TaskError for unknown, missing and malformed fields."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise TaskError(f"a task has no field {key!r}; it has {', '.join(known)}.{suggest(str(key), known)}")
        missing = [name for name in ("name", "kind", "template") if name not in values]
        if missing:
            raise TaskError(f"a task needs {', '.join(missing)}; got {', '.join(values) or 'nothing'}")
        read: dict[str, Any] = {**values, "template": Template(_strings("template", values["template"]))}
        if values.get("pattern") is not None:
            read["pattern"] = Pattern.from_dict(values["pattern"])
        return cls(**read)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold the texts, each once; the label column is not among them."""
        prompt = self.template if self.pattern is None else self.pattern
        read = [*prompt.columns, *(column for choice in self._choices for column in choice.columns)]
        return tuple(dict.fromkeys(read))

    @property
    def lists_choices(self) -> bool:
        """Whether the choices of a row are those of a list in it."""
        return len(self.choices) == 1

    def choice_texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Multiple choice: the texts of a row's choices. Raises DataError when a column is missing or empty."""
        if self.lists_choices:
            column, items = choice_items(row, self._choices[0].columns)
            return tuple(self._choices[0].render({**row, column: item})[0] for item in items)
        return tuple(choice.render(row)[0] for choice in self._choices)

    def right_choice(self, row: Mapping[str, Any]) -> int:
        """Multiple choice: which of a labelled row's choices is right; the first of several."""
        right = self._target(row, 0, self._items(row) if self.lists_choices else ())
        assert isinstance(right, (int, tuple)), "the row has the label's column"
        return int(right[0] if isinstance(right, tuple) else right)

    def as_mapping(self, row: Row) -> Mapping[str, Any]:
        """A row of a task with a pattern as columns to values.

        row: that, or just the text or texts of the pattern's columns, in the order in which it reads them.

        Raises DataError when these are not as many texts as columns.
        """
        assert self.pattern is not None
        if isinstance(row, Mapping):
            return row
        texts = [row] if isinstance(row, str) else list(row) if isinstance(row, (list, tuple)) else []
        if len(texts) != len(self.columns) or not all(isinstance(text, str) for text in texts):
            given = f"{len(texts)} text(s)" if texts else f"a {type(row).__name__}"
            raise DataError(f"got {given}, but the pattern reads the columns {', '.join(self.columns)}; give a mapping")
        return dict(zip(self.columns, texts, strict=True))

    @cached_property
    def _choices(self) -> tuple[Template, ...]:
        return tuple(Template((choice,)) for choice in self.choices)

    def _named(self, table: Any) -> Iterable[Any]:
        """The rows of a table; labels by name where a column of class labels has ids."""
        from datasets import Dataset

        known = isinstance(table, Dataset) and self.labels and self.label in table.column_names
        names = class_names(table.features, self.label) if known else None
        return (_named_label(row, self.label, names) for row in table) if names else table

    def _example(self, row: Row, number: int | None, labelled: bool | None) -> Example:
        """One row encoded; `labelled` says whether it must have a label, None that it may."""
        try:
            row = row if self.pattern is None else self.as_mapping(row)
            choices = self._items(row) if self.lists_choices else ()
            texts = self._texts(row, choices)
            target = None if labelled is False else self._target(row, len(texts[0]), choices)
            group = self._group(row) if target is not None else ()
            if labelled and target is None:
                raise DataError(f"no label column {self.label!r}; labelled=False encodes rows without one")
        except DataError as error:
            where = f"task {self.name!r}" + (f", row {number}" if number is not None else "")
            raise DataError(f"{where}: {error}") from error
        return Example(texts=texts, target=target, choices=choices, group=group)

    def _group(self, row: Row) -> tuple[str, ...]:
        assert isinstance(row, Mapping)  # only such a row has a label
        return tuple(str(cell(row, column)) for column in self.group)

    def _items(self, row: Row) -> tuple[str, ...]:
        """The choices of a row that are a list in it."""
        if not isinstance(row, Mapping):
            raise DataError(f"a multiple choice is a mapping with the columns {', '.join(self.columns)}")
        return choice_items(row, self._choices[0].columns)[1]

    def _texts(self, row: Row, choices: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        if self.pattern is not None:
            values = self.as_mapping(row)
            prompt = "".join(self.pattern.parts(values))
            return tuple((prompt, answer) for answer in self.pattern.answers(self, values))
        if self.kind == "tagging":
            return (_words(cell(row, self.template.columns[0]) if isinstance(row, Mapping) else row),)
        if self.kind == "generation" and isinstance(row, Mapping):
            # all of them, so that a message names those that are there
            row = {column: joined(value) if column in self.columns else value for column, value in row.items()}
        texts = self.template.render(row)
        if self.kind != "multiple_choice":
            return (texts,)
        if not isinstance(row, Mapping):
            raise DataError(f"a multiple choice is a mapping with the columns {', '.join(self.columns)}")
        if self.lists_choices:
            column = choice_items(row, self._choices[0].columns)[0]
            return tuple(texts + self._choices[0].render({**row, column: choice}) for choice in choices)
        return tuple(texts + choice.render(row) for choice in self._choices)

    def _target(self, row: Row, num_words: int, choices: tuple[str, ...]) -> Target | None:
        if not isinstance(row, Mapping) or not self.label or self.label not in row:
            return None
        value = row[self.label]
        match self.kind:
            case "classification":
                return targets.label_id(value, self.labels)
            case "regression":
                return targets.number(value)
            case "multilabel":
                return targets.label_vector(value, self.labels)
            case "multiple_choice":
                return targets.right_items(value, choices) if choices else targets.choice_id(value, self.choices, row)
            case "tagging":
                return targets.tag_ids(value, self.labels, num_words)
            case "generation":
                return targets.answers(value)
            case "embedding":
                return None

    def _columns(self, known: list[str], labelled: bool) -> list[str]:
        """The columns of a table to read, all of them known."""
        if labelled and not self.label:
            raise DataError(f"task {self.name!r} has no label column; set Task(label=…), or labelled=False to predict")
        read = [*self.columns, self.label, *self.group] if labelled else list(self.columns)
        for column in read:
            if column not in known:
                part = "label" if column == self.label else "text" if column in self.columns else "group"
                raise DataError(
                    f"no column {column!r}; the table has {named(known)}.{suggest(column, known)} Task {self.name!r} "
                    f"reads the {part} of a row from {column!r}: rename the column in the table"
                )
        return list(dict.fromkeys(read))

    def _check_format(self) -> None:
        for name in ("format", "system"):
            if self.kind != "generation" and getattr(self, name):
                raise TaskError(f"only generation has a {name}, not {self.kind}; leave it out")
        if self.kind != "generation":
            return
        if self.format not in get_args(Format):
            known = get_args(Format)[1:]
            raise TaskError(f"no format {self.format!r}; there are {', '.join(known)}.{suggest(self.format, known)}")
        object.__setattr__(self, "format", self.format or "plain")
        if not isinstance(self.system, str) or (self.system and self.format == "plain"):
            raise TaskError(f"system={self.system!r}: only a chat has a system message; set format='chat'")

    def _check_labels(self) -> None:
        least = _LEAST_LABELS.get(self.kind)
        if least is None and self.labels:
            raise TaskError(f"{self.kind} has no label names, but labels={self.labels!r} were given; leave them out")
        if least is not None and len(self.labels) < least:
            raise TaskError(
                f"{self.kind} needs at least {least} label name(s), got {self.labels!r}. Give them in the "
                "order of "
                'their ids: labels=("negative", "positive")'
            )
        twice = [label for label in self.labels if self.labels.count(label) > 1]
        if twice or not all(self.labels):
            raise TaskError(f"label names are not empty and differ from one another, but {twice or ['']} do not")

    def _check_texts(self) -> None:
        if self.label in self.columns and self.label:
            raise TaskError(f"column {self.label!r} is both text and label; the answer would be read off the text")
        if self.kind == "tagging" and not _is_bare(self.template):
            raise TaskError(f"the template of tagging is one column that holds words, not {self.template.parts!r}")
        if self.kind == "generation" and self.template.num_slots:
            raise TaskError(f"a prompt to write from has no slots, but {self.template.parts!r} has; leave {{|}} out")
        if self.kind == "generation" and len(self.template.parts) != 1:
            raise TaskError(
                f"the prompt of a generation has one part, not {self.template.parts!r}; write the columns into one, "
                'such as template=("{context}\\n{question}",)'
            )
        if self.kind != "multiple_choice" and self.choices:
            raise TaskError(f"only multiple_choice has choices, not {self.kind}; leave them out")
        if self.kind == "multiple_choice" and (not self.choices or len(self.template.parts) != 1):
            raise TaskError(
                "multiple_choice has a template of one part, and at least two choices or one column of lists, such as "
                'template=("{premise}",), choices=("choice1", "choice2"), or choices=("choices",)'
            )
        _ = self._choices  # a malformed choice is reported here, not at the first row

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        if not isinstance(self.pattern, Pattern):
            raise TaskError(f"pattern is a Pattern(prompt, verbalizer), not {self.pattern!r}")
        self.pattern.check(self)
        if MASK in self.columns:
            raise TaskError(f"column {MASK!r} cannot be told from the place of the answer, {{{MASK}}}; rename it")

    def _check_metric(self) -> None:
        if self.kind == "embedding":
            given = [name for name in ("label", "metric") if getattr(self, name)]
            if given:
                raise TaskError(f"embedding has no label to judge by, but {given[0]} was given; leave it out")
            return
        metric = lookup(self.metric)
        if self.kind not in metric.kinds:
            fit = ", ".join(name for name, other in METRICS.items() if self.kind in other.kinds)
            raise TaskError(f"metric {self.metric!r} does not judge {self.kind}; set metric to one of {fit}")
        if metric.grouped and not self.group:
            raise TaskError(
                f"metric {self.metric!r} judges groups of rows; say which columns tell them apart, such as "
                'group=("question",)'
            )
        if self.label and self.label in self.group:
            raise TaskError(f"column {self.label!r} is the label, and so tells no groups apart; leave it out of group")
        if metric.of_choices and not self.lists_choices:
            raise TaskError(
                f"metric {self.metric!r} reads the texts of choices, which a row has in a list: choices=(COLUMN,); for "
                'others set metric="accuracy"'
            )
        if metric.binary and len(self.labels) != 2:
            raise TaskError(
                f"metric {self.metric!r} needs two labels, of which the second is the positive one; the "
                "task has "
                f'{len(self.labels)}. Set metric="macro_f1" or "accuracy"'
            )
        if self.metric == "tag_f1" and not is_bio(self.labels):
            raise TaskError('tag_f1 needs BIO tags ("O", "B-x", "I-x"); for others set metric="token_accuracy"')


def check_kind(kind: str) -> None:
    """TaskError unless `kind` is one of `KINDS`."""
    if kind not in KINDS:
        raise TaskError(f"no kind of task {kind!r}; there are {', '.join(KINDS)}.{suggest(str(kind), KINDS)}")


def _strings(name: str, values: object) -> tuple[str, ...]:
    if isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values):
        return tuple(values)
    raise TaskError(f"{name} is a list of texts, not {values!r}")


def _is_bare(template: Template) -> bool:
    """Whether a template is nothing but one column."""
    column = template.columns[0] if template.columns else ""
    return template.parts in ((column,), (f"{{{column}}}",))


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(word, str) for word in value):
        raise DataError(f"tagging reads a list of words, not {str(value)[:60]!r}. Split the text into words first")
    return tuple(value)


def _named_label(row: Mapping[str, Any], label: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The row, with ids in its label column replaced by the names they have in its own table."""

    def name(value: object) -> object:
        position = targets.as_integer(value)
        return names[position] if position is not None and 0 <= position < len(names) else value

    value = row[label]
    return {**row, label: [name(item) for item in value] if isinstance(value, list) else name(value)}


def choice_items(row: Mapping[str, object], columns: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The one of these columns in which a row has a list, and the texts of that list."""
    columns = tuple(columns)
    lists = {column: value for column in columns if isinstance(value := cell(row, column), (list, tuple))}
    if len(columns) == 1 and not lists:
        raise DataError(
            f"column {columns[0]!r} of the choices holds no list; --choices (choices=…) takes two or more columns of "
            f"one choice each, or one column of lists"
        )
    if len(lists) != 1:
        found = named(lists) if lists else "none"
        raise DataError(f"the choices are the texts of one list, but of the columns {named(columns)} {found} hold one")
    ((column, items),) = lists.items()
    empty = not items or not all(isinstance(item, (str, Real)) and str(item).strip() for item in items)
    if empty:
        raise DataError(f"column {column!r} is a list of choices, and each of them a text, not {str(items)[:60]!r}")
    return column, tuple(map(str, items))


def joined(value: object) -> object:
    """A cell as a template takes it: a list's texts with " && " between them, those of a list in it with " | "."""
    if not isinstance(value, (list, tuple)):
        return value
    parts = [" | ".join(map(str, item)) if isinstance(item, (list, tuple)) else item for item in value]
    return " && ".join(map(str, parts)) if all(part is not None for part in parts) else None
