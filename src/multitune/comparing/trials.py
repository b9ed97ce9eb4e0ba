"""From a recipe to its trials: rows, sizes, settings, seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from multitune.backbone import Backbone
from multitune.comparing.budgets import fit
from multitune.comparing.extras import require
from multitune.comparing.recipe import Recipe
from multitune.comparing.recipe_entries import Budget, MethodEntry, Point, TaskEntry
from multitune.comparing.records import Trial, digest
from multitune.comparing.rows import draw, rows_fingerprint
from multitune.errors import ConfigError, DataError, MultituneError
from multitune.heads import Head
from multitune.methods import Method
from multitune.tasks import Task, TaskData, compute
from multitune.tasks.metrics import judge_of_training
from multitune.training.config import TrainConfig
from multitune.training.data import warn_of_empty
from multitune.training.idle import without_idle
from multitune.training.setup import Setup, check_trains_something


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trial with the rows it needs and what it is for."""

    trial: Trial
    data: TaskData
    purpose: Literal["search", "final"] = "final"
    budget: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One draw of a task's rows."""

    task: str
    data: TaskData
    facts: Mapping[str, Any]
    """`Trial.data`."""
    training: Mapping[str, Any]
    """Training settings of the recipe and of the task."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is searched by itself: one method on one task under one budget."""

    draws: tuple[Rows, ...]
    """Draws of the task's rows, of which the first is searched on."""
    method: MethodEntry
    budget: str | None
    points: tuple[Mapping[str, Any], ...]
    """Choices of settings, the size that the budget asks for filled in."""

    @cached_property
    def name(self) -> str:
        """Tells this cell from others, whatever else the recipe compares."""
        own = {"method": self.method.name, "budget": self.budget, "points": list(self.points)}
        return digest({"rows": dict(self.draws[0].facts), "task": self.draws[0].task, **own})


class Plan:
    """A recipe on its backbone: every cell, checked."""

    def __init__(self, recipe: Recipe, backbone: Backbone) -> None:
        """
        Raises:
            MultituneError: a task that cannot be read, a setting that does not fit the backbone or the task.
        """
        self.recipe = recipe
        self.backbone = backbone
        self.left_out: list[str] = []
        """Sentences about methods that a budget is too small for."""
        self._fitted: dict[str, dict[str, Any] | None] = {}
        draws = [group for entry in recipe.tasks for group in self._draws(entry)]
        _check_names(draws)
        cells = (cell for budget in recipe.budgets or (None,) for group in draws for cell in self._cells(group, budget))
        self.cells = tuple({cell.name: cell for cell in cells}.values())  # full tuning is one, whatever the budgets
        if not self.cells:
            raise ConfigError(f"nothing is left to compare: {'; '.join(self.left_out)}. Give a larger budget")
        self._check()

    # ---------------------------------------------------------------- rows

    def _draws(self, entry: TaskEntry) -> Iterator[tuple[Rows, ...]]:
        whole, few = entry.load(), self.recipe.few_shot
        if few is None:
            yield (self._rows(entry, whole, entry.subset_seed, None),)
            return
        if entry.train_rows is not None:
            raise ConfigError(
                f"task '{whole.task.name}': train_rows and few_shot both say how many rows to learn from; leave out "
                f"one of them"
            )
        for per_class in few.per_class:
            yield tuple(self._rows(entry, whole, seed, per_class) for seed in few.subset_seeds)

    def _rows(self, entry: TaskEntry, whole: TaskData, subset_seed: int, per_class: int | None) -> Rows:
        part = draw(
            whole,
            train_rows=entry.train_rows,
            validation_rows=entry.validation_rows,
            subset_seed=subset_seed,
            per_class=per_class,
        )
        for split, table in (("training", part.train), ("validation", part.validation)):
            if table is None or not len(table):
                raise DataError(f"task '{whole.task.name}' has no {split} rows; a comparison needs both")
            warn_of_empty(part.task, split, part.task.examples(table))
        facts: dict[str, Any] = {**entry.source, "fingerprint": rows_fingerprint(part)}
        facts |= {"train_rows": entry.train_rows, "validation_rows": entry.validation_rows, "subset_seed": subset_seed}
        if per_class is not None:
            facts["per_class"] = per_class
        _check_judging(part.task, entry.max_new_tokens, self.backbone)
        if entry.max_new_tokens is not None:
            facts["max_new_tokens"] = entry.max_new_tokens
        training = {**self.recipe.training, **entry.training}
        return Rows(task=whole.task.name, data=part, facts=facts, training=training)

    # ---------------------------------------------------------------- settings

    def _cells(self, draws: tuple[Rows, ...], budget: Budget | None) -> Iterator[Cell]:
        for entry in self.recipe.methods:
            points, small = [], []
            for point in entry.points():
                fitted = self._fit(entry, point, budget, draws[0])
                if fitted is None:
                    small.append(point)
                elif fitted not in points:
                    points.append(fitted)
            if budget is not None and small:
                said = [_with_grid(entry, point) for point in small] if points else [entry.name]
                lines = [f"{what} is left out at {budget.name}: its smallest form has more parameters" for what in said]
                self.left_out = list(dict.fromkeys([*self.left_out, *lines]))
            if not points:
                continue
            # a method that trains the backbone itself has no budget: it is the reference, and the same in all of them
            named = None if budget is None or entry.method(points[0]).changes_weights else budget.name
            yield Cell(draws=draws, method=entry, budget=named, points=tuple(points))

    def _fit(self, entry: MethodEntry, point: Point, budget: Budget | None, rows: Rows) -> dict[str, Any] | None:
        if budget is None or entry.method(point).changes_weights:
            return dict(point)
        training = entry.training(point)
        own = {key: value for key, value in point.items() if key not in training}
        length = min(TrainConfig.from_dict({**rows.training, **training}).max_length, self.backbone.max_length)
        key = json.dumps([entry.name, own, budget.name, length], sort_keys=True, default=str)
        if key not in self._fitted:
            most = budget.parameters(self.backbone.num_parameters)
            self._fitted[key] = fit(self.backbone, entry.name, own, most, max_length=length)
        fitted = self._fitted[key]
        return None if fitted is None else fitted | training

    # ---------------------------------------------------------------- trials

    def job(
        self, cell: Cell, point: Point, rows: Rows, seed: int, purpose: Literal["search", "final"] = "final"
    ) -> Job:
        """The trial of one choice of settings on one draw of rows with one seed."""
        method, config = self._made(cell.method, point, rows, seed)
        trial = Trial(
            task=rows.task,
            data=dict(rows.facts),
            backbone=self.recipe.backbone,
            backbone_fingerprint=self.backbone.fingerprint,
            method=cell.method.name,
            settings=method.settings(),
            training=config.identity(),
        )
        return Job(trial=trial, data=rows.data, purpose=purpose, budget=cell.budget)

    def finals(self, chosen: Mapping[str, Sequence[Point]] | None = None) -> list[Job]:
        """The trials that count, a whole comparison with the first seed before the next.

        Args:
            chosen: by name of a cell the settings to run; by default all of its own.
        """
        jobs: dict[tuple[str, str | None], Job] = {}
        for seed in self.recipe.seeds:
            for cell in self.cells:
                for point in cell.points if chosen is None else chosen.get(cell.name, ()):
                    for rows in cell.draws:
                        job = self.job(cell, point, rows, seed)
                        jobs.setdefault((job.trial.key, job.budget), job)
        return list(jobs.values())

    def search_seed(self) -> int:
        """The seed of the trials that look for settings."""
        return self.recipe.seeds[0]

    def _made(self, entry: MethodEntry, point: Point, rows: Rows, seed: int) -> tuple[Method, TrainConfig]:
        method = entry.method(point)
        config = TrainConfig.from_dict({**rows.training, **entry.training(point), "seed": seed}).resolve(method)
        config = without_idle(self.backbone, rows.data.task, config)  # tasks of several kinds share settings
        return method, replace(config, pooling=config.pooling or self.backbone.default_pooling)

    def _check(self) -> None:
        """Refuse now what a trial would be refused for later."""
        for cell in self.cells:
            for point in cell.points:
                method, config = self._made(cell.method, point, cell.draws[0], 0)
                try:
                    self._check_run(cell.draws[0], method, config)
                except MultituneError as error:
                    raise type(error)(f"method '{cell.method.name}': {error}") from error
        search = self.recipe.search
        if search is not None and any(len(cell.points) > search.trials for cell in self.cells):
            require("optuna", "compare", "a search")

    def _check_run(self, rows: Rows, method: Method, config: TrainConfig) -> None:
        """What `train` checks of its arguments. Which draw the rows are makes no difference, nor which layers."""
        backbone, task = self.backbone, rows.data.task
        assert config.pooling is not None
        head = Head.for_task(task, pooling=config.pooling)
        head.check(backbone)
        of_any_layer = method.with_layers((backbone.num_layers - 1,))
        asked = Setup.check(backbone, rows.data, of_any_layer, None, config=config, name=None, overwrite=False)
        if not method.changes_weights:
            check_trains_something(task, asked.method, backbone.shapes_of(asked.method), head.shapes(backbone))


