"""One request while it is decoded: a row that chooses token after token, or the beams of a beam search.

Legend: R the rows of the batch that belong to the request (1, or its beams), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multitune.generation.sampling import Chooser, penalise
from multitune.generation.settings import FinishReason, Generation, GenerationSettings
from multitune.generation.text import TextStream
from multitune.plan import DeltaSet

#: Scores of what cannot be chosen; a number, so that sums stay numbers.
_NEVER = -1.0e9


@dataclass(eq=False)
class Decoded:
    """What both kinds share."""

    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    deltas: DeltaSet | None
    """The adapter's deltas; `None` for the bare backbone."""
    settings: GenerationSettings
    eos_ids: frozenset[int]
    """Token ids that end the text."""
    stream: TextStream
    adapter: str | None = None
    finish_reason: FinishReason | None = None
    stop_ids: frozenset[int] = frozenset()
    """Special tokens among the stop strings."""
    before: tuple[int, ...] | None = None
    """Encoder-decoders: token ids in front of the text, where the prompt is not."""

    @property
    def seen(self) -> set[int]:
        """Token ids in front of the text, which the repetition penalty counts."""
        return set(self.prompt if self.before is None else self.before)

    @property
    def num_rows(self) -> int:
        """Rows of the batch that it takes, R."""
        return self.settings.num_beams

    @property
    def num_positions(self) -> int:
        """Positions a row of it takes at most: prompt, inserted vectors, and all it may generate."""
        beside = 0 if self.deltas is None else self.deltas.num_positions
        return len(self.prompt) + beside + self.settings.max_new_tokens

    def _reason(self, tokens: Sequence[int]) -> FinishReason | None:
        """Why a text of these tokens is at its end, if it is."""
        if self.settings.stop_at_eos and tokens[-1] in self.eos_ids:
            return "eos"
        if tokens[-1] in self.stop_ids or self.stream.stopped(tokens, grows=self.num_rows == 1):
            return "stop"
        return "length" if len(tokens) >= self.settings.max_new_tokens else None

    def _result(self, tokens: Sequence[int], logprobs: Sequence[float], score: float | None) -> Generation:
        assert self.finish_reason is not None
        return Generation(
            text=self.stream.text(tokens),
            token_ids=tuple(tokens),
            finish_reason=self.finish_reason,
            adapter=self.adapter,
            num_prompt_tokens=len(self.prompt),
            logprobs=tuple(logprobs) if self.settings.logprobs else None,
            score=score,
        )


@dataclass(eq=False)
class SingleSequence(Decoded):
    """One row, greedy or sampled."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    chooser: Chooser = field(init=False)

    def __post_init__(self) -> None:
        self.chooser = Chooser(self.settings, self.seen)

    def push(self, token: int, logprob: float) -> None:
        """Take the next token, whose log-probability is no number if the row's scores were none."""
        if math.isnan(logprob):
            self.finish_reason = "not_finite"
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.chooser.seen.add(token)
        self.finish_reason = self._reason(self.tokens)

    def piece(self) -> str:
        """Text that came since the last call and will not change."""
        return self.stream.piece(self.tokens, last=self.finish_reason is not None)

    def result(self) -> Generation:
        """What was generated; once it is finished."""
        return self._result(self.tokens, self.logprobs, None)


@dataclass(frozen=True)
class _Beam:
    """A text that may go on, or is finished."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    """Log-probability; of a finished text, over its length to the power of the penalty."""
    reason: FinishReason | None = None
    source: int = 0
    """The row it goes on from."""


@dataclass(eq=False)
class BeamSequence(Decoded):
    """The beams of one request; transformers' beam search, in which a request never knows of others."""

    running: list[_Beam] = field(default_factory=list)
    finished: list[_Beam] = field(default_factory=list)
    open: bool = True
    """Whether a running beam may still become one of the best."""

    def __post_init__(self) -> None:
        self.running = [_Beam((), (), 0.0)]

    def push(self, logits: Tensor) -> None:
        """Take the next token of every beam from float32 `logits [R, V]`; at first `[1, V]`."""
        if not bool(logits.isfinite().all()):
            self.finish_reason = "not_finite"
            return
        candidates = self._candidates(logits)
        length = len(self.running[0].tokens) + 1
        wanted = self.settings.num_beams
        going = [b for b in candidates if b.reason is None][:wanted]
        self._keep_finished([b for b in candidates[:wanted] if b.reason is not None], length)
        done = not going
        if len(going) < wanted:  # as many rows as before, the spare ones without a chance
            spare = [b for b in candidates if b.reason is not None]
            going += [_Beam(b.tokens, b.logprobs, b.score + _NEVER, None, b.source) for b in spare][
                : wanted - len(going)
            ]
        self.running = going
        self._close(length)
        full = self.settings.early_stopping is True and len(self.finished) == wanted
        if done or not self.open or full:
            self.finish_reason = self.finished[0].reason if self.finished else "length"

    def _candidates(self, logits: Tensor) -> list[_Beam]:
        """The best continuations of all beams, best first: enough that `num_beams` of them go on."""
        logprobs = logits.log_softmax(-1)
        scores = logprobs
        if self.settings.repetition_penalty != 1:
            seen = [self.seen | set(b.tokens) for b in self.running]
            penalty = self.settings.repetition_penalty
            scores = torch.stack([penalise(row, s, penalty) for row, s in zip(scores, seen, strict=True)])
        so_far = torch.tensor([b.score for b in self.running], device=scores.device)
        total = (scores + so_far[:, None]).flatten()
        ends = (len(self.eos_ids) if self.settings.stop_at_eos else 0) + len(self.stop_ids)
        best = total.topk(min(max(2, 1 + ends) * self.settings.num_beams, len(total)))
        found = []
        own = logprobs.flatten()[best.indices]
        for score, index, chance in zip(best.values.tolist(), best.indices.tolist(), own.tolist(), strict=True):
            source, token = divmod(index, logits.shape[1])
            tokens = (*self.running[source].tokens, token)
            chances = (*self.running[source].logprobs, chance)
            found.append(_Beam(tokens, chances, score, self._reason(tokens), source))
        return found

    def _keep_finished(self, new: list[_Beam], length: int) -> None:
        if not self.open:
            return
        scored = [_Beam(b.tokens, b.logprobs, b.score / length**self.settings.length_penalty, b.reason) for b in new]
        # Stable, so that of equal scores the earlier text stays.
        self.finished = sorted(self.finished + scored, key=lambda b: -b.score)[: self.settings.num_beams]

    def _close(self, length: int) -> None:
        """Whether the best running beam could still do better than the worst finished one."""
        if len(self.finished) < self.settings.num_beams:
            return
        early, penalty = self.settings.early_stopping, self.settings.length_penalty
        hoped = self.settings.max_new_tokens if early == "never" and penalty > 0 else length
        self.open &= self.running[0].score / hoped**penalty > self.finished[-1].score

    def sources(self) -> list[int]:
        """For every beam that goes on, the row it goes on from."""
        return [b.source for b in self.running]

    def next_tokens(self) -> list[int]:
        """For every beam that goes on, its last token."""
        return [b.tokens[-1] for b in self.running]

    def _best(self) -> _Beam:
        return self.finished[0] if self.finished else self.running[0]

    def piece(self) -> str:
        """Nothing until it is finished, since the best beam may change; then all of the text."""
        if self.finish_reason is None:
            return ""
        return self.stream.piece(self._best().tokens, last=True)

    def result(self) -> Generation:
        """The best text; once it is finished."""
        best = self._best()
        return self._result(best.tokens, best.logprobs, best.score if self.finished else None)
