"""Full fine-tuning: every weight of the backbone is trained, W → W + ΔW; the baseline that shares nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta
from multitune.methods.base import Method, Recipe
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Trains a copy of the backbone. Saved as the tensors that changed; served as a backbone of its own.

    Shapes:
        Those of the backbone's weights.
    Parameters:
        All of the backbone's, the pooler excepted. RoBERTa-base: 124,055,040.
    Use it when:
        You need the baseline that the other methods are compared with, and one model per task is no burden.
    Pitfalls:
        - It shares nothing: no mixed batches, and one copy of the backbone per task in memory.
        - AdamW takes 16 bytes a parameter in training, before activations.
        - Small training sets make it unstable; try several seeds.
    Published:
        Hu et al. 2021, Table 2, RoBERTa-base: MNLI 87.6, SST-2 94.8, MRPC 90.2, CoLA 63.6, QNLI 92.8, QQP 91.9, RTE
        78.7, STS-B 91.2, average 86.4.
    """

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    paper: ClassVar[str] = "Devlin et al. 2018, arXiv 1810.04805, section 3.2"
    changes_weights: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-4,
        weight_decay=0.01,
        source="sweep on small tasks (docs/results.md); Devlin et al. 2018, appendix A.3: 2e-5 to 5e-5",
    )

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        """A copy of every weight that the last hidden state depends on (the pooler is a head's choice)."""
        return {name: p.detach().float().cpu().clone() for name, p in backbone.used_parameters().items()}

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        return {}
