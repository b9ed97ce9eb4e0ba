"""Prefix-tuning (Li & Liang 2021):  softmax(q [P_k ; K]ᵀ / √d) [P_v ; V],  [P_k ; P_v]_i = tanh(P'_i W₁ + b₁) W₂ + b₂.

Legend: M length, D width, N hidden width of the network, L layers, H·K width of keys and of values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.methods.base import Recipe, check
from multitune.methods.prefix_memory import PrefixMemory
from multitune.methods.registry import register
from multitune.methods.starts import repeat_to, token_ids

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PrefixMemory):
    """Keys and values in front of every layer's, made by a network in training. A fresh prefix is no identity.

    Shapes:
        In training `prefix [M, D]`, `hidden.weight [D, N]`, `hidden.bias [N]`, and for the keys and for the values of
        each layer `weight [N, H·K]`, `bias [H·K]`. Saved: `keys [M, H·K]` and `values [M, H·K]` per layer. Each head's
        queries see M more entries; rows keep their length.
    Parameters:
        Trained `M·D + D·N + N + 2·L·H·K·(N + 1)`, saved `2·L·M·H·K`. RoBERTa-base, M=10, N=512: 9,857,024 trained,
        184,320 saved.
    Use it when:
        You generate text or have few examples, and want the stability that the network gives over free vectors; for
        classification P-tuning v2 trains the same saved form with less.
    Pitfalls:
        - Count both numbers: the trained one is larger than most adapters.
        - The network wants a far smaller learning rate than free keys and values do: with `reparametrise=false` give
          P-tuning v2's, for at the default they hardly learn (table to text, docs/instructions.md: BLEU 5 beside 55).
        - `start_text` is best a few words about the task, and helps most with few examples. With the network those
          activations are kept and its output, zero at first, is added to them: the first step is exactly the start.
        - Positions do not shift unless `shift_positions` is set; prefixes trained as key/value caches shift them.
    Published:
        Li & Liang 2021, Table 1, GPT-2 medium, prefix of 0.1 % (full fine-tuning in brackets), BLEU: E2E 69.7 (68.2),
        WebNLG 55.1 (46.5), DART 46.4 (46.2). XSum with BART-large, 2 %, ROUGE-L: 36.05 (37.25). Best lengths: 10 for
        table-to-text, 200 for summaries.
    """

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "Prefix-tuning"
    paper: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190, sections 4.2 and 4.3"
    identity_at_init: ClassVar[bool] = False
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3,
        source="a guess, better than 1e-4 in one run on demo/sentiment; Li & Liang use 5e-5 on GPT-2",
    )

    length: int = 10
    reparametrise: bool = True
    start_text: str | None = None
    """Start from the frozen model's keys and values on this text, its tokens repeated or cut to `length`."""

    def start_from(self, backbone: Backbone) -> dict[str, Tensor]:
        if self.start_text is None:
            return {}
        self._check_room(backbone)
        ids = repeat_to(token_ids(self, backbone, "start_text", self.start_text), self.length)
        found = backbone.keys_and_values(ids)
        sites = [site.name for site in self.sites(backbone)]
        lacking = [name for name in sites if name not in found]
        check(
            not lacking,
            self,
            f"start_text needs keys and values of {', '.join(lacking)}, which '{backbone.name}' does not hand out",
            "leave start_text out",
        )
        return {
            f"{name}.{key}": t.flatten(1).float().cpu().contiguous()
            for name in sites
            for key, t in zip(("keys", "values"), found[name], strict=True)
        }

    def _check_room(self, backbone: Backbone) -> None:
        room = backbone.max_length
        check(self.length <= room, self, f"start_text does not reach length={self.length}", f"give at most {room}")

    def shapes(self, backbone: Backbone) -> dict[str, torch.Size]:
        if self.start_text is None:
            return super().shapes(backbone)
        self._check_room(backbone)
        found = replace(self, start_text=None).shapes(backbone)
        if self.reparametrise:
            found |= {f"{name}.start": torch.Size((self.length, width)) for name, width in self._widths(backbone)}
        return found
