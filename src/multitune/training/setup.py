"""What a training run needs before its first step: arguments checked, tensors made, rows read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multitune.adapter import CONFIG_FILE, Adapter
from multitune.answers import settle_format
from multitune.backbone import Backbone, check_is_backbone
from multitune.deltas import Prompt
from multitune.errors import AdapterError, ConfigError, DataError
from multitune.heads import Head
from multitune.layers import LayerChoice, choose_layers_for
from multitune.methods import Method, get_method, make_method, method_names
from multitune.quantized import check_trains
from multitune.ranked import PatternReader
from multitune.tasks import Task, TaskData
from multitune.training.checkpoints import Checkpoints, differences
from multitune.training.config import LOSS_NAMES, TrainConfig, parse_losses
from multitune.training.data import Item, TaskRows, order_of
from multitune.training.distill import TextTeacher, teacher_scores
from multitune.training.idle import refuse_idle
from multitune.training.model import TuningModel
from multitune.training.packing import check_packing, saving
from multitune.training.publish import HISTORY_FILE, JOB_FILE, best_adapter, check_folder, publish
from multitune.training.results import TrainResult, history_of, peak_memory
from multitune.training.trainer import TuningTrainer
from multitune.training.written import check_judged_by_texts, judge_of_run


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run that can begin."""

    model: TuningModel
    rows: dict[str, TaskRows]
    """By split."""
    max_length: int
    prompt_length: int
    """Vectors that the method puts into every row beside its tokens."""
    checkpoints: Checkpoints | None
    settings: dict[str, Any]
    """What a resumed run must share, see `Checkpoints.open`."""
    facts: dict[str, int]
    """What a recipe says beside the settings."""
    overwrite: bool
    packed: str | None = None
    """A line about what packing saves, if the run packs."""

    @property
    def remarks(self) -> list[str]:
        """What is said of the rows before the first step."""
        return [line for line in (self.shortened, self.packed) if line is not None]

    @property
    def shortened(self) -> str | None:
        """A line about rows that are longer than what the run reads of them, if there are any."""
        named = {"train": "training"}
        cut = [f"{r.num_cut:,} of {len(r):,} {named.get(s, s)} rows" for s, r in self.rows.items() if r.num_cut]
        if not cut:
            return None
        positions = self.model.backbone.max_length
        asked = self.settings["max_length"]  # of which the backbone and a prompt may leave less
        if self.max_length < asked or asked == positions:
            fix = f"the backbone's {positions:,} positions leave no more"
        else:
            fix = f"max_length (--max-length) raises that, up to the backbone's {positions:,} positions"
        return f"{' and '.join(cut)} are longer than {self.max_length:,} tokens, and what is beyond is not read; {fix}"

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
        if not job:  # jobs share settings, so that some may have no use for one
            refuse_idle(backbone, data.task, config)
        config = replace(config, pooling=config.pooling or backbone.default_pooling)
        output = None if output_dir is None else Path(output_dir)
        if output is not None:
            check_folder(output, overwrite or (job and (output / JOB_FILE).exists()))
        _check_backbone(backbone)
        data = replace(data, task=settle_format(backbone, data.task))
        _check_smoothing(data.task, config)
        check_judged_by_texts(data.task, config)
        config = _settle_losses(backbone, data.task, config)
        chosen, choice = _resolve_layers(backbone, data, chosen, config, report)
        chosen = chosen.with_labels(data.task.labels)
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
        first = model.checked_delta_set()
        max_length = min(self.config.max_length, backbone.max_length - first.num_positions)
        if self.config.packing:
            check_packing(self.method, first)
        read = read or partial(read_rows, backbone)
        teachers = self._text_teachers()
        rows = {
            split: self._read_split(read, split, max_length, teachers.get(split)) for split in ("train", "validation")
        }
        # Only now: how long rows may be comes from the model's deltas.
        model.head = model.head.fitted(item.target for item in rows["train"].items)
        _check_prompts(model, rows.values())
        packed = None
        if self.config.packing:
            order = order_of(rows["train"], self.config)
            packed = saving(order.lengths, order, max_length, self.config.batch_size)
        for split, teacher in teachers.items():
            rows[split] = rows[split].with_teacher(teacher.teach(rows[split]))
        if self.config.distills and not teachers:
            rows["train"] = rows["train"].with_teacher(teacher_scores(backbone, data.task, data.train, self.config))
        facts = {
            "num_train": len(rows["train"]),
            "num_validation": len(rows["validation"]),
            "trained_parameters": model.num_trained,
        }
        units = {f"head.{k}": v for k, v in model.head.settings().items() if k.startswith("target_")}
        settings = _settings(backbone, data, self.method, self.config, rows) | units | facts
        return Opened(
            model=model,
            rows=rows,
            max_length=max_length,
            prompt_length=first.prompt_length,
            checkpoints=None if self.output is None else Checkpoints(self.output),
            settings=settings,
            facts=facts,
            overwrite=self.overwrite,
            packed=packed,
        )

    def _text_teachers(self) -> dict[str, TextTeacher]:
        """By split the teacher of a task that writes; none where the run has no such teacher."""
        if not self.config.distills or self.data.task.kind != "generation":
            return {}
        return {s: TextTeacher(self.backbone, self.data, s, self.config) for s in ("train", "validation")}

    def _read_split(
        self,
        read: Callable[[Task, Any, str, int], TaskRows],
        split: str,
        max_length: int,
        teacher: TextTeacher | None,
    ) -> TaskRows:
        """The rows with their own answers, or with those that a teacher writes."""
        task, table = self.data.task, self.data.train if split == "train" else self.data.validation
        if teacher is None or self.config.distill_new_tokens is None:
            return read(task, table, split, max_length)
        answers = teacher.write()
        return TaskRows(self.backbone, task, table, max_length=max_length, split=split, answers=answers)

    def close(self, opened: Opened, trainer: TuningTrainer, start: float, *, job: bool = False) -> TrainResult:
        """Save what a run that has ended leaves.

        Args:
            start: `time.perf_counter()` when it began.
            job: note in the folder which settings it was, for `train_many` to know it again.
        """
        model = opened.model
        choice = {} if self.choice is None else {"layer_choice": self.choice.to_dict()}
        adapter = best_adapter(self.backbone, model, trainer, self.name, opened.max_length, opened.facts | choice)
        history = history_of(trainer)
        if self.output is not None and opened.checkpoints is not None:
            settings = opened.settings if job else None
            adapter = publish(
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
            peak_memory_bytes=peak_memory(self.backbone.device),
            cached_bytes=trainer.cached_bytes,
            layer_choice=self.choice,
        )

    def finished(self, settings: Mapping[str, Any]) -> TrainResult | None:
        """The result in the output folder, if a job of just these settings ended there.

        Raises:
            ConfigError: one of other settings did; names them.
            AdapterError: what it left is damaged; names the file.
        """
        if self.output is None or self.overwrite or not (self.output / CONFIG_FILE).exists():
            return None
        adapter = Adapter.load(self.output, self.backbone)
        job, history = _noted(self.output / JOB_FILE), _noted(self.output / HISTORY_FILE)
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
            history=history,
            seconds=0.0,
            metric=judge_of_run(adapter.task, self.config),
            best_metric=adapter.metrics[judge_of_run(adapter.task, self.config)],
            best_step=recipe["best_step"],
            num_steps=recipe["steps"],
            num_method_parameters=recipe["trained_parameters"],
            num_head_parameters=adapter.num_head_parameters,
            peak_memory_bytes=peak_memory(self.backbone.device),
            layer_choice=self.choice,
        )


