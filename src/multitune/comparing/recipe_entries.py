"""What a recipe consists of: tasks, methods with their grids, budgets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from multitune.methods import Method, make_method
from multitune.tasks import TaskData, load_table, load_task
from multitune.training.config import TrainConfig

OWN_DATA = ("validation", "text", "text_pair", "label", "kind", "labels", "choices", "metric", "format", "name")
"""What a task of the user's own rows may say beside `data`: the keys of a recipe of `multitune train`."""

OWN_LISTS = ("labels", "choices")
"""Of these, what holds several names."""

TRAINING = tuple(f.name for f in fields(TrainConfig))
"""Settings of training, by their names."""

Point = Mapping[str, Any]
"""One choice of a method's settings: hyper-parameters and fields of `TrainConfig` together, by their names."""


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """One task of a recipe."""

    task: str | None = None
    """Name of a known task."""
    data: str | None = None
    """Or the user's own rows: a file, a folder or a hub data set."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """How those are read, by the names of `OWN_DATA`: texts, and lists of texts for `OWN_LISTS`."""
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
        return load_table(self.data, **self.own, seed=0)

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
        return key in TRAINING and ("+" in self.name or key not in make_method(self.name).settings())


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
