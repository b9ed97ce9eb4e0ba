"""LSG attention block by block: no query ever meets all keys, but for the few global ones.

Condevaux and Harispe 2023, *LSG Attention*, arXiv 2210.15497, section 3. A block of b queries sees the global tokens,
its own block and its two neighbours, and s keys on each side from the reduced tokens beyond them (`lsg_sparse`). A
memory is global: every query sees it, those of the global tokens too.

Legend: B rows, H heads, G global tokens, M memory entries, T tokens, N blocks, b tokens of a block, s sparse keys a
side, R reduced keys of a block, S keys that a block of queries sees, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from multitune.lsg import LSG
from multitune.lsg_sparse import Reduction, Tokens, reduce

#: Dense attention: query `[B, H, Q, K]`, key and value `[B, H, S, K]`, mask added to the scores; `[B, Q, H, K]`.
Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
#: Keys and values `[B, H, M, K]`, and which of them are open `[B, M]`; `None` where all are.
Memories = tuple[Tensor, Tensor, Tensor | None]


def lsg_attention(
    dense: Dense,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_open: Tensor,
    lsg: LSG,
    layer: int,
    memory: Memories | None = None,
) -> Tensor:
    """Attention of G global tokens and T others behind them.

    Args:
        dense: the model's own attention over given keys.
        query, key, value: `[B, H, G + T, K]`.
        is_open: bool `[B, T]`, which tokens may be attended to.
        layer: which layer's random projections to use, for `lsh`.
        memory: what stands in front of the global tokens.

    Returns:
        `[B, G + T, H, K]`.
    """
    front, tokens = _split(key, value, is_open, lsg.num_global, memory)
    if is_open.shape[1] <= 2 * lsg.block:  # every token is a neighbour: full attention
        return _dense(dense, query, _join(front, tokens))
    first, rest = query[:, :, : lsg.num_global], query[:, :, lsg.num_global :]
    out = _blocks(dense, rest, front, tokens, lsg, layer)
    if not lsg.num_global:
        return out
    return torch.cat([_dense(dense, first, _join(front, tokens)), out], dim=1)


def _split(
    key: Tensor, value: Tensor, is_open: Tensor, num_global: int, memory: Memories | None
) -> tuple[Tokens, Tokens]:
    """What every query sees (memory and global tokens), and the other tokens."""
    keys, values = key[:, :, :num_global], value[:, :, :num_global]
    seen = is_open.new_ones(len(key), num_global)
    if memory is not None:
        keys = torch.cat([memory[0].to(key.dtype), keys], dim=2)
        values = torch.cat([memory[1].to(value.dtype), values], dim=2)
        first = seen.new_ones(len(key), memory[0].shape[2]) if memory[2] is None else memory[2] > 0
        seen = torch.cat([first, seen], dim=1)
    tokens = Tokens(key[:, :, num_global:], value[:, :, num_global:], is_open[:, None])
    return Tokens(keys, values, seen[:, None]), tokens


def _join(front: Tokens, tokens: Tokens) -> Tokens:
    return Tokens(
        torch.cat([front.keys, tokens.keys], dim=2),
        torch.cat([front.values, tokens.values], dim=2),
        torch.cat([front.is_open, tokens.is_open], dim=2),
    )


def _dense(dense: Dense, query: Tensor, seen: Tokens) -> Tensor:
    is_full = not torch.compiler.is_compiling() and bool(seen.is_open.all())  # a compiler cannot look at values
    mask = None if is_full else _additive(seen.is_open, query.dtype)
    return dense(query, seen.keys, seen.values, mask)


def _additive(is_open: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, H or 1, S]` as a mask `[B, H or 1, 1, S]` to add to scores.

    Closed is the least number, not -inf: a block of padding may see no open key, and its states must stay finite.
    Some models take the softmax in float32, where float64's least number is -inf.
    """
    least = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
    return torch.zeros(is_open.shape, dtype=dtype, device=is_open.device).masked_fill(~is_open, least).unsqueeze(2)


def _blocks(dense: Dense, query: Tensor, front: Tokens, tokens: Tokens, lsg: LSG, layer: int) -> Tensor:
    """Attention of the queries `[B, H, T, K]` behind the global ones, as N rows of blocks for each row."""
    rows, length = query.shape[0], query.shape[2]
    block = lsg.block
    count = -(-length // block)
    fill = count * block - length
    query = F.pad(query, (0, 0, 0, fill))
    tokens = Tokens(
        F.pad(tokens.keys, (0, 0, 0, fill)),
        F.pad(tokens.values, (0, 0, 0, fill)),
        F.pad(tokens.is_open, (0, fill)),
    )
    pieces = [(tokens, -block, 3 * block, block)]
    if lsg.has_sparse:
        how = Reduction(block, lsg.sparsity, lsg.seed_of(layer))
        reduced, step = reduce(lsg.kind, tokens, how), how.kept
        pieces += [(reduced, -step - lsg.sparse, lsg.sparse, step), (reduced, 2 * step, lsg.sparse, step)]

    def seen(of: str) -> Tensor:
        windows = [getattr(front, of).unsqueeze(2).expand(-1, -1, count, *getattr(front, of).shape[2:])]
        windows += [_windows(getattr(t, of), start, size, step, count) for t, start, size, step in pieces]
        return _together(windows)

    keys, values, is_open = seen("keys"), seen("values"), seen("is_open")
    own = query.unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1)
    out = dense(own, keys, values, _additive(is_open, query.dtype))  # [B * N, b, H, K]
    return out.unflatten(0, (rows, count)).flatten(1, 2)[:, :length]


def _windows(t: Tensor, start: int, size: int, step: int, count: int) -> Tensor:
    """`t [B, H, n, ...]` to `[B, H, count, size, ...]`: window i begins at `start + i * step`.

    Zeros where there is no t. A view of one padded copy.
    """
    t = t[:, :, max(start, 0) :]
    before = max(-start, 0)
    after = max((count - 1) * step + size - before - t.shape[2], 0)
    rest = (0, 0) * (t.ndim - 3)
    windows = F.pad(t, (*rest, before, after)).unfold(2, size, step)[:, :, :count]
    return windows if t.ndim == 3 else windows.movedim(-1, 3)


def _together(windows: list[Tensor]) -> Tensor:
    """Windows `[B, H, N, n_i, ...]` side by side, as `[B * N, H, S, ...]`."""
    heads = max(w.shape[1] for w in windows)
    same = [w.expand(-1, heads, *w.shape[2:]) for w in windows]
    return torch.cat([w.transpose(1, 2) for w in same], dim=3).flatten(0, 1)
