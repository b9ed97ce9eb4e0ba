"""Judging a run by texts: what the tensors write now for rows of the validation split, as the adapter would be served.

The texts are those that `evaluate_texts` gets from the finished adapter: greedy, in the backbone's own number type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multitune.errors import ConfigError
from multitune.generation.evaluation import examples_by_prompt
from multitune.generation.prompts import encode_rows, prompt_room
from multitune.plan import DeltaSet, Plan
from multitune.tasks import Example, Task, compute
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


def judge_of_run(task: Task, config: TrainConfig) -> str:
    """The metric by which a run keeps its best tensors; "" for a task that none judges."""
    return judge_of_training(task.metric, by_texts=bool(config.eval_texts)) if task.metric else ""


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
        settings = {"max_new_tokens": self.num_tokens}
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        texts = [""] * len(order)
        for start in range(0, len(order), self.batch_size):
            picked = order[start : start + self.batch_size]
            width = max(len(self.prompts[i]) for i in picked)
            ids, mask = torch.full((len(picked), width), backbone.pad_id), torch.zeros(len(picked), width)
            for row, i in enumerate(picked):
                own = torch.tensor(self.prompts[i])
                ids[row, : len(own)], mask[row, : len(own)] = own, 1
            found = backbone.generate(Plan([deltas] * len(picked)), ids, mask, settings)
            for i, written in zip(picked, found, strict=True):
                texts[i] = written.text.strip()
        return texts
