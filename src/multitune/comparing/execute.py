"""Run trials in this process, and make an outcome of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multitune.adapter import Adapter
from multitune.backbone import Backbone
from multitune.bank import Bank
from multitune.comparing import memory
from multitune.comparing.environment import environment
from multitune.comparing.records import PERCENT, Outcome
from multitune.comparing.trials import Job
from multitune.errors import DataWarning, MultituneError
from multitune.methods import make_method
from multitune.tasks import Task, TaskData, higher_is_better
from multitune.tasks.metrics import judge_of_training
from multitune.training import FailedJob, TrainConfig, TrainJob, TrainResult, train, train_many
from multitune.training.config import LATER
from multitune.training.failures import as_ours
from multitune.training.judging import predict_rows

Done = Callable[[Job, Outcome], None]
Say = Callable[[str], None]
_Scores = tuple[dict[str, float], tuple[float, ...] | None]

#: What is the fault of one trial, and no reason to give up the others: too little memory is a RuntimeError of torch.
OF_A_TRIAL = (RuntimeError, MemoryError)
_ROW_KINDS = ("classification", "multiple_choice", "multilabel", "regression", "tagging")


@dataclass(frozen=True)
class Sharing:
    """How trials share passes."""

    max_jobs: int = 1
    """1 trains one after the other, each bit-equal to `train`; more share passes, equal up to rounding."""
    token_budget: int = 512
    """Most tokens of a pass, as `train_many` counts them."""
    passes: int | None = None
    """How many passes run at a time, as `train_many` has it."""


def run_jobs(backbone: Backbone, jobs: Sequence[Job], *, sharing: Sharing, done: Done, say: Say) -> None:
    """Train every job; `done` gets each outcome as soon as there is one.

    Args:
        say: gets lines about what is going on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the plan has warned of the rows, once
        _run(backbone, jobs, sharing, done, say)


def _run(backbone: Backbone, jobs: Sequence[Job], sharing: Sharing, done: Done, say: Say) -> None:
    facts = environment(backbone)
    left = {job.trial.key: job for job in jobs}

    def ended(job: Job, outcome: Outcome) -> None:
        del left[job.trial.key]
        done(job, outcome)

    together = [] if sharing.max_jobs == 1 else [job for job in jobs if _shares(backbone, job)]
    if together:
        _together(backbone, together, sharing, facts, ended, say)
    for job in list(left.values()):
        _alone(backbone, job, facts, ended, say)


def _shares(backbone: Backbone, job: Job) -> bool:
    """Whether a trial can share passes."""
    trial = job.trial
    return (
        not backbone.decodes
        and not make_method(trial.method, trial.settings).changes_weights
        and trial.training["cache_frozen"] is None
    )


def _together(
    backbone: Backbone,
    jobs: Sequence[Job],
    sharing: Sharing,
    facts: Mapping[str, Any],
    done: Done,
    say: Say,
) -> None:
    """Train these in shared passes; those that fail of what may be the company's fault, such as memory, are left."""
    by_key = {job.trial.key: job for job in jobs}
    company = min(sharing.max_jobs, len(jobs))

    def ended(key: str, result: TrainResult | FailedJob) -> None:
        if isinstance(result, FailedJob) and type(result.error) is MultituneError:  # another library's error
            say(f"{key} failed in the company of others ({result.error}); it runs again by itself")
            return
        done(by_key[key], outcome_of(backbone, by_key[key], result, together=company, facts=facts))

    train_many(
        backbone,
        [_train_job(job) for job in jobs],
        config=TrainConfig(progress=False),
        max_jobs=sharing.max_jobs,
        token_budget=sharing.token_budget,
        passes=sharing.passes,
        report=say,
        ended=ended,
    )
    tidy(backbone)


def _alone(backbone: Backbone, job: Job, facts: Mapping[str, Any], done: Done, say: Say) -> None:
    measured = memory.reset_peak(backbone.device)
    start, processor = time.perf_counter(), time.process_time()
    result = _trained(backbone, job, say)
    own = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}
    found = memory.peak(backbone.device) if measured else None
    done(job, outcome_of(backbone, job, result, together=1, facts=facts, **own, peak_memory=found))


def _trained(backbone: Backbone, job: Job, say: Say) -> TrainResult | FailedJob:
    """What `train` gives: unlike `train_many` it takes every backbone and every setting."""
    own, name = _train_job(job), job.trial.key
    try:
        return train(
            backbone,
            own.data,
            own.method,
            report=lambda line: say(f"{name}: {line}"),
            progress=False,
            **own.settings,
        )
    except (MultituneError, *OF_A_TRIAL) as error:
        failed = FailedJob(name=name, error=as_ours(error), step=0, history=[])
    tidy(backbone)
    return failed


