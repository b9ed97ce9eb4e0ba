"""`multitune generate`: texts for rows of any mix of adapters, or for the rows of a task, beside what is right."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from multitune.adapter import Adapter
from multitune.answers import settle_format
from multitune.bank import Bank
from multitune.cli import shared
from multitune.cli.predict import (
    adapter_folders,
    adapters_and_texts,
    line_error,
    line_place,
    open_rows,
    read_line,
    refuse_output_over_input,
    row_of_values,
    standard_input,
)
from multitune.cli.shared import (
    AdapterFolders,
    AsJson,
    Device,
    Dtype,
    OptionalBackboneName,
    app,
    note,
    print_json,
    score,
    show,
)
from multitune.errors import ConfigError, DataError, MultituneError
from multitune.generation import Engine, Generation, GenerationSettings, Request, evaluate_texts
from multitune.generation.pages import PAGE_FILE
from multitune.generation.settings import check_beams, setting_names, suggest_setting
from multitune.prompting import with_examples
from multitune.prompting.exemplars import EXAMPLE_SEPARATOR, WHOLE_PROMPT
from multitune.tasks import Task, TaskData, any_split, infer_task, list_splits, load_task, read_table
from multitune.tasks.reasoning import READERS, question_rows

_DECODING, _JUDGING = "Decoding", "Writing for the rows of a task"
_SPLIT = "validation"
_CHAT = "messages"
"""The key of a line that holds a chat."""
_A_CHAT = '[{"role": "user", "content": "…"}]'


@app.command()
def generate(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]", help="One row for one adapter.", show_default=False)
    ] = None,
    adapters: AdapterFolders = None,
    input_: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            help='JSON lines such as {"adapter": "e2e", "text": "…"}, or with the columns of the adapter\'s template; '
            '"adapter": null asks the bare backbone, and "messages" in place of a text is a chat. A line may have '
            'settings of its own, by their names in Python: "temperature": 0.7, "seed": 1. - reads standard input.',
        ),
    ] = "-",
    output: Annotated[
        Path | None, typer.Option(help="File for the texts; by default standard output.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task by name, to judge one adapter by, or with --backbone alone the bare language model.",
            rich_help_panel=_JUDGING,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows with answers instead of --task: a file, a folder, or a hub data set.",
            rich_help_panel=_JUDGING,
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="COLUMN",
            help="Of --data without an adapter, or with --examples: column of the prompt, or a template over columns.",
            rich_help_panel=_JUDGING,
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="So too: column of the answer.", rich_help_panel=_JUDGING, show_default=False
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="WORD",
            help="So too, without an adapter: plain, chat or auto. \\[default: plain]",
            rich_help_panel=_JUDGING,
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Metric to judge by. \\[default: the task's, or rouge_l]",
            rich_help_panel=_JUDGING,
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help=f"Split to write for, where there are several. \\[default: {_SPLIT}]",
            rich_help_panel=_JUDGING,
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Write for the first so many prompts only.", rich_help_panel=_JUDGING, show_default=False),
    ] = None,
    examples: Annotated[
        int,
        typer.Option(
            help="Training rows of the task, or other rows of --data, that stand in front of every row as examples, "
            "the most similar ones; as many as the adapter was trained with, or with --backbone alone any number "
            "(few-shot).",
            rich_help_panel=_JUDGING,
        ),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for predictions.jsonl, predictions.html and scores.json.",
            rich_help_panel=_JUDGING,
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.", rich_help_panel=_DECODING)] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.", rich_help_panel=_DECODING)
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from the k likeliest tokens only; 0 for all.", rich_help_panel=_DECODING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Draw from the likeliest tokens that together have this probability.", rich_help_panel=_DECODING
        ),
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Scores of tokens seen before are lowered by it.", rich_help_panel=_DECODING)
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed of what is drawn.", rich_help_panel=_DECODING, show_default=False)
    ] = None,
    beams: Annotated[int, typer.Option(help="Beams of a beam search; 1 for none.", rich_help_panel=_DECODING)] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="String that ends a text; may be repeated. A line break is $'\\n' in bash and zsh.",
            rich_help_panel=_DECODING,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Most rows decoded together.")] = 32,
    backbone: OptionalBackboneName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Write texts, each by the adapter its row names, in one mixed batch; or for a task's rows, and judge them."""
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        num_beams=beams,
        stop=tuple(stop or ()),
    )
    named, texts = adapters_and_texts(adapters, texts)
    text = _one_text(texts)
    _warn_of_escapes(stop or ())
    put = {"text": text_column, "label": label, "format": format_}
    judged = _Judged(task, data, split, rows, examples, out, metric, {k: v for k, v in put.items() if v is not None})
    judged.check(bool(named))
    _check(judged, text, input_, output)
    bank = _bank(named, backbone, device, dtype)
    if judged.asked:
        _judge(bank, judged, settings, batch_size, as_json)
    elif text is not None:
        _write_one(bank, text, settings, batch_size, as_json)
    else:
        _write_lines(bank, input_, output, settings, batch_size)


