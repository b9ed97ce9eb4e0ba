"""Settings that nothing in a run reads: refused where given for it, left out where several runs share them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from multitune.backbone import Backbone
from multitune.errors import ConfigError
from multitune.heads import Head
from multitune.tasks import Task
from multitune.training.config import TrainConfig

_TEACHER = ("distill_examples", "distill_instruction")
#: Settings that say how another one is carried out: those of which one asks for that, and what they would do.
_PARTS_OF: dict[str, tuple[tuple[str, ...], str]] = {
    "cache_bytes": (("cache_frozen",), "is the room of a cache, and none was asked for"),
    "eval_new_tokens": (("eval_texts",), "is the length of texts that evaluations write, and none was asked for"),
    "distill_weight": (_TEACHER, "is the share of a distillation, and none was asked for"),
    "distill_new_tokens": (_TEACHER, "is the length of texts that a teacher writes, and there is none"),
}


def idle_settings(backbone: Backbone, task: Task, config: TrainConfig) -> dict[str, str]:
    """What is not as usual and would do nothing: names, each with why and what to do."""
    idle = {}
    for name, (asks, what) in _PARTS_OF.items():
        if getattr(config, name) != getattr(TrainConfig, name) and not any(getattr(config, other) for other in asks):
            idle[name] = f"{what}; give {' or '.join(asks)} too, or leave it out"
    if config.packing and (why := _no_packing(backbone, task, config)):
        idle["packing"] = f"{why}; leave it out"
    head = Head.for_task(task)
    if config.pooling not in (None, backbone.default_pooling) and not head.pools:
        reads = "a head that reads every word by itself" if head.kind == "tagging" else "no head that reads one vector"
        whose = f"task '{task.name}' of kind {task.kind}"
        idle["pooling"] = f"makes one vector of a text, and {whose} has {reads}; leave it out"
    if config.head_dropout != TrainConfig.head_dropout and not head.drops:
        idle["head_dropout"] = f"is for what a head reads, and task '{task.name}' trains no head; leave it out"
    return idle


def _no_packing(backbone: Backbone, task: Task, config: TrainConfig) -> str:
    """Why packing has nothing to pack; empty where it has."""
    if task.kind != "generation":
        return f"puts rows of tasks of kind generation together, and task '{task.name}' is of kind {task.kind}"
    if backbone.decodes:
        return f"puts rows of a causal backbone together, and '{backbone.name}' is an encoder-decoder"
    return "puts rows of one batch together, and batch_size=1 has one" if config.batch_size == 1 else ""


def refuse_idle(backbone: Backbone, task: Task, config: TrainConfig, given: Collection[str] | None = None) -> None:
    """Raise `ConfigError` for an idle setting; where `given` names settings, only for one of these."""
    for name, why in idle_settings(backbone, task, config).items():
        if given is None or name in given:
            raise ConfigError(f"training setting {name}={getattr(config, name)!r} {why}")


def without_idle(backbone: Backbone, task: Task, config: TrainConfig) -> TrainConfig:
    """The settings with the usual values where others would do nothing."""
    return replace(config, **{name: getattr(TrainConfig, name) for name in idle_settings(backbone, task, config)})
