"""Where trials run: packed in this process, in several processes, or on a Ray cluster. The scores are the same."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from multitune.backbone import Backbone
from multitune.comparing.execute import Done, Place, Say, Sharing, path_in, run_jobs
from multitune.comparing.extras import require
from multitune.comparing.records import Outcome
from multitune.comparing.trials import Job
from multitune.errors import ConfigError, MultituneError, suggest

Name = Literal["packed", "processes", "ray"]


class Runner(Protocol):
    """Runs trials."""

    def run(self, jobs: Sequence[Job], done: Done, say: Say) -> None:
        """Run all; `done` is called in this process with each outcome as it comes."""

    def close(self) -> None:
        """Let go of processes."""


def make_runner(
    name: str,
    backbone: Backbone,
    load_as: str,
    *,
    workers: int | None,
    max_jobs: int | None,
    token_budget: int | None,
    passes: int | None,
) -> Runner:
    """The runner of this name.

    Args:
        load_as: the backbone's name, for processes that load it themselves.
        workers: processes; by default one for each core or CPU of the cluster, and on a GPU one for each of the
            cluster's, or one in all, since each takes its share of the memory. Packed runs in one.
        max_jobs: packed: how many trials share passes; by default 1, for only then times and memory are a trial's own.
        token_budget: packed, several at a time: most tokens of a pass, 512 by default.
        passes: packed, several at a time: how many passes run at a time, by default as many as `train_many` runs.

    Raises:
        ConfigError: no such runner, or a number that it cannot honour.
    """
    if name not in get_args(Name):
        known = get_args(Name)
        raise ConfigError(f"no runner is called '{name}'.{suggest(name, known)} Runners: {', '.join(known)}")
    of_passes = {"token_budget": token_budget, "passes": passes}
    for what, value in {"workers": workers, "max_jobs": max_jobs, **of_passes}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{what}={value} is not possible; give at least 1")
    given = [f"{what}={value}" for what, value in of_passes.items() if value is not None]
    if name == "packed":
        if workers is not None and workers > 1:
            raise ConfigError(f"workers={workers}: packed runs in one process; give runner 'processes' for several")
        if given and (max_jobs or 1) == 1:
            raise ConfigError(f"{given[0]} is for trials that share passes; give max_jobs above 1 too")
        usual = Sharing()
        sharing = Sharing(max_jobs or usual.max_jobs, token_budget or usual.token_budget, passes)
        return Packed(backbone, sharing)
    if max_jobs is not None and max_jobs > 1:
        given.append(f"max_jobs={max_jobs}")
    if given:
        raise ConfigError(f"{given[0]}: only the runner 'packed' lets trials share passes; leave it out")
    if name == "processes":
        default = os.cpu_count() or 1 if backbone.device.type == "cpu" else 1
        return Processes(load_as, str(backbone.device), workers or default)
    return OnRay(load_as, str(backbone.device), workers)


class Packed:
    """All in this process."""

    def __init__(self, backbone: Backbone, sharing: Sharing) -> None:
        self._backbone, self._sharing = backbone, sharing

    def run(self, jobs: Sequence[Job], done: Done, say: Say) -> None:
        run_jobs(self._backbone, jobs, sharing=self._sharing, done=done, say=say)

    def close(self) -> None:
        """Nothing was taken."""


def _key(job: Job) -> str:
    return f"{job.trial.task} {job.trial.data['fingerprint']}"


def _light(job: Job) -> Job:
    """The job without its rows, which a place has."""
    return dataclasses.replace(job, data=None)  # type: ignore[arg-type]


# ------------------------------------------------------------------- processes


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    keeps: set[str]
    job: Job | None = None


class Processes:
    """Several processes on this machine, each with the backbone in it."""

    def __init__(self, backbone: str, device: str, workers: int) -> None:
        self._place = (backbone, device, max(1, torch.get_num_threads() // workers))
        self._count = workers
        self._workers: list[_Worker] = []

    def run(self, jobs: Sequence[Job], done: Done, say: Say) -> None:
        waiting = deque(jobs)
        while len(self._workers) < min(self._count, len(jobs)):
            self._workers.append(self._start())
        while waiting or any(w.job is not None for w in self._workers):
            for worker in self._workers:
                if worker.job is None and waiting:
                    self._send(worker, waiting.popleft())
                    say(f"{len(waiting)} trials wait")
            busy = {w.connection: w for w in self._workers if w.job is not None}
            for connection in wait(list(busy)):
                self._take(busy[connection], done)  # type: ignore[index]

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def _start(self) -> _Worker:
        # a forked process would share torch's threads and locks with this one
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._place), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, mine, set())

    def _send(self, worker: _Worker, job: Job) -> None:
        worker.job = job
        key = _key(job)
        try:
            worker.connection.send((_light(job), key, None if key in worker.keeps else job.data))
        except (BrokenPipeError, ConnectionResetError):
            raise _gone(worker, job) from None
        worker.keeps.add(key)

    def _take(self, worker: _Worker, done: Done) -> None:
        job = worker.job
        assert job is not None
        try:
            answer = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            raise _gone(worker, job) from None
        if isinstance(answer, BaseException):
            raise answer
        worker.job = None
        done(job, answer)


def _gone(worker: _Worker, job: Job) -> ConfigError:
    """What is said of a process that ended before its trial did."""
    worker.process.join()
    return ConfigError(
        f"a process ended with code {worker.process.exitcode} in the trial of {job.trial.method} on "
        f"{job.trial.task} (a code of -9 is most often too little memory: give fewer workers); what was "
        f"finished is kept, and the same call goes on"
    )


def _serve(connection: Connection, place: tuple[str, str, int]) -> None:
    """The life of a process: trials in, outcomes out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        here: Place | None = None
        while True:
            job, key, data = connection.recv()
            answer: Outcome | MultituneError
            try:
                here = here or Place(*place)
                if data is not None:
                    here.keep(key, data)
                answer = here.run(job, key)
            except MultituneError as error:
                answer = error
            except (RuntimeError, MemoryError) as error:  # those of a trial are outcomes: this is the backbone
                answer = ConfigError(
                    f"backbone '{place[0]}' could not be loaded in a process of its own ({type(error).__name__}: "
                    f"{error}); give fewer workers (--workers)"
                )
            connection.send(answer)
    except (EOFError, BrokenPipeError):
        return