@dataclass(frozen=True)
class _Judged:
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


def _check(judged: _Judged, text: str | None, input_: str, output: Path | None) -> None:
    """Refuse rows from several places, and outputs that would not be written."""
    elsewhere = input_ != "-" or output is not None
    if judged.asked and (text is not None or elsewhere):
        raise ConfigError("--task and --data bring their own rows; drop the text, --input and --output (--out FOLDER)")
    if text is not None and elsewhere:
        raise ConfigError("a text on the command line is answered alone, on standard output; drop --input and --output")
    refuse_output_over_input(input_, output)


def _warn_of_escapes(stop: Sequence[str]) -> None:
    """Say that a stop string with a backslash in place of a line break or a tab is taken as it stands."""
    for each in stop:
        found = next((escape for escape in (r"\n", r"\t") if escape in each), None)
        if found is not None:
            note(
                f"warning: --stop '{each}' holds a backslash and the letter {found[1]}, as a shell passes them on, and "
                f"ends a text where it holds these; if a line break or a tab is meant: --stop $'{each}'"
            )


def _one_text(texts: Sequence[str]) -> str | None:
    """The text on the command line, if there is one. Raises ConfigError for several."""
    if len(texts) > 1:
        shown = ", ".join(map(repr, texts))
        raise ConfigError(
            f"a row on the command line is one text for one adapter, not {len(texts)}: {shown}, of which none is the "
            f"folder of an adapter; put the text in quotes, or pass rows as JSON lines: --input rows.jsonl"
        )
    return texts[0] if texts else None


def _bank(named: list[str], backbone: str | None, device: str, dtype: str) -> Bank:
    """The adapters in a bank; without any the bare backbone."""
    if not named:
        if backbone is None:
            raise ConfigError(
                "generate needs adapters: --adapters FOLDER, which may be repeated; or --backbone NAME, for a language "
                "model without any"
            )
        return Bank(shared.load_backbone(backbone, device, dtype))
    folders = adapter_folders(named, command="generate")
    loaded = Adapter.load(next(iter(folders.values())))
    bank = Bank(shared.backbone_of(loaded, backbone, device, dtype))
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def _sole(bank: Bank, what: str) -> str | None:
    """The one adapter; `None` for the bare backbone where there is none."""
    if len(bank) > 1:
        raise ConfigError(f"{what} is for one adapter, not {len(bank)}; pass rows as JSON lines: --input rows.jsonl")
    return next(iter(bank.names), None)


def _warn_of_classifiers(bank: Bank, names: Iterable[str | None]) -> None:
    """Say which of the adapters that are asked to write were not trained to, whose texts are seldom what is wanted."""
    for name in dict.fromkeys(name for name in names if name is not None):
        task = bank.adapter(name).task
        if task.kind != "generation":
            note(
                f"warning: adapter '{name}' was trained for {task.kind} ('{task.name}') and not to write; its prompts "
                f"are gone on with as they stand. `multitune predict` answers with it"
            )


