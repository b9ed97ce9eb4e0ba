"""Prefix tuning:  PEFT keeps `prompt_embeddings [M, L·2·D]`, keys and values of every layer, the projection done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune.convert.peft.family import Family, Source, Written, family
from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.methods.prefix_memory import PrefixMemory
from multitune.methods.ptuning_v2 import PTuningV2

if TYPE_CHECKING:
    from multitune.backbone import Backbone

VECTORS = "prompt_embeddings"


@family
class PrefixFamily(Family):
    """`peft_type` PREFIX_TUNING. PEFT passes the prefix as a cache, which the model counts as positions."""

    peft_type = "PREFIX_TUNING"
    methods = ("prefix", "ptuning_v2")
    prompt = True
    settings = frozenset(
        {
            "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
            "encoder_hidden_size", "prefix_projection", "init_weights",
        }
    )  # fmt: skip

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        vectors = source.tensors.get(VECTORS)
        sites = source.backbone.find_sites("attention")
        width = sites[0].in_features
        if vectors is None or vectors.ndim != 2 or vectors.shape[1] != len(sites) * 2 * width:
            found = "no" if vectors is None else f"{tuple(vectors.shape)}"
            raise AdapterError(
                f"{source.where}: {found} '{VECTORS}' where [length, {len(sites) * 2 * width}] is expected: keys and "
                f"values of width {width} for {len(sites)} layers"
            )
        by_layer = vectors.view(vectors.shape[0], len(sites), 2, width)
        params = {
            f"{site.name}.{key}": by_layer[:, i, k]
            for i, site in enumerate(sites)
            for k, key in enumerate(("keys", "values"))
        }
        return PTuningV2(length=vectors.shape[0], shift_positions=True), params

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        method, params = method.finish(params, backbone)
        assert isinstance(method, PrefixMemory)
        if not method.shift_positions:
            raise AdapterError(
                "it was trained with shift_positions=false, and PEFT lets a prefix shift the positions of the text, so "
                "that it would compute something else there; only prefixes trained with shift_positions=true can be "
                "exported"
            )
        sites = list(method.sites(backbone))
        if method.layers is not None and len(sites) != backbone.num_layers:
            raise AdapterError(f"it has keys and values in layers {list(method.layers)} only, PEFT's in every one")
        stacked = torch.stack([params[f"{s.name}.{k}"] for s in sites for k in ("keys", "values")], dim=1)
        settings = {
            "num_virtual_tokens": method.length,
            "token_dim": sites[0].in_features,
            "num_transformer_submodules": 1,
            "num_attention_heads": backbone.num_key_value_heads,
            "num_layers": backbone.num_layers,
            "encoder_hidden_size": sites[0].in_features,
            "prefix_projection": False,
        }
        return Written(config=settings, tensors={VECTORS: stacked.flatten(1)})
