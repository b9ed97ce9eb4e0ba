"""The report as one HTML page: no script, no network, figures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from multitune.comparing.method_facts import facts_of
from multitune.comparing.overhead import FORMS, OverheadRow
from multitune.comparing.recommend import Recommendation
from multitune.comparing.report import content
from multitune.comparing.report.charts import costs, score_against
from multitune.comparing.report.curves import NUM_CURVES, learning_curves
from multitune.comparing.report.rerun import recipes_of
from multitune.comparing.report.tables import ALL_TASKS, Row
from multitune.comparing.statistics import ALPHA
from multitune.comparing.summary import Summary
from multitune.comparing.wording import MISSING, p_value, points
from multitune.version import __version__

#: More candidates than this have no matrix of pairs: nobody could read it, and letters say the same.
_MATRIX = 40


def as_page(
    summary: Summary,
    advice: Recommendation,
    table: Sequence[Row],
    title: str,
    recipe_text: str | None,
    command: str | None,
) -> str:
    """The HTML of a report. Everything that comes from records is escaped by the template."""
    folder = resources.files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.j2").read_text("utf-8"))
    drawn = [score_against(summary, cost, with_wide=cost.name == "parameters") for cost in costs(summary)]
    by_task = {(row["candidate"], row["task"]): row for row in table if row["task"] != ALL_TASKS}
    parts: dict[str, Any] = {
        "hero": next((c for c in drawn if c.name == "parameters"), None),
        "charts": [c for c in drawn if c.name != "parameters"],
        "overhead": _overhead(summary),
        "curves": learning_curves(summary),
        "failures": content.failures(summary),
    }
    return template.render(
        **parts,
        css=Markup(folder.joinpath("page.css").read_text("utf-8")),
        version=__version__,
        title=title,
        facts=content.in_short(summary),
        advice=advice,
        method_title=facts_of(advice.method).title if advice.method else "",
        sections=_sections(parts, summary),
        notes=content.how_to_read(summary),
        columns=content.columns(table),
        whole=[row for row in table if row["task"] == ALL_TASKS],
        cells=by_task,
        tasks=summary.tasks,
        metrics=summary.metrics,
        best=_best(by_task),
        points=lambda text: points(float(text)),
        rank=lambda text: f"{float(text):.1f}" if text else MISSING,
        has_rank=len(summary.complete) > 1 and len(summary.tasks) > 1,
        has_sd=any(row["sd"] for row in by_task.values()),
        some_failed=bool(parts["failures"]),
        no_intervals=summary.num_units == [1],
        units=content.runs_per_cell(summary),
        num_curves=min(NUM_CURVES, len(summary.complete or summary.candidates)),
        tests=content.about_tests(summary),
        matrix=_matrix(summary),
        how=content.how_it_ran(summary, command),
        data=content.rows_of_tasks(summary),
        recipe=recipe_text,
        again=[(c.name, recipes_of(c)) for c in summary.candidates],
    )


def _sections(parts: Mapping[str, Any], summary: Summary) -> list[tuple[str, str]]:
    found = [
        ("score", "Parameters", parts["hero"]),
        ("table", "All candidates", True),
        ("tasks", "Tasks", summary.tasks),
        ("costs", "Other costs", parts["charts"]),
        ("overhead", "Serving", parts["overhead"]),
        ("curves", "Learning curves", parts["curves"]),
        ("tests", "Differences", True),
        ("failed", "Failed runs", parts["failures"]),
        ("how", "How it was run", True),
        ("again", "Run a row again", True),
    ]
    return [(name, heading) for name, heading, there in found if there]


def _best(by_task: Mapping[tuple[str, str], Row]) -> dict[str, list[str]]:
    """By task the candidates whose score, as it is shown, is the highest shown."""
    shown: dict[str, dict[str, float]] = {}
    for (name, task), row in by_task.items():
        of = shown.setdefault(task, {})
        if row["score"]:
            of[name] = float(points(float(row["score"])))
    return {task: [n for n, v in of.items() if v == max(of.values())] for task, of in shown.items()}


def _matrix(summary: Summary) -> list[dict[str, Any]]:
    """Lines of the matrix of pairs."""
    names = [c.name for c in summary.complete]
    if not 2 <= len(names) <= _MATRIX:
        return []
    return [{"name": one, "cells": [_pair(summary, names, one, other) for other in names]} for one in names]


def _pair(summary: Summary, names: Sequence[str], one: str, other: str) -> dict[str, str]:
    if one == other:
        return {"kind": "self", "text": "", "tip": ""}
    difference, p = summary.differences[frozenset((one, other))]
    mean = difference.mean if names.index(one) < names.index(other) else -difference.mean
    tip = f"{one} minus {other}: {100 * mean:+.1f} points, "
    tip += "not testable" if p is None else f"p {'' if p < 0.001 else '= '}{p_value(p)}"
    if p is None or p >= ALPHA or mean == 0:
        return {"kind": "", "text": f"{abs(100 * mean):.1f}", "tip": tip}
    kind, sign = ("up", "+") if mean > 0 else ("down", "−")
    return {"kind": kind, "text": f"{sign}{abs(100 * mean):.1f}", "tip": tip}


def _with_settings(row: OverheadRow, rows: Sequence[OverheadRow]) -> str:
    """A method with the settings that tell its measurement from others of it."""
    others = [r.settings for r in rows if r.method == row.method]
    own = [f"{k}={v}" for k, v in sorted(row.settings.items()) if any(o.get(k) != v for o in others)]
    return ", ".join([row.method, *own])


def _overhead(summary: Summary) -> dict[str, Any] | None:
    """Every measured ratio of the report's methods on its backbones."""
    shown = {(c.method, c.backbone) for c in summary.candidates}
    rows = [row for row in summary.overhead if (row.method, row.backbone) in shown]
    if not rows:
        return None
    shapes = sorted({(row.rows, row.length) for row in rows})
    several, places = len({row.backbone for row in rows}) > 1, len({row.place for row in rows}) > 1
    lines: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in sorted(rows, key=lambda r: (r.method, r.backbone, r.place, list(FORMS).index(r.form))):
        name = _with_settings(row, rows) + (f" on {row.backbone}" if several else "")
        name += f" ({row.place or 'place not known'})" if places else ""
        lines.setdefault((name, row.form), {})[row.rows, row.length] = row.ratio
    forms = [form for form in FORMS if any(form == f for _, f in lines)]
    return {
        "shapes": shapes,
        "forms": "; ".join(f"{form}: {FORMS[form]}" for form in forms).capitalize() + ".",
        "rows": [
            (name, form, [f"{of[s]:.2f}" if s in of else MISSING for s in shapes]) for (name, form), of in lines.items()
        ],
    }
