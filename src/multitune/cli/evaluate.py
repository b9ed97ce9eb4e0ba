"""`multitune evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from multitune.adapter import Adapter
from multitune.cli import shared
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
)
from multitune.errors import ConfigError, DataError, TaskError
from multitune.tasks import TaskData, any_split, load_task
from multitune.training import evaluate
from multitune.training.judging import rows_to_judge

_HELD_OUT_ROWS = 50


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
    _show(found, as_json)


def _show(found: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print the scores of every adapter, in a table a line for each."""
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
