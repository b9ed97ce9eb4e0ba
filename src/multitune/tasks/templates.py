"""A template turns a row of a table into the one or two texts that a backbone reads."""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

from multitune.errors import DataError, TaskError, suggest

SLOT = "|"
"""The field `{|}` of a template: a place in its text where an adapter may insert vectors."""

Row = Mapping[str, object] | str | Sequence[str]
"""Columns to values; or, for short, the text itself, or one text per part of the template."""


class SlottedText(str):
    """A text with slots: places where an adapter may insert vectors, and where for all others there is nothing."""

    __slots__ = ("slots",)

    slots: tuple[int, ...]
    """For each slot how many characters stand before it, the space in front of it not counted."""

    def __new__(cls, text: str, slots: tuple[int, ...]) -> "SlottedText":
        made = super().__new__(cls, text)
        made.slots = slots
        return made


@dataclass(frozen=True)
class Template:
    """One or two texts made from the columns of a row.

    `Template(("premise", "hypothesis"))` reads two columns as they are;
    `Template(("{premise} What was the {question}?",))` writes one text around two columns;
    `Template(("{premise} {|} {hypothesis}",))` has a slot between them, in which P-tuning can put pseudo tokens. A slot
    is no text: one of the spaces around it goes with it.

    Raises TaskError when there are not one or two parts, or a part is no plain format string: attribute
    access, indices, conversions and format specifications ("{a.b}", "{a[0]}", "{a!r}", "{a:>9}") are refused,
    because a template may come from a file written by someone else.
    """

    parts: tuple[str, ...]
    """One or two format strings. A part without braces is the name of a column, short for "{column}"."""

    def __post_init__(self) -> None:
        parts = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)
        if len(parts) not in (1, 2):
            raise TaskError(
                f"a template has one or two parts, not {len(parts)}. For more columns write them into one "
                "part: "
                'Template(("{title} {body}",))'
            )
        object.__setattr__(self, "parts", parts)
        _ = self._pieces  # a malformed part is reported here, not at the first row

    @cached_property
    def _pieces(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """For each part, its (text before, column) pairs; the column is "" after the last text."""
        return tuple(_parse(part) for part in self.parts)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads, each once, in the order of their first use."""
        fields = (column for pieces in self._pieces for _, column in pieces)
        return tuple(dict.fromkeys(column for column in fields if column not in ("", SLOT)))

    @cached_property
    def num_slots(self) -> int:
        """How many slots the texts of a row have together."""
        return sum(column == SLOT for pieces in self._pieces for _, column in pieces)

    def render(self, row: Row) -> tuple[str, ...]:
        """One text per part.

        `row` maps columns to values (str, int, float or bool; further columns are ignored). It may also be a
        single text when the template reads one column, or a tuple or list of as many texts as there are
        parts, when every part reads one column.

        Raises DataError when a column is missing, empty (None, NaN) or not a plain value.
        """
        if isinstance(row, Mapping):
            return tuple(self._fill(pieces, row) for pieces in self._pieces)
        if isinstance(row, str):
            return self._render_text(row)
        if isinstance(row, (tuple, list)) and all(isinstance(text, str) for text in row):
            return self._render_texts(row)
        raise DataError(
            f"a row is a mapping of columns to values, a text, or a list of texts, not {type(row).__name__}. "
            f"This template reads {self._named_columns}"
        )

    def _render_text(self, text: str) -> tuple[str, ...]:
        if len(self.columns) != 1:
            raise DataError(
                f"got a single text, but the template reads {self._named_columns}. Give a mapping such as "
                f"{dict.fromkeys(self.columns, '…')}"
            )
        return tuple(self._fill(pieces, {self.columns[0]: text}) for pieces in self._pieces)

    def _render_texts(self, texts: Sequence[str]) -> tuple[str, ...]:
        read = [{column for _, column in pieces if column not in ("", SLOT)} for pieces in self._pieces]
        if len(texts) != len(self.parts) or any(len(columns) != 1 for columns in read):
            raise DataError(
                f"got a list of length {len(texts)}, but the template has {len(self.parts)} part(s) and "
                f"reads {self._named_columns}. Give a mapping such as {dict.fromkeys(self.columns, '…')}"
            )
        return tuple(
            self._fill(pieces, dict.fromkeys(columns, text))
            for pieces, columns, text in zip(self._pieces, read, texts, strict=True)
        )

    def _fill(self, pieces: tuple[tuple[str, str], ...], row: Mapping[str, object]) -> str:
        between = [""]  # the texts between slots
        for before, column in pieces:
            between[-1] += before
            if column == SLOT:
                between.append("")
            elif column:
                between[-1] += _text(row, column)
        return between[0] if len(between) == 1 else _joined(between)

    @property
    def _named_columns(self) -> str:
        return ", ".join(map(repr, self.columns)) or "no column"


def _joined(between: Sequence[str]) -> SlottedText:
    """The texts between slots as one, without the spaces that the slots leave over."""
    text, slots = between[0], []
    for following in between[1:]:
        slots.append(len(text.rstrip()))
        both = following.startswith(" ") and (not text or text[-1].isspace())
        text += following[1:] if both else following
    return SlottedText(text if between[-1] else text.removesuffix(" "), tuple(slots))


def cell(row: Mapping[str, object], column: str) -> object:
    """The value of a column; DataError names the row's columns and the nearest match when it is missing."""
    if column not in row:
        known = ", ".join(repr(name) for name in row)
        raise DataError(f"no column {column!r}; the row has {known or 'none'}.{suggest(column, row)}")
    return row[column]


def _text(row: Mapping[str, object], column: str) -> str:
    value = cell(row, column)
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        raise DataError(f"column {column!r} is empty. Fill it in or drop the row")
    if not isinstance(value, (str, Real)):
        raise DataError(f"column {column!r} holds a {type(value).__name__}, not a text: {str(value)[:60]!r}")
    return str(value)


def _parse(part: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(part, str) or not part:
        raise TaskError(f"a part of a template is a column or a text such as '{{column}}', not {part!r}")
    if "{" not in part and "}" not in part:
        return (("", part),)
    try:
        fields = list(string.Formatter().parse(part))
    except ValueError as error:
        raise TaskError(f"template {part!r}: {error}. Write a brace that is text as {{{{ or }}}}") from error
    return tuple((before, _plain(part, *field)) for before, *field in fields)


def _plain(part: str, name: str | None, spec: str | None, conversion: str | None) -> str:
    if name is None:
        return ""
    if not name or "." in name or "[" in name or spec or conversion:
        written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        raise TaskError(
            f"template {part!r}: a field is the name of a column in braces, with no attribute, index, "
            f"conversion or format; got {{{written}}}"
        )
    return name
