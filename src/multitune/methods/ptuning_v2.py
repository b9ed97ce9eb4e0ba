"""P-tuning v2 (Liu et al. 2022): trained keys and values in front of every layer's own.   Legend: M length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from multitune.methods.base import Recipe
from multitune.methods.prefix_memory import PrefixMemory
from multitune.methods.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixMemory):
    """Deep prompts: `keys, values [M, H·K]` per layer. They take attention mass, so a fresh one is no identity.

    Shapes:
        Per layer `keys [M, H·K]` and `values [M, H·K]`; each head's queries see M more entries, rows keep their length.
    Parameters:
        `2·L·M·H·K`. RoBERTa-base: M=8 147,456, M=20 368,640, M=128 2,359,296. With `reparametrise` `M·D + D·N + N +
        2·L·H·K·(N + 1)` are trained and as many saved as without.
    Use it when:
        You want prompts on a backbone of ordinary size: they act in every layer and cost no positions.
    Pitfalls:
        - The length matters by task: below 20 for simple classification, about 100 for sequence labelling.
        - The authors call search a part of the method; RTE with short prompts and few epochs stays near chance.
        - `reparametrise` helps some tasks and harms others (section 3.3), and wants a smaller learning rate.
        - Positions do not shift unless `shift_positions` is set; PEFT's prefixes are trained with shifted ones.
    Published:
        The authors' repository, RoBERTa-large, dev: BoolQ 84.0, COPA 92.0, RTE 86.6, WiC 73.7, WSC 64.4, CoNLL04 88.4,
        OntoNotes 90.1, CoNLL12 84.7, SQuAD 1.1 88.1 / 94.2 (EM / F1).
    """

    name: ClassVar[str] = "ptuning_v2"
    title: ClassVar[str] = "P-tuning v2"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2110.07602, section 3.2"
    identity_at_init: ClassVar[bool] = False
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2, source="sweep on small tasks (docs/results.md); released scripts use 5e-3 to 1e-2"
    )

    length: int = 16
    reparametrise: bool = False
