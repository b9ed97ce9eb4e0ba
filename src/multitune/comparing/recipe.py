"""What to compare: a YAML file or a mapping, read strictly, so that a slip is found before anything runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from multitune.errors import ConfigError, MultituneError, suggest
from multitune.methods import Method, make_method
from multitune.methods.base import ALSO_CALLED
from multitune.tasks import TaskData, load_table, load_task
from multitune.training.config import TrainConfig
from multitune.yaml_file import read_yaml

OWN_DATA = ("validation", "text", "text_pair", "label", "kind", "metric", "format", "name")
"""What a task of the user's own rows may say beside `data`: the keys of a recipe of `multitune train`."""

_TOP = ("name", "backbone", "device", "tasks", "methods", "budgets", "seeds", "search", "training", "few_shot")
_OF_TASK = ("task", "data", *OWN_DATA, "train_rows", "validation_rows", "subset_seed", "max_length",
            "max_new_tokens", "training")  # fmt: skip
_TRAINING = tuple(f.name for f in fields(TrainConfig))
#: What the recipe says elsewhere, and what is no matter of a trial.
_NOT_HERE = {
    "seed": "seeds stand under 'seeds' of the recipe",
    "progress": "the comparison has a progress bar of its own",
    "keep_checkpoints": "a comparison keeps no checkpoints",
}

