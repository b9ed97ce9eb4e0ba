"""How long a comparison will take: a few steps of one method on each task are timed, and the rest is counted."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from multitune.backbone import Backbone
from multitune.comparing.trials import Plan, Rows
from multitune.tasks import TaskData
from multitune.training import TrainConfig, train

#: The method that is timed: neither the lightest nor the heaviest.
_METHOD = "lora"
#: A step of full fine-tuning has the gradients of all weights too.
_FULL = 1.5
_STEPS = 3
_ROWS = 32
#: Settings that the time of a step depends on.
_OF_A_STEP = ("batch_size", "eval_batch_size", "max_length", "precision", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds."""

    fixed: float
    """Of a run, whatever its length."""
    step: float
    """Of a batch of training."""
    row: float
    """Of a row that is judged."""


def estimate(plan: Plan) -> float:
    """Estimated seconds of all trials of a plan in one process, the machine as busy as it is now.

    Rough: the methods differ by a third, and text that is written to be judged is not counted.
    """
    costs = {id(cell.draws[0]): cell.draws[0] for cell in plan.cells}
    _time(plan.backbone, plan.cells[0].draws[0], 1, 1)  # what is only done the first time
    timed = {key: _cost(plan.backbone, rows) for key, rows in costs.items()}
    search, found = plan.recipe.search, 0.0
    for cell in plan.cells:
        rows, finals = cell.draws[0], len(plan.recipe.seeds) * len(cell.draws)
        each = []
        for point in cell.points:
            config = TrainConfig.from_dict({**rows.training, **cell.method.training(point)})
            factor = _FULL if cell.method.method(point).changes_weights else 1.0
            each.append(_run(config, timed[id(rows)], rows.data, factor))
        if search is None or len(each) == 1:
            found += finals * sum(each)
        else:
            found += statistics.mean(each) * (min(search.trials, len(each)) + finals - 1)
    return found


def _run(config: TrainConfig, cost: Cost, data: TaskData, factor: float) -> float:
    """Seconds of one run."""
    per_epoch = math.ceil(len(data.train) / config.batch_size / config.gradient_accumulation)
    steps = config.max_steps or math.ceil(config.epochs * per_epoch)
    evaluations = max(1, round(steps / per_epoch * config.evaluations_per_epoch))
    judged = (evaluations + 1) * len(data.validation)  # once more for the scores of the rows
    return cost.fixed + factor * cost.step * steps * config.gradient_accumulation + cost.row * judged


def _cost(backbone: Backbone, rows: Rows) -> Cost:
    short = _time(backbone, rows, 1, 1)
    step = _each(_time(backbone, rows, 1 + _STEPS, 1), short, _STEPS)
    judged = min(1 + _ROWS, len(rows.data.validation))
    row = _each(_time(backbone, rows, 1, judged), short, judged - 1) if judged > 1 else 0.0
    return Cost(fixed=max(0.0, short - step), step=step, row=row)


def _each(long: float, short: float, more: int) -> float:
    """Seconds of one of `more` things that the longer run did beside what the short one did.

    On a busy machine the longer run may be the quicker one. Nothing is known of its parts then but that they took no
    longer than all of it, which estimates too much rather than nothing at all.
    """
    return (long - short if long > short else long) / more


def _time(backbone: Backbone, rows: Rows, steps: int, judged: int) -> float:
    """Seconds of a run of so many steps that is judged by so many rows."""
    settings = {name: value for name, value in rows.training.items() if name in _OF_A_STEP}
    config = TrainConfig.from_dict({**settings, "max_steps": steps, "progress": False})
    data = _few(rows.data, config.batch_size * (1 + _STEPS), judged)
    start = time.perf_counter()
    train(backbone, data, _METHOD, config=config)
    return time.perf_counter() - start


def _few(data: TaskData, train_rows: int, validation_rows: int) -> TaskData:
    return replace(
        data,
        train=data.train.select(_spread(len(data.train), train_rows)),
        validation=data.validation.select(_spread(len(data.validation), validation_rows)),
    )


def _spread(count: int, wanted: int) -> Iterable[int]:
    """So many numbers below `count`, evenly apart: tables are often sorted."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]
