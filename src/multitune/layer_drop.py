"""AdapterDrop (Rücklé et al. 2021, arXiv 2010.11918): serve an adapter without its deltas in the lowest layers.

Rows that share the lowest layers' bare activations cost less there and lose little, because adapters matter most near
the top. The paper drops adapters; here any method is served so whose deltas belong to single layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from multitune.deltas import Delta
from multitune.errors import ConfigError

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def without_layers(
    deltas: Mapping[str, Sequence[Delta]], layers: Iterable[int], backbone: Backbone, adapter: str
) -> dict[str, list[Delta]]:
    """The deltas, by site name, without those at the sites of `layers`; deltas outside the layers stay.

    Args:
        layers: indices from 0, the lowest.
        adapter: what messages call the adapter.

    Raises:
        ConfigError: a layer the backbone lacks, or one in which the adapter has nothing that could be dropped: its
            deltas are elsewhere, or one delta serves all layers (AoT).
    """
    layer_of = {site.name: site.layer for site in backbone.sites}
    for layer in layers:
        if layer not in range(backbone.num_layers):
            raise ConfigError(
                f"drop_layers: layer {layer} does not exist; this backbone has layers 0 to {backbone.num_layers - 1}"
            )
        if not any(layer_of[site] == layer for site in deltas):
            have = sorted({place for site in deltas if (place := layer_of[site]) is not None})
            raise ConfigError(
                f"drop_layers: adapter '{adapter}' has no deltas of its own in layer {layer} that could be dropped; "
                f"it has some in {f'layers {have}' if have else 'no single layer, so serve it whole'}"
            )
    if "layers" in deltas:
        raise ConfigError(
            f"drop_layers: one {deltas['layers'][0].kind} of adapter '{adapter}' serves all layers at once and cannot "
            f"be dropped in some; serve it whole"
        )
    dropped = set(layers)
    return {site: list(of_site) for site, of_site in deltas.items() if layer_of[site] not in dropped}
