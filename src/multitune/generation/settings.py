"""How a row's text is generated, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from multitune.errors import ConfigError

FinishReason = Literal["eos", "stop", "length", "cancelled", "not_finite"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How one row is decoded; the rows of a batch may differ in all of it. By default greedy."""

    max_new_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn from `softmax(logits / temperature)`."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability (Holtzman et al. 2019, arXiv 1904.09751)."""
    repetition_penalty: float = 1.0
    """Scores of tokens in the prompt or the text so far: divided by it where positive, multiplied where negative
    (Keskar et al. 2019, arXiv 1909.05858)."""
    seed: int | None = None
    """Seed of the row's own random numbers: one seed and one prompt give one text, whatever else is in the batch.
    `None` takes another each time."""
    num_beams: int = 1
    """Beams of a beam search; 1 for none."""
    length_penalty: float = 1.0
    """Beam search: a text's score is its log-probability over its number of tokens to this power."""
    early_stopping: bool | Literal["never"] = False
    """Beam search: end with `num_beams` finished texts (true), when a better one is unlikely (false), or when none can
    be found any more ("never")."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, which goes up to the first of them."""
    stop_at_eos: bool = True
    """Whether the model's own end of text ends it."""
    logprobs: bool = False
    """Whether to give the log-probability of every token: under the model, before temperature, penalty and the rest."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.stop, Iterable):
            object.__setattr__(self, "stop", tuple(self.stop))
        number = (int, float)
        _check(self, "max_new_tokens", (int,), lambda n: n >= 1, "at least 1")
        _check(self, "temperature", number, lambda t: 0 <= t < float("inf"), "0 or more")
        _check(self, "top_k", (int,), lambda k: k >= 0, "0 or more")
        _check(self, "top_p", number, lambda p: 0 < p <= 1, "above 0 and at most 1")
        _check(self, "repetition_penalty", number, lambda r: 0 < r < float("inf"), "above 0")
        _check(self, "num_beams", (int,), lambda n: n >= 1, "at least 1")
        _check(self, "seed", (int, type(None)), lambda s: s is None or 0 <= s < 2**63, "from 0, or None")
        _check(self, "length_penalty", number, math.isfinite, "a number")
        _check(self, "early_stopping", (bool, str), lambda e: e in (True, False, "never"), "a bool or 'never'")
        _check(self, "stop", (tuple,), lambda s: all(isinstance(t, str) and t for t in s), "strings that are not empty")
        for name in ("stop_at_eos", "logprobs"):
            _check(self, name, (bool,), lambda _: True, "a bool")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError(
                f"num_beams={self.num_beams} with temperature={self.temperature}: a beam search draws nothing. Leave "
                f"one of them out"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p narrow what is drawn; give a temperature above 0, such as 1.0")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


def _check(
    settings: GenerationSettings, name: str, kinds: tuple[type, ...], possible: Callable[[Any], bool], wanted: str
) -> None:
    value = getattr(settings, name)
    # The type comes first: what a file says may not be comparable at all. A bool is an int to Python.
    right = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if not right or not possible(value):
        raise ConfigError(f"{name}={value!r} is not possible; give {wanted}")


def setting_names() -> tuple[str, ...]:
    """Names of all settings."""
    return tuple(f.name for f in fields(GenerationSettings))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated for one row."""

    text: str
    """The text, special tokens left out, up to the first stop string."""
    token_ids: tuple[int, ...]
    """Every token generated, the end of text and what completed a stop string included."""
    finish_reason: FinishReason
    """`eos`: the model ended it; `stop`: a stop string; `length`: as long as was asked for; `cancelled`; `not_finite`:
    the row's own scores were no numbers."""
    adapter: str | None = None
    """The adapter that wrote it; `None` for the bare backbone, or where it has no name."""
    num_prompt_tokens: int = 0
    """Tokens of the prompt, inserted vectors not counted."""
    logprobs: tuple[float, ...] | None = None
    """Log-probability of every token, if asked for."""
    score: float | None = None
    """Beam search: log-probability over length to the power of `length_penalty`."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items() if v is not None}
