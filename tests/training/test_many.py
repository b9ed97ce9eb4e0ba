"""Many jobs in one pass: each ends as if it had trained alone, whatever becomes of the others."""

import gc
import io
import json
import math
import random
import threading
import time
import weakref
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig

from multitune import (
    Adapter,
    AdapterError,
    ConfigError,
    DataError,
    FailedJob,
    LoRA,
    MixError,
    MultituneError,
    PlanError,
    PrefixTuning,
    Task,
    TaskData,
    TrainConfig,
    TrainingInterrupted,
    TrainJob,
    TrainResult,
    get_method,
    train,
    train_many,
)
from multitune.training import crew, many, together
from multitune.training.progress import Progress
from multitune.training.together import MOST_PADDING, needs_process, pack

SHARED = dict(progress=False, batch_size=8, epochs=2, evaluations_per_epoch=2)  # 19 rows: 3 steps an epoch
METHODS = (
    "lora", "bitfit", "prompt", "ptuning_v2", "aot_fc", "houlsby", "ia3", "adalora", "head", "sift", "mam", "dora",
)  # fmt: skip
KINDS = ("classification", "regression", "multilabel", "multiple_choice", "tagging")


@pytest.fixture(name="train_many", params=[1, 3], ids=["one pass at a time", "three passes at a time"])
def _train_many(request):
    """`train_many` with passes one after the other, or side by side, each on one thread."""
    return partial(train_many, passes=request.param)


@pytest.fixture
def same_run():
    """Assert that two results are of the same run, within the rounding of a float."""

    def check(mine: TrainResult, alone: TrainResult) -> None:
        assert isinstance(mine, TrainResult), mine
        assert [e["step"] for e in mine.history] == [e["step"] for e in alone.history]
        for a, b in zip(mine.history, alone.history, strict=True):
            assert list(a) == list(b)
            for key, value in b.items():
                assert math.isclose(a[key], value, rel_tol=1e-3, abs_tol=1e-4), (key, a, b)
        assert (mine.best_step, mine.num_steps) == (alone.best_step, alone.num_steps)
        assert (mine.num_method_parameters, mine.num_head_parameters) == (
            alone.num_method_parameters,
            alone.num_head_parameters,
        )
        one, two = mine.adapter, alone.adapter
        assert (one.method, one.recipe, one.seed, one.task) == (two.method, two.recipe, two.seed, two.task)
        for a, b in ((one.params, two.params), (one.head_params, two.head_params)):
            assert list(a) == list(b)
            for name, t in b.items():
                # A key's bias shifts all scores of a query alike: its gradient is rounding alone, which AdamW blows up.
                if not name.endswith(".key.b"):
                    torch.testing.assert_close(a[name], t, rtol=1e-3, atol=1e-4, msg=name)

    return check


def _alone(backbone, job: TrainJob, **shared) -> TrainResult:
    return train(backbone, job.data, job.method, **(SHARED | shared | dict(job.settings)))


class Halt(KeyboardInterrupt):
    """Raised in the middle of a run."""


def _stopping(after, error=Halt):
    """LoRA, registered name and all, that fails after some calls."""
    calls = 0

    @dataclass(frozen=True, kw_only=True)
    class Stopping(LoRA):
        def deltas(self, params, backbone):
            nonlocal calls
            calls += 1
            if calls > after:
                raise error
            return super().deltas(params, backbone)

    return Stopping()


def _blowing_up(step, where):
    """LoRA whose loss, or whose gradient alone, is no number from one of its steps on."""
    steps = 0

    @dataclass(frozen=True, kw_only=True)
    class BlowingUp(LoRA):
        def deltas(self, params, backbone):
            nonlocal steps
            training = torch.is_grad_enabled() and any(t.requires_grad for t in params.values())
            steps += training
            if training and steps >= step and where == "loss":
                params = {k: t * math.nan for k, t in params.items()}
            return super().deltas(params, backbone)

        def penalty(self, params):
            if steps >= step and where == "gradient":
                return torch.stack([(t * 0).sqrt().sum() for t in params.values()]).sum()
            return None

    return BlowingUp()


def _raising(step, where):
    """LoRA of which one hook raises an error of another library in one of its steps."""
    steps = 0

    @dataclass(frozen=True, kw_only=True)
    class Raising(LoRA):
        def deltas(self, params, backbone):
            nonlocal steps
            steps += torch.is_grad_enabled() and any(t.requires_grad for t in params.values())
            self._raise("deltas")
            return super().deltas(params, backbone)

        def penalty(self, params):
            self._raise("penalty")

        def after_step(self, params, step, num_steps):
            self._raise("after_step")

        def _raise(self, here):
            if steps == step and where == here:
                raise KeyError(f"nothing in {where}")

    return Raising()


# -------------------------------------------------------------------- as if alone


def test_every_job_ends_as_if_it_had_trained_alone(train_many, tiny, make_data, same_run):
    data = {kind: make_data(kind, train=19) for kind in KINDS}
    jobs = [
        TrainJob(
            data=data[KINDS[i % 5]],
            method=method,
            settings={
                "seed": i,
                "gradient_accumulation": 1 + i % 2,
                "scheduler": ("linear", "cosine", "constant")[i % 3],
                "pooling": "mean" if i % 2 and KINDS[i % 5] != "tagging" else "cls",  # tagging pools nothing
            },
        )
        for i, method in enumerate(METHODS)
    ]
    found = train_many(tiny, jobs, max_jobs=7, token_budget=600, **SHARED)  # some enter when others have left
    for job, mine in zip(jobs, found, strict=True):
        same_run(mine, _alone(tiny, job))
    assert not tiny.model.training and not any(p.requires_grad for p in tiny.model.parameters())


