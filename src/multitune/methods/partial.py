"""What methods share that train some layers of the backbone itself and freeze the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta
from multitune.methods.base import Method

if TYPE_CHECKING:
    from multitune.backbone import Backbone


class PartialTuning(Method):
    """Trains the weights of whole layers in a copy of the backbone; saved as the tensors that changed.

    The backward pass ends at the lowest trained layer, and nothing below it is kept for that pass. Where several layers
    run with the same weights (ALBERT), all of them change together.
    """

    changes_weights: ClassVar[bool] = True

    def trained_layers(self, backbone: Backbone) -> range:
        """The layers to train, counted from 0 at the bottom.

        Raises:
            ConfigError: a layer that does not exist, or none.
        """
        raise NotImplementedError

    def weights(self, backbone: Backbone) -> dict[str, Tensor]:
        """The backbone's own weights that are trained, by their names in the model."""
        paths = next(s.layers for s in backbone.sites if s.kind == "layers")
        inside = tuple(f"{paths[i]}." for i in self.trained_layers(backbone))
        return {name: p.detach() for name, p in backbone.model.named_parameters() if name.startswith(inside)}

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        """A copy of the trained weights."""
        return {name: t.float().cpu().clone() for name, t in self.weights(backbone).items()}

    def num_parameters(self, backbone: Backbone) -> int:
        return sum(t.numel() for t in self.weights(backbone).values())

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        return {}
