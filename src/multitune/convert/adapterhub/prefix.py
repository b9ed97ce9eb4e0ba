"""Prefix tuning:  the library keeps `[M, L, 2, W]`, or the network that makes it, as one vector for all layers.

The prefix takes no positions. In DistilBERT and in decoders the library (1.3.0) treats it differently in a batch with
padding: with transformers' default attention its scores are raised by one, or it is not attended to at all. What such a
prefix means depends on the rows it was trained beside, and it is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multitune.convert.adapterhub.source import Read, Source, whole_layers
from multitune.deltas import ACTIVATIONS
from multitune.errors import AdapterError
from multitune.methods.ptuning_v2 import PTuningV2

NAME = "prefix_tuning"
HOLDER = "prefix_tunings"

#: Model types in which the library gives a row the same prefix whatever stands beside it in the batch.
SAME_IN_EVERY_BATCH = ("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2")

_SETTINGS = frozenset(
    {
        "architecture", "encoder_prefix", "cross_prefix", "leave_out", "flat", "prefix_length", "bottleneck_size",
        "non_linearity", "dropout", "shared_gating", "init_weights_seed",
    }
)  # fmt: skip


def read(source: Source) -> Read:
    """Our method and its tensors.

    Raises:
        AdapterError: something that our methods cannot express; names it.
    """
    if source.config.get("use_gating"):
        raise source.refuse("use_gating", "closes the prefix by a gate that depends on the whole text")
    source.refuse_unknown(_SETTINGS)
    model_type = source.backbone.model.config.model_type
    if model_type not in SAME_IN_EVERY_BATCH:
        raise source.refuse(
            "architecture",
            f"means different things in batches with and without padding on '{model_type}', where the library masks it "
            f"wrongly (it does not on {', '.join(SAME_IN_EVERY_BATCH)})",
        )
    left_out = set(source.config.get("leave_out") or ())
    layers = [i for i in range(source.backbone.num_layers) if i not in left_out]
    sites = source.backbone.find_sites("attention", layers=layers)
    length, width = int(source.config["prefix_length"]), sites[0].in_features
    vectors = _vectors(source)
    expected = length * len(sites) * 2 * width
    if vectors.numel() != expected:
        raise AdapterError(
            f"{source.where}: the prefix holds {vectors.numel()} values where {expected} are expected: {length} keys "
            f"and values of width {width} for {len(sites)} layers"
        )
    by_layer = vectors.view(length, len(sites), 2, width)
    params = {
        f"{site.name}.{key}": by_layer[:, i, k]
        for i, site in enumerate(sites)
        for k, key in enumerate(("keys", "values"))
    }
    return PTuningV2(length=length, layers=whole_layers(source, layers)), params


def _vectors(source: Source) -> Tensor:
    """Keys and values of all layers; every layer's module has the same, and a checkpoint holds them all."""
    found: dict[str, Tensor] = {}
    for path, own in source.tensors.items():
        for name, tensor in own.items():
            if not torch.equal(found.setdefault(name, tensor), tensor):
                raise AdapterError(f"{source.where}: '{name}' at '{path}' differs from that of other layers")
    groups = {name.partition(".")[0] for name in found}
    if len(groups) != 1:
        raise AdapterError(f"{source.where}: it has prefixes for {', '.join(sorted(groups))}, and one runs here")
    (group,) = groups
    own = {name.removeprefix(f"{group}."): t for name, t in found.items()}
    if source.config.get("flat"):
        return _get(source, own, "control_trans")
    activation = str(source.config.get("non_linearity", "tanh")).lower()
    if activation not in ACTIVATIONS:
        raise source.refuse("non_linearity", f"is none of {', '.join(ACTIVATIONS)}")
    first, second = ("control_trans.0", "control_trans.2")
    inner = _get(source, own, "wte.weight") @ _get(source, own, f"{first}.weight").T + _get(
        source, own, f"{first}.bias"
    )
    return ACTIVATIONS[activation](inner) @ _get(source, own, f"{second}.weight").T + _get(
        source, own, f"{second}.bias"
    )


def _get(source: Source, own: dict[str, Tensor], name: str) -> Tensor:
    if name not in own:
        raise AdapterError(f"{source.where}: the prefix lacks its tensor '{name}'; save it again")
    return own[name].float()
