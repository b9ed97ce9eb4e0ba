"""Pfeiffer adapters (Pfeiffer et al. 2020):  A(h) = h + f(h W_d + b_d) W_u + b_u behind the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from multitune.methods.base import Layers, Recipe, check_positive
from multitune.methods.registry import register
from multitune.methods.serial_adapter import Activation, Reads, SerialAdapter
from multitune.methods.size import Size

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class Pfeiffer(SerialAdapter):
    """One adapter behind the feed-forward, half the added depth of Houlsby's.

    Shapes:
        Per layer `W_d [D, M]`, `b_d [M]`, `W_u [M, D]`, `b_u [D]` with `M = D / reduction_factor`.
    Parameters:
        `L · (2·D·M + M + D)`. RoBERTa-base: M=48 894,528, M=64 1,189,632.
    Use it when:
        You want adapters at half of Houlsby's cost; on most tasks the two are close.
    Pitfalls:
        - It does not merge, and adds two products per layer, one after the other.
        - The bottleneck follows the width of the backbone: the same setting is another size elsewhere.
    Published:
        Hu et al. 2021, Table 2, RoBERTa-large, 3.0M parameters, one set-up for all methods: MNLI 90.2, SST-2 96.1, MRPC
        90.2, CoLA 68.3, QNLI 94.8, QQP 91.9, RTE 83.8, STS-B 92.1, average 88.4 (LoRA, 0.8M, same set-up: 88.6).
    """

    name: ClassVar[str] = "pfeiffer"
    title: ClassVar[str] = "Pfeiffer adapter"
    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv 2005.00247, section 3"
    sublayers: ClassVar[tuple[str, ...]] = ("ffn",)
    size: ClassVar[Size | None] = Size(
        fields=("reduction_factor",), settings=lambda n, b, _: {"reduction_factor": max(1, b.hidden_size // n)}
    )
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3, source="sweep on small tasks (docs/results.md)")

    reduction_factor: int = 16
    """The bottleneck is the width divided by this."""
    activation: Activation = "relu"
    """Non-linearity between the two matrices."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""
    layer_norms: bool = False
    """Also train the layer norms."""
    reads: Reads = "output"
    """What it reads: the sub-layer's output, or what the frozen norm behind the residual sum makes of it (seq_bn of
    AdapterHub's library)."""

    def __post_init__(self) -> None:
        check_positive(self, "reduction_factor")
        self.check_reads()

    def width(self, backbone: Backbone) -> int:
        return max(1, backbone.hidden_size // self.reduction_factor)
