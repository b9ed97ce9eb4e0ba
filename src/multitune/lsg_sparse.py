"""LSG's sparse keys: every run of tokens reduced by a factor, for each head on its own.

Condevaux and Harispe 2023, *LSG Attention*, arXiv 2210.15497, section 3.2. A selection sees a row's keys and values in
blocks and which of them are open; it leaves R = b / ρ keys of each block, in the blocks' order.

Legend: B rows, H heads, N blocks, b tokens of a block, ρ factor, R = b / ρ, C = N * b tokens, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Keys and values of some rows, and which of them may be attended to."""

    keys: Tensor
    """`[B, H, C, K]`"""
    values: Tensor
    """`[B, H, C, K]`"""
    is_open: Tensor
    """bool `[B, H, C]`, or `[B, 1, C]` where the heads do not differ."""


@dataclass(frozen=True)
class Reduction:
    """By how much tokens are reduced."""

    block: int
    """Tokens of a block, b."""
    factor: int
    """ρ, which divides b."""
    seed: int = 0
    """`lsh`: where its projections are drawn from."""

    @property
    def kept(self) -> int:
        """Keys left of each block, R."""
        return self.block // self.factor


def reduce(kind: str, tokens: Tokens, how: Reduction) -> Tokens:
    """`tokens` with C = N * b entries reduced to N * R.

    Args:
        kind: one of `KINDS`.
    """
    return tokens if how.factor == 1 else KINDS[kind](tokens, how)


def _take(tokens: Tokens, index: Tensor) -> Tokens:
    """The tokens at `index [B or 1, H, n]`."""
    rows, heads, _, width = tokens.keys.shape
    index = index.expand(rows, heads, -1)
    wide = index.unsqueeze(-1).expand(-1, -1, -1, width)
    is_open = tokens.is_open.expand(-1, heads, -1).gather(2, index)
    return Tokens(tokens.keys.gather(2, wide), tokens.values.gather(2, wide), is_open)


def _norm(tokens: Tokens, how: Reduction) -> Tokens:
    """Of each block, the R open keys of largest Euclidean norm; no gradient passes through the choice."""
    with torch.no_grad():
        norms = tokens.keys.norm(dim=-1).masked_fill(~tokens.is_open, -1.0).unflatten(2, (-1, how.block))
        chosen = norms.topk(how.kept, dim=-1).indices.sort(dim=-1).values  # in the order of the text
        start = torch.arange(norms.shape[2], device=norms.device) * how.block
        index = (chosen + start[:, None]).flatten(2)
    return _take(tokens, index)


def _pooling(tokens: Tokens, how: Reduction) -> Tokens:
    """The mean of each ρ consecutive keys, and of their values, over those that are open."""
    is_open = tokens.is_open.unflatten(2, (-1, how.factor))
    count = is_open.sum(-1, keepdim=True).clamp(min=1)

    def mean(t: Tensor) -> Tensor:
        return t.unflatten(2, (-1, how.factor)).masked_fill(~is_open.unsqueeze(-1), 0).sum(3) / count

    return Tokens(mean(tokens.keys), mean(tokens.values), is_open.any(-1))


def _stride(tokens: Tokens, how: Reduction) -> Tokens:
    """Head j takes the positions that are j modulo ρ."""
    heads, device = tokens.keys.shape[1], tokens.keys.device
    first = torch.arange(heads, device=device) % how.factor
    index = torch.arange(0, tokens.keys.shape[2], how.factor, device=device) + first[:, None]
    return _take(tokens, index.unsqueeze(0))


def _block_stride(tokens: Tokens, how: Reduction) -> Tokens:
    """Head j takes R consecutive positions of each block, from j * R modulo b on."""
    heads, device = tokens.keys.shape[1], tokens.keys.device
    first = torch.arange(heads, device=device) * how.kept % how.block
    inside = first[:, None, None] + torch.arange(how.kept, device=device)
    start = torch.arange(0, tokens.keys.shape[2], how.block, device=device)[:, None]
    return _take(tokens, (inside + start).flatten(1).unsqueeze(0))


def _lsh(tokens: Tokens, how: Reduction) -> Tokens:
    """Keys of one bucket averaged, and their values: bucket argmax([P k; -P k]), P random, R buckets a block."""
    keys, values = (t.unflatten(2, (-1, how.block)) for t in (tokens.keys, tokens.values))
    is_open = tokens.is_open.unflatten(2, (-1, how.block)).expand(keys.shape[:-1])
    with torch.no_grad():
        projection = lsh_projection(keys.shape[1], keys.shape[-1], how).to(keys)
        sides = F.normalize(keys, dim=-1) @ projection[:, None]
        bucket = torch.cat([sides, -sides], dim=-1).argmax(-1)
        member = (bucket[..., None] == torch.arange(how.kept, device=keys.device)) & is_open[..., None]
        member = member.transpose(-1, -2)  # [B, H, N, R, b]
        count = member.sum(-1, keepdim=True)
        weights = member.to(keys.dtype) / count.clamp(min=1)
    closed = ~is_open.unsqueeze(-1)

    def mean(t: Tensor) -> Tensor:
        return (weights @ t.masked_fill(closed, 0)).flatten(2, 3)

    return Tokens(mean(keys), mean(values), (count > 0).flatten(2))


def lsh_projection(heads: int, width: int, how: Reduction) -> Tensor:
    """Random projections P `[H, K, R / 2]` of every head, float32 on the CPU; the same for the same seed."""
    generator = torch.Generator().manual_seed(how.seed)
    return torch.randn(heads, width, how.kept // 2, generator=generator)


#: Kind -> how it reduces.
KINDS: dict[str, Callable[[Tokens, Reduction], Tokens]] = {
    "norm": _norm,
    "pooling": _pooling,
    "lsh": _lsh,
    "stride": _stride,
    "block_stride": _block_stride,
}
