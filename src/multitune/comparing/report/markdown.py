"""The report as Markdown: the same tables and sentences as the page, without its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from multitune.comparing.recommend import Recommendation
from multitune.comparing.report import content
from multitune.comparing.report.rerun import recipes_of
from multitune.comparing.report.tables import ALL_TASKS, Row
from multitune.comparing.summary import Summary
from multitune.comparing.wording import MISSING, points
from multitune.version import __version__

_AGAIN = (
    "Each recipe runs the trials of one row again, with every setting written out: save it as `again.yaml` and run "
    "`multitune compare again.yaml --out again`. A file of your own is named without its folder; put the path back."
)


def as_markdown(
    summary: Summary,
    advice: Recommendation,
    table: Sequence[Row],
    title: str,
    recipe_text: str | None,
    command: str | None,
) -> str:
    """The report as a document."""
    parts = [f"# {plain(title)}", plain(content.in_short(summary)), "## Recommendation"]
    parts += [f"**{plain(advice.candidate or 'None')}**", _items(advice.reasons)]
    parts += ["## All candidates", _items(content.how_to_read(summary)), _whole(table)]
    if summary.tasks:
        parts += ["## Task by task", _by_task(summary, table)]
    parts += ["## Which differences are more than chance", _items(content.about_tests(summary))]
    failed = content.failures(summary)
    if failed:
        parts += ["## Failed runs", _table(("method", "task", "seeds", "message"), failed)]
    ran = content.how_it_ran(summary, command)
    parts += ["## How it was run", _items([f"{name}: {said}" for name, said in ran])]
    parts += [_table(("task", "score", "rows"), content.rows_of_tasks(summary))]
    if recipe_text:
        parts += ["The recipe:", _fenced(recipe_text)]
    parts += ["## Run a row again", _AGAIN]
    for c in summary.candidates:
        name = escape(" ".join(c.name.split()))  # in a block of HTML nothing is read as Markdown
        parts += [f"<details><summary>{name}</summary>", *map(_fenced, recipes_of(c)), "</details>"]
    parts += [f"multitune {__version__}. Figures are in `report.html`."]
    return "\n\n".join(parts) + "\n"


def _fenced(recipe: str) -> str:
    """A recipe as a block of code, whatever it holds."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", recipe)), default=0))
    return f"{fence}yaml\n{recipe.strip()}\n{fence}"


def plain(text: str) -> str:
    """Text in which nothing is read as Markdown or HTML, and which stays in its cell."""
    escaped = re.sub(r"([\\`*\[\]|~])|(?<!\w)_|_(?!\w)", lambda m: "\\" + m[0], " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {plain(s)}" for s in sentences)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool] = ()) -> str:
    right = [*numeric, *[False] * (len(heads) - len(numeric))]
    lines = [f"| {' | '.join(map(plain, heads))} |", f"|{'|'.join('---:' if r else '---' for r in right)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(plain, row))} |" for row in rows)])


def _whole(table: Sequence[Row]) -> str:
    shown = content.columns(table)
    rows = [
        [row["candidate"] + (" ◆" if row["on_front"] == "yes" else ""), *(_said(c, row) for c in shown)]
        for row in table
        if row["task"] == ALL_TASKS
    ]
    legend = "; ".join(f"{c.heading}: {c.help}" for c in shown)
    heads = ["method", *(c.heading for c in shown)]
    return f"{_table(heads, rows, [False, *(c.numeric for c in shown)])}\n\n{plain(legend)}. ◆: on the Pareto front."


def _said(column: content.Column, row: Row) -> str:
    first = column.say(row[column.name])
    return first if column.also is None or not row[column.also] else f"{first} to {column.say(row[column.also])}"


def _by_task(summary: Summary, table: Sequence[Row]) -> str:
    cells = {(row["candidate"], row["task"]): row for row in table}
    best = {
        t: max((float(r["score"]) for (_, task), r in cells.items() if task == t and r["score"]), default=None)
        for t in summary.tasks
    }
    lines = [
        f"| method | {' | '.join(f'{plain(t)} ({plain(summary.metrics[t])})' for t in summary.tasks)} | average rank |",
        f"|---|{'---:|' * len(summary.tasks)}---:|",
    ]
    for c in summary.candidates:
        shown = [_cell(cells.get((c.name, t)), best[t]) for t in summary.tasks]
        rank = cells[c.name, ALL_TASKS]["rank"]
        lines.append(f"| {plain(c.name)} | {' | '.join(shown)} | {f'{float(rank):.1f}' if rank else MISSING} |")
    note = f"Mean in points ± standard deviation over {content.runs_per_cell(summary)}; the best of a task in bold."
    return "\n".join(lines) + f"\n\n{note}"


def _cell(row: Row | None, best: float | None) -> str:
    if row is None:
        return MISSING
    if not row["score"]:
        return "failed"
    text = points(float(row["score"]))
    text = f"**{text}**" if best is not None and text == points(best) else text
    spread = f" ± {points(float(row['sd']))}" if row["sd"] else ""
    return text + spread + (f" ({row['failed']} failed)" if row["failed"] != "0" else "")
