"""What every kind of delta shares: tensors plus a pure function over the rows at one site.

Three forms of the same arithmetic, one formula:

* one slot for all rows: the tensor fields are as documented, `x [B, T, I]`;
* many slots: every tensor field has a leading dimension G and `x [G, K*T, I]` holds, for each of the G
  slots, the K rows that use it; matrices are then `[G, ., .]` and vectors `[G, 1, .]`, so the same
  expression broadcasts or becomes a batched matrix product;
* none: a row without deltas is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from multitune.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """One kind of change to a site's activations. Subclasses are frozen dataclasses of tensors and settings."""

    kind: ClassVar[str]
    """Name of the kind, as in the table of docs/design.md."""
    site_kind: ClassVar[str]
    """Kind of site it applies at."""
    dims: ClassVar[Mapping[str, str]] = {}
    """Of tensor fields of one slot, a letter per dimension: I and O are the site's widths in and out, and others are
    equal among the fields; a method's deltas are checked against it. Fields left out are not."""
    changes_input: ClassVar[bool] = False
    """Whether it changes what goes into the site instead of what comes out."""
    one_per_site: ClassVar[bool] = False
    """Whether an adapter can have only one of this kind at a site; the others add up or follow one another."""
    attaches: ClassVar[str] = "parallel"
    """How it is attached to the frozen operation: `parallel` (adds to its output what it makes of its input),
    `serial` (changes its output), `input` (changes what goes in), or `inside`."""
    cannot_merge: ClassVar[str | None] = None
    """Why it cannot be folded into the frozen weights, or `None` if it can."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        """The new output from the site's input `x` and output `y`, both `[B, T, .]` or `[G, K*T, .]`.

        May reuse the memory of `y` when gradients are off.
        """
        raise NotImplementedError(type(self).__name__)

    def why_not_merge(self, module: nn.Module) -> str | None:
        """Why it cannot be folded into this frozen module, or `None` if it can."""
        return self.cannot_merge

    def merge(self, module: nn.Module) -> None:
        """Fold this delta into `module`, which must be a copy of the frozen module."""
        raise NotImplementedError(f"{self.kind} cannot be merged: {self.cannot_merge}")

    def canonical(self) -> Self:
        """An equal delta in the form that packs best: scales folded in, widths rounded up."""
        return self

    def served(self) -> Self:
        """The canonical form without what only training does: no dropout."""
        return self.canonical()

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are set, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def settings(self) -> tuple[Any, ...]:
        """Everything else that makes two deltas able to share one batched product; hashable."""
        found = ((f.name, getattr(self, f.name)) for f in fields(self))
        return tuple((name, None if isinstance(v, Tensor) else v) for name, v in found)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """A copy with these tensor fields; skips the checks of a fresh instance, since plans make many of them."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, **tensors)
        return copied

    def map(self, function: Any) -> Self:
        """A copy with `function` applied to every tensor field."""
        return replace(self, **{name: function(t) for name, t in self.tensors().items()})


def weight_of(module: nn.Module, name: str) -> Tensor:
    """A frozen module's parameter, typed; `bias` may be missing."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"the frozen {type(module).__name__} has no {name} to merge into")
    return tensor


def round_up_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`; widths rounded so share one batched product."""
    return 1 << max(0, n - 1).bit_length()