def test_settings_of_one_task_share_its_rows(tiny, make_data, same_run):
    data = make_data(train=19)
    jobs = [
        TrainJob(data=data, method=LoRA(r=2, dropout=0.3), settings={"learning_rate": 1e-2}),
        TrainJob(data=data, method=LoRA(r=3), settings={"weight_decay": 0.1, "batch_size": 5}),
        TrainJob(data=data, method=LoRA(r=3), settings={"max_grad_norm": 0.0, "seed": 4}),
        TrainJob(data=data, method="lora+bitfit", settings={"gradient_checkpointing": True}),
        TrainJob(data=data, method="vera", settings={"gradient_checkpointing": True, "max_length": 6}),
        TrainJob(data=data, method="bitfit", settings={"precision": "bf16", "max_steps": 2}),
        TrainJob(data=data, method="lora", settings={"precision": "bf16", "max_steps": 2}),
    ]
    for job, mine in zip(jobs, train_many(tiny, jobs, token_budget=4000, **SHARED), strict=True):
        if job.settings.get("precision") != "bf16":  # whose rounding is coarser than the check
            same_run(mine, _alone(tiny, job))
        assert mine.adapter.name.startswith(data.task.name)
    assert len({r.adapter.name for r in [*train_many(tiny, jobs[:3], **SHARED)]}) == 3


def test_a_methods_own_random_numbers_are_its_jobs(train_many, tiny, make_data, same_tensors, tmp_path):
    """Python's, NumPy's and torch's, in every hook, and after a kill."""

    @dataclass(frozen=True, kw_only=True)
    class Noisy(LoRA):
        def deltas(self, params, backbone):
            if torch.is_grad_enabled() and any(t.requires_grad for t in params.values()):
                params = {k: t * (1 + random.random() + np.random.rand()) for k, t in params.items()}
            return super().deltas(params, backbone)

        def penalty(self, params):
            return sum(t.square().sum() for t in params.values()) * random.random()

        def after_step(self, params, step, num_steps):
            if step == stop:
                raise Halt
            for t in params.values():
                t.add_(float(np.random.rand() + torch.rand(())), alpha=1e-3)

    data, stop = make_data(train=19), None
    jobs = [TrainJob(data=data, method=Noisy(), name=f"{seed}", settings={"seed": seed}) for seed in (1, 2)]
    alone = [_alone(tiny, job) for job in jobs]
    stop = 4  # after an evaluation
    with pytest.raises(TrainingInterrupted):
        train_many(tiny, jobs, tmp_path, token_budget=1, **SHARED)
    stop = None
    for mine, theirs in zip(train_many(tiny, jobs, tmp_path, token_budget=1, **SHARED), alone, strict=True):
        same_tensors(mine.adapter, theirs.adapter)
        assert mine.history == theirs.history


def test_a_job_that_shares_no_pass_is_bit_equal_to_one_alone(train_many, tiny, make_data, same_tensors):
    jobs = [TrainJob(data=make_data(kind), method="lora", settings={"seed": 7}) for kind in KINDS]
    jobs += [replace(jobs[0], method=method, settings={"seed": 8}) for method in ("houlsby", "adalora", "prompt")]
    jobs += [replace(jobs[0], settings={"seed": 7, "gradient_checkpointing": on}) for on in (True, True, False)]
    jobs.append(replace(jobs[0], settings={"seed": 7, "precision": "bf16"}))
    found = train_many(tiny, jobs, token_budget=1, **SHARED)
    for job, mine in zip(jobs, found, strict=True):
        alone = _alone(tiny, job)
        same_tensors(mine.adapter, alone.adapter)
        assert mine.history == alone.history
    assert found[0].history[0]["loss"] != found[-1].history[0]["loss"]  # of the first step, before any tensor differs


@pytest.mark.parametrize("name", ["deberta-v2/v3", "t5"])
def test_other_architectures_keep_jobs_apart_too(name, make_backbone, one_thread, make_data, same_run):
    drops = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout_rate", "dropout")
    config = make_backbone(name).model.config
    backbone = make_backbone(name, **{key: 0.1 for key in drops if hasattr(config, key)})
    jobs = [
        TrainJob(data=make_data(kind), method=method, settings={"max_steps": 2, "seed": i})
        for i, (kind, method) in enumerate(
            zip(KINDS, ("lora", "prompt", "ptuning_v2", "bitfit", "aot_fc"), strict=True)
        )
    ]
    for job, mine in zip(jobs, train_many(backbone, jobs, token_budget=2000, **SHARED), strict=True):
        same_run(mine, _alone(backbone, job))


