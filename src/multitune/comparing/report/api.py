"""`write_report`: records in, three files out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from multitune.comparing.gathering import summarise
from multitune.comparing.overhead import OverheadRow
from multitune.comparing.recommend import Recommendation, recommend_from
from multitune.comparing.records import Record
from multitune.comparing.report import tables
from multitune.comparing.report.markdown import as_markdown
from multitune.comparing.report.page import as_page
from multitune.errors import DataError
from multitune.files import replace_file


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """What a report wrote, and what it recommends."""

    html: Path
    """One page; it needs no network and no script."""
    markdown: Path
    csv: Path
    recommendation: Recommendation


def write_report(
    records: Sequence[Record],
    folder: str | Path,
    *,
    overhead: Sequence[OverheadRow] = (),
    recipe_text: str | None = None,
    command: str | None = None,
    title: str | None = None,
) -> ReportFiles:
    """Write `report.html`, `report.md` and `report.csv`.

    Args:
        records: those of a store. The final ones are shown, and what a search lost; where there are none yet, those
            of the search.
        folder: made if it is not there; files of an earlier report in it are replaced.
        overhead: measured times of serving, see `read_overhead`.
        recipe_text: the recipe, to be shown as it was written.
        command: the command that runs it again, to be shown.
        title: heading of the page; by default "Comparison of N methods".

    Raises:
        DataError: there are no records.
    """
    if not records:
        raise DataError("there are no records to report; run `multitune compare RECIPE --out FOLDER` first")
    summary = summarise(records, overhead)
    advice = recommend_from(summary)
    table = tables.rows(summary)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    heading = title or _title(len({c.method for c in summary.candidates}))
    files = ReportFiles(
        html=place / "report.html", markdown=place / "report.md", csv=place / "report.csv", recommendation=advice
    )
    texts = {
        files.html: as_page(summary, advice, table, heading, recipe_text, command),
        files.markdown: as_markdown(summary, advice, table, heading, recipe_text, command),
        files.csv: tables.as_csv(table),
    }
    for file, text in texts.items():
        replace_file(file, partial(Path.write_text, data=text, encoding="utf-8"))
    return files


def _title(number: int) -> str:
    return f"Comparison of {number} method{'s' if number != 1 else ''}"
