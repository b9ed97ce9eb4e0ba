"""Invented records for the tests of reports: every score is drawn from numbers that the test chooses."""

from __future__ import annotations

import numpy as np

from multitune.comparing.records import Outcome, Record, Trial

ENVIRONMENT = {
    "machine": "a machine, 2 cores, Linux x86_64",
    "device": "cpu",
    "threads": 1,
    "python": "3.11.0",
    "versions": {"multitune": "0.1.0", "torch": "2.13.0"},
    "date": "2026-11-20",
}


def record(
    method="lora",
    task="glue/rte",
    seed=0,
    score=0.8,
    *,
    budget=None,
    settings=None,
    training=None,
    data=None,
    purpose="final",
    backbone="minilm",
    **outcome,
):
    """One record; what is not given is as if a run had given it."""
    trial = Trial(
        task=task,
        data={"task": task, "fingerprint": "f00d", **(data or {})},
        backbone=backbone,
        backbone_fingerprint="beef",
        method=method,
        settings=settings or {},
        training={"learning_rate": 1e-3, "epochs": 3.0, "batch_size": 16, **(training or {}), "seed": seed},
    )
    values = {
        "status": "finished",
        "metric": "accuracy",
        "score": score,
        "parameters": 1000,
        "head_parameters": 770,
        "file_bytes": 4100,
        "seconds": 30.0,
        "peak_memory": 500_000_000,
        "environment": ENVIRONMENT,
    }
    return Record(trial=trial, outcome=Outcome(**{**values, **outcome}), purpose=purpose, budget=budget)


def failed(method="lora", task="glue/rte", seed=0, error="it ran out of memory", **more):
    """The record of a run that failed."""
    return record(method, task, seed, None, status="failed", error=error, file_bytes=None, seconds=None,
                  peak_memory=None, **more)  # fmt: skip


def comparison(methods, tasks, num_seeds=3, num_rows=200, seed=0):
    """Records of every method on every task and seed.

    Args:
        methods: by name, how good it is and how many parameters it trains.
        tasks: by name, how hard it is: the share of rows that a method of goodness 0 gets right.
    """
    rng = np.random.default_rng(seed)
    found = []
    for task, base in tasks.items():
        hardness = rng.normal(0, 0.22, num_rows)  # the same for all
        for method, (goodness, parameters) in methods.items():
            for s in range(num_seeds):
                chance = base + goodness + hardness + rng.normal(0, 0.008)
                rows = (rng.random(num_rows) < np.clip(chance, 0, 1)).astype(float)
                score = float(rows.mean())
                steps = np.arange(1, 6) * 40
                curve = score - 0.3 * (score - 0.4) * np.exp(-steps / 60) + rng.normal(0, 0.008, 5)
                curve[-1] = score
                history = tuple(
                    {"step": float(k), "eval_accuracy": float(v)} for k, v in zip(steps, curve, strict=True)
                )
                found.append(
                    record(
                        method,
                        task,
                        s,
                        score,
                        settings={"size": 8},
                        row_scores=tuple(rows),
                        history=history,
                        parameters=parameters,
                        file_bytes=4 * parameters + 400,
                        seconds=float(20 + parameters**0.3 * rng.uniform(0.8, 1.2)),
                        peak_memory=int(4.2e8 + 14 * parameters + 1e8 * rng.random()),
                    )
                )
    return found