def _die_with_parent() -> None:
    """A comparison that was killed leaves nobody behind who trains for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ------------------------------------------------------------------- Ray


class OnRay:
    """A Ray cluster: the one that RAY_ADDRESS or an earlier `ray.init` names, else one on this machine."""

    def __init__(self, backbone: str, device: str, workers: int | None) -> None:
        """
        Raises:
            ConfigError: Ray is not installed.
        """
        self._ray = require("ray", "ray", "the runner 'ray'")
        self._own = not self._ray.is_initialized()
        if self._own:
            self._ray.init(log_to_driver=False, configure_logging=False)
        resources = self._ray.cluster_resources()
        gpu = device.startswith("cuda")
        self._count = workers or max(1, int(resources.get("GPU" if gpu else "CPU", 1)))
        self._options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if gpu else 0, "scheduling_strategy": "SPREAD"}
        folder = str(Path.cwd()) if Path(path_in(backbone)).exists() else None
        self._place = (backbone, "cuda" if gpu else device, 1, folder)
        self._actors: list[Any] = []
        self._data: dict[str, Any] = {}
        self._keeps: dict[Any, set[str]] = {}

    def run(self, jobs: Sequence[Job], done: Done, say: Say) -> None:
        ray = self._ray
        remote: Callable[..., Any] = ray.remote(Place).options(**self._options).remote
        while len(self._actors) < min(self._count, len(jobs)):
            self._actors.append(remote(*self._place))
            self._keeps[self._actors[-1]] = set()
        waiting, idle = deque(jobs), list(self._actors)
        running: dict[Any, tuple[Any, Job]] = {}
        while waiting or running:
            while waiting and idle:
                actor, job = idle.pop(0), waiting.popleft()
                running[self._send(actor, job)] = actor, job
                say(f"{len(waiting)} trials wait")
            for reference in ray.wait(list(running), num_returns=1)[0]:
                actor, job = running.pop(reference)
                done(job, self._outcome(reference, job))
                idle.append(actor)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._own:
            self._ray.shutdown()

    def _send(self, actor: Any, job: Job) -> Any:
        key = _key(job)
        if key not in self._data:
            self._data[key] = self._ray.put(job.data)  # once for the cluster
        if key not in self._keeps[actor]:
            actor.keep.remote(key, self._data[key])
            self._keeps[actor].add(key)
        return actor.run.remote(_light(job), key)

    def _outcome(self, reference: Any, job: Job) -> Outcome:
        try:
            found: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, MultituneError) else error from None
        except self._ray.exceptions.RayActorError as error:
            raise ConfigError(
                f"a process of the cluster ended in the trial of {job.trial.method} on {job.trial.task} "
                f"({str(error).splitlines()[0]}); what was finished is kept, and the same call goes on"
            ) from error
        return found
