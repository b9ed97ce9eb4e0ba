"""The figures of a report: scores against costs, and learning curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from multitune.compare.method_facts import facts_of
from multitune.compare.report.svg import GRID, INK, MARKERS, MUTED, PALETTE, PAPER, new_figure, render, style
from multitune.compare.summary import Candidate, Cell, Summary
from multitune.compare.wording import count, interval, listed, of_bytes, points, ratio, seconds

#: Candidates that get a colour of their own among curves; more could not be told apart.
NUM_CURVES = 6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One axis that scores are drawn against."""

    name: str
    title: str
    axis: str
    say: Callable[[float], str]
    of: Mapping[str, float | None]
    """By candidate."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure and what it shows."""

    name: str
    title: str
    svg: str
    note: str = ""


def costs(summary: Summary) -> list[Cost]:
    """The costs that were measured for two candidates at least, or for the only one."""

    def mean(name: str) -> dict[str, float | None]:
        return {c.name: c.mean(name) for c in summary.candidates}

    alone = {c.name: c.overhead_alone for c in summary.candidates}
    mixed = {c.name: c.overhead_mixed for c in summary.candidates}
    found = [
        Cost(name="parameters", title="Trained parameters", axis="trained parameters, head excluded", say=count,
             of=summary.parameters),
        Cost(name="file_bytes", title="Size of the file", axis="file, head excluded", say=of_bytes,
             of=mean("file_bytes")),
        Cost(name="seconds", title="Time of training", axis="seconds of training a run", say=seconds,
             of=summary.seconds),
        Cost(name="peak_memory", title="Peak memory of training", axis="peak memory of training", say=of_bytes,
             of=mean("peak_memory")),
        Cost(name="overhead_alone", title="Inference, alone", axis="time by the bare backbone's, every row this method",
             say=ratio, of=alone),
        Cost(name="overhead_mixed", title="Inference, in a mixed batch", axis="time by the bare backbone's, mixed batch",
             say=ratio, of=mixed),
    ]  # fmt: skip
    drawn = [c.name for c in summary.complete]
    least = min(2, len(drawn))
    return [cost for cost in found if drawn and sum(cost.of.get(n) is not None for n in drawn) >= least]


def families(summary: Summary) -> dict[str, tuple[str, str]]:
    """Colour and marker of every family of methods in the report; the same in each of its figures."""
    names = sorted({facts_of(c.method).family for c in summary.candidates})
    return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


# ------------------------------------------------------------------------ score against cost


def score_against(summary: Summary, cost: Cost, *, height: float = 360) -> Chart:
    """Mean score against a cost: a mark and an interval for each candidate, the front as a line of steps."""
    front = summary.front(cost.of)
    looks = families(summary)
    shown = [c for c in summary.complete if cost.of.get(c.name) is not None]
    with style():
        figure = new_figure(height)
        axes = figure.add_axes((0.105, 0.205, 0.875, 0.77))
        values = {c.name: float(cost.of[c.name] or 0.0) for c in shown}
        _scale(axes, cost, list(values.values()))
        marks = [(_place(values[c.name], cost), 100 * c.overall.mean) for c in shown if c.overall]
        _intervals(axes, shown, marks)
        _front(axes, [_place(values[n], cost) for n in front], [100 * _mean(summary, n) for n in front])
        tips = {}
        for family, (colour, marker) in looks.items():
            of = [(c, at) for c, at in zip(shown, marks, strict=True) if facts_of(c.method).family == family]
            if of:
                gid = f"tip-{family.replace(' ', '-')}"
                axes.plot(*zip(*(at for _, at in of), strict=True), linestyle="", marker=marker, color=colour,
                          markersize=7.5, markeredgecolor=PAPER, markeredgewidth=0.9, gid=gid, zorder=4)  # fmt: skip
                tips[gid] = [_tip(c, cost) for c, _ in of]
        _limits(axes, [at[1] for at in marks])
        _names(axes, {c.name: at for c, at in zip(shown, marks, strict=True)}, front)
        axes.set_xlabel(cost.axis)
        axes.set_ylabel("mean score, points")
        _key(figure, {f: look for f, look in looks.items() if any(facts_of(c.method).family == f for c in shown)})
        said = f"Mean score against {cost.axis} of {len(shown)} methods. On the Pareto front, cheapest first: "
        said += "; ".join(f"{n}, {cost.say(values[n])}, {points(_mean(summary, n))} points" for n in front) + "."
        svg = render(figure, f"by-{cost.name.replace('_', '-')}", f"Score against {cost.title.lower()}", said, tips)
    missing = [c.name for c in summary.complete if cost.of.get(c.name) is None]
    note = f"Without a value, so not drawn: {listed(missing, most=8)}." if missing else ""
    return Chart(name=cost.name, title=cost.title, svg=svg, note=note)


