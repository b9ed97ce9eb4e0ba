"""What the timings share: systems interleaved in one process, results as rows, a table, JSON and a plot."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table: what one system took in one case."""

    case: str
    system: str
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    """First and third quartile."""
    ratio_to_backbone: float | None = None
    """Ratio of the medians."""
    median_of_ratios: float | None = None
    """Median over rounds of this system's time by the reference's time in the same round."""
    ratio_to_first: float | None = None
    """Instead of the ratio to the backbone: to the first of the adapters that were added."""
    limit: float | None = None
    """Largest ratio that is acceptable."""
    rounds: int | None = None
    resident_bytes: int | None = None
    """Tensor bytes per adapter, as the bank counts them."""
    growth_bytes: int | None = None
    """Growth of the process (of the device's memory on a GPU) per adapter."""
    parameters: int | None = None
    """Trained numbers per adapter, the head excluded."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The ratio that the limit is for."""
        return self.ratio_to_first if self.ratio_to_backbone is None else self.ratio_to_backbone

    @property
    def verdict(self) -> str:
        """`ok`, `MISSED`, or nothing where there is no limit."""
        if self.limit is None or self.ratio is None:
            return ""
        return "ok" if self.ratio <= self.limit else "MISSED"

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values: case, system, `ratio_to_backbone` and `median_ms` always, the others if set."""
        always = ("ratio_to_backbone", "median_ms")
        values = {k: v for k, v in asdict(self).items() if k in always or v not in (None, "")}
        return values | ({"verdict": self.verdict} if self.verdict else {})


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    systems: Mapping[str, Callable[[T], object]],
    draw: Callable[[], T],
    *,
    device: torch.device,
    seconds: float,
    least_rounds: int,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Time the systems in turn, A B C A B C ..., every round on one new batch that all of them get.

    Args:
        systems: by name, what to time; they run in this order.
        draw: makes the batch of a round; not timed.
        seconds: after this time no new round begins ...
        least_rounds: ... once there were this many.
        warm_up: rounds before the first that counts.

    Returns:
        Milliseconds by system, one number a round.
    """
    times: dict[str, list[float]] = {name: [] for name in systems}
    gc.collect()
    end = float("inf")
    round_ = -warm_up
    while round_ < least_rounds or time.perf_counter() < end:
        if round_ == 0:
            end = time.perf_counter() + seconds
        batch = draw()
        for name, system in systems.items():
            synchronise(device)
            start = time.perf_counter()
            output = system(batch)
            synchronise(device)
            elapsed = time.perf_counter() - start
            del output
            if round_ >= 0:
                times[name].append(1e3 * elapsed)
        round_ += 1
    return times


def results(
    case: str,
    times: Mapping[str, Sequence[float]],
    *,
    limits: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
    to_first: bool = False,
) -> list[Result]:
    """A row per system; the ratios are to the system that comes first."""
    reference = next(iter(times.values()))
    found = []
    for system, values in times.items():
        ratio = statistics.median(values) / statistics.median(reference)
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        found.append(
            Result(
                case=case,
                system=system,
                median_ms=statistics.median(values),
                quartiles_ms=(first, third),
                ratio_to_backbone=None if to_first else ratio,
                ratio_to_first=ratio if to_first else None,
                median_of_ratios=statistics.median(v / r for v, r in zip(values, reference, strict=True)),
                limit=(limits or {}).get(system),
                rounds=len(values),
                note=(notes or {}).get(system, ""),
            )
        )
    return found


# ------------------------------------------------------------------------ reports


