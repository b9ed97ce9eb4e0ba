"""The values of a recipe's file, read strictly, so that a slip is found before anything runs.

Every function takes what the file gives and where it stands, for the message of a `ConfigError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from multitune.comparing.recipe_entries import (
    OWN_DATA,
    OWN_LISTS,
    TRAINING,
    Budget,
    FewShot,
    MethodEntry,
    Point,
    Search,
    TaskEntry,
)
from multitune.errors import ConfigError, MultituneError, suggest
from multitune.methods import make_method
from multitune.methods.base import ALSO_CALLED
from multitune.training.config import ALSO_CALLED as SETTINGS_TOO
from multitune.training.config import TrainConfig
from multitune.yaml_file import read_names

_OF_TASK = ("task", "data", *OWN_DATA, "train_rows", "validation_rows", "subset_seed", "max_length",
            "max_new_tokens", "training")  # fmt: skip
#: What the recipe says elsewhere, and what is no matter of a trial.
_NOT_HERE = {
    "seed": "seeds stand under 'seeds' of the recipe",
    "progress": "the comparison has a progress bar of its own",
    "keep_checkpoints": "a comparison keeps no checkpoints",
}


def read_tasks(given: Any, where: str) -> Iterator[TaskEntry]:
    """The tasks: a list of names and mappings."""
    if not isinstance(given, list):
        raise ConfigError(f"{where}: 'tasks' is a list, such as [glue/rte, {{task: glue/sst2, train_rows: 2000}}]")
    for number, entry in enumerate(given, start=1):
        here = f"{where}, task {number}"
        if isinstance(entry, str):
            yield TaskEntry(task=entry)
            continue
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"{here} is a name or a mapping, such as {{data: mine.csv, label: intent}}, not {entry!r}"
            )
        values = {str(key).replace("-", "_"): value for key, value in entry.items() if value is not None}
        check_keys(values, _OF_TASK, here)
        if ("task" in values) == ("data" in values):
            raise ConfigError(f"{here} names a known task or own rows: give one of 'task: glue/rte', 'data: mine.csv'")
        own = {key: _of_own(values[key], key, here) for key in OWN_DATA if key in values}
        if "task" in values and own:
            raise ConfigError(f"{here} brings its own data, so '{next(iter(own))}' cannot be honoured; give data: FILE")
        if values.get("subset_seed") and "train_rows" not in values:
            raise ConfigError(
                f"{here}: 'subset_seed' says which train_rows are drawn, so give their number too (under few_shot the "
                f"draws are 'subset_seeds')"
            )
        training = dict(read_training(values.get("training", {}), here))
        if "max_length" in values:
            if "max_length" in training:
                raise ConfigError(f"{here}: 'max_length' stands there twice, once under 'training'; leave out one")
            training |= read_training({"max_length": values["max_length"]}, here)
        yield TaskEntry(
            task=str(values["task"]) if "task" in values else None,
            data=str(values["data"]) if "data" in values else None,
            own=own,
            train_rows=_whole(values, "train_rows", here),
            validation_rows=_whole(values, "validation_rows", here),
            subset_seed=_whole(values, "subset_seed", here, least=0) or 0,
            max_new_tokens=_whole(values, "max_new_tokens", here),
            training=training,
        )


def _of_own(given: Any, key: str, where: str) -> str | list[str]:
    return read_names(given, f"{where}: '{key}'") if key in OWN_LISTS else str(given)


def read_methods(given: Any, where: str) -> Iterator[MethodEntry]:
    """The methods: a list of names, or a mapping of names to their settings."""
    if isinstance(given, Mapping):
        pairs: list[tuple[Any, Any]] = list(given.items())
    elif isinstance(given, list):
        pairs = [pair for e in given for pair in (e.items() if isinstance(e, Mapping) else [(e, {})])]
    else:
        raise ConfigError(
            f"{where}: 'methods' is a list of names, or a mapping such as {{lora: {{r: [4, 8]}}, bitfit: {{}}}}"
        )
    for name, settings in pairs:
        yield read_method(str(name), {} if settings is None else settings, f"{where}, methods")


def read_method(name: str, settings: Any, where: str) -> MethodEntry:
    """One method with its grid; every value is tried."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: '{name}' has a mapping of settings, such as {{r: [4, 8]}}, not {settings!r}")
    here = f"{where}: {name}"
    grid = {}
    for key, value in settings.items():
        values = tuple(_plain(v) for v in value) if isinstance(value, list) else (_plain(value),)
        if not values:
            raise ConfigError(f"{here}: the list of '{key}' is empty; give at least one value")
        if len({repr(v) for v in values}) < len(values):
            raise ConfigError(f"{here}: the list of '{key}' has a value twice: {value}")
        grid[str(key)] = values
    entry = MethodEntry(name=name, grid=grid)
    try:
        for point in _each_value(entry):
            _check_names(entry, point)
            entry.method(point)
            read_training(entry.training(point), here)
    except MultituneError as error:
        raise type(error)(f"{here}: {error}" if not str(error).startswith(here) else str(error)) from error
    return entry


