"""LoRA of the word embeddings:  PEFT keeps `lora_embedding_A [R, V]`, `lora_embedding_B [E, R]`, we their transposes.

PEFT may save the frozen table beside them, which a backbone has already.   Legend: V vocabulary, E width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multitune.convert.peft.family import Source
from multitune.errors import AdapterError

A, B, FROZEN = ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight"


def read_words(source: Source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both factors by the path of their table, which is that of the word embeddings; empty where a checkpoint has none.

    Raises:
        AdapterError: another table, such as that of positions; DoRA; or a frozen table that is not the backbone's.
    """
    first, second = source.by_module(A), source.by_module(B)
    path = source.backbone.architecture.embedding
    others = sorted({*first, *second} - {path})
    if others:
        raise AdapterError(
            f"{source.where} adapts the table '{others[0]}', and of tables LoRA here adapts only the word embeddings, "
            f"'{path}'"
        )
    if first and source.config.get("use_dora"):
        raise AdapterError(f"{source.where}: use_dora=True on '{path}', and our DoRA adapts linear maps alone")
    own = source.backbone.word_embeddings.detach().float().cpu()
    for name, frozen in source.by_module(FROZEN).items():
        if name != path or frozen.shape != own.shape or not torch.allclose(frozen.float(), own):
            raise AdapterError(
                f"{source.where}: its base weight '{name}' {tuple(frozen.shape)} is not the backbone's word embeddings "
                f"{tuple(own.shape)}: they were resized or trained, which an adapter here cannot hold"
            )
    return first, second
