"""`multitune predict`: rows of any mix of adapters in, answers out, in order."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from multitune.adapter import CONFIG_FILE, Adapter
from multitune.bank import Bank
from multitune.cli import shared
from multitune.cli.shared import (
    AdapterFolders,
    AsJson,
    Device,
    DropLayers,
    Dtype,
    OptionalBackboneName,
    app,
    print_json,
    show,
)
from multitune.errors import (
    AdapterError,
    BackboneError,
    ConfigError,
    DataError,
    MixError,
    MultituneError,
    PlanError,
    suggest,
    suggest_file,
)
from multitune.prediction import Prediction

_SHOWN_VALUES = 4
"""Of an embedding, where a human reads it."""
_NumberedRow = tuple[int, tuple[str | None, Any]]
"""The number of a line, and the adapter and the row that it names."""
_OF_A_ROW = (AdapterError, BackboneError, DataError, MixError, PlanError)
"""What the bank raises about one row of a batch."""


@app.command()
def predict(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT] [TEXT_PAIR]", help="One row for one adapter.", show_default=False),
    ] = None,
    adapters: AdapterFolders = None,
    input_: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            help='JSON lines such as {"adapter": "topic", "text": "…"}, or with the columns that the adapter reads; '
            '"adapter": null asks for the embedding of the bare backbone. Other keys, such as an id or the label, are '
            "not read. - reads standard input.",
        ),
    ] = "-",
    output: Annotated[
        Path | None, typer.Option(help="File for the answers; by default standard output.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Most rows in one forward pass.")] = 32,
    window: Annotated[
        int, typer.Option(help="Rows read ahead to batch those of similar length; 1 answers each line as it comes.")
    ] = 512,
    aot_store: Annotated[
        str,
        typer.Option(
            help="Where the token rows of AoT adapters come from: factors, or the table of `multitune fuse`, in memory "
            "(ram) or mapped from its file (mmap)."
        ),
    ] = "factors",
    drop_layers: DropLayers = None,
    backbone: OptionalBackboneName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Answer rows, each by the adapter it names, in one mixed batch; JSON lines in, JSON lines out, in order."""
    named, texts = adapters_and_texts(adapters, texts)
    folders = adapter_folders(named)
    if window < 1:
        raise ConfigError(f"window={window} is not possible; give at least 1")
    if texts and (input_ != "-" or output is not None):
        raise ConfigError("a row on the command line is answered alone, on standard output; drop --input and --output")
    refuse_output_over_input(input_, output)
    dropped = shared.layer_numbers(drop_layers)
    bank, broken = _bank(folders, backbone, device, dtype, aot_store, dropped)
    if texts:
        _one_row(bank, texts, as_json, more=len(broken))
        return
    with ExitStack() as stack:
        lines = standard_input() if input_ == "-" else stack.enter_context(open_rows(Path(input_)))
        sink = sys.stdout if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        source = "" if input_ == "-" else Path(input_).name
        for answer in answers(bank, lines, batch_size=batch_size, window=window, broken=broken, source=source):
            print(json.dumps(answer, ensure_ascii=False), file=sink, flush=window == 1)


def _bank(
    folders: dict[str, Path],
    backbone: str | None,
    device: str,
    dtype: str,
    aot_store: str,
    dropped: tuple[int, ...],
) -> tuple[Bank, dict[str, str]]:
    """The adapters in a bank, and what is wrong with those that cannot be loaded; a row may ask for neither.

    Raises:
        MultituneError: not one adapter can be loaded; says why of the first.
        ConfigError: a layer to drop in which an adapter has nothing.
    """
    errors: dict[str, MultituneError] = {}
    bank: Bank | None = None
    for name, folder in folders.items():
        try:
            if bank is None:
                on = shared.backbone_of(Adapter.load(folder), backbone, device, dtype)
                bank = Bank(on, aot_store=aot_store)  # type: ignore[arg-type]
            bank.add(name, folder, drop_layers=dropped)
        except (AdapterError, BackboneError) as error:
            errors[name] = error
    if bank is None or not bank.names:
        raise next(iter(errors.values()))
    broken = {name: str(each) for name, each in errors.items()}
    for name, problem in broken.items():
        shared.note(f"left out adapter '{name}', which no row may ask for: {problem}")
    return bank, broken


