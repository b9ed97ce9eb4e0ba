"""`multitune inspect`, `fuse` and `merge`: one adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from multitune.adapter import CONFIG_FILE, TENSOR_FILE, Adapter
from multitune.cli import shared
from multitune.cli.shared import (
    AdapterFolder,
    AsJson,
    Device,
    OptionalBackboneName,
    app,
    count,
    note,
    pairs,
    print_json,
    score,
    show,
    size,
    written,
)
from multitune.errors import ConfigError, suggest
from multitune.heads import Head
from multitune.merging import merge
from multitune.tables import DTYPES as TABLE_DTYPES
from multitune.tables import TABLE_FILE


@app.command()
def inspect(folder: AdapterFolder, as_json: AsJson = False) -> None:
    """Print what an adapter is: task, method, parameters, score, backbone, recipe, files. Loads no backbone."""
    adapter = Adapter.load(folder)
    files = {name: (folder / name).stat().st_size for name in _files(folder)}
    if as_json:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        print_json(config | {"files": files})
        return
    task, own, head = adapter.task, adapter.num_method_parameters, adapter.num_head_parameters
    settings = ", ".join(f"{k}={written(v)}" for k, v in adapter.method.settings().items())
    base, metric = adapter.backbone, task.metric
    trained = adapter.recipe.get("trained_parameters", own)
    kept = f"{count(own)} trained" if trained == own else f"{count(own)} made by the {count(trained)} that were trained"
    recipe = {k: v for k, v in adapter.recipe.items() if k != "layer_choice"}
    scores = {name: adapter.metrics[name] for name in sorted(adapter.metrics, key=lambda name: name != metric)}
    show(
        pairs(
            [
                ("adapter", adapter.name),
                ("task", f"{task.name}: {task.kind} of {' | '.join(task.template.parts)}"),
                *([] if task.pattern is None else [("pattern", repr(task.pattern.prompt))]),
                *([("labels", ", ".join(task.labels))] if task.labels else []),
                ("method", f"{adapter.method.title} ({adapter.method.name})"),
                ("settings", settings or "none"),
                ("parameters", f"{kept}, {count(own + head)} with the head"),
                ("head", f"{adapter.head.num_outputs} outputs, pooling {adapter.head.pooling}"),
                *([("targets", _targets(adapter.head))] if adapter.head.rescales else []),
                ("score", ", ".join(f"{k} {score(v)}" for k, v in scores.items()) or "not judged"),
                ("backbone", f"{base['name']} ({base['architecture']}), fingerprint {base['fingerprint']}"),
                ("recipe", ", ".join(f"{k}={written(v)}" for k, v in recipe.items()) or "unknown"),
                *([("layers", _chosen(adapter.recipe["layer_choice"]))] if "layer_choice" in adapter.recipe else []),
                ("tokens", f"at most {adapter.max_length} a text"),
                ("seed", adapter.seed),
                ("written by", f"multitune {adapter.version}"),
                ("files", ", ".join(f"{name} {size(number)}" for name, number in files.items())),
                ("fused table", _fused(adapter.table) if adapter.table else _unfused(adapter)),
            ]
        )
    )


def _chosen(choice: Mapping[str, Any]) -> str:
    turn = choice["trained"][0] - 1
    return f"{written(choice['trained'])}, by the task's rows: layer {turn} turns most ({choice['gains'][turn]:.3f})"


def _files(folder: Path) -> list[str]:
    return [name for name in (CONFIG_FILE, TENSOR_FILE, TABLE_FILE) if (folder / name).is_file()]


def _fused(table: Mapping[str, Any]) -> str:
    if "max_error" not in table:  # fused by an earlier version
        return str(table["dtype"])
    return (
        f"{table['dtype']}, off by {table['max_error']:.2g} at most, {table['relative_error']:.2g} of the rows in all"
    )


def _targets(head: Head) -> str:
    return f"{head.target_mean:.4g} on average, standard deviation {head.target_std:.4g}, in training"


def _unfused(adapter: Adapter) -> str:
    if adapter.method.fuses_to_table:
        return f"none; `multitune fuse {adapter.path}` writes one"
    return "none: this method has no table"


@app.command()
def fuse(
    folder: AdapterFolder,
    table_dtype: Annotated[
        str, typer.Option("--dtype", help="Number type of the table: float32, bfloat16, float16 or int8.")
    ] = "float32",
    backbone: OptionalBackboneName = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compute an AoT adapter's table of token rows once, and write it into its folder."""
    if table_dtype not in TABLE_DTYPES:
        raise ConfigError(
            f"dtype '{table_dtype}' is unknown.{suggest(table_dtype, TABLE_DTYPES)} Dtypes: {', '.join(TABLE_DTYPES)}"
        )
    adapter = Adapter.load(folder)
    on = shared.backbone_of(adapter, backbone, device)
    made = Adapter.load(folder, on).fuse(on, dtype=TABLE_DTYPES[table_dtype]).table
    assert made is not None
    errors = {name: made[name] for name in ("max_error", "relative_error")}
    shape, num_bytes = (on.vocab_size, on.num_layers, on.hidden_size), (folder / TABLE_FILE).stat().st_size
    if as_json:
        print_json(
            {"table": str(folder / TABLE_FILE), "shape": shape, "dtype": table_dtype, "bytes": num_bytes} | errors
        )
        return
    form = " x ".join(map(count, shape))
    columns = ("table", "tokens x layers x width", "dtype", "size", "largest error", "relative error")
    cells = (folder / TABLE_FILE, form, table_dtype, size(num_bytes), *(f"{e:.2g}" for e in errors.values()))
    show(shared.table([cells], columns, right=columns[3:]))


@app.command("merge")
def merge_command(
    folder: AdapterFolder,
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in that folder.")] = False,
    backbone: OptionalBackboneName = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into a copy of the backbone and write an ordinary transformers checkpoint."""
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and would be replaced; choose another --out, or give --overwrite")
    adapter = Adapter.load(folder)
    on = shared.backbone_of(adapter, backbone, device)
    report = merge(Adapter.load(folder, on), on, out)
    if as_json:
        values: dict[str, Any] = {"num_deltas": report.num_deltas, "max_difference": report.max_difference}
        values |= {"max_magnitude": report.max_magnitude, "architecture": report.architecture}
        print_json({"checkpoint": str(report.path), **values, "head_beside": report.head_beside})
        return
    columns = ("checkpoint", "class", "deltas folded in", "largest difference", "of values up to")
    difference = "not compared" if report.max_difference is None else f"{report.max_difference:.1e}"
    magnitude = "" if report.max_magnitude is None else f"{report.max_magnitude:.1f}"
    cells = (report.path, report.architecture, report.num_deltas, difference, magnitude)
    show(shared.table([cells], columns, right=columns[2:]))
    if report.head_beside:
        note(
            f"transformers has no head like this adapter's, which reads {adapter.head.pooling}: it stands beside the "
            f"model, in head.safetensors, and head.json says what it reads and its labels"
        )
