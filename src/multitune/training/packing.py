"""Which texts of a batch share a row of the forward pass, and what that saves.

Texts of one row see nothing of each other and count their positions from 0 (`Batch.pieces`). So packing changes neither
what is computed of a text nor which rows an optimizer step sees: only how much of a batch is padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from multitune.deltas import Prompt
from multitune.errors import ConfigError
from multitune.methods import Method
from multitune.plan import DeltaSet


def together(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which texts share a row: as few rows as best fit finds, longest text first, and these as narrow as they can be.

    Where even these hold more padding than a row per text, no two share one.

    Args:
        lengths: tokens of each text.
        room: most tokens of a row; a text that is longer has a row to itself.

    Returns:
        The numbers of the texts, row by row, in order: where no two share a row, all is as it was.
    """
    rows = _best_fit(lengths, room)
    low, high = max(*lengths, math.ceil(sum(lengths) / len(rows))), room
    while low < high:  # of so many rows narrower ones hold less padding, and attention costs less in them
        middle = (low + high) // 2
        found = _best_fit(lengths, middle)
        if len(found) <= len(rows):
            rows, high = found, middle
        else:
            low = middle + 1
    width = max(sum(lengths[i] for i in row) for row in rows)
    if width * len(rows) > max(lengths) * len(lengths):
        return [[i] for i in range(len(lengths))]
    return sorted(sorted(row) for row in rows)


def _best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Every text, the longest first, into the fullest row of `width` tokens that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        fitting = [row for row, left in enumerate(room) if left >= lengths[number]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(width)
        row = min(fitting, key=lambda r: room[r])
        rows[row].append(number)
        room[row] -= lengths[number]
    return rows


def saving(lengths: Sequence[int], batches: Iterable[Sequence[int]], room: int, batch_size: int) -> str:
    """A line that says what packing saves.

    Args:
        lengths: tokens of each row.
        batches: of an epoch, the numbers of their rows.
        room: as `together` takes it.
        batch_size: rows of a batch as the run asks for them.
    """
    count = before = after = 0
    for batch in batches:
        own = [lengths[i] for i in batch]
        widths = [sum(own[i] for i in row) for row in together(own, room)]
        count += len(widths)
        before += max(own) * len(own) - sum(own)
        after += max(widths) * len(widths) - sum(own)
    if count == len(lengths):
        return (
            f"packing puts no two of {len(lengths):,} training rows together: in batches of {batch_size:,} rows and "
            f"{room:,} tokens a row it would save nothing; raise max_length (--max-length) or batch_size, or "
            f"leave packing out"
        )
    return (
        f"packing: {len(lengths):,} training rows become {count:,} of at most {room:,} tokens; the first epoch has "
        f"{after:,} tokens of padding in place of {before:,}, beside {sum(lengths):,} of the rows themselves"
    )


def check_packing(method: Method, deltas: DeltaSet) -> None:
    """Raise `ConfigError` for a method that needs a row per text."""
    if deltas.of(Prompt):
        raise ConfigError(
            f"packing=True: {method.title} ('{method.name}') inserts vectors into a row (a prompt), which have one "
            f"place there, and packing puts several texts into it; leave packing out (packing=False, --packing "
            f"false), or choose a method without a prompt, such as ptuning_v2 or lora"
        )
