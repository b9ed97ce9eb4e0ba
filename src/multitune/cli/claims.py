"""`multitune claims`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from multitune.cli import shared
from multitune.cli.report import read_stores
from multitune.cli.shared import AsJson, Overhead, app, note, print_json, show
from multitune.comparing.claims import as_markdown, judge
from multitune.comparing.evidence import read_results
from multitune.comparing.overhead import read_overhead
from multitune.comparing.papers import CLAIMS
from multitune.errors import ConfigError, DataError, suggest_file
from multitune.files import replace_file

#: Verdicts that runs were needed for.
_DECIDED = ("holds here", "does not hold here", "cannot be told here")

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"


@app.command("claims")
def claims_command(
    stores: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER...", help="Folders of comparisons, or stores, to judge by together.", show_default=False
        ),
    ] = None,
    overhead: Overhead = None,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Rows of benchmarks, as benchmarks/results holds them.", show_default=False
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Document whose text between its claims markers is replaced, such as docs/claims.md.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge the papers' claims by comparisons and benchmarks: the paper's figure, ours with its interval, a verdict."""
    document = None if write is None else _document(write)
    if not stores and not overhead and results is None:
        raise ConfigError("claims are judged by runs: give folders of comparisons, --overhead FILE or --results FOLDER")
    records = read_stores(stores) if stores else []
    times = [row for file in overhead or [] for row in read_overhead(file)]
    rows = {} if results is None else read_results(results)
    findings = {claim.number: judge(records, claim, overhead=times, results=rows) for claim in CLAIMS}
    if write is not None and document is not None:
        before, rest = document.split(BEGIN)
        text = f"{before}{BEGIN}\n\n{as_markdown(records, overhead=times, results=rows)}\n\n{END}{rest.split(END)[1]}"
        replace_file(write, lambda file: file.write_text(text, "utf-8"))
        note(f"wrote {write}")
    if as_json:
        print_json([asdict(c) | {"findings": [asdict(f) for f in findings[c.number]]} for c in CLAIMS])
        return
    if not any(f.verdict in _DECIDED for of in findings.values() for f in of):
        tasks = ", ".join(sorted({r.trial.task for r in records}))
        note(
            "nothing given here is what a claim is about"
            + (f" (tasks: {tasks})" if tasks else "")
            + "; `multitune compare glue` is the first of the comparisons that are, and docs/claims.md has all of them"
        )
    lines = [(number, f.runs, f.part.words, f.ours, f.verdict) for number, of in findings.items() for f in of]
    show(shared.table(lines, ("claim", "runs", "read as", "ours", "verdict")))


def _document(file: Path) -> str:
    """A document with the markers; found wanting before the work, not after."""
    if not file.is_file():
        raise DataError(f"there is no {file}.{suggest_file(file)} Give a document with the lines {BEGIN} and {END}")
    text = file.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"{file} needs the lines {BEGIN} and {END}, once each, where the claims go")
    return text
