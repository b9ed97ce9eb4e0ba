"""Several methods in one adapter: their tensors are trained together, and their deltas apply together.

A part is addressed by its method's name: `lora.r` is the setting `r`, `lora.layer.0.query.A` a tensor of the part
`lora`. Where a method occurs more than once, its later parts are `lora2`, `lora3`, ...
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from multitune.deltas import Delta
from multitune.errors import ConfigError, suggest
from multitune.methods.base import Method, Recipe, WeightGradients
from multitune.methods.registry import get_method

if TYPE_CHECKING:
    from multitune.backbone import Backbone

SEPARATOR = "+"
"""Between the names of the methods, as in `lora+bitfit`."""


def make_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and settings, as the command line and adapter files write them.

    Args:
        name: a method's name, or several joined by "+".
        settings: hyper-parameters; of several methods each with its part in front, such as `{"lora.r": 4}`.

    Raises:
        ConfigError: an unknown method or setting, a value the setting cannot hold, or methods that do not go together.
    """
    settings = settings or {}
    if SEPARATOR not in name:
        return get_method(name).from_settings(settings)
    names = name.split(SEPARATOR)
    stated = settings.get("methods", names)
    if list(stated) != names:
        raise ConfigError(f"method '{name}' has settings for {SEPARATOR.join(stated)}; give the same methods in both")
    return Combined.from_settings({**settings, "methods": names})


