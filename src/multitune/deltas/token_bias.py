"""`TokenBias`: h_i += P[l, token_i] at every layer's input.   Legend: V vocabulary, L layers, D width, N ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from multitune.deltas.base import Delta
from multitune.deltas.token_rows import TokenRows


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBias(Delta):
    """A vector per layer and token id, added to the layer's input (AoT P-Tuning, arXiv 2305.10835, eq. 1).

    Semantics, one row of ids `[T]` at layer l, `h [T, D]`:  `h + source.rows(ids)[:, l]`
    """

    kind: ClassVar[str] = "TokenBias"
    site_kind: ClassVar[str] = "layers"
    one_per_site: ClassVar[bool] = True
    attaches: ClassVar[str] = "input"
    cannot_merge: ClassVar[str | None] = "it depends on the token and enters the residual stream of every layer"

    source: TokenRows
    """Where the rows come from: factors, a table in memory, or a memory-mapped table."""

    def tensors(self) -> dict[str, Tensor]:
        return self.source.tensors()

    def settings(self) -> tuple[Any, ...]:
        return self.source.settings()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        return replace(self, source=replace(self.source, **tensors))

    def map(self, function: Any) -> Self:
        return replace(self, source=self.source.map(function))

    def served(self) -> Self:
        return replace(self, source=self.source.served())
