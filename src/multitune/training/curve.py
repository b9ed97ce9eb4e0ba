"""The curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BLUE, _ORANGE = "#1f6fb4", "#d95f02"


def write_curve(path: Path, history: Sequence[dict[str, Any]], metric: str, title: str) -> None:
    """Write a PNG: training loss and validation metric over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6))
    figure.subplots_adjust(left=0.12, right=0.88, bottom=0.14, top=0.91)  # a layout engine would draw all twice
    FigureCanvasAgg(figure)  # no pyplot: that would choose a backend for the whole process
    left = figure.add_subplot()
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e]
    scores = [(e["step"], e[f"eval_{metric}"]) for e in history if f"eval_{metric}" in e]
    left.plot(*zip(*losses, strict=True), color=_BLUE, linewidth=1.2)
    left.set_xlabel("step")
    left.set_ylabel("training loss", color=_BLUE)
    left.tick_params(axis="y", labelcolor=_BLUE)
    left.set_title(title, fontsize=10)
    right = left.twinx()
    right.plot(*zip(*scores, strict=True), color=_ORANGE, marker="o", markersize=4)
    right.set_ylabel(f"validation {metric}", color=_ORANGE)
    right.tick_params(axis="y", labelcolor=_ORANGE)
    figure.savefig(path, format="png", dpi=120)
