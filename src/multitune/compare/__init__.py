"""Compare methods: trials of one recipe, a store that later runs extend, and a report.

from multitune.compare import compare
compare("glue", "comparisons/glue")
"""

import sys
import types
from typing import TYPE_CHECKING, Any

from multitune.compare.records import Outcome, Record, Trial

if TYPE_CHECKING:
    from multitune.compare.recipe import Recipe
    from multitune.compare.run import Comparison, compare
    from multitune.compare.store import Store

_HOMES = {"Comparison": "run", "Recipe": "recipe", "Store": "store", "compare": "run"}
__all__ = ["Comparison", "Outcome", "Recipe", "Record", "Store", "Trial", "compare"]


def __getattr__(name: str) -> Any:  # records and stores can be read without torch, which takes seconds to load
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return globals().setdefault(name, getattr(import_module(f"{__name__}.{_HOMES[name]}"), name))


class _Callable(types.ModuleType):
    """This module, which is `multitune.compare` however it was imported: called, it compares."""

    def __call__(self, *args: Any, **settings: Any) -> "Comparison":
        found: Comparison = self.compare(*args, **settings)
        return found


sys.modules[__name__].__class__ = _Callable
