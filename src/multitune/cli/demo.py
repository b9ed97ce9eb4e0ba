"""`multitune demo`."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from multitune.cli import shared
from multitune.cli.shared import AsJson, app, count, note, print_json, score, show, size
from multitune.demo import TOLERANCE, DemoResult, DemoRow, run_demo
from multitune.demo_writing import WritingResult, run_writing_demo

TEXT_WIDTH = 29


@app.command()
def demo(
    writing: Annotated[
        bool,
        typer.Option("--writing", help="Instead: three adapters that put facts into sentences, on smollm2."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch on a few rows, to see that everything runs.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the trained adapters.")] = Path("adapters-demo"),
    threads: Annotated[
        int, typer.Option(help="CPU threads. More are faster on an idle machine, and slower on a busy one.")
    ] = 2,
    as_json: AsJson = False,
) -> None:
    """Train eight adapters with eight methods, then answer one batch that mixes them all; offline, in minutes."""
    if writing:
        _write(out, quick, threads, as_json)
        return
    backbone = shared.load_backbone("minilm")
    result = run_demo(out, quick=quick, threads=threads, backbone=backbone, report=note)
    if as_json:
        values = asdict(result) | {"max_difference": result.max_difference, "agrees": result.agrees}
        print_json(values)
    else:
        _print(result, out)
    if not result.agrees:
        note(f"error: a row of the mixed batch differs from running its task alone by {result.max_difference:.1e}")
        raise typer.Exit(1)


def _write(out: Path, quick: bool, threads: int, as_json: bool) -> None:
    """`multitune demo --writing`."""
    backbone = shared.load_backbone("smollm2")
    result = run_writing_demo(out, quick=quick, threads=threads, backbone=backbone, report=note)
    if as_json:
        adapters = [
            {"method": a.method, "parameters": a.parameters, "perplexity": a.perplexity, **a.evaluation.scores}
            | {"seconds": round(a.seconds, 1), "path": str(a.path)}
            for a in result.adapters
        ]
        print_json({"adapters": adapters, "rows": [asdict(r) for r in result.rows], "agrees": result.agrees})
    else:
        _print_writing(result, out)
    if not result.agrees:
        note("error: a row of the mixed batch is not written as its adapter writes it alone")
        raise typer.Exit(1)


def _print_writing(result: WritingResult, out: Path) -> None:
    metrics = list(result.adapters[0].evaluation.scores)
    adapters = [
        (
            a.method,
            count(a.parameters),
            *(f"{a.evaluation.scores[m]:.1f}" for m in metrics),
            f"{a.perplexity:.2f}",
            f"{a.seconds:.0f}",
        )
        for a in result.adapters
    ]
    columns = ("method", "trained", *metrics, "perplexity", "seconds")
    lines = [
        line
        for row in result.rows
        for line in (f"{row.adapter or 'no adapter'}: {row.facts}", *textwrap.wrap(row.text, 96, initial_indent="  "))
    ]
    show(
        f"Three adapters on one frozen backbone, saved in {out} with all they wrote",
        shared.table(adapters, columns, right=columns[1:]),
        "",
        f"One batch of {len(result.rows)} rows, each text equal to the one its adapter writes alone: "
        f"{'yes' if result.agrees else 'no'}",
        "",
        *lines,
        "",
        f"All in {result.seconds:.0f} s.",
    )


def _print(result: DemoResult, out: Path) -> None:
    adapters = [
        (
            a.task.removeprefix("demo/"),
            a.method,
            count(a.parameters),
            count(a.with_head),
            size(a.num_bytes),
            a.metric,
            score(a.score),
            score(a.baseline),
            "earlier" if a.seconds is None else f"{a.seconds:.1f}",
        )
        for a in result.adapters
    ]
    columns = ("task", "method", "trained", "with head", "size", "metric", "score", "baseline", "seconds")
    methods = {a.name: (a.task.removeprefix("demo/"), a.method) for a in result.adapters}
    rows = [
        (
            _shortened(row.text),
            *(("none", "none") if row.adapter is None else methods[row.adapter]),
            *_answer(row),
            f"{row.difference:.0e}",
        )
        for row in result.rows
    ]
    weak = [f"{a.task.removeprefix('demo/')} with {a.method}" for a in result.adapters if a.score < a.baseline + 0.1]
    show(
        f"Eight adapters on one frozen backbone, saved in {out}",
        shared.table(adapters, columns, right=("trained", "with head", "size", "score", "baseline", "seconds")),
        *(textwrap.wrap(f"Less than 0.1 above the baseline: {', '.join(weak)}.", width=100) if weak else []),
        "",
        f"One batch of {len(rows)} rows",
        shared.table(rows, ("row", "task", "method", "answer", "expected", "vs alone"), right=("vs alone",)),
        "",
        f"Largest difference from running each task alone: {result.max_difference:.1e} (allowed {TOLERANCE:.0e}).",
        f"In memory: {size(result.bank_bytes)} of adapters beside {size(result.backbone_bytes)} of backbone. "
        f"All in {result.seconds:.0f} s.",
    )


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_WIDTH else f"{text[: TEXT_WIDTH - 1].rstrip()}…"


def _answer(row: DemoRow) -> tuple[str, str]:
    """The answer and what was expected, in words."""
    if row.adapter is None:
        return "embedding", ""
    expected = str(row.expected)
    if row.probability is not None:
        return f"{row.answer} {row.probability:.0%}", expected
    return (f"{row.answer:.2f}" if isinstance(row.answer, float) else "none"), expected
