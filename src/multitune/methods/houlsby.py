"""Houlsby adapters (Houlsby et al. 2019):  LN(x + A(SubLayer(x))),  A(h) = h + f(h W_d + b_d) W_u + b_u."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from multitune.methods.base import Layers, Recipe, check_positive
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation, Reads, SerialAdapter

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class Houlsby(SerialAdapter):
    """One adapter behind attention and one behind the feed-forward, each before the residual sum.

    Shapes:
        Twice per layer `W_d [D, M]`, `b_d [M]`, `W_u [M, D]`, `b_u [D]`.
    Parameters:
        `2 · L · (2·D·M + M + D)`, and `4 · L · D` with `layer_norms`. RoBERTa-base: M=8 313,536, M=64 2,379,264.
    Use it when:
        The task is far from what the backbone was trained on, and some latency is affordable.
    Pitfalls:
        - It does not merge, and its two products run one after the other: small batches feel that most.
        - The released code trains the layer norms too; `layer_norms` does so here.
    Published:
        Houlsby et al. 2019: within 0.4 points of full fine-tuning on GLUE with 3.6 % of the parameters (abstract). Hu
        et al. 2021, Table 1, GPT-2 medium, one row of 128 tokens: 30 % slower than merged weights.
    """

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
    reads: Reads = "output"
    """What it reads: the sub-layer's output, or what the frozen norm behind the residual sum makes of it."""

    def __post_init__(self) -> None:
        check_positive(self, "bottleneck")
        self.check_reads()

    def width(self, backbone: Backbone) -> int:
        return self.bottleneck
