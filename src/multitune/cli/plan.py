"""`multitune plan`: what each method would cost, and which to try."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from multitune import planner
from multitune.cli import shared
from multitune.cli.recipe import parse_settings
from multitune.cli.shared import AsJson, BackboneName, Device, Dtype, app, count, print_json, show, size
from multitune.errors import ConfigError, suggest
from multitune.methods import Method, make_method, method_names

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
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Look at this method only, or several in one adapter (lora+bitfit); may be repeated."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the one method, such as r=16, or of one of several, such as lora.r=16; may be repeated.",
        ),
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
    chosen = _methods(method or [], settings or [])
    loaded = shared.load_backbone(backbone, device, dtype)
    times = f", timing {count(rounds)} batches of each; --rounds 0 times none" if rounds > 0 else ""
    shared.note(f"looking at {count(len(chosen))} methods on {backbone}{times}")
    costs, misfits = planner.costs_of(loaded, chosen, workload, rounds=rounds)
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
    show(_table(costs), "", *(f"try {r.method}: {r.reason}" for r in advice))
    for line in _notes(backbone, workload, costs, misfits, bool(advice)):
        shared.note(line)


def _methods(names: list[str], settings: list[str]) -> list[Method]:
    """The methods to look at: all with their defaults, or those named, one of them perhaps with settings."""
    if settings and len(names) != 1:
        raise ConfigError(
            f"--set is for one method, and {'none is' if not names else f'{len(names)} are'} given; give one, such as "
            f"--method lora --set r=16, or several in one adapter: --method lora+bitfit --set lora.r=16"
        )
    given = parse_settings(settings)
    return [make_method(name, given) for name in names or method_names()]


def _table(costs: list[planner.Cost]) -> Table:
    """A row for each method."""
    scored, saving = planner.scores(), any(c.flops is not None for c in costs)
    columns = ["method", "parameters", "file", "training", "serving", "batch", "merges", "mixes"]
    columns += [*(["could save"] if saving else []), scored.task, "meets the limits"]
    rows = []
    for c in costs:
        row = [c.method, count(c.parameters), size(c.file_bytes), size(c.training_bytes), size(c.serving_bytes)]
        row += ["" if c.latency is None else f"{c.latency:.2f}x", _word(c.merges), _word(c.mixes)]
        row += ["not counted" if c.flops is None else f"{100 * c.flops.saved:.1f} %"] if saving else []
        row += ["not measured" if c.accuracy is None else f"{c.accuracy:.1f} %", "; ".join(c.problems) or "yes"]
        rows.append(row)
    right = ("parameters", "file", "training", "serving", "batch", "could save", scored.task)
    return shared.table(rows, columns, right=right)


def _notes(
    backbone: str, workload: planner.Workload, costs: list[planner.Cost], misfits: dict[str, str], advised: bool
) -> Iterator[str]:
    """What the columns are, and what is not among the rows."""
    rows, tasks = workload.rows, workload.tasks
    yield (
        f"training: estimated memory of one task's run with batches of {rows} x {workload.length} tokens; serving: the "
        f"backbone and {tasks} tasks; batch: measured time of {rows} rows of {min(tasks, rows)} tasks, by the bare "
        f"backbone's; {planner.scores().task}: measured with {planner.scores().backbone} and the same settings"
    )
    if any(c.flops is not None for c in costs):
        yield (
            "could save: share of a row's operations that kernels skipping zeros and shut heads would save, less what "
            "an update adds; the dense ones that run here save nothing"
        )
    for name, problem in misfits.items():
        yield f"{name} does not fit {backbone}: {problem}"
    if not advised:
        yield "no method meets the limits; the last column says what each one exceeds"


def _word(condition: bool) -> str:
    return "yes" if condition else "no"
