"""Train many adapters together on one backbone: tasks, or settings of one task."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from multitune.backbone import Backbone
from multitune.errors import ConfigError, DataError, MixError, MultituneError
from multitune.heads import Head
from multitune.methods import Method
from multitune.tasks import Task, TaskData
from multitune.training.api import train_setup
from multitune.training.config import TrainConfig
from multitune.training.data import TaskRows
from multitune.training.failures import as_ours
from multitune.training.idle import refuse_idle, without_idle
from multitune.training.process_state import globals_kept
from multitune.training.progress import Progress
from multitune.training.results import TrainResult, history_of
from multitune.training.setup import Opened, Setup, check_backbone_and_method, read_rows, refuse_hyper_parameters
from multitune.training.stepped import SteppedRun
from multitune.training.together import pack, run_pass
from multitune.training.trainer import TuningTrainer

Alone = Literal["refuse", "queue"]

#: Settings by which a model leaves whole layers out at random, which would be one draw for all jobs.
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop")


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


@dataclass(eq=False)
class _Running:
    """A job that has entered."""

    setup: Setup
    opened: Opened
    run: SteppedRun
    start: float


def train_many(
    backbone: Backbone,
    jobs: Sequence[TrainJob],
    output_dir: str | Path | None = None,
    *,
    config: TrainConfig | None = None,
    max_jobs: int = 16,
    token_budget: int = 512,
    alone: Alone = "refuse",
    report: Callable[[str], None] | None = None,
    ended: Callable[[str, TrainResult | FailedJob], None] | None = None,
    **overrides: Any,
) -> list[TrainResult | FailedJob]:
    """Train many adapters together. Each result is that of `train` with the same settings.

    The rows of all running jobs go through the frozen backbone in shared forward and backward passes. Everything else
    is a job's own: rows and their order, random numbers, loss, optimizer, schedule, clipping, evaluation, early
    stopping and checkpoints. When a job ends, the next of the queue enters.

    Args:
        output_dir: each job's folder is its name in here; `None` saves nothing but where a job has a folder of its own.
            The same call after a kill goes on: finished jobs are read, others resume from their last evaluation.
        config: training settings of all jobs; `overrides` are fields of it, and a job's `settings` come last.
        max_jobs: most jobs that run at a time; the others wait in the order given.
        token_budget: most tokens in one pass, padding and the vectors of prompts included: bounds the memory; much
            larger passes are slower, as they leave the processor's cache. A job whose batch exceeds it runs by itself.
        alone: what to do with jobs whose method changes the backbone's own weights, which cannot share a pass: refuse
            them, or train them one after the other when all others have ended.
        report: called with a line when a job begins, resumes, was evaluated or ends; with a progress bar, begins and
            ends only.
        ended: called with a job's name and result when it ends, while others still run. An error of it, or of
            `report`, ends the call.

    Returns:
        In the order of `jobs` what `train` returns (`seconds` counts from entering to leaving, so those of jobs that
        ran together overlap), or a `FailedJob` for one that diverged, could not begin, or failed of any other error.

    Raises:
        ConfigError: an unknown or impossible setting, or two jobs of one name or folder; names the job.
        DataError: rows that do not fit their task; names the job.
        MixError: a job whose method cannot share a pass, unless `alone="queue"`.
        BackboneError: an encoder-decoder whose decoder runs; or a backbone without the head that a job needs.
        PlanError: a detached backbone.
        TrainingInterrupted: Ctrl-C; holds the results so far.
    """
    shared = TrainConfig.from_dict({**(config or TrainConfig()).to_dict(), **overrides})
    _check_arguments(backbone, jobs, max_jobs, token_budget, alone)
    names = _names(jobs)
    seen: set[tuple[Any, ...]] = set()
    setups = [_setup(backbone, job, name, output_dir, shared, seen) for job, name in zip(jobs, names, strict=True)]
    _check_together(backbone, setups, alone)
    found: dict[str, TrainResult | FailedJob] = {}
    caller = _Caller(report, ended)
    together = [s for s in setups if not s.method.changes_weights]
    try:
        with Progress(shared.progress) as progress:
            _Crew(backbone, together, max_jobs, token_budget, found, progress, caller).work()
        for setup in setups:  # outside, because each shows a bar of its own
            if setup.method.changes_weights:
                found[setup.name] = _train_alone(setup, caller)
                caller.ended(setup.name, found[setup.name])
    except KeyboardInterrupt:
        raise TrainingInterrupted(found) from None
    return [found[name] for name in names]


class _Caller:
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


class _Crew:
    """The jobs that run, and those that wait."""

    def __init__(
        self,
        backbone: Backbone,
        setups: Sequence[Setup],
        max_jobs: int,
        token_budget: int,
        found: dict[str, TrainResult | FailedJob],
        progress: Progress,
        caller: _Caller,
    ) -> None:
        self._backbone = backbone
        self._waiting = deque(setups)
        self._running: list[_Running] = []
        self._max_jobs = max_jobs
        self._token_budget = token_budget
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
                while self._waiting or self._running:
                    while self._waiting and len(self._running) < self._max_jobs:
                        self._enter(self._waiting.popleft(), Path(scratch))
                    self._round()
            finally:
                self._backbone.model.eval()

    def _round(self) -> None:
        """One batch of every running job."""
        by_run = {job.run: job for job in self._running}
        for runs in pack(list(by_run), self._token_budget):
            for run, loss in self._pass([by_run[run] for run in runs]):
                failed = loss if isinstance(loss, MultituneError) else self._go_on(by_run[run], loss)
                if failed is not None:
                    self._fail(by_run[run], failed)
                elif run.finished:
                    self._finish(by_run[run])

    def _pass(self, jobs: Sequence[_Running]) -> list[tuple[SteppedRun, Tensor | MultituneError]]:
        """One batch of jobs that share a pass. Where that fails they go on one by one, and who fails alone ends."""
        try:
            return run_pass([job.run for job in jobs])
        except Exception as error:
            failed = as_ours(error)
        if len(jobs) == 1:
            self._rejoin(jobs[0].run.apart)
            return [(jobs[0].run, failed)]
        mark = object()
        for job in jobs:
            self._caller.say(job.setup.name, f"a pass shared with others failed ({failed}); it goes on by itself")
            job.run.restart(apart=mark)
        return []

    def _rejoin(self, mark: object | None) -> None:
        """It is known whose fault a failed pass was: the others of that pass share passes again."""
        for job in self._running:
            if job.run.apart is mark:
                job.run.apart = None

    def _go_on(self, job: _Running, loss: Tensor) -> MultituneError | None:
        """Let a job take what a pass gave it; returns what ends the job, if anything does."""
        try:
            job.run.took(loss)
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


# -------------------------------------------------------------------- checks


def _check_arguments(
    backbone: Backbone, jobs: Sequence[TrainJob], max_jobs: int, token_budget: int, alone: Alone
) -> None:
    for name, value in (("max_jobs", max_jobs), ("token_budget", token_budget)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} is not possible; give a whole number, at least 1")
    if alone not in get_args(Alone):
        raise ConfigError(f"alone={alone!r} is unknown; choose {' or '.join(map(repr, get_args(Alone)))}")
    if not isinstance(jobs, Sequence) or isinstance(jobs, str):
        few = "; put the one job into a list: [job]" if isinstance(jobs, TrainJob) else "; give list(jobs)"
        raise ConfigError(f"train_many takes a list of jobs, not a {type(jobs).__name__}{few}")
    if not jobs:
        raise ConfigError("train_many has no jobs; give a list with at least one TrainJob")
    if isinstance(jobs, TrainJob):
        raise ConfigError("train_many takes a list of jobs, not one; give [TrainJob(...)], or train(...) for one alone")
    for job in jobs:
        if not isinstance(job, TrainJob):
            raise ConfigError(f"train_many takes TrainJob(data=..., method=...), not a {type(job).__name__}")
        check_backbone_and_method(backbone, job.method)
    backbone.check_attached()
    backbone.refuse_decoder("adapters are not trained together", "train them one by one: train(...)")
    dropped = [name for name in _LAYER_DROPS if getattr(backbone.running.config, name, 0)]
    if dropped:
        raise ConfigError(
            f"backbone '{backbone.name}' leaves layers out at random while it trains ({dropped[0]} of its config), "
            f"which would be one draw for all jobs; set it to 0, or train each by itself: train(...)"
        )


def _names(jobs: Sequence[TrainJob]) -> list[str]:
    """A name for every job; those that were given are kept."""
    taken = {job.name for job in jobs if job.name is not None}
    given = [job.name for job in jobs if job.name is not None]
    twice = sorted(name for name, count in Counter(given).items() if count > 1)
    if twice:
        raise ConfigError(f"two jobs are called '{twice[0]}'; give each a name of its own")
    names: list[str] = []
    for job in jobs:
        if job.name is not None:
            names.append(job.name)
            continue
        task = job.data.task.name if isinstance(job.data, TaskData) else "job"
        base = f"{task}-{job.method if isinstance(job.method, str) else job.method.name}".replace("/", "-")
        number, name = 1, base
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name)
        names.append(name)
    return names


def _setup(
    backbone: Backbone,
    job: TrainJob,
    name: str,
    output_dir: str | Path | None,
    shared: TrainConfig,
    seen: set[tuple[Any, ...]],
) -> Setup:
    """The job's run, checked as far as that can be done before it begins.

    Args:
        seen: what tells rows apart that an earlier job has been checked with; added to.
    """
    folder = job.output_dir
    if folder is None and output_dir is not None:
        folder = Path(output_dir) / name
    try:
        refuse_hyper_parameters(job.method, job.settings)
        config = TrainConfig.from_dict({**shared.to_dict(), **job.settings})
        if isinstance(job.data, TaskData):
            refuse_idle(backbone, job.data.task, config, given=job.settings)
            config = without_idle(backbone, job.data.task, config)
        setup = Setup.check(
            backbone,
            job.data,
            job.method,
            folder,
            config=config,
            name=name,
            overwrite=job.overwrite,
            job=True,
        )
        assert setup.config.pooling is not None
        Head.for_task(job.data.task, pooling=setup.config.pooling).check(backbone)
        if not setup.method.changes_weights:
            backbone.shapes_of(setup.method)
        labelled = setup.config.distill_new_tokens is None  # else a teacher writes the answers
        for split, table in (("training", job.data.train), ("validation", job.data.validation)):
            key = (id(table), split, f"{job.data.task.to_dict()}", labelled)  # the jobs keep their tables
            if key not in seen and not job.data.task.examples(table, labelled=labelled):
                raise DataError(f"task '{job.data.task.name}' has no {split} rows; give a table with at least one")
            seen.add(key)
    except MultituneError as error:
        raise type(error)(f"job '{name}': {error}") from error
    return setup


def _check_together(backbone: Backbone, setups: Sequence[Setup], alone: Alone) -> None:
    for setup in setups:
        if setup.method.changes_weights and alone == "refuse":
            raise MixError(
                f"job '{setup.name}': {setup.method.title} changes the backbone's own weights, so that its rows cannot "
                f"share a pass with other jobs; give alone='queue' to train it by itself after the others, or train it "
                f"with train(...)"
            )
        if setup.config.cache_frozen is not None and not setup.method.changes_weights:
            raise ConfigError(
                f"job '{setup.name}': cache_frozen={setup.config.cache_frozen!r} runs the layers above alone, while "
                f"all jobs of a pass run through the same layers; leave it out, or train this one with train(...)"
            )
    _check_folders(setups)


def _check_folders(setups: Sequence[Setup]) -> None:
    """Raise `ConfigError` for two jobs of one folder, however it is spelled, or one in the other's."""
    folders: dict[Path, str] = {}
    above: dict[Path, str] = {}
    for setup in setups:
        if setup.output is None:
            continue
        place = setup.output.resolve()
        file = next((parent for parent in place.parents if parent.is_file()), None)
        if file is not None:
            raise ConfigError(
                f"job '{setup.name}': {file} is a file, and no folder for {place.name}; give another folder"
            )
        if place in folders:
            raise ConfigError(f"jobs '{folders[place]}' and '{setup.name}' both write to {place}; give each a folder")
        around = next((folders[parent] for parent in place.parents if parent in folders), None)
        inside = above.get(place)
        if around is not None or inside is not None:
            outer, inner = (around, setup.name) if around is not None else (setup.name, inside)
            raise ConfigError(
                f"job '{inner}' writes to a folder in that of job '{outer}', which holds that adapter alone, so that "
                f"neither could go on after a kill; give them folders beside each other"
            )
        folders[place] = setup.name
        above |= dict.fromkeys(place.parents, setup.name)


def _train_alone(setup: Setup, caller: _Caller) -> TrainResult | FailedJob:
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