def _write_one(bank: Bank, text: str, settings: GenerationSettings, batch_size: int, as_json: bool) -> None:
    """Write for the text on the command line, which messages do not number."""
    name = _sole(bank, "a text on the command line")
    _warn_of_classifiers(bank, [name])
    try:
        (written,) = bank.generate([(name, text)], settings, batch_size=batch_size)
    except MultituneError as error:
        raise type(error)(str(error).removeprefix("row 0: ")) from error
    print_json(written.to_dict()) if as_json else print(written.text)
    _say_why_empty(bank, written)


def _say_why_empty(bank: Bank, written: Generation) -> None:
    """Where a text is empty, say why: an empty line alone looks like a failure."""
    if written.text.strip():
        return
    why = {"eos": "the model ended it at once", "stop": "it began with a stop string"}.get(written.finish_reason, "")
    tokenizer = bank.backbone.tokenizer
    if written.adapter is None and written.finish_reason == "eos" and tokenizer is not None and tokenizer.chat_template:
        why += (
            f". Without an adapter a text is gone on with as it stands; as a question to this model it is a chat, a "
            f'line {{"{_CHAT}": {_A_CHAT}}} of --input'
        )
    note(f"the text is empty{': ' if why else ''}{why}")


# -------------------------------------------------------------------- the rows of a task


def _judge(bank: Bank, judged: _Judged, settings: GenerationSettings, batch_size: int, as_json: bool) -> None:
    name = _sole(bank, "judging texts")
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


def _rows_to_judge_by(adapter: Adapter | None, judged: _Judged) -> tuple[Task | None, Any]:
    """The rows, and the task that puts and judges them where it is not the adapter's own."""
    split = judged.split or _SPLIT
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


def _table_to_judge_by(adapter: Adapter | None, judged: _Judged, split: str) -> tuple[Task, Any]:
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


# -------------------------------------------------------------------- JSON lines


def _write_lines(bank: Bank, input_: str, output: Path | None, settings: GenerationSettings, batch_size: int) -> None:
    """Write for every line of the input, in order, as they are done; none before all are accepted, the output open."""
    with ExitStack() as stack:
        lines = standard_input() if input_ == "-" else stack.enter_context(open_rows(Path(input_)))
        source = "" if input_ == "-" else Path(input_).name
        read = _read(bank, lines, settings, source)
        _warn_of_classifiers(bank, (line.adapter for line in read))
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
        if key not in (*columns, _CHAT):
            near = suggest_setting(key, ("adapter", *columns, _CHAT, *known))
            raise DataError(
                f"unknown key {key!r}.{near} A line has an adapter, columns ({', '.join(columns)}) or the {_CHAT} of "
                f"a chat, and settings ({', '.join(known)})"
            )
    return own


def _row(bank: Bank, name: str | None, values: dict[str, Any]) -> Any:
    """The prompt in what a line says, checked: the messages of a chat, a text, or the columns of the adapter's task.

    Raises:
        DataError: a row that does not fit the adapter, or messages that are none.
    """
    chat = values.get(_CHAT)
    if chat is None or (name is not None and _CHAT in bank.adapter(name).task.columns):
        if name is None and not isinstance(values.get("text"), str):
            raise DataError(f'a row without an adapter has a "text", or the "{_CHAT}" of a chat: {_A_CHAT}')
        return row_of_values(bank, name, values)
    if len(values) > 1:
        others = ", ".join(repr(key) for key in values if key != _CHAT)
        raise DataError(f'"{_CHAT}" are a whole prompt, so that {others} would not be read; leave one of them out')
    if not isinstance(chat, list) or not chat or not all(isinstance(m, dict) for m in chat):
        raise DataError(f'"{_CHAT}" is a list such as {_A_CHAT}, not {chat!r}')
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
