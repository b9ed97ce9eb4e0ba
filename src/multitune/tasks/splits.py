"""Cut a table in two, the same way every time."""

from typing import TYPE_CHECKING

import numpy as np

from multitune.errors import DataError
from multitune.tasks import columns

if TYPE_CHECKING:
    from datasets import Dataset


def split_table(
    table: "Dataset", fraction: float, seed: int, *, label: str | None = None
) -> tuple["Dataset", "Dataset"]:
    """Hold out a part of the rows: (the rest, the held-out rows), both in the order of the table.

    fraction: the share of rows to hold out, between 0 and 1; neither part is left empty.
    seed: the same seed gives the same parts.
    label: the column to stratify by; each of its values is held out in the same share, to one row. None takes
        the label column if the table has one that is plain, and else draws from all rows alike. Floats and
        lists are not stratified.

    Raises DataError when the fraction is out of range, or the table is too small or lacks the column.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the fraction to hold out is between 0 and 1, not {fraction}, such as 0.1")
    if len(table) < 2:
        raise DataError(f"a table of {len(table)} row(s) cannot be split; two are needed")
    if label is None:
        label = _label(table)
    else:
        columns.require(table.column_names, label, "label=…")
    strata = _strata(table, label)
    num_held = min(max(round(fraction * len(table)), 1), len(table) - 1)
    rng = np.random.default_rng(seed)
    held = {row for rows, count in _shares(strata, num_held, rng) for row in rng.permutation(rows)[:count].tolist()}
    order = range(len(table))
    return table.select([i for i in order if i not in held]), table.select([i for i in order if i in held])


def _label(table: "Dataset") -> str | None:
    try:
        return columns.guess_label(table.features)
    except DataError:
        return None


def _strata(table: "Dataset", label: str | None) -> list[list[int]]:
    """Row numbers by value of the label, in order of appearance."""
    if label is None or columns.is_list(table.features, label) or columns.is_float(table.features, label):
        return [list(range(len(table)))]
    strata: dict[object, list[int]] = {}
    for row, value in enumerate(table[label]):
        strata.setdefault(value, []).append(row)
    return list(strata.values())


def _shares(strata: list[list[int]], num_held: int, rng: np.random.Generator) -> list[tuple[list[int], int]]:
    """How many rows of each stratum to hold out: its share rounded down, one more by largest remainder."""
    sizes = np.array([len(rows) for rows in strata])
    # whole numbers, so that equal remainders are equal; then the draw settles them, not the table's order
    counts, rests = np.divmod(sizes * num_held, sizes.sum())
    by_rest = np.lexsort((rng.permutation(len(strata)), -rests))
    counts[by_rest[: num_held - counts.sum()]] += 1
    return list(zip(strata, counts.tolist(), strict=True))
