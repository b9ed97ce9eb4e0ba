"""Rows of benchmarks, by which claims are judged beside the stores of comparisons."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitune.comparing.parts import Side, Stored
from multitune.errors import DataError

Row = dict[str, Any]
Pairs = dict[str, list[tuple[float, float]]]
"""By task the scores of the two sides, for every seed."""


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


def pairs_of(rows: Sequence[Row], part: Stored) -> list[tuple[str, Pairs]]:
    """Scores of both sides on equal conditions: for each group of rows that are alike its conditions, and the pairs.

    Two rows of one side, task and seed were run with other settings, and are no two seeds: they are of two groups.
    """
    found: dict[str, tuple[Row, Pairs]] = {}
    left, right = ([r for r in rows if _fits(r, part, side)] for side in (part.one, part.other))
    varied = _varied(left, part, part.one), _varied(right, part, part.other)
    for one, other in itertools.product(left, right):
        seeds = {_seed(r, part) for r in (one, other)} - {None}
        if len(seeds) > 1 or _conditions(one, part) != _conditions(other, part):
            continue
        alike = {k: v for k, v in _conditions(one, part).items() if k != "task"}
        own = [{k: _unseeded(r, part).get(k) for k in of} for r, of in zip((one, other), varied, strict=True)]
        task = str(one["cell"]["task"]) if "task" in part.alike else ""
        by_task = found.setdefault(json.dumps([alike, *own], sort_keys=True), (one, {}))[1]
        by_task.setdefault(task, []).append((_score(one, part.one), _score(other, part.other)))
    in_what = dict.fromkeys([*part.same, *varied[0], *varied[1]])
    titles = _titles([row for row, _ in found.values()], part, list(in_what))
    return [(title, pairs) for title, (_, pairs) in zip(titles, found.values(), strict=True)]


def _varied(rows: Sequence[Row], part: Stored, side: Side) -> list[str]:
    """Fields of the cells in which rows of one side differ though task, seed and all that is known to matter agree."""
    known = {*part.alike, *part.same, *side.cell}
    alike: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        own = {k: v for k, v in _unseeded(row, part).items() if k not in known}
        alike[json.dumps([_conditions(row, part), _seed(row, part)], sort_keys=True)].append(own)
    names = dict.fromkeys(name for of in alike.values() for own in of for name in own)
    texts = {
        name: [{json.dumps(own.get(name), sort_keys=True) for own in of} for of in alike.values()] for name in names
    }
    return [name for name in names if any(len(values) > 1 for values in texts[name])]


def _unseeded(row: Row, part: Stored) -> Row:
    """A row's cell without its seed."""
    above, _, name = part.seed.rpartition(".")
    if not above:
        return {k: v for k, v in row["cell"].items() if k != name}
    inner = row["cell"].get(above)
    return {**row["cell"], above: {k: v for k, v in inner.items() if k != name}} if inner else row["cell"]


def _fits(row: Row, part: Stored, side: Side) -> bool:
    # two cells that both lack a field agree in it, so that rows of an older form would all be alike
    known = all(k in row["cell"] for k in (*part.alike, *part.same))
    return known and all(row["cell"].get(k) == v for k, v in side.cell.items())


def _conditions(row: Row, part: Stored) -> Row:
    return {k: row["cell"][k] for k in (*part.alike, *part.same)}


def _titles(rows: Sequence[Row], part: Stored, in_what: Sequence[str]) -> list[str]:
    """What the rows of each group have in common, a row of each given; numbered where it is the same to the eye."""
    shown = [k for k in part.alike if k != "task"]
    said = [", ".join(f"{k} {r['cell'][k]}" for k in shown if r["cell"][k] is not None) for r in rows]
    count, number = Counter(said), Counter[str]()
    titles = []
    for text in said:
        number[text] += 1
        which = f" ({number[text]} of {count[text]}, which differ in {' or '.join(in_what)})"
        titles.append(text + (which if count[text] > 1 else ""))
    return titles


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
