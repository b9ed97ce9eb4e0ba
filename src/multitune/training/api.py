"""Train one adapter."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from multitune.backbone import Backbone
from multitune.methods import Method
from multitune.tasks import TaskData
from multitune.training.config import TrainConfig
from multitune.training.results import TrainResult
from multitune.training.setup import Setup, check_backbone_and_method, refuse_hyper_parameters
from multitune.training.trainer import run


def train(
    backbone: Backbone,
    data: TaskData,
    method: Method | str,
    output_dir: str | Path | None = None,
    *,
    config: TrainConfig | None = None,
    name: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] | None = None,
    **overrides: Any,
) -> TrainResult:
    """Train an adapter for one task. The same seed gives the same tensors, bit for bit.

    Args:
        data: the task with its tables of training and validation rows, from `load_task` or `load_table`.
        method: a method, or the name of one with its usual hyper-parameters, or of several joined by "+".
        output_dir: where the adapter and, while it runs, its checkpoints go. A run that was killed is resumed
            by the same call. `None` saves nothing.
        config: training settings; `overrides` are fields of it.
        name: what to call the adapter; by default the task's name.
        overwrite: replace a finished adapter, or an unfinished run of other settings, in `output_dir`.
        report: called with a line where rows are longer than what is read of them, on what packing saves, when a run
            resumes, and after each evaluation unless a progress bar shows it.

    Raises:
        ConfigError: an unknown or impossible setting; a folder that holds something else; a run that diverged.
        DataError: a row that does not fit the task, or no rows.
        BackboneError: a backbone without the head that the task needs.
        TaskError: a pattern that does not fit the backbone.
        AdapterError: a checkpoint to go on from that is damaged; says what to remove.
    """
    start = time.perf_counter()
    check_backbone_and_method(backbone, method)
    refuse_hyper_parameters(method, overrides)
    settings = TrainConfig.from_dict({**(config or TrainConfig()).to_dict(), **overrides})
    setup = Setup.check(
        backbone, data, method, output_dir, config=settings, name=name, overwrite=overwrite, report=report
    )
    return train_setup(setup, start, report)


def train_setup(setup: Setup, start: float, report: Callable[[str], None] | None, *, job: bool = False) -> TrainResult:
    """Train what was set up by itself; for `job` see `Setup.close`."""
    if setup.backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setup.backbone.device)
    opened = setup.open()
    done = setup.finished(opened.settings) if job else None
    if done is not None:
        return done
    opened.claim()
    if report is not None:
        for line in opened.remarks:
            report(line)
    config, model = setup.config, opened.model
    if config.gradient_checkpointing:
        model.backbone.enable_gradient_checkpointing()
    try:
        trainer = run(model, config, opened.rows["train"], opened.rows["validation"], opened.checkpoints, report)
    finally:
        if config.gradient_checkpointing:
            model.backbone.disable_gradient_checkpointing()
    return setup.close(opened, trainer, start, job=job)
