"""What a label cell of a table means as a training target, one function per kind of task.

Every function takes the cell's value and the task's label names, and raises DataError with what was found and
what is known. A label is written as its name; an integer that is not itself a name is an id, a position in
the names. Where a name is a number ("1" … "5" for stars), integers are names and never ids, so that
"3 stars" cannot be read as the label with id 3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from multitune.errors import DataError, suggest

_SHOWN = 20  # label names in a message, at most


def label_id(value: object, labels: Sequence[str]) -> int:
    """The id of one label: its position in `labels`."""
    position = as_integer(value)
    name = value.strip() if isinstance(value, str) else str(value if position is None else position)
    for spelled in (value, name):
        if spelled in labels:
            return labels.index(spelled)
    if position is not None and 0 <= position < len(labels) and not any(map(is_integer_name, labels)):
        return position
    if value is None or name == "":
        raise DataError("the label is empty. Fill it in or drop the row")
    raise DataError(f"unknown label {value!r}; the labels are {shown(labels)}.{suggest(name, labels)}")


def label_vector(value: object, labels: Sequence[str]) -> tuple[int, ...]:
    """One 0 or 1 per label, from a list of names or ids, or from names with "|" or "," between them."""
    if isinstance(value, str):
        value = split_names(value, labels)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"labels are a list of names or ids, or a text such as 'a|b', not {value!r}")
    ids = [label_id(item, labels) for item in value]
    if len(set(ids)) < len(ids):
        raise DataError(
            f"a label stands twice in {value!r}. List each label that holds once, by name or id; a row of "
            "zeros and ones for all labels is not read"
        )
    return tuple(int(i in ids) for i in range(len(labels)))


def split_names(text: str, labels: Sequence[str] = ()) -> list[str]:
    """The names in a text such as "a|b" or "a, b"; a text that is itself one of `labels` is not split."""
    if text.strip() in labels:
        return [text.strip()]
    parts = text.split("|" if "|" in text else ",")
    return [part.strip() for part in parts if part.strip()]


def tag_ids(value: object, labels: Sequence[str], num_words: int) -> tuple[int, ...]:
    """One label id per word."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"tags are a list with one tag per word, not {value!r}")
    if len(value) != num_words:
        raise DataError(f"there are {len(value)} tags for {num_words} words; each word needs one tag")
    return tuple(label_id(tag, labels) for tag in value)


def number(value: object) -> float:
    """A finite number; a text that spells one will do."""
    try:
        # bool is an int to Python, but a yes/no column is classification
        result = float(value) if isinstance(value, (Real, str)) and not isinstance(value, bool) else None
    except ValueError:
        result = None
    if result is None:
        raise DataError(f"the target of a regression is a number, not {value!r}")
    if not math.isfinite(result):
        raise DataError(f"the target of a regression is a finite number, not {result}. Fill it in or drop the row")
    return result


def choice_id(value: object, choices: Sequence[str], row: Mapping[str, Any]) -> int:
    """Which choice is right: its position, or the name of the column that holds it.

    Its text is none of these, since a text such as "2" could be a position as well; the message says whose it is.
    """
    names = [choice.removeprefix("{").removesuffix("}") for choice in choices]
    if value in names:
        return names.index(str(value))
    position = as_integer(value)
    if position is not None and 0 <= position < len(choices):
        return position
    same = [name for name in names if row.get(name) == value]
    fix = f", which is the text of {same[0]!r}: write {same[0]!r} or {names.index(same[0])} instead" if same else ""
    raise DataError(
        f"the answer to a multiple choice is 0 … {len(choices) - 1} or one of {', '.join(map(repr, names))}, "
        f"not {value!r}{fix}"
    )


def right_items(value: object, items: Sequence[str]) -> tuple[int, ...]:
    """Which choices of a list are right, in order: by their texts or positions, one or a list of them.

    An integer is a position, a text a choice, or a position where no choice reads like an integer. A text that stands
    in the list twice is right in both places.
    """
    wanted = value if isinstance(value, (list, tuple)) else [value]
    found: set[int] = set()
    for each in wanted:
        places = [place for place, item in enumerate(items) if item == each]
        if not places and not (isinstance(each, str) and any(map(is_integer_name, items))):
            position = as_integer(each)
            places = [position] if position is not None and 0 <= position < len(items) else []
        if not places:
            near = suggest(each, items) if isinstance(each, str) else ""
            raise DataError(f"no choice {each!r}; there are {shown(items)}, counted from 0.{near}")
        found.update(places)
    if not found:
        raise DataError("no choice is right. Give at least one or drop the row")
    return tuple(sorted(found))


def answers(value: object) -> tuple[str, ...]:
    """The texts that are right answers: one, or those of a list; numbers as they are written."""
    found = value if isinstance(value, (list, tuple)) else [value]
    if not found:
        raise DataError("the list of answers is empty. Give at least one or drop the row")
    for each in found:
        missing = each is None or (isinstance(each, float) and math.isnan(each))
        if missing or (isinstance(each, str) and not each.strip()):
            raise DataError("the answer is empty. Fill it in or drop the row")
        if not isinstance(each, (str, Real)):
            raise DataError(f"an answer is a text, not a {type(each).__name__}: {str(each)[:60]!r}")
    return tuple(str(each).strip() for each in found)


def as_integer(value: object) -> int | None:
    """The value of an int, or of a float or text that is one; None for all else (bool included)."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and float(value).is_integer():
        return int(float(value))
    return int(value) if isinstance(value, str) and is_integer_name(value) else None


def is_integer_name(name: str) -> bool:
    """Whether a text is an integer in plain digits."""
    return re.fullmatch(r"-?[0-9]+", name) is not None


def shown(labels: Sequence[str]) -> str:
    """Label names as they stand in a message: quoted, the first of them when there are many."""
    names = ", ".join(map(repr, labels[:_SHOWN]))
    return names + (f", … ({len(labels)} in all)" if len(labels) > _SHOWN else "")
