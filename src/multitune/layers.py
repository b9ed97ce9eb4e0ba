"""Which layers to train? Measured on texts by where the hidden states turn towards what the head reads.

After semantic-aware layer freezing (Gu et al. 2024, arXiv 2406.11753): each layer's *gain* in bringing the hidden
states towards their end is measured by inference alone, the layer with the largest gain and all below it are frozen,
and the layers above are trained. The paper's own formulas of deviation and gain could not be read; these are ours:

    deviation_l = mean over tokens of 1 - cos(h_l, h_L),   gain_l = deviation_(l-1) - deviation_l

with h_0 the embeddings, h_l the output of the l-th layer and h_L the last hidden state, its final norm included.

Legend: L layers, B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.backbone import Backbone
from multitune.batching import encode, pad
from multitune.errors import ConfigError, DataError
from multitune.plan import Plan


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What was measured, and the layers it says to train."""

    deviations: tuple[float, ...]
    """`[L + 1]`: distance of the embeddings' and every layer's output from the last hidden state, 0 to 2."""
    gains: tuple[float, ...]
    """`[L]`: by how much each layer lowers it; may be negative."""
    trained: tuple[int, ...]
    """Layers to train, counted from 0: all above the one with the largest gain. As `layers=` of a method, or
    `Freeze(first=trained[0])`."""


def choose_layers(
    backbone: Backbone, texts: Sequence[str], *, max_length: int = 128, batch_size: int = 32
) -> LayerChoice:
    """Measure every layer's gain on `texts`, and choose the layers above the one with the largest.

    The uppermost layer is always trained, so its gain is not asked for.

    Raises:
        DataError: no texts.
        ConfigError: the backbone has one layer only.
    """
    if not texts:
        raise DataError("there are no texts to choose layers by; give some of the training texts")
    if backbone.num_layers < 2:
        raise ConfigError(f"backbone '{backbone.name}' has one layer, so that there is nothing to choose")
    encoded = encode(backbone, [(text,) for text in texts], max_length=max_length, words=False)
    encoded = sorted(encoded, key=len)
    sums, tokens = torch.zeros(backbone.num_layers + 1, dtype=torch.double), 0
    for start in range(0, len(encoded), batch_size):
        batch = pad(encoded[start : start + batch_size], backbone.pad_id).to(backbone.device)
        states = _states(backbone, batch)
        mask = batch.attention_mask
        real = torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask.bool()
        last = states[-1][real].float()
        away = [1 - F.cosine_similarity(state[real].float(), last, dim=-1) for state in states]
        sums += torch.stack([a.double().sum() for a in away]).cpu()
        tokens += int(real.sum())
    deviations = (sums / tokens).tolist()
    gains = [before - after for before, after in pairwise(deviations)]
    turn = max(range(backbone.num_layers - 1), key=gains.__getitem__)
    return LayerChoice(
        deviations=tuple(deviations), gains=tuple(gains), trained=tuple(range(turn + 1, backbone.num_layers))
    )


def _states(backbone: Backbone, batch: Any) -> list[Tensor]:
    """What goes into every layer, and the last hidden state: L + 1 tensors `[B, T, D]`."""
    states: list[Tensor] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    paths = next(s.layers for s in backbone.sites if s.kind == "layers")
    modules = [backbone.model.get_submodule(path) for path in dict.fromkeys(paths)]  # one may run as several layers
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            plan = Plan([None] * len(batch.input_ids))
            last = backbone.run(plan, batch.input_ids, batch.attention_mask, batch.token_type_ids)
    finally:
        for handle in handles:
            handle.remove()
    return [*states, last]
