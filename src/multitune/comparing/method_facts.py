"""What a report says about methods beside their scores: family, whether they merge and mix; read from their deltas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from multitune.errors import MultituneError

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: Family of a method by the kind of delta it yields. Methods of one family share a colour in plots.
FAMILIES = {
    "LowRank": "low rank",
    "SharedLowRank": "low rank",
    "EmbeddingLowRank": "low rank",
    "Bottleneck": "adapter",
    "Memory": "prompt",
    "Prompt": "prompt",
    "TokenBias": "token table",
    "SparseWeight": "sparse update",
    "Scale": "scale or bias",
    "InputScale": "scale or bias",
    "Bias": "scale or bias",
    "Affine": "scale or bias",
}


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """What a method is, whatever it scores."""

    title: str
    family: str
    merges: bool | None
    """Whether it folds into the weights of an encoder with biases; none where the method is not installed."""
    mixes: bool | None
    """Whether its rows share a batch with other methods'."""


@cache
def facts_of(name: str) -> MethodFacts:
    """Facts of a method, or of several joined by "+"; those of one that is not installed are unknown."""
    import torch

    from multitune.merging import why_not_mergeable
    from multitune.methods import make_method
    from multitune.plan import DeltaSet

    try:
        method = make_method(name)
        backbone = _tiny()
        deltas = DeltaSet(method.deltas(method.init(backbone, torch.Generator().manual_seed(0)), backbone))
    except MultituneError:
        return MethodFacts(title=name, family="other", merges=None, mixes=None)
    kinds = {FAMILIES.get(d.kind, "other") for of_site in deltas.by_site.values() for d in of_site}
    families = (kinds - {"scale or bias"}) or kinds
    family = "combined" if len(families) > 1 else next(iter(families), "head only")
    if method.changes_weights:
        family = "weights"
    return MethodFacts(
        title=method.title,
        family=family,
        merges=why_not_mergeable(backbone, deltas) is None,
        mixes=not method.changes_weights,
    )


@cache
def _tiny() -> Backbone:
    """An encoder of random weights, to make deltas for; its name and size are in no fact."""
    import torch
    from transformers import BertConfig, BertModel

    from multitune.backbone import Backbone

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not this module's to draw
        return Backbone(BertModel(config), name="tiny")
