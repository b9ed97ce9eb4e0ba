"""Head only: the backbone is frozen and only the task head is trained; the baseline every method must beat."""

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
class HeadOnly(Method):
    """Lightweight fine-tuning: no deltas at all.

    Shapes:
        None of its own; the head's are on the task.
    Parameters:
        0, the head excluded. RoBERTa-base with its two-layer classification head, two labels: 592,130 in the head.
    Use it when:
        You want the floor that every method must beat, or the backbone's features already tell the classes apart.
    Pitfalls:
        - It needs a much larger rate, and more steps, than fine-tuning does.
        - The head is often larger than another method's tensors: compare both numbers.
    Published:
        The repository of Wu et al. 2023 (arXiv 2306.15706), ViLT: VQA 65.75 with the head alone, 71.26 with full
        fine-tuning.
    """

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "Head only"
    paper: ClassVar[str] = "baseline; the 'frozen' setting of Ben-Zaken et al. 2021, arXiv 2106.10199"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2, source="sweep on small tasks (docs/results.md); BitFit's code uses 1e-3"
    )

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        return {}