def tidy(backbone: Backbone) -> None:
    """Leave nothing of a trial that failed to the next one; when its error is gone, whose frames hold its tensors."""
    backbone.model.eval()
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()


def _train_job(job: Job) -> TrainJob:
    trial = job.trial
    method = make_method(trial.method, trial.settings)
    return TrainJob(data=job.data, method=method, settings={**LATER, **trial.training}, name=trial.key)


def outcome_of(
    backbone: Backbone,
    job: Job,
    result: TrainResult | FailedJob,
    *,
    together: int,
    facts: Mapping[str, Any],
    seconds: float | None = None,
    processor_seconds: float | None = None,
    peak_memory: int | None = None,
) -> Outcome:
    """What a store keeps of a run; of one that could not be judged, why."""
    metric = job.data.task.metric
    shared: dict[str, Any] = {
        "metric": metric,
        "processor_seconds": processor_seconds,
        "together": together,
        "history": tuple(result.history),
        "environment": facts,
    }
    if isinstance(result, FailedJob):
        error = str(result.error).removeprefix(f"job '{result.name}': ")
        return Outcome(status="failed", error=error, seconds=seconds, **shared)
    seconds = result.seconds if seconds is None else seconds
    judged = _judged(backbone, result.adapter, job)
    if isinstance(judged, str):
        return Outcome(status="failed", error=judged, seconds=seconds, **shared)
    scores, rows = judged
    return Outcome(
        status="finished",
        score=_upwards(metric, scores[metric]),
        scores=scores,
        parameters=_num_parameters(result),
        head_parameters=result.num_head_parameters,
        file_bytes=sum(t.numel() * t.element_size() for t in result.adapter.params.values()),
        seconds=seconds,
        peak_memory=peak_memory,
        row_scores=rows,
        **shared,
    )


def _num_parameters(result: TrainResult) -> int:
    """As budgets count: what is saved, and so without a network that only training has (prefix-tuning, P-tuning)."""
    adapter = result.adapter
    # of the backbone's own weights those are saved that changed, and all are trained
    return result.num_method_parameters if adapter.method.changes_weights else adapter.num_method_parameters


def _upwards(metric: str, value: float) -> float:
    """A score of which more is better; errors count negative."""
    value = value / 100 if metric in PERCENT else value
    return value if higher_is_better(metric) else -value


def _judged(backbone: Backbone, adapter: Adapter, job: Job) -> _Scores | str:
    """What `_scores` gives, or why it could not."""
    try:
        return _scores(backbone, adapter, job)
    except (MultituneError, *OF_A_TRIAL) as error:
        said = f"judging failed: {as_ours(error)}"
    tidy(backbone)
    return said


def _scores(backbone: Backbone, adapter: Adapter, job: Job) -> _Scores:
    """All scores of the best tensors on the validation rows, and those of each row."""
    scores = {name: float(value) for name, value in adapter.metrics.items()}
    task, rows, batch_size = adapter.task, job.data.validation, job.trial.training["eval_batch_size"]
    if task.kind == "generation" and judge_of_training(task.metric) != task.metric:
        from multitune.generation.evaluation import evaluate_texts

        bank = Bank(backbone)
        bank.add("trial", adapter)
        return scores | evaluate_texts(bank, "trial", rows, _writing(job), batch_size=batch_size).scores, None
    if task.kind not in _ROW_KINDS:
        return scores, None
    bf16 = job.trial.training["precision"] == "bf16"  # as the scores were taken, or their mean would be another
    with torch.autocast(backbone.device.type, dtype=torch.bfloat16, enabled=bf16):
        predictions, examples = predict_rows(backbone, adapter, rows, batch_size=batch_size)
    return scores, tuple(row_score(task, p, e.target) for p, e in zip(predictions, examples, strict=True))


def _writing(job: Job) -> dict[str, Any] | None:
    """How the judged texts are written: as long as the task says, else as those that training was judged by."""
    training = job.trial.training
    most = job.trial.data.get("max_new_tokens") or (training["eval_new_tokens"] if training["eval_texts"] else None)
    return None if most is None else {"max_new_tokens": most}


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
        beside = folder is not None and (Path(folder) / path_in(backbone)).exists()
        self._backbone = load_quietly(f"{folder}/{backbone}" if beside else backbone, device)
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
            sharing=Sharing(),
            done=lambda _, outcome: found.append(outcome),
            say=lambda _: None,
        )
        return found[0]


def path_in(backbone: str) -> str:
    """A backbone's name without what stands behind it, such as +decoder: what may be a path."""
    return backbone.partition("+")[0]


def load_quietly(name: str, device: str) -> Backbone:
    """`Backbone.load`, without transformers' progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Backbone.load(name, device=device)
