"""`multitune plan`: what each method would cost, and which to try."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated

import typer

from multitune import planner
from multitune.cli import shared
from multitune.cli.shared import AsJson, BackboneName, Device, Dtype, app, count, print_json, show, size
from multitune.errors import ConfigError, suggest
from multitune.methods import get_method, method_names

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def num_bytes(text: str) -> int:
    """`8GB`, `512MiB` or a plain number, as bytes.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else ""
    if found is None or unit not in _UNITS:
        hint = suggest(unit, [u for u in _UNITS if u]) if found else ""
        raise ConfigError(f"'{text}' is no amount of memory.{hint} Give for example 8GB, 512MB or 6GiB")
    return int(float(found.group(1)) * _UNITS[unit])


@app.command()
def plan(
    backbone: BackboneName = "minilm",
    rows: Annotated[int, typer.Option(help="Rows in one batch.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 64,
    tasks: Annotated[int, typer.Option(help="Tasks that one copy of the backbone is to serve.")] = 10,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory for training, and for serving, such as 8GB.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Most time of a mixed batch, by the bare backbone's: 1.1 is ten percent more.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Only methods that fold into a plain checkpoint.")] = False,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Look at this method only; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured batches per method; 0 measures no time.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Say what each method costs on a backbone, whether it meets the limits, and which to try first."""
    workload = planner.Workload(
        rows=rows,
        length=length,
        tasks=tasks,
        memory=None if memory is None else num_bytes(memory),
        latency=latency,
        must_merge=merge,
    )
    if latency is not None and rounds < 1:
        raise ConfigError("--latency needs measured batches, but --rounds 0 measures none; give --rounds 3")
    chosen = [get_method(name) for name in method or method_names()]
    loaded = shared.load_backbone(backbone, device, dtype)
    costs, misfits = [], {}
    for cls in chosen:
        try:
            costs.append(planner.cost_of(loaded, cls(), workload, rounds=rounds))
        except ConfigError as error:
            misfits[cls.name] = str(error)
    advice = planner.recommend(costs)
    if as_json:
        print_json(
            {
                "backbone": backbone,
                "workload": asdict(workload),
                "methods": [asdict(c) for c in costs],
                "does_not_fit": misfits,
                "recommendations": [asdict(r) for r in advice],
            }
        )
        return
    columns = ("method", "parameters", "file", "training", "serving", "batch", "merges", "mixes", "meets the limits")
    show(
        shared.table(
            [
                (
                    c.method,
                    count(c.parameters),
                    size(c.file_bytes),
                    size(c.training_bytes),
                    size(c.serving_bytes),
                    "" if c.latency is None else f"{c.latency:.2f}x",
                    "yes" if c.merges else "no",
                    "yes" if c.mixes else "no",
                    "; ".join(c.problems) or "yes",
                )
                for c in costs
            ],
            columns,
            right=("parameters", "file", "training", "serving", "batch"),
        ),
        "",
        *(f"try {r.method}: {r.reason}" for r in advice),
    )
    shared.note(
        f"training: estimated memory of one task's run with batches of {rows} x {length} tokens; serving: the backbone "
        f"and {tasks} tasks; batch: measured time of {rows} rows of {min(tasks, rows)} tasks, by the bare backbone's"
    )
    for name, problem in misfits.items():
        shared.note(f"{name} does not fit {backbone}: {problem}")
    if not advice:
        shared.note("no method with a measured score meets the limits; the last column says what each one exceeds")
