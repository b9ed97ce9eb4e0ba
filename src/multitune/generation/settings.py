"""How a row's text is generated, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from multitune.errors import ConfigError, PlanError, suggest

FinishReason = Literal["eos", "stop", "length", "cancelled", "not_finite"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How one row is decoded; the rows of a batch may differ in all of it. By default greedy.

    Raises:
        ConfigError: a value that is not possible, or settings that would do nothing together.
    """

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
    """Beam search: a text's score is its log-probability over its number of tokens to this power, from -10 to 10."""
    early_stopping: bool | Literal["never"] = False
    """Beam search: end with `num_beams` finished texts (true), when a better one is unlikely (false), or when none can
    be found any more ("never")."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, which goes up to the first of them; one may be a special token, such as `</s>`."""
    stop_at_eos: bool = True
    """Whether the model's own end of text ends it."""
    logprobs: bool = False
    """Whether to give the log-probability of every token: under the model, before temperature, penalty and the rest."""

    def __post_init__(self) -> None:
        given = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = tuple(given) if isinstance(given, Iterable) else (given,)
        if not all(isinstance(s, str) and s for s in stop):
            raise ConfigError(f"stop={self.stop!r} is not possible; give strings that are not empty")
        object.__setattr__(self, "stop", stop)
        for name, (kind, holds, wanted) in _POSSIBLE.items():
            _check(name, getattr(self, name), kind, holds, wanted)
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError(
                f"num_beams={self.num_beams} with temperature={self.temperature}: a beam search draws nothing. Leave "
                f"one of them out"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p narrow what is drawn; give a temperature above 0, such as 1.0")
        for name, usual in (("length_penalty", 1.0), ("early_stopping", False)):
            if self.num_beams == 1 and getattr(self, name) != usual:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is for a beam search; give num_beams above 1, such as 4, or leave "
                    f"it out"
                )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


def _check(name: str, value: Any, kind: tuple[type, ...], holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise `ConfigError` unless the value is of such a type, and what holds for a possible one holds for it."""
    right = isinstance(value, kind) and (bool in kind or not isinstance(value, bool))
    if not right or not holds(value):
        of_kind = "" if right else _KINDS.get(kind[0], "")
        raise ConfigError(f"{name}={value!r} is not possible; give {of_kind}{wanted}")


#: How messages call a value of a type, in front of what else is wanted of it.
_KINDS: dict[type, str] = {int: "a whole number, ", float: "a number, "}

#: Setting -> its types, what holds for a possible value of them (asked of no other type), and what messages ask for.
_POSSIBLE: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "max_new_tokens": ((int,), lambda v: v >= 1, "at least 1"),
    "temperature": ((float, int), lambda v: 0 <= v < math.inf, "0 or more"),
    "top_k": ((int,), lambda v: v >= 0, "0 or more"),
    "top_p": ((float, int), lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "repetition_penalty": ((float, int), lambda v: 0 < v < math.inf, "above 0"),
    "seed": ((int, type(None)), lambda v: v is None or 0 <= v < 2**63, "from 0, or None"),
    "num_beams": ((int,), lambda v: v >= 1, "at least 1"),
    # A length to the power of it stays far from what a float holds, so that no score is infinite or divided by zero.
    "length_penalty": ((float, int), lambda v: -10 <= v <= 10, "between -10 and 10"),
    "early_stopping": ((bool, str), lambda v: v in (True, False, "never"), "a bool or 'never'"),
    "stop_at_eos": ((bool,), lambda v: True, "True or False"),
    "logprobs": ((bool,), lambda v: True, "True or False"),
}


def check_beams(named: Iterable[tuple[str, GenerationSettings]], batch_size: int) -> None:
    """Refuse beams that are more rows than are decoded together.

    Args:
        named: what messages call each row, and its settings.
        batch_size: most rows decoded together.

    Raises:
        ConfigError: `batch_size` below 1.
        PlanError: a row's beams do not fit; says which.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not possible; give at least 1")
    for name, own in named:
        if own.num_beams > batch_size:
            raise PlanError(
                f"{name}: {own.num_beams} beams are more rows than batch_size={batch_size}; raise it, or lower "
                f"num_beams"
            )


#: What other libraries call a setting, or set by one, and what it is here.
_ELSEWHERE = {
    "do_sample": "A temperature above 0 draws tokens, 0 takes the likeliest",
    "max_length": "max_new_tokens counts the new tokens alone",
    "stop_strings": "It is called stop",
    "eos_token_id": "stop_at_eos says whether the model's own end of text ends it, stop which strings do",
    "num_return_sequences": "Give the row as often as texts are wanted, each with a seed of its own",
    "n": "Give the row as often as texts are wanted, each with a seed of its own",
    "presence_penalty": "There is repetition_penalty",
    "frequency_penalty": "There is repetition_penalty",
}


def suggest_setting(asked: str, exist: Iterable[str]) -> str:
    """`suggest` for the name of a setting, which another library may have."""
    said = _ELSEWHERE.get(asked)
    return f" {said}." if said is not None else suggest(asked, exist)


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
