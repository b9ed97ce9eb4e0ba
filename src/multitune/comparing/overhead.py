"""What serving a method costs in time over the bare backbone: one measurement a row, and files of them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from multitune.errors import DataError

FORMS: dict[str, str] = {
    "alone": "every row the same adapter",
    "mixed": "half of the rows this method, each with another adapter, the others of other methods",
    "merged": "folded into the weights",
    "fused": "token rows computed before and stored",
    "factors": "token rows computed in the pass",
}


@dataclass(frozen=True, kw_only=True)
class OverheadRow:
    """Time of one batch with a method by that of the bare backbone, measured in turn on the same inputs."""

    method: str
    """A method's name, or several joined by "+"."""
    form: Literal["alone", "mixed", "merged", "fused", "factors"]
    """How the adapter is served, see `FORMS`."""
    rows: int
    """Rows in the batch."""
    length: int
    """Tokens in a row."""
    ratio: float
    """Median over rounds of the time by the bare backbone's in the same round."""
    milliseconds: float
    """Median time of a batch."""
    quartiles: tuple[float, float] | None = None
    """First and third quartile of the ratios within a round."""
    rounds: int
    backbone: str = "minilm"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the method."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions, threads and date."""

    @property
    def place(self) -> str:
        """Where it was measured, in words: ratios of different places are not compared with each other."""
        of = self.environment
        threads = of.get("threads")
        said = [of.get("machine"), None if threads is None else f"threads {threads}", of.get("device")]
        return ", ".join(str(part) for part in said if part is not None)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OverheadRow:
        """What `to_dict` wrote.

        Raises:
            DataError: a field is missing or unknown; names it.
        """
        needed = {"method", "form", "rows", "length", "ratio", "milliseconds", "rounds"}
        names = {f.name for f in fields(cls)}
        if wrong := sorted(needed - set(values)) + sorted(set(values) - names):
            raise DataError(f"a row of overhead has or lacks {', '.join(wrong)}; benchmarks/overhead.py writes them")
        if values["form"] not in FORMS:
            raise DataError(f"a row of overhead has the form {values['form']!r}; there are {', '.join(FORMS)}")
        quartiles = values.get("quartiles")
        return cls(**{**values, "quartiles": None if quartiles is None else tuple(quartiles)})


def read_overhead(file: Path) -> list[OverheadRow]:
    """The rows of a file of JSON lines, as `benchmarks/overhead.py` writes it; of each measurement in a place the last
    counts.

    Raises:
        DataError: a line is no such row; names it. A last line that was cut off by a kill is left out.
    """
    lines, found = file.read_text("utf-8").splitlines(), {}
    for number, line in enumerate(lines, start=1):
        try:
            row = OverheadRow.from_dict(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue
            raise DataError(f"{file}, line {number} is no JSON: {error}; remove the line, or measure again") from error
        except (DataError, TypeError) as error:
            raise DataError(f"{file}, line {number}: {error}") from error
        settings = json.dumps(row.settings, sort_keys=True)
        found[row.method, row.form, row.rows, row.length, row.backbone, settings, row.place] = row
    return list(found.values())


def usual_places(rows: Iterable[OverheadRow]) -> dict[str, str]:
    """By backbone the place where most was measured, of equals the later one."""
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        of = numbers[row.backbone]
        of[row.place] = of.pop(row.place, 0) + 1
    return {backbone: max(reversed(of), key=of.__getitem__) for backbone, of in numbers.items()}


def mean_ratio(rows: Sequence[OverheadRow], cells: Iterable[tuple[int, int]]) -> float | None:
    """Geometric mean of the ratios at these `(rows, length)`; none unless all were measured."""
    by_cell = {(row.rows, row.length): row.ratio for row in rows}
    wanted = list(cells)
    if not wanted or any(cell not in by_cell for cell in wanted):
        return None
    return math.exp(math.fsum(math.log(by_cell[cell]) for cell in wanted) / len(wanted))
