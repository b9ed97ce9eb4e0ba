"""P-tuning v2 (Liu et al. 2022): trained keys and values in front of every layer's own.   Legend: M length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta, Memory
from multitune.methods.base import Layers, Recipe, SiteMethod, check, check_positive
from multitune.methods.registry import register

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@register
@dataclass(frozen=True, kw_only=True)
class PTuningV2(SiteMethod):
    """Deep prompts: `keys, values [M, H·K]` per layer. They take attention mass, so a fresh one is no identity."""

    name: ClassVar[str] = "ptuning_v2"
    title: ClassVar[str] = "P-tuning v2"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2110.07602, section 3.2"
    identity_at_init: ClassVar[bool] = False
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-2, source="sweep on small tasks (docs/results.md); released scripts use 5e-3 to 1e-2"
    )

    length: int = 16
    """Number of key/value pairs M per layer."""
    layers: Layers = None
    """Layers that get them; none stands for all."""
    std: float = 0.02
    """Standard deviation of the start; small values keep a fresh prefix near an empty one."""
    shift_positions: bool = False
    """Count the memory as positions in front of the text, as key/value caches do (Hugging Face PEFT's convention)."""

    def __post_init__(self) -> None:
        check_positive(self, "length")

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        if self.shift_positions:
            name = backbone.model.config.model_type
            check(backbone.takes_position_ids, self, f"{name} counts its own positions", "give shift_positions=false")
            room = backbone.max_length - 2
            check(self.length <= room, self, f"length={self.length} leaves no room", f"give at most {room}")
        return super().init(backbone, generator)

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("attention", layers=self.layers)

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "keys": torch.randn(self.length, site.in_features, generator=generator) * self.std,
            "values": torch.randn(self.length, site.out_features, generator=generator) * self.std,
        }

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        heads = backbone.num_key_value_heads
        keys, values = (params[k].view(self.length, heads, -1) for k in ("keys", "values"))
        shift = self.length if self.shift_positions else 0
        return Memory(keys=keys, values=values, open=torch.ones(self.length, device=keys.device), shift=shift)
