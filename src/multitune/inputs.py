"""What one forward pass reads, as tensors.   Legend: B sequences, T tokens of the longest, S slots, U tokens of the
longest text that a decoder reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded sequences."""

    input_ids: Tensor
    """int64 `[B, T]`"""
    attention_mask: Tensor | None = None
    """int64 `[B, T]`, 1 for real tokens; `None` when nothing is padded."""
    token_type_ids: Tensor | None = None
    """int64 `[B, T]` or `None`; ignored by models without token types."""
    slots: Tensor | None = None
    """int64 `[B, S]`: the token in front of which each slot of a row stands, counted from the row's first real token;
    -1 where a row has fewer; `None` where no row has any. Needed by prompts that stand in slots."""

    decoder_input_ids: Tensor | None = None
    """Encoder-decoders: int64 `[B, U]`, what the decoder reads, padded on the right (its tokens see no later ones)."""

    pieces: Tensor | None = None
    """Causal backbones, rows that are padded on the right: int64 `[B, T]`, for each token the number of the text of its
    row that it belongs to, which never falls along a row. A text sees nothing of the others, and its positions count
    from 0. `None` where every row is one text."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor replaced."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in own.items() if t is not None})

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self.map(lambda t: t.to(device))

    def rows(self, index: Tensor | list[int]) -> Batch:
        """Some of its rows, in the order given."""
        return self.map(lambda t: t[index])
