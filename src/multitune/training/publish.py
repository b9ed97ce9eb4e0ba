"""From a run that has ended to an adapter in its folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multitune.adapter import CONFIG_FILE, TENSOR_FILE, Adapter
from multitune.backbone import Backbone
from multitune.errors import ConfigError
from multitune.files import replace_file
from multitune.tables import TABLE_FILE
from multitune.training.checkpoints import FOLDER, Checkpoints
from multitune.training.curve import write_curve
from multitune.training.model import TuningModel
from multitune.training.trainer import TuningTrainer

HISTORY_FILE = "history.json"
CURVE_FILE = "curve.png"
JOB_FILE = "job.json"
"""Which settings the adapter beside it was trained with, as `train_many` tells a finished job."""

OURS = (CONFIG_FILE, TENSOR_FILE, TABLE_FILE, HISTORY_FILE, CURVE_FILE, JOB_FILE, FOLDER)
"""What training leaves in a folder."""


def check_folder(output: Path, overwrite: bool) -> None:
    """Raise `ConfigError` if training into this folder would destroy something."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir {output} is a file; give a folder")
    foreign = (
        sorted(p.name for p in output.iterdir() if p.name not in OURS and not is_stray(p)) if output.exists() else []
    )
    if foreign:
        raise ConfigError(
            f"output_dir {output} holds files of another kind ({', '.join(foreign[:3])}); give a new folder (--out)"
        )
    if (output / CONFIG_FILE).exists() and not overwrite:
        raise ConfigError(
            f"output_dir {output} holds a finished adapter; give another folder (--out), or overwrite=True "
            f"(--overwrite) to replace it"
        )


def is_stray(path: Path) -> bool:
    """Whether a file was half-written when a run was killed."""
    return any(path.name.startswith(f".{ours}.") for ours in OURS)


def best_adapter(
    backbone: Backbone,
    model: TuningModel,
    trainer: TuningTrainer,
    name: str,
    max_length: int,
    facts: dict[str, Any],
) -> Adapter:
    """The adapter of a run that has ended: its best tensors, in their smallest form; not on disk.

    Args:
        backbone: the backbone it was trained on, its weights as they were before.
        model: what was trained.
        trainer: after training; it kept the best tensors, float32 on the CPU.
        max_length: tokens a text was cut to.
        facts: what the recipe is to say beside the training settings and the numbers of steps.
    """
    assert trainer.best is not None
    params: Mapping[str, Tensor] = {
        k.removeprefix("method."): t for k, t in trainer.best.items() if k.startswith("method.")
    }
    if model.method.changes_weights:
        before = dict(backbone.model.named_parameters())
        params = {k: t for k, t in params.items() if not torch.equal(t, before[k].detach().float().cpu())}
    with torch.no_grad():
        method, params = model.method.finish(params, backbone)
    recipe = trainer.config.identity() | facts
    recipe |= {"steps": trainer.state.global_step, "best_step": trainer.state.best_global_step}
    return Adapter(
        name=name,
        method=method,
        params=params,
        head=model.head,
        head_params={k.removeprefix("head."): t for k, t in trainer.best.items() if k.startswith("head.")},
        task=trainer.train_rows.task,
        backbone=backbone.describe(),
        max_length=max_length,
        metrics=dict(trainer.best_metrics),
        recipe=recipe,
        seed=trainer.config.seed,
    )


def publish(
    adapter: Adapter,
    history: list[dict[str, float]],
    output: Path,
    metric: str,
    checkpoints: Checkpoints,
    *,
    keep: bool,
    settings: Mapping[str, Any] | None,
) -> Adapter:
    """Put the finished adapter into the output folder; its `adapter.json` comes last and makes it one."""
    final = checkpoints.folder / "final"
    saved = adapter.save(final)
    for old in (CONFIG_FILE, TABLE_FILE, JOB_FILE):  # of the adapter that is replaced
        (output / old).unlink(missing_ok=True)
    text = json.dumps(history, indent=1) + "\n"
    replace_file(output / HISTORY_FILE, lambda temporary: temporary.write_text(text, "utf-8"))
    replace_file(output / CURVE_FILE, lambda temporary: write_curve(temporary, history, metric, adapter.name))
    if settings is not None:
        job = json.dumps({"settings": dict(settings), "tensors_sha256": saved.digest}, indent=1) + "\n"
        replace_file(output / JOB_FILE, lambda temporary: temporary.write_text(job, "utf-8"))
    for file in (TENSOR_FILE, CONFIG_FILE):
        os.replace(final / file, output / file)
    shutil.rmtree(final)
    for leftover in output.iterdir():
        if is_stray(leftover):
            leftover.unlink()
    checkpoints.finish(keep=keep)
    return replace(adapter, path=output.absolute(), digest=saved.digest)