def _one_row(bank: Bank, texts: Sequence[str], as_json: bool, *, more: int) -> None:
    number = len(bank) + more
    if number > 1 or len(texts) > 2:
        raise ConfigError(
            f"a row on the command line is one or two texts for one adapter, not {len(texts)} text(s) for {number}; "
            f"pass rows as JSON lines: --input rows.jsonl"
        )
    (name,) = bank.names
    (prediction,) = bank.predict([(name, texts[0] if len(texts) == 1 else tuple(texts))])
    if as_json:
        print_json(prediction.to_dict())
    elif prediction.probabilities:
        ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        show(shared.table([(n, f"{p:.1%}") for n, p in ranked], ("label", "probability"), right=("probability",)))
    elif prediction.embedding is not None:
        shown = ", ".join(f"{value:.4f}" for value in prediction.embedding[:_SHOWN_VALUES].tolist())
        rest = ", …" if len(prediction.embedding) > _SHOWN_VALUES else ""
        print(f"[{shown}{rest}] ({len(prediction.embedding)} numbers; --json prints them all)")
    else:
        print(prediction.label if prediction.label is not None else "no answer: the logits are not finite")


def adapters_and_texts(adapters: Sequence[str] | None, texts: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """What a command line names as adapters, and its texts.

    An option takes one value, so of `--adapters a b`, or `--adapters all/*`, the rest arrives among the texts.
    """
    more = [text for text in texts or () if adapters and _is_adapter(text)]
    return [*(adapters or ()), *more], [text for text in texts or () if text not in more]


def _is_adapter(text: str) -> bool:
    # os.path, because a text may be too long for a path, which pathlib reports as an error
    return any(os.path.isfile(os.path.join(place, CONFIG_FILE)) for place in (text, text.rpartition("=")[2]) if place)


def adapter_folders(named: Iterable[str], command: str = "predict") -> dict[str, Path]:
    """Adapters by name, from `FOLDER`, `NAME=FOLDER`, or a folder that holds adapter folders.

    Raises:
        ConfigError: none is given, or two go by one name.
    """
    found: dict[str, Path] = {}
    for each in named:
        name, equals, place = each.rpartition("=")
        folder = Path(place) if equals and not Path(each).exists() else Path(each)
        inside = sorted(file.parent for file in folder.glob(f"*/{CONFIG_FILE}") if not file.parent.name.startswith("."))
        many = inside if not (folder / CONFIG_FILE).exists() else []
        if many and equals:
            raise ConfigError(
                f"{folder} holds {len(many)} adapters, which cannot all be called '{name}'; drop the name"
            )
        for one in many or [folder]:
            key = name if equals and folder != Path(each) else one.resolve().name
            if key in found:
                raise ConfigError(f"two adapters are called '{key}': {found[key]} and {one}; name one: other={one}")
            found[key] = one
    if not found:
        raise ConfigError(f"{command} needs adapters: --adapters FOLDER, which may be repeated")
    return found


def refuse_output_over_input(input_: str, output: Path | None) -> None:
    """Raise ConfigError where the rows would be overwritten by their answers."""
    if output is not None and input_ != "-" and output.resolve() == Path(input_).resolve():
        raise ConfigError(f"--output {output} is the input, which would be emptied; give another file")


def standard_input() -> BinaryIO:
    """Standard input, and a word on it where someone sits at it, to whom waiting for rows looks like work."""
    if sys.stdin.isatty():
        shared.note(
            'reading rows from this terminal, one a line, such as {"text": "…"}, up to Ctrl-D; --input FILE reads them '
            "from a file"
        )
    return sys.stdin.buffer


def open_rows(path: Path) -> BinaryIO:
    """A file of JSON lines. Raises DataError when there is none."""
    if not path.is_file():
        raise DataError(f"no file {str(path)!r} to read rows from.{suggest_file(path)}")
    return path.open("rb")


def line_place(source: str, number: int) -> str:
    """What messages call a line: the file if there is one, and the line."""
    return f"{source}, line {number}" if source else f"line {number}"


def line_error(source: str, number: int, error: MultituneError) -> DataError:
    """What is wrong with a line, behind its place: the file if there is one, the line, and where JSON ends in one."""
    place = line_place(source, number)
    column = getattr(error.__cause__, "colno", None)
    return DataError(f"{place}{'' if column is None else f', column {column}'}: {str(error).removeprefix('row 0: ')}")


def _stopped(source: str, number: int, error: MultituneError) -> DataError:
    said = str(line_error(source, number, error))
    end = "" if said.endswith((".", "?", "!")) else "."
    return DataError(f"{said}{end} The lines before it are answered; it and those after it are not")


def answers(
    bank: Bank,
    lines: Iterable[bytes],
    *,
    batch_size: int,
    window: int,
    broken: Mapping[str, str] | None = None,
    source: str = "",
) -> Iterator[dict[str, Any]]:
    """Answers to JSON lines, in order. At a bad line the lines before it are answered, then it is named.

    Args:
        broken: what is wrong with adapters that could not be loaded, by name.
        source: name of the file that the lines are from, for messages.

    Raises:
        DataError: a line is not JSON, or does not fit the adapter that it names; says which line.
    """
    numbered = enumerate(lines, start=1)
    while chunk := list(islice(numbered, window)):
        rows: list[_NumberedRow] = []
        problem: MultituneError | None = None
        for number, line in chunk:
            if not line.strip():
                continue
            try:
                name, values = read_line(bank, line, broken or {})
                rows.append((number, (name, row_of_values(bank, name, values))))
            except MultituneError as error:
                problem = _stopped(source, number, error)
                break
        for (_, (name, row)), prediction in zip(rows, _answered(bank, rows, batch_size, source), strict=True):
            yield prediction.to_dict() | _choice(bank, name, row, prediction)
        if problem is not None:
            raise problem


def _choice(bank: Bank, name: str | None, row: Any, prediction: Prediction) -> dict[str, str]:
    """Multiple choice: the text of the choice whose number is the label."""
    task = None if name is None else bank.adapter(name).task
    if task is None or task.kind != "multiple_choice" or prediction.label is None:
        return {}
    assert isinstance(prediction.label, str)  # the number of a choice
    return {"choice": task.choice_texts(row)[int(prediction.label)]}


def _answered(bank: Bank, rows: Sequence[_NumberedRow], batch_size: int, source: str) -> Iterator[Prediction]:
    """Answers to rows by the numbers of their lines, in order; what cannot be answered is named after those before it.

    Raises:
        DataError: a row that its adapter cannot answer; says which line.
    """
    try:
        found = _predict(bank, [row for _, row in rows], batch_size)
    except _OF_A_ROW as error:
        if len(rows) == 1:
            raise _stopped(source, rows[0][0], error) from error
        # The bank refuses a batch before it runs it, so that looking for the row in halves costs little.
        half = len(rows) // 2
        yield from _answered(bank, rows[:half], batch_size, source)
        yield from _answered(bank, rows[half:], batch_size, source)
        return
    yield from found


def read_line(bank: Bank, line: bytes, broken: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    """The adapter that a line names, checked, and what else the line says."""
    try:
        values = json.loads(line.rstrip(b"\r\n"))  # for what is lacking to be at the end of this line, not behind
    except (ValueError, RecursionError) as error:  # a line that is not UTF-8 is among the first
        raise DataError(f"no valid JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(values, dict):
        raise DataError(
            f'a line is an object such as {{"adapter": "topic", "text": "…"}}, not a {type(values).__name__}'
        )
    if "adapter" not in values and len(bank) + len(broken) > 1:
        raise DataError(f'no "adapter"; name one of {", ".join(bank.names)}, or null for the bare backbone')
    name = values.pop("adapter") if "adapter" in values else next(iter(bank.names), None)
    if isinstance(name, str) and name in broken:
        raise AdapterError(f"adapter {name!r} could not be loaded: {broken[name]}")
    if name is not None and (not isinstance(name, str) or name not in bank):
        known = ", ".join(bank.names) or "none, and null asks the bare backbone"
        raise AdapterError(f"no adapter {name!r}.{suggest(str(name), bank.names)} There are {known}")
    return name, values


def row_of_values(bank: Bank, name: str | None, values: Mapping[str, Any]) -> Any:
    """The row for an adapter in what a line says, checked; keys that are no column of the row are not read."""
    texts = [values[key] for key in ("text", "text_pair") if key in values]
    row: Any = texts[0] if len(texts) == 1 else tuple(texts)
    if name is None:
        if "text" not in values or not all(isinstance(text, str) for text in texts):
            raise DataError('a row without an adapter has a "text", and may have a "text_pair"')
        return row
    task = bank.adapter(name).task
    if "text" not in values or set(task.columns) <= set(values):
        row = {key: value for key, value in values.items() if key != task.label}
    task.encode(row)
    return row


def _predict(bank: Bank, rows: Sequence[tuple[str | None, Any]], batch_size: int) -> list[Prediction]:
    """All rows in mixed batches, but for those of fully tuned adapters, which have a backbone of their own each."""
    groups: dict[str | None, list[int]] = defaultdict(list)
    for i, (name, _) in enumerate(rows):
        alone = name is not None and bank.adapter(name).method.changes_weights
        groups[name if alone else None].append(i)
    found: dict[int, Prediction] = {}
    for places in groups.values():
        found |= zip(places, bank.predict([rows[i] for i in places], batch_size=batch_size), strict=True)
    return [found[i] for i in range(len(rows))]
