"""`multitune generate`: texts for rows of any mix of adapters, or for the rows of a task, beside what is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from multitune.adapter import Adapter
from multitune.bank import Bank
from multitune.cli import shared
from multitune.cli.generate_lines import A_CHAT, CHAT, warn_of_classifiers, write_lines
from multitune.cli.generate_rows import SPLIT, Judged, judge, sole
from multitune.cli.predict import (
    adapter_folders,
    adapters_and_texts,
    refuse_output_over_input,
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
)
from multitune.errors import ConfigError, MultituneError
from multitune.generation import Generation, GenerationSettings

_DECODING, _JUDGING = "Decoding", "Writing for the rows of a task"


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
            help=f"Split to write for, where there are several. \\[default: {SPLIT}]",
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
    judged = Judged(task, data, split, rows, examples, out, metric, {k: v for k, v in put.items() if v is not None})
    judged.check(bool(named))
    _check(judged, text, input_, output)
    bank = _bank(named, backbone, device, dtype)
    if judged.asked:
        judge(bank, judged, settings, batch_size, as_json)
    elif text is not None:
        _write_one(bank, text, settings, batch_size, as_json)
    else:
        write_lines(bank, input_, output, settings, batch_size)


def _check(judged: Judged, text: str | None, input_: str, output: Path | None) -> None:
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


def _write_one(bank: Bank, text: str, settings: GenerationSettings, batch_size: int, as_json: bool) -> None:
    """Write for the text on the command line, which messages do not number."""
    name = sole(bank, "a text on the command line")
    warn_of_classifiers(bank, [name])
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
            f'line {{"{CHAT}": {A_CHAT}}} of --input'
        )
    note(f"the text is empty{': ' if why else ''}{why}")
