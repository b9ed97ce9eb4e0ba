"""Numbers as a report writes them: the same in HTML, Markdown and sentences."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "–"


def points(score: float) -> str:
    """A score between 0 and 1 as points of 100."""
    return f"{100 * score:.1f}"


def interval(ends: tuple[float, float] | None) -> str:
    """A 95 % interval in points."""
    return MISSING if ends is None else f"{points(ends[0])} to {points(ends[1])}"


def count(number: float) -> str:
    """A whole number with separators."""
    return f"{number:,.0f}"


def of_bytes(number: float) -> str:
    """Bytes in the largest decimal unit that leaves a number of at least one."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def seconds(number: float) -> str:
    """A time in the unit that is read most easily."""
    if number < 120:
        return f"{number:.1f} s"
    return f"{number / 60:.1f} min" if number < 7200 else f"{number / 3600:.1f} h"


def ratio(number: float) -> str:
    """A multiple of the bare backbone's time."""
    return f"{number:.2f} ×"


def p_value(p: float) -> str:
    """A probability; small ones as a bound."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def listed(names: Sequence[str], *, most: int) -> str:
    """Names in a sentence; of more than `most` the number of the rest."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
