"""`multitune claims`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from multitune.cli import shared
from multitune.cli.report import read_stores
from multitune.cli.shared import AsJson, app, note, print_json, show
from multitune.comparing.claims import as_markdown, judge
from multitune.comparing.papers import CLAIMS
from multitune.errors import DataError, suggest_file
from multitune.files import replace_file

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"


@app.command("claims")
def claims_command(
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="Folders of comparisons, or stores, to judge by together.", show_default=False
        ),
    ],
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
    """Judge the papers' claims by the runs of comparisons: the paper's figure, ours with its interval, a verdict."""
    document = None if write is None else _document(write)
    records = read_stores(stores)
    findings = {claim.number: judge(records, claim) for claim in CLAIMS}
    if write is not None and document is not None:
        before, rest = document.split(BEGIN)
        text = f"{before}{BEGIN}\n\n{as_markdown(records)}\n\n{END}{rest.split(END)[1]}"
        replace_file(write, lambda file: file.write_text(text, "utf-8"))
        note(f"wrote {write}")
    if as_json:
        print_json([asdict(c) | {"findings": [asdict(f) for f in findings[c.number]]} for c in CLAIMS])
        return
    rows = [
        (claim.number, f.suite, f.part.words, f.ours, f.verdict) for claim in CLAIMS for f in findings[claim.number]
    ] + [(claim.number, "", claim.statement, claim.missing, "not run yet") for claim in CLAIMS if not claim.parts]
    show(shared.table(sorted(rows, key=lambda r: r[0]), ("claim", "suite", "read as", "ours", "verdict")))


def _document(file: Path) -> str:
    """A document with the markers; found wanting before the work, not after."""
    if not file.is_file():
        raise DataError(f"there is no {file}.{suggest_file(file)} Give a document with the lines {BEGIN} and {END}")
    text = file.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"{file} needs the lines {BEGIN} and {END}, once each, where the claims go")
    return text
