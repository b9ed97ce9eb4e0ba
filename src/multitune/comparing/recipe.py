"""What to compare: a YAML file or a mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multitune.comparing.recipe_entries import Budget, FewShot, MethodEntry, Search, TaskEntry
from multitune.comparing.recipe_reading import (
    as_list,
    check_keys,
    read_budget,
    read_few_shot,
    read_method,
    read_methods,
    read_search,
    read_seeds,
    read_tasks,
    read_training,
    refuse_training_keys,
)
from multitune.errors import ConfigError
from multitune.yaml_file import read_yaml

_TOP = ("name", "backbone", "device", "tasks", "methods", "budgets", "seeds", "search", "training", "few_shot")


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
        refuse_training_keys(given, where)
        check_keys(given, _TOP, where)
        for key in ("tasks", "methods"):
            if not given.get(key):
                raise ConfigError(f"{where} needs '{key}', such as tasks: [demo/topic] and methods: [lora, bitfit]")
        training = read_training(given.get("training", {}), f"{where}, training")
        methods = tuple(read_methods(given["methods"], where))
        return cls(
            name=str(given.get("name", "comparison")),
            backbone=str(given.get("backbone", "minilm")),
            device=str(given.get("device", "cpu")),
            tasks=tuple(read_tasks(given["tasks"], where)),
            methods=methods,
            budgets=tuple(read_budget(b, where) for b in as_list(given.get("budgets", []))),
            seeds=read_seeds(given.get("seeds", 3), where, "seeds"),
            search=None if "search" not in given else read_search(given["search"], where),
            training=training,
            few_shot=None if "few_shot" not in given else read_few_shot(given["few_shot"], where),
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
        return replace(self, methods=tuple(known[n] if n in known else read_method(n, {}, "methods") for n in names))

    def with_seeds(self, seeds: int | Sequence[int]) -> Recipe:
        """The recipe with other seeds: so many, or just these."""
        return replace(self, seeds=read_seeds(seeds, "the comparison", "seeds"))

    def with_budgets(self, budgets: Sequence[str | int]) -> Recipe:
        """The recipe with these budgets, as a file gives them."""
        return replace(self, budgets=tuple(read_budget(b, "the comparison") for b in budgets))

    def with_search(self, trials: int) -> Recipe:
        """The recipe with a search of so many trials. A method that varies nothing gets its learning rate to vary: a
        third of the usual one, that, and three times it.
        """
        methods = tuple(m if m.num_points > 1 else self._with_rates(m) for m in self.methods)
        return replace(self, methods=methods, search=read_search({"trials": trials}, "the comparison"))

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
