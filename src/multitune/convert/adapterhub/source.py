"""What a family reads: one method's settings and tensors, and where in the backbone they belong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.sites import Site

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: What a family makes of a source.
Read = tuple[Method, dict[str, Tensor]]

#: Where the library keeps a layer's bottlenecks, by the path below the layer, and the sub-layer each stands behind.
PLACES = {
    "attention.output": "attention",
    "attention.attention_adapters": "attention",
    "output": "ffn",
    "attention_adapters": "attention",
    "output_adapters": "ffn",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One method of a checkpoint."""

    where: str
    """What messages call the checkpoint."""
    config: Mapping[str, Any]
    """The method's settings."""
    version: str
    """Version of the library that wrote it."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By the path of the module they sit in, without a task head's prefix, then by the name they have there."""
    shared: Mapping[str, Tensor]
    """What the adapters of all layers share."""
    backbone: Backbone

    def refuse(self, setting: str, why: str) -> AdapterError:
        """An error about a setting that our methods cannot express."""
        return AdapterError(f"{self.where}: {setting}={self.config.get(setting)!r} {why}, so it is not imported")

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Raise `AdapterError` if a setting is on that is not known here."""
        for key, value in self.config.items():
            if value and key not in known:
                raise self.refuse(key, "changes what the adapter computes in a way that is not supported here")

    def sublayers(self, path: str) -> list[Site]:
        """The sub-layers that the bottleneck at a path stands behind: several where one layer runs as several.

        Raises:
            AdapterError: there is no such place in this backbone.
        """
        (layers,) = self.backbone.find_sites("layers")
        found = [
            site
            for i, layer in enumerate(layers.layers)
            if path.startswith(f"{layer}.") and (role := PLACES.get(path.removeprefix(f"{layer}.")))
            for site in self.backbone.find_sites("sublayer", (role,), (i,))
        ]
        if not found:
            raise self._nowhere(path)
        return found

    def linears(self, path: str) -> list[Site]:
        """The linear sites of a module, in the order of its output features, or of its passes.

        Raises:
            AdapterError: the module is no site of this backbone.
        """
        found = [s for s in self.backbone.sites if s.kind == "linear" and s.module == path]
        if not found:
            raise self._nowhere(path)
        return sorted(found, key=lambda s: (s.layer, s.part))

    def _nowhere(self, path: str) -> AdapterError:
        model_type = self.backbone.model.config.model_type
        return AdapterError(
            f"{self.where}: it adapts '{path}', which is no place of backbone '{self.backbone.name}' ({model_type}): "
            f"the checkpoint is of another model, or of a decoder that does not run here"
        )


def whole_layers(source: Source, layers: Collection[int]) -> tuple[int, ...] | None:
    """Layers as our methods take them: `None` for all."""
    return None if len(layers) == source.backbone.num_layers else tuple(sorted(layers))
