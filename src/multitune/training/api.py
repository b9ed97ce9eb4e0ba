"""Train one adapter, judge one adapter."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multitune import heads
from multitune.adapter import CONFIG_FILE, TENSOR_FILE, Adapter
from multitune.answers import settle_format
from multitune.backbone import Backbone
from multitune.bank import Bank
from multitune.deltas import Prompt
from multitune.errors import ConfigError, DataError
from multitune.files import replace_file
from multitune.heads import Head
from multitune.layers import LayerChoice, choose_layers_for
from multitune.methods import Method, make_method
from multitune.quantized import check_trains
from multitune.tables import TABLE_FILE
from multitune.tasks import Task, TaskData, any_split, judge
from multitune.tasks.metrics import judge_of_training
from multitune.tasks.readers import Source
from multitune.training.checkpoints import FOLDER, Checkpoints, differences
from multitune.training.config import COSMETIC, TrainConfig
from multitune.training.curve import write_curve
from multitune.training.data import TaskRows, warn_of_empty
from multitune.training.language import answer_scores
from multitune.training.model import TuningModel
from multitune.training.trainer import TuningTrainer, run

HISTORY_FILE = "history.json"
CURVE_FILE = "curve.png"
JOB_FILE = "job.json"
"""Which settings the adapter beside it was trained with, as `train_many` tells a finished job."""

_OURS = (CONFIG_FILE, TENSOR_FILE, TABLE_FILE, HISTORY_FILE, CURVE_FILE, JOB_FILE, FOLDER)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves."""

    adapter: Adapter
    """The best adapter by the validation metric; on disk if `output_dir` was given."""
    history: list[dict[str, float]]
    """Per logged step: step, epoch, loss, learning_rate, grad_norm, and after an evaluation eval_loss and eval_*."""
    seconds: float
    """Wall time of this call; of a resumed run, the time since it was resumed."""
    metric: str
    """Name of the metric that chose the tensors: the task's headline metric, or perplexity where that judges texts."""
    best_metric: float
    """Best value of that metric on the validation rows."""
    best_step: int
    """Step that reached it and is kept: of equal values that with the lowest validation loss, then the latest."""
    num_steps: int
    """Optimizer steps taken."""
    num_method_parameters: int
    """Trained parameters without the head."""
    num_head_parameters: int
    """Trained parameters of the head."""
    peak_memory_bytes: int
    """Most memory in use: the device's on a GPU, the process's own on a CPU."""
    cached_bytes: int = 0
    """Bytes of what the frozen layers gave for the rows, where `cache_frozen` kept it."""
    layer_choice: LayerChoice | None = None
    """What was measured where the method's layers were "semantic"; those chosen are the adapter's method's."""


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
        report: called with a line when a run resumes, and after each evaluation unless a progress bar shows it.

    Raises:
        ConfigError: an unknown or impossible setting; a folder that holds something else; a run that diverged.
        DataError: a row that does not fit the task.
    """
    start = time.perf_counter()
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
    config, model = setup.config, opened.model
    if config.gradient_checkpointing:
        model.backbone.enable_gradient_checkpointing()
    try:
        trainer = run(model, config, opened.rows["train"], opened.rows["validation"], opened.checkpoints, report)
    finally:
        if config.gradient_checkpointing:
            model.backbone.disable_gradient_checkpointing()
    return setup.close(opened, trainer, start, job=job)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run that can begin."""

    model: TuningModel
    rows: dict[str, TaskRows]
    """By split."""
    max_length: int
    checkpoints: Checkpoints | None
    settings: dict[str, Any]
    """What a resumed run must share, see `Checkpoints.open`."""
    facts: dict[str, int]
    """What a recipe says beside the settings."""
    overwrite: bool

    def claim(self) -> None:
        """Take the output folder, new or with the checkpoints of this very run.

        Raises:
            ConfigError: it holds an unfinished run of other settings.
        """
        if self.checkpoints is not None:
            self.checkpoints.open(self.settings, restart=self.overwrite)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was asked of a run, checked, before anything is made."""

    backbone: Backbone
    data: TaskData
    method: Method
    config: TrainConfig
    output: Path | None
    name: str
    overwrite: bool
    choice: LayerChoice | None
    """What the method's layers were chosen by, if they were "semantic"."""

    @classmethod
    def check(
        cls,
        backbone: Backbone,
        data: TaskData,
        method: Method | str,
        output_dir: str | Path | None,
        *,
        config: TrainConfig,
        name: str | None,
        overwrite: bool,
        report: Callable[[str], None] | None = None,
        job: bool = False,
    ) -> Setup:
        """The arguments of `train`, refused if they cannot be honoured; the folder of a job may be finished."""
        _check_data(data)
        chosen = make_method(method) if isinstance(method, str) else method
        config = config.resolve(chosen)
        config = replace(config, pooling=config.pooling or backbone.default_pooling)
        output = None if output_dir is None else Path(output_dir)
        if output is not None:
            _check_folder(output, overwrite or (job and (output / JOB_FILE).exists()))
        _check_backbone(backbone)
        data = replace(data, task=settle_format(backbone, data.task))
        _check_smoothing(data.task, config)
        chosen, choice = _resolve_layers(backbone, data, chosen, config, report)
        check_trains(backbone, chosen)
        return cls(
            backbone=backbone,
            data=data,
            method=chosen,
            config=config,
            output=output,
            name=name or data.task.name,
            overwrite=overwrite,
            choice=choice,
        )

    def open(self, read: Callable[[Task, Any, str, int], TaskRows] | None = None) -> Opened:
        """Make the tensors and read the rows.

        Args:
            read: what makes tokenized rows of a task, its table, a split and a length; by default they are made anew.
        """
        backbone, data = self.backbone, self.data
        model = _model(backbone, data, self.method, self.config)
        max_length = _room(model, self.config)
        read = read or partial(read_rows, backbone)
        rows = {
            split: read(data.task, table, split, max_length)
            for split, table in (("train", data.train), ("validation", data.validation))
        }
        _check_prompts(model, rows.values())
        facts = {
            "num_train": len(rows["train"]),
            "num_validation": len(rows["validation"]),
            "trained_parameters": model.num_trained,
        }
        settings = _settings(backbone, data, self.method, self.config, rows) | facts
        return Opened(
            model=model,
            rows=rows,
            max_length=max_length,
            checkpoints=None if self.output is None else Checkpoints(self.output),
            settings=settings,
            facts=facts,
            overwrite=self.overwrite,
        )

    def close(self, opened: Opened, trainer: TuningTrainer, start: float, *, job: bool = False) -> TrainResult:
        """Save what a run that has ended leaves.

        Args:
            start: `time.perf_counter()` when it began.
            job: note in the folder which settings it was, for `train_many` to know it again.
        """
        model = opened.model
        choice = {} if self.choice is None else {"layer_choice": self.choice.to_dict()}
        adapter = _adapter(self.backbone, model, trainer, self.name, opened.max_length, opened.facts | choice)
        history = _history(trainer)
        if self.output is not None and opened.checkpoints is not None:
            settings = opened.settings if job else None
            adapter = _publish(
                adapter,
                history,
                self.output,
                trainer.metric,
                opened.checkpoints,
                keep=self.config.keep_checkpoints,
                settings=settings,
            )
        return TrainResult(
            adapter=adapter,
            history=history,
            seconds=time.perf_counter() - start,
            metric=trainer.metric,
            best_metric=adapter.metrics[trainer.metric],
            best_step=int(trainer.state.best_global_step or 0),
            num_steps=trainer.state.global_step,
            num_method_parameters=model.num_trained,
            num_head_parameters=adapter.num_head_parameters,
            peak_memory_bytes=_peak_memory(self.backbone.device),
            cached_bytes=trainer.cached_bytes,
            layer_choice=self.choice,
        )

    @staticmethod
    def history(trainer: TuningTrainer) -> list[dict[str, float]]:
        """The trainer's log, one entry per step."""
        return _history(trainer)

    def finished(self, settings: Mapping[str, Any]) -> TrainResult | None:
        """The result in the output folder, if a job of just these settings ended there.

        Raises:
            ConfigError: one of other settings did; names them.
        """
        if self.output is None or self.overwrite or not (self.output / CONFIG_FILE).exists():
            return None
        adapter = Adapter.load(self.output, self.backbone)
        job = json.loads((self.output / JOB_FILE).read_text("utf-8"))
        differing = differences(job["settings"], settings)
        if job["tensors_sha256"] != adapter.digest:
            differing = ["it was not trained by train_many"]
        if differing:
            raise ConfigError(
                f"{self.output} holds a finished adapter of another run: {'; '.join(differing)}. Give another folder, "
                f"or overwrite=True to replace it"
            )
        recipe = adapter.recipe
        return TrainResult(
            adapter=adapter,
            history=json.loads((self.output / HISTORY_FILE).read_text("utf-8")),
            seconds=0.0,
            metric=judge_of_training(adapter.task.metric),
            best_metric=adapter.metrics[judge_of_training(adapter.task.metric)],
            best_step=recipe["best_step"],
            num_steps=recipe["steps"],
            num_method_parameters=recipe["trained_parameters"],
            num_head_parameters=adapter.num_head_parameters,
            peak_memory_bytes=_peak_memory(self.backbone.device),
            layer_choice=self.choice,
        )