def _plain(value: Any) -> Any:
    """A setting's value as JSON keeps it."""
    if not isinstance(value, (list, tuple)):
        return value
    return [_plain(v) for v in value]


def _each_value(entry: MethodEntry) -> Iterator[dict[str, Any]]:
    """Choices among which every value of every setting stands once, the others at their first value."""
    first = {key: values[0] for key, values in entry.grid.items()}
    yield first
    for key, values in entry.grid.items():
        for value in values[1:]:
            yield first | {key: value}


def _check_names(entry: MethodEntry, point: Point) -> None:
    """A setting that neither the method nor training has: name the nearest of both."""
    if "+" in entry.name:
        return
    known = [*make_method(entry.name).settings(), *(k for k in TRAINING if k not in _NOT_HERE)]
    for key in point:
        if key not in known and key not in _NOT_HERE:
            # another tool's name first: 'lr' is spelled much like 'r'
            near = suggest(SETTINGS_TOO.get(key, key), known) or suggest(ALSO_CALLED.get(key, ""), known)
            raise ConfigError(
                f"neither method '{entry.name}' nor training has a setting '{key}'.{near} There are {', '.join(known)}"
            )


def read_training(given: Any, where: str) -> dict[str, Any]:
    """Settings of training that may stand here, as `TrainConfig` has them."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: training settings are a mapping, such as {{epochs: 3}}, not {given!r}")
    for key, why in _NOT_HERE.items():
        if key in given:
            raise ConfigError(f"{where}: '{key}' cannot be given here: {why}")
    try:
        config = TrainConfig.from_dict(given).to_dict()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return {key: config[key] for key in given}


def read_budget(given: Any, where: str) -> Budget:
    """A share of the backbone in percent, or a number."""
    text = str(given).strip().replace("_", "").replace(",", "")
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if share > 0 and math.isfinite(share):
                return Budget(name=str(given).strip(), share=share)
        elif not isinstance(given, bool) and int(text) > 0:
            return Budget(name=text, count=int(text))
    except ValueError:
        pass
    raise ConfigError(f"{where}: a budget is a share of the backbone, such as 0.1%, or a number above 0, not {given!r}")


def read_seeds(given: Any, where: str, key: str) -> tuple[int, ...]:
    """So many seeds, or which."""
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return tuple(range(given))
    if isinstance(given, (list, tuple)) and given and all(type(s) is int and 0 <= s < 2**32 for s in given):
        if len(set(given)) == len(given):
            return tuple(given)
        raise ConfigError(f"{where}: '{key}' has a seed twice: {given}")
    raise ConfigError(f"{where}: '{key}' is how many seeds, above 0, or a list of them such as [0, 1], not {given!r}")


def read_search(given: Any, where: str) -> Search:
    """How hyper-parameters are looked for."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: 'search' is a mapping, such as {{trials: 8}}, not {given!r}")
    check_keys(given, ("trials",), f"{where}, search")
    return Search(trials=_whole({"trials": given.get("trials")}, "trials", f"{where}, search") or 1)


def read_few_shot(given: Any, where: str) -> FewShot:
    """Few rows of each label."""
    here = f"{where}, few_shot"
    if not isinstance(given, Mapping) or "per_class" not in given:
        raise ConfigError(f"{here} is a mapping, such as {{per_class: [16, 64], subset_seeds: 3}}, not {given!r}")
    check_keys(given, ("per_class", "subset_seeds"), here)
    per_class = tuple(_whole({"per_class": n}, "per_class", here) or 1 for n in as_list(given["per_class"]))
    return FewShot(per_class=per_class, subset_seeds=read_seeds(given.get("subset_seeds", 1), here, "subset_seeds"))


def _whole(values: Mapping[str, Any], key: str, where: str, least: int = 1) -> int | None:
    value = values.get(key)
    if key in values and (type(value) is not int or value < least):
        raise ConfigError(f"{where}: '{key}' is a whole number of at least {least}, not {value!r}")
    return value


def as_list(given: Any) -> list[Any]:
    """What may stand without its list."""
    return given if isinstance(given, list) else [given]


def refuse_training_keys(given: Mapping[str, Any], where: str) -> None:
    """Refuse a setting of training among the keys of the recipe itself; says where it goes."""
    for key, value in given.items():
        name = SETTINGS_TOO.get(key, key)
        if name in TRAINING and name not in _NOT_HERE:
            raise ConfigError(
                f"{where}: '{key}' is a setting of training, which stands under 'training': write training: "
                f"{{{name}: {value}}}"
            )


def check_keys(given: Iterable[Any], known: Sequence[str], where: str) -> None:
    """Refuse a key that there is not; names the nearest."""
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'.{suggest(str(key), known)} Keys: {', '.join(known)}")
