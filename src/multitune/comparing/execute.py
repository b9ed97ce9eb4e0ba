"""Run trials in this process, and make an outcome of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from multitune.adapter import Adapter
from multitune.backbone import Backbone
from multitune.bank import Bank
from multitune.comparing import memory
from multitune.comparing.environment import environment
from multitune.comparing.records import Outcome
from multitune.comparing.trials import Job
from multitune.errors import DataWarning, MultituneError
from multitune.methods import make_method
from multitune.tasks import Task, TaskData, higher_is_better
from multitune.tasks.metrics import judge_of_training
from multitune.training import FailedJob, TrainConfig, TrainJob, TrainResult, train, train_many
from multitune.training.judging import predict_rows

Done = Callable[[Job, Outcome], None]
Say = Callable[[str], None]

#: Metrics of sacreBLEU, which run to 100, and NIST, whose 8 is shown as 8; scores run to 1 and are shown in percent.
_PERCENT = ("bleu", "chrf", "nist")
_ROW_KINDS = ("classification", "multiple_choice", "multilabel", "regression", "tagging")


def run_jobs(
    backbone: Backbone, jobs: Sequence[Job], *, max_jobs: int, token_budget: int, done: Done, say: Say
) -> None:
    """Train every job; `done` gets each outcome as soon as there is one.

    Args:
        max_jobs: 1 trains one after the other, each bit-equal to `train`; more share passes, equal up to rounding.
        token_budget: see `train_many`.
        say: gets lines about what is going on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the plan has warned of the rows, once
        _run(backbone, jobs, max_jobs, token_budget, done, say)


def _run(backbone: Backbone, jobs: Sequence[Job], max_jobs: int, token_budget: int, done: Done, say: Say) -> None:
    facts = environment(backbone)
    together = [] if max_jobs == 1 else [job for job in jobs if _shares(job)]
    if together:
        _together(backbone, together, max_jobs, token_budget, facts, done, say)
    for job in jobs:
        if job not in together:
            _alone(backbone, job, facts, done, say)


def _shares(job: Job) -> bool:
    """Whether a trial can share passes."""
    trial = job.trial
    return not make_method(trial.method, trial.settings).changes_weights and trial.training["cache_frozen"] is None


def _together(
    backbone: Backbone,
    jobs: Sequence[Job],
    max_jobs: int,
    token_budget: int,
    facts: Mapping[str, Any],
    done: Done,
    say: Say,
) -> None:
    by_key = {job.trial.key: job for job in jobs}
    company = min(max_jobs, len(jobs))

    def ended(key: str, result: TrainResult | FailedJob) -> None:
        job = by_key[key]
        backbone.model.eval()  # the next pass of the others switches it back
        done(job, outcome_of(backbone, job.data, result, together=company, facts=facts))

    train_many(
        backbone,
        [_train_job(job) for job in jobs],
        config=TrainConfig(progress=False),
        max_jobs=max_jobs,
        token_budget=token_budget,
        report=say,
        ended=ended,
    )


def _alone(backbone: Backbone, job: Job, facts: Mapping[str, Any], done: Done, say: Say) -> None:
    measured = memory.reset_peak(backbone.device)
    start, processor = time.perf_counter(), time.process_time()
    result = _cached(backbone, job, say) if job.trial.training["cache_frozen"] is not None else None
    if result is None:
        (result,) = train_many(
            backbone, [_train_job(job)], config=TrainConfig(progress=False), max_jobs=1, alone="queue", report=say
        )
    own = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}
    found = memory.peak(backbone.device) if measured else None
    done(job, outcome_of(backbone, job.data, result, together=1, facts=facts, **own, peak_memory=found))


def _cached(backbone: Backbone, job: Job, say: Say) -> TrainResult | FailedJob:
    """A trial that keeps what frozen layers give, which `train_many` does not."""
    own = _train_job(job)
    try:
        return train(backbone, own.data, own.method, report=say, progress=False, **own.settings)
    except MultituneError as error:
        return FailedJob(name=job.trial.key, error=error, step=0, history=[])


def _train_job(job: Job) -> TrainJob:
    trial = job.trial
    method = make_method(trial.method, trial.settings)
    return TrainJob(data=job.data, method=method, settings=trial.training, name=trial.key)