def _check_judging(task: Task, max_new_tokens: int | None, backbone: Backbone) -> None:
    """Refuse what the texts of a task could not be judged by, before the first of them is written.

    Raises:
        ConfigError: the library of the metric is not installed, or `max_new_tokens` cannot be honoured.
    """
    writes = task.kind == "generation" and judge_of_training(task.metric) != task.metric
    if writes:
        compute(task.metric, ["1"], ["1"])
    if max_new_tokens is None:
        return
    if not writes:
        raise ConfigError(
            f"task '{task.name}': max_new_tokens={max_new_tokens} is the length of texts that are judged, and "
            f"{task.kind} by {task.metric} judges none; leave it out"
        )
    if not backbone.decodes and max_new_tokens >= backbone.max_length:
        raise ConfigError(
            f"task '{task.name}': max_new_tokens={max_new_tokens} leaves no room for a prompt in the "
            f"{backbone.max_length} positions of backbone '{backbone.name}'; lower it"
        )


def _with_grid(entry: MethodEntry, point: Point) -> str:
    """A method with the hyper-parameters that its grid varies."""
    varied = [k for k, values in entry.grid.items() if len(values) > 1 and not entry.is_training(k)]
    return f"{entry.name} with {', '.join(f'{k}={point[k]}' for k in varied)}"


def name_of(of: Trial | Rows) -> str:
    """The task, and how many rows to learn from were drawn."""
    facts = of.data if isinstance(of, Trial) else of.facts
    if facts.get("per_class") is not None:
        return f"{of.task} ({facts['per_class']} a label)"
    return of.task if facts.get("train_rows") is None else f"{of.task} ({facts['train_rows']} rows)"


def _check_names(draws: Sequence[tuple[Rows, ...]]) -> None:
    names = [name_of(group[0]) for group in draws]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two tasks are called '{twice[0]}' and would be one in the report; name each table once, or give own rows "
            f"a 'name'"
        )
