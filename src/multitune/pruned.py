"""Pruned backbones: the smallest weights of the layers' linear maps set to zero for all tasks alike; what that saves.

DSEE's unstructured mask S₁ (Chen et al. 2021, arXiv 2111.00160) changes what the frozen weight is. As an adapter's own
it would be a sparse update of -w at every masked place: at a share p of the weights 8 p O I bytes where the weight has
4 O I, and 2 p O I operations more for each token instead of fewer. So it belongs to a backbone, which all its tasks
share, and on which every method works and mixes.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from multitune.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from multitune.backbone import Backbone

_KEY = "_multitune_pruned"
_NAME = re.compile(r"(?P<base>.+)\+pruned:(?P<share>[^+]*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """How a backbone was pruned."""

    share: float
    """Share of the linear maps' weights that are zero."""
    original: str
    """Fingerprint of the backbone before."""

    @classmethod
    def of(cls, model: nn.Module) -> Pruned | None:
        """How a model was pruned, or `None` if it was not."""
        found = model.__dict__.get(_KEY)
        assert isinstance(found, cls | None)
        return found


def prune(backbone: Backbone, share: float) -> Backbone:
    """A copy of a backbone in which the smallest weights of the layers' linear maps, all maps together, are zero.

    Dense kernels are no faster for it; `flops` says what kernels that skip zeros would save. A method that trains or
    is merged into weights fills zeros up again.

    Args:
        backbone: the backbone, which stays as it is.
        share: of all weights of these maps, at least 0 and below 1.

    Returns:
        A backbone with a fingerprint of its own, whose name `Backbone.load` takes: `minilm+pruned:0.3`.

    Raises:
        ConfigError: an impossible share.
        BackboneError: a backbone that is pruned or quantised already.
    """
    check_share(share)
    if backbone.pruned is not None or backbone.quantized is not None:
        what = "pruned: prune" if backbone.quantized is None else "quantised, which comes after pruning: prune"
        raise BackboneError(f"backbone '{backbone.name}' is already {what} the original")
    copied = backbone.clone()
    weights = [copied.model.get_submodule(path).get_parameter("weight") for path in linear_modules(copied)]
    with torch.no_grad():
        sizes = torch.cat([w.abs().flatten().float() for w in weights])
        count = math.floor(share * sizes.numel())
        if count:
            limit = sizes.kthvalue(count).values
            for weight in weights:
                weight.masked_fill_(weight.abs().float() <= limit, 0)
    copied.model.__dict__[_KEY] = Pruned(share=share, original=backbone.fingerprint)
    copied.name += f"+pruned:{share:g}"
    digest = hashlib.sha256(f"{backbone.fingerprint} pruned {share!r}".encode())
    copied.__dict__["fingerprint"] = digest.hexdigest()[:32]
    return copied


def check_share(share: float) -> None:
    """Raise `ConfigError` unless a share of the weights can be pruned."""
    if not 0 <= share < 1:
        raise ConfigError(f"pruning a share of {share:g} of the weights is not possible; give 0 <= share < 1")


def split_share(name: str) -> tuple[str, float | None]:
    """`"minilm+pruned:0.3"` as the name of the original and the share; a folder that exists is the original's.

    Raises:
        ConfigError: a share that is no number, or impossible.
    """
    found = None if Path(name).exists() else _NAME.fullmatch(name)
    if found is None:
        return name, None
    try:
        share = float(found["share"])
    except ValueError as error:
        raise ConfigError(
            f"backbone '{name}': '{found['share']}' is no share; give a number, such as {found['base']}+pruned:0.3"
        ) from error
    check_share(share)
    return found["base"], share


def linear_modules(backbone: Backbone) -> tuple[str, ...]:
    """Paths of the modules that the layers' linear maps are in, each once."""
    return tuple(dict.fromkeys(site.module for site in backbone.sites if site.kind == "linear"))


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations (a product and a sum are two) of one row's layers, without embeddings, norms and activations."""

    dense: int
    """The linear maps as they are, and attention's scores and averages."""
    without_heads: int
    """Of these, what cutting a share of every layer's attention heads out would save on any kernel."""
    without_zeros: int
    """Of the rest of the linear maps, what kernels that skip zero weights save; dense kernels save nothing."""
    update: int
    """What serving an update beside the weights adds. Merging it would fill zeros up again."""

    @property
    def saved(self) -> float:
        """Share of `dense` that is saved where heads are cut out, zeros skipped and the update served beside them."""
        return (self.without_heads + self.without_zeros - self.update) / self.dense


def flops(backbone: Backbone, length: int, *, pruned_heads: float = 0.0, update: int = 0) -> Flops:
    """What pruning saves in one row, counted from the equations.

    With T tokens a map `[O, I]` takes `2 T O I`, and attention with H heads of width K `2 · 2 T² H K` a layer. A cut
    head takes its share of query, key, value and attention output with it, of the scores and of the averages, and
    nothing of the feed-forward maps. Keys and values that several query heads share stay.

    Args:
        length: tokens T of the row.
        pruned_heads: share of every layer's heads that is cut out, as `DSEE.pruned_heads`; rounded down to heads.
        update: numbers of the update that serving multiplies each token with, such as `DSEE.num_parameters`.

    Raises:
        ConfigError: an impossible share or length.
    """
    check_share(pruned_heads)
    if length < 1:
        raise ConfigError(f"length={length} is not possible; give at least 1")
    heads = int(backbone.model.config.num_attention_heads)
    cut = math.floor(pruned_heads * heads) / heads
    roles = {"query", "attention_output"} | ({"key", "value"} if backbone.num_key_value_heads == heads else set())
    linear = attention = zeros = 0.0
    for site in backbone.find_sites("linear"):
        own = 2 * length * site.in_features * site.out_features
        kept = 1 - cut if site.role in roles else 1.0
        weight = backbone.frozen(site.name).weight
        assert isinstance(weight, torch.Tensor)
        linear += own
        attention += own - own * kept
        zeros += own * kept * float((weight == 0).float().mean())
        if site.role == "query":
            scores = 4 * length**2 * site.out_features
            linear += scores
            attention += cut * scores
    return Flops(
        dense=round(linear), without_heads=round(attention), without_zeros=round(zeros), update=2 * length * update
    )