Point = Mapping[str, Any]
"""One choice of a method's settings: hyper-parameters and fields of `TrainConfig` together, by their names."""


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """One task of a recipe."""

    task: str | None = None
    """Name of a known task."""
    data: str | None = None
    """Or the user's own rows: a file, a folder or a hub data set."""
    own: Mapping[str, str] = field(default_factory=dict)
    """How those are read, by the names of `OWN_DATA`."""
    train_rows: int | None = None
    validation_rows: int | None = None
    subset_seed: int = 0
    max_new_tokens: int | None = None
    """Most tokens of the texts that a task of writing is judged by."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` for this task."""

    def load(self) -> TaskData:
        """The task with all of its rows. Where nothing says which to judge by, the same tenth is held out each time."""
        if self.task is not None:
            return load_task(self.task)
        assert self.data is not None
        return load_table(self.data, **self.own, seed=0)  # type: ignore[arg-type]

    @property
    def source(self) -> dict[str, Any]:
        """Where the rows come from, as JSON values, for the record."""
        if self.task is not None:
            return {"task": self.task}
        files = {"data": str(self.data), **{k: v for k, v in self.own.items() if k == "validation"}}
        return {**self.own, **{key: Path(file).name for key, file in files.items()}}  # wherever the files lie


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """One method of a recipe with its grid."""

    name: str
    """A method, or several joined by "+"."""
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values to try by setting; a setting with one value is fixed."""

    @property
    def num_points(self) -> int:
        """How many choices of settings there are."""
        return math.prod(len(values) for values in self.grid.values())

    def points(self) -> Iterator[dict[str, Any]]:
        """Every choice, the last setting changing fastest."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def method(self, point: Point) -> Method:
        """The method of one choice."""
        return make_method(self.name, {k: v for k, v in point.items() if not self.is_training(k)})

    def training(self, point: Point) -> dict[str, Any]:
        """The training settings of one choice."""
        return {k: v for k, v in point.items() if self.is_training(k)}

    def is_training(self, key: str) -> bool:
        """Whether a setting is one of training; the method's own come first (VeRA has a seed)."""
        return key in _TRAINING and ("+" in self.name or key not in make_method(self.name).settings())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of trained parameters that every method is brought to."""

    name: str
    """As the recipe writes it."""
    share: float | None = None
    """Of the backbone's parameters."""
    count: int | None = None
    """Or a number."""

    def parameters(self, of_backbone: int) -> int:
        """Most parameters that a method may train."""
        return self.count if self.count is not None else int((self.share or 0.0) * of_backbone)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How hyper-parameters are looked for."""

    trials: int
    """Settings tried per method, task and budget; all of a grid that has no more."""


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Every task with few rows of each label."""

    per_class: tuple[int, ...]
    subset_seeds: tuple[int, ...] = (0,)
    """Each draws other rows."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to compare."""

    name: str
    tasks: tuple[TaskEntry, ...]
    methods: tuple[MethodEntry, ...]
    backbone: str = "minilm"
    device: str = "cpu"
    budgets: tuple[Budget, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    search: Search | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    few_shot: FewShot | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """A recipe from the values of a YAML file.

        Raises:
            ConfigError: an unknown key, method or setting, or a value that is not possible; says where.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} is a mapping with the keys tasks and methods, not {values!r}")
        given = {str(key).replace("-", "_"): value for key, value in values.items() if value is not None}
        _check_keys(given, _TOP, where)
        for key in ("tasks", "methods"):
            if not given.get(key):
                raise ConfigError(f"{where} needs '{key}', such as tasks: [demo/topic] and methods: [lora, bitfit]")
        training = _training(given.get("training", {}), f"{where}, training")
        methods = tuple(_methods(given["methods"], where))
        return cls(
            name=str(given.get("name", "comparison")),
            backbone=str(given.get("backbone", "minilm")),
            device=str(given.get("device", "cpu")),
            tasks=tuple(_tasks(given["tasks"], where)),
            methods=methods,
            budgets=tuple(_budget(b, where) for b in _as_list(given.get("budgets", []))),
            seeds=_seeds(given.get("seeds", 3), where, "seeds"),
            search=None if "search" not in given else _search(given["search"], where),
            training=training,
            few_shot=None if "few_shot" not in given else _few_shot(given["few_shot"], where),
        )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file.

        Raises:
            ConfigError: the file cannot be read, or what `from_dict` raises.
        """
        values = read_yaml(Path(path), "recipe")
        found = cls.from_dict(values, f"recipe {path}")
        return replace(found, name=Path(path).stem) if "name" not in values else found

    def with_methods(self, names: Sequence[str]) -> Recipe:
        """The recipe with these methods alone; one that it lacks comes with its default settings."""
        known = {m.name: m for m in self.methods}
        return replace(self, methods=tuple(known[n] if n in known else _method(n, {}, "methods") for n in names))

    def with_seeds(self, seeds: int | Sequence[int]) -> Recipe:
        """The recipe with other seeds: so many, or just these."""
        return replace(self, seeds=_seeds(seeds, "the comparison", "seeds"))

    def with_budgets(self, budgets: Sequence[str | int]) -> Recipe:
        """The recipe with these budgets, as a file gives them."""
        return replace(self, budgets=tuple(_budget(b, "the comparison") for b in budgets))

    def with_search(self, trials: int) -> Recipe:
        """The recipe with a search of so many trials. A method that varies nothing gets its learning rate to vary: a
        third of the usual one, that, and three times it.
        """
        methods = tuple(m if m.num_points > 1 else self._with_rates(m) for m in self.methods)
        return replace(self, methods=methods, search=_search({"trials": trials}, "the comparison"))

    def _with_rates(self, entry: MethodEntry) -> MethodEntry:
        if "learning_rate" in entry.grid:
            return entry
        (point,) = entry.points()
        usual = self.training.get("learning_rate") or entry.method(point).recipe.learning_rate
        rates = tuple(float(f"{usual * factor:.2g}") for factor in (1 / 3, 1, 3))
        return replace(entry, grid={**entry.grid, "learning_rate": rates})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as the values of a YAML file; `from_dict` gives back an equal recipe."""
        tasks = []
        for entry in self.tasks:
            values: dict[str, Any] = {"task": entry.task} if entry.task is not None else {"data": entry.data}
            values |= dict(entry.own)
            numbers = ("train_rows", "validation_rows", "max_new_tokens")
            values |= {k: v for k in numbers if (v := getattr(entry, k)) is not None}
            values |= {"subset_seed": entry.subset_seed} if entry.subset_seed else {}
            tasks.append(values | ({"training": dict(entry.training)} if entry.training else {}))
        made: dict[str, Any] = {"name": self.name, "backbone": self.backbone, "device": self.device, "tasks": tasks}
        made["methods"] = [{m.name: {k: list(v) for k, v in m.grid.items()}} for m in self.methods]
        if self.budgets:
            made["budgets"] = [b.count if b.count is not None else b.name for b in self.budgets]
        made["seeds"] = list(self.seeds)
        if self.search is not None:
            made["search"] = {"trials": self.search.trials}
        if self.training:
            made["training"] = dict(self.training)
        if self.few_shot is not None:
            few = self.few_shot
            made["few_shot"] = {"per_class": list(few.per_class), "subset_seeds": list(few.subset_seeds)}
        return made


# ------------------------------------------------------------------- reading


def _tasks(given: Any, where: str) -> Iterator[TaskEntry]:
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
        _check_keys(values, _OF_TASK, here)
        if ("task" in values) == ("data" in values):
            raise ConfigError(f"{here} names a known task or own rows: give one of 'task: glue/rte', 'data: mine.csv'")
        own = {key: str(values[key]) for key in OWN_DATA if key in values}
        if "task" in values and own:
            raise ConfigError(f"{here} brings its own data, so '{next(iter(own))}' cannot be honoured; give data: FILE")
        if values.get("subset_seed") and "train_rows" not in values:
            raise ConfigError(
                f"{here}: 'subset_seed' says which train_rows are drawn, so give their number too (under few_shot the "
                f"draws are 'subset_seeds')"
            )
        training = dict(_training(values.get("training", {}), here))
        if "max_length" in values:
            if "max_length" in training:
                raise ConfigError(f"{here}: 'max_length' stands there twice, once under 'training'; leave out one")
            training |= _training({"max_length": values["max_length"]}, here)
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


def _methods(given: Any, where: str) -> Iterator[MethodEntry]:
    if isinstance(given, Mapping):
        pairs: list[tuple[Any, Any]] = list(given.items())
    elif isinstance(given, list):
        pairs = [pair for e in given for pair in (e.items() if isinstance(e, Mapping) else [(e, {})])]
    else:
        raise ConfigError(
            f"{where}: 'methods' is a list of names, or a mapping such as {{lora: {{r: [4, 8]}}, bitfit: {{}}}}"
        )
    for name, settings in pairs:
        yield _method(str(name), {} if settings is None else settings, f"{where}, methods")


def _method(name: str, settings: Any, where: str) -> MethodEntry:
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
            _training(entry.training(point), here)
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
    known = [*make_method(entry.name).settings(), *(k for k in _TRAINING if k not in _NOT_HERE)]
    for key in point:
        if key not in known and key not in _NOT_HERE:
            near = suggest(key, known) or suggest(ALSO_CALLED.get(key, ""), known)
            raise ConfigError(
                f"neither method '{entry.name}' nor training has a setting '{key}'.{near} There are {', '.join(known)}"
            )


def _training(given: Any, where: str) -> dict[str, Any]:
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


def _budget(given: Any, where: str) -> Budget:
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


def _seeds(given: Any, where: str, key: str) -> tuple[int, ...]:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return tuple(range(given))
    if isinstance(given, (list, tuple)) and given and all(type(s) is int and 0 <= s < 2**32 for s in given):
        if len(set(given)) == len(given):
            return tuple(given)
        raise ConfigError(f"{where}: '{key}' has a seed twice: {given}")
    raise ConfigError(f"{where}: '{key}' is how many seeds, above 0, or a list of them such as [0, 1], not {given!r}")


def _search(given: Any, where: str) -> Search:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: 'search' is a mapping, such as {{trials: 8}}, not {given!r}")
    _check_keys(given, ("trials",), f"{where}, search")
    return Search(trials=_whole({"trials": given.get("trials")}, "trials", f"{where}, search") or 1)


def _few_shot(given: Any, where: str) -> FewShot:
    here = f"{where}, few_shot"
    if not isinstance(given, Mapping) or "per_class" not in given:
        raise ConfigError(f"{here} is a mapping, such as {{per_class: [16, 64], subset_seeds: 3}}, not {given!r}")
    _check_keys(given, ("per_class", "subset_seeds"), here)
    per_class = tuple(_whole({"per_class": n}, "per_class", here) or 1 for n in _as_list(given["per_class"]))
    return FewShot(per_class=per_class, subset_seeds=_seeds(given.get("subset_seeds", 1), here, "subset_seeds"))


def _whole(values: Mapping[str, Any], key: str, where: str, least: int = 1) -> int | None:
    value = values.get(key)
    if key in values and (type(value) is not int or value < least):
        raise ConfigError(f"{where}: '{key}' is a whole number of at least {least}, not {value!r}")
    return value


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _check_keys(given: Iterable[Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'.{suggest(str(key), known)} Keys: {', '.join(known)}")
