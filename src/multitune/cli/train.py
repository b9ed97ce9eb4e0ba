"""`multitune train` and `multitune evaluate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from multitune.adapter import Adapter
from multitune.cli import app as shared
from multitune.cli.app import AsJson, Device, Dtype, OptionalBackboneName, app, count, print_json, score, show, size
from multitune.cli.fields import Field, fields_of
from multitune.errors import ConfigError, DataError, suggest
from multitune.methods import get_method
from multitune.tasks import TaskData, infer_task, list_splits, load_task, read_table, split_table
from multitune.training import TrainConfig, evaluate, train

SETTINGS = fields_of(TrainConfig)
HELD_OUT = 0.1

_OWN = ("train", "validation", "text", "text_pair", "label", "kind", "metric", "name")
_TASK, _DATA, _TRAINING = "Task", "Your own data, instead of --task", "Training"


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of `TrainConfig` in place of its `**options`."""
    signature = inspect.signature(command, eval_str=True)
    given = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    made = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(f)) for f in SETTINGS
    ]
    command.__signature__ = signature.replace(parameters=[*given, *made])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*given, *made]} | {"return": None}
    return command


def _option(field: Field) -> Any:
    flag = field.name.replace("_", "-")
    names = [f"--{flag}/--no-{flag}"] if field.hint is bool else [f"--{flag}"]
    return Annotated[
        bool | None if field.hint is bool else str | None,
        typer.Option(
            *names,
            help=field.doc if field.hint is bool else f"{field.doc} ({field.type})",
            metavar=None if field.hint is bool else "VALUE",
            # an option that was not given must not override the recipe, so its default is shown and not set
            show_default=False if field.default is None else str(field.default).lower(),
            rich_help_panel=_TRAINING,
        ),
    ]


def _data_option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_DATA, show_default=False)


def _task_option(text: str, name: str | None = None, **more: Any) -> Any:
    return typer.Option(*[name] if name else [], help=text, rich_help_panel=_TASK, show_default=False, **more)


@app.command("train")
@_with_settings
def train_command(
    task: Annotated[str | None, _task_option("Task to train by name, as `multitune tasks` lists them.")] = None,
    method: Annotated[str | None, _task_option("Tuning method, as `multitune methods` lists them.")] = None,
    set_: Annotated[
        list[str] | None,
        _task_option("A setting of the method, such as r=16; may be repeated.", "--set", metavar="NAME=VALUE"),
    ] = None,
    out: Annotated[Path | None, _task_option("Folder to write the adapter to.")] = None,
    overwrite: Annotated[
        bool | None, _task_option("Replace an adapter that is there already.", "--overwrite/--no-overwrite")
    ] = None,
    recipe: Annotated[
        Path | None,
        _task_option("YAML file with any of these options by name; options given here override it."),
    ] = None,
    backbone: Annotated[
        str | None, _task_option("Backbone: minilm (the default; ships with multitune), a folder, or a hub id.")
    ] = None,
    device: Annotated[str | None, _task_option("Where the backbone runs: cpu (the default), cuda, cuda:1.")] = None,
    dtype: Annotated[
        str | None, _task_option("Number type of the backbone: float32 (the default), bfloat16 or float16.")
    ] = None,
    train: Annotated[str | None, _data_option("Rows to learn from: a file, a folder, or a hub data set.")] = None,
    validation: Annotated[
        str | None, _data_option("Rows to judge by; by default the folder's own, or a tenth held out by seed.")
    ] = None,
    text: Annotated[str | None, _data_option('Column of the text, or a template such as "{title} {body}".')] = None,
    text_pair: Annotated[str | None, _data_option("Column or template of a second text.")] = None,
    label: Annotated[str | None, _data_option("Column of the answer.")] = None,
    kind: Annotated[
        str | None, _data_option("Kind of task: classification, regression, multilabel or tagging.")
    ] = None,
    metric: Annotated[str | None, _data_option("Metric to judge by; by default the usual one of the kind.")] = None,
    name: Annotated[str | None, _data_option("Name of the task.")] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Train an adapter for one task with one method, and write it to a folder."""
    flags = {k: v for k, v in locals().items() if k not in ("recipe", "as_json", "settings", "set_")} | settings
    flags |= {"set": parse_settings(set_ or ()) or None}
    chosen = override(read_recipe(recipe) if recipe else {}, {k: v for k, v in flags.items() if v is not None})
    run_train(chosen, as_json)


def run_train(chosen: Mapping[str, Any], as_json: bool) -> None:
    """Train from the options by name, and print what came of it."""
    for key, example in (("method", "lora"), ("out", "adapters/mine")):
        if key not in chosen:
            raise ConfigError(f"train needs --{key}, or '{key}' in the recipe; for example --{key} {example}")
    if not isinstance(chosen.get("set", {}), Mapping):
        raise ConfigError("'set' in the recipe is a mapping of settings to values, such as {r: 16}")
    config = TrainConfig.from_dict({f.name: chosen[f.name] for f in SETTINGS if f.name in chosen})
    method = get_method(str(chosen["method"])).from_settings(chosen.get("set", {}))
    data = task_data(chosen, config.seed)
    backbone = shared.load_backbone(
        str(chosen.get("backbone", "minilm")), str(chosen.get("device", "cpu")), str(chosen.get("dtype", "float32"))
    )
    out = Path(str(chosen["out"]))
    result = train(
        backbone, data, method, out, config=config, name=out.name, overwrite=bool(chosen.get("overwrite", False))
    )
    facts = {
        "method": method.name,
        "trained_parameters": result.num_method_parameters,
        "with_head": result.num_method_parameters + result.num_head_parameters,
        "metric": data.task.metric,
        "score": result.best_metric,
        "seconds": round(result.seconds, 1),
        "bytes": shared.adapter_size(out),
        "adapter": str(out),
    }
    if as_json:
        print_json(facts)
        return
    columns = ("method", "parameters", "with head", data.task.metric, "seconds", "size", "adapter")
    row = (
        method.name,
        count(facts["trained_parameters"]),
        count(facts["with_head"]),
        score(result.best_metric),
        f"{result.seconds:.1f}",
        size(facts["bytes"]),
        out,
    )
    show(shared.table([row], columns, right=columns[1:6]))


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """`["r=16"]` as a mapping."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes NAME=VALUE, such as --set r=16, not '{pair}'")
        found[key.strip()] = value.strip()
    return found


