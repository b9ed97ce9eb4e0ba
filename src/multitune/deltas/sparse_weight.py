"""`SparseWeight`: y += x ΔWᵀ with few entries of ΔW not zero.   Legend: I in, O out, N entries, G slots, M rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multitune.deltas.base import Delta, weight_of
from multitune.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseWeight(Delta):
    """A sparse update of a linear map, as values and places (SIFT, Song et al. 2024, arXiv 2312.11875).

    Semantics, one row `x [T, I]`, `y [T, O]`:  `y[:, i // I] += scale * x[:, i % I] * v` for each `v, i` of
    `values, indices`

    Time and memory grow with N; no `[O, I]` matrix is ever made, in the backward pass neither.
    """

    kind: ClassVar[str] = "SparseWeight"
    site_kind: ClassVar[str] = "linear"

    values: Tensor
    """`[N]`"""
    indices: Tensor
    """int32 or int64 `[N]`, ascending: places in the weight `[O, I]`, counted row by row. Places that are there
    twice add up."""
    shape: tuple[int, int]
    """`(O, I)` of the weight."""
    scale: float = 1.0
    """The update is multiplied by this."""

    def apply(self, x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
        values = self._scaled().to(y.dtype)
        slots = values.shape[0] if values.ndim == 3 else 1
        grouped = x.to(y.dtype).reshape(slots, -1, self.shape[1])
        update: Tensor = _Product.apply(
            grouped, values.reshape(slots, -1), self.indices.reshape(slots, -1), self.shape[0]
        )
        update = update.view(y.shape)
        return y + update if torch.is_grad_enabled() else y.add_(update)

    def merge(self, module: nn.Module) -> None:
        weight = weight_of(module, "weight")
        indices = self.indices.long()
        places = (indices // self.shape[1], indices % self.shape[1])
        weight.index_put_(places, self._scaled().to(weight.dtype), accumulate=True)

    def _scaled(self) -> Tensor:
        return self.values if self.scale == 1.0 else self.values * self.scale

    def settings(self) -> tuple[Any, ...]:
        return (self.scale,)  # sites of any shape share one pack: the site itself says which shape it has

    def canonical(self) -> Self:
        pad = _round_up(self.values.shape[0]) - self.values.shape[0]
        # Zeros at place 0, in front, so that the places stay in order.
        values, indices = F.pad(self._scaled(), (pad, 0)), F.pad(self.indices.int(), (pad, 0))
        return replace(self, values=values, indices=indices, scale=1.0)

    def served(self) -> Self:
        """The canonical form.

        Raises:
            ConfigError: places outside the weight, or not in ascending order.
        """
        check_places(self.indices, self.shape)
        return self.canonical()


def check_places(indices: Tensor, shape: tuple[int, int]) -> None:
    """Raise `ConfigError` unless `indices [N]` are ascending places of a weight of this shape."""
    if not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= shape[0] * shape[1]:
        raise ConfigError(
            f"a sparse update has the place {low if low < 0 else high}, but its weight of shape {shape} has the "
            f"places 0 to {shape[0] * shape[1] - 1}; the adapter's indices are damaged or of another backbone"
        )
    if bool((indices[1:] < indices[:-1]).any()):
        raise ConfigError("the places of a sparse update must be in ascending order; sort indices and values together")


def _round_up(count: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: near counts share one product, a quarter at most
    is padding."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


class _Product(torch.autograd.Function):
    """`x [G, M, I]`, `values [G, N]` and ascending `indices [G, N]` to the update `[G, M, O]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.out_features = out_features
        rows, columns = _places(indices, out_features, x.shape[2])
        return _by_slot(_sums(_turned(x), columns, values.reshape(-1), rows, len(x) * out_features), len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, indices = ctx.saved_tensors
        slots, _, in_features = x.shape
        rows, columns = _places(indices, ctx.out_features, in_features)
        turned, flat = _turned(gradients[0]), values.reshape(-1)
        of_x = of_values = None
        if ctx.needs_input_grad[0]:  # the product with ΔW itself: the same sums, ordered by column
            order = columns.argsort(stable=True)
            of_x = _by_slot(_sums(turned, rows[order], flat[order], columns[order], slots * in_features), slots)
        if ctx.needs_input_grad[1]:  # dot products of two rows of activations each, only where there are entries
            with torch.enable_grad():
                flat = flat.detach().requires_grad_()
                sums = _sums(_turned(x), columns, flat, rows, slots * ctx.out_features)
            (of_values,) = torch.autograd.grad(sums, flat, turned)
            of_values = of_values.view(values.shape)
        return of_x, of_values, None, None


def _places(indices: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Rows and columns `[G*N]` of the block-diagonal matrix of all slots' updates."""
    indices = indices.long()
    slot = torch.arange(len(indices), device=indices.device)[:, None]
    rows = indices.div(in_features, rounding_mode="floor")
    columns = indices - rows * in_features
    return (rows + slot * out_features).view(-1), (columns + slot * in_features).view(-1)


def _turned(x: Tensor) -> Tensor:
    """`[G, M, F]` to `[G*F, M]`."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def _by_slot(turned: Tensor, slots: int) -> Tensor:
    """`[G*F, M]` to `[G, M, F]`."""
    return turned.view(slots, -1, turned.shape[1]).transpose(1, 2).contiguous()


def _sums(table: Tensor, take: Tensor, weights: Tensor, into: Tensor, count: int) -> Tensor:
    """`out[into[n]] += weights[n] * table[take[n]]`, `[count, M]`, for ascending `into`.

    A bag of weighted embeddings is a sparse matrix product; its kernel makes no `[N, M]` in between.
    """
    starts = torch.searchsorted(into, torch.arange(count, device=into.device))
    return F.embedding_bag(take, table, starts, mode="sum", per_sample_weights=weights)
