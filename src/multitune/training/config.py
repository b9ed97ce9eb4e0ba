"""Training settings: one frozen dataclass; the text under a field is also its help on the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from multitune.errors import ConfigError, suggest
from multitune.pooling import Pooling

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from multitune.methods import Method

_AT_LEAST = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "gradient_accumulation": 1,
    "max_steps": 1,
    "max_length": 4,
    "early_stopping": 1,
    "evaluations_per_epoch": 1,
    "cache_bytes": 0,
    "eval_texts": 0,
    "eval_new_tokens": 1,
    "distill_examples": 1,
    "distill_new_tokens": 1,
    "seed": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
}
_BELOW_ONE = ("warmup_ratio", "head_dropout", "label_smoothing")
_POSITIVE = ("learning_rate", "epochs", "distill_weight")

#: Parts of `TrainConfig.losses`; training/choices.py says what each is.
LOSS_NAMES = ("language", "unlikelihood", "choice")

#: What other tools call a setting.
ALSO_CALLED = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "scheduler",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_seq_length": "max_length",
}

#: What neither changes the tensors nor the metrics of a run, so that a resumed run may change it.
COSMETIC = ("progress", "keep_checkpoints")

#: Settings that runs and results from before them were stored without, each with what it was there, whatever its
#: default may become: those that are still run so are stored without it too.
LATER: dict[str, Any] = {"packing": False, "distill_instruction": None, "distill_new_tokens": None}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. What is `None` here and has a value in `method.recipe` is taken from there.

    Raises:
        ConfigError: a value that its field cannot hold; names the setting.
    """

    learning_rate: float | None = None
    """Peak learning rate of AdamW; by default the method's own."""
    weight_decay: float | None = None
    """Decoupled weight decay of the method's tensors and the head's weight; by default the method's own."""
    warmup_ratio: float | None = None
    """Share of the steps over which the learning rate rises; by default the method's own."""
    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps to take instead of whole epochs."""
    batch_size: int = 16
    """Rows per forward pass in training."""
    eval_batch_size: int = 32
    """Rows per forward pass in evaluation."""
    gradient_accumulation: int = 1
    """Batches whose gradients are added up before one optimizer step."""
    max_length: int = 128
    """Tokens a text is cut to, special tokens included; of a generation tokens of prompt and answer together, where the
    front of the prompt is cut and the answer never."""
    seed: int = 0
    """Seed of the initial tensors, the order of the rows and dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; bf16 is mixed precision, the trained tensors stay float32."""
    length_grouped: bool = True
    """Put rows of similar length into one batch, which saves padding."""
    packing: bool = False
    """Generation, on a causal backbone: put the rows of a batch one behind the other into as few rows of at most
    max_length tokens as hold them, which saves padding. None of them sees another, every optimizer step has the rows
    that it has without packing, and the loss is the same. Evaluations do not pack."""
    early_stopping: int | None = None
    """Stop after this many evaluations in a row without a better validation metric."""
    evaluations_per_epoch: int = 1
    """Evaluations, and checkpoints, per epoch; the last step is always evaluated."""
    eval_texts: int = 0
    """Generation: have so many of the first validation prompts answered at every evaluation, greedily, and keep the
    best tensors by the task's metric of these texts; 0 writes none and goes by perplexity, which costs far less."""
    eval_new_tokens: int = 64
    """Generation: most tokens that an evaluation writes for a prompt."""
    pooling: Pooling | None = None
    """What the head reads: the first token (cls), the mean over real tokens, the backbone's pretrained pooler, or the
    last token; by default last where attention is causal, mean where rows have no first token of their own (T5), and
    cls elsewhere."""
    head_dropout: float = 0.1
    """Probability of dropping an entry of the head's input, in training."""
    label_smoothing: float = 0.0
    """Generation: share of every token's weight in the loss that goes to all words alike."""
    losses: str | None = None
    """Tasks with a pattern: what is minimised, the plain sum of these, joined by +: language (of the right answer's
    tokens), unlikelihood (of the wrong answers'), choice (cross-entropy over the choices' scores per token). By default
    T-Few's language+unlikelihood+choice on a causal backbone or an encoder-decoder, and on a masked one choice,
    pattern-based fine-tuning."""
    distill_examples: int | None = None
    """Generation and tasks with a pattern, on a causal backbone or an encoder-decoder: context distillation. The frozen
    backbone reads so many other training rows, drawn by seed, in front of each, and the adapter learns to say or to
    choose as it does without reading them. Where texts are distilled, the best tensors are those with the lowest loss
    on the validation rows, unless eval_texts judges them."""
    distill_instruction: str | None = None
    """Context distillation too: a text that the frozen backbone reads in front of every row, before the examples if
    there are any, and the adapter does not."""
    distill_new_tokens: int | None = None
    """Generation: distil at the tokens of texts that the frozen backbone writes with its context, one for each row,
    drawn by seed and of so many tokens at most, in place of the rows' own answers, which are then not read."""
    distill_weight: float = 1.0
    """Share of the distillation, a Kullback-Leibler divergence, in the loss; the rest is the loss without it."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: less memory, more time, equal gradients."""
    cache_frozen: Literal["auto", "memory", "disk"] | None = None
    """Keep what the layers below the lowest trained one give for every row, so that each epoch costs the layers above
    alone; where only the head is trained, the whole backbone runs once. In memory, on disk beside the checkpoints, or
    auto: in memory where it fits cache_bytes and the rows are read more than once. Everything but the trained layers
    and the head then runs without dropout, kept or not."""
    cache_bytes: int = 2 * 2**30
    """Most bytes that cache_frozen may take."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after warm-up."""
    keep_checkpoints: bool = False
    """Keep the folder of checkpoints when the run has finished."""
    progress: bool = True
    """Show a progress bar when standard error is a terminal."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name), strict=True))
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            _require(value is None or value >= least, name, value, f"give at least {least}")
        _require(self.seed < 2**32, "seed", self.seed, "give a number below 2**32, which is what NumPy takes")
        for name in _BELOW_ONE:
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, name, value, "give a number from 0 to below 1")
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "give a number above 0")
        _require(self.distill_weight <= 1, "distill_weight", self.distill_weight, "give a share, 1 at most")
        said = self.distill_instruction
        _require(said is None or bool(said.strip()), "distill_instruction", said, "give a text, or leave it out")
        if self.losses is not None:
            parse_losses(self.losses)

    @property
    def distills(self) -> bool:
        """Whether the run has a teacher that reads more than the adapter does."""
        return self.distill_examples is not None or self.distill_instruction is not None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The settings that `to_dict` wrote, or a part of them; strings are read as the field's type.

        Raises:
            ConfigError: an unknown name, or a value the field cannot hold.
        """
        known = cls.names()
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"no training setting '{key}'.{suggest(ALSO_CALLED.get(str(key), str(key)), known)} There are "
                    f"{', '.join(known)}"
                )
        return cls(**{key: _checked(key, value, strict=False) for key, value in values.items()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(field.name for field in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that tell runs apart, as JSON values: all but the cosmetic ones.

        One of `LATER` stands there only where it is not as it was before it could be chosen, so that runs and results
        from then are found again. `LATER | identity` has them all.
        """
        as_before = [name for name, value in LATER.items() if getattr(self, name) == value]
        return {name: value for name, value in self.to_dict().items() if name not in (*COSMETIC, *as_before)}

    def resolve(self, method: Method) -> TrainConfig:
        """The settings with the method's own where none are given."""
        recipe = method.recipe
        own = {name: getattr(recipe, name) for name in ("learning_rate", "weight_decay", "warmup_ratio")}
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})


def parse_losses(given: str) -> tuple[str, ...]:
    """`"language+choice"` as names of `LOSS_NAMES`.

    Raises:
        ConfigError: one that there is not, none, or one twice.
    """
    names = tuple(name.strip() for name in given.split("+"))
    unknown = [name for name in names if name not in LOSS_NAMES]
    fix = f"join any of {', '.join(LOSS_NAMES)} by +, each once, such as language+choice"
    near = suggest(unknown[0], LOSS_NAMES) if unknown else ""
    _require(not unknown and len(set(names)) == len(names), "losses", given, fix + (f".{near}" if near else ""))
    return names


@cache
def _types() -> dict[str, TypeAdapter[Any]]:
    from pydantic import TypeAdapter

    return {name: TypeAdapter(hint) for name, hint in get_type_hints(TrainConfig).items()}


def _checked(name: str, value: Any, *, strict: bool) -> Any:
    from pydantic import ValidationError

    if not strict and isinstance(value, str) and value.strip().lower() == "none":
        value = None
    try:
        value = _types()[name].validate_python(value, strict=strict)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ConfigError(f"training setting {name}={value!r} is not possible: {problem}") from error
    _require(not isinstance(value, float) or math.isfinite(value), name, value, "give a finite number")
    return value


def _require(condition: bool, name: str, value: Any, fix: str) -> None:
    if not condition:
        raise ConfigError(f"training setting {name}={value!r} is not possible; {fix}")