def _place(value: float, cost: Cost) -> float:
    """Where a cost is drawn: nothing trained stands at the left end of a logarithmic axis."""
    return value if cost.name.startswith("overhead") else max(value, 1.0)


def _mean(summary: Summary, name: str) -> float:
    overall = summary.by_name[name].overall
    assert overall is not None
    return overall.mean


def _tip(candidate: Candidate, cost: Cost) -> str:
    assert candidate.overall is not None
    value = cost.of[candidate.name]
    assert value is not None
    ends = candidate.overall.interval
    known = f" ({interval(ends)})" if ends else ""
    return f"{candidate.name}: {points(candidate.overall.mean)} points{known}, {cost.say(value)}"


def _scale(axes: Any, cost: Cost, values: Sequence[float]) -> None:
    placed = [_place(v, cost) for v in values]
    low, high = min(placed), max(placed)
    if cost.name.startswith("overhead"):
        room = max(high - 1, 0.02)
        axes.set_xlim(min(low, 1) - 0.06 * room, high + 0.12 * room)
        axes.axvline(1, color=MUTED, linewidth=0.9, zorder=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2f}"))
        return
    axes.set_xscale("log")
    span = max(np.log10(high / low), 0.5)
    axes.set_xlim(low / 10 ** (0.06 * span + 0.05), high * 10 ** (0.12 * span + 0.05))
    few = span < 1.3
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x, cost)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def _short(value: float, cost: Cost) -> str:
    """A tick of a logarithmic axis."""
    if cost.name == "seconds":
        return f"{value:g} s" if value < 120 else f"{value / 60:.3g} min"
    units = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
    prefix, size = next(((p, s) for p, s in units if value >= s), ("", 1.0))
    return f"{value / size:.3g}{f' {prefix}B' if cost.name in ('file_bytes', 'peak_memory') else prefix}"


def _intervals(axes: Any, shown: Sequence[Candidate], marks: Sequence[tuple[float, float]]) -> None:
    for c, (x, _) in zip(shown, marks, strict=True):
        ends = c.overall.interval if c.overall else None
        if ends is not None:
            axes.plot([x, x], [100 * ends[0], 100 * ends[1]], color=MUTED, linewidth=1.0, alpha=0.65, zorder=2,
                      solid_capstyle="butt")  # fmt: skip


def _front(axes: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    if len(xs) > 1:
        axes.step(xs, ys, where="post", color=INK, linewidth=1.1, linestyle=(0, (4, 2)), zorder=3)


def _limits(axes: Any, scores: Sequence[float]) -> None:
    """Limits that hold every mark; an interval that is much wider than all marks together runs off the edge."""
    low, high = min(scores), max(scores)
    room = max(high - low, 1.0)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - 0.6 * room), min(top, high + 0.6 * room))


