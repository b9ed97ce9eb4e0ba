"""Starts from real text, for methods whose vectors stand among a row's words or their keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune.methods.base import Method, check

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def token_ids(method: Method, backbone: Backbone, setting: str, text: str) -> list[int]:
    """Token ids of `text` without special tokens; `setting` is the hyper-parameter it comes from.

    Raises:
        ConfigError: the backbone has no tokenizer, or the text has no tokens.
    """
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        fix = f"give it one, Backbone(model, tokenizer), or leave {setting} out"
        check(False, method, f"{setting} needs a tokenizer, which backbone '{backbone.name}' lacks", fix)
    assert tokenizer is not None
    with backbone.tokenizer_lock:
        ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
    check(bool(ids), method, f"{setting}={text!r} has no tokens", "give at least one word")
    return ids


def repeat_to(ids: list[int], length: int) -> list[int]:
    """`ids` repeated or cut to `length`."""
    return (ids * -(-length // len(ids)))[:length]


def embeddings_of(backbone: Backbone, ids: list[int]) -> Tensor:
    """Frozen word embeddings `[n, E]` of token ids: a float32 copy on the CPU."""
    return backbone.embed(torch.tensor(ids)).float().cpu().clone()