def test_writing_and_reading_share_passes(make_backbone, one_thread, make_data, same_run):
    backbone = make_backbone("gpt2", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    task = Task(name="name it", kind="generation", template=("{text} :",), label="answer")
    rows = [{"text": "good film", "answer": "good"}, {"text": "bad bad film x1", "answer": "bad bad"}] * 5
    write = TaskData(task=task, train=rows, validation=rows[:2], test=None)
    jobs = [
        TrainJob(data=write, method="lora", settings={"label_smoothing": 0.1}),
        TrainJob(data=write, method="ptuning_v2", settings={"seed": 1}),
        TrainJob(data=make_data(), method="bitfit", settings={"seed": 2}),
    ]
    for job, mine in zip(jobs, train_many(backbone, jobs, token_budget=2000, **SHARED), strict=True):
        same_run(mine, _alone(backbone, job))
        assert mine.metric == ("perplexity" if job.data is write else "accuracy")


@given(
    picked=st.lists(
        st.tuples(st.sampled_from(METHODS), st.sampled_from(KINDS), st.integers(0, 3), st.integers(3, 8)),
        min_size=2,
        max_size=4,
    ),
    max_jobs=st.integers(1, 4),
    token_budget=st.sampled_from([1, 150, 5000]),
    passes=st.integers(1, 4),
)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_of_jobs(tiny, make_data, same_run, picked, max_jobs, token_budget, passes):
    jobs = [
        TrainJob(data=make_data(kind, train=9), method=method, settings={"seed": seed, "batch_size": batch_size})
        for method, kind, seed, batch_size in picked
    ]
    shared = dict(epochs=1, evaluations_per_epoch=1)
    limits = dict(max_jobs=max_jobs, token_budget=token_budget, passes=passes)
    found = train_many(tiny, jobs, **limits, **(SHARED | shared))
    for job, mine in zip(jobs, found, strict=True):
        same_run(mine, _alone(tiny, job, **shared))


# -------------------------------------------------------------------- whatever becomes of the others


def _others(data):
    return [
        TrainJob(data=data["classification"], method="houlsby", name="a", settings={"seed": 1}),
        TrainJob(data=data["tagging"], method="bitfit", name="b", settings={"seed": 2}),
        TrainJob(data=data["multiple_choice"], method="adalora", name="c", settings={"seed": 3}),
    ]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_job_that_diverges_leaves_the_others_bit_equal(where, train_many, tiny, make_data, same_tensors):
    """Against a run with the same rows up to there, in which that job just ends."""
    data = {kind: make_data(kind, train=19) for kind in KINDS}
    lines = []
    bad = TrainJob(data=data["classification"], method=_blowing_up(3, where), name="bad")
    broken = train_many(tiny, [bad, *_others(data)], token_budget=4000, report=lines.append, **SHARED)
    good = TrainJob(data=data["classification"], method="lora", name="bad", settings={"max_steps": 3})
    whole = train_many(tiny, [good, *_others(data)], token_budget=4000, **SHARED)
    failed = broken[0]
    assert isinstance(failed, FailedJob) and (failed.name, failed.step) == ("bad", 2)
    assert "diverged at step 3" in str(failed.error) and where in str(failed.error)
    assert isinstance(failed.error, ConfigError) and failed.history[0]["step"] == 1
    assert any(line.startswith("bad: training diverged at step 3") for line in lines)
    for mine, theirs in zip(broken[1:], whole[1:], strict=True):
        same_tensors(mine.adapter, theirs.adapter)
        assert mine.history == theirs.history


def test_errors_of_another_library_end_their_jobs_and_leave_the_others_bit_equal(
    train_many, tiny, make_data, same_tensors
):
    """Against a run in which those jobs just end after that step."""
    data = {kind: make_data(kind, train=19) for kind in KINDS}
    hooks = ("deltas", "penalty", "after_step")

    def run(method, **own):
        bad = [TrainJob(data=data["classification"], method=method(h), name=h, settings=own) for h in hooks]
        return train_many(tiny, [*bad, *_others(data)], token_budget=4000, **SHARED)

    broken, whole = run(lambda hook: _raising(2, hook)), run(lambda hook: "lora", max_steps=2)
    for hook, failed in zip(hooks, broken, strict=False):
        assert isinstance(failed, FailedJob) and failed.step == 1 and failed.history[0]["step"] == 1
        assert type(failed.error) is MultituneError and str(failed.error) == f"KeyError: 'nothing in {hook}'"
        assert isinstance(failed.error.__cause__, KeyError) and "in _raise" in failed.error.__notes__[0]
        assert failed.error.__traceback__ is None and failed.error.__cause__.__traceback__ is None
    for mine, theirs in zip(broken[3:], whole[3:], strict=True):
        same_tensors(mine.adapter, theirs.adapter)
        assert mine.history == theirs.history


@pytest.mark.parametrize("fault", ["one job's", "the company's"])
def test_where_a_pass_fails_its_jobs_go_on_one_by_one(fault, train_many, tiny, make_data, same_run, monkeypatch):
    data, lines = make_data(train=19), []
    own = [{}, {"gradient_accumulation": 2, "batch_size": 4}, {"batch_size": 5}]
    jobs = [TrainJob(data=data, method="lora", name=f"job{i}", settings=s) for i, s in enumerate(own)]
    run_joint, calls = tiny.run_joint, []

    def failing(batches):
        calls.append([len(b.input_ids) for b in batches])
        if len(calls) > 1 and (5 in calls[-1] if fault == "one job's" else len(batches) > 1):
            raise RuntimeError("no kernel for this\nat all")
        return run_joint(batches)

    monkeypatch.setattr(tiny, "run_joint", failing)
    monkeypatch.setattr(together, "MOST_PADDING", 9.0)
    found = train_many(tiny, jobs, token_budget=4000, report=lines.append, **SHARED)
    monkeypatch.undo()
    assert any("job0: a pass shared with others failed (RuntimeError: no kernel for this)" in line for line in lines)
    assert [len(c) for c in calls[:5]] == [3, 3, 1, 1, 1]
    if fault == "one job's":
        bad = found.pop()
        assert isinstance(bad, FailedJob) and str(bad.error) == "RuntimeError: no kernel for this" and bad.step == 1
        assert len(calls[5]) == 2  # the others share passes again
    else:
        assert {len(c) for c in calls[5:]} == {1}
    for job, mine in zip(jobs, found, strict=False):  # the second in the middle of an optimizer step
        same_run(mine, _alone(tiny, job))


@pytest.mark.parametrize("name", ["report", "ended"])
def test_an_error_of_the_caller_is_no_jobs(name, train_many, tiny, make_data):
    def gone(*args):
        if "step" in str(args[-1]):
            raise OSError("the screen is gone")

    with pytest.raises(OSError, match="the screen is gone"):
        jobs = [TrainJob(data=make_data(), method="lora") for _ in range(3)]
        train_many(tiny, jobs, token_budget=1, **{name: gone}, **(SHARED | dict(max_steps=1)))


def test_a_job_that_stops_early_leaves_the_others_bit_equal(train_many, tiny, make_data, same_tensors):
    data = {kind: make_data(kind, train=19, validation=2) for kind in KINDS}
    shared = SHARED | dict(epochs=5)

    def run(**stop):
        first = TrainJob(data=data["classification"], method="lora", name="first", settings=stop)
        return train_many(tiny, [first, *_others(data)], token_budget=4000, **shared)

    early = run(early_stopping=1, learning_rate=1e-5)
    assert early[0].num_steps < 15
    by_count = run(max_steps=early[0].num_steps)
    assert by_count[0].num_steps == early[0].num_steps
    for mine, theirs in zip(early[1:], by_count[1:], strict=True):
        same_tensors(mine.adapter, theirs.adapter)
        assert mine.history == theirs.history


def test_other_values_of_one_job_change_no_bit_of_the_others(train_many, tiny, make_data, same_tensors):
    data = {kind: make_data(kind, train=19) for kind in KINDS}

    def run(rate):
        first = TrainJob(data=data["regression"], method="ia3", name="first", settings={"learning_rate": rate})
        return train_many(tiny, [first, *_others(data)], token_budget=4000, **SHARED)

    low, high = run(1e-4), run(3e-1)
    assert not torch.equal(low[0].adapter.head_params["weight"], high[0].adapter.head_params["weight"])
    for mine, theirs in zip(low[1:], high[1:], strict=True):
        same_tensors(mine.adapter, theirs.adapter)


def test_jobs_enter_when_others_leave(tiny, make_data, same_run):
    data, lines = make_data(train=19), []
    jobs = [
        TrainJob(data=data, method="lora", name=f"job{i}", settings={"max_steps": steps, "seed": i})
        for i, steps in enumerate([1, 5, 2, 4, 3])
    ]
    found = train_many(tiny, jobs, max_jobs=2, report=lines.append, **SHARED)
    assert [r.num_steps for r in found] == [1, 5, 2, 4, 3]
    for job, mine in zip(jobs, found, strict=True):
        same_run(mine, _alone(tiny, job))
    begun = [line.split(":")[0] for line in lines if "rows" in line]
    ended = [line.split(":")[0] for line in lines if "at step" in line and "accuracy" in line and ", loss" not in line]
    assert begun == ["job0", "job1", "job2", "job3", "job4"] and ended == ["job0", "job2", "job1", "job3", "job4"]
    both = 0
    for line in lines:  # never more than two at a time
        both += ("rows" in line) - (", loss" not in line and "at step" in line)
        assert both <= 2


def test_a_job_that_enters_later_starts_as_if_nobody_trained(train_many, tiny, make_data):
    """Dropout is off where its first tensors come from the frozen backbone, and for whoever looks at a result."""
    data, modes = make_data(train=19), []
    late = TrainJob(
        data=data, method=PrefixTuning(length=3, reparametrise=False, start_text="good film"), name="late",
        settings={"learning_rate": 1e-9},
    )  # fmt: skip
    first = [  # of two precisions, so that the second still trains when the first has ended
        TrainJob(data=data, method="lora", name="short", settings={"max_steps": 1}),
        TrainJob(data=data, method="lora", name="long", settings={"precision": "bf16"}),
    ]
    found = train_many(
        tiny, [*first, late], max_jobs=2, ended=lambda name, result: modes.append(tiny.model.training), **SHARED
    )
    (alone,) = train_many(tiny, [late], **SHARED)
    for name, t in alone.adapter.params.items():
        torch.testing.assert_close(found[2].adapter.params[name], t, rtol=0, atol=1e-6, msg=name)
    assert modes == [False] * 3


def test_passes_hold_the_budget_and_little_padding():
    class Run:
        apart = None

        def __init__(self, rows, width, depth=1):
            self.batch, self.width = {"input_ids": torch.zeros(rows, width)}, width
            self.trainer = type("T", (), {})()
            self.trainer.tuned = type("M", (), {"autocast": None, "num_trained": depth})()
            self.trainer.config = TrainConfig()

    runs = [Run(8, w) for w in (30, 10, 11, 10, 29, 90, 11)] + [Run(8, 10, depth=0)]
    passes = pack(runs, 400)
    assert sorted(id(r) for p in passes for r in p) == sorted(map(id, runs))
    for same in passes:
        width = max(r.batch["input_ids"].shape[1] for r in same)
        padded = sum(len(r.batch["input_ids"]) for r in same) * width
        assert len(same) == 1 or padded <= min(400, MOST_PADDING * sum(r.batch["input_ids"].numel() for r in same))
        assert len({r.trainer.tuned.num_trained for r in same}) == 1
    assert [len(p) for p in passes] == [4, 1, 1, 1, 1]


def test_the_vectors_of_prompts_count_as_tokens(tiny, make_data, monkeypatch):
    data, passes = make_data(train=19), []
    run_joint = tiny.run_joint

    def noted(batches):
        passes.append([(len(b.input_ids), b.input_ids.shape[1], b.plan.ordered[0].prompt_length) for b in batches])
        return run_joint(batches)

    monkeypatch.setattr(tiny, "run_joint", noted)
    methods = [get_method("prompt")(length=n) for n in (1, 12, 13, 20)]
    jobs = [TrainJob(data=data, method=method) for method in (*methods, "lora")]
    train_many(tiny, jobs, token_budget=400, **(SHARED | dict(max_steps=2)))
    assert any(len(of_pass) > 1 for of_pass in passes)
    for of_pass in passes:
        padded = sum(rows for rows, _, _ in of_pass) * max(width + more for _, width, more in of_pass)
        own = sum(rows * (width + more) for rows, width, more in of_pass)
        assert len(of_pass) == 1 or padded <= min(400, MOST_PADDING * own)


def test_nothing_is_kept_of_a_job_that_has_ended_but_its_result(train_many, tiny, make_data, monkeypatch):
    """Without waiting for the garbage collector, which does not see how much memory a tensor holds."""
    watched: dict[str, list[weakref.ref]] = {}
    kept: dict[str, list[str]] = {}

    class Watched(crew.SteppedRun):
        def took(self, loss):
            super().took(loss)
            t = self.trainer
            held = [self, t, t.tuned, t.train_rows, t.tuned.params[0]]
            held += [v for state in t.optimizer.state.values() for v in state.values()]
            watched[f"seed {t.config.seed}"] = [weakref.ref(thing) for thing in held]

    def ended(name, result):
        if name == "last":
            kept.update({n: [type(r()).__name__ for r in refs if r() is not None] for n, refs in watched.items()})

    jobs = [
        TrainJob(data=make_data(train=11), method="lora", settings={"seed": 1, "max_steps": 1}),
        TrainJob(data=make_data(train=12), method=_blowing_up(2, "loss"), settings={"seed": 2}),
        TrainJob(data=make_data(train=13), method=_raising(2, "after_step"), settings={"seed": 3}),
        TrainJob(data=make_data(train=19), method="lora", name="last", settings={"seed": 4}),
    ]
    monkeypatch.setattr(crew, "SteppedRun", Watched)
    gc.disable()
    try:
        found = train_many(tiny, jobs, token_budget=4000, ended=ended, **SHARED)
    finally:
        gc.enable()
    assert [isinstance(f, FailedJob) for f in found] == [False, True, True, False]
    assert len(kept) == 4 and kept.pop("seed 4")  # which is still there when it says that it has ended
    assert kept == {"seed 1": [], "seed 2": [], "seed 3": []}


# -------------------------------------------------------------------- folders


def test_an_interrupted_run_goes_on_to_the_same_tensors(train_many, tiny, make_data, same_tensors, tmp_path):
    data = make_data(train=19)

    def jobs(method):
        return [
            TrainJob(data=data, method="bitfit", name="short", settings={"max_steps": 2}),
            TrainJob(data=data, method="houlsby", name="long"),
            TrainJob(data=data, method=method, name="stopped"),
        ]

    whole = train_many(tiny, jobs("lora"), tmp_path / "whole", max_jobs=2, **SHARED)
    with pytest.raises(TrainingInterrupted) as stop:
        train_many(tiny, jobs(_stopping(4)), tmp_path / "broken", max_jobs=2, **SHARED)
    assert list(stop.value.results) == ["short"] and not tiny.model.training
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["long", "short", "stopped"]
    lines = []
    again = train_many(tiny, jobs("lora"), tmp_path / "broken", max_jobs=2, report=lines.append, **SHARED)
    assert "short: was finished before" in lines
    assert any("long: resuming at step" in line for line in lines)
    assert any("stopped: resuming at step" in line for line in lines)
    for mine, theirs in zip(again, whole, strict=True):
        same_tensors(mine.adapter, theirs.adapter)
        assert mine.history == theirs.history
        assert (mine.best_step, mine.best_metric, mine.num_steps) == (
            theirs.best_step,
            theirs.best_metric,
            theirs.num_steps,
        )
        assert mine.num_method_parameters == theirs.num_method_parameters
        same_tensors(Adapter.load(tmp_path / "broken" / mine.adapter.name, tiny), theirs.adapter)


def test_a_job_and_a_run_alone_resume_each_other(tiny, make_data, same_tensors, tmp_path):
    data = make_data(train=19)
    whole = train(tiny, data, "lora", **SHARED)
    with pytest.raises(TrainingInterrupted):
        job = TrainJob(data=data, method=_stopping(5), name="x")
        train_many(tiny, [job], tmp_path, token_budget=1, **SHARED)
    assert list((tmp_path / "x" / "checkpoints").glob("step-*"))
    same_tensors(train(tiny, data, "lora", tmp_path / "x", **SHARED).adapter, whole.adapter)
    with pytest.raises(Halt):
        train(tiny, data, _stopping(5), tmp_path / "y", **SHARED)
    job = TrainJob(data=data, method="lora", name="y")
    same_tensors(train_many(tiny, [job], tmp_path, **SHARED)[0].adapter, whole.adapter)


def test_a_finished_job_of_other_settings_is_not_taken_for_this_one(tiny, make_data, tmp_path):
    data = make_data()
    shared = SHARED | dict(max_steps=1)
    job = TrainJob(data=data, method="lora", name="x")
    train_many(tiny, [job], tmp_path, **shared)
    assert set(json.loads((tmp_path / "x" / "job.json").read_text())) == {"settings", "tensors_sha256"}
    other = TrainJob(data=data, method=LoRA(r=2), name="x")
    (failed,) = train_many(tiny, [other], tmp_path, **shared)
    assert isinstance(failed, FailedJob) and "method.r is 8 there and 2 here" in str(failed.error)
    (replaced,) = train_many(
        tiny, [TrainJob(data=data, method=LoRA(r=2), name="x", overwrite=True)], tmp_path, **shared
    )
    assert Adapter.load(tmp_path / "x", tiny).method == replaced.adapter.method == LoRA(r=2)
    train(tiny, data, "bitfit", tmp_path / "x", overwrite=True, **shared)
    assert not (tmp_path / "x" / "job.json").exists()
    with pytest.raises(ConfigError, match="job 'x': output_dir .* holds a finished adapter"):
        train_many(tiny, [other], tmp_path, **shared)


@pytest.mark.parametrize("file", ["job.json", "history.json"])
def test_what_a_finished_job_noted_is_named_where_it_is_damaged(file, tiny, make_data, tmp_path):
    job = TrainJob(data=make_data(), method="bitfit", name="x")
    train_many(tiny, [job], tmp_path, **(SHARED | dict(max_steps=1)))
    (tmp_path / "x" / file).write_text('{"settings"')
    (failed,) = train_many(tiny, [job], tmp_path, **(SHARED | dict(max_steps=1)))
    assert isinstance(failed.error, AdapterError) and f"{file} is damaged" in str(failed.error)
    assert "overwrite=True" in str(failed.error)


# -------------------------------------------------------------------- passes side by side


def test_passes_side_by_side_are_those_one_after_the_other(tiny, make_data, same_tensors):
    """The same passes, whoever runs them and in whatever order they end: no bit depends on it."""
    jobs = [
        TrainJob(data=make_data(KINDS[i % len(KINDS)], train=19), method=method, settings={"seed": i})
        for i, method in enumerate(METHODS)
    ]
    one, *others = (train_many(tiny, jobs, token_budget=300, passes=n, **SHARED) for n in (1, 2, 4, 4))
    for found in others:
        for mine, alone in zip(found, one, strict=True):
            same_tensors(mine.adapter, alone.adapter)
            assert mine.history == alone.history


def test_writing_beside_other_passes_is_writing_alone(make_backbone, one_thread, make_data, same_tensors, monkeypatch):
    """Logits in pieces are recomputed in the backward pass, while others draw their masks."""
    backbone = make_backbone("llama", tie_word_embeddings=True, attention_dropout=0.1)
    monkeypatch.setattr("multitune.language_loss.MOST_LOGITS", 2 * backbone.vocab_size)
    task = Task(name="write", kind="generation", template=("{text} :",), label="y")
    rows = make_data(train=19)
    write = TaskData(task=task, train=rows.train, validation=rows.validation, test=None)
    jobs = [
        TrainJob(data=data, method=method, settings={"seed": i})
        for i, (data, method) in enumerate((d, m) for m in ("lora", "houlsby", "bitfit") for d in (write, rows))
    ]
    shared = SHARED | dict(batch_size=4)
    one, two = (train_many(backbone, jobs, token_budget=1, passes=n, **shared) for n in (1, 2))
    for mine, alone in zip(two, one, strict=True):
        same_tensors(mine.adapter, alone.adapter)
        assert mine.history == alone.history


def test_passes_that_need_the_process_run_alone(tiny, make_data, monkeypatch):
    run_pass, running, company = crew.run_pass, [], []

    def noted(runs):
        running.append(runs)
        company.append((needs_process(runs[0]), len(running)))
        time.sleep(0.02)
        company.append((needs_process(runs[0]), len(running)))
        try:
            return run_pass(runs)
        finally:
            running.remove(runs)

    monkeypatch.setattr(crew, "run_pass", noted)
    of_jobs = [{}, {"gradient_checkpointing": True}, {"precision": "bf16"}, {}, {}, {"gradient_checkpointing": True}]
    jobs = [TrainJob(data=make_data(), method="lora", settings=each) for each in of_jobs]
    found = train_many(tiny, jobs, token_budget=1, passes=3, **(SHARED | dict(max_steps=2)))
    assert all(isinstance(result, TrainResult) for result in found)
    assert {count for alone, count in company if alone} == {1} and max(count for _, count in company) == 3


def test_who_is_told_of_an_evaluation_may_train_in_turn(tiny, make_data):
    inner = [TrainJob(data=make_data(), method="bitfit") for _ in range(3)]
    outer, shared, found = make_data(), SHARED | dict(max_steps=1), []

    def report(line):
        if "step 1" in line and not found:
            found.extend(train_many(tiny, inner, token_budget=1, passes=2, **shared))

    jobs = [TrainJob(data=outer, method="lora") for _ in range(2)]
    results = train_many(tiny, jobs, token_budget=1, passes=2, report=report, **shared)
    assert len(found) == 3 and all(isinstance(result, TrainResult) for result in [*found, *results])


@pytest.mark.parametrize("token_budget", [1, 350])
def test_a_failed_pass_is_tried_again_with_nobody_beside_it(token_budget, tiny, make_data, same_run, monkeypatch):
    """Memory that suffices for one pass at a time."""
    run_joint, running, failed = tiny.run_joint, [], []

    def scarce(batches):
        running.append(batches)
        time.sleep(0.02)
        try:
            if len(running) > 1:
                failed.append(batches)
                raise torch.OutOfMemoryError("no memory")
            return run_joint(batches)
        finally:
            running.remove(batches)

    jobs = [TrainJob(data=make_data(train=19), method="lora", settings={"seed": i}) for i in range(4)]
    lines = []
    monkeypatch.setattr(tiny, "run_joint", scarce)
    found = train_many(tiny, jobs, token_budget=token_budget, passes=2, report=lines.append, **SHARED)
    monkeypatch.undo()
    assert failed and any("others failed (OutOfMemoryError: no memory); it goes on by itself" in line for line in lines)
    for job, mine in zip(jobs, found, strict=True):
        same_run(mine, _alone(tiny, job))


def test_ctrl_c_beside_other_passes_keeps_what_had_ended(tiny, make_data, tmp_path):
    jobs = [TrainJob(data=make_data(), method="lora", name=name) for name in ("a", "b")]
    short = TrainJob(data=make_data(), method="lora", name="short", settings={"max_steps": 1})
    main, run = threading.current_thread(), tiny.run_joint

    def stopped(batches):
        if threading.current_thread() is main and (tmp_path / "short" / "job.json").exists():
            raise KeyboardInterrupt
        return run(batches)

    tiny.run_joint = stopped
    with pytest.raises(TrainingInterrupted) as stop:
        train_many(tiny, [short, *jobs], tmp_path, token_budget=1, passes=2, **SHARED)
    assert list(stop.value.results) == ["short"] and not tiny.model.training
    assert not [t for t in threading.enumerate() if t.name.startswith("multitune-pass")]


def test_two_passes_at_a_time_are_for_a_cpu_with_threads(one_thread):
    def place(device, **rope):
        model = SimpleNamespace(config=LlamaConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "default"} | rope))
        return SimpleNamespace(name="it", device=torch.device(device), model=model)

    cpu, gpu, changing = place("cpu"), place("cuda:1"), place("cpu", rope_type="dynamic", factor=2.0)
    assert [many._lanes(place, None) for place in (cpu, gpu, changing)] == [1, 1, 1] and many._lanes(gpu, 1) == 1
    torch.set_num_threads(2)
    assert [many._lanes(place, None) for place in (cpu, gpu, changing)] == [2, 1, 1]
    with pytest.raises(ConfigError, match="passes=2: on cuda:1 one pass runs at a time; leave it out"):
        many._lanes(gpu, 2)
    with pytest.raises(ConfigError, match="passes=2: the rotary positions of backbone 'it' change with the length"):
        many._lanes(changing, 2)
    assert many._lanes(cpu, 3) == 3


