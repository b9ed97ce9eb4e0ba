"""Read one local file into a table in memory, and name the line that cannot be read.

No cache is written, nothing in a file is executed, and nothing is unpickled.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitune.errors import DataError, suggest

if TYPE_CHECKING:
    from datasets import Dataset, Features

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # no leading zeros: "007" is a name; 18 digits fit in 64 bits
_FLOAT = re.compile(r"[+-]?([0-9]{1,15}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")  # a longer number is an id
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_LONGEST_CELL = 2**31 - 1


def read_file(path: Path) -> "Dataset":
    """The table in a .csv, .tsv, .jsonl, .json or .parquet file.

    Raises DataError when the file is of another kind, empty or malformed; the line is named.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"cannot read {path.name!r}: the file name ends in none of {', '.join(READERS)}."
            f"{suggest(path.suffix, READERS) if path.suffix else ''} Save the table as one of these"
        )
    table = read(path)
    if not len(table):
        raise DataError(f"{path.name} holds no rows")
    return table


def parquet_features(path: Path) -> "Features":
    """The columns of a .parquet file and their types, read without its rows. Raises DataError as above."""
    from datasets import Features

    with _parquet(path) as file:
        return Features.from_arrow_schema(file.schema_arrow)


def from_rows(rows: Sequence[Mapping[str, Any]], *, where: str = "the list") -> "Dataset":
    """The table of a list of rows; a column that a row lacks is None there.

    Raises DataError when there are no rows, one is not a mapping, or a column mixes types.
    """
    if not rows:
        raise DataError(f"{where} holds no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: row {number} is a {type(row).__name__}, not a mapping of columns to values")
    names = dict.fromkeys(str(name) for row in rows for name in row)
    if not names:
        raise DataError(f"{where} holds rows without columns")
    return _table({name: [row.get(name) for row in rows] for name in names}, where)


def _read_csv(path: Path) -> "Dataset":
    return _delimited(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> "Dataset":
    # the TSV format has no quoting; a quotation mark is text, and an odd one must not swallow lines
    return _delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_jsonl(path: Path) -> "Dataset":
    lines = enumerate(_text(path).split("\n"), start=1)
    return from_rows([_json_row(line, n, path) for n, line in lines if line.strip()], where=path.name)


def _read_json(path: Path) -> "Dataset":
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)  # one object a line is often saved as .json
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name} line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}") from error
    return from_rows(rows, where=path.name)


def _read_parquet(path: Path) -> "Dataset":
    from datasets import Dataset

    with _parquet(path) as file:
        return Dataset(file.read())


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open `pyarrow.parquet.ParquetFile`; DataError when it cannot be read."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        # one file, opened as such: by its path alone, folders named a=b would be read as columns
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, ValueError, TypeError) as error:  # pyarrow's errors are among these
        raise DataError(f"{path.name} cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path], "Dataset"]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""How to read a file, by the end of its name."""


def _text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{path.name} is empty")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise DataError(
            f"{path.name} line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); it may be {guess}. "
            f"Convert it: iconv -f {guess} -t UTF-8 {path.name} > utf8{path.suffix}"
        ) from error


def _delimited(path: Path, *, delimiter: str, quoting: Any) -> "Dataset":
    text = io.StringIO(_text(path), newline="")
    limit = csv.field_size_limit(_LONGEST_CELL)  # one setting for the whole process, so it is put back
    try:
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
        header = _header(next(reader, []), path, delimiter)
        rows = list(_checked(reader, header, path))
    except csv.Error as error:
        raise DataError(f"{path.name} line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    cells = zip(*rows, strict=True) if rows else ([] for _ in header)
    return _table({name: _typed(list(column)) for name, column in zip(header, cells, strict=True)}, path.name)


def _header(names: list[str], path: Path, delimiter: str) -> list[str]:
    names = [name.strip() or f"column_{i}" for i, name in enumerate(names, start=1)]
    twice = [name for name in names if names.count(name) > 1]
    if not names or twice:
        raise DataError(f"{path.name} line 1: " + (f"two columns are named {twice[0]!r}" if twice else "no header"))
    if any(_FLOAT.fullmatch(name) for name in names):
        raise DataError(
            f"{path.name} line 1: the first line names the columns, but {', '.join(names)[:80]!r} looks "
            f"like data. Put a header above it, such as {delimiter.join(('text', 'label'))!r}"
        )
    other = [mark for mark in (";", "\t", ",") if mark != delimiter and mark in names[0]]
    if len(names) == 1 and other:
        also = "" if delimiter == "\t" else ", or by tabs in a .tsv file"
        raise DataError(
            f"{path.name} line 1: one column named {names[0]!r}, so the cells seem to be separated by "
            f"{other[0]!r}. Separate them by {delimiter!r}{also}"
        )
    return names


def _checked(reader: Any, header: list[str], path: Path) -> Iterable[list[str]]:
    """The rows, none of them blank or of another length than the header."""
    for row in reader:
        if row and len(row) != len(header):
            raise DataError(
                f"{path.name} line {reader.line_num}: {len(row)} cells, but the header names {len(header)} "
                f"columns ({', '.join(header)})."
                + (' Put "…" around a text with a comma in it' if path.suffix == ".csv" else "")
            )
        if row:
            yield row


def _typed(cells: list[str]) -> list[Any]:
    """A column of a text file as integers, floats or texts, whichever fits every cell.

    An empty cell of a column of numbers is None.
    """
    stated = [cell for cell in cells if cell]
    if stated and all(map(_INTEGER.fullmatch, stated)):
        return [int(cell) if cell else None for cell in cells]
    finite = [bool(_FLOAT.fullmatch(cell)) and not re.match(r"[+-]?0[0-9]", cell) for cell in stated]
    if any(finite) and all(ok or _NOT_FINITE.fullmatch(cell) for ok, cell in zip(finite, stated, strict=True)):
        return [float(cell) if cell else None for cell in cells]
    return list(cells)


def _json_row(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name} line {number}, column {error.colno}: no valid JSON: {error.msg}") from error
    if not isinstance(row, dict):
        raise DataError(f'{path.name} line {number}: each line is an object such as {{"text": "…"}}, not {line[:60]!r}')
    return row


def _table(columns: Mapping[str, list[Any]], where: str) -> "Dataset":
    from datasets import Dataset

    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are the first two
        mixed = [f"column {name!r} {mixture}" for name, cells in columns.items() if (mixture := _mixture(cells))]
        raise DataError(f"{where}: {mixed[0] if mixed else f'cannot be made a table: {error}'}") from error


def _mixture(cells: list[Any]) -> str:
    """Two rows of a column whose values are of different types, in words; "" when there are none."""
    first: dict[str, int] = {}
    for number, cell in enumerate(cells, start=1):
        if cell is not None:
            first.setdefault("number" if type(cell) in (int, float) else type(cell).__name__, number)
    if len(first) < 2:
        return ""
    (one, row), (other, other_row), *_ = first.items()
    return f"holds a {one} in row {row} and a {other} in row {other_row}; make them alike"