def machine(threads: int, device: torch.device) -> str:
    """The machine and the versions, two lines."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    gigabytes = psutil.virtual_memory().total / 1e9
    packages = ("torch", "transformers", "peft", "multitune")
    return (
        f"{cpu}, {os.cpu_count()} cores, {gigabytes:.0f} GB{gpu}; {threads} threads; {platform.platform()}\n"
        f"Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages)
    )


def print_times(rows: Sequence[Result]) -> None:
    """The timed rows as a table."""
    line = "  {:34}{:>11}{:>22}{:>8}{:>11}{:>8}{:>8}  {}"
    head = ("system", "median ms", "quartiles", "ratio", "of rounds", "limit", "rounds", "")
    print(line.format(*head).rstrip())
    for r in rows:
        assert r.median_ms is not None and r.quartiles_ms is not None and r.ratio is not None
        quartiles = "{:.2f} .. {:.2f}".format(*r.quartiles_ms)
        limit = "" if r.limit is None else f"{r.limit:.2f}"
        of_rounds = f"{r.median_of_ratios:.3f}"
        cells = (r.system, f"{r.median_ms:.2f}", quartiles, f"{r.ratio:.3f}", of_rounds, limit, r.rounds, r.verdict)
        print(line.format(*cells).rstrip() + (f"  ({r.note})" if r.note else ""))


def print_memory(rows: Sequence[Result]) -> None:
    """The rows of memory as a table."""
    line = "  {:34}{:>16}{:>18}{:>24}  {}"
    print(line.format("method", "trained numbers", "bank, kB each", "process grows, kB each", ""))
    for r in rows:
        assert r.resident_bytes is not None and r.growth_bytes is not None
        kilobytes = (f"{r.resident_bytes / 1e3:.1f}", f"{r.growth_bytes / 1e3:.1f}")
        print(line.format(r.system, f"{r.parameters:,}", *kilobytes, f"({r.note})"))


def write_json(file: Path, rows: Sequence[Result]) -> None:
    """All rows as a JSON list."""
    file.write_text(json.dumps([r.to_dict() for r in rows], indent=2) + "\n", "utf-8")


MULTITUNE, OTHER, MISSED, INK = "#2f6f9f", "#b9b4aa", "#c4512d", "#333333"


def plot(file: Path, rows: Sequence[Result], titles: Mapping[str, str], subtitle: str, widest: float = 2.0) -> None:
    """Bars that start at the bare backbone's time; a bar longer than `widest` runs off the edge with its number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = [r for r in rows if r.ratio is not None and r.ratio != 1]  # the references are the line at 1
    cases = list(dict.fromkeys(r.case for r in shown))
    if not cases:
        print(f"nothing to draw in {file}", file=sys.stderr)
        return
    height = 0.29 * len(shown) + 0.42 * len(cases) + 1.5
    figure, axes = plt.subplots(figsize=(9, height))
    left, y = 1 - 0.42 * (widest - 1), 0.0
    ticks = [1 + 0.2 * i for i in range(round((widest - 1) / 0.2) + 1)]
    for case in cases:
        axes.text(left, y, f"{case}   {titles[case]}", fontsize=9.5, fontweight="bold", va="center", color=INK)
        mine = [r for r in shown if r.case == case]
        for x in ticks:
            colour, width = (INK, 0.9) if x == 1 else ("#e4e2dd", 0.8)
            axes.plot([x, x], [y + 0.5, y + len(mine) + 0.5], color=colour, linewidth=width, zorder=1)
        for r in mine:
            y += 1
            assert r.ratio is not None
            colour = OTHER if r.system.startswith(("PEFT", "backbone")) else MULTITUNE
            colour = MISSED if r.verdict == "MISSED" else colour
            axes.barh(y, min(r.ratio, widest) - 1, left=1, height=0.62, color=colour, zorder=2)
            axes.text(left + 0.02, y, r.system, fontsize=9, va="center", color=INK)
            end = max(r.ratio, 1.0)
            if r.limit is not None and end - 0.02 < r.limit < end + 0.09:
                end = r.limit  # the number would lie under the mark of the limit
            beyond = r.ratio > widest
            label = f"{r.ratio:.1f} ×  →" if beyond else f"{r.ratio:.2f}"
            place, align = (widest - 0.01, "right") if beyond else (end + 0.012, "left")
            on_bar = "white" if beyond and colour != OTHER else INK
            axes.text(place, y, label, fontsize=9, va="center", ha=align, color=on_bar, zorder=4)
            if r.limit is not None:
                axes.plot([r.limit, r.limit], [y - 0.42, y + 0.42], color=INK, linewidth=1.6, zorder=3)
        y += 1.45
    axes.set_xlim(left, widest + 0.02)
    axes.set_ylim(y - 0.5, -0.7)
    axes.set_yticks([])
    axes.set_xticks(ticks)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.set_xlabel("time by the time of the bare backbone on the same batch (f: by the time for the 1st adapter)")
    axes.xaxis.label.set(fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    key = [Patch(color=MULTITUNE, label="multitune"), Patch(color=OTHER, label="others")]
    if any(r.verdict == "MISSED" for r in shown):
        key.append(Patch(color=MISSED, label="above its limit"))
    key.append(Line2D([], [], color=INK, marker="|", markersize=10, markeredgewidth=1.6, linestyle="", label="limit"))
    figure.legend(handles=key, loc="lower right", bbox_to_anchor=(0.98, 1.0), ncols=4, frameon=False, fontsize=9)
    figure.text(0.02, 1.045, "A batch of many adapters", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.02, 1.01, subtitle, fontsize=8.5, color="#6b6861")
    figure.tight_layout()
    figure.savefig(file, dpi=200, bbox_inches="tight", facecolor="white")
    plt.close(figure)
