"""Answers as candidate texts: the three losses of T-Few (Liu et al. 2022, arXiv 2205.05638), and distillation.

Every choice of every row is one sequence, or several where several texts say it, the choices of a row side by side.
Nothing here runs a model: the functions take the log-probabilities of the candidates' tokens, so any language model can
be put in front.

Legend: R rows, C choices of all rows, S sequences (all texts of these; mostly C), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multitune.errors import ConfigError
from multitune.heads import IGNORED
from multitune.ranked import CHOICE, ROW, TEXT

#: What the released code adds inside the logarithm of the unlikelihood loss.
UNLIKELIHOOD_EPS = 0.01


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The choices of a batch, and what a language model says of their tokens."""

    log_probs: Tensor
    """`[S, T]`, float32: log p of every token given what stands before it."""
    mask: Tensor
    """bool `[S, T]`: which tokens are the candidate's own; not those of the text before it, and no padding."""
    counts: tuple[int, ...]
    """How many choices each of the R rows has; their sum is C."""
    texts: tuple[int, ...] = ()
    """How many sequences say each of the C choices; their sum is S. Empty where each has one."""

    def __post_init__(self) -> None:
        said = self.texts or (1,) * sum(self.counts)
        fits = len(said) == sum(self.counts) and sum(said) == len(self.mask) and min(*said, *self.counts) >= 1
        if self.log_probs.shape != self.mask.shape or not fits:
            raise ConfigError(
                f"log_probs {tuple(self.log_probs.shape)}, mask {tuple(self.mask.shape)}, counts {self.counts} and "
                f"texts {self.texts} do not fit: give one sequence for every choice, or as many as texts says, and "
                f"every row at least one"
            )
        empty = (~self.mask.bool()).all(1).nonzero().flatten().tolist()
        if empty:
            raise ConfigError(f"sequence {empty[0]} has no token of a candidate; give every choice a text")

    @classmethod
    def from_tokens(cls, log_probs: Tensor, index: Tensor) -> Candidates:
        """The choices from what `choice_log_probs` gives.

        Args:
            log_probs: float32 `[N]`: log p of every token of every choice.
            index: int64 `[N, 6]`, as `multitune.ranked.index_of` makes it: which row, text and choice each token is of.
        """
        said, lengths = index[:, [ROW, CHOICE, TEXT]].unique_consecutive(dim=0, return_counts=True)
        choices, texts = said[:, :2].unique_consecutive(dim=0, return_counts=True)
        counts = choices[:, 0].unique_consecutive(return_counts=True)[1]
        padded = pad_sequence(list(log_probs.split(lengths.tolist())), batch_first=True)
        places = torch.arange(padded.shape[1], device=padded.device)
        mask = places < lengths.to(padded.device).unsqueeze(1)
        several = tuple(texts.tolist()) if len(said) > len(choices) else ()
        return cls(log_probs=padded, mask=mask, counts=tuple(counts.tolist()), texts=several)

    @property
    def per_row(self) -> tuple[int, ...]:
        """How many sequences each row has."""
        said = iter(self.texts)
        return tuple(sum(islice(said, count)) for count in self.counts) if self.texts else self.counts

    @property
    def lengths(self) -> Tensor:
        """`[S]`, float32: tokens of each candidate."""
        return self.mask.sum(1).float()

    def scores(self) -> Tensor:
        """`[C]`: β = (1/T) Σ_t log p(y_t | x, y_<t); of a choice that several texts say, their mean."""
        each = self.log_probs.masked_fill(~self.mask, 0.0).sum(1) / self.lengths
        return torch.stack([of.mean() for of in each.split(self.texts)]) if self.texts else each

    def of_texts(self, values: Tensor) -> Tensor:
        """`values [C]` as `[S]`: every sequence's is its choice's."""
        return values.repeat_interleave(torch.tensor(self.texts, device=values.device)) if self.texts else values

    def by_row(self, values: Tensor) -> Tensor:
        """`values [C]` as `[R, most choices]`, -inf where a row has no such choice."""
        return pad_sequence(list(values.split(self.counts)), batch_first=True, padding_value=-torch.inf)

    def right(self, answers: Tensor) -> Tensor:
        """bool `[C]`: which are their rows' right choices.

        Args:
            answers: int64 `[R]`, the number of each row's right choice; or `[R, most choices]`, 1 for every right one,
                0 for the others, `IGNORED` where a row has no such choice.

        Raises:
            ConfigError: a row has no such choice, or none that is right.
        """
        counts = torch.tensor(self.counts, device=answers.device)
        fits = len(answers) == len(counts)
        if fits and answers.ndim == 2:
            given = (answers != IGNORED).sum(1)
            fits = bool((given == counts).all()) and bool((answers == 1).any(1).all())
        elif fits:
            fits = not bool(((answers < 0) | (answers >= counts)).any())
        if not fits:
            raise ConfigError(
                f"answers {answers.tolist()} do not fit rows of {list(self.counts)} choices, counted from 0"
            )
        if answers.ndim == 2:
            return answers[answers != IGNORED] == 1
        first = counts.cumsum(0) - counts
        none = torch.zeros(sum(self.counts), dtype=torch.bool, device=answers.device)
        return none.index_fill(0, first + answers, True)


