"""What an adapter's file records about its backbone, and by what it knows these weights again."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def fingerprint_of(backbone: Backbone) -> str:
    """`Backbone.fingerprint`: a hash of the names, shapes and sampled values of its tensors.

    Values are sampled evenly (a few hundred a tensor) and rounded to bfloat16, so that the same weights loaded
    in bfloat16 keep their fingerprint. By way of float16 they would be rounded twice and now and then
    otherwise, so `load` takes the fingerprint before it casts to float16. The pooler is left out: transformers
    builds some task models without it.
    """
    digest = hashlib.sha256(backbone.model.config.model_type.encode())
    if backbone.decodes:
        digest.update(b"decoder")
    if backbone.lsg is not None:
        digest.update(backbone.lsg.key.encode())
    pooler = backbone.architecture.pooler
    for name, tensor in sorted(backbone.model.state_dict().items()):
        if pooler is not None and name.startswith(f"{pooler}."):
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def describe(backbone: Backbone) -> dict[str, Any]:
    """`Backbone.describe`: what an adapter file records about the backbone it was trained on."""
    found = {
        "name": backbone.name,
        "architecture": backbone.model.config.model_type,
        "hidden_size": backbone.hidden_size,
        "num_layers": backbone.num_layers,
        "vocab_size": backbone.vocab_size,
        "fingerprint": backbone.fingerprint,
    }
    found |= {"decoder": True} if backbone.decodes else {}
    found |= {} if backbone.lsg is None else {"lsg": asdict(backbone.lsg)}
    found |= {} if backbone.pruned is None else {"pruned": asdict(backbone.pruned)}
    return found | ({} if backbone.quantized is None else {"quantized": asdict(backbone.quantized)})
