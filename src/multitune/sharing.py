"""Which layers of a pass are the bare backbone's, and rows that can therefore share them.

One text asked of many tasks differs only from the first layer on that one of the tasks' adapters touches. Below that
layer the text runs once and is then expanded to its rows; each row stays what it is alone.

Legend: B rows, U rows that run below the cut, L layers, T tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune import passes
from multitune.inputs import Batch
from multitune.plan import DeltaSet, Plan
from multitune.workspace import Workspace

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

#: A pass is cut where that saves at least this share of the rows' passes through layers: a second pass through the
#: embeddings and a second plan cost something too.
WORTH = 0.1


def first_touched(delta_set: DeltaSet | None, backbone: Backbone) -> int:
    """The lowest layer whose input or weights an adapter changes: 0 to L, L where it leaves the backbone alone."""
    if delta_set is None:
        return backbone.num_layers
    if delta_set.num_positions:  # lengthened rows, and tokens that count from elsewhere
        return 0
    sites = {site.name: site for site in backbone.sites}
    return min(
        (_layer_of(sites[name], backbone) for name, d in delta_set.by_site.items() if d), default=backbone.num_layers
    )


def _layer_of(site: Site, backbone: Backbone) -> int:
    if site.layer is not None:
        return site.layer
    # A norm behind the last layer: a pass can be cut only in front of a layer.
    return backbone.num_layers - 1 if site.role in backbone.architecture.final_norms else 0


def first_trained(weights: Iterable[str], backbone: Backbone) -> int:
    """The lowest layer whose input or weights change with these weights of the model, by their names: 0 to L."""
    return min((_layer_of_weight(name, backbone) for name in weights), default=backbone.num_layers)


def _layer_of_weight(name: str, backbone: Backbone) -> int:
    paths = next(s.layers for s in backbone.sites if s.kind == "layers")
    found = next((i for i, path in enumerate(paths) if name.startswith(f"{path}.")), None)
    if found is not None:
        return found
    final = tuple(f"{path}." for path in backbone.architecture.final_norms.values())
    return backbone.num_layers - 1 if name.startswith(final) else 0


@dataclass(frozen=True)
class Cut:
    """Where a batch is cut, and which of its rows run below the cut."""

    layer: int
    """1 to L: the layers below it run for some rows only."""
    rows: tuple[int, ...]
    """`[U]`: the rows that run below."""
    bare: tuple[bool, ...]
    """`[U]`: whether nothing of the row's adapter lies below the cut."""
    expand: tuple[int, ...]
    """`[B]`: for every row the place in `rows` of the one that runs for it."""


def find_cut(texts: Sequence[Hashable], touched: Sequence[int], num_layers: int) -> Cut | None:
    """The cut that saves most, or `None` where none is worth it.

    Args:
        texts: `[B]`: equal for rows that go into the model with the same tokens.
        touched: `[B]`: the first layer that each row's adapter touches, as `first_touched` gives it.
    """
    if len(set(texts)) == len(texts):
        return None
    best, most = None, max(1.0, WORTH * num_layers * len(texts))
    for layer in sorted(set(touched) - {0}):
        bare = [first >= layer for first in touched]
        # A row whose adapter touches something below the cut runs for itself alone.
        keys = [(text, -1 if alike else i) for i, (text, alike) in enumerate(zip(texts, bare, strict=True))]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        saved = layer * (len(keys) - len(places))
        if saved >= most:
            rows = tuple(keys.index(key) for key in places)
            best, most = Cut(layer, rows, tuple(bare[i] for i in rows), tuple(places[key] for key in keys)), saved
    return best


def run_cut(
    backbone: Backbone,
    cut: Cut,
    plan: Plan,
    rows: Sequence[DeltaSet | None],
    batch: Batch,
    workspace: Workspace | None = None,
) -> Tensor:
    """`Backbone.run` with the rows of one text run once below the cut: `[B, T, D]`.

    Args:
        plan: of `rows`, not in pieces.
        rows: `[B]`: per row its deltas.
        workspace: as `Plan` takes it.
    """
    index, expand = (torch.tensor(i, device=batch.input_ids.device) for i in (cut.rows, cut.expand))
    own = batch.rows(index)
    lower = Plan([None if bare else rows[i] for i, bare in zip(cut.rows, cut.bare, strict=True)], workspace)
    if cut.layer == backbone.num_layers:
        return passes.run(backbone, lower, own)[expand]
    states = backbone.run_below(lower, cut.layer, own)[expand]
    return backbone.run_above(plan, cut.layer, states, batch)
