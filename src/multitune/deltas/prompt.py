"""`Prompt`: extra input vectors at the word embeddings.   Legend: P prompt length, E embedding width."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from multitune.deltas.base import Delta
from multitune.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt(Delta):
    """Vectors inserted into a row's word embeddings (prompt tuning, Lester et al. 2021, arXiv 2104.08691).

    Semantics, one row of words `x [n, E]`:  vector j stands in front of word `at[j]` (0: in front of all,
    -1: behind the last), so the row becomes `[n + P, E]`; positions count the inserted vectors.
    """

    kind: ClassVar[str] = "Prompt"
    site_kind: ClassVar[str] = "embedding"
    one_per_site: ClassVar[bool] = True
    attaches: ClassVar[str] = "input"
    cannot_merge: ClassVar[str | None] = "it lengthens the sequence"

    vectors: Tensor
    """`[P, E]`"""
    at: tuple[int, ...]
    """For each vector, the word it stands in front of; non-decreasing, those of -1 last."""

    def __post_init__(self) -> None:
        ends = [math.inf if a == -1 else a for a in self.at]
        ordered = all(a <= b for a, b in pairwise(ends)) and min(ends, default=-1) >= 0
        if len(self.at) != self.vectors.shape[0] or not ordered:
            raise ConfigError(
                f"a prompt of {self.vectors.shape[0]} vectors needs as many places, non-decreasing from 0, then -1, "
                f"not at={self.at}"
            )
