"""Which column of a table holds what: types, and guesses from conventional names."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from multitune.errors import DataError, suggest

if TYPE_CHECKING:
    from datasets import Features

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "passage"),
    ("question", "sentence"),
    ("question", "context"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("title", "content"),
)
"""Columns that are two texts of one row, by convention."""

TEXTS = (
    *("text", "sentence", "tokens", "words", "review", "content", "document", "body", "title", "question"),
    *("query", "utterance", "comment", "message", "tweet"),
)
"""Columns that are the one text of a row, by convention."""

LABELS = (
    *("label", "labels", "score", "target", "class", "category", "intent", "tags", "ner_tags", "pos_tags"),
    *("sentiment", "similarity", "rating", "stars"),
)
"""Columns that are the answer, by convention."""

FEW = 0.25
"""A column with at most so many different values, as a share of the rows, may hold labels."""

ANSWERS = (
    *("target", "targets", "answer", "answers", "output", "response", "completion", "summary", "references"),
    *("reference", "human_reference", "label"),
)
"""Columns that are the text to write, by convention; the first that a table has is taken."""

PROMPTS = (
    *("prompt", "instruction", "input", "inputs", "source", "question", "dialogue", "article", "document", "text"),
    "meaning_representation",
)
"""Columns that are the text to write from, by convention."""

IDS = ("id", "idx", "index", "uid", "guid", "row", "column_1")
"""Columns that number the rows; `column_1` is what the reader calls the nameless index of a CSV file."""


def is_usual(column: str) -> bool:
    """Whether the column is called as columns often are, in capitals or not, so that a file has a line of names."""
    return column.casefold() in {*TEXTS, *LABELS, *ANSWERS, *PROMPTS, *IDS, *_flat(PAIRS)}


def is_text(features: "Features", column: str) -> bool:
    """Whether the column holds strings."""
    from datasets import Value

    feature = features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_words(features: "Features", column: str) -> bool:
    """Whether the column holds lists of strings."""
    from datasets import Value

    item = _item(features[column])
    return isinstance(item, Value) and item.dtype in ("string", "large_string")


def is_list(features: "Features", column: str) -> bool:
    """Whether the column holds lists."""
    return _item(features[column]) is not None


def is_float(features: "Features", column: str) -> bool:
    """Whether the column holds floating-point numbers."""
    from datasets import Value

    feature = features[column]
    return isinstance(feature, Value) and feature.dtype.startswith("float")


def is_integer(features: "Features", column: str) -> bool:
    """Whether the column holds plain whole numbers (class labels are not)."""
    from datasets import Value

    feature = features[column]
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def class_names(features: "Features", column: str) -> tuple[str, ...] | None:
    """The names behind the ids of a column of class labels, or of lists of them; None for other columns."""
    from datasets import ClassLabel

    feature = features[column]
    item = _item(feature)
    label = feature if item is None else item
    return tuple(label.names) if isinstance(label, ClassLabel) and label.names else None


def require(columns: Iterable[str], column: str, flag: str) -> None:
    """DataError when the table lacks a column that was asked for by `flag`."""
    known = tuple(columns)
    if column not in known:
        raise DataError(
            f"no column {column!r}; the table has {named(known)}.{suggest(column, known)} Set {flag} to one of them"
        )


def guess_label(
    features: "Features", taken: Iterable[str] = (), *, variety: Callable[[str], float] | None = None
) -> str:
    """The column that holds the answer; none of `taken`, which are known to hold text.

    A conventional name (`LABELS`) first, then the only column of class labels, then the only column that is
    neither a conventional text nor a row number, then the only one of these whose values come back again and again
    while those of the others hardly do. Raises DataError when none or several qualify.

    variety: how many different values a column has, as a share of the rows.
    """
    free = [column for column in features if column not in tuple(taken)]
    by_name = [column for column in free if column in LABELS]
    by_type = [column for column in free if class_names(features, column)]
    left = [column for column in free if column not in (*TEXTS, *IDS, *_flat(PAIRS))]
    found: list[str] = by_name or by_type or left
    if len(found) > 1 and found is left and variety is not None:
        shares = {column: variety(column) for column in found}
        few = [column for column, share in shares.items() if share <= FEW]
        if len(few) == 1 and all(share > 0.5 for column, share in shares.items() if column not in few):
            return few[0]
    if len(found) == 1:
        return found[0]
    raise DataError(_ambiguous("label", features, found, "--label (label=…)"))


def guess_answer(features: "Features", taken: Iterable[str] = ()) -> str:
    """The column of the text to write: the first conventional name (`ANSWERS`). Raises DataError when there is none."""
    free = [column for column in features if column not in tuple(taken)]
    found = [column for column in ANSWERS if column in free]
    if found:
        return found[0]
    raise DataError(_ambiguous("answer", features, [], "--label (label=…)"))


def guess_prompt(features: "Features", answer: str) -> str:
    """The template of the prompt: the first conventional name (`PROMPTS`), or the only other column of strings."""
    texts = [c for c in features if c not in (answer, *IDS) and is_text(features, c)]
    if {"instruction", "input"} <= set(texts):
        return "{instruction}\n{input}"
    if {"question", "context"} <= set(texts):
        return "{context}\n{question}"
    found = [column for column in PROMPTS if column in texts] or texts
    if found and (len(texts) == 1 or found is not texts):
        return found[0]
    raise DataError(_ambiguous("prompt", features, found, '--text (text=…), such as "{title}\\n{body}"'))


def guess_texts(features: "Features", label: str) -> tuple[str, ...]:
    """The one or two columns that hold the text of a row.

    A conventional pair or name (`PAIRS`, `TEXTS`) first, then the only column of strings beside the label.
    Raises DataError when none or several qualify.
    """
    texts = [c for c in features if c != label and (is_text(features, c) or is_words(features, c))]
    pairs = [pair for pair in PAIRS if set(pair) <= set(texts)]
    paired = set(_flat(pairs))
    named_texts = [(column,) for column in texts if column in TEXTS and column not in paired]
    others: list[tuple[str, ...]] = [(column,) for column in texts if column not in IDS]
    found: list[tuple[str, ...]] = [*pairs, *named_texts] or others
    if len(found) == 1:
        return found[0]
    flags = "--text (text=…), and --text-pair (text_pair=…) where a row has a second text"
    raise DataError(_ambiguous("text", features, dict.fromkeys(_flat(found)), flags))


def named(columns: Iterable[str]) -> str:
    """Column names as they stand in a message: quoted, with commas between them."""
    return ", ".join(map(repr, columns)) or "no columns"


def _ambiguous(what: str, features: Mapping[str, object], found: Iterable[str], flags: str) -> str:
    found = list(found)
    seen = f"{named(found)} all may" if len(found) > 1 else "none of them is sure to"
    return f"which column is the {what}? The table has {named(features)}, and {seen} hold it. Set {flags}"


def _flat(groups: Iterable[tuple[str, ...]]) -> list[str]:
    return [column for group in groups for column in group]


def _item(feature: object) -> object | None:
    """What a column of lists holds in its lists; None for a column of anything else."""
    from datasets import LargeList, List

    return feature.feature if isinstance(feature, (List, LargeList)) else None
