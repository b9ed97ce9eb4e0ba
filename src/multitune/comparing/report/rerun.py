"""Recipes that run single rows of a report again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from multitune.comparing.records import Record
from multitune.comparing.summary import Candidate


def recipes_of(candidate: Candidate) -> list[str]:
    """Recipes for `multitune compare` that run every trial of a candidate again, one for each group of tasks that
    have settings, training and seeds in common."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for task in candidate.cells.values():
        records = sorted((*task.finished, *task.failed), key=lambda r: r.trial.seed)
        by_settings: dict[str, list[Record]] = defaultdict(list)
        for r in records:
            by_settings[_json([r.trial.settings, _training(r), r.trial.data.get("per_class"), r.budget])].append(r)
        for settings, of in by_settings.items():
            seeds = sorted({r.trial.seed for r in of})
            draws = sorted({int(r.trial.data.get("subset_seed") or 0) for r in of})
            groups[_json([settings, seeds, draws])] += of
    return [_recipe(candidate, of) for of in groups.values()]


def _recipe(candidate: Candidate, records: Sequence[Record]) -> str:
    first = records[0].trial
    draws = sorted({int(r.trial.data.get("subset_seed") or 0) for r in records})
    tasks: dict[str, Any] = {}
    for r in records:
        tasks.setdefault(r.trial.task, _task(r))
    recipe: dict[str, Any] = {
        "name": "again",
        "backbone": first.backbone,
        "tasks": list(tasks.values()),
        "methods": {first.method: _as_grid(first.settings)},
        "seeds": sorted({r.trial.seed for r in records}),
        "training": _training(records[0]),
    }
    if first.data.get("per_class") is not None:
        recipe["few_shot"] = {"per_class": [first.data["per_class"]], "subset_seeds": draws}
    return yaml.safe_dump(json.loads(_json(recipe)), sort_keys=False, allow_unicode=True, width=100)


def _as_grid(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a recipe has them: there a list is several values to try, so one that is a list stands in a list."""
    fixed = {k: v for k, v in settings.items() if v is not None and k != "methods"}  # of a combination the name says it
    return {k: [list(v)] if isinstance(v, (list, tuple)) else v for k, v in fixed.items()}


def _task(record: Record) -> dict[str, Any]:
    """A task's entry of a recipe."""
    data = record.trial.data
    entry = {k: v for k, v in data.items() if "fingerprint" not in k and k != "per_class" and v is not None}
    if data.get("per_class") is not None:
        entry.pop("subset_seed", None)  # the draws stand under few_shot
    return entry if {"task", "data"} & set(entry) else {"task": record.trial.task, **entry}


def _training(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record.trial.training.items() if k != "seed" and v is not None}


def _json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)
