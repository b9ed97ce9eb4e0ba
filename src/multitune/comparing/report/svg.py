"""Figures of matplotlib as SVG that stands in a page: text stays text, colours are the page's, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

#: What a figure is drawn with; the page's CSS gives each its colour. The numbers stand for nothing.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
#: Colours of families and curves, to tell apart for the colour-blind (Okabe and Ito 2008), markers with them.
PALETTE = tuple(f"#05{i:02x}{i:02x}" for i in range(1, 9))
MARKERS = ("o", "s", "^", "D", "v", "h", "X", "P", "*")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"c{i}" for i, colour in enumerate(PALETTE)
}

#: Widths in pixels. A figure is scaled to its place, text with it: the wide one to a page, the narrow one to half of
#: it or a phone.
WIDE, NARROW = 640, 430

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # measured with it, shown in the page's own
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "path.simplify": True,
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # the unit of an SVG is 1/72 inch
    FigureCanvasSVG(figure)  # no pyplot: that would choose a backend for the whole process
    return figure


def style() -> AbstractContextManager[None]:
    """Context in which figures for the page are drawn and written."""
    return matplotlib.rc_context(_STYLE)


def render(figure: Figure, name: str, title: str, description: str, tips: Mapping[str, Sequence[str]]) -> str:
    """The figure as an `<svg>` element.

    Args:
        name: unique in the page; ids begin with it.
        title: for those who do not see it, with `description`.
        tips: by the `gid` of a group in the figure, a title for each mark in it in turn (shown when pointed at).
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"<!--.*?-->\s*", "", drawn, flags=re.DOTALL)
    for gid, texts in tips.items():
        drawn = _with_tips(drawn, gid, texts)
    # Ids of groups say nothing and would stand in the page once per figure; those that are referred to are hashed.
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    drawn = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", drawn)
    drawn = re.sub(r"font: (?:bold|[67]00) ([0-9.]+)px [^;\"]*", r"font-weight: 600; font-size: \1px", drawn)
    opening = re.match(r"<svg[^>]*>", drawn)
    assert opening is not None
    box = re.search(r'viewBox="([^"]*)"', opening[0])
    assert box is not None
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" '
        f'role="img" aria-labelledby="{name}-title {name}-text"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>'
    )
    return re.sub(r"\n\s*", "\n", head + drawn[opening.end() :].strip())


def _with_tips(drawn: str, gid: str, texts: Sequence[str]) -> str:
    """A `<title>` in every `<use>` of a group, in the order they were drawn."""
    start = drawn.index(f'<g id="{gid}"')
    end = drawn.find('<g id="', start + 1)
    end = len(drawn) if end < 0 else end
    waiting = iter(texts)

    def titled(mark: re.Match[str]) -> str:
        return f"{mark[1]}><title>{escape(next(waiting))}</title></use>"

    return drawn[:start] + re.sub(r"(<use [^>]*?)/>", titled, drawn[start:end]) + drawn[end:]
