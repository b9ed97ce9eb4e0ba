"""Train many adapters together on one backbone: tasks, or settings of one task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PretrainedConfig

from multitune.backbone import Backbone
from multitune.errors import ConfigError, DataError, MixError, MultituneError
from multitune.heads import Head
from multitune.tasks import TaskData
from multitune.training.config import TrainConfig
from multitune.training.crew import Caller, Crew, train_alone
from multitune.training.idle import refuse_idle, without_idle
from multitune.training.jobs import FailedJob, TrainingInterrupted, TrainJob
from multitune.training.progress import Progress
from multitune.training.results import TrainResult
from multitune.training.setup import Setup, check_backbone_and_method, refuse_hyper_parameters

Alone = Literal["refuse", "queue"]

#: Kinds of rotary positions whose frequencies the model writes anew in a pass, where another would read them.
_ROPE_OF_LENGTH = {"dynamic", "longrope"}

#: Settings by which a model leaves whole layers out at random, which would be one draw for all jobs.
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop")


def train_many(
    backbone: Backbone,
    jobs: Sequence[TrainJob],
    output_dir: str | Path | None = None,
    *,
    config: TrainConfig | None = None,
    max_jobs: int = 16,
    token_budget: int = 512,
    passes: int | None = None,
    alone: Alone = "refuse",
    report: Callable[[str], None] | None = None,
    ended: Callable[[str, TrainResult | FailedJob], None] | None = None,
    **overrides: Any,
) -> list[TrainResult | FailedJob]:
    """Train many adapters together. Each result is that of `train` with the same settings.

    The rows of all running jobs go through the frozen backbone in shared forward and backward passes. Everything else
    is a job's own: rows and their order, random numbers, loss, optimizer, schedule, clipping, evaluation, early
    stopping and checkpoints. When a job ends, the next of the queue enters.

    One call at a time in a process: it sets the random numbers of all threads, and puts them back at its end.

    Args:
        output_dir: each job's folder is its name in here; `None` saves nothing but where a job has a folder of its own.
            The same call after a kill goes on: finished jobs are read, others resume from their last evaluation.
        config: training settings of all jobs; `overrides` are fields of it, and a job's `settings` come last.
        max_jobs: most jobs that run at a time; the others wait in the order given.
        token_budget: most tokens in one pass, padding and the vectors of prompts included: bounds the memory; much
            larger passes are slower, as they leave the processor's cache. A job whose batch exceeds it runs by itself.
        passes: how many passes run at a time, each on its share of torch's threads: more are faster, and each takes its
            memory. By default two on a CPU with more than one thread, else one, the only number on a GPU and for
            rotary positions that change with the length of the rows. Results do not depend on it beyond the rounding
            of a matrix product. A thread of yours that first uses torch meanwhile may keep such a share.
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
    lanes = _lanes(backbone, passes)
    names = _names(jobs)
    seen: set[tuple[Any, ...]] = set()
    setups = [_setup(backbone, job, name, output_dir, shared, seen) for job, name in zip(jobs, names, strict=True)]
    _check_together(backbone, setups, alone)
    found: dict[str, TrainResult | FailedJob] = {}
    caller = Caller(report, ended)
    together = [s for s in setups if not s.method.changes_weights]
    try:
        with Progress(shared.progress) as progress:
            Crew(backbone, together, max_jobs, token_budget, lanes, found, progress, caller).work()
        for setup in setups:  # outside, because each shows a bar of its own
            if setup.method.changes_weights:
                found[setup.name] = train_alone(setup, caller)
                caller.ended(setup.name, found[setup.name])
    except KeyboardInterrupt:
        raise TrainingInterrupted(found) from None
    return [found[name] for name in names]


# -------------------------------------------------------------------- checks


def _check_arguments(
    backbone: Backbone, jobs: Sequence[TrainJob], max_jobs: int, token_budget: int, alone: Alone
) -> None:
    _check_count("max_jobs", max_jobs)
    _check_count("token_budget", token_budget)
    if alone not in get_args(Alone):
        raise ConfigError(f"alone={alone!r} is unknown; choose {' or '.join(map(repr, get_args(Alone)))}")
    if not isinstance(jobs, Sequence) or isinstance(jobs, str):
        few = "; put the one job into a list: [job]" if isinstance(jobs, TrainJob) else "; give list(jobs)"
        raise ConfigError(f"train_many takes a list of jobs, not a {type(jobs).__name__}{few}")
    if not jobs:
        raise ConfigError("train_many has no jobs; give a list with at least one TrainJob")
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


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} is not possible; give a whole number, at least 1")


def _lanes(backbone: Backbone, passes: int | None) -> int:
    """How many passes run at a time."""
    why = None
    if backbone.device.type != "cpu":
        why = f"on {backbone.device} one pass runs at a time; leave it out, or load the backbone on device='cpu'"
    elif _ROPE_OF_LENGTH & set(_rope_types(backbone.model.config)):
        why = f"the rotary positions of backbone '{backbone.name}' change with the length of the rows; leave it out"
    if passes is None:
        return 2 if why is None and torch.get_num_threads() > 1 else 1
    _check_count("passes", passes)
    if passes > 1 and why is not None:
        raise ConfigError(f"passes={passes}: {why}")
    return passes


def _rope_types(config: PretrainedConfig) -> list[str]:
    """The kinds of rotary positions that a model has; of some one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)]


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
