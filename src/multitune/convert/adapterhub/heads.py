"""Heads: the library's own, one or two linear maps over the first token, and those of transformers' models."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, get_args

import torch
from torch import Tensor

from multitune.convert.adapterhub.files import HeadCheckpoint
from multitune.convert.heads import SEQUENCE, TOKEN, read_head
from multitune.errors import AdapterError, ConfigError, suggest
from multitune.heads import Dense, Head
from multitune.pooling import Pooling

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: The library's name of a head -> the kinds of task it is for, the usual one first.
_KINDS = {
    "classification": ("classification", "regression"),
    "multilabel_classification": ("multilabel",),
    "tagging": ("tagging",),
}
_TASKS = {"ForSequenceClassification": SEQUENCE, "ForTokenClassification": TOKEN}


def take_head(saved: HeadCheckpoint, backbone: Backbone, kind: str | None) -> tuple[Head, dict[str, Tensor]]:
    """Our head.

    Raises:
        AdapterError: a head that ours cannot express; names what it is.
        ConfigError: a kind of task that this head is not for.
    """
    if saved.config is not None:
        return _flexible(saved, backbone, kind)
    task = next((t for end, t in _TASKS.items() if saved.model_class.endswith(end)), None)
    if task is None:
        raise AdapterError(
            f"{saved.file}: the head of a {saved.model_class} is not supported here. Give fresh_head=True "
            f"(--fresh-head) to import the adapter without it"
        )
    return read_head(saved.tensors, backbone, task, kind, str(saved.file))


def labels_of(saved: HeadCheckpoint, head: Head) -> tuple[str, ...]:
    """Label names in the order of the outputs; none where the checkpoint has none, or not one for each."""
    by_id = {i: name for name, i in saved.label_ids.items()}
    return tuple(by_id[i] for i in range(head.num_outputs)) if set(by_id) == set(range(head.num_outputs)) else ()


def _flexible(saved: HeadCheckpoint, backbone: Backbone, kind: str | None) -> tuple[Head, dict[str, Tensor]]:
    config = saved.config
    assert config is not None
    where, head_type, layers = saved.file, str(config.get("head_type")), config.get("layers")
    if head_type not in _KINDS:
        raise AdapterError(
            f"{where}: a head for {head_type} is not supported here.{suggest(head_type, _KINDS)} What is: "
            f"{', '.join(_KINDS)}. Give fresh_head=True (--fresh-head) to import the adapter without it"
        )
    kinds = _KINDS[head_type]
    if kind is not None and kind not in kinds:
        raise ConfigError(f"{where}: its head is for {' or '.join(kinds)}, not '{kind}'.{suggest(kind, kinds)}")
    activation = str(config.get("activation_function")).lower()
    between = [a for a in get_args(Dense) if a != "none"]
    if layers not in (1, 2) or (layers == 2 and activation not in between):
        raise AdapterError(
            f"{where}: a head of {layers} layers with activation {activation} is not supported here; one of one layer, "
            f"or of two with {', '.join(between)} between them, is"
        )
    if backbone.architecture.runs:
        raise AdapterError(f"{where}: in {backbone.model.config.model_type} the library's heads read the decoder")
    found = _tensors(saved, 1 if layers == 1 else 4, dense=layers == 2)
    outputs = int(config["num_labels"])
    if kind is None:
        kind = "regression" if head_type == "classification" and outputs == 1 else kinds[0]
    pooling: Pooling = "pooler" if config.get("use_pooler") else "last" if backbone.causal else "cls"
    dense = cast(Dense, activation) if layers == 2 else "none"
    head = Head(kind=kind, num_outputs=outputs, pooling=pooling, dense=dense)
    head.check(backbone)
    return head, found


def _tensors(saved: HeadCheckpoint, last: int, *, dense: bool) -> dict[str, Tensor]:
    """The head's tensors, whose modules the library counts with the dropout and the activation between them."""
    start = f"heads.{saved.name}"
    places = {f"{start}.{last}.weight": "weight", f"{start}.{last}.bias": "bias"}
    if dense:
        places |= {f"{start}.1.weight": "dense_weight", f"{start}.1.bias": "dense_bias"}
    found = {ours: saved.tensors[theirs].float() for theirs, ours in places.items() if theirs in saved.tensors}
    if "weight" in found and not (saved.config or {}).get("bias", True):
        found.setdefault("bias", torch.zeros(found["weight"].shape[0]))
    missing = sorted(set(places.values()) - set(found))
    unknown = sorted(set(saved.tensors) - set(places))
    if missing or unknown:
        raise AdapterError(
            f"{saved.file}: the head "
            + (f"lacks its {missing[0]}" if missing else f"holds '{unknown[0]}', which is none of {', '.join(places)}")
        )
    return found