def read_recipe(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by name.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key that is no option.
    """
    try:
        read = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"recipe {path} is a mapping of options to values, such as 'method: lora'")
    known = [*_OWN, "task", "method", "set", "out", "overwrite", "backbone", "device", "dtype"]
    known += [f.name for f in SETTINGS]
    named = {str(key).replace("-", "_"): value for key, value in read.items()}
    for key in named:
        if key not in known:
            raise ConfigError(f"recipe {path} has the unknown key '{key}'.{suggest(key, known)} Keys: {', '.join(known)}")
    return {key: value for key, value in named.items() if value is not None}


def override(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what the command line says instead; another task or table there replaces the recipe's."""
    kept = dict(recipe)
    if "task" in flags:
        kept = {k: v for k, v in kept.items() if k not in _OWN}
    if "train" in flags:
        kept.pop("task", None)
    if isinstance(kept.get("set"), Mapping) and "set" in flags:
        flags = {**flags, "set": {**kept["set"], **flags["set"]}}
    return {**kept, **flags}


def task_data(chosen: Mapping[str, Any], seed: int) -> TaskData:
    """The task and its tables, by name or from the user's own files.

    Raises:
        ConfigError: neither or both are given.
    """
    own = {key: str(chosen[key]) for key in _OWN if key in chosen}
    if "task" in chosen:
        if own:
            flag = next(iter(own)).replace("_", "-")
            raise ConfigError(f"--task brings its own data, so --{flag} cannot be honoured; give --task or --train FILE")
        return load_task(str(chosen["task"]))
    if "train" not in own:
        raise ConfigError("train needs data: --task NAME (`multitune tasks` lists them) or --train FILE")
    splits = list_splits(own["train"])
    table = read_table(own["train"], split="train" if "train" in splits else None)
    columns = {key: own[key] for key in ("text", "text_pair", "label", "kind") if key in own}
    task = infer_task(table, **columns, name=own.get("name") or Path(own["train"]).stem)  # type: ignore[arg-type]
    if "metric" in own:
        task = replace(task, metric=own["metric"])
    if "validation" in own:
        return TaskData(task=task, train=table, validation=_any_split(own["validation"], "validation"))
    if "validation" in splits:
        return TaskData(task=task, train=table, validation=read_table(own["train"], split="validation"))
    train_rows, held_out = split_table(table, HELD_OUT, seed, label=task.label)
    return TaskData(task=task, train=train_rows, validation=held_out)


def _any_split(source: str, split: str) -> Any:
    """The named split of a source, or its only one."""
    splits = list_splits(source)
    return read_table(source, split=split if len(splits) > 1 else None)


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
    split: Annotated[str, typer.Option(help="Split to judge by, where there are several.")] = "validation",
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 32,
    backbone: OptionalBackboneName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Judge adapters on rows with labels."""
    if task is not None and data is not None:
        raise ConfigError("--task and --data both say what to judge by; give one of them")
    loaded = [Adapter.load(folder) for folder in adapters]
    tables: list[Any] = [
        _any_split(data, split) if data is not None else load_task(task or adapter.task.name) for adapter in loaded
    ]
    on = shared.backbone_of(loaded[0], backbone, device, dtype)
    found = []
    for folder, adapter, table in zip(adapters, loaded, tables, strict=True):
        scores = evaluate(on, folder, table, split=split, batch_size=batch_size)
        found.append({"adapter": str(folder), "method": adapter.method.name, "task": adapter.task.name, **scores})
    if as_json:
        print_json(found)
        return
    rows = [
        (f["adapter"], f["method"], f["task"], name, score(value))
        for f in found
        for name, value in f.items()
        if name not in ("adapter", "method", "task")
    ]
    show(shared.table(rows, ("adapter", "method", "task", "metric", "value"), right=("value",)))