def _names(axes: Any, marks: Mapping[str, tuple[float, float]], front: Sequence[str]) -> None:
    """Write names beside marks where there is room: those on the front first, then the best; the rest have tips."""
    at = {name: tuple(axes.transData.transform(xy)) for name, xy in marks.items()}
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in at.values()]
    frame = axes.get_window_extent()
    for name in [*front, *(n for n in marks if n not in front)]:
        shown = name if len(name) <= 26 else f"{name[:25]}…"
        text = axes.text(0, 0, shown, fontsize=8.5, fontweight="bold" if name in front else "normal",
                         color=INK if name in front else MUTED, zorder=5)  # fmt: skip
        box = text.get_window_extent()
        width, height = box.width * 0.97, box.height * 0.8
        for dx, dy in _SIDES:
            left = at[name][0] + dx - (width if dx < 0 else width / 2 if dx == 0 else 0)
            bottom = at[name][1] + dy - height / 2
            room = (left, bottom, left + width, bottom + height)
            inside = room[0] > frame.x0 and room[2] < frame.x1 + 6 and room[1] > frame.y0 and room[3] < frame.y1
            if inside and not any(_overlap(room, other) for other in taken):
                text.set_position(axes.transData.inverted().transform((left, bottom)))
                taken.append(room)
                break
        else:
            text.remove()


_SIDES = ((9, 0), (9, 9), (9, -9), (0, 13), (0, -13), (-9, 0), (-9, 9), (-9, -9), (0, 22), (0, -22))


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _key(figure: Figure, looks: Mapping[str, tuple[str, str]]) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, markersize=6.5, label=family)
        for family, (colour, marker) in looks.items()
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="Pareto front"))
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.54, 0.0), ncols=min(5, len(handles)),
                  fontsize=8.5, handletextpad=0.3, columnspacing=1.2, labelspacing=0.25, borderpad=0.1)  # fmt: skip


# ------------------------------------------------------------------------ learning curves


def learning_curves(summary: Summary) -> list[Chart]:
    """A figure for each task: the validation score over the steps, mean and range over the runs."""
    coloured = [c.name for c in _leading(summary)]
    found = []
    for i, task in enumerate(summary.tasks):
        curves = {c.name: curve(c.cells[task], summary.metrics[task]) for c in summary.candidates if task in c.cells}
        drawn = {name: points_ for name, points_ in curves.items() if len(points_) > 1}
        if drawn:
            found.append(_curves(f"curve-{i}", task, drawn, coloured))
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
    return [
        (step, float(np.mean(v)), min(v), max(v)) for step, v in sorted(at.items()) if len(v) == len(cell.finished)
    ]


def _curves(
    name: str, task: str, curves: Mapping[str, Sequence[tuple[float, float, float, float]]], coloured: Sequence[str]
) -> Chart:
    with style():
        figure = new_figure(300)
        axes = figure.add_axes((0.105, 0.265, 0.875, 0.71))
        for candidate in [n for n in curves if n not in coloured]:
            steps, means, _, _ = np.array(curves[candidate]).T
            axes.plot(steps, 100 * means, color=GRID, linewidth=1.0, zorder=1)
        for i, candidate in enumerate(coloured):
            if candidate not in curves:
                continue
            steps, means, low, high = np.array(curves[candidate]).T
            colour, dashes = PALETTE[i], _DASHES[i % len(_DASHES)]
            axes.fill_between(steps, 100 * low, 100 * high, color=colour, alpha=0.13, linewidth=0, zorder=2)
            shown = candidate if len(candidate) <= 28 else f"{candidate[:27]}…"
            axes.plot(steps, 100 * means, color=colour, linestyle=dashes, linewidth=1.7, marker=MARKERS[i],
                      markersize=4, label=shown, zorder=3)  # fmt: skip
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("validation score, points")
        ends = {n: points(rows[-1][1]) for n, rows in curves.items()}
        said = f"Validation score on {task} over the optimiser steps. At the last step: "
        said += ", ".join(f"{n} {ends[n]}" for n in [*coloured, *curves] if n in ends)[:600] + "."
        handles, labels = axes.get_legend_handles_labels()
        if any(n not in coloured for n in curves):
            handles, labels = [*handles, Line2D([], [], color=GRID)], [*labels, "the others"]
        columns = 2 if max(map(len, labels), default=0) > 20 else 3
        figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.54, 0.0), ncols=columns, fontsize=8.5,
                      handlelength=2.4, columnspacing=1.2, labelspacing=0.25, borderpad=0.1)  # fmt: skip
        return Chart(name=name, title=task, svg=render(figure, name, f"Learning curves on {task}", said, {}))


_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), "-", (0, (5, 1.5)))
