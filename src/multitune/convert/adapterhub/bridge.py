"""From a checkpoint of `adapters` to our methods: which family reads what of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multitune.convert.adapterhub import bottleneck, lora, prefix
from multitune.convert.adapterhub.files import Checkpoint, read_checkpoint, read_head_checkpoint
from multitune.convert.adapterhub.heads import labels_of, take_head
from multitune.convert.adapterhub.source import PLACES, Read, Source
from multitune.convert.names import ModuleNames
from multitune.convert.result import Taken
from multitune.errors import AdapterError, suggest
from multitune.methods.combined import Combined

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: The library's name of a method's architecture -> who reads it. Bottlenecks have none.
FAMILIES: dict[str | None, ModuleType] = {None: bottleneck, lora.NAME: lora, prefix.NAME: prefix}

#: Model types on which the library's dataflow is known to be ours, by the tests.
MODEL_TYPES = (
    "bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta", "deberta-v2", "albert", "gpt2", "llama",
    "mistral",
)  # fmt: skip

_HOLDERS = tuple(family.HOLDER for family in FAMILIES.values())


def import_adapterhub(folder: Path, backbone: Backbone, kind: str | None, *, with_head: bool = True) -> Taken:
    """Read a checkpoint: our method, its tensors, and the head if one was saved with it.

    Args:
        kind: kind of task; by default what the head suggests.
        with_head: whether to take over the head.

    Raises:
        AdapterError: a missing or damaged file, or anything that our methods cannot express, by name.
    """
    checkpoint = read_checkpoint(folder)
    model_type = str(backbone.model.config.model_type)
    if model_type not in MODEL_TYPES:
        raise AdapterError(
            f"{folder}: checkpoints of adapters cannot be imported for '{model_type}'."
            f"{suggest(model_type, MODEL_TYPES)} They can for {', '.join(MODEL_TYPES)}"
        )
    method, params = _read(checkpoint, backbone)
    saved = read_head_checkpoint(folder) if with_head else None
    head = None if saved is None else take_head(saved, backbone, kind)
    return Taken(
        method=method,
        # Layers that share weights share an adapter there and have one each here; files hold no tensor twice.
        params={k: t.float().contiguous().clone() for k, t in params.items()},
        head=head,
        labels=() if saved is None or head is None else labels_of(saved, head[0]),
        origin={
            "imported_from": "adapters",
            "architecture": _name_of(checkpoint.config),
            "version": checkpoint.version,
        },
    )


def _name_of(config: Mapping[str, Any]) -> str:
    return str(config.get("architecture") or bottleneck.NAME)


def _read(checkpoint: Checkpoint, backbone: Backbone) -> Read:
    by_holder, shared = _sorted(checkpoint, backbone)
    together = _name_of(checkpoint.config) == "union"
    configs = list(checkpoint.config["configs"]) if together else [checkpoint.config]
    read: list[Read] = []
    for config in configs:
        family = _family(config, checkpoint)
        tensors = by_holder[family.HOLDER]
        if family is bottleneck and together:  # of two in a union, one stands behind attention, one behind the ffn
            tensors = {path: own for path, own in tensors.items() if config.get(_setting(path))}
        source = Source(
            where=str(checkpoint.folder),
            config=config,
            version=checkpoint.version,
            tensors=tensors,
            shared=shared,
            backbone=backbone,
        )
        if not tensors:
            raise AdapterError(f"{checkpoint.folder}: it holds no tensors of its {_name_of(config)}; save it again")
        read.append(family.read(source))
    left = set(by_holder) - {_family(config, checkpoint).HOLDER for config in configs}
    if left:
        path, own = next(iter(by_holder[min(left)].items()))
        raise AdapterError(f"{checkpoint.folder}: '{path}.{min(left)}.{min(own)}' is no tensor of its method")
    return read[0] if len(read) == 1 else _combined(read)


def _setting(path: str) -> str:
    """The setting that puts a bottleneck at a path."""
    role = next(role for end, role in PLACES.items() if path.endswith(f".{end}"))
    return "mh_adapter" if role == "attention" else "output_adapter"


def _family(config: Mapping[str, Any], checkpoint: Checkpoint) -> ModuleType:
    architecture = config.get("architecture")
    if architecture not in FAMILIES:
        known = [*(name for name in FAMILIES if name), bottleneck.NAME]
        raise AdapterError(
            f"{checkpoint.folder}: architecture '{architecture}' of adapters cannot be imported."
            f"{suggest(str(architecture), known)} What can: {', '.join(known)}, and unions of them"
        )
    return FAMILIES[architecture]


def _sorted(
    checkpoint: Checkpoint, backbone: Backbone
) -> tuple[dict[str, dict[str, dict[str, Tensor]]], dict[str, Tensor]]:
    """The tensors by the module that holds such adapters, by path, by own name; and those that all layers share."""
    names = ModuleNames(backbone)
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    shared: dict[str, Tensor] = {}
    holders = "|".join((*_HOLDERS, "shared_parameters"))
    pattern = re.compile(rf"(?P<path>.+?)\.(?P<holder>{holders})\.{re.escape(checkpoint.name)}\.(?P<own>.+)")
    for key, tensor in checkpoint.tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{checkpoint.folder}: '{key}' is no tensor of an adapter '{checkpoint.name}' that is known here; "
                f"nothing else of the model can be taken over"
            )
        if match["holder"] == "shared_parameters":
            shared[match["own"]] = tensor
        else:
            found[match["holder"]][names.bare(match["path"])][match["own"]] = tensor
    return found, shared


def _combined(read: list[Read]) -> Read:
    method = Combined(methods=tuple(m for m, _ in read))
    params = {
        f"{part}.{name}": tensor
        for part, (_, own) in zip(method.parts, read, strict=True)
        for name, tensor in own.items()
    }
    return method, params