# -------------------------------------------------------------------- refusals


def test_a_method_that_changes_the_backbone_is_refused_by_name_or_queued(tiny, make_data, same_run):
    data = make_data()
    jobs = [
        TrainJob(data=data, method="top_layers", name="top"),
        TrainJob(data=data, method="lora", name="low"),
    ]
    shared = SHARED | dict(max_steps=2)
    with pytest.raises(MixError, match="job 'top': .*cannot share a pass.*alone='queue'"):
        train_many(tiny, jobs, **shared)
    lines = []
    found = train_many(tiny, jobs, alone="queue", report=lines.append, **shared)
    for job, mine in zip(jobs, found, strict=True):
        same_run(mine, train(tiny, data, job.method, **shared))
    assert lines[-1] == f"top: accuracy {found[0].best_metric:.3f} at step {found[0].best_step}"


def test_a_queued_job_that_fails_takes_nothing_from_the_others(tiny, make_data):
    @dataclass(frozen=True, kw_only=True)
    class Failing(get_method("top_layers")):
        def penalty(self, params):
            raise OSError("no space left")

    jobs = [TrainJob(data=make_data(), method=method) for method in (Failing(), "bitfit")]
    failed, fine = train_many(tiny, jobs, alone="queue", **(SHARED | dict(max_steps=1)))
    assert str(failed.error) == "OSError: no space left" and isinstance(fine, TrainResult)


