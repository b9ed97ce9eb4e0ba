"""Recipes that run single rows of a report again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from multitune.comparing.records import Record
from multitune.comparing.summary import Candidate, draw_of
from multitune.training.config import LATER

#: Devices that a record names as torch does.
_KINDS = ("cpu", "mps", "xpu")


def recipes_of(candidate: Candidate) -> list[str]:
    """Recipes for `multitune compare` that run every trial of a candidate again, one for each group of tasks that
    have settings, training, seeds and device in common.

    A recipe has a task once with so many rows to learn from; of the same with other rows each has a recipe of its own.
    """
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    entries: dict[tuple[str, int, str], str] = {}
    for cell in candidate.cells.values():
        alike: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for r in sorted((*cell.finished, *cell.failed), key=lambda r: r.trial.seed):
            alike[_common(r), _json(_task(r))].append(r)
        for (settings, entry), of in alike.items():
            common = _json([settings, sorted({r.trial.seed for r in of}), _draws(of)])
            name, number = _json([of[0].trial.task, of[0].trial.data.get("train_rows")]), 0
            while entries.setdefault((common, number, name), entry) != entry:
                number += 1
            groups[common, number] += of
    return [_recipe(of) for of in groups.values()]


def _common(record: Record) -> str:
    """What the trials of one recipe have in common."""
    trial = record.trial
    return _json([trial.settings, _training(record), trial.data.get("per_class"), record.budget, _device(record)])


def _device(record: Record) -> str:
    """The kind of device a run had, as a recipe calls it; a GPU stands in a record by its own name."""
    kind = str(record.outcome.environment.get("device", "cpu")).partition(":")[0]
    return kind if kind in _KINDS else "cuda"


def _draws(records: Sequence[Record]) -> list[int]:
    return sorted({draw_of(r) for r in records})


def _recipe(records: Sequence[Record]) -> str:
    first = records[0].trial
    tasks = {_json(_task(r)): _task(r) for r in records}
    recipe: dict[str, Any] = {
        "name": "again",
        "backbone": first.backbone,
        "device": _device(records[0]),
        "tasks": list(tasks.values()),
        "methods": {first.method: _as_grid(first.settings)},
        "seeds": sorted({r.trial.seed for r in records}),
        "training": _training(records[0]),
    }
    if first.data.get("per_class") is not None:
        recipe["few_shot"] = {"per_class": [first.data["per_class"]], "subset_seeds": _draws(records)}
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
    return {k: v for k, v in {**LATER, **record.trial.training}.items() if k != "seed" and v is not None}


def _json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)
