"""Every option of a training run, whose names are the keys of its recipe: one table, which a command takes whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_origin

import typer

from multitune.cli.fields import Field, fields_of
from multitune.cli.shared import written
from multitune.training import TrainConfig
from multitune.words import in_words

SETTINGS = fields_of(TrainConfig)

OWN_DATA = (
    "train", "validation", "text", "text_pair", "label", "kind", "labels", "choices", "metric", "format", "name",
)  # fmt: skip
LISTS = ("labels", "choices")
"""Of these, what holds several names."""
OWN_PATTERN = ("verbalizer", "instruction")
TASK_PANEL, _DATA = "Task", "Your own data, instead of --task"
_PATTERN = "Answers as text, by a language model"
_TRAINING = "Training"
_METAVARS = {int: "INTEGER", float: "NUMBER", bool: "BOOLEAN"}


def _option(panel: str, text: str, type: Any = str, *names: str, **more: Any) -> Any:
    # No option has a default here: what was not given must not override the recipe.
    return Annotated[type | None, typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)]


def _setting(field: Field) -> Any:
    # Booleans take a value too: there are no --no-… names, and an option reads as its line in a recipe does.
    choices = f" ({in_words(field.given)})" if get_origin(field.given) is Literal else ""
    default = "" if field.default is None else f" \\[default: {written(field.default)}]"
    return _option(_TRAINING, field.doc + choices + default, metavar=_METAVARS.get(field.given, "WORD"))


#: Every option of a training run, and so every key of a recipe.
OPTIONS: dict[str, Any] = {
    "task": _option(TASK_PANEL, "Task to train by name, as `multitune tasks` lists them.", metavar="NAME"),
    "mixture": _option(
        TASK_PANEL,
        "Instead of a task a mixture of tasks put as instructions: a YAML file with tasks, held_out, cap, rows, "
        "weights; in a recipe the mapping itself will do.",
        metavar="FILE",
    ),
    "examples": _option(
        TASK_PANEL,
        "Generation: so many of the most similar training rows stand in front of every row, as examples.",
        int,
        metavar="INTEGER",
    ),
    "method": _option(
        TASK_PANEL,
        "Tuning method, as `multitune methods` lists them, or several in one adapter, such as lora+bitfit.",
        metavar="NAME",
    ),
    "set": _option(
        TASK_PANEL,
        "A setting of the method, such as r=16, or of one of several, such as lora.r=16; may be repeated.",
        list[str],
        metavar="NAME=VALUE",
    ),
    "out": _option(TASK_PANEL, "Folder to write the adapter to.", metavar="FOLDER"),
    "overwrite": _option(TASK_PANEL, "Replace an adapter that is there already.", bool, "--overwrite"),
    "backbone": _option(
        TASK_PANEL,
        "Backbone: minilm (ships with multitune), smollm2 (a package), a folder, or a hub id; with +lsg behind it for "
        "long inputs, +decoder for an encoder-decoder that writes, +int8 or +nf4 to hold it in 8 or 4 bits. "
        "\\[default: minilm]",
        metavar="NAME",
    ),
    "device": _option(
        TASK_PANEL, "Where the backbone runs, as torch names devices. \\[default: cpu]", metavar="DEVICE"
    ),
    "dtype": _option(
        TASK_PANEL, "Number type of the backbone: float32, bfloat16 or float16. \\[default: float32]", metavar="WORD"
    ),
    "pattern": _option(
        _PATTERN,
        "Put rows to the language model in this text over columns and rank the answers as texts, instead of training a "
        'head; such as "{premise} Question: {hypothesis} True or False? Answer: {mask}". {mask} is where the answer '
        "stands, at the end if it is left out. For classification and multiple choice.",
        metavar="TEXT",
    ),
    "verbalizer": _option(
        _PATTERN,
        "How a label is said, such as entailment=True; may be repeated, for one label too. By default by its name.",
        list[str],
        metavar="LABEL=TEXT",
    ),
    "instruction": _option(_PATTERN, "What stands in front of every row.", metavar="TEXT"),
    "train": _option(_DATA, "Rows to learn from: a file, a folder, or a hub data set.", metavar="FILE"),
    "validation": _option(
        _DATA,
        "Rows to judge by, or the share of the rows to hold out, such as 0.3; by default the folder's own, or a tenth "
        "held out by seed.",
        metavar="FILE|SHARE",
    ),
    "text": _option(_DATA, 'Column of the text, or a template such as "{title} {body}".', metavar="COLUMN"),
    "text_pair": _option(_DATA, "Column or template of a second text.", metavar="COLUMN"),
    "label": _option(_DATA, "Column of the answer.", metavar="COLUMN"),
    "kind": _option(
        _DATA,
        "Kind of task: classification, regression, multilabel, tagging, multiple_choice (with --choices), or "
        "generation (a text is to be written).",
        metavar="WORD",
    ),
    "labels": _option(
        _DATA,
        "Names of the labels in the order of their ids, with commas between them or one a time; of two the second is "
        "the positive one. \\[default: those of the column, sorted]",
        list[str],
        metavar="NAME,…",
    ),
    "choices": _option(
        _DATA,
        "Multiple choice: the columns that hold the choices, with commas between them or one a time, or one column "
        "that holds a list. --label has the place of the right one, from 0, the name of its column, or its text in the "
        "list.",
        list[str],
        metavar="COLUMN,…",
    ),
    "metric": _option(_DATA, "Metric to judge by; by default the usual one of the kind.", metavar="NAME"),
    "format": _option(
        _DATA,
        "Generation: how prompt and answer are written out: plain, chat (by the tokenizer's chat template), or auto, "
        "which is a chat where there is a template. \\[default: plain]",
        metavar="WORD",
    ),
    "name": _option(_DATA, "Name of the task; by default that of the file.", metavar="NAME"),
} | {field.name: _setting(field) for field in SETTINGS}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `OPTIONS` in place of its `**options`."""
    signature = inspect.signature(command, eval_str=True)
    given = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    command.__signature__ = signature.replace(parameters=[*given, *made])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*given, *made]} | {"return": None}
    return command
