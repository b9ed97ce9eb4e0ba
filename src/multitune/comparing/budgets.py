"""Bring a method to a number of trained parameters: the largest size that stays below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from multitune.backbone import Backbone
from multitune.errors import ConfigError
from multitune.methods import Method, get_method, make_method
from multitune.methods.size import USUAL, Size, size_field

Settings = Mapping[str, Any]


_LARGEST = 1 << 17


def size_of(name: str) -> Size | None:
    """The size of a method, of the first part that has one; none where its parameters are what they are."""
    for part in name.split("+"):
        size = get_method(part).size
        if size is None:
            known = make_method(part).settings()
            size = next((size_field(field) for field in USUAL if field in known), None)
        if size is not None:
            return size if part == name else _of_part(size, f"{part}.")
    return None


def _of_part(size: Size, prefix: str) -> Size:
    """The size of one of several methods, whose settings have its name in front."""

    def settings(n: int, backbone: Backbone, fixed: Settings) -> dict[str, Any]:
        own = {key.removeprefix(prefix): value for key, value in fixed.items() if key.startswith(prefix)}
        return {f"{prefix}{key}": value for key, value in size.settings(n, backbone, own).items()}

    return Size(
        fields=tuple(f"{prefix}{field}" for field in size.fields),
        settings=settings,
        least=size.least,
        takes_positions=size.takes_positions,
        is_length=size.is_length,
    )


def counted(backbone: Backbone, method: Method) -> int:
    """Trained parameters that a budget counts: a network that only training has (prefix-tuning, P-tuning) does not.

    Raises:
        ConfigError: the method does not fit the backbone.
    """
    if getattr(method, "reparametrise", False):
        method = dataclasses.replace(method, reparametrise=False)  # type: ignore[call-arg]
    return method.num_parameters(backbone)


def fit(backbone: Backbone, name: str, fixed: Settings, most: int, *, max_length: int) -> dict[str, Any] | None:
    """Settings of the method with the most parameters, `most` at most; none where even its smallest has more.

    Args:
        fixed: the settings that stay as they are.
        max_length: tokens of a text in training, beside which prompts must have room.

    Raises:
        ConfigError: `fixed` sets the size, or the method cannot be made with it.
    """
    size = size_of(name)
    if size is None:
        found = counted(backbone, make_method(name, fixed))
        return dict(fixed) if found <= most else None
    taken = [field for field in size.fields if field in fixed]
    if taken:
        raise ConfigError(
            f"method '{name}': {taken[0]} is what the budgets choose, so {taken[0]}={fixed[taken[0]]!r} cannot be "
            f"honoured; leave out one of them"
        )
    largest = backbone.max_length if size.is_length else _LARGEST
    if size.takes_positions:
        largest = max(backbone.max_length - max_length, backbone.max_length // 2 - 2, 1)

    def parameters(n: int) -> int | None:
        """Those of a size; none where it is too large for the backbone."""
        try:
            return counted(backbone, make_method(name, {**fixed, **size.settings(n, backbone, fixed)}))
        except ConfigError:
            if n == size.least:
                raise
            return None

    def fits(n: int) -> bool:
        found = parameters(n)
        return found is not None and found <= most

    if not fits(size.least):
        return None
    low = size.least
    while low < largest and fits(min(2 * low, largest)):
        low = min(2 * low, largest)
    high = min(2 * low, largest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {**fixed, **size.settings(low, backbone, fixed)}
