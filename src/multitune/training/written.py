"""Judging a run by texts: what the tensors write now for rows of the validation split, as the adapter would be served.

The texts are those that `evaluate_texts` gets from the finished adapter: greedy, in the backbone's own number type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multitune.backbone import Backbone
from multitune.batching import Encoded, pad
from multitune.errors import ConfigError
from multitune.generation.evaluation import examples_by_prompt
from multitune.generation.prompts import encode_rows, prompt_room
from multitune.generation.settings import Generation, GenerationSettings
from multitune.plan import DeltaSet, Plan
from multitune.tasks import Example, Task, compute, higher_is_better
from multitune.tasks.metrics import judge_of_training
from multitune.training.config import TrainConfig
from multitune.training.model import TuningModel


def check_judged_by_texts(task: Task, config: TrainConfig) -> None:
    """Refuse `eval_texts` where nothing is written, or where the metric judges no texts.

    Raises:
        ConfigError: so it is, or the library that computes the metric is not installed.
    """
    if not config.eval_texts:
        return
    if config.distill_new_tokens is not None:
        raise ConfigError(
            f"eval_texts={config.eval_texts} judges texts by the rows' own answers, in place of which the teacher of "
            f"distill_new_tokens={config.distill_new_tokens} writes others; leave one of them out"
        )
    if task.kind != "generation":
        raise ConfigError(
            f"eval_texts={config.eval_texts} is for generation, and task '{task.name}' is of kind {task.kind}; leave "
            f"it out"
        )
    if task.metric == "perplexity":
        raise ConfigError(
            f"eval_texts={config.eval_texts}: perplexity judges no texts; give task '{task.name}' a metric that does, "
            f"such as metric='rouge_l' (--metric rouge_l), or leave eval_texts out"
        )
    reference = "1"  # a number is a text, and number_match needs one
    compute(task.metric, [reference], [reference])  # says now, and not after an epoch, that a library is missing


#: What judges a run that distils texts: its own loss, on the validation rows. A teacher need not find likely what the
#: rows have for answers, so that perplexity could keep the tensors that learnt least of it.
DISTILLATION = "distillation"


def judge_of_run(task: Task, config: TrainConfig) -> str:
    """The metric by which a run keeps its best tensors; "" for a task that none judges."""
    if config.distills and task.kind == "generation" and not config.eval_texts:
        return DISTILLATION
    return judge_of_training(task.metric, by_texts=bool(config.eval_texts)) if task.metric else ""


def rises(metric: str) -> bool:
    """Whether more is better of what `judge_of_run` gives."""
    return metric != DISTILLATION and higher_is_better(metric)


@dataclass(frozen=True, kw_only=True)
class TextJudge:
    """The rows that every evaluation of one run writes for."""

    task: Task
    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    references: tuple[tuple[str, ...], ...]
    """Per prompt all answers that are right."""
    num_tokens: int
    """Most tokens to write for a prompt."""
    batch_size: int

    @classmethod
    def of_run(cls, model: TuningModel, task: Task, examples: Sequence[Example], config: TrainConfig) -> TextJudge:
        """The first `config.eval_texts` prompts of the examples, each with the answers of all rows that have it.

        Raises:
            ConfigError: the backbone has no room for so many new tokens.
        """
        backbone = model.backbone
        wanted = examples_by_prompt(examples)
        inserted = model.delta_set().num_positions
        positions = backbone.max_length - inserted
        if positions - (0 if backbone.decodes else config.eval_new_tokens) < 1:
            raise ConfigError(
                f"eval_new_tokens={config.eval_new_tokens} leaves no room for a prompt in the {backbone.max_length} "
                f"positions of backbone '{backbone.name}'; lower it"
            )
        room = prompt_room(backbone, inserted, config.eval_new_tokens, min(config.max_length, positions))
        kept = list(wanted)[: config.eval_texts]
        # The texts of examples are rendered already.
        verbatim = Task.from_dict({**task.to_dict(), "template": ["{prompt}"], "label": ""})
        rows = [{"prompt": text} for text in kept]
        return cls(
            task=task,
            prompts=tuple(encode_rows(backbone, verbatim, rows, room, "validation prompt")),
            references=tuple(wanted[text] for text in kept),
            num_tokens=config.eval_new_tokens,
            batch_size=config.eval_batch_size,
        )

    def scores(self, model: TuningModel) -> dict[str, float]:
        """The task's metric, and its parts, of what the model writes now."""
        return compute(self.task.metric, self.write(model), list(self.references))

    def write(self, model: TuningModel) -> list[str]:
        """One text per prompt; the model is put into evaluation, and no random number is drawn."""
        model.eval()
        backbone = model.backbone
        deltas: DeltaSet | None = None
        if not model.method.changes_weights:
            with torch.no_grad():
                deltas = model.delta_set().fused(backbone.dtype, backbone.device)
        settings = [GenerationSettings(max_new_tokens=self.num_tokens)] * len(self.prompts)
        found = write_rows(backbone, deltas, self.prompts, settings, batch_size=self.batch_size)
        return [written.text.strip() for written in found]


def write_rows(
    backbone: Backbone,
    deltas: DeltaSet | None,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[GenerationSettings],
    *,
    batch_size: int,
) -> list[Generation]:
    """What is written behind prompts, all under the same deltas; prompts of similar length run together.

    Args:
        prompts: token ids, and of each of them the `settings`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Generation] = {}
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = pad([Encoded(input_ids=list(prompts[i])) for i in picked], backbone.pad_id)
        plan = Plan([deltas] * len(picked))
        written = backbone.generate(plan, batch.input_ids, batch.attention_mask, [settings[i] for i in picked])
        found |= dict(zip(picked, written, strict=True))
    return [found[i] for i in range(len(order))]
