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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.backbone import Backbone
from multitune.batching import Encoded, encode, pad
from multitune.errors import ConfigError, DataError
from multitune.inputs import Batch
from multitune.plan import Plan
from multitune.tasks import Task


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

    @property
    def turn(self) -> int:
        """The layer with the largest gain: it and all below it are frozen."""
        return self.trained[0] - 1

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON values."""
        return {"trained": list(self.trained), "deviations": list(self.deviations), "gains": list(self.gains)}


#: Rows of a task that layers are chosen by, drawn evenly from its training rows: the means hardly move with more.
NUM_ROWS = 512


def choose_layers(
    backbone: Backbone, texts: Sequence[str | tuple[str, ...]], *, max_length: int = 128, batch_size: int = 32
) -> LayerChoice:
    """Measure every layer's gain on `texts`, and choose the layers above the one with the largest.

    The uppermost layer is always trained, so its gain is not asked for.

    Args:
        texts: texts, or pairs of texts that stand in one sequence.
        max_length: tokens that a text is cut to.

    Raises:
        DataError: no texts.
        ConfigError: the backbone has one layer only.
        BackboneError: an encoder-decoder whose decoder runs.
    """
    sequences = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    return _choose(backbone, encode(backbone, sequences, max_length=max_length), batch_size)


def choose_layers_for(backbone: Backbone, task: Task, table: Any, *, max_length: int = 128) -> LayerChoice:
    """`choose_layers` by rows of a task, as its template reads them; of many rows by `NUM_ROWS`, evenly drawn.

    Args:
        table: rows; labels are not looked at.

    Raises:
        DataError: no rows, or one that does not fit the task.
        ConfigError: the backbone has one layer only.
        BackboneError: an encoder-decoder whose decoder runs.
    """
    every = -(-len(table) // NUM_ROWS) or 1
    examples = task.examples([table[i] for i in range(0, len(table), every)], labelled=False)
    texts = [sequence for example in examples for sequence in example.texts]
    return _choose(backbone, encode(backbone, texts, max_length=max_length, words=task.kind == "tagging"), 32)


def _choose(backbone: Backbone, encoded: Sequence[Encoded], batch_size: int) -> LayerChoice:
    if not encoded:
        raise DataError("there are no texts to choose layers by; give some of the training texts")
    backbone.refuse_decoder("layers are not chosen by texts", "name them: layers=0,1,2")
    if backbone.num_layers < 2:
        raise ConfigError(f"backbone '{backbone.name}' has one layer, so that there is nothing to choose")
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


def _states(backbone: Backbone, batch: Batch) -> list[Tensor]:
    """What goes into every layer, and the last hidden state: L + 1 tensors `[B, T, D]`."""
    states: list[Tensor] = []

    front = 0 if backbone.lsg is None else backbone.lsg.num_global  # global tokens stand for no token of the text

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[:, front:])

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


def write_plot(path: str | Path, choice: LayerChoice, title: str) -> None:
    """Write a PNG: every layer's gain as a bar, those that are trained in another colour, and the deviations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained, frozen, line = "#d95f02", "#b9c6d3", "#1f6fb4"
    figure = Figure(figsize=(6.4, 3.6))
    figure.subplots_adjust(left=0.12, right=0.88, bottom=0.14, top=0.91)
    FigureCanvasAgg(figure)  # no pyplot: that would choose a backend for the whole process
    left, layers = figure.add_subplot(), range(len(choice.gains))
    for name, colour, chosen in (
        ("frozen", frozen, [i for i in layers if i not in choice.trained]),
        ("trained", trained, list(choice.trained)),
    ):
        left.bar(chosen, [choice.gains[i] for i in chosen], color=colour, label=name)
    left.axhline(0, color="black", linewidth=0.6)
    left.set_xticks(list(layers))
    left.set_xlabel("layer")
    left.set_ylabel("gain")
    left.set_ylim(top=max(*choice.gains, 0) * 1.2)
    left.legend(loc="upper center", ncols=2, fontsize=8, frameon=False)
    left.set_title(title, fontsize=10)
    right = left.twinx()
    right.plot([i + 0.5 for i in layers], choice.deviations[1:], color=line, marker="o", markersize=4, linewidth=1.2)
    right.set_ylim(0, max(choice.deviations[1:]) * 1.2)
    right.set_ylabel("distance from the last hidden state", color=line)
    right.tick_params(axis="y", labelcolor=line)
    figure.savefig(path, format="png", dpi=120)
