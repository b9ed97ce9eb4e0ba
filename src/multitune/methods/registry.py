"""The methods by name. A file in this folder registers itself; so does one named by an entry point."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from multitune.errors import ConfigError, suggest
from multitune.methods.base import Method

ENTRY_POINT_GROUP = "multitune.methods"

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator: make a method known by its `name`.

    Raises:
        ConfigError: the name is taken by another class, or a required class attribute is missing.
    """
    for attribute in ("name", "title", "paper", "recipe"):
        if not hasattr(method, attribute):
            raise ConfigError(f"{method.__name__} needs a class attribute '{attribute}' before it can be registered")
    taken = _METHODS.get(method.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        method.__module__,
        method.__qualname__,
    ):
        raise ConfigError(
            f"the method name '{method.name}' is taken by {taken.__qualname__} in {inspect.getsourcefile(taken)}; "
            f"give {method.__qualname__} another name"
        )
    _METHODS[method.name] = method
    return method


@cache
def _discover() -> None:
    package = importlib.import_module("multitune.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"multitune.methods.{module.name}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        point.load()


def method_names() -> tuple[str, ...]:
    """The names of every registered method, sorted."""
    _discover()
    return tuple(sorted(_METHODS))


def get_method(name: str) -> type[Method]:
    """The method class of this name.

    Raises:
        ConfigError: no such method; lists the registered ones.
    """
    _discover()
    if name not in _METHODS:
        known = sorted(_METHODS)
        if "+" in name:
            raise ConfigError(
                f"'{name}' is several methods in one adapter, which make_method({name!r}) and "
                f"`multitune train --method {name}` take; here name one of them"
            )
        raise ConfigError(f"no method is called '{name}'.{suggest(name, known)} Methods: {', '.join(known)}")
    return _METHODS[name]


def own_classes() -> dict[str, type[Method]]:
    """The methods of this package by the name of their class, as `multitune` exports them."""
    _discover()
    return {cls.__name__: cls for cls in _METHODS.values() if cls.__module__.startswith(f"{__package__}.")}
