"""Heads: from hidden states to logits, losses and answers.

Legend: B sequences, T tokens, D width, C outputs of one head, R rows (a multiple-choice row has several sequences).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multitune.errors import ConfigError, DataError, suggest
from multitune.pooling import Pooling
from multitune.tasks import Task

if TYPE_CHECKING:
    from multitune.backbone import Backbone

Dense = Literal["none", "tanh", "gelu", "relu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}

#: Largest target of a regression, and least deviation beside it, that leave float32 a hundredth of the deviation.
_LARGEST, _LEAST_SPREAD = 1e30, 1e-5

#: Target that no loss or metric counts (words cut off by truncation).
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head of C outputs over a pooled vector, or over each word for tagging; linear, or with one layer before.

    Raises:
        ConfigError: an unknown pooling or activation, or a number that is not possible.
    """

    kind: str
    """Kind of task: classification, regression, multilabel, multiple_choice, tagging; embedding has no outputs but
    the pooled vector itself; generation none but the backbone's own language-model head, which stays as it is; ranking
    none either: that head, causal or masked, ranks a task's answers as texts."""
    num_outputs: int
    """Number of outputs C."""
    pooling: Pooling = "cls"
    """First token, mean over real tokens, the backbone's pretrained pooler over the first token, or last real token
    (`Backbone.default_pooling` says what suits a backbone); tagging reads every word."""
    dropout: float = 0.1
    """Probability of dropping an entry of the pooled vector, in training."""
    dense: Dense = "none"
    """Activation of a layer `[D, D]` in front of the outputs, as in RoBERTa's classifier (tanh); none has no layer."""
    norm_eps: float | None = None
    """Normalise what that layer gives, as in ModernBERT's classifier: centred, and divided by the root of the variance
    plus this. A gain and an offset behind that belong into the weight and the bias. `None` leaves it as it is."""
    target_mean: float = 0.0
    """Regression: what is added to the output, after it was multiplied by `target_std`. Training sets both to those of
    its targets, so that the tensors learn numbers around 0 whether the answers are shares or prices."""
    target_std: float = 1.0
    """Regression: what the output is multiplied by."""

    def __post_init__(self) -> None:
        if self.dense not in get_args(Dense):
            known = get_args(Dense)
            raise ConfigError(
                f"activation '{self.dense}' of the head's layer is unknown.{suggest(str(self.dense), known)} "
                f"Choose {', '.join(known)}"
            )
        if self.pooling not in get_args(Pooling):
            known = get_args(Pooling)
            raise ConfigError(
                f"pooling '{self.pooling}' is unknown.{suggest(self.pooling, known)} Choose {', '.join(known)}"
            )
        if self.norm_eps is not None and (self.dense == "none" or not self.norm_eps > 0):
            raise ConfigError(
                f"norm_eps={self.norm_eps} of a head is a positive number, and normalises what its layer gives; leave "
                f"it out, or give a layer too, such as dense='gelu'"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"head dropout {self.dropout} is not a probability below 1")
        usable = math.isfinite(self.target_mean) and math.isfinite(self.target_std) and self.target_std > 0
        if not usable or (self.kind != "regression" and self.rescales):
            raise ConfigError(
                f"target_mean={self.target_mean} and target_std={self.target_std} of a head of kind {self.kind}: a "
                f"regression takes a finite number and a positive one, any other head takes neither"
            )

    @classmethod
    def for_task(cls, task: Task, pooling: Pooling = "cls", dropout: float = 0.1) -> Head:
        """The head that fits a task."""
        if task.pattern is not None:
            return cls(kind="ranking", num_outputs=0, pooling=pooling, dropout=dropout)
        outputs = 1 if task.kind in ("regression", "multiple_choice") else len(task.labels)  # embedding, generation: 0
        return cls(kind=task.kind, num_outputs=outputs, pooling=pooling, dropout=dropout)

    def fitted(self, targets: Iterable[Any]) -> Head:
        """For a regression the head that learns these targets as numbers of mean 0 and variance 1; else this one.

        Raises:
            DataError: numbers that float32 cannot hold or tell apart; says what to take off or to divide by.
        """
        if self.kind != "regression":
            return self
        values = torch.tensor(list(targets), dtype=torch.float64)
        mean, spread, largest = float(values.mean()), float(values.std(correction=0)), float(values.abs().max())
        if largest > _LARGEST:
            raise DataError(
                f"targets of up to {largest:.0e} are too large for float32; divide them all by {largest:.0e}, and "
                f"multiply the answers by it"
            )
        if bool(values.eq(values[0]).all()):
            return replace(self, target_mean=mean, target_std=1.0)
        if spread < _LEAST_SPREAD * largest:
            raise DataError(
                f"the targets are {mean:.0f} on average with a standard deviation of {spread:.2g}: float32, in which "
                f"answers are computed, has too few digits for both. Take {mean:.0f} off them all, and add it to the "
                f"answers"
            )
        return replace(self, target_mean=mean, target_std=spread)

    @property
    def rescales(self) -> bool:
        """Whether the answer is another number than the output."""
        return (self.target_mean, self.target_std) != (0.0, 1.0)

    def folded(self, tensors: Mapping[str, Tensor]) -> tuple[Head, dict[str, Tensor]]:
        """A head and its tensors that answer the same without rescaling, for files that have no place for it."""
        have = dict(tensors)
        if self.rescales:
            have["weight"] = have["weight"] * self.target_std
            have["bias"] = have["bias"] * self.target_std + self.target_mean
        return replace(self, target_mean=0.0, target_std=1.0), have

    @property
    def pools(self) -> bool:
        """Whether the head reads one vector of a text, which `pooling` makes."""
        return self.kind not in ("tagging", "generation", "ranking")

    @property
    def drops(self) -> bool:
        """Whether the head has tensors of its own, in front of which `dropout` acts."""
        return self.kind not in ("embedding", "generation", "ranking")

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors by name, float32: matrices normal with std 0.02, vectors zero."""
        self.check(backbone)
        return {
            name: torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.zeros(shape)
            for name, shape in self.shapes(backbone).items()
        }

    def shapes(self, backbone: Backbone) -> dict[str, torch.Size]:
        """`weight [C, D]`, `bias [C]`, and with a dense layer `dense_weight [D, D]` and `dense_bias [D]`."""
        if not self.drops:
            return {}
        width, outputs = backbone.output_size, self.num_outputs
        shapes = {"weight": torch.Size((outputs, width)), "bias": torch.Size((outputs,))}
        if self.dense != "none":
            shapes |= {"dense_weight": torch.Size((width, width)), "dense_bias": torch.Size((width,))}
        return shapes

    def check(self, backbone: Backbone) -> None:
        """Raise `ConfigError` if the backbone cannot pool this way, `BackboneError` if it lacks a head for tokens."""
        if self.kind == "generation":
            _ = backbone.lm_head
            return
        if self.kind == "ranking":
            _ = backbone.token_head
            return
        name = backbone.name.replace("+decoder", "")
        backbone.refuse_decoder(f"a head of kind {self.kind} has nothing to read", f"load its encoder alone: '{name}'")
        if self.pooling == "pooler" and backbone.pooler is None:
            others = " or ".join(f"pooling='{p}'" for p in dict.fromkeys((backbone.default_pooling, "mean")))
            raise ConfigError(
                f"backbone '{backbone.name}' ({backbone.model.config.model_type}) has no pretrained pooler; "
                f"use {others}"
            )

    def check_task(self, task: Task) -> None:
        """Raise `ConfigError` unless the head is of the task's kind and has as many outputs as its answers need."""
        needed = Head.for_task(task)
        if (self.kind, self.num_outputs) != (needed.kind, needed.num_outputs):
            labels = f" with the labels {', '.join(task.labels)}" if task.labels else ""
            raise ConfigError(
                f"a head of kind {self.kind} with {self.num_outputs} outputs does not fit task '{task.name}' of kind "
                f"{task.kind}{labels}, which needs one of kind {needed.kind} with {needed.num_outputs}"
            )

    def settings(self) -> dict[str, Any]:
        """The head as JSON values; of the targets' mean and deviation only where it has them."""
        found = asdict(self)
        return found if self.rescales else {k: v for k, v in found.items() if not k.startswith("target_")}


