"""Partial freezing: a range of layers is trained, all others and the embeddings are frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from multitune.errors import ConfigError
from multitune.methods.base import Recipe, check
from multitune.methods.partial import PartialTuning
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@register
@dataclass(frozen=True, kw_only=True)
class Freeze(PartialTuning):
    """Trains every weight of layers `first` to `last`, both included, and freezes the rest of the backbone.

    Layers count from 0 at the bottom; negative numbers count from the top, -1 being the uppermost. With
    `first=semantic` training measures where the hidden states of the task's rows turn most, and trains the layers above
    (after semantic-aware layer freezing, Gu et al. 2024, arXiv 2406.11753; the measure is in `multitune layers`).

    Shapes:
        Those of the weights of the trained layers.
    Parameters:
        `n · (4·D² + 2·D·F + 9·D + F)` for n layers of BERT's kind. RoBERTa-base: a layer 7,087,872, layers 10 and 11
        14,175,744, 6 to 11 42,527,232, all 85,054,464.
    Use it when:
        Full fine-tuning is what you want, and its time or memory is too much; or you want to see which layers a task
        needs.
    Pitfalls:
        - Only layers below the lowest trained one are free in the backward pass; frozen ones above it are not.
        - It changes weights, so rows of its task cannot share a batch with other tasks.
        - The embeddings stay frozen even where every layer is trained.
        - The rates are those of full fine-tuning, far below those of adapters.
    Published:
        No figure of Lee et al. 2019, nor of Gu et al. 2024 on the choice of the layers, could be verified.
    """

    name: ClassVar[str] = "freeze"
    title: ClassVar[str] = "Partial freezing"
    paper: ClassVar[str] = "Lee et al. 2019, arXiv 1911.03090 (what happens with frozen lower layers)"
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-4, weight_decay=0.01, source="that of full fine-tuning (docs/results.md)"
    )

    first: int | Literal["semantic"] = -2
    """Lowest layer that is trained; semantic has training choose it by the task's rows."""
    last: int = -1
    """Uppermost layer that is trained."""

    def with_layers(self, layers: tuple[int, ...]) -> Freeze:
        return replace(self, first=layers[0]) if self.asks_for_layers else self

    def trained_layers(self, backbone: Backbone) -> range:
        n = backbone.num_layers
        if isinstance(self.first, str):
            raise ConfigError(
                f"method '{self.name}': first='{self.first}' stands for no layer yet: train() chooses it by a task's "
                f"rows; elsewhere give a number, such as multitune.layers.choose_layers(backbone, texts).trained[0]"
            )
        for name in ("first", "last"):
            value = getattr(self, name)
            check(-n <= value < n, self, f"there is no layer {name}={value}", f"give {-n} to {n - 1}")
        low, high = self.first % n, self.last % n
        check(low <= high, self, f"layers {low} to {high} are none", "give a first layer that is not above the last")
        return range(low, high + 1)
