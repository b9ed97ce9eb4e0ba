"""Compare methods: trials of one recipe, a store that later runs extend, and a report.

import multitune
multitune.compare("glue", "comparisons/glue")
"""

from typing import TYPE_CHECKING, Any

from multitune.comparing.records import Outcome, Record, Trial

if TYPE_CHECKING:
    from multitune.comparing.recipe import Recipe
    from multitune.comparing.run import Comparison
    from multitune.comparing.store import Store

_HOMES = {"Comparison": "run", "Recipe": "recipe", "Store": "store"}
__all__ = ["Comparison", "Outcome", "Recipe", "Record", "Store", "Trial"]


def __getattr__(name: str) -> Any:  # records and stores can be read without torch, which takes seconds to load
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return globals().setdefault(name, getattr(import_module(f"{__name__}.{_HOMES[name]}"), name))
