"""Rows that a prompted model answered, each with what was right: to look at, and to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multitune.generation.pages import cell, listed, save_answers, table_page


@dataclass(frozen=True, kw_only=True)
class JudgedRow:
    """One row."""

    prompt: str
    """What was asked, with all that stood in front of it."""
    answer: str
    """What the model chose, or what was read from what it wrote."""
    answers: tuple[str, ...]
    """All that is right; empty where nobody said."""
    right: bool | None = None
    """Whether the answer is; `None` where that is not known, or no matter of yes and no."""
    options: tuple[str, ...] = ()
    """Ranking: what was chosen among."""
    scores: tuple[float, ...] = ()
    """Ranking: of every option what it was chosen by."""
    texts: tuple[str, ...] = ()
    """Writing: what the model wrote, each sample."""
    task: str = ""
    """The task it is of, where there are several."""
    wording: int = 0
    """By which of the task's wordings it was put."""


def save_judged(
    folder: str | Path, rows: Sequence[JudgedRow], *, title: str, scores: Mapping[str, float], facts: Any = None
) -> Path:
    """Write predictions.jsonl, predictions.html (one file that needs no other) and scores.json into a folder.

    Args:
        title: what the page is called.
        scores: by name, in front of the page's table.
        facts: what scores.json says, by default the scores.
    """
    tasks = any(row.task for row in rows)
    said = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    page = table_page(
        title,
        f"{len(rows)} rows" + (f", {said}" if said else ""),
        [*(["task"] if tasks else []), "prompt", "answer", "right answers", "options or texts"],
        ([*([cell(row.task)] if tasks else []), *_cells(row)] for row in rows),
    )
    return save_answers(folder, map(asdict, rows), dict(scores) if facts is None else facts, page)


def _cells(row: JudgedRow) -> list[str]:
    ranked = [f"{option} ({score:.3f})" for option, score in zip(row.options, row.scores, strict=True)]
    return [
        cell(row.prompt),
        cell(row.answer, "wrong" if row.right is False else ""),
        listed(row.answers),
        listed(ranked or row.texts),
    ]