def test_what_cannot_be_honoured_is_refused_before_anything_runs(tiny, make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "run_pass", lambda runs: pytest.fail("a pass was run"))
    data = make_data()
    fine = TrainJob(data=data, method="lora", name="fine")

    def refused(error, match, *jobs, **settings):
        with pytest.raises(error, match=match):
            train_many(tiny, [fine, *jobs], tmp_path, **settings)

    refused(ConfigError, "passes=0 is not possible; give a whole number, at least 1", passes=0)
    refused(ConfigError, "two jobs are called 'fine'", fine)
    refused(ConfigError, "both write to", TrainJob(data=data, method="lora", output_dir=tmp_path / "fine"))
    again = tmp_path / "x" / ".." / "fine"
    refused(ConfigError, "'fine' and 'x' both write to", TrainJob(data=data, method="lora", name="x", output_dir=again))
    inner = TrainJob(data=data, method="lora", name="fine/x")
    refused(ConfigError, "job 'fine/x' writes to a folder in that of job 'fine'.*beside each other", inner)
    outer = TrainJob(data=data, method="lora", name="all", output_dir=tmp_path)
    refused(ConfigError, "job 'fine' writes to a folder in that of job 'all'", outer)
    refused(
        ConfigError,
        "job 'x': no training setting 'lr'. Did you mean 'learning_rate'?",
        TrainJob(data=data, method="lora", name="x", settings={"lr": 1}),
    )
    refused(ConfigError, "job 'x': .*loar", TrainJob(data=data, method="loar", name="x"))
    refused(DataError, "job 'x': a Task .'mood'. says", TrainJob(data=data.task, method="lora", name="x"))
    refused(ConfigError, "job 'x': .*99", TrainJob(data=data, method=LoRA(layers=(99,)), name="x"))
    kept = TrainJob(data=data, method="head", name="x", settings={"cache_frozen": "memory"})
    refused(ConfigError, "job 'x': cache_frozen='memory'", kept)
    refused(ConfigError, "max_jobs=0", max_jobs=0)
    refused(ConfigError, "token_budget=0", token_budget=0)
    refused(ConfigError, "alone='later'", alone="later")
    refused(ConfigError, "max_jobs='4'", max_jobs="4")
    refused(ConfigError, "takes TrainJob", ("a", "b"))
    for jobs, said in (
        (fine, r"not a TrainJob; put the one job into a list"),
        ((j for j in [fine]), "not a generator"),
    ):
        with pytest.raises(ConfigError, match=said):
            train_many(tiny, jobs)
    tiny.detach()
    refused(PlanError, "detached")
    tiny.attach()
    with pytest.raises(ConfigError, match="job 'fine': .*test_many.py is a file, and no folder for fine"):
        train_many(tiny, [fine], __file__)
    with pytest.raises(ConfigError, match="no jobs"):
        train_many(tiny, [])
    assert not list(tmp_path.iterdir())