@dataclass(frozen=True, kw_only=True)
class Combined(Method):
    """Several methods in one adapter, such as `Combined(methods=(LoRA(r=4), BitFit()))`.

    Each part trains with its own recipe's learning rate: that of the whole is the lowest, which the head has too, and
    `learning_rate_factor` makes up the difference; a rate given by the user moves all parts by one factor. Weight
    decay is the lowest of the parts', warm-up the longest.

    Fewer than two methods, one that changes weights, or two that both need a site with room for one, are refused with a
    `ConfigError`.
    """

    name: ClassVar[str] = "combined"
    title: ClassVar[str] = "Several methods"
    paper: ClassVar[str] = "those of its parts"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, source="that of its parts")

    methods: tuple[Method, ...]
    """The methods, two or more; combined ones count as their parts."""

    def __post_init__(self) -> None:
        flat = [p for m in self.methods for p in (m.methods if isinstance(m, Combined) else (m,))]
        if len(flat) < 2:
            raise ConfigError(f"several methods are at least two, not {len(flat)}; give for example (LoRA(), BitFit())")
        for part in flat:
            if part.changes_weights:
                others = ", ".join(f"'{p.name}'" for p in flat if p is not part)
                raise ConfigError(
                    f"method '{part.name}' changes the backbone's own weights and cannot be combined with {others}; "
                    f"train one of them alone"
                )
        own = {
            "methods": tuple(flat),
            "name": SEPARATOR.join(p.name for p in flat),
            "title": " + ".join(p.title for p in flat),
            "paper": "; ".join(dict.fromkeys(p.paper for p in flat)),
            "identity_at_init": all(p.identity_at_init for p in flat),
            "fuses_to_table": any(p.fuses_to_table for p in flat),
            "needs_gradients": any(p.needs_gradients for p in flat),
            "recipe": _recipe(flat),
        }
        for key, value in own.items():  # what a class states of itself, an instance states here
            object.__setattr__(self, key, value)

    @cached_property
    def parts(self) -> dict[str, Method]:
        """The methods by the name of their part."""
        return dict(zip(part_names([m.name for m in self.methods]), self.methods, strict=True))

    def part_of(self, name: str) -> tuple[Method, str]:
        """The part that a tensor belongs to, and what that part calls it."""
        part, _, own = name.partition(".")
        return self.parts[part], own

    def _by_part(self, params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {part: {} for part in self.parts}
        for name, tensor in params.items():
            part, _, own = name.partition(".")
            found[part][own] = tensor
        return found

    # ---------------------------------------------------------------- what a method does, part by part

    @property
    def asks_for_layers(self) -> bool:
        return any(m.asks_for_layers for m in self.methods)

    def with_layers(self, layers: tuple[int, ...]) -> Combined:
        return Combined(methods=tuple(m.with_layers(layers) for m in self.methods))

    def with_labels(self, labels: tuple[str, ...]) -> Combined:
        return Combined(methods=tuple(m.with_labels(labels) for m in self.methods))

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        fresh = {
            f"{part}.{name}": tensor
            for part, method in self.parts.items()
            for name, tensor in method.init(backbone, generator).items()
        }
        with torch.no_grad():  # refuses what cannot be together before anything is trained
            self.deltas({name: t.to(backbone.device) for name, t in fresh.items()}, backbone)
        return fresh

    def shapes(self, backbone: Backbone) -> dict[str, torch.Size]:
        return {
            f"{part}.{name}": shape
            for part, method in self.parts.items()
            for name, shape in method.shapes(backbone).items()
        }

    def trains(self, name: str) -> bool:
        part, own = self.part_of(name)
        return part.trains(own)

    def learning_rate_factor(self, name: str) -> float:
        part, own = self.part_of(name)
        return part.learning_rate_factor(own) * part.recipe.learning_rate / self.recipe.learning_rate

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor | None:
        found = [self.parts[part].penalty(own) for part, own in self._by_part(params).items()]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() if terms else None

    @property
    def loop_hooks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(hook for part in self.methods for hook in part.loop_hooks))

    def is_settled(self, step: int, num_steps: int) -> bool:
        return all(part.is_settled(step, num_steps) for part in self.parts.values())

    def calibrate(
        self, params: Mapping[str, Tensor], backbone: Backbone, gradients: WeightGradients
    ) -> Mapping[str, Tensor]:
        chosen = dict(params)
        for part, own in self._by_part(params).items():
            if self.parts[part].needs_gradients:
                started = self.parts[part].calibrate(own, backbone, gradients)
                chosen |= {f"{part}.{name}": tensor for name, tensor in started.items()}
        return chosen

    def after_step(self, params: Mapping[str, Tensor], step: int, num_steps: int) -> None:
        for part, own in self._by_part(params).items():
            self.parts[part].after_step(own, step, num_steps)

    def finish(self, params: Mapping[str, Tensor], backbone: Backbone) -> tuple[Method, Mapping[str, Tensor]]:
        done = [self.parts[part].finish(own, backbone) for part, own in self._by_part(params).items()]
        finished = Combined(methods=tuple(method for method, _ in done))
        return finished, {
            f"{part}.{name}": tensor
            for part, (_, own) in zip(finished.parts, done, strict=True)
            for name, tensor in own.items()
        }

    def expected(self, backbone: Backbone) -> Method:
        return Combined(methods=tuple(method.expected(backbone) for method in self.methods))

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        together: dict[str, list[Delta]] = defaultdict(list)
        owners: dict[tuple[str, str], str] = {}
        for part, own in self._by_part(params).items():
            for site, deltas in self.parts[part].deltas(own, backbone).items():
                for delta in deltas:
                    if delta.one_per_site:
                        other = owners.setdefault((site, delta.kind), part)
                        if other != part:
                            raise ConfigError(_conflict(other, part, delta, site))
                together[site] += deltas
        return dict(together)

    # ---------------------------------------------------------------- settings

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"methods": [m.name for m in self.methods]}
        return found | {f"{part}.{k}": v for part, method in self.parts.items() for k, v in method.settings().items()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The methods named under `methods`, each with its settings: `{"methods": ["lora", "bitfit"], "lora.r": 4}`.

        The settings of a part may also be a mapping, `{"lora": {"r": 4}}`.

        Raises:
            ConfigError: no methods, an unknown part or setting, or a value the setting cannot hold.
        """
        given = settings.get("methods", ())
        names = given.split(SEPARATOR) if isinstance(given, str) else [str(name) for name in given]
        parts = part_names(names)
        by_part: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for key, value in settings.items():
            if key == "methods":
                continue
            part, dot, own = key.partition(".")
            if part not in parts or not (dot or isinstance(value, Mapping)):
                near = suggest(part, parts) if dot else f" Say whose it is, such as {parts[0]}.{key}."
                raise ConfigError(
                    f"method '{SEPARATOR.join(names)}' has no setting '{key}'.{near} Its parts: {', '.join(parts)}"
                )
            by_part[part] |= {own: value} if dot else dict(value)
        made = [get_method(n).from_settings(by_part[p]) for n, p in zip(names, parts, strict=True)]
        return cls(methods=tuple(made))


def part_names(names: Sequence[str]) -> list[str]:
    """What the parts of methods of these names are called."""
    found: list[str] = []
    for name in names:
        nth = 1 + sum(n == name for n in names[: len(found)])
        found.append(name if nth == 1 else f"{name}{nth}")
    return found


def _recipe(parts: Sequence[Method]) -> Recipe:
    each = [p.recipe for p in parts]
    rates = ", ".join(f"{p.name} {p.recipe.learning_rate:g}" for p in parts)
    return Recipe(
        learning_rate=min(r.learning_rate for r in each),
        weight_decay=min(r.weight_decay for r in each),
        warmup_ratio=max(r.warmup_ratio for r in each),
        source=f"each part trains with its own recipe's ({rates}); this one is the head's",
    )


def _conflict(one: str, other: str, delta: Delta, site: str) -> str:
    return (
        f"methods '{one}' and '{other}' cannot be in one adapter: both put a {delta.kind} at {site}, and there is room "
        f"for one. Give them different layers or sites, or train two adapters"
    )
