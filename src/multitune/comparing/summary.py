"""Records as what a report shows: candidates by tasks, each cell a mean over seeds, and how candidates differ.

A *candidate* is what a reader could choose: a method at a size, with the settings that tell it from its neighbours. A
*task* here is a task under one condition: all rows, or so many of them. A *unit* is what an interval counts: a seed,
or, where training rows were drawn several times, a draw (the seeds of a draw share its rows, so they are averaged).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from multitune.comparing.overhead import OverheadRow
from multitune.comparing.records import Record
from multitune.comparing.statistics import (
    ALPHA,
    Difference,
    Estimate,
    estimate,
    holm,
    letters,
    paired_difference,
    pareto_front,
    ranks,
)

Unit = tuple[str, int]


@dataclass(frozen=True)
class Cell:
    """One candidate on one task."""

    finished: tuple[Record, ...]
    failed: tuple[Record, ...]

    @cached_property
    def by_unit(self) -> dict[Unit, list[Record]]:
        """The finished runs by what counts as one: by draw of rows if there are several, else by seed."""
        several = len({draw_of(r) for r in self.finished}) > 1
        units: dict[Unit, list[Record]] = defaultdict(list)
        for record in sorted(self.finished, key=lambda r: (draw_of(r), r.trial.seed)):
            units[("draw", draw_of(record)) if several else ("seed", record.trial.seed)].append(record)
        return dict(units)

    @cached_property
    def scores(self) -> dict[Unit, float]:
        """Score of every unit."""
        return {unit: float(np.mean([_score(r) for r in runs])) for unit, runs in self.by_unit.items()}

    @cached_property
    def score(self) -> Estimate | None:
        """Mean over units; none where no run finished."""
        return estimate(list(self.scores.values())) if self.scores else None

    def mean(self, name: str) -> float | None:
        """Mean of a field of the outcomes; none where some run lacks it."""
        values = [getattr(r.outcome, name) for r in self.finished]
        return math.fsum(values) / len(values) if values and None not in values else None


def _score(record: Record) -> float:
    assert record.outcome.score is not None
    return record.outcome.score


def draw_of(record: Record) -> int:
    """Which draw of the training rows a run learned from."""
    return int(record.trial.data.get("subset_seed") or 0)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method at a size, over all tasks."""

    name: str
    """Unique in a summary: the method, its budget, and the settings that tell it from others."""
    method: str
    budget: str | None
    backbone: str
    cells: Mapping[str, Cell]
    """By task; a task without any run of it is not there."""
    overall: Estimate | None
    """Mean over all tasks; none where it lacks one."""
    overhead_alone: float | None = None
    """Time of batches of this method alone by the bare backbone's, geometric mean of the measured shapes."""
    overhead_mixed: float | None = None
    """The same in a mixed batch."""

    def mean(self, field_name: str) -> float | None:
        """Mean over tasks of a field of the outcomes; none where it lacks a task's."""
        values = [cell.mean(field_name) for cell in self.cells.values() if cell.finished]
        known = [v for v in values if v is not None]
        return math.fsum(known) / len(known) if values and len(known) == len(values) else None

    @property
    def records(self) -> list[Record]:
        """Every run of it."""
        return [r for cell in self.cells.values() for r in (*cell.finished, *cell.failed)]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a report shows."""

    tasks: tuple[str, ...]
    metrics: Mapping[str, str]
    """Name of each task's score."""
    candidates: tuple[Candidate, ...]
    """Best mean first; those that lack a task behind, by name."""
    records: tuple[Record, ...]
    """Those that count: the final ones, or all if there is no final one."""
    num_search: int
    """Runs that only looked for hyper-parameters."""
    only_search: bool
    """Whether the runs shown are those of the search, because there are no others yet."""
    overhead: tuple[OverheadRow, ...] = ()

    @cached_property
    def complete(self) -> tuple[Candidate, ...]:
        """The candidates with a score on every task, which alone have a mean and a rank."""
        return tuple(c for c in self.candidates if c.overall is not None)

    @cached_property
    def by_name(self) -> dict[str, Candidate]:
        """The candidates by name."""
        return {c.name: c for c in self.candidates}

    @cached_property
    def rank(self) -> dict[str, float]:
        """Mean over tasks of the rank on each, of the complete candidates."""
        of_tasks = [ranks({c.name: _mean(c.cells[t]) for c in self.complete}) for t in self.tasks]
        return {c.name: math.fsum(of[c.name] for of in of_tasks) / len(of_tasks) for c in self.complete}

    @cached_property
    def differences(self) -> dict[frozenset[str], tuple[Difference, float | None]]:
        """Every pair of complete candidates, the better one's mean minus the other's, and p after Holm's correction."""
        pairs = list(combinations(self.complete, 2))
        found = [compare(one, other, self.tasks) for one, other in pairs]
        testable = [d.p for d in found if d.p is not None]
        corrected = iter(holm(testable))
        return {
            frozenset((one.name, other.name)): (d, None if d.p is None else next(corrected))
            for (one, other), d in zip(pairs, found, strict=True)
        }

    def differ(self, one: str, other: str) -> bool:
        """Whether two complete candidates differ, all pairs tested being allowed for."""
        p = self.differences[frozenset((one, other))][1]
        return p is not None and p < ALPHA

    @cached_property
    def letters(self) -> dict[str, str]:
        """Letters of the complete candidates: two that share one cannot be told apart."""
        differ = {pair: p is not None and p < ALPHA for pair, (_, p) in self.differences.items()}
        return letters([c.name for c in self.complete], differ)

    def front(self, cost: Mapping[str, float | None]) -> list[str]:
        """Names of the complete candidates that no other beats in both cost and mean score, cheapest first."""
        points = {}
        for c in self.complete:
            value = cost.get(c.name)
            if value is not None and c.overall is not None:
                points[c.name] = (value, c.overall.mean)
        return pareto_front(points)

    @cached_property
    def parameters(self) -> dict[str, float | None]:
        """Trained values without the head, by candidate."""
        return {c.name: c.mean("parameters") for c in self.candidates}

    @cached_property
    def seconds(self) -> dict[str, float | None]:
        """Seconds of training, by candidate; none where they are not comparable with the most usual machine's."""
        places = Counter(_place(r) for c in self.candidates for r in c.records if r.outcome.seconds is not None)
        usual = places.most_common(1)[0][0] if places else None
        found: dict[str, float | None] = {}
        for c in self.candidates:
            finished = [r for cell in c.cells.values() for r in cell.finished]
            fair = all(_place(r) == usual and r.outcome.together == 1 for r in finished)
            found[c.name] = c.mean("seconds") if fair else None
        return found

    @cached_property
    def num_units(self) -> list[int]:
        """Numbers of units in the cells, sorted."""
        return sorted({c.cells[t].score.n for c in self.candidates for t in c.cells if c.cells[t].score})  # type: ignore[union-attr]


