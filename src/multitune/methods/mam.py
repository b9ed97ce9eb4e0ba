"""Mix-and-match adapter (He et al. 2022): a short prefix in attention and a scaled parallel adapter at the FFN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta
from multitune.methods.base import Layers, Method, Recipe, check_positive
from multitune.methods.parallel import ParallelAdapter
from multitune.methods.ptuning_v2 import PTuningV2
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation
from multitune.methods.size import Size

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class MAM(Method):
    """The prefix is trained directly, without a network over it; it takes attention mass, so a fresh one shows.

    Shapes:
        Per layer `keys [P, H·K]` and `values [P, H·K]` in attention, and beside the feed-forward `W_d [D, M]`, `b_d
        [M]`, `W_u [M, D]`, `b_u [D]`, with `learn_scale` also `s [1]`. P is `prefix_length`, M the bottleneck.
    Parameters:
        `L · (2·P·H·K + 2·D·M + M + D)`, one more per layer with `learn_scale`. RoBERTa-base: P=16, M=16 599,232.
    Use it when:
        Neither a prefix nor an adapter alone is enough, and half a percent of the parameters is affordable.
    Pitfalls:
        - A fresh one is not the identity: the prefix takes attention mass from the first step.
        - Prefixes usually want larger rates than adapters, and both have one here.
        - Settings for classification and for generation differ much: 16 and 16 with scale 2, against 30 and 512 with
          scale 4.
        - Neither part merges.
    Published:
        Second-hand from AdapterHub: RoBERTa-base SST-2 94.2, MNLI 87.4; XSum R-1/R-2/R-L 45.12/21.90/36.91, En-Ro BLEU
        37.5. AdapterHub's own runs, one seed: SST-2 94.26, MNLI 86.47, XSum R-2 21.75, En-Ro 36.9.
    """

    name: ClassVar[str] = "mam"
    title: ClassVar[str] = "MAM adapter"
    paper: ClassVar[str] = "He et al. 2022, arXiv 2110.04366, section 4.6"
    identity_at_init: ClassVar[bool] = False
    size: ClassVar[Size | None] = Size(  # both parts alike, as in the released script for GLUE
        fields=("bottleneck", "prefix_length"), settings=lambda n, *_: {"bottleneck": n, "prefix_length": n}
    )
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3,
        source="not swept yet: that of the parallel adapter, without weight decay; the released GLUE script uses 1e-4, "
        "a weight decay of 0.1 and 10 epochs",
    )

    prefix_length: int = 16
    """Number of key/value pairs per layer; the released scripts use 16 (GLUE) and 30 (generation)."""
    bottleneck: int = 16
    """Width of the parallel adapter; the released scripts use 16 (GLUE) and 512 (generation)."""
    scale: float = 2.0
    """Factor of the parallel adapter: 2 in the released GLUE script, 4 for generation."""
    learn_scale: bool = False
    """Train that factor, one per layer."""
    activation: Activation = "relu"
    """Non-linearity of the parallel adapter."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        check_positive(self, "prefix_length", "bottleneck")

    def _parts(self) -> tuple[PTuningV2, ParallelAdapter]:
        prefix = PTuningV2(length=self.prefix_length, layers=self.layers)
        adapter = ParallelAdapter(
            bottleneck=self.bottleneck,
            scale=self.scale,
            learn_scale=self.learn_scale,
            activation=self.activation,
            layers=self.layers,
        )
        return prefix, adapter

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        prefix, adapter = self._parts()
        return prefix.init(backbone, generator) | adapter.init(backbone, generator)

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        found: dict[str, list[Delta]] = {}
        for part in self._parts():
            own = {
                site.name for site in part.sites(backbone)
            }  # an attention site has the prefix, a sub-layer the other
            found |= part.deltas({k: t for k, t in params.items() if k.rsplit(".", 1)[0] in own}, backbone)
        return found
