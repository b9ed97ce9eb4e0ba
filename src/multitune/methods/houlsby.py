"""Houlsby adapters (Houlsby et al. 2019):  LN(x + A(SubLayer(x))),  A(h) = h + f(h W_d + b_d) W_u + b_u."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from multitune.methods.base import Layers, Recipe, check_positive
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation, SerialAdapter

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class Houlsby(SerialAdapter):
    """One adapter behind attention and one behind the feed-forward, each before the residual sum."""

    name: ClassVar[str] = "houlsby"
    title: ClassVar[str] = "Houlsby adapter"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751, section 2.1"
    sublayers: ClassVar[tuple[str, ...]] = ("attention", "ffn")
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3, source="sweep on small tasks (docs/results.md); the released example uses 3e-4"
    )

    bottleneck: int = 64
    """Width M of the bottleneck."""
    activation: Activation = "gelu"
    """Non-linearity between the two matrices."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""
    layer_norms: bool = False
    """Also train the layer norms, as the released code does."""

    def __post_init__(self) -> None:
        check_positive(self, "bottleneck")

    def width(self, backbone: Backbone) -> int:
        return self.bottleneck
