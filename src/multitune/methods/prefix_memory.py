"""What prefix methods share: keys and values in front of each layer's own, free or made by a small network.

Legend: M length, D width of the backbone, N hidden width of the network, W width of a layer's keys or values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune.deltas import Delta, Memory
from multitune.methods.base import Layers, Method, check, check_positive

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site


@dataclass(frozen=True, kw_only=True)
class PrefixMemory(Method):
    """`keys, values [M, W]` per layer. With `reparametrise`, row i of all of them is `tanh(P'_i W₁ + b₁) W₂ + b₂`.

    The network is computed once and dropped at the end of training: what is saved is the plain keys and values.
    """

    length: int
    """Number of key/value pairs M per layer."""
    reparametrise: bool
    """Make them with a network that is dropped at the end of training; false trains them as they are."""
    hidden: int = 512
    """Hidden width N of the network."""
    layers: Layers = None
    """Layers that get them; none stands for all."""
    std: float = 0.02
    """Standard deviation of the start without network; small values keep a fresh prefix near an empty one."""
    shift_positions: bool = False
    """Count the memory as positions in front of the text, as key/value caches do (Hugging Face PEFT's convention)."""

    def __post_init__(self) -> None:
        check_positive(self, "length", "hidden")
        check(self.std >= 0, self, f"std={self.std} is not possible", "give 0 or more")

    def start_from(self, backbone: Backbone) -> dict[str, Tensor]:
        """Keys and values `[M, W]` to start from, by their names; none to start at random."""
        return {}

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        if self.shift_positions:
            name = backbone.model.config.model_type
            check(backbone.takes_position_ids, self, f"{name} counts its own positions", "give shift_positions=false")
            room = backbone.max_length - 2
            check(self.length <= room, self, f"length={self.length} leaves no room", f"give at most {room}")
        start = self.start_from(backbone)
        if self.reparametrise:
            return self._init_network(backbone, generator, start)
        return start or {
            name: torch.randn(self.length, width, generator=generator) * self.std
            for name, width in self._widths(backbone)
        }

    def _init_network(
        self, backbone: Backbone, generator: torch.Generator, start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The network's tensors, as torch initialises an embedding and two linear maps.

        A given start is kept beside it, untrained, and its output starts at zero: the first step is the start itself.
        """

        def uniform(fan_in: int, *shape: int) -> Tensor:
            return (torch.rand(*shape, generator=generator) * 2 - 1) / fan_in**0.5

        d, n = backbone.hidden_size, self.hidden
        made = {
            "prefix": torch.randn(self.length, d, generator=generator),
            "hidden.weight": uniform(d, d, n),
            "hidden.bias": uniform(d, n),
        }
        for name, width in self._widths(backbone):
            if start:
                made |= {f"{name}.weight": torch.zeros(n, width), f"{name}.bias": torch.zeros(width)}
                made[f"{name}.start"] = start[name]
            else:
                made |= {f"{name}.weight": uniform(n, n, width), f"{name}.bias": uniform(n, width)}
        return made

    def trains(self, name: str) -> bool:
        return not name.endswith(".start")

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        return backbone.find_sites("attention", layers=self.layers)

    def _widths(self, backbone: Backbone) -> Iterable[tuple[str, int]]:
        """Names of the keys and values with their widths W."""
        for site in self.sites(backbone):
            yield f"{site.name}.keys", site.in_features
            yield f"{site.name}.values", site.out_features

    def _plain(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
        """Keys and values `[M, W]` by their names, whichever form `params` are in."""
        names = [name for name, _ in self._widths(backbone)]
        if not self.reparametrise:
            return {name: params[name] for name in names}
        inner = torch.tanh(params["prefix"] @ params["hidden.weight"] + params["hidden.bias"])
        made = {name: inner @ params[f"{name}.weight"] + params[f"{name}.bias"] for name in names}
        return {name: t + params[f"{name}.start"] if f"{name}.start" in params else t for name, t in made.items()}

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        plain = self._plain(params, backbone)
        shift = self.length if self.shift_positions else 0

        def memory(site: Site) -> Memory:
            heads = backbone.heads_at(site)[1]
            keys, values = (plain[f"{site.name}.{k}"].view(self.length, heads, -1) for k in ("keys", "values"))
            return Memory(keys=keys, values=values, open=torch.ones(self.length, device=keys.device), shift=shift)

        return {site.name: [memory(site)] for site in self.sites(backbone)}

    def finish(self, params: Mapping[str, Tensor], backbone: Backbone) -> tuple[Method, Mapping[str, Tensor]]:
        if not self.reparametrise:
            return self, params
        return replace(self, reparametrise=False), self._plain(params, backbone)
