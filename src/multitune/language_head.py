"""The head of a language model: last hidden states to logits over the vocabulary.   Legend: D width, V words.

It stands beside the backbone's model and never in it, so that adapters of every kind see the same frozen model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LanguageHead:
    """Logits `[..., V]` from the backbone's last hidden states `[..., D]`, as transformers' own model computes them.

    A tied head reads the word embeddings where they are and keeps no weights of its own.
    """

    def __init__(
        self,
        linear: nn.Linear | None,
        embeddings: Callable[[], Tensor],
        softcap: float | None,
        scale: float = 1.0,
        bias: Tensor | None = None,
    ) -> None:
        """
        Args:
            linear: an untied head's own map, or `None` for one that is tied to the word embeddings.
            embeddings: gives the word embeddings `[V, D]` as they are now.
            softcap: logits are `softcap * tanh(logits / softcap)`; `None` leaves them.
            scale: hidden states are multiplied by it first.
            bias: `[1, V]`, added to the logits of a model that keeps it beside its head.
        """
        self.linear = linear
        self.softcap = softcap
        self.scale = scale
        self.bias = bias
        self._embeddings = embeddings
        if linear is not None:
            linear.requires_grad_(False)

    @property
    def tied(self) -> bool:
        """Whether it shares the word embeddings."""
        return self.linear is None

    @property
    def weight(self) -> Tensor:
        """`[V, D]`."""
        return self._embeddings() if self.linear is None else self.linear.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` for last hidden states `hidden [..., D]`, in their dtype; differentiable."""
        hidden = hidden if self.scale == 1 else hidden * self.scale
        logits = F.linear(hidden, self.weight, None if self.linear is None else self.linear.bias)
        if self.bias is not None:
            logits = logits + self.bias.to(logits)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class MaskedHead:
    """Logits `[..., V]` of a masked language model from its last hidden states `[..., D]`, as transformers' own has it.

    The modules are the model's own. Where the last one is tied to the word embeddings, it is with the very tensor of
    the backbone, so that it follows when they are trained.
    """

    def __init__(self, modules: Sequence[nn.Module], output: nn.Linear) -> None:
        """
        Args:
            modules: applied one after the other.
            output: the one, or the part of one, that gives the logits.
        """
        self.modules = nn.ModuleList(modules).eval().requires_grad_(False)
        self.output = output

    @property
    def weight(self) -> Tensor:
        """`[V, D]`, or as wide as the words are embedded."""
        return self.output.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` for last hidden states `hidden [..., D]`, in their dtype; differentiable."""
        for module in self.modules:
            hidden = module(hidden)
        return hidden


AnyLanguageHead = LanguageHead | MaskedHead