def test_jobs_of_one_table_have_its_rows_checked_and_read_once(tiny, make_data, monkeypatch):
    read, examples = [], Task.examples

    def noted(self, table, **settings):
        read.append(len(table))
        return examples(self, table, **settings)

    monkeypatch.setattr(Task, "examples", noted)
    jobs = [TrainJob(data=make_data(train=19), method="bitfit")] * 3
    train_many(tiny, jobs, **(SHARED | dict(max_steps=1)))
    assert sorted(read) == [8, 8, 19, 19]


def test_bars_show_names_with_brackets():
    bars, shown = Progress(wanted=False), Console(file=io.StringIO(), width=60)
    bars.begin("topic[/r=2]", 3)
    shown.print(bars._bars.make_tasks_table(bars._bars.tasks))
    assert "topic[/r=2]" in shown.file.getvalue()


def test_layers_left_out_at_random_are_refused(make_backbone, make_data):
    backbone = make_backbone("bart", encoder_layerdrop=0.1)
    with pytest.raises(ConfigError, match="encoder_layerdrop"):
        train_many(backbone, [TrainJob(data=make_data(), method="lora")])


def test_global_state_is_left_alone(train_many, tiny, make_data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_num_threads(4)  # put back by the backbone's fixture
    jobs = [TrainJob(data=make_data(), method="lora") for _ in range(3)]
    train_many(tiny, jobs, token_budget=1, **(SHARED | dict(max_steps=1)))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 4
    assert not tiny.model.training


def test_one_pass_in_a_round_that_fails_is_its_jobs_fault(train_many, tiny, make_data, monkeypatch):
    calls, lines = [], []

    def failing(batches):
        calls.append(batches)
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(tiny, "run_joint", failing)
    jobs = [TrainJob(data=make_data(), method="lora", name="x")]
    (failed,) = train_many(tiny, jobs, report=lines.append, **(SHARED | dict(max_steps=1)))
    assert str(failed.error) == "RuntimeError: no kernel for this" and len(calls) == 1
    assert not any("goes on by itself" in line for line in lines)
