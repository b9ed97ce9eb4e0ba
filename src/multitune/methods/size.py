"""What makes a method larger, so that a comparison can bring it to a number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multitune.backbone import Backbone

    Settings = Mapping[str, Any]
    MakeSettings = Callable[[int, Backbone, Settings], dict[str, Any]]

#: Hyper-parameters that are a method's size where it names no other, the first that it has.
USUAL = ("r", "bottleneck", "length", "width")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What makes a method larger."""

    fields: tuple[str, ...]
    """Hyper-parameters that it sets."""
    settings: MakeSettings
    """(a size, the backbone, the settings that stay) to values of the fields; more parameters with every size."""
    least: int = 1
    takes_positions: bool = False
    """Whether the rows' texts have that many tokens less."""
    is_length: bool = False
    """Whether it counts vectors beside the tokens, of which there are never more than positions."""


def size_field(name: str, *, takes_positions: bool = False) -> Size:
    """One hyper-parameter that is the size itself."""
    return Size(
        fields=(name,),
        settings=lambda n, *_: {name: n},
        takes_positions=takes_positions,
        is_length=name == "length",
    )


#: A share of the weights' entries, in steps of 1e-5.
DENSITY = Size(fields=("density",), settings=lambda n, *_: {"density": round(n * 1e-5, 5)})
