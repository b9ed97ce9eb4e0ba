"""What a tuning method is: hyper-parameters, the tensors it trains, and the deltas they yield."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from abc import ABCMeta
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import get_annotations
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

from multitune.deltas import Delta
from multitune.errors import ConfigError, suggest
from multitune.methods.size import Size
from multitune.words import in_words

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

#: `gradients(sites, num_batches, take)` calls `take(site, gradient)` once per site with the gradient `[O, I]` of the
#: loss by the site's frozen weight, summed over the rows of the first `num_batches` training batches. Gradients of
#: one layer at most exist at a time; keep of each only what you need.
WeightGradients = Callable[["Iterable[Site]", int, "Callable[[Site, Tensor], None]"], None]

#: What other libraries and papers call a hyper-parameter.
ALSO_CALLED = {
    "rank": "r",
    "r": "rank",
    "lora_rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "layers_to_transform": "layers",
    "d": "bottleneck",
    "num_virtual_tokens": "length",
    "prefix_length": "length",
    "bottleneck_size": "bottleneck",
    "adapter_size": "bottleneck",
    "reduction": "bottleneck",
}

SEMANTIC = "semantic"
"""Stands for layers that training chooses by where the hidden states of the task's rows turn."""

#: What `multitune.train` calls beside forward and backward passes, and no other loop does.
LOOP_HOOKS = ("after_step", "penalty", "calibrate")

Roles = tuple[str, ...]
Layers = tuple[int, ...] | Literal["semantic"] | None
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings that work for a method when the user gives none."""

    learning_rate: float
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the method's tensors and the head."""
    warmup_ratio: float = 0.06
    """Share of the steps over which the learning rate rises."""
    source: str
    """Where the numbers come from."""


class _Checked(ABCMeta):
    """Makes methods: hyper-parameters are of their fields' types before a method's own checks compute with them."""

    def __call__(cls: type[T], *args: Any, **settings: Any) -> T:
        if args:
            raise ConfigError(f"hyper-parameters are given by name, as {cls.__name__}(name=value), not {args[0]!r}")
        _check_decorated(cls)
        made: T = type.__call__(cls, **_typed(cls, settings, from_text=False))
        return made


