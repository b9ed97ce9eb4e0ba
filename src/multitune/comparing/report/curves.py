"""Learning curves: the validation score over the steps, a figure for each task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from multitune.comparing.records import PERCENT
from multitune.comparing.report.charts import Chart
from multitune.comparing.report.svg import GRID, MARKERS, NARROW, PALETTE, new_figure, render, style
from multitune.comparing.summary import Candidate, Cell, Summary
from multitune.comparing.wording import points

#: Candidates that get a colour of their own among curves; more could not be told apart.
NUM_CURVES = 6


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A score of validation rows, as the curves show it."""

    name: str
    """In the log of a run behind `eval_`."""
    title: str
    factor: float
    """From the log to the axis."""
    say: Callable[[float], str]
    """A value of the log in words."""


#: Texts are dear to write: unless a recipe asks for it (`eval_texts`), only the finished adapter is judged by them.
PERPLEXITY = Judge(name="perplexity", title="validation perplexity, lower is better", factor=1.0, say="{:.3g}".format)


def _judge_of(metric: str) -> Judge:
    if metric == PERPLEXITY.name:
        return PERPLEXITY
    percent = metric in PERCENT
    return Judge(
        name=metric,
        title="validation score, points",
        factor=1.0 if percent else 100.0,
        say="{:.1f}".format if percent else points,
    )


def learning_curves(summary: Summary) -> list[Chart]:
    """A figure for each task: the validation score over the steps, mean and range over the runs.

    Where no run was judged by the task's own score while it trained, the perplexity.
    """
    coloured = [c.name for c in _leading(summary)]
    found = []
    for i, task in enumerate(summary.tasks):
        for judge in (_judge_of(summary.metrics[task]), PERPLEXITY):
            curves = {c.name: curve(c.cells[task], judge.name) for c in summary.candidates if task in c.cells}
            drawn = {name: points_ for name, points_ in curves.items() if len(points_) > 1}
            if drawn:
                found.append(_curves(f"curve-{i}", task, drawn, coloured, judge))
                break
    return found


def _leading(summary: Summary) -> Sequence[Candidate]:
    return (summary.complete or summary.candidates)[:NUM_CURVES]


def curve(cell: Cell, metric: str) -> list[tuple[float, float, float, float]]:
    """Learning curve of a cell: `(step, mean, lowest, highest)` at the steps at which every run was judged."""
    at: dict[float, list[float]] = defaultdict(list)
    for record in cell.finished:
        for row in record.outcome.history:
            if f"eval_{metric}" in row and "step" in row:
                at[row["step"]].append(row[f"eval_{metric}"])
    return [(step, float(np.mean(v)), min(v), max(v)) for step, v in sorted(at.items()) if len(v) == len(cell.finished)]


def _curves(
    name: str,
    task: str,
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    coloured: Sequence[str],
    judge: Judge,
) -> Chart:
    factor = judge.factor
    with style():
        figure = new_figure(NARROW, 300)
        left, below = 50 / NARROW, 96 / 300
        axes = figure.add_axes((left, below, 0.985 - left, 0.985 - below))
        for candidate in [n for n in curves if n not in coloured]:
            steps, means, _, _ = np.array(curves[candidate]).T
            axes.plot(steps, factor * means, color=GRID, linewidth=1.0, zorder=1)
        for i, candidate in enumerate(coloured):
            if candidate not in curves:
                continue
            steps, means, low, high = np.array(curves[candidate]).T
            colour, dashes = PALETTE[i], _DASHES[i % len(_DASHES)]
            axes.fill_between(steps, factor * low, factor * high, color=colour, alpha=0.13, linewidth=0, zorder=2)
            shown = candidate if len(candidate) <= 28 else f"{candidate[:27]}…"
            axes.plot(steps, factor * means, color=colour, linestyle=dashes, linewidth=1.7, marker=MARKERS[i],
                      markersize=4, label=shown, zorder=3)  # fmt: skip
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(judge.title)
        ends = {n: judge.say(rows[-1][1]) for n, rows in curves.items()}
        said = f"{judge.title.capitalize()}, on {task} over the optimiser steps. At the last step: "
        said += ", ".join(f"{n} {ends[n]}" for n in dict.fromkeys([*coloured, *curves]) if n in ends)[:600] + "."
        handles, labels = axes.get_legend_handles_labels()
        if any(n not in coloured for n in curves):
            handles, labels = [*handles, Line2D([], [], color=GRID)], [*labels, "the others"]
        columns = 2 if max(map(len, labels), default=0) > 20 else 3
        figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.54, 0.0), ncols=columns, fontsize=9,
                      handlelength=2.4, columnspacing=1.2, labelspacing=0.25, borderpad=0.1)  # fmt: skip
        return Chart(name=name, title=task, svg=render(figure, name, f"Learning curves on {task}", said, {}))


_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), "-", (0, (5, 1.5)))
