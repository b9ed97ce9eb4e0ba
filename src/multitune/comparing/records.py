"""What a comparison keeps: a trial is what one run depends on, an outcome what it gave, a record both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

#: Metrics of sacreBLEU, which run to 100, and NIST, whose 8 is shown as 8; scores run to 1 and are shown in percent.
PERCENT = ("bleu", "chrf", "nist")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """All that a run's scores depend on, as JSON values: equal trials have equal keys and equal scores."""

    task: str
    """The task's name, such as glue/rte."""
    data: Mapping[str, Any]
    """Where the rows come from and, of own rows, how they are read; a fingerprint of them; and which were drawn:
    `train_rows`, `validation_rows` (numbers of rows, none stands for all), `subset_seed`, `per_class` where rows were
    drawn by label; and `max_new_tokens` where the recipe gives judged texts a length."""
    backbone: str
    """As `Backbone.load` takes it."""
    backbone_fingerprint: str
    method: str
    """A method, or several joined by "+"."""
    settings: Mapping[str, Any]
    """Hyper-parameters of the method, all of them."""
    training: Mapping[str, Any]
    """`TrainConfig.identity`, the method's recipe filled in; `seed` is one of them. What it lacks is in `LATER`."""

    @property
    def seed(self) -> int:
        """Seed of the start, the order of the rows and dropout."""
        return int(self.training["seed"])

    @cached_property
    def key(self) -> str:
        """20 hexadecimal digits that depend on every field."""
        return digest(self.to_dict())

    @cached_property
    def group(self) -> str:
        """The key of the trial without its seed: trials of one group differ in nothing else."""
        training = {name: value for name, value in self.training.items() if name != "seed"}
        return digest(self.to_dict() | {"training": training})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave."""

    status: Literal["finished", "failed"]
    error: str | None = None
    """Of a failed run: the message."""
    metric: str
    """Name of the task's main score."""
    score: float | None = None
    """The main score on the validation rows, higher is better, between 0 and 1 or a correlation."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Every score by name."""
    parameters: int | None = None
    """Trained values that the adapter keeps, without the head's: a network that only training has does not count."""
    head_parameters: int | None = None
    file_bytes: int | None = None
    """Size of the weights of the saved adapter without its head."""
    seconds: float | None = None
    """Wall time of training with its evaluations."""
    processor_seconds: float | None = None
    """Processor time; none where other trials ran in the same process."""
    peak_memory: int | None = None
    """Most bytes of memory the process held during the run, what earlier runs left in it included; none where others
    ran beside it."""
    together: int = 1
    """How many trials ran in the same process at a time, which makes `seconds` incomparable with those of 1."""
    history: tuple[Mapping[str, float], ...] = ()
    """Learning curve: rows with `step`, and `loss` or scores of an evaluation (`eval_<score>`)."""
    row_scores: tuple[float, ...] | None = None
    """Score of every validation row in its order, where the task has such (1 for a right answer, 0 for a wrong one; the
    squared error taken negative): for paired tests."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions, threads and date."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One trial of a recipe and what it gave."""

    trial: Trial
    outcome: Outcome
    purpose: Literal["search", "final"] = "final"
    """Whether the trial looked for hyper-parameters, or counts for the report."""
    budget: str | None = None
    """The recipe's name of the parameter budget this setting was chosen for."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """What `to_dict` wrote."""
        outcome = dict(values["outcome"])
        outcome["history"] = tuple(outcome["history"])
        if outcome["row_scores"] is not None:
            outcome["row_scores"] = tuple(outcome["row_scores"])
        fields = dict(values) | {"trial": Trial(**values["trial"]), "outcome": Outcome(**outcome)}
        return cls(**fields)


def digest(values: Mapping[str, Any]) -> str:
    """20 hexadecimal digits of JSON values, whatever the order of their names."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]
