"""`multitune generate --input`: texts for JSON lines, each with an adapter and settings of its own."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from multitune.bank import Bank
from multitune.cli.predict import line_error, line_place, open_rows, read_line, row_of_values, standard_input
from multitune.cli.shared import note
from multitune.errors import DataError, MultituneError
from multitune.generation import Engine, GenerationSettings, Request
from multitune.generation.settings import check_beams, setting_names, suggest_setting
from multitune.tasks import Task

CHAT = "messages"
"""The key of a line that holds a chat."""
A_CHAT = '[{"role": "user", "content": "…"}]'


def warn_of_classifiers(bank: Bank, names: Iterable[str | None]) -> None:
    """Say which of the adapters that are asked to write were not trained to, whose texts are seldom what is wanted."""
    for name in dict.fromkeys(name for name in names if name is not None):
        task = bank.adapter(name).task
        if task.kind != "generation":
            note(
                f"warning: adapter '{name}' was trained for {task.kind} ('{task.name}') and not to write; its prompts "
                f"are gone on with as they stand. `multitune predict` answers with it"
            )


def write_lines(bank: Bank, input_: str, output: Path | None, settings: GenerationSettings, batch_size: int) -> None:
    """Write for every line of the input, in order, as they are done; none before all are accepted, the output open."""
    with ExitStack() as stack:
        lines = standard_input() if input_ == "-" else stack.enter_context(open_rows(Path(input_)))
        source = "" if input_ == "-" else Path(input_).name
        read = _read(bank, lines, settings, source)
        warn_of_classifiers(bank, (line.adapter for line in read))
        engines, requests = _submit(bank, read, batch_size, source)
        sink = sys.stdout if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        waiting = deque(requests)
        for engine in engines:
            while engine.step():
                _print_done(waiting, sink)
            _print_done(waiting, sink)


def _print_done(waiting: deque[Request], sink: TextIO) -> None:
    """Print and take off the requests in front that are done, so that an hour's texts are not lost with its last."""
    while waiting and waiting[0].done:
        written = waiting.popleft().result()
        print(json.dumps({"adapter": written.adapter} | written.to_dict(), ensure_ascii=False), file=sink, flush=True)


@dataclass(frozen=True)
class _Line:
    """A line of the input: whom it asks for what, and how to decode."""

    number: int
    """Its number in the input, from 1."""
    adapter: str | None
    row: Any
    settings: GenerationSettings


def _read(bank: Bank, lines: Iterable[bytes], settings: GenerationSettings, source: str = "") -> list[_Line]:
    """The lines of the input, each with the settings of the command line where it has none of its own.

    Raises:
        DataError: a line is not JSON, or cannot be honoured; says which line.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name, values = read_line(bank, line, {})
            own = _take_settings(None if name is None else bank.adapter(name).task, values)
            row = _row(bank, name, values)
            found.append(_Line(number, name, row, replace(settings, **own)))
        except MultituneError as error:
            raise line_error(source, number, error) from error
    return found


def _take_settings(task: Task | None, values: dict[str, Any]) -> dict[str, Any]:
    """Take out of a line's values those that are settings; a key that is a column of the task, too, is that column.

    Raises:
        DataError: a key that is neither.
    """
    of_task = () if task is None else (*task.columns, *filter(None, (task.label,)), *task.group)
    columns = tuple(dict.fromkeys((*of_task, "text")))
    known = setting_names()
    own = {key: values.pop(key) for key in known if key in values and key not in columns}
    for key in values:
        if key not in (*columns, CHAT):
            near = suggest_setting(key, ("adapter", *columns, CHAT, *known))
            raise DataError(
                f"unknown key {key!r}.{near} A line has an adapter, columns ({', '.join(columns)}) or the {CHAT} of "
                f"a chat, and settings ({', '.join(known)})"
            )
    return own


def _row(bank: Bank, name: str | None, values: dict[str, Any]) -> Any:
    """The prompt in what a line says, checked: the messages of a chat, a text, or the columns of the adapter's task.

    Raises:
        DataError: a row that does not fit the adapter, or messages that are none.
    """
    chat = values.get(CHAT)
    if chat is None or (name is not None and CHAT in bank.adapter(name).task.columns):
        if name is None and not isinstance(values.get("text"), str):
            raise DataError(f'a row without an adapter has a "text", or the "{CHAT}" of a chat: {A_CHAT}')
        return row_of_values(bank, name, values)
    if len(values) > 1:
        others = ", ".join(repr(key) for key in values if key != CHAT)
        raise DataError(f'"{CHAT}" are a whole prompt, so that {others} would not be read; leave one of them out')
    if not isinstance(chat, list) or not chat or not all(isinstance(m, dict) for m in chat):
        raise DataError(f'"{CHAT}" is a list such as {A_CHAT}, not {chat!r}')
    return chat


def _submit(bank: Bank, lines: Sequence[_Line], batch_size: int, source: str) -> tuple[list[Engine], list[Request]]:
    """All lines, accepted before any is written: in one mixed batch, but for those of fully tuned adapters.

    Returns:
        The engines that write them, one per backbone, and a request per line.

    Raises:
        MultituneError: a line cannot be served; says which.
    """
    engines: dict[Bank, Engine] = {}
    requests: list[Request] = []
    check_beams([(line_place(source, line.number), line.settings) for line in lines], batch_size)
    for line in lines:
        serving = bank.serving(line.adapter)
        if serving not in engines:
            engines[serving] = Engine(serving, max_rows=batch_size)
        row = (line.adapter, line.row)
        requests += engines[serving].submit_all([row], line.settings, name=line_place(source, line.number))
    return list(engines.values()), requests
