"""Rows of benchmarks, by which claims are judged beside the stores of comparisons."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitune.comparing.parts import Side, Stored
from multitune.errors import DataError

Row = dict[str, Any]


def read_results(folder: Path) -> dict[str, list[Row]]:
    """Rows of the benchmarks' files in a folder, by the benchmark's name; of equal cells the last counts.

    A file of JSON lines has a row a line, with all that it depends on under `cell`; its name ends with "-1of2" where a
    run was shared out.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; give the one that the benchmarks write to, benchmarks/results")
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for file in sorted(folder.glob("*.jsonl")):
        for row in _rows(file):
            found[file.stem.partition("-")[0]][json.dumps(row["cell"], sort_keys=True)] = row
    return {name: list(rows.values()) for name, rows in found.items()}


def _rows(file: Path) -> Iterator[Row]:
    for line in file.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill; the benchmark runs it again
            continue
        if isinstance(row, dict) and isinstance(row.get("cell"), dict):
            yield row


def pairs_of(rows: Sequence[Row], part: Stored) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Scores of both sides on equal conditions: by what rows have in common, and by task, a pair for every seed."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in (r for r in rows if _fits(r, part.one)):
        for other in (r for r in rows if _fits(r, part.other)):
            seeds = {_seed(r, part) for r in (one, other)} - {None}
            if len(seeds) > 1 or any(one["cell"].get(k) != other["cell"].get(k) for k in part.alike):
                continue
            common = ", ".join(f"{k} {one['cell'].get(k)}" for k in part.alike if k != "task")
            task = str(one["cell"].get("task", "")) if "task" in part.alike else ""
            by_task = found.setdefault(common, {})
            by_task.setdefault(task, []).append((_score(one, part.one), _score(other, part.other)))
    return found


def _fits(row: Row, side: Side) -> bool:
    return all(row["cell"].get(k) == v for k, v in side.cell.items())


def _seed(row: Row, part: Stored) -> Any:
    found = list(_at(row["cell"], part.seed.split(".")))
    return found[0] if found else None


def _score(row: Row, side: Side) -> float:
    """The score as a share of 1."""
    value = _mean(row, side.score)
    return value / (side.per if isinstance(side.per, float) else _mean(row, side.per))


def _mean(row: Row, path: str) -> float:
    values = [float(v) for v in _at(row, path.split("."))]
    if not values:
        raise DataError(f"a row of a benchmark has nothing at '{path}'; run the benchmark again, its rows have changed")
    return sum(values) / len(values)


def _at(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """What stands at a path; a star stands for all names."""
    if not path:
        yield value
    elif isinstance(value, Mapping):
        for name in list(value) if path[0] == "*" else [path[0]] if path[0] in value else []:
            yield from _at(value[name], path[1:])
