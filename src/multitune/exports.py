"""The public names of the package and where they are defined. The methods' names come from their registry.

Nothing is imported before its name is used, so `import multitune` takes no torch; `__init__.pyi`, which
`scripts/build_docs.py` writes from this table and the registry, shows the names to type checkers and editors. The
package `multitune.training` takes its names from here too.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from multitune.errors import suggest

#: module -> the names that `multitune` takes from it; a method needs no entry.
EXPORTS: dict[str, tuple[str, ...]] = {
    "multitune.adapter": ("Adapter",),
    "multitune.attaching": ("attach", "detach"),
    "multitune.backbone": ("Backbone",),
    "multitune.bank": ("Bank",),
    "multitune.comparing.run": ("compare",),
    "multitune.convert": ("export_adapter", "import_adapter"),
    "multitune.errors": (
        "AdapterError",
        "BackboneError",
        "ConfigError",
        "DataError",
        "MixError",
        "MultituneError",
        "PlanError",
        "TaskError",
    ),
    "multitune.generation": ("Engine", "Generation", "GenerationSettings"),
    "multitune.heads": ("Head",),
    "multitune.lsg": ("LSG", "convert_to_lsg"),
    "multitune.merging": ("MergeReport", "merge"),
    "multitune.methods": (
        "Combined",
        "Method",
        "Recipe",
        "SiteMethod",
        "get_method",
        "make_method",
        "method_names",
        "register",
    ),
    "multitune.plan": ("DeltaSet", "Plan"),
    "multitune.prediction": ("Prediction",),
    "multitune.pruned": ("prune",),
    "multitune.quantized": ("quantize",),
    "multitune.tasks": (
        "Pattern",
        "Task",
        "TaskData",
        "Template",
        "infer_task",
        "list_tasks",
        "load_table",
        "load_task",
        "read_table",
    ),
    "multitune.training.api": ("train",),
    "multitune.training.config": ("TrainConfig",),
    "multitune.training.judging": ("evaluate",),
    "multitune.training.jobs": ("FailedJob", "TrainJob", "TrainingInterrupted"),
    "multitune.training.many": ("train_many",),
    "multitune.training.results": ("TrainResult",),
    "multitune.version": ("__version__",),
}
_HOMES = {name: module for module, names in EXPORTS.items() for name in names}


def homes() -> dict[str, str]:
    """Every public name and the module that defines it, the methods' included, sorted."""
    from multitune.methods.registry import own_classes

    methods = {name: cls.__module__ for name, cls in own_classes().items()}
    return dict(sorted((_HOMES | methods).items()))


def homes_in(package: str) -> dict[str, str]:
    """The public names that are defined in a package's own modules, and where, sorted."""
    return {name: module for name, module in sorted(_HOMES.items()) if module.startswith(f"{package}.")}


def find(name: str) -> Any:
    """What `multitune` exports by this name, or its submodule of this name.

    Raises:
        AttributeError: there is neither; names the nearest.
    """
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name.startswith("_"):  # Python asks for many of these, and no method's name is one
        raise AttributeError(f"module 'multitune' has no attribute {name!r}")
    if importlib.util.find_spec(f"multitune.{name}") is not None:
        return importlib.import_module(f"multitune.{name}")
    known = homes()
    if name in known:
        return getattr(importlib.import_module(known[name]), name)
    raise AttributeError(f"module 'multitune' has no attribute {name!r}.{suggest(name, known)}")


def stub(package: str = "multitune") -> str:
    """The text of a package's `__init__.pyi`."""
    names = homes() if package == "multitune" else homes_in(package)
    imports = [f"from {module} import {name} as {name}" for name, module in names.items()]
    listed = [f'    "{name}",' for name in names]
    note = '"""Generated from exports.py and the registry of methods by `make docs`; do not edit."""'
    return "\n".join([note, "", *sorted(imports), "", "__all__ = [", *listed, "]"]) + "\n"
