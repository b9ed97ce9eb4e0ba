"""`multitune train` and `multitune evaluate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from multitune.adapter import Adapter
from multitune.cli import shared
from multitune.cli.fields import Field, fields_of
from multitune.cli.mixtures import judge_held_out, read_mixture
from multitune.cli.shared import (
    AsJson,
    Device,
    DropLayers,
    Dtype,
    OptionalBackboneName,
    app,
    count,
    note,
    print_json,
    score,
    show,
    size,
    written,
)
from multitune.errors import ConfigError, DataError, TaskError, suggest
from multitune.methods import Method, make_method
from multitune.methods.combined import part_names
from multitune.tasks import Pattern, TaskData, any_split, load_table, load_task
from multitune.tasks.metrics import judge_of_training
from multitune.training import TrainConfig, TrainResult, evaluate, train
from multitune.training.checkpoints import Checkpoints
from multitune.training.judging import rows_to_judge
from multitune.words import in_words
from multitune.yaml_file import read_names, read_yaml

SETTINGS = fields_of(TrainConfig)

OWN_DATA = (
    "train", "validation", "text", "text_pair", "label", "kind", "labels", "choices", "metric", "format", "name",
)  # fmt: skip
_LISTS = ("labels", "choices")
"""Of these, what holds several names."""
OWN_PATTERN = ("verbalizer", "instruction")
_TASK, _DATA = "Task", "Your own data, instead of --task"
_PATTERN = "Answers as text, by a language model"
_TRAINING = "Training"
#: Under so many rows to judge by, training says how much one of them moves the score.
FEW_ROWS = 50
_HELD_OUT_ROWS = 50
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
    "task": _option(_TASK, "Task to train by name, as `multitune tasks` lists them.", metavar="NAME"),
    "mixture": _option(
        _TASK,
        "Instead of a task a mixture of tasks put as instructions: a YAML file with tasks, held_out, cap, rows, "
        "weights; in a recipe the mapping itself will do.",
        metavar="FILE",
    ),
    "examples": _option(
        _TASK,
        "Generation: so many of the most similar training rows stand in front of every row, as examples.",
        int,
        metavar="INTEGER",
    ),
    "method": _option(
        _TASK,
        "Tuning method, as `multitune methods` lists them, or several in one adapter, such as lora+bitfit.",
        metavar="NAME",
    ),
    "set": _option(
        _TASK,
        "A setting of the method, such as r=16, or of one of several, such as lora.r=16; may be repeated.",
        list[str],
        metavar="NAME=VALUE",
    ),
    "out": _option(_TASK, "Folder to write the adapter to.", metavar="FOLDER"),
    "overwrite": _option(_TASK, "Replace an adapter that is there already.", bool, "--overwrite"),
    "backbone": _option(
        _TASK,
        "Backbone: minilm (ships with multitune), a folder, or a hub id; with +lsg behind it for long inputs, "
        "+int8 or +nf4 to hold it in 8 or 4 bits. "
        "\\[default: minilm]",
        metavar="NAME",
    ),
    "device": _option(_TASK, "Where the backbone runs, as torch names devices. \\[default: cpu]", metavar="DEVICE"),
    "dtype": _option(
        _TASK, "Number type of the backbone: float32, bfloat16 or float16. \\[default: float32]", metavar="WORD"
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
        _DATA, "Rows to judge by; by default the folder's own, or a tenth held out by seed.", metavar="FILE"
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


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
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


@app.command("train")
@_with_options
def train_command(
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options by name; what is given here overrides it.",
            rich_help_panel=_TASK,
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train an adapter for one task with one method, and write it to a folder."""
    chosen = _chosen(recipe, options)
    config = TrainConfig.from_dict({f.name: chosen[f.name] for f in SETTINGS if f.name in chosen})
    name, inline = read_method(chosen["method"])
    method = make_method(name, {**inline, **flat_settings(chosen.get("set", {}))})
    data = task_data(chosen, config.seed)
    place = {key: str(chosen[key]) for key in ("device", "dtype") if key in chosen}
    backbone = shared.load_backbone(str(chosen.get("backbone", "minilm")), **place)
    out = Path(str(chosen["out"]))
    _announce(chosen, data, method, config)
    try:
        result = train(
            backbone,
            data,
            method,
            out,
            config=config,
            name=out.resolve().name,
            overwrite=chosen.get("overwrite", False),
            report=note,
        )
    except KeyboardInterrupt:
        steps = Checkpoints(out).steps
        last = f"the last checkpoint is step {steps[-1]} in {out}" if steps else "there was no checkpoint yet"
        note(f"interrupted; {last}; give the same command to go on")
        raise typer.Exit(130) from None
    _show_result(method, result, out, as_json)


