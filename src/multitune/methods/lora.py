"""LoRA (Hu et al. 2021, eq. 3):  y + (alpha / r) · B A x.   Legend: I in, O out, R rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Recipe
from multitune.methods.low_rank import LowRankWithEmbedding
from multitune.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankWithEmbedding):
    """A low-rank update of chosen linear maps; `A [I, R]` is Kaiming-uniform and `B [R, O]` zero at first.

    On a backbone with quantised weights this is QLoRA (Dettmers et al. 2023, arXiv 2305.14314): nothing here reads
    the frozen weights.

    Shapes:
        Per chosen linear `A [I, R]`, `B [R, O]`; `x [.., I]` adds `(alpha / r) · x A B [.., O]` to its output.
    Parameters:
        `R · (I + O)` per chosen linear. RoBERTa-base, query and value: r=1 36,864, r=8 294,912; all six linears, r=8
        1,327,104.
    Use it when:
        You want one safe choice: close to full fine-tuning on most tasks, and free to serve alone, since it merges.
    Pitfalls:
        - Comparing ranks at one `alpha` compares learning rates as well; `rank_stabilised` keeps them in step.
        - Rates of full fine-tuning are ten to a hundred times too small for it.
        - In the paper's table MRPC, RTE and STS-B start from an adapter trained on MNLI.
        - Merging in half precision rounds the update away where it is small beside the weight.
    Published:
        Hu et al. 2021, Table 2, RoBERTa-base, 0.3M parameters (full fine-tuning in brackets): MNLI 87.5 (87.6), SST-2
        95.1 (94.8), MRPC 89.7 (90.2), CoLA 63.4 (63.6), QNLI 93.3 (92.8), QQP 90.8 (91.9), RTE 86.6 (78.7), STS-B 91.5
        (91.2), average 87.2 (86.4).
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685, eq. 3; rank stabilised: arXiv 2312.03732"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3,
        source="sweep on small tasks (docs/results.md), without weight decay; RoBERTa-base scripts use 4e-4 to 5e-4, "
        "with a weight decay of 0.1",
    )

    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r) instead, so that larger ranks are not damped."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)
