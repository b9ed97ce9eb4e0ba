"""Context distillation: what the frozen backbone chooses when it reads examples, as a target for one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multitune.backbone import Backbone
from multitune.prompting.ranking import rank
from multitune.prompting.selection import RandomExamples
from multitune.tasks import Task
from multitune.training.config import TrainConfig


def teacher_scores(backbone: Backbone, task: Task, table: Any, config: TrainConfig) -> tuple[tuple[float, ...], ...]:
    """Per row the scores β of its answers with `config.distill_examples` other rows of the table in front of it.

    The teacher of Askell et al. 2021 (arXiv 2112.00861, section 2.1): the frozen backbone with the context. It runs
    once, before training, and without dropout. The examples are the same for all rows, so that they are read once,
    except where one of them is the row itself or reads like it.

    Raises:
        DataError: fewer rows than examples, or examples that do not fit the backbone's positions; names the row.
    """
    assert task.pattern is not None and config.distill_examples is not None
    rows = task.rows(table)
    distinct = {_key(row): row for row in rows}  # a table may hold a row many times, which the teacher reads once
    examples = RandomExamples(list(distinct.values()), config.distill_examples, seed=config.seed)
    was_training = backbone.model.training
    backbone.model.eval()
    try:
        asked = list(distinct.values())
        found = rank(backbone, task, task.pattern, asked, examples=examples, batch_size=config.eval_batch_size)
    finally:
        backbone.model.train(was_training)
    scores = dict(zip(distinct, found.scores, strict=True))
    return tuple(scores[_key(row)] for row in rows)


def _key(row: Mapping[str, Any]) -> str:
    return repr(sorted(row.items()))
