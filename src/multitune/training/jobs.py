"""What is trained together, and how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multitune.errors import MultituneError
from multitune.methods import Method
from multitune.tasks import TaskData
from multitune.training.results import TrainResult


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One adapter to train: what `train` takes, for one of many."""

    data: TaskData
    """The task with its rows. Jobs that share the object share its tokenized rows."""
    method: Method | str
    """A method, or the name of one, or of several joined by "+"."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` in which this job differs from the others, such as `{"learning_rate": 1e-3}`."""
    name: str | None = None
    """What to call it, and its folder; by default task and method, with a number where that is taken."""
    output_dir: str | Path | None = None
    """Its folder; by default its name inside the folder of all."""
    overwrite: bool = False
    """Replace a finished adapter, or an unfinished run of other settings, in its folder."""


@dataclass(frozen=True, kw_only=True)
class FailedJob:
    """A job that ended without an adapter, while the others went on."""

    name: str
    error: MultituneError
    """Why; of a run that diverged, its message names the step and the setting to change. What another library or the
    method's own code raised is its `__cause__`, with the traceback as text among its `__notes__`."""
    step: int
    """Optimizer steps it had taken."""
    history: list[dict[str, float]]
    """What it had logged, as in `TrainResult.history`."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C while jobs were running. What had ended is in `results`; the same call goes on with the others."""

    def __init__(self, results: Mapping[str, TrainResult | FailedJob]) -> None:
        super().__init__(f"interrupted after {len(results)} jobs had ended")
        self.results = dict(results)
        """By name of the job."""