def read_rows(backbone: Backbone, task: Task, table: Any, split: str, max_length: int) -> TaskRows:
    """The rows of one split, tokenized."""
    return TaskRows(backbone, task, table, max_length=max_length, split=split)


def evaluate(
    backbone: Backbone,
    adapter: Adapter | str | Path,
    data: TaskData | Source,
    split: str = "validation",
    batch_size: int = 32,
    drop_layers: Sequence[int] = (),
) -> dict[str, float]:
    """Metrics of an adapter, by the path that serves it.

    Args:
        data: a task's data or a source with several splits, of which `split` is read; or labelled rows, as anything
            that `read_table` reads: a file, a `datasets.Dataset`, a list of mappings.
        split: "train", "validation" or "test".
        drop_layers: layers in which the adapter is left out, see `Bank.add`.

    Raises:
        DataError: no such split, no rows, or a row that does not fit the adapter's task.
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter.load(adapter, backbone)
    task = adapter.task
    table = _split(data, split) if isinstance(data, TaskData) else _labelled(data, split)
    if task.kind == "generation":
        return answer_scores(backbone, adapter, table, batch_size=batch_size, drop_layers=drop_layers)
    examples = task.examples(table)
    warn_of_empty(task, "given", examples)
    if not examples:
        raise DataError(f"there are no rows to judge adapter '{adapter.name}' by; give a table with at least one")
    bank = Bank(backbone)
    bank.add(adapter.name, adapter, drop_layers=drop_layers)
    predictions = []
    for answer in bank.predict([(adapter.name, dict(row)) for row in table], batch_size=batch_size):
        assert answer.logits is not None
        words = range(len(answer.logits)) if task.kind == "tagging" else ()
        predictions.append(heads.prediction(task, answer.logits, words))
    return judge(task, predictions, examples)


def _split(data: TaskData, split: str) -> Any:
    tables = {"train": data.train, "validation": data.validation, "test": data.test}
    if split not in tables:
        raise DataError(f"no split '{split}'; there are {', '.join(tables)}")
    if tables[split] is None:
        raise DataError(f"task '{data.task.name}' has no labelled {split} split; choose train or validation")
    return tables[split]


def _labelled(data: Any, split: str) -> Any:
    """The labelled rows of a source; rows in memory as they are."""
    if isinstance(data, (str, Path, Mapping)):  # a file, a folder, a hub data set, or tables by split
        return any_split(data, split)
    if isinstance(data, Task) or not isinstance(data, Iterable):
        raise DataError(
            f"evaluate takes rows with labels, not a {type(data).__name__}; give load_task(NAME), a file, or a list of "
            f"mappings of columns to values"
        )
    return data if hasattr(data, "column_names") else list(data)


def _check_data(data: Any) -> None:
    """Raise `DataError` with the line that makes rows out of what was given."""
    if isinstance(data, TaskData):
        return
    if isinstance(data, Task):
        problem = f"a Task ('{data.name}') says how rows are read and has none"
        fix = "load_table(FILE, task=task)"
    else:
        shown = repr(str(data)) if isinstance(data, (str, Path)) else "rows"
        problem = f"train takes a task with its rows (TaskData), not a {type(data).__name__}"
        fix = f"load_table({shown}, text=COLUMN, label=COLUMN), or load_task(NAME) for one that has a name"
    raise DataError(f"{problem}; give {fix}")


def _check_backbone(backbone: Backbone) -> None:
    if backbone.model.training:
        raise ConfigError("the backbone is in training mode (another training run is using it); wait for it to end")
    if backbone.dtype == torch.float16:
        raise ConfigError(
            "gradients underflow on a float16 backbone; load it with dtype='bfloat16' or 'float32', and give "
            "precision='bf16' for mixed precision"
        )


def _check_folder(output: Path, overwrite: bool) -> None:
    """Raise `ConfigError` if training into this folder would destroy something."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir {output} is a file; give a folder")
    foreign = (
        sorted(p.name for p in output.iterdir() if p.name not in _OURS and not _stray(p)) if output.exists() else []
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


def _stray(path: Path) -> bool:
    """Whether a file was half-written when a run was killed."""
    return any(path.name.startswith(f".{ours}.") for ours in _OURS)


def _resolve_layers(
    backbone: Backbone, data: TaskData, method: Method, config: TrainConfig, report: Callable[[str], None] | None
) -> tuple[Method, LayerChoice | None]:
    """The method with layers in place of "semantic", and what they were chosen by."""
    if not method.asks_for_layers:
        return method, None
    choice = choose_layers_for(backbone, data.task, data.train, max_length=min(config.max_length, backbone.max_length))
    if report is not None:
        trained, gain = choice.trained, choice.gains[choice.turn]
        report(
            f"layers {trained[0]} to {trained[-1]} are trained: layer {choice.turn} below them turns most ({gain:.3f})"
        )
    return method.with_layers(choice.trained), choice


def _model(backbone: Backbone, data: TaskData, method: Method, config: TrainConfig) -> TuningModel:
    """Fresh tensors around the backbone; for full fine-tuning around a copy of it."""
    assert config.pooling is not None
    head = Head.for_task(data.task, pooling=config.pooling, dropout=config.head_dropout)
    head_params = head.init(backbone, torch.Generator().manual_seed(config.seed + 2**32))
    params: dict[str, Tensor] = method.init(backbone, torch.Generator().manual_seed(config.seed))
    if method.changes_weights:
        backbone = backbone.clone()
        backbone.to_float32()
        own = dict(backbone.model.named_parameters())
        params = {name: own[name].requires_grad_(True) for name in params}
    if not head_params and not any(map(method.trains, params)):
        raise ConfigError(
            f"{method.title} trains nothing on task '{data.task.name}', whose kind, {data.task.kind}, has no head to "
            f"train; choose a method that changes the backbone, such as lora"
        )
    return TuningModel(
        backbone,
        method,
        params,
        head,
        head_params,
        num_choices=len(data.task.choices) or 1,
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
        label_smoothing=config.label_smoothing,
    )


def _check_smoothing(task: Task, config: TrainConfig) -> None:
    if config.label_smoothing and task.kind != "generation":
        raise ConfigError(
            f"label_smoothing={config.label_smoothing} is for generation, and task '{task.name}' is of kind "
            f"{task.kind}; leave it out"
        )


def _check_prompts(model: TuningModel, splits: Iterable[TaskRows]) -> None:
    """Raise `ConfigError` for vectors that training would put elsewhere than generation, which ends with the prompt."""
    if model.head.kind != "generation":
        return
    places = [a for _, d in model.delta_set().of(Prompt) if isinstance(d, Prompt) for a in d.at]
    if not places:
        return
    shortest = min(len(i) - i.target for rows in splits for i in rows.items)
    if min(places) < 0 or max(places) >= shortest:
        raise ConfigError(
            f"{model.method.title} puts vectors behind the text, or as far as token {max(places)} of prompts of which "
            f"the shortest has {shortest} tokens; where the answer follows, they must stand in front of the prompt's "
            f"last token: give position=0, or a pattern that ends with {{text}}"
        )


def _room(model: TuningModel, config: TrainConfig) -> int:
    """Tokens a text may have beside the prompt."""
    return min(config.max_length, model.backbone.max_length - model.delta_set().num_positions)


def _settings(
    backbone: Backbone, data: TaskData, method: Method, config: TrainConfig, rows: dict[str, TaskRows]
) -> dict[str, Any]:
    """What a resumed run must share with the run it resumes, flat, so that a difference can be named."""
    values = {k: v for k, v in config.to_dict().items() if k not in COSMETIC}
    values |= {"method": method.name} | {f"method.{k}": v for k, v in method.settings().items()}
    values |= {f"task.{k}": v for k, v in data.task.to_dict().items()}
    values |= {"backbone": backbone.fingerprint, "backbone_dtype": str(backbone.dtype)}
    return values | {f"{split}_rows": r.digest for split, r in rows.items()}


def _adapter(
    backbone: Backbone,
    model: TuningModel,
    trainer: TuningTrainer,
    name: str,
    max_length: int,
    facts: dict[str, Any],
) -> Adapter:
    assert trainer.best is not None
    params: Mapping[str, Tensor] = {
        k.removeprefix("method."): t for k, t in trainer.best.items() if k.startswith("method.")
    }
    if model.method.changes_weights:
        before = dict(backbone.model.named_parameters())
        params = {k: t for k, t in params.items() if not torch.equal(t, before[k].detach().float().cpu())}
    with torch.no_grad():
        method, params = model.method.finish(params, backbone)
    recipe = {k: v for k, v in trainer.config.to_dict().items() if k not in COSMETIC} | facts
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


def _history(trainer: TuningTrainer) -> list[dict[str, float]]:
    """The trainer's log, one entry per step."""
    wanted = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    by_step: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        kept = {k: v for k, v in entry.items() if k in wanted or k.startswith("eval_")}
        if "loss" in kept or "eval_loss" in kept:
            by_step.setdefault(int(entry["step"]), {}).update(kept)
    # In one order, whether the entry comes from this process or from a checkpoint.
    order = [*wanted, *sorted({k for e in by_step.values() for k in e} - set(wanted))]
    return [{k: by_step[step][k] for k in order if k in by_step[step]} for step in sorted(by_step)]


def _publish(
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
        if _stray(leftover):
            leftover.unlink()
    checkpoints.finish(keep=keep)
    return replace(adapter, path=output.absolute(), digest=saved.digest)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # no such module on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