def _chosen(recipe: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what the command line says instead, checked as far as that goes without loading anything."""
    flags = {key: value for key, value in options.items() if value is not None}
    if "set" in flags:
        flags["set"] = parse_settings(flags["set"])
    if "verbalizer" in flags:
        flags["verbalizer"] = _verbalizer(flags["verbalizer"])
    for key in _LISTS:
        if key in flags:
            flags[key] = [name for each in flags[key] for name in read_names(each, key)]
    chosen = override(read_recipe(recipe) if recipe else {}, flags)
    for key, example in (("method", "lora"), ("out", "adapters/mine")):
        if key not in chosen:
            raise ConfigError(f"train needs --{key}, or '{key}' in the recipe; for example --{key} {example}")
    if not isinstance(chosen.get("set", {}), Mapping):
        raise ConfigError("'set' in the recipe is a mapping of settings to values, such as {r: 16}")
    if not isinstance(chosen.get("overwrite", False), bool):
        raise ConfigError(f"'overwrite' in the recipe is true or false, not {chosen['overwrite']!r}")
    return chosen


def _announce(chosen: Mapping[str, Any], data: TaskData, method: Method, config: TrainConfig) -> None:
    """Say what is about to be trained, and what of a table was guessed."""
    task = data.task
    if "train" in chosen and not {"text", "label"} <= set(chosen):
        labels = f" ({len(task.labels)} labels: {', '.join(task.labels[:8])})" if task.labels else ""
        note(f"reading the text from {' | '.join(task.template.parts)} and the answer from {task.label}{labels}")
    note(
        f"training {method.name} for {task.name} ({task.kind}) on {count(len(data.train))} rows, judged by "
        f"{judge_of_training(task.metric, by_texts=bool(config.eval_texts))} on {count(len(data.validation))}"
    )
    judged = len(data.validation)
    if task.kind in ("classification", "multiple_choice") and 0 < judged < FEW_ROWS:
        more = "; give more with --validation FILE before relying on the score" if "train" in chosen else ""
        note(f"judged by only {judged} rows: one row more or less is {100 / judged:.1f} points of accuracy{more}")


def _show_result(method: Method, result: TrainResult, out: Path, as_json: bool) -> None:
    """What came of a training run, as one line of a table."""
    facts: dict[str, Any] = {
        "method": method.name,
        "parameters": result.num_method_parameters,
        "with_head": result.num_method_parameters + result.num_head_parameters,
        "metric": result.metric,
        "score": result.best_metric,
        "best_step": result.best_step,
        "steps": result.num_steps,
        "seconds": round(result.seconds, 1),
        "bytes": shared.adapter_size(out),
        "adapter": str(out),
    }
    if as_json:
        print_json(facts)
        return
    kept = f"step {count(result.best_step)} of {count(result.num_steps)}"
    cells = (count(facts["parameters"]), count(facts["with_head"]), score(facts["score"]), kept)
    columns = ("method", "parameters", "with head", result.metric, "kept", "seconds", "size", "adapter")
    more = (f"{facts['seconds']:.1f}", size(facts["bytes"]), out)
    show(shared.table([(method.name, *cells, *more)], columns, right=columns[1:7]))


def parse_settings(
    pairs: Sequence[str], option: str = "set", form: str = "NAME=VALUE", example: str = "r=16"
) -> dict[str, str]:
    """`["r=16"]` as a mapping; messages name the option that takes it."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--{option} takes {form}, such as --{option} {example}, not '{pair}'")
        found[key.strip()] = value.strip()
    return found


def read_method(given: Any) -> tuple[str, dict[str, Any]]:
    """A recipe's `method` as a name for `make_method` and the settings it brings.

    Args:
        given: a name, `lora+bitfit`, or a list of names, or of one-entry mappings of a name to its settings.
    """
    if not isinstance(given, list):
        return str(given), {}
    entries = [dict(e) if isinstance(e, Mapping) else {str(e): {}} for e in given]
    if not entries or any(len(e) != 1 or not isinstance(next(iter(e.values())), Mapping | None) for e in entries):
        raise ConfigError(
            f"'method' in the recipe is a name, or a list of names or of names with settings, such as "
            f"[lora: {{r: 4}}, bitfit], not {given!r}"
        )
    names = [str(name) for e in entries for name in e]
    own = [dict(settings or {}) for e in entries for settings in e.values()]
    if len(names) == 1:
        return names[0], own[0]
    by_part = zip(part_names(names), own, strict=True)
    return "+".join(names), {f"{part}.{key}": value for part, settings in by_part for key, value in settings.items()}


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose values may be mappings, `{lora: {r: 4}}`, as `{"lora.r": 4}`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def read_recipe(path: Path, known: Sequence[str] = tuple(OPTIONS)) -> dict[str, Any]:
    """The options in a YAML file, by name.

    Args:
        known: the keys it may have.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key that is no option.
    """
    read = read_yaml(path, "recipe")
    if not isinstance(read, dict):
        raise ConfigError(f"recipe {path} is a mapping of options to values, such as 'method: lora'")
    named = {str(key).replace("-", "_"): value for key, value in read.items()}
    for key in named:
        if key not in known:
            keys = ", ".join(known)
            raise ConfigError(f"recipe {path} has the unknown key '{key}'.{suggest(key, known)} Keys: {keys}")
    return {key: value for key, value in named.items() if value is not None}


