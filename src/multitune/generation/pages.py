"""What a model answered, as files: JSON lines, scores, and an HTML page to browse that needs no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitune.files import replace_file

PREDICTIONS_FILE = "predictions.jsonl"
PAGE_FILE = "predictions.html"
SCORES_FILE = "scores.json"


def save_answers(folder: str | Path, rows: Iterable[Mapping[str, Any]], facts: Any, page: str) -> Path:
    """Write predictions.jsonl, scores.json and predictions.html into a folder, which is made.

    Args:
        rows: as JSON values.
        facts: what scores.json says, as JSON values.
        page: HTML, of `table_page`.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (PREDICTIONS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
        (SCORES_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n"),
        (PAGE_FILE, page),
    ):
        replace_file(place / name, lambda temporary, text=text: temporary.write_text(text, "utf-8"))  # type: ignore[misc]
    return place


def table_page(title: str, facts: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One HTML page with a numbered table and a search box.

    Args:
        title, facts, columns: texts.
        rows: cells as HTML, of `cell` and `listed`.
    """
    lines = [
        "<tr>" + "".join(f"<td>{shown}</td>" for shown in (str(number), *row)) + "</tr>"
        for number, row in enumerate(rows, start=1)
    ]
    return _PAGE.format(
        title=html.escape(title),
        facts=html.escape(facts),
        columns="".join(f"<th>{html.escape(column)}</th>" for column in ("row", *columns)),
        rows="\n".join(lines),
    )


def cell(text: str, note: str = "") -> str:
    """A text, and behind it a note about it."""
    return html.escape(text) + (f" <i>({html.escape(note)})</i>" if note else "")


def listed(texts: Iterable[str]) -> str:
    """Several texts."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #ddd; }}
td {{ white-space: pre-wrap; }} ul {{ margin: 0; padding-left: 1rem; }} i {{ color: #a33; }}
input {{ font: inherit; padding: .3rem; width: 24rem; max-width: 100%; }}
</style></head><body>
<h1>{title}</h1><p>{facts}</p>
<p><input id="find" placeholder="show rows that contain" aria-label="show rows that contain"></p>
<table><thead><tr>{columns}</tr></thead><tbody>
{rows}
</tbody></table>
<script>
const rows = [...document.querySelectorAll("tbody tr")];
document.getElementById("find").addEventListener("input", event => {{
  const wanted = event.target.value.toLowerCase();
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
}});
</script></body></html>
"""
