"""How likely a language model finds given tokens; logits are made for these tokens only.

Legend: B rows, T tokens, D width, N tokens that count, V words.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from multitune.language_head import AnyLanguageHead, LanguageHead

#: Token that no loss counts.
IGNORED = -100

#: Logits made at once, `N V`: half a gigabyte in float32. Beyond it they are made piece by piece, and made again in
#: the backward pass.
MOST_LOGITS = 2**27


def token_losses(head: LanguageHead, hidden: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihoods of the tokens that count.

    Semantics: for every `targets[b, t]` that is not `IGNORED`, the cross-entropy of `head(hidden[b, t - 1])` with it.

    Args:
        hidden: last hidden states `[B, T, D]`.
        targets: int64 `[B, T]`, the row's own token ids where they count, and elsewhere `IGNORED`; the first token of
            a row never counts, since nothing predicts it.
        label_smoothing: share of the target's weight that goes to all words alike.

    Returns:
        float32 `[N]`, row after row; differentiable.
    """
    counts = targets[:, 1:] != IGNORED
    return losses_of(head, hidden[:, :-1][counts], targets[:, 1:][counts], label_smoothing)


def losses_of(head: AnyLanguageHead, states: Tensor, wanted: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihoods of tokens, each under the logits of a state.

    Args:
        states: last hidden states `[N, D]`.
        wanted: int64 `[N]`, the tokens.
        label_smoothing: as `token_losses` takes it.

    Returns:
        float32 `[N]`; differentiable.
    """
    step = max(1, MOST_LOGITS // head.weight.shape[0])

    def piece(states_N: Tensor, wanted_N: Tensor) -> Tensor:
        return F.cross_entropy(head(states_N).float(), wanted_N, reduction="none", label_smoothing=label_smoothing)

    if len(wanted) <= step:
        return piece(states, wanted)
    parts = zip(states.split(step), wanted.split(step), strict=True)
    return torch.cat([checkpoint(piece, s, w, use_reentrant=False) for s, w in parts])


def per_row(losses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses `[N]` of `token_losses`, summed by row.

    Returns:
        Sums float32 `[B]`, and how many tokens each row's sum is of, int64 `[B]`.
    """
    counts = targets[:, 1:] != IGNORED
    row = counts.nonzero()[:, 0]
    sums = torch.zeros(len(targets), dtype=losses.dtype, device=losses.device)
    return sums.index_add(0, row, losses), counts.sum(1)


def perplexity_of(loss: float) -> dict[str, float]:
    """Mean loss per token, and perplexity, which is e to that power."""
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