def override(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what the command line says instead; another task or table there replaces the recipe's."""
    kept = dict(recipe)
    if "task" in flags or "mixture" in flags:
        kept = {k: v for k, v in kept.items() if k not in (*OWN_DATA, "task", "mixture")}
    if "train" in flags:
        kept = {k: v for k, v in kept.items() if k not in ("task", "mixture")}
    if isinstance(kept.get("set"), Mapping) and "set" in flags:
        flags = {**flags, "set": {**flat_settings(kept["set"]), **flags["set"]}}
    return {**kept, **flags}


def task_data(chosen: Mapping[str, Any], seed: int) -> TaskData:
    """The task and its tables, with examples in its prompts where they are asked for.

    Raises:
        ConfigError: no task or more than one is given, or a number of examples that is none.
    """
    data = _in_pattern(_data_alone(chosen, seed), chosen)
    if "examples" not in chosen:
        return data
    k = chosen["examples"]
    if not isinstance(k, int) or isinstance(k, bool):
        raise ConfigError(f"examples={k!r} is not possible; give a whole number, such as 2")
    from multitune.prompting import with_examples

    return with_examples(data, k, seed=seed)


def _data_alone(chosen: Mapping[str, Any], seed: int) -> TaskData:
    """The task and its tables, by name, as a mixture, or from the user's own files."""
    own: dict[str, Any] = {
        key: read_names(chosen[key], f"'{key}' in the recipe") if key in _LISTS else str(chosen[key])
        for key in OWN_DATA
        if key in chosen
    }
    named = [key for key in ("task", "mixture") if key in chosen]
    if named:
        others = [*named[1:], *own]
        if others:
            flag = others[0].replace("_", "-")
            raise ConfigError(
                f"--{named[0]} brings its own data, so --{flag} cannot be honoured; give --task, --mixture or --train "
                f"FILE"
            )
        return load_task(str(chosen["task"])) if named == ["task"] else read_mixture(chosen["mixture"]).data()
    if "train" not in own:
        raise ConfigError(
            "train needs data: --task NAME (`multitune tasks` lists them), --train FILE, or --mixture FILE"
        )
    return load_table(own.pop("train"), **own, seed=seed)


def _verbalizer(pairs: Sequence[str]) -> dict[str, Any]:
    """`["good=great"]` as a mapping; a label that is there several times has a list of texts."""
    found: dict[str, Any] = {}
    for pair in pairs:
        ((label, text),) = parse_settings([pair], "verbalizer", "LABEL=TEXT", "entailment=True").items()
        found.setdefault(label, []).append(text)
    return {label: texts if len(texts) > 1 else texts[0] for label, texts in found.items()}


def _in_pattern(data: TaskData, chosen: Mapping[str, Any]) -> TaskData:
    """The data in the pattern that was chosen, if one was.

    Raises:
        ConfigError: what only a pattern has, without one; or a verbalizer of another form.
        TaskError: a pattern that does not fit the task.
    """
    if "pattern" not in chosen:
        lone = [key for key in OWN_PATTERN if key in chosen]
        if lone:
            raise ConfigError(f"--{lone[0]} belongs to a pattern; give --pattern too, such as --pattern '{{text}}'")
        return data
    said = chosen.get("verbalizer", {})
    if not isinstance(said, Mapping):
        raise ConfigError(f"'verbalizer' in the recipe maps labels to texts, such as {{yes: 'True'}}, not {said!r}")
    for label, text in said.items():
        texts = text if isinstance(text, list) else [text]
        # YAML makes bools of yes, no, true and false.
        if isinstance(label, bool) or not all(isinstance(t, str) for t in texts):
            raise ConfigError(f"'verbalizer' in the recipe: {label!r}: {text!r} is no text; put quotes around it")
    words = {str(label): text for label, text in said.items()}
    instruction = str(chosen.get("instruction", ""))
    return data.with_pattern(Pattern(str(chosen["pattern"]), words, instruction=instruction))


def _task_of(adapter: Adapter, name: str | None) -> TaskData:
    """The task of that name, or the one that the adapter was trained for."""
    if name is not None:
        return load_task(name)
    try:
        return load_task(adapter.task.name)
    except TaskError as error:
        raise DataError(
            f"adapter '{adapter.name}' was trained on rows of your own; give them with --data FILE, one adapter (or "
            f"several of one table) a call: multitune evaluate {adapter.path or adapter.name} --data FILE ({error})"
        ) from error


@app.command("evaluate")
def evaluate_command(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of adapters.", show_default=False)
    ],
    task: Annotated[
        str | None, typer.Option(help="Task by name; by default the one that each adapter names.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows with labels: a file, a folder, or a hub data set.", show_default=False)
    ] = None,
    mixture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Mixture as `multitune train --mixture` takes it: judge its held-out tasks zero-shot, without and "
            "with each adapter.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With --mixture: folder to write what was chosen and written to, as JSON lines and an HTML page.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Judge by the first so many rows only, whole groups where the metric judges groups; with --mixture by "
            f"so many rows of each held-out task. \\[default: all; with --mixture {_HELD_OUT_ROWS}]",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to judge by, where there are several.")] = "validation",
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 32,
    drop_layers: DropLayers = None,
    backbone: OptionalBackboneName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Judge adapters on rows with labels."""
    if task is not None and data is not None:
        raise ConfigError("--task and --data both say what to judge by; give one of them")
    if rows is not None and rows < 1:
        raise ConfigError(f"--rows {rows} is not possible; give 1 or more")
    if out is not None and mixture is None:
        raise ConfigError("--out is for --mixture; `multitune predict` writes what adapters predict for rows of a file")
    dropped = shared.layer_numbers(drop_layers)
    if mixture is not None:
        if task is not None or data is not None or dropped or split != "validation":
            raise ConfigError("--mixture brings its own rows; leave --task, --data, --split and --drop-layers out")
        named = {str(folder): Adapter.load(folder) for folder in adapters}
        on = shared.backbone_of(next(iter(named.values())), backbone, device, dtype)
        judge_held_out(on, named, read_mixture(mixture), rows or _HELD_OUT_ROWS, batch_size, as_json, out)
        return
    loaded = [Adapter.load(folder) for folder in adapters]
    tables = [any_split(data, split) if data is not None else _task_of(adapter, task) for adapter in loaded]
    on = shared.backbone_of(loaded[0], backbone, device, dtype)
    found: list[dict[str, Any]] = []
    shares: list[tuple[int, int]] = []
    for folder, adapter, table in zip(adapters, loaded, tables, strict=True):
        whole, judged = (rows_to_judge(adapter.task, table, split, number) for number in (None, rows))
        scores = evaluate(on, folder, judged, batch_size=batch_size, drop_layers=dropped)
        facts = {"adapter": str(folder), "method": adapter.method.name, "task": adapter.task.name}
        found.append({**facts, "rows": len(judged), **scores})
        shares.append((len(judged), len(whole)))
    _explain(adapters, loaded, data, task, split, shares)
    if as_json:
        print_json(found)
        return
    lines = [
        (f["adapter"], f["method"], f["task"], count(f["rows"]), name, score(value))
        for f in found
        for name, value in f.items()
        if name not in ("adapter", "method", "task", "rows")
    ]
    columns = ("adapter", "method", "task", "rows", "metric", "value")
    show(shared.table(lines, columns, right=("rows", "value")))


def _explain(
    folders: Sequence[Path],
    adapters: Sequence[Adapter],
    data: str | None,
    task: str | None,
    split: str,
    shares: Sequence[tuple[int, int]],
) -> None:
    """Say what the scores are of, and what they are not.

    Args:
        shares: of each adapter how many rows it was judged by, and how many there are.
    """
    parts = dict.fromkeys(f"{count(judged)} of {count(there)}" for judged, there in shares if judged < there)
    own = data is not None and split == "validation"
    said = [f"judged by the first rows only: {', '.join(parts)}"] if parts else []
    if own:
        said += [] if parts else [f"all rows of {data} were judged"]
        which, where = ("an adapter", "ADAPTER") if len(folders) > 1 else (folders[0], folders[0])
        said.append(
            f"if {which} was trained on some of them, its score on the rows held out by its seed is in "
            f"`multitune inspect {where}`"
        )
    if said:
        note("; ".join(said))
    for folder, adapter in zip(folders, adapters, strict=True):
        if adapter.task.kind == "generation":
            where = f"--data {data}" if data is not None else f"--task {task or adapter.task.name}"
            note(
                f"perplexity says how likely {folder} finds the answers; to have it write texts, and judge these: "
                f"multitune generate --adapters {folder} {where}"
            )
