"""A mixture of tasks put as instructions, with whole tasks held out: instruction tuning (Wei et al. 2022, FLAN).

    mixture = Mixture.read({"tasks": ["glue/rte", "super_glue/copa", ...], "held_out": ["inference"], "rows": 2000})
    mt.train(backbone, mixture.data(), "lora", "adapters/instructed")
    score_tasks(backbone, mixture.held), score_tasks(backbone, mixture.held, "adapters/instructed")

Paper: arXiv 2109.01652. Examples-proportional mixing with a cap: Raffel et al. 2020 (arXiv 1910.10683, section 3.5.2).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from multitune.errors import ConfigError, DataError, suggest
from multitune.prompting.exemplars import prompt_task
from multitune.prompting.instructions import InstructedTask, instructed
from multitune.tasks import TaskData
from multitune.tasks.p3 import Asked

#: Most rows by which a task counts: FLAN's cap of its mixture.
CAP = 3000
#: Texts this long that a training row shares with a row to judge by tell that one was made from the other.
_SHARED_CHARACTERS = 24

_KEYS = ("tasks", "held_out", "weights", "cap", "rows", "validation_rows", "seed")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Tasks to learn from, and whole tasks to judge by."""

    tasks: tuple[InstructedTask, ...]
    """All of them."""
    held_out: tuple[str, ...] = ()
    """Names of tasks, and of clusters, that are not learnt from."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """By name of a task a factor of its share."""
    cap: int = CAP
    """A task of more rows counts as one of so many."""
    rows: int | None = None
    """Training rows to draw; by default as many as the tasks count for."""
    validation_rows: int = 128
    """Rows of the tasks that are learnt from, in equal parts, by which training keeps its best tensors."""
    seed: int = 0
    """Draws rows and wordings."""

    def __post_init__(self) -> None:
        names, clusters = [t.name for t in self.tasks], {t.cluster for t in self.tasks}
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigError(f"the mixture has task '{twice[0]}' twice; weights={{'{twice[0]}': 2}} doubles its share")
        for what, given, known in (
            ("held_out", self.held_out, [*names, *sorted(clusters)]),
            ("weights", tuple(self.weights), names),
        ):
            for name in given:
                if name not in known:
                    raise ConfigError(
                        f"{what} names '{name}', which the mixture has not.{suggest(name, known)} "
                        f"It has {', '.join(known)}"
                    )
        for name, least in (("cap", 1), ("validation_rows", 1), ("rows", 1), ("seed", 0)):
            value = getattr(self, name)
            optional = name == "rows" and value is None
            if not optional and (type(value) is not int or value < least):
                raise ConfigError(
                    f"{name}={value!r} of a mixture is not possible; give a whole number, at least {least}"
                )
        numbers = {n: w if isinstance(w, (int, float)) else 0 for n, w in self.weights.items()}
        bad = next((n for n, w in numbers.items() if not 0 < w < float("inf")), None)
        if bad is not None:
            raise ConfigError(f"the weight {self.weights[bad]!r} of '{bad}' is not possible; give a number above 0")
        if not self.learnt:
            raise ConfigError(
                "every task of the mixture is held out, or for testing only; nothing is left to learn from"
            )

    @classmethod
    def read(cls, values: Mapping[str, Any], data_dir: str | Path | None = None) -> Mixture:
        """A mixture of tasks by name, from the fields of this class, as a recipe has them.

        Raises:
            ConfigError: an unknown field, or values that cannot be.
            TaskError, DataError: see `instructed`.
        """
        for key in values:
            if key not in _KEYS:
                raise ConfigError(f"a mixture has no '{key}'.{suggest(str(key), _KEYS)} It has {', '.join(_KEYS)}")
        lists = {key: values.get(key, ()) for key in ("tasks", "held_out")}
        for key, given in lists.items():
            if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
                raise ConfigError(f"'{key}' of a mixture is a list of names, not {given!r}")
        if not lists["tasks"]:
            raise ConfigError("a mixture needs 'tasks', a list of names such as glue/rte")
        more = {key: values[key] for key in _KEYS[2:] if key in values}
        if not isinstance(more.get("weights", {}), Mapping):
            raise ConfigError(f"'weights' of a mixture is a mapping of tasks to numbers, not {more['weights']!r}")
        tasks = tuple(instructed(name, data_dir) for name in lists["tasks"])
        return cls(tasks=tasks, held_out=tuple(lists["held_out"]), **more)

    @cached_property
    def held(self) -> tuple[InstructedTask, ...]:
        """The tasks that are held out, by name or by cluster, and those that are for testing only."""
        named = self.held_out
        return tuple(t for t in self.tasks if t.train is None or t.name in named or t.cluster in named)

    @cached_property
    def learnt(self) -> tuple[InstructedTask, ...]:
        """The tasks that are learnt from."""
        held = {t.name for t in self.held}
        return tuple(t for t in self.tasks if t.name not in held)

    @cached_property
    def shares(self) -> dict[str, int]:
        """By task how many training rows are drawn: in proportion to `min(rows, cap)` times its weight."""
        tables: dict[str, Any] = {t.name: t.train for t in self.learnt}
        weights = {n: min(len(table), self.cap) * self.weights.get(n, 1.0) for n, table in tables.items()}
        total = sum(weights.values())
        wanted = self.rows or round(total)
        exact = {name: wanted * weight / total for name, weight in weights.items()}
        counts = {name: int(share) for name, share in exact.items()}
        by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
        for name in by_rest[: wanted - sum(counts.values())]:
            counts[name] += 1
        return counts

    def data(self, format: Any = "auto") -> TaskData:
        """The rows drawn, as one task that `train` takes; each put by a wording drawn for it.

        A task gives no row twice before it has given all. Rows that share a longer text with a row of a held-out task
        are left out, whatever task they belong to.

        Raises:
            DataError: a task none of whose rows can be put, or all of whose rows stand in held-out tasks.
        """
        from datasets import Dataset

        rng = random.Random(self.seed)
        taken = frozenset(text for task in self.held for row in task.test for text in _texts(row))
        train = [row for t in self.learnt for row in _drawn(t, t.train, self.shares[t.name], rng, taken)]
        each = max(1, self.validation_rows // len(self.learnt))
        judged = [row for t in self.learnt for row in _drawn(t, t.test, min(each, len(t.test)), rng, taken)]
        task = prompt_task("mixture", metric="rouge_l", format=format)
        return TaskData(task=task, train=Dataset.from_list(train), validation=Dataset.from_list(judged))


def _drawn(
    task: InstructedTask, table: Any, count: int, rng: random.Random, taken: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """So many rows of a task, each by a wording drawn for it; a new pass begins when all have been given."""
    left = count
    while left:
        before = left
        for number in rng.sample(range(len(table)), len(table)):
            row = table[number]
            asked = None if taken.intersection(_texts(row)) else _put(task, row, rng)
            if asked is not None:
                yield {"prompt": asked.prompt, "answers": [rng.choice(asked.answers)], "task": task.name}
                left -= 1
            if not left:
                return
        if left == before:
            raise DataError(
                f"task '{task.name}' has no row that can be learnt from: its wordings fit none, or all of them stand "
                f"in held-out tasks; leave it out of the mixture"
            )


def _put(task: InstructedTask, row: Mapping[str, Any], rng: random.Random) -> Asked | None:
    """A row by the first that fits of its task's wordings in a random order."""
    for wording in rng.sample(range(len(task.wordings)), len(task.wordings)):
        asked = task.asked(row, wording)
        if asked is not None:
            return asked
    return None


def _texts(row: Mapping[str, Any]) -> Iterable[str]:
    """The longer texts of a row, without case and runs of spaces; what every row of a task repeats is among them."""
    plain = (
        " ".join(value.casefold().split())
        for key, value in row.items()
        if isinstance(value, str) and key not in _COMMON
    )
    return [text for text in plain if len(text) >= _SHARED_CHARACTERS]


#: Columns that say of which task a row is and not what is asked.
_COMMON = ("definition", "id", "uid")


def rows_of(task: InstructedTask, num_rows: int, wording: int = 0, seed: int = 0) -> Sequence[Asked]:
    """Rows of a task to judge by, the same for every model.

    Raises:
        DataError: no row that the wording fits.
    """
    order = random.Random(seed).sample(range(len(task.test)), len(task.test))
    found: list[Asked] = []
    for number in order:
        asked = task.asked(task.test[number], wording)
        if asked is not None:
            found.append(asked)
        if len(found) == num_rows:
            break
    if not found:
        raise DataError(f"task '{task.name}': wording {wording} fits none of its {len(order)} rows")
    return found
