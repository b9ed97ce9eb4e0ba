"""`Prompt`: extra input vectors at the word embeddings.   Legend: P prompt length, E embedding width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from multitune.deltas.base import Delta
from multitune.errors import ConfigError

#: Places from here downward are slots, far from what a slip of counting from the end would give.
FIRST_SLOT = -1000


def in_slot(number: int) -> int:
    """The place of a vector that stands in a slot of the row's text, counted from 0."""
    return FIRST_SLOT - number


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt(Delta):
    """Vectors inserted into a row's word embeddings (prompt tuning, Lester et al. 2021, arXiv 2104.08691).

    Semantics, one row of words `x [n, E]`:  vector j stands in front of word `at[j]` (0: in front of all,
    -1: behind the last, `in_slot(k)`: where the row's own text has slot k), so the row becomes `[n + P, E]`; positions
    count the inserted vectors. Of vectors at one place the earlier stands first.
    """

    kind: ClassVar[str] = "Prompt"
    site_kind: ClassVar[str] = "embedding"
    dims: ClassVar[Mapping[str, str]] = {"vectors": "PO"}
    one_per_site: ClassVar[bool] = True
    attaches: ClassVar[str] = "input"
    cannot_merge: ClassVar[str | None] = "it lengthens the sequence"

    vectors: Tensor
    """`[P, E]`"""
    at: tuple[int, ...]
    """For each vector, the word it stands in front of; but for those in slots non-decreasing, those of -1 last."""

    def __post_init__(self) -> None:
        ends = [math.inf if a == -1 else a for a in self.at if a > FIRST_SLOT]
        ordered = all(a <= b for a, b in pairwise(ends)) and min(ends, default=0) >= 0
        if not self.at or len(self.at) != self.vectors.shape[0] or not ordered:
            raise ConfigError(
                f"a prompt of {self.vectors.shape[0]} vectors needs as many places, non-decreasing from 0, then -1, "
                f"not at={self.at}"
            )
