"""The parts of a claim: what runs can decide, each read from one kind of result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MARGIN = 0.01
"""A method that is on par is at most a point worse."""
MOST = 0.95
"""A method that reaches most of another's score reaches this share of it."""
NEGLIGIBLE = 0.05
"""Time that is negligible is at most this share of the bare backbone's."""
COLLECTIONS = {"glue": "glue", "superglue": "super_glue", "table-to-text": "nlg"}
"""By suite the collection of its tasks: what stands in front of the slash in their names."""

Relation = Literal["beats", "on par", "most of"]

_RELATIONS = {
    "beats": "scores higher than {other}",
    "on par": f"scores at most {100 * MARGIN:g} point below {{other}}",
    "most of": f"reaches {MOST:.0%} of the score of {{other}}",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The scores of two methods on the tasks of a suite."""

    method: str
    other: str
    relation: Relation
    budget: str | None = None
    """Both at this budget, as a recipe writes it."""
    suites: tuple[str, ...] = ()
    """On which it is judged, each by itself; by default those of the claim."""
    options: str = ""
    """What the command that runs a suite needs, where the suite lacks a method or the budget."""

    @property
    def words(self) -> str:
        """The comparison as text."""
        at = f", both at {self.budget} of the parameters" if self.budget else ""
        return f"{self.method} {_RELATIONS[self.relation].format(other=self.other)}{at}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """The trained parameters of a method as a share of full tuning's."""

    method: str
    most: float
    """The share that it stays below."""
    paper_size: int
    """Full tuning's parameters on the paper's backbone. Shares of such methods shrink as backbones widen, so that on a
    smaller one a larger share says nothing against the paper."""
    suites: tuple[str, ...] = ()
    options: str = ""

    @property
    def words(self) -> str:
        """The comparison as text."""
        return f"{self.method} trains under {self.most:.1%} of the parameters of full"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The time of a batch with a method by that of the bare backbone, from the rows of benchmarks/overhead.py."""

    method: str
    form: str
    """One of `overhead.FORMS`."""
    other: tuple[str, str] | None = None
    """Method and form that take longer; by default the time beyond the bare backbone's is negligible."""

    @property
    def words(self) -> str:
        """The comparison as text."""
        if self.other is None:
            return f"{self.method} {self.form} adds at most {NEGLIGIBLE:.0%} to the bare backbone's time"
        return f"{self.method} {self.form} takes less time than {' '.join(self.other)}"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two that a benchmark's rows compare."""

    title: str
    score: str
    """Path of the score in a row, such as `scores.*.right`; a star is the mean over all that stands there."""
    cell: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the row's cell by which it is known."""
    per: str | float = 1.0
    """What the score is divided by, to be a share of 1: a number, or the path of one."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The scores of two sides in the rows of a benchmark (benchmarks/results)."""

    store: str
    """Name of the benchmark: of its rows' files what stands in front of "-" or the ending."""
    one: Side
    other: Side
    command: str
    """What makes the rows."""
    relation: Relation = "beats"
    alike: tuple[str, ...] = ("backbone",)
    """Fields of the cells, and the task if there are several, in which rows that are compared are alike. A row whose
    cell lacks one is of another form of the benchmark and not compared."""
    same: tuple[str, ...] = ()
    """Further such fields that a finding does not show: long lists, and settings that nobody changes as a rule."""
    seed: str = "seed"
    """Path of the seed in the cell; rows without one are compared with those of every seed."""

    @property
    def words(self) -> str:
        """The comparison as text."""
        return f"{self.one.title} {_RELATIONS[self.relation].format(other=self.other.title)}"


@dataclass(frozen=True, kw_only=True)
class Untested:
    """What no run here can decide."""

    words: str
    reason: str


AnyPart = Part | Size | Timed | Stored | Untested