@dataclass(frozen=True, kw_only=True)
class Method(metaclass=_Checked):
    """A tuning method. Subclass it in one file, decorate it with `@register`, and it trains, saves and mixes.

    A subclass gives `init` and `deltas`, or derives from `SiteMethod` and gives their one-site forms.

    Hyper-parameters are given by name. A field that holds several takes any sequence, or a text, which is split at
    commas; everything else is of the field's own type.

    Raises:
        ConfigError: an unknown name, or a value the field cannot hold; names method, field, value, and what it takes.
    """

    name: ClassVar[str]
    """Short name, as typed on the command line."""
    title: ClassVar[str]
    """Name as the paper writes it."""
    paper: ClassVar[str]
    """Authors, year, arXiv number, equation."""
    recipe: ClassVar[Recipe]
    """Training settings used when none are given."""
    size: ClassVar[Size | None] = None
    """What a parameter budget changes; none for the first of `size.USUAL` among the hyper-parameters, if any."""
    changes_weights: ClassVar[bool] = False
    """Whether it trains the backbone's own weights, and so needs a backbone of its own."""
    identity_at_init: ClassVar[bool] = True
    """Whether a fresh adapter leaves the backbone's output unchanged."""
    fuses_to_table: ClassVar[bool] = False
    """Whether fusing writes a table by token id."""
    needs_gradients: ClassVar[bool] = False
    """Whether `calibrate` chooses by gradients of the frozen weights."""

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors of a fresh adapter by name, on the CPU; float32, or whole numbers where they are indices.

        Raises:
            ConfigError: the hyper-parameters do not fit this backbone.
        """
        raise NotImplementedError

    def shapes(self, backbone: Backbone) -> dict[str, torch.Size]:
        """Names and shapes of the tensors that `init` makes; override it where making them is dear."""
        fresh = self.init(backbone, torch.Generator().manual_seed(0))
        return {name: t.shape for name, t in fresh.items()}

    @property
    def asks_for_layers(self) -> bool:
        """Whether some setting is "semantic", so that its layers are chosen by the task's rows before training."""
        return any(getattr(self, f.name) == SEMANTIC for f in fields(self))

    def with_layers(self, layers: tuple[int, ...]) -> Method:
        """This method with `layers`, counted from 0 and ending with the uppermost, where it asks for them."""
        return dataclasses.replace(self, layers=layers) if self.asks_for_layers else self  # type: ignore[call-arg]

    def with_labels(self, labels: tuple[str, ...]) -> Method:
        """This method with the names of the task's classes, none for a task without, where it asks for them."""
        return self

    def trains(self, name: str) -> bool:
        """Whether the tensor `name` of `init` is trained; the others are saved with it but stay as they were."""
        return True

    def learning_rate_factor(self, name: str) -> float:
        """What the learning rate is multiplied by for the tensor `name`."""
        return 1.0

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar added once to the loss of every optimizer step, differentiable in `params`; `None` for none."""
        return None

    def calibrate(
        self, params: Mapping[str, Tensor], backbone: Backbone, gradients: WeightGradients
    ) -> Mapping[str, Tensor]:
        """The tensors to train from instead of `params`, with the same names and shapes, where the data decide.

        Training calls it once before the first step if `needs_gradients` says so; a resumed run does not.
        """
        return params

    def after_step(self, params: Mapping[str, Tensor], step: int, num_steps: int) -> None:
        """Change `params` in place after optimizer step `step` of `num_steps`, counted from 1; runs without gradients.

        The gradients of the step are still there, as `params[name].grad`. What must survive a kill belongs into
        tensors of `init` that are not trained: those are part of every checkpoint.
        """

    @property
    def loop_hooks(self) -> tuple[str, ...]:
        """Which of `after_step`, `penalty` and `calibrate` a training loop must call: those that a subclass gives."""
        own = type(self)
        return tuple(hook for hook in LOOP_HOOKS if getattr(own, hook) is not getattr(Method, hook))

    def is_settled(self, step: int, num_steps: int) -> bool:
        """Whether the tensors after optimizer step `step` of `num_steps` have the form the method promises.

        A run keeps the best tensors of a settled step; those of an earlier one only until there is one.
        """
        return True

    def finish(self, params: Mapping[str, Tensor], backbone: Backbone) -> tuple[Method, Mapping[str, Tensor]]:
        """An equal method and tensors in their smallest form: what a finished run saves.

        A reparametrisation that only training needs is computed once and dropped here.
        """
        return self, params

    def expected(self, backbone: Backbone) -> Method:
        """The method that a finished run is likely to save where training decides its size, for planning; or itself."""
        return self

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        """The deltas that `params` yield, by site name; differentiable. Fusing is calling it once without gradients."""
        raise NotImplementedError

    def num_parameters(self, backbone: Backbone) -> int:
        """Trainable parameters on a backbone, the head excluded."""
        return sum(shape.numel() for name, shape in self.shapes(backbone).items() if self.trains(name))

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters as JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these hyper-parameters; strings are read as the field's type.

        Raises:
            ConfigError: an unknown name, or a value the field cannot hold.
        """
        return cls(**_typed(cls, settings, from_text=True))


class SiteMethod(Method):
    """A method that trains the same kind of tensors at each of a set of sites, independently."""

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        """The sites it trains."""
        raise NotImplementedError

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh trainable tensors for one site."""
        raise NotImplementedError

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        """The delta of one site from that site's tensors."""
        raise NotImplementedError

    def site_deltas(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> list[Delta]:
        """The deltas of one site, for a method that yields several there; by default the one of `delta`."""
        return [self.delta(params, site, backbone)]

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            f"{site.name}.{key}": tensor
            for site in self.sites(backbone)
            for key, tensor in self.init_site(site, backbone, generator).items()
        }

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        by_site: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in params.items():
            site_name, key = name.rsplit(".", 1)
            by_site[site_name][key] = tensor
        return {site.name: self.site_deltas(by_site[site.name], site, backbone) for site in self.sites(backbone)}


def _check_decorated(cls: type[Any]) -> None:
    """Raise `ConfigError` for a class whose hyper-parameters are no fields, because it lacks its decorator."""
    if "__dataclass_fields__" in vars(cls):
        return
    hints = {name: _hints(cast(Hashable, cls))[name] for name in get_annotations(cls)}
    own = [name for name, hint in hints.items() if ClassVar not in (hint, get_origin(hint))]
    if own:
        raise ConfigError(
            f"{cls.__name__} states hyper-parameters ({', '.join(own)}) but is no dataclass; decorate it with "
            f"@dataclass(frozen=True, kw_only=True)"
        )


