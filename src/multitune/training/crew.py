"""The jobs that train together: who runs, who waits, and what becomes of one that ends."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from multitune.backbone import Backbone
from multitune.errors import MultituneError
from multitune.tasks import Task
from multitune.training.api import train_setup
from multitune.training.data import TaskRows
from multitune.training.failures import as_ours
from multitune.training.jobs import FailedJob
from multitune.training.lanes import Lanes
from multitune.training.process_state import globals_kept
from multitune.training.progress import Progress
from multitune.training.results import TrainResult, history_of
from multitune.training.setup import Opened, Setup, read_rows
from multitune.training.stepped import SteppedRun
from multitune.training.together import needs_process, pack, run_pass
from multitune.training.trainer import TuningTrainer

#: What a pass gives: its runs, each with the error that ends it, if one does.
_Found = list[tuple[SteppedRun, MultituneError | None]]


@dataclass(eq=False)
class _Running:
    """A job that has entered."""

    setup: Setup
    opened: Opened
    run: SteppedRun
    start: float


class Caller:
    """What the caller wants to be told. An error of the caller's own functions is no job's."""

    def __init__(
        self,
        report: Callable[[str], None] | None,
        ended: Callable[[str, TrainResult | FailedJob], None] | None,
    ) -> None:
        self.listens = report is not None
        self._report, self._ended = report, ended
        self._error: Exception | None = None

    def say(self, name: str, line: str) -> None:
        """A line about a job."""
        self._call(self._report, f"{name}: {line}")

    def ended(self, name: str, result: TrainResult | FailedJob) -> None:
        """A job has ended."""
        self._call(self._ended, name, result)

    def error_of_a_job(self, error: Exception) -> MultituneError:
        """An error that came up while a job was at it, as the job's; the caller's own goes on to the caller."""
        if error is self._error:
            raise error
        return as_ours(error)

    def _call(self, function: Callable[..., None] | None, *args: Any) -> None:
        if function is None:
            return
        try:
            function(*args)
        except Exception as error:
            self._error = error
            raise


class Crew:
    """The jobs that run, and those that wait."""

    def __init__(
        self,
        backbone: Backbone,
        setups: Sequence[Setup],
        max_jobs: int,
        token_budget: int,
        lanes: int,
        found: dict[str, TrainResult | FailedJob],
        progress: Progress,
        caller: Caller,
    ) -> None:
        self._backbone = backbone
        self._waiting = deque(setups)
        self._running: list[_Running] = []
        self._max_jobs = max_jobs
        self._token_budget = token_budget
        self._lanes = Lanes(lanes)
        self._beside: set[SteppedRun] = set()
        """Runs of whose pass of this round others ran beside."""
        self._found = found
        self._progress = progress
        self._caller = caller
        self._rows: dict[tuple[int, str, int], TaskRows] = {}
        """Tokenized rows, by the table's id, its split and task, and the length they are cut to."""
        self._tables = [setup.data for setup in setups]
        """Kept, so that the ids stay theirs."""
        self._users = Counter(id(table) for data in self._tables for table in (data.train, data.validation))
        """How many jobs that have not ended read a table, by its id."""

    def work(self) -> None:
        """Train all to their ends."""
        self._progress.expect(len(self._waiting))
        with tempfile.TemporaryDirectory() as scratch, globals_kept():
            try:
                with self._lanes:
                    while self._waiting or self._running:
                        while self._waiting and len(self._running) < self._max_jobs:
                            self._enter(self._waiting.popleft(), Path(scratch))
                        self._round()
            finally:
                self._backbone.model.eval()

    def _round(self) -> None:
        """One batch of every running job."""
        by_run = {job.run: job for job in self._running}
        passes = pack(list(by_run), self._token_budget)
        for runs, found in zip(passes, self._run(passes), strict=True):
            for run, failed in self._shared_out([by_run[run] for run in runs], found):
                failed = failed or self._go_on(by_run[run])
                if failed is not None:
                    self._fail(by_run[run], failed)
                elif run.finished:
                    self._finish(by_run[run])

    def _run(self, passes: Sequence[list[SteppedRun]]) -> list[_Found | MultituneError]:
        """What every pass gave, or what it failed of.

        A run whose shared pass failed has not only its pass for itself: the want of memory may have been another's.
        """
        alone = [runs for runs in passes if runs[0].apart is not None or needs_process(runs[0])]
        beside = [runs for runs in passes if runs not in alone]
        self._beside = {run for runs in beside for run in runs} if self._lanes.side_by_side(beside) else set()
        given = [*self._lanes.map(_tried, beside), *map(_tried, alone)]
        of_first = {runs[0]: found for runs, found in zip([*beside, *alone], given, strict=True)}
        return [of_first[runs[0]] for runs in passes]

    def _shared_out(self, jobs: Sequence[_Running], found: _Found | MultituneError) -> _Found:
        """What a pass gave each of its jobs. Where it failed they go on one by one, and who fails alone ends."""
        if not isinstance(found, MultituneError):
            return found
        first = jobs[0].run
        if len(jobs) == 1 and first not in self._beside:
            self._rejoin(first.apart)
            return [(first, found)]
        mark, company = object(), "shared with" if len(jobs) > 1 else "beside"
        for job in jobs:
            self._caller.say(job.setup.name, f"a pass {company} others failed ({found}); it goes on by itself")
            job.run.restart(apart=mark)
        return []

    def _rejoin(self, mark: object | None) -> None:
        """It is known whose fault a failed pass was: the others of that pass share passes again."""
        for job in self._running:
            if job.run.apart is mark:
                job.run.apart = None

    def _go_on(self, job: _Running) -> MultituneError | None:
        """What is due after a job took what a pass gave it; returns what ends the job, if anything does."""
        try:
            job.run.go_on()
        except Exception as error:
            return self._caller.error_of_a_job(error)
        self._progress.at(job.setup.name, job.run.trainer.state.global_step)
        return None

    def _enter(self, setup: Setup, scratch: Path) -> None:
        self._backbone.model.eval()  # the passes of the others left it in training; a method may start from a text
        try:
            begun = self._begin(setup, scratch)
        except Exception as error:
            failed = FailedJob(name=setup.name, error=self._caller.error_of_a_job(error), step=0, history=[])
            self._leave(setup, failed, f"cannot begin: {failed.error}")
            return
        if isinstance(begun, TrainResult):
            self._leave(setup, begun, "was finished before")
            return
        self._running.append(begun)
        self._progress.begin(setup.name, begun.run.trainer.max_steps)
        if begun.run.finished:  # killed between its last step and the end of the run
            self._finish(begun)

    def _begin(self, setup: Setup, scratch: Path) -> _Running | TrainResult:
        start = time.perf_counter()
        opened = setup.open(self._read)
        done = setup.finished(opened.settings)
        if done is not None:
            return done
        opened.claim()
        return _Running(setup, opened, self._start(setup, opened, scratch), start)

    def _start(self, setup: Setup, opened: Opened, scratch: Path) -> SteppedRun:
        say = partial(self._caller.say, setup.name)
        say(f"{setup.method.name} on {opened.facts['num_train']} rows")
        for line in opened.remarks:
            say(line)
        config = replace(setup.config, progress=False)  # the bars are those of all jobs together
        lines = say if self._caller.listens and not self._progress.shown else None
        rows = opened.rows
        trainer = TuningTrainer(
            opened.model, config, rows["train"], rows["validation"], opened.checkpoints, scratch, lines
        )
        return SteppedRun(trainer, opened.prompt_length)

    def _read(self, task: Task, table: Any, split: str, max_length: int) -> TaskRows:
        key = (id(table), f"{split} {task.to_dict()}", max_length)
        if key not in self._rows:
            self._rows[key] = read_rows(self._backbone, task, table, split, max_length)
        return self._rows[key]

    def _finish(self, job: _Running) -> None:
        try:
            result = job.setup.close(job.opened, job.run.trainer, job.start, job=True)
        except Exception as error:
            self._fail(job, as_ours(error))
            return
        self._running.remove(job)
        self._leave(job.setup, result, f"{result.metric} {result.best_metric:.3f} at step {result.best_step}")

    def _fail(self, job: _Running, error: MultituneError) -> None:
        self._running.remove(job)
        history = history_of(job.run.trainer)
        failed = FailedJob(name=job.setup.name, error=error, step=job.run.trainer.state.global_step, history=history)
        self._leave(job.setup, failed, str(error))

    def _forget_rows(self, table: Any) -> None:
        """A job that reads the table has ended; rows that no other will read go."""
        self._users[id(table)] -= 1
        if not self._users[id(table)]:
            self._rows = {key: rows for key, rows in self._rows.items() if key[0] != id(table)}

    def _leave(self, setup: Setup, result: TrainResult | FailedJob, line: str) -> None:
        self._found[setup.name] = result
        for table in (setup.data.train, setup.data.validation):
            self._forget_rows(table)
        self._progress.end(setup.name, isinstance(result, FailedJob))
        self._caller.say(setup.name, line)
        self._backbone.model.eval()  # for a caller who asks it now; the next pass switches it back
        self._caller.ended(setup.name, result)


def _tried(runs: Sequence[SteppedRun]) -> _Found | MultituneError:
    """A pass, and what each run does with its gradients; or what the pass failed of.

    The gradients are used up at once: kept until all passes have run, they would lie scattered among the memory that
    the next pass needs.
    """
    try:
        found = run_pass(runs)
    except Exception as error:
        return as_ours(error)
    return [(run, loss if isinstance(loss, MultituneError) else _taken(run, loss)) for run, loss in found]


def _taken(run: SteppedRun, loss: Tensor) -> MultituneError | None:
    try:
        run.took(loss)
    except Exception as error:
        return as_ours(error)
    return None


def train_alone(setup: Setup, caller: Caller) -> TrainResult | FailedJob:
    """A job that needs a backbone of its own."""
    say = partial(caller.say, setup.name)
    say("by itself, because it changes the backbone's own weights")
    try:
        result = train_setup(setup, time.perf_counter(), say, job=True)
    except Exception as error:
        failed = FailedJob(name=setup.name, error=caller.error_of_a_job(error), step=0, history=[])
        say(str(failed.error))
        return failed
    say(f"{result.metric} {result.best_metric:.3f} at step {result.best_step}")
    return result