def _noted(file: Path) -> Any:
    """What a finished run noted beside its adapter."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{file} is damaged: {error}; give overwrite=True (overwrite: true) to train the adapter beside it anew, "
            f"or another folder"
        ) from error


def read_rows(backbone: Backbone, task: Task, table: Any, split: str, max_length: int) -> TaskRows:
    """The rows of one split, tokenized."""
    return TaskRows(backbone, task, table, max_length=max_length, split=split)


def check_backbone_and_method(backbone: Any, method: Any) -> None:
    """Raise `ConfigError` with the line that makes a backbone, or a method, out of what was given instead."""
    check_is_backbone("train", backbone, "once for all runs")
    if isinstance(method, type) and issubclass(method, Method):
        raise ConfigError(f"{method.__name__} is a class of methods; give a method: {method.__name__}()")
    if not isinstance(method, (Method, str)):
        raise ConfigError(
            f"train takes a method or the name of one, not a {type(method).__name__}; give LoRA(r=8) or 'lora'"
        )


def refuse_hyper_parameters(method: Method | str, overrides: Iterable[str]) -> None:
    """Raise `ConfigError` for a hyper-parameter of the method among the training settings."""
    if isinstance(method, str) and method not in method_names():
        return  # several methods, or none: it is refused, or its parts are, by who makes the method
    cls = get_method(method) if isinstance(method, str) else type(method)
    own = {f.name for f in fields(cls)}
    for key in overrides:
        if key in own and key not in TrainConfig.names():
            raise ConfigError(
                f"no training setting '{key}': {key} is a hyper-parameter of {cls.name}; give it to the method, "
                f"{cls.__name__}({key}=...)"
            )


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
    check_trains_something(data.task, method, params, head_params)
    return TuningModel(
        backbone,
        method,
        params,
        head,
        head_params,
        num_choices=len(data.task.choices) or 1,
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
        label_smoothing=config.label_smoothing,
        losses=parse_losses(config.losses) if config.losses is not None else (),
        distill_weight=config.distill_weight,
    )


def check_trains_something(task: Task, method: Method, names: Iterable[str], head_names: Collection[str]) -> None:
    """Raise `ConfigError` where neither the method, with tensors of these names, nor the head has any to train."""
    if not head_names and not any(map(method.trains, names)):
        what = f"kind, {task.kind}, has" if task.pattern is None else "pattern leaves"
        raise ConfigError(
            f"{method.title} trains nothing on task '{task.name}', whose {what} no head to train; choose a method "
            f"that changes the backbone, such as lora"
        )


def _check_smoothing(task: Task, config: TrainConfig) -> None:
    if config.label_smoothing and task.kind != "generation":
        raise ConfigError(
            f"label_smoothing={config.label_smoothing} is for generation, and task '{task.name}' is of kind "
            f"{task.kind}; leave it out"
        )


def _settle_losses(backbone: Backbone, task: Task, config: TrainConfig) -> TrainConfig:
    """The settings with the usual losses where a pattern needs some.

    Raises:
        ConfigError: settings of a pattern for a task without one, or a distillation that cannot be.
        BackboneError, TaskError: the backbone cannot answer in the pattern.
    """
    written = task.kind == "generation"
    if config.distill_new_tokens is not None and not written:
        raise ConfigError(
            f"distill_new_tokens={config.distill_new_tokens} is for generation, and task '{task.name}' is of kind "
            f"{task.kind}; leave it out"
        )
    if task.pattern is None:
        of_patterns = ("losses",) if written else ("losses", "distill_examples", "distill_instruction")
        given = [name for name in of_patterns if getattr(config, name) is not None]
        if given:
            raise ConfigError(
                f"{given[0]}={getattr(config, given[0])!r} is for tasks with a pattern, and task '{task.name}' has "
                f"none; give it one, data.with_pattern(Pattern(...)) (--pattern), or leave {given[0]} out"
            )
        return config
    PatternReader(backbone, task)
    if config.distills and not backbone.writes:
        asked = "distill_instruction" if config.distill_examples is None else "distill_examples"
        raise ConfigError(
            f"{asked}={getattr(config, asked)!r}: backbone '{backbone.name}' is a masked language model, and "
            f"context distillation needs a causal one or an encoder-decoder, which read examples as they read texts; "
            f"leave it out, or take smollm2"
        )
    return replace(config, losses=config.losses or "+".join(LOSS_NAMES if backbone.writes else ("choice",)))


def _check_prompts(model: TuningModel, splits: Iterable[TaskRows]) -> None:
    """Raise `ConfigError` for vectors that training would put elsewhere than generation, which ends with the prompt."""
    writes = model.head.kind == "generation" or (model.head.kind == "ranking" and model.backbone.causal)
    if not writes or model.backbone.decodes:  # a decoder's answer never stands behind the prompt
        return
    places = [a for _, d in model.delta_set().of(Prompt) if isinstance(d, Prompt) for a in d.at]
    if not places:
        return
    shortest = min(_prompt_length(i) for rows in splits for i in rows.items)
    if min(places) < 0 or max(places) >= shortest:
        raise ConfigError(
            f"{model.method.title} puts vectors behind the text, or as far as token {max(places)} of prompts of which "
            f"the shortest has {shortest} tokens; where the answer follows, they must stand in front of the prompt's "
            f"last token: give position=0, or a pattern that ends with {{text}}"
        )


def _prompt_length(item: Item) -> int:
    """Tokens in front of the answers."""
    if item.ranked is None:
        return len(item) - int(item.target)
    return min(choice.places[0] for choice in item.ranked.choices) + 1


def _settings(
    backbone: Backbone, data: TaskData, method: Method, config: TrainConfig, rows: dict[str, TaskRows]
) -> dict[str, Any]:
    """What a resumed run must share with the run it resumes, flat, so that a difference can be named."""
    values = config.identity()
    values |= {"method": method.name} | {f"method.{k}": v for k, v in method.settings().items()}
    values |= {f"task.{k}": v for k, v in data.task.to_dict().items()}
    values |= {"backbone": backbone.fingerprint, "backbone_dtype": str(backbone.dtype)}
    return values | {f"{split}_rows": r.digest for split, r in rows.items()}
