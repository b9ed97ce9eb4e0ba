"""Which token comes next: every row by its own settings and its own random numbers.   Legend: B rows, V vocabulary.

The steps and their order are transformers': penalty, temperature, top k, top p. Its processors have one setting for a
whole batch, and draw for all rows from one generator, so that a row's text would depend on the rows beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multitune.generation.settings import GenerationSettings


@dataclass
class Chooser:
    """One row's way to choose, and what it has seen."""

    settings: GenerationSettings
    seen: set[int]
    """Tokens of the prompt and the text so far."""
    generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        seed = self.settings.seed
        self.generator = random.Random(random.SystemRandom().getrandbits(63) if seed is None else seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the one, without more."""
        return not self.settings.samples and self.settings.repetition_penalty == 1


def penalise(scores: Tensor, seen: set[int], penalty: float) -> Tensor:
    """`scores [V]` with those of tokens seen before divided by the penalty, or multiplied where negative."""
    index = torch.tensor(sorted(seen), device=scores.device)
    old = scores[index]
    return scores.index_copy(0, index, torch.where(old < 0, old * penalty, old / penalty))


def choose(logits: Tensor, choosers: Sequence[Chooser], want_logprobs: bool) -> tuple[list[int], list[float]]:
    """The next token of every row, and its log-probability under the model.

    Args:
        logits: float32 `[B, V]`.
        want_logprobs: whether any row asks for log-probabilities; without them, those returned are the scores.

    Returns:
        Tokens, and log-probabilities; what is no number for a row whose scores are none.
    """
    special = [i for i, c in enumerate(choosers) if not c.plain]
    best = logits.argmax(-1)
    if special:
        drawn = _choose_special(logits[special], [choosers[i] for i in special])
        best[torch.tensor(special, device=best.device)] = drawn
    scores = logits.gather(1, best[:, None])[:, 0]
    if want_logprobs:
        scores = scores - logits.logsumexp(-1)
    # A NaN anywhere in a row is its largest value, and so are infinities; a sum shows either.
    finite = torch.stack([scores, logits.amax(-1)]).sum(0)
    return best.tolist(), torch.where(finite.isfinite(), scores, torch.nan).tolist()


def _choose_special(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """`[R]` tokens of the rows `logits [R, V]` that draw or have a penalty."""
    penalised = [c.settings.repetition_penalty != 1 for c in choosers]
    if any(penalised):
        logits = torch.stack(
            [
                penalise(row, c.seen, c.settings.repetition_penalty) if c.settings.repetition_penalty != 1 else row
                for row, c in zip(logits, choosers, strict=True)
            ]
        )
    tokens = logits.argmax(-1)
    drawing = [i for i, c in enumerate(choosers) if c.settings.samples]
    if drawing:
        index = torch.tensor(drawing, device=logits.device)
        tokens[index] = _draw(logits[index], [choosers[i] for i in drawing])
    return tokens


def _draw(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """`[R]` tokens drawn from `logits [R, V]`, by the inverse of the distribution at one number per row."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float64)[:, None]

    settings = [c.settings for c in choosers]
    uniform = column([c.generator.random() for c in choosers])
    # Below the largest, so that no temperature is too low for a float: the likeliest token is at 0, others at -inf.
    scores = ((logits - logits.amax(-1, keepdim=True)) / column([s.temperature for s in settings])).float()
    if any(s.top_k for s in settings):
        most = scores.shape[1]
        kth = torch.tensor([min(s.top_k or most, most) - 1 for s in settings], device=logits.device)[:, None]
        ranked = scores.topk(int(kth.max()) + 1, dim=-1).values
        scores = scores.masked_fill(scores < ranked.gather(1, kth), -torch.inf)
    if any(s.top_p < 1 for s in settings):
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        probability = ranked.softmax(-1)
        before = probability.cumsum(-1) - probability
        outside = before >= column([s.top_p if s.top_p < 1 else 2.0 for s in settings])
        outside[:, 0] = False
        scores = scores.masked_fill(outside.gather(1, order.argsort(-1)), -torch.inf)
    total = scores.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(total, uniform * total[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)
