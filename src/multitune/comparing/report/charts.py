"""Scores against costs, as figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from multitune.comparing.method_facts import facts_of
from multitune.comparing.report.svg import (
    INK,
    MARKERS,
    MUTED,
    NARROW,
    PALETTE,
    PAPER,
    WIDE,
    new_figure,
    render,
    style,
)
from multitune.comparing.summary import Candidate, Summary
from multitune.comparing.wording import count, interval, listed, of_bytes, points, ratio, seconds

#: Left, bottom, right, top, in pixels.
Box = tuple[float, float, float, float]


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
    wide: str | None = None
    """The same for a wide page, where there is such."""
    note: str = ""


def costs(summary: Summary) -> list[Cost]:
    """The costs that were measured for two candidates at least; one mark alone would say nothing."""

    def mean(name: str) -> dict[str, float | None]:
        return {c.name: c.mean(name) for c in summary.candidates}

    alone = {c.name: c.overhead_alone for c in summary.candidates}
    mixed = {c.name: c.overhead_mixed for c in summary.candidates}
    by = "time by the bare backbone's"
    found = [
        _cost("parameters", "Trained parameters", "trained parameters, head excluded", count, summary.parameters),
        _cost("file_bytes", "Size of the file", "file, head excluded", of_bytes, mean("file_bytes")),
        _cost("seconds", "Time of training", "time of training a run", seconds, summary.seconds),
        _cost("peak_memory", "Peak memory of training", "peak memory of training", of_bytes, mean("peak_memory")),
        _cost("overhead_alone", "Inference, alone", f"{by}, every row this method", ratio, alone),
        _cost("overhead_mixed", "Inference, in a mixed batch", f"{by}, a mixed batch", ratio, mixed),
    ]
    return [cost for cost in found if sum(cost.of.get(c.name) is not None for c in summary.complete) > 1]


def _cost(name: str, title: str, axis: str, say: Callable[[float], str], of: Mapping[str, float | None]) -> Cost:
    return Cost(name=name, title=title, axis=axis, say=say, of=of)


def families(summary: Summary) -> dict[str, tuple[str, str]]:
    """Colour and marker of every family of methods in the report; the same in each of its figures."""
    names = sorted({facts_of(c.method).family for c in summary.candidates})
    return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


#: Of marks that would look small beside the others.
_MARKER_SIZES = {"*": 11.5, "P": 9.0, "X": 8.5, "h": 8.5}

# ------------------------------------------------------------------------ score against cost


def score_against(summary: Summary, cost: Cost, *, with_wide: bool = False) -> Chart:
    """Mean score against a cost: a mark and an interval for each candidate, the front as a line of steps."""
    missing = [c.name for c in summary.complete if cost.of.get(c.name) is None]
    return Chart(
        name=cost.name,
        title=cost.title,
        svg=_scatter(summary, cost, "by", NARROW, 320),
        wide=_scatter(summary, cost, "wide", WIDE, 400) if with_wide else None,
        note=f"Without a value, so not drawn: {listed(missing, most=8)}." if missing else "",
    )


def _scatter(summary: Summary, cost: Cost, prefix: str, width: int, height: int) -> str:
    front = summary.front(cost.of)
    looks = families(summary)
    shown = [c for c in summary.complete if cost.of.get(c.name) is not None]
    with style():
        figure = new_figure(width, height)
        left, below = 50 / width, 88 / height
        axes = figure.add_axes((left, below, 0.985 - left, 0.985 - below))
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
                xs, ys = zip(*(at for _, at in of), strict=True)
                axes.plot(xs, ys, linestyle="", marker=marker, color=colour, gid=gid, zorder=4, markeredgecolor=PAPER,
                          markersize=_MARKER_SIZES.get(marker, 7.5), markeredgewidth=0.9)  # fmt: skip
                tips[gid] = [_tip(c, cost) for c, _ in of]
        _limits(axes, [at[1] for at in marks])
        _names(axes, {c.name: at for c, at in zip(shown, marks, strict=True)}, front, [
            (at[0], 100 * ends[0], 100 * ends[1]) for c, at in zip(shown, marks, strict=True)
            if c.overall and (ends := c.overall.interval)
        ])  # fmt: skip
        axes.set_xlabel(cost.axis)
        axes.set_ylabel("mean score, points")
        here = {facts_of(c.method).family for c in shown}
        _key(figure, {f: look for f, look in looks.items() if f in here}, with_front=len(front) > 1)
        said = f"Mean score against {cost.axis} of {len(shown)} methods. On the Pareto front, cheapest first: "
        said += "; ".join(f"{n}, {cost.say(values[n])}, {points(_mean(summary, n))} points" for n in front) + "."
        name = f"{prefix}-{cost.name.replace('_', '-')}"
        return render(figure, name, f"Score against {cost.title.lower()}", said, tips)


def _place(value: float, cost: Cost) -> float:
    """Where a cost is drawn: nothing at all stands left of the smallest on a logarithmic axis."""
    if value > 0 or cost.name.startswith("overhead"):
        return value
    return min((v for v in cost.of.values() if v), default=10.0) / 8


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
    digits = range(1, 10) if span < 0.6 else (1, 2, 5) if span < 1.3 else (1,)
    ticks = [t for t in LogLocator(subs=digits, numticks=9).tick_values(*axes.get_xlim()) if _inside(axes, t)]
    if cost.name == "seconds":
        ticks = [t for t in _TIMES if _inside(axes, t)]
    ticks = ticks[:: 1 + len(ticks) // 7]
    zero = _place(0.0, cost)
    if min(values) == 0:
        ticks = [zero, *(t for t in ticks if t > 2.5 * zero)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x == zero else _short(x, cost)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def _inside(axes: Any, tick: float) -> bool:
    low, high = axes.get_xlim()
    return bool(low <= tick <= high)


#: Seconds that a clock shows as whole numbers.
_TIMES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 36000, 86400)


def _short(value: float, cost: Cost) -> str:
    """A tick of a logarithmic axis."""
    if cost.name == "seconds":
        unit, size = ("s", 1.0) if value < 120 else ("min", 60.0) if value < 7200 else ("h", 3600.0)
        return f"{value / size:.3g} {unit}"
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


def _names(
    axes: Any,
    marks: Mapping[str, tuple[float, float]],
    front: Sequence[str],
    intervals: Sequence[tuple[float, float, float]],
) -> None:
    """Write names beside marks where there is room: those on the front first, then the best; the rest have tips.

    A name keeps clear of marks, other names and the front; of intervals too where that is possible.
    """
    to_pixels = axes.transData.transform
    at = {name: tuple(to_pixels(xy)) for name, xy in marks.items()}
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in at.values()]
    corners = [at[name] for name in front]
    for (x0, y0), (x1, y1) in pairwise(corners):
        taken += [(x0, y0 - 2, x1, y0 + 2), (x1 - 2, y0, x1 + 2, y1)]
    lines: list[Box] = []
    for x, low, high in intervals:
        (left, bottom), (right, top) = to_pixels((x, low)), to_pixels((x, high))
        lines.append((left - 1, bottom, right + 1, top))
    frame = axes.get_window_extent()
    for name in [*front, *(n for n in marks if n not in front)]:
        shown = name if len(name) <= 26 else f"{name[:25]}…"
        text = axes.text(0, 0, shown, fontsize=9, fontweight="bold" if name in front else "normal",
                         color=INK if name in front else MUTED, zorder=5)  # fmt: skip
        size = text.get_window_extent()
        rooms = [_beside(at[name], side, size.width * 0.97, size.height * 0.8) for side in _SIDES]
        inside = [r for r in rooms if frame.x0 < r[0] and r[2] < frame.x1 + 6 and frame.y0 < r[1] and r[3] < frame.y1]
        free = [r for r in inside if not any(_overlap(r, other) for other in taken)]
        if not free:
            text.remove()
            continue
        room = next((r for r in free if not any(_overlap(r, line) for line in lines)), free[0])
        text.set_position(axes.transData.inverted().transform(room[:2]))
        taken.append(room)


def _beside(at: tuple[float, float], side: tuple[int, int], width: float, height: float) -> Box:
    dx, dy = side
    left = at[0] + dx - (width if dx < 0 else width / 2 if dx == 0 else 0)
    bottom = at[1] + dy - height / 2
    return left, bottom, left + width, bottom + height


_SIDES = ((9, 0), (9, 9), (9, -9), (0, 13), (0, -13), (-9, 0), (-9, 9), (-9, -9), (0, 22), (0, -22))


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _key(figure: Figure, looks: Mapping[str, tuple[str, str]], *, with_front: bool) -> None:
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            color=colour,
            markersize=0.87 * _MARKER_SIZES.get(marker, 7.5),
            label=family,
        )
        for family, (colour, marker) in looks.items()
    ]
    if with_front:
        handles.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="Pareto front"))
    room = 5 if figure.get_figwidth() * 72 > NARROW else 4
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.54, 0.0), ncols=min(room, len(handles)),
                  fontsize=9, handletextpad=0.3, columnspacing=1.2, labelspacing=0.25, borderpad=0.1)  # fmt: skip
