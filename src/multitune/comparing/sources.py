"""Where a recipe comes from: a value, a YAML file, a suite that ships with the package, or a table of your own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from multitune.comparing.recipe import Recipe
from multitune.comparing.recipe_entries import MethodEntry, TaskEntry
from multitune.errors import ConfigError, DataWarning, suggest
from multitune.heads import Head
from multitune.tasks import Task
from multitune.tasks.files import READERS

#: What a table is compared with: a small one, a large one, and one of every family between them.
METHODS = ("head", "layernorm", "bitfit", "ia3", "lora", "pfeiffer", "ptuning_v2", "aot_fc")
_YAML = (".yaml", ".yml")
_SERVING = "overhead"
_SEEDS = (0, 1, 2)
#: Most rows of a table that are drawn, so that a first answer takes minutes.
_TRAIN_ROWS, _VALIDATION_ROWS = 2000, 500
#: Optimizer steps to aim at: enough for a few hundred rows to be learnt, whatever the size of the table.
_STEPS, _BATCH_SIZE, _MOST_EPOCHS = 200, 16, 15


def suites() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(resources.files("multitune.comparing"))) / "suites"
    return {file.stem: file for file in sorted(folder.glob("*.yaml")) if file.stem != _SERVING}


def recipe_of(given: Recipe | Mapping[str, Any] | str | Path, **own: Any) -> Recipe:
    """The recipe that is meant.

    Args:
        own: of a table, how it is read: text, label and the other keys of a task of own rows.

    Raises:
        ConfigError: nothing of this name; names the nearest.
        DataError: a table that cannot be read.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        return Recipe.from_dict(given)
    path = Path(given)
    if path.suffix.lower() in READERS or (path.is_dir() and str(given) not in suites()):
        return recipe_for_table(str(given), **own)
    if own:
        raise ConfigError(f"--{next(iter(own)).replace('_', '-')} is for a table of your own rows, not for '{given}'")
    if path.suffix.lower() in _YAML:
        return Recipe.read(path)
    if str(given) in suites():
        return Recipe.read(suites()[str(given)])
    if str(given) == _SERVING:
        raise ConfigError(
            f"the suite '{_SERVING}' times serving and trains nothing: run `python benchmarks/overhead.py` of the "
            f"repository, and see its file with `multitune report FOLDER --overhead FILE`"
        )
    known = ", ".join(suites()) or "none"
    if path.is_file():
        raise ConfigError(
            f"{given} is of a kind that is not read; save its rows as one of {', '.join(READERS)}, or a recipe as .yaml"
        )
    raise ConfigError(
        f"'{given}' is no suite.{suggest(str(given), suites())} Give a suite ({known}), a recipe (a .yaml file), or a "
        f"table of your own rows ({', '.join(READERS)})"
    )


def recipe_for_table(data: str, **own: Any) -> Recipe:
    """A recipe that suits a table: a few methods of most families, three seeds, a few hundred steps each.

    Raises:
        DataError: the table cannot be read, or its columns not be told apart.
    """
    entry = TaskEntry(data=data, own=own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the plan reads the table again, and warns of it then
        loaded = entry.load()
    rows = min(len(loaded.train), _TRAIN_ROWS)
    per_epoch = -(-rows // _BATCH_SIZE)
    epochs = min(_MOST_EPOCHS, max(1, round(_STEPS / per_epoch)))
    entry = TaskEntry(
        data=data,
        own={"name": loaded.task.name, **own},
        train_rows=_TRAIN_ROWS if len(loaded.train) > _TRAIN_ROWS else None,
        validation_rows=_VALIDATION_ROWS if len(loaded.validation) > _VALIDATION_ROWS else None,
    )
    evaluations: dict[str, Any] = {"evaluations_per_epoch": 2} if epochs <= 2 else {}
    return Recipe(
        name=loaded.task.name,
        tasks=(entry,),
        methods=tuple(MethodEntry(name=name) for name in _methods_for(loaded.task)),
        seeds=_SEEDS,
        training={"epochs": float(epochs), "batch_size": _BATCH_SIZE, **evaluations},
    )


def _methods_for(task: Task) -> list[str]:
    """Those of `METHODS` that train something: a task of writing has no head."""
    return [name for name in METHODS if name != "head" or Head.for_task(task).drops]
