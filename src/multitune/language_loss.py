"""How likely a language model finds given tokens; logits are made for these tokens only.

Legend: B rows, T tokens, D width, N tokens that count, V words, K words of a distribution that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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

    def piece(states_N: Tensor, wanted_N: Tensor) -> Tensor:
        return F.cross_entropy(head(states_N).float(), wanted_N, reduction="none", label_smoothing=label_smoothing)

    return _by_piece(head, piece, states, wanted)


def _by_piece(head: AnyLanguageHead, piece: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`piece(*tensors)`, whose logits are too many at once where the tensors, each of N rows, are long."""
    step = max(1, MOST_LOGITS // head.weight.shape[0])
    if len(tensors[0]) <= step:
        return piece(*tensors)
    parts = zip(*(t.split(step) for t in tensors), strict=True)
    # A piece draws no random numbers. Setting them again as it is recomputed would set them for all threads.
    return torch.cat([checkpoint(piece, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def likeliest_words(head: LanguageHead, hidden: Tensor, targets: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """What a teacher says at every token that counts: its likeliest words, all others as one.

    Args:
        hidden, targets: as `token_losses` takes them.
        num_words: K, most words to keep of each distribution.

    Returns:
        The words int64 `[N, K]`, and float32 `[N, K + 1]` their log-probabilities and behind them that of all other
        words together; `[N, V]` both where the head has at most K words. No gradient.
    """
    kept = min(num_words, head.weight.shape[0])
    step = max(1, MOST_LOGITS // head.weight.shape[0])
    words: list[Tensor] = []
    shares: list[Tensor] = []
    with torch.no_grad():
        for part in hidden[:, :-1][targets[:, 1:] != IGNORED].split(step):
            logits = head(part).float()
            words.append(logits.topk(kept).indices)
            shares.append(_shares(logits, words[-1]))
    return torch.cat(words), torch.cat(shares)


def distilled_losses(
    head: LanguageHead,
    hidden: Tensor,
    targets: Tensor,
    words: Tensor,
    taught: Tensor,
    weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """How far the tokens that count are from a teacher's distributions, and from the tokens themselves.

    Semantics: for every such token `weight * Σ_w p_T(w) (log p_T(w) - log p_S(w)) + (1 - weight) * cross-entropy`,
    where w is one of the K words or the rest, and `p_S` the softmax of `token_losses`' logits.

    Args:
        hidden, targets, label_smoothing: as `token_losses` takes them.
        words, taught: int64 `[N, K]` and float32 `[N, K + 1]` or `[N, V]`, as `likeliest_words` gives them.

    Returns:
        float32 `[N]`, row after row; differentiable.
    """
    counts = targets[:, 1:] != IGNORED

    def piece(states_ND: Tensor, wanted_N: Tensor, words_NK: Tensor, taught_NK: Tensor) -> Tensor:
        logits = head(states_ND).float()
        away = F.kl_div(_shares(logits, words_NK), taught_NK, reduction="none", log_target=True).sum(-1)
        if weight == 1:
            return away
        own = F.cross_entropy(logits, wanted_N, reduction="none", label_smoothing=label_smoothing)
        return weight * away + (1 - weight) * own

    return _by_piece(head, piece, hidden[:, :-1][counts], targets[:, 1:][counts], words, taught)


def _shares(logits: Tensor, words: Tensor) -> Tensor:
    """Log-probabilities of words `[N, K]` under logits `[N, V]`, and of all others together.

    Returns:
        `[N, K + 1]`; `[N, V]` where there are no others.
    """
    shares = logits.gather(1, words)
    if words.shape[1] < logits.shape[1]:
        # Summed, and not what the words leave of one: where the others are unlikely, rounding would leave nothing.
        others = logits.scatter(1, words, -math.inf).logsumexp(1, keepdim=True)
        shares = torch.cat([shares, others], dim=1)
    return shares - logits.logsumexp(1, keepdim=True)


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
