"""What is done to the tables of some suites once they are read, where a template alone cannot read their columns.

Each function takes a table and gives it back with columns added, or with a label put in the form that a task reads.
Rows that an adapter is to answer later need the same columns; the tables of `load_task` have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

PLACEHOLDER = "@placeholder"
"""What stands in a query of ReCoRD where an entity is missing."""


def cloze(table: Dataset) -> Dataset:
    """ReCoRD: the query in two columns, `query_start` and `query_end`, what stands around the missing entity."""
    halves = [str(query).partition(PLACEHOLDER) for query in table["query"]]
    return table.add_column("query_start", [half[0] for half in halves]).add_column(
        "query_end", [half[2] for half in halves]
    )


def marked_pronoun(table: Dataset) -> Dataset:
    """Winograd schemas: `marked`, the text with stars around the pronoun that is meant, as T5 reads them.

    A pronoun may stand in a text several times, and a pair of texts alone does not say which is meant (Raffel et al.
    2020, section 2.4).
    """
    return table.add_column("marked", [_marked(row) for row in table])


def _marked(row: Mapping[str, Any]) -> str:
    words, index, pronoun = str(row["text"]).split(), int(row["span2_index"]), str(row["span2_text"])
    size = len(pronoun.split())

    def fits(start: int) -> bool:
        return " ".join(words[start : start + size]).lower().startswith(pronoun.lower())

    # The index of one published row is off by one word, so the nearest place that reads like the pronoun is taken.
    start = min(filter(fits, range(len(words))), key=lambda place: abs(place - index), default=index)
    whole = " ".join(words[start : start + size])
    rest = whole[len(pronoun) :]
    return " ".join([*words[:start], f"*{whole[: len(whole) - len(rest)]}*{rest}", *words[start + size :]])


def lettered_answer(table: Dataset) -> Dataset:
    """AQuA-RAT: `right`, the position of the option whose letter `correct` is."""
    letters = [[str(option).partition(")")[0].strip() for option in options] for options in table["options"]]
    return table.add_column("right", [of_row.index(c) for of_row, c in zip(letters, table["correct"], strict=True)])


def joined_contexts(table: Dataset) -> Dataset:
    """PubMedQA: `context`, the paragraphs of the abstract as one text."""
    return table.add_column("context", [" ".join(paragraphs) for paragraphs in table["contexts"]])