def pool(backbone: Backbone, hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """`hidden [B, T, D]` to `[B, D]`."""
    if pooling == "pooler":
        assert backbone.pooler is not None
        pooled: Tensor = backbone.pooler(hidden)
        return pooled
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[:, -1] if mask is None else hidden[torch.arange(len(hidden), device=hidden.device), _last(mask)]
    if mask is None:
        return hidden.mean(1)
    weights = mask.unsqueeze(-1)
    # where, not a product: padding may hold anything, and 0 times NaN is NaN.
    kept = hidden.masked_fill(weights == 0, 0)
    # In float32 at least, as torch's own mean adds up: bfloat16 has no number for 257 tokens.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (kept.sum(1, dtype=wide) / weights.sum(1, dtype=wide).clamp(min=1)).to(hidden.dtype)


def _last(mask: Tensor) -> Tensor:
    """`mask [B, T]` to the column of each row's last real token, `[B]`."""
    return ((mask > 0) * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def logits(
    backbone: Backbone,
    head: Head,
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    mask: Tensor | None,
    training: bool,
) -> Tensor:
    """One head for all sequences.

    Args:
        tensors: as `Head.shapes` names them, of any float dtype; they are cast to that of `hidden`.
        hidden: `[B, T, D]`.
        mask: `[B, T]`, 1 for real tokens; `None` for no padding.
        training: whether the head's dropout acts.

    Returns:
        `[B, C]`, or `[B, T, C]` for tagging; in the dtype of `hidden`, of a head that rescales in float32 at least.
    """
    features = hidden if head.kind == "tagging" else pool(backbone, hidden, mask, head.pooling)
    features = F.dropout(features, head.dropout, training=training)
    if head.dense != "none":
        weight, bias = (tensors[f"dense_{k}"].to(features.dtype) for k in ("weight", "bias"))
        features = _normalised(_ACTIVATIONS[head.dense](F.linear(features, weight, bias)), head.norm_eps)
        features = F.dropout(features, head.dropout, training=training)
    values = F.linear(features, tensors["weight"].to(features.dtype), tensors["bias"].to(features.dtype))
    return _wide(values) * head.target_std + head.target_mean if head.rescales else values


def mixed_logits(
    backbone: Backbone,
    heads: Sequence[tuple[Head, Mapping[str, Tensor]] | None],
    hidden: Tensor,
    mask: Tensor | None,
) -> list[Tensor | None]:
    """Another head for every sequence, of any size, in one product per way of pooling.

    Args:
        heads: per sequence its head and that head's tensors, as `Head.shapes` names them, in the dtype of `hidden`;
            `None` where it has none.
        hidden: `[B, T, D]`.
        mask: `[B, T]`, 1 for real tokens; `None` for no padding.

    Returns:
        Per sequence its own `[C]` (tagging: `[T, C]`, embedding: `[D]`), or `None` where it has no head; in the dtype
        of `hidden`, or in float32 at least where a head of the same product rescales.
    """
    out: list[Tensor | None] = [None] * len(heads)
    for way, dense, eps in sorted({_way(h[0]) for h in heads if h is not None}):
        rows = [i for i, h in enumerate(heads) if h is not None and _way(h[0]) == (way, dense, eps)]
        chosen = [h for i in rows if (h := heads[i]) is not None]
        picked = hidden[rows]
        picked_mask = None if mask is None else mask[rows]
        if dense == "embedding":
            for i, vector in zip(rows, pool(backbone, picked, picked_mask, way), strict=True):
                out[i] = vector
            continue
        features = picked if way == "words" else pool(backbone, picked, picked_mask, way).unsqueeze(1)
        if dense != "none":
            matrix, offset = (torch.stack([t[f"dense_{k}"] for _, t in chosen]) for k in ("weight", "bias"))
            features = _ACTIVATIONS[dense](torch.baddbmm(offset.unsqueeze(1), features, matrix.transpose(1, 2)))
            features = _normalised(features, eps or None)
        weight = pad_sequence([t["weight"] for _, t in chosen], batch_first=True)  # [R, C_max, D]
        bias = pad_sequence([t["bias"] for _, t in chosen], batch_first=True).unsqueeze(1)
        values = torch.baddbmm(bias, features, weight.transpose(1, 2))  # [R, T or 1, C_max]
        if any(head.rescales for head, _ in chosen):  # by 1 and 0 where a head does not, which changes no value
            values = _wide(values)
            units = [(head.target_std, head.target_mean) for head, _ in chosen]
            std, mean = values.new_tensor(units).view(-1, 2, 1, 1).unbind(1)
            values = values * std + mean
        for k, i in enumerate(rows):
            own = values[k, :, : chosen[k][0].num_outputs]
            out[i] = own if way == "words" else own[0]
    return out


def _way(head: Head) -> tuple[str, str, float]:
    """What heads share that are computed together: how they pool, and what they do then."""
    then = "embedding" if head.kind == "embedding" else head.dense
    return "words" if head.kind == "tagging" else head.pooling, then, head.norm_eps or 0.0


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: bfloat16 has no number between 1000 and 1004, and float16 none above 65504."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _normalised(features: Tensor, eps: float | None) -> Tensor:
    return features if eps is None else F.layer_norm(features, features.shape[-1:], eps=eps)


def loss(head: Head, values: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of a batch.

    Args:
        values: logits `[R, C]`; regression `[R, 1]`; multiple choice `[R, choices]`; tagging `[R, T, C]`.
        targets: int64 `[R]`; regression float `[R]`; multilabel float `[R, C]`; tagging int64 `[R, T]`
            with `IGNORED` everywhere but at the first token of each word. Multiple choice over lists: int64
            `[R, choices]`, 1 for every right choice, 0 for the others, `IGNORED` where a row has no such choice;
            the loss is then -log of the probability that all right ones have together.

    A regression's is the mean squared error over the variance of the targets that the head was fitted to: 1 is what
    their mean would get as the answer to all.
    """
    values = values.float()
    if head.kind == "multiple_choice" and targets.ndim == 2:
        right = values.masked_fill(targets != 1, -torch.inf)
        return (values.logsumexp(1) - right.logsumexp(1)).mean()
    if head.kind == "regression":
        away = (values.squeeze(-1) - targets.float()) / head.target_std
        return away.square().mean()
    if head.kind == "multilabel":
        return F.binary_cross_entropy_with_logits(values, targets.float())
    if head.kind == "tagging":
        return F.cross_entropy(values.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    return F.cross_entropy(values, targets)


def by_row(values: Tensor, num_choices: int, targets: Tensor | None) -> Tensor:
    """Logits of sequences as those of rows of a multiple choice.

    Args:
        values: `[B]`, row after row.
        num_choices: how many choices every row has, unless the targets say it.
        targets: as `loss` takes them; over lists they say how many choices each row has.

    Returns:
        `[R, choices]`, -inf where a row has no such choice.
    """
    if targets is None or targets.ndim == 1:
        return values.view(-1, num_choices)
    counts = (targets != IGNORED).sum(1).tolist()
    return pad_sequence(list(values.split(counts)), batch_first=True, padding_value=-torch.inf)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a head's logits say about one row."""

    label: str | float | tuple[str, ...] | None
    """Label name; number; names of the labels that hold; tag per word; `None` if the logits are not finite."""
    probabilities: dict[str, float]
    """Per label name or choice; empty for regression and tagging."""


def answer(task: Task, values: Tensor, word_starts: Sequence[int] = ()) -> Answer:
    """Read one row's logits: `[C]`, multiple choice `[choices]`, tagging `[T, C]`."""
    values = values.detach().float().cpu()
    if task.kind == "tagging":
        values = values[list(word_starts)]
    if not bool(torch.isfinite(values).all()):
        return Answer(label=None, probabilities={})
    if task.kind == "regression":
        return Answer(label=float(values[0]), probabilities={})
    if task.kind == "tagging":
        return Answer(label=tuple(task.labels[i] for i in values.argmax(-1).tolist()), probabilities={})
    if task.kind == "multilabel":
        probabilities = dict(zip(task.labels, values.sigmoid().tolist(), strict=True))
        return Answer(label=tuple(n for n, p in probabilities.items() if p >= 0.5), probabilities=probabilities)
    names = task.labels if task.kind == "classification" else tuple(str(i) for i in range(len(values)))
    probabilities = dict(zip(names, values.softmax(-1).tolist(), strict=True))
    return Answer(label=names[int(values.argmax())], probabilities=probabilities)


def prediction(task: Task, values: Tensor, word_starts: Sequence[int] = ()) -> Any:
    """One row's prediction in the form that `multitune.tasks.compute` takes: id, number, or tuple of ids."""
    values = values.detach().float().cpu()
    if task.kind == "regression":
        return float(values[0])
    if task.kind == "tagging":
        return tuple(values[list(word_starts)].argmax(-1).tolist())
    if task.kind == "multilabel":
        return tuple(int(v >= 0) for v in values.tolist())
    return int(values.argmax())