def _check_names(cls: type[Any], given: Iterable[str], known: Collection[str]) -> None:
    """Raise `ConfigError` for a hyper-parameter that the method does not have."""
    for key in given:
        if key not in known:
            near = _training_setting(key) or suggest(key, known) or suggest(ALSO_CALLED.get(key, ""), known)
            raise ConfigError(
                f"method '{getattr(cls, 'name', cls.__name__)}' has no hyper-parameter '{key}'.{near} "
                f"It has: {', '.join(sorted(known)) or 'none'}"
            )


def _training_setting(key: str) -> str:
    """What to say where somebody gives a method what is a setting of its training; "" where it is none."""
    from multitune.training import config  # which needs this module; wanted for a message alone

    name = config.ALSO_CALLED.get(key, key)
    option = f"--{name.replace('_', '-')}"
    return f" That is a setting of training, {name} ({option})." if name in config.TrainConfig.names() else ""


def check(condition: bool, method: Method, problem: str, fix: str) -> None:
    """Raise `ConfigError` about a hyper-parameter unless `condition` holds."""
    if not condition:
        raise ConfigError(f"method '{method.name}': {problem}; {fix}")


def check_positive(method: Method, *names: str) -> None:
    """Raise `ConfigError` unless every named hyper-parameter is at least 1."""
    for name in names:
        value = getattr(method, name)
        check(value >= 1, method, f"{name}={value} is not possible", f"give {name} of at least 1")


def check_probability(method: Method, name: str) -> None:
    """Raise `ConfigError` unless the named hyper-parameter is in [0, 1)."""
    value = getattr(method, name)
    check(0 <= value < 1, method, f"{name}={value} is not a probability below 1", f"give 0 <= {name} < 1")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a class's fields; a forward reference is looked up once."""
    return get_type_hints(cls)


def _typed(cls: type[Any], settings: Mapping[str, Any], *, from_text: bool) -> dict[str, Any]:
    """Hyper-parameters as their fields' types: lists become tuples.

    Args:
        from_text: whether a text may stand for a number, true, false or none, as on a command line.

    Raises:
        ConfigError: an unknown name, or a value the field cannot hold.
    """
    _check_names(cls, settings, {f.name for f in fields(cls)})
    name, hints = getattr(cls, "name", cls.__name__), _hints(cast(Hashable, cls))
    return {key: _parse(name, key, value, hints[key], from_text) for key, value in settings.items()}


def _parse(method: str, key: str, value: Any, hint: Any, from_text: bool) -> Any:
    """`value` as the type of a field."""
    try:
        return _convert(value, hint, from_text)
    except (TypeError, ValueError) as error:
        words = in_words(hint)
        fix = f"choose one of {words}" if get_origin(hint) is Literal else f"give {'' if hint is bool else 'a '}{words}"
        raise ConfigError(f"method '{method}': {key}={value!r} is not possible; {fix}") from error


def _convert(value: Any, hint: Any, from_text: bool) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if type(None) in options and (value is None or (from_text and value == "none")):
            return None
        given = [o for o in options if o is not type(None)]
        words = [o for o in given if get_origin(o) is Literal]  # a word before what would read it as something else
        chosen = next((o for o in words if value in get_args(o)), next(o for o in given if o not in words))
        return _convert(value, chosen, from_text)
    if origin is tuple:
        if not isinstance(value, Sequence):
            raise TypeError("not a list")
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        return tuple(_convert(part, options[0], from_text) for part in parts)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"choose one of {', '.join(map(str, options))}")
        return value
    if hint in (int, float, bool):
        return _read(value, hint) if from_text else _plain(value, hint)
    if hint is Any or not isinstance(hint, type) or isinstance(value, hint):
        return value
    raise TypeError(f"not a {in_words(hint)}")


def _plain(value: Any, hint: type) -> Any:
    """A number, true or false as it is; a whole number may stand for any number."""
    fits = isinstance(value, numbers.Real) and isinstance(value, bool) == (hint is bool)
    if not fits:
        raise TypeError("of another type")
    return operator.index(value) if hint is int else hint(value)


def _read(value: Any, hint: type) -> Any:
    """A number, true or false, as JSON or a command line writes it."""
    if hint is bool:
        return _as_bool(value)
    if isinstance(value, bool) or (hint is int and isinstance(value, float) and not value.is_integer()):
        raise ValueError("not a number, or not a whole one")
    return hint(value)


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("not true or false")