def language_loss(candidates: Candidates, answers: Tensor) -> Tensor:
    """`L_LM = -(1/T) Σ_t log p(y_t | x, y_<t)` of the right choices, averaged over rows.

    Where several choices of a row are right, their mean.
    """
    right = candidates.right(answers)
    lost, share = (-candidates.scores()).masked_fill(~right, 0.0), right.float()
    sums, counts = (torch.stack([part.sum() for part in t.split(candidates.counts)]) for t in (lost, share))
    return (sums / counts).mean()


def unlikelihood_loss(candidates: Candidates, answers: Tensor, *, eps: float = UNLIKELIHOOD_EPS) -> Tensor:
    """`L_UL = -[Σ_n Σ_t log(1 - p(ŷ⁽ⁿ⁾_t | x, ŷ⁽ⁿ⁾_<t))] / Σ_n T⁽ⁿ⁾` over a row's wrong choices, averaged over rows.

    Args:
        eps: added inside the logarithm, as the released code does: finite where a token is certain. The loss of a token
            is then at least -log(1 + eps), a little below zero. 0 is the paper's equation.
    """
    if eps < 0:
        raise ConfigError(f"eps={eps} of the unlikelihood loss is not possible; give 0 or more")
    wrong = candidates.of_texts(~candidates.right(answers))
    # A certain token's p can round to just above one.
    surprise = -torch.log((1 - candidates.log_probs.exp()).clamp(min=0) + eps)
    each = surprise.masked_fill(~(candidates.mask & wrong.unsqueeze(1)), 0.0).sum(1)
    lengths = candidates.lengths * wrong
    total, tokens = (torch.stack([part.sum() for part in t.split(candidates.per_row)]) for t in (each, lengths))
    return (total / tokens.clamp(min=1)).mean()  # a row whose only choice is the right one has no wrong ones


def choice_loss(candidates: Candidates, answers: Tensor) -> Tensor:
    """`L_LN = -log(e^β(y) / Σ e^β)` over a row's choices, with length-normalised scores β, averaged over rows.

    Where several choices of a row are right, the probability is that which they have together.
    """
    scores = candidates.scores()
    right = scores.masked_fill(~candidates.right(answers), -torch.inf)
    return (candidates.by_row(scores).logsumexp(1) - candidates.by_row(right).logsumexp(1)).mean()


def distillation_loss(candidates: Candidates, teacher: Tensor) -> Tensor:
    """`KL(p_T ‖ p_S)` over a row's choices, averaged over rows (Askell et al. 2021, arXiv 2112.00861, section 2.1).

    Semantics: `Σ_c p_T(c) (log p_T(c) - log p_S(c))`, where `p_S = softmax(β)` of the candidates' scores.

    Args:
        teacher: float32 `[R, most choices]`: the teacher's scores β, -inf where a row has no such choice.
    """
    scores = candidates.by_row(candidates.scores())
    if scores.shape != teacher.shape:
        raise ConfigError(f"the teacher's scores {tuple(teacher.shape)} do not fit choices {tuple(scores.shape)}")
    wanted, found = teacher.log_softmax(-1), scores.log_softmax(-1)
    there = torch.isfinite(wanted)
    each = wanted.exp() * (wanted.masked_fill(~there, 0.0) - found.masked_fill(~there, 0.0))
    return each.sum(1).mean()


#: Part of `TrainConfig.losses` -> what it adds.
LOSSES: dict[str, Callable[[Candidates, Tensor], Tensor]] = {
    "language": language_loss,
    "unlikelihood": unlikelihood_loss,
    "choice": choice_loss,
}