def outcome_of(
    backbone: Backbone,
    data: TaskData,
    result: TrainResult | FailedJob,
    *,
    together: int,
    facts: Mapping[str, Any],
    seconds: float | None = None,
    processor_seconds: float | None = None,
    peak_memory: int | None = None,
) -> Outcome:
    """What a store keeps of a run."""
    if isinstance(result, FailedJob):
        return Outcome(
            status="failed",
            error=str(result.error).removeprefix(f"job '{result.name}': "),
            metric=data.task.metric,
            seconds=seconds,
            processor_seconds=processor_seconds,
            together=together,
            history=tuple(result.history),
            environment=facts,
        )
    adapter = result.adapter
    scores, rows = _scores(backbone, adapter, data)
    metric = data.task.metric
    return Outcome(
        status="finished",
        metric=metric,
        score=_upwards(metric, scores[metric]),
        scores=scores,
        parameters=result.num_method_parameters,
        head_parameters=result.num_head_parameters,
        file_bytes=sum(t.numel() * t.element_size() for t in adapter.params.values()),
        seconds=result.seconds if seconds is None else seconds,
        processor_seconds=processor_seconds,
        peak_memory=peak_memory,
        together=together,
        history=tuple(result.history),
        row_scores=rows,
        environment=facts,
    )


def _upwards(metric: str, value: float) -> float:
    """A score of which more is better; errors count negative."""
    value = value / 100 if metric in _PERCENT else value
    return value if higher_is_better(metric) else -value


def _scores(backbone: Backbone, adapter: Adapter, data: TaskData) -> tuple[dict[str, float], tuple[float, ...] | None]:
    """All scores of the best tensors on the validation rows, and those of each row."""
    scores = {name: float(value) for name, value in adapter.metrics.items()}
    task = adapter.task
    if task.kind == "generation" and judge_of_training(task.metric) != task.metric:
        from multitune.generation.evaluation import evaluate_texts

        bank = Bank(backbone)
        bank.add("trial", adapter)
        return scores | evaluate_texts(bank, "trial", data.validation).scores, None
    if task.kind not in _ROW_KINDS:
        return scores, None
    predictions, examples = predict_rows(backbone, adapter, data.validation)
    return scores, tuple(row_score(task, p, e.target) for p, e in zip(predictions, examples, strict=True))


def row_score(task: Task, prediction: Any, target: Any) -> float:
    """One row: 1 for right, 0 for wrong; of words the share that is right; a squared error taken negative."""
    if task.kind == "regression":
        return -((float(prediction) - float(target)) ** 2)
    if task.kind == "tagging":
        hits = [int(a == b) for a, b in zip(prediction, target, strict=False)]  # words cut off are not judged
        return sum(hits) / len(hits) if hits else 0.0
    if task.kind == "multiple_choice" and isinstance(target, tuple):  # several choices are right
        return float(prediction in target)
    return float(prediction == target)


class Place:
    """A process of its own that runs trials: loads the backbone once, and keeps the rows it was given."""

    def __init__(self, backbone: str, device: str, threads: int | None, folder: str | None = None) -> None:
        """
        Args:
            threads: of torch; none leaves them as they are.
            folder: to look for relative paths in, such as the backbone's.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        name = backbone if folder is None or not (Path(folder) / backbone).exists() else str(Path(folder) / backbone)
        self._backbone = load_quietly(name, device)
        self._data: dict[str, TaskData] = {}

    def keep(self, key: str, data: TaskData) -> None:
        """Rows that trials will ask for."""
        self._data[key] = data

    def run(self, job: Job, data_key: str) -> Outcome:
        """Train one trial; its rows were given to `keep`."""
        found: list[Outcome] = []
        whole = Job(trial=job.trial, data=self._data[data_key], purpose=job.purpose, budget=job.budget)
        run_jobs(
            self._backbone,
            [whole],
            max_jobs=1,
            token_budget=1,
            done=lambda _, outcome: found.append(outcome),
            say=lambda _: None,
        )
        return found[0]


def load_quietly(name: str, device: str) -> Backbone:
    """`Backbone.load`, without transformers' progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Backbone.load(name, device=device)