def _mean(cell: Cell) -> float:
    assert cell.score is not None
    return cell.score.mean


def _place(record: Record) -> str:
    """Where a run's time was measured."""
    of = record.outcome.environment
    return json.dumps([of.get("machine"), of.get("threads"), of.get("device")], sort_keys=True, default=str)


# ------------------------------------------------------------------------ the paired test


def compare(one: Candidate, other: Candidate, tasks: Sequence[str]) -> Difference:
    """The paired test of two candidates over tasks, seeds and rows; see `paired_difference`."""
    return paired_difference([paired_runs(one.cells[t], other.cells[t]) for t in tasks])


def paired_runs(one: Cell, other: Cell) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Differences `[S, R]` on the units both have; `[S, 1]` of main scores where their rows cannot be paired.

    Without a unit in common it is the difference of the means, `[1, 1]`, from which no test follows.
    """
    shared = [unit for unit in one.scores if unit in other.scores]
    if not shared:
        return np.array([[_mean(one) - _mean(other)]])
    rows = [(_rows(one.by_unit[unit]), _rows(other.by_unit[unit])) for unit in shared]
    lengths = {None if x is None else len(x) for pair in rows for x in pair}
    same_rows = all(unit[0] == "seed" for unit in shared)  # another draw may have drawn other validation rows
    if same_rows and len(lengths) == 1 and None not in lengths:
        return np.array([np.subtract(np.array(x), np.array(y)) for x, y in rows])
    return np.array([[one.scores[unit] - other.scores[unit]] for unit in shared])


def _rows(records: Sequence[Record]) -> Sequence[float] | None:
    """Row scores of the one run of a seed, if they are shares of right answers and not, say, squared errors."""
    found = records[-1].outcome.row_scores
    return found if found and min(found) >= 0 and max(found) <= 1 else None


def uses_rows(summary: Summary, task: str) -> bool:
    """Whether the tests of a task compare row by row."""
    cells = [c.cells[task] for c in summary.complete]
    return len(cells) > 1 and paired_runs(cells[0], cells[1]).shape[1] > 1
