"""The numbers of a report as rows of text: what the CSV holds, and the HTML shows rounded."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from multitune.comparing.method_facts import facts_of
from multitune.comparing.records import Record
from multitune.comparing.statistics import Estimate, ranks
from multitune.comparing.summary import Candidate, Cell, Summary

ALL_TASKS = "all tasks"

COLUMNS = (
    "candidate", "method", "budget", "backbone", "task", "metric", "score", "low", "high", "sd", "runs", "failed",
    "rank", "letters", "tied", "on_front", "parameters", "head_parameters", "file_bytes", "seconds", "peak_memory",
    "overhead_alone", "overhead_mixed", "merges", "mixes", "settings", "training",
)  # fmt: skip

Row = dict[str, str]


def rows(summary: Summary) -> list[Row]:
    """A row for every candidate over all tasks, then one for every candidate and task."""
    front = summary.front(summary.parameters)
    found = [_over_all(summary, c, front) for c in summary.candidates]
    of_task = {t: ranks(_scores(summary, t)) for t in summary.tasks}
    for c in summary.candidates:
        found += [_on_task(summary, c, t, of_task[t].get(c.name)) for t in summary.tasks if t in c.cells]
    return found


def _scores(summary: Summary, task: str) -> dict[str, float]:
    """Means on a task, of the candidates that have one; what is ranked on it in the CSV."""
    cells = {c.name: c.cells[task].score for c in summary.candidates if task in c.cells}
    return {name: score.mean for name, score in cells.items() if score is not None}


def as_csv(table: list[Row]) -> str:
    """The rows as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def _over_all(summary: Summary, c: Candidate, front: list[str]) -> Row:
    complete, best = c.overall is not None, next(iter(summary.complete), None)
    values = {
        "task": ALL_TASKS,
        "metric": "mean",
        "failed": sum(len(cell.failed) for cell in c.cells.values()),
        "rank": summary.rank[c.name] if complete else None,
        "letters": summary.letters[c.name] if complete else None,
        "tied": c is best or not summary.differ(best.name, c.name) if complete and best else None,
        "on_front": c.name in front if complete else None,
        "parameters": c.mean("parameters"),
        "head_parameters": c.mean("head_parameters"),
        "file_bytes": c.mean("file_bytes"),
        "seconds": summary.seconds[c.name],
        "peak_memory": c.mean("peak_memory"),
        "overhead_alone": c.overhead_alone,
        "overhead_mixed": c.overhead_mixed,
    }
    return _row(c, values, c.overall)


def _on_task(summary: Summary, c: Candidate, task: str, rank: float | None) -> Row:
    cell = c.cells[task]
    comparable = summary.seconds[c.name] is not None
    values = {
        "task": task,
        "metric": summary.metrics[task],
        "failed": len(cell.failed),
        "rank": rank,
        **{n: cell.mean(n) for n in ("parameters", "head_parameters", "file_bytes", "peak_memory")},
        "seconds": cell.mean("seconds") if comparable else None,
        "settings": _shared(cell, "settings"),
        "training": _shared(cell, "training"),
    }
    return _row(c, values, cell.score)


def _row(c: Candidate, values: Mapping[str, Any], score: Estimate | None) -> Row:
    facts = facts_of(c.method)
    ends = score.interval if score else None
    known = {
        "candidate": c.name,
        "method": c.method,
        "budget": c.budget,
        "backbone": c.backbone,
        "score": score.mean if score else None,
        "low": ends[0] if ends else None,
        "high": ends[1] if ends else None,
        "sd": score.sd if score else None,
        "runs": score.n if score else 0,
        "merges": facts.merges,
        "mixes": facts.mixes,
    }
    return {name: _text({**known, **values}.get(name)) for name in COLUMNS}


def _text(value: Any) -> str:
    """A value as the CSV has it; what is not known is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _shared(cell: Cell, name: str) -> str:
    """Settings of a cell's runs as JSON, the seed left out; what differs between its runs too."""
    runs: list[Record] = [*cell.finished, *cell.failed]
    of = [dict(getattr(r.trial, name)) for r in runs]
    same = {k: v for k, v in of[0].items() if k != "seed" and all(o.get(k) == v for o in of)}
    return json.dumps(same, sort_keys=True, ensure_ascii=False, default=str)
