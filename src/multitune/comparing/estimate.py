"""How long a comparison will take: a few steps of one method on each task are timed, and the rest is counted.

What is timed are differences of short runs, which on a machine that others use too say more about the others than about
the runs. So a run's parts are told by processor time, and wall time follows from how much of it all runs took together.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from multitune.backbone import Backbone
from multitune.comparing.execute import OF_A_TRIAL, tidy
from multitune.comparing.trials import Plan, Rows
from multitune.errors import DataWarning, MultituneError
from multitune.tasks import TaskData
from multitune.training import TrainConfig, train
from multitune.training.failures import as_ours
from multitune.training.idle import without_idle

#: The method that is timed: neither the lightest nor the heaviest.
_METHOD = "lora"
#: A step of full fine-tuning has the gradients of all weights too.
_FULL = 1.5
#: Wall time is called waiting where it is more than so many times the processor time.
_MUCH = 1.3
_STEPS = 3
_ROWS = 32
#: Settings that the time of a step depends on.
_OF_A_STEP = ("batch_size", "eval_batch_size", "max_length", "precision", "gradient_checkpointing", "packing")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of processor time."""

    fixed: float
    """Of a run, whatever its length."""
    step: float
    """Of a batch of training."""
    batch_size: int
    """Rows of that batch."""
    row: float
    """Of a row that is judged."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run took, or what runs are estimated to take."""

    seconds: float
    """Wall time, the machine as busy as it is now."""
    processor: float
    """Processor time, of all threads together."""

    @property
    def is_waiting(self) -> bool:
        """Whether much of the wall time goes to what else the machine does."""
        return self.seconds > _MUCH * self.processor

    def __mul__(self, factor: float) -> Spent:
        return Spent(seconds=factor * self.seconds, processor=factor * self.processor)


def estimate(plan: Plan) -> Spent | MultituneError:
    """Estimated time of all trials of a plan in one process, or why the runs failed that would tell it.

    Rough: the methods differ by a third, and text that is written to be judged is not counted.
    """
    costs = {id(cell.draws[0]): cell.draws[0] for cell in plan.cells}
    spent: list[Spent] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # the plan has warned of the rows, once
            timed = {key: _cost(plan.backbone, rows, spent) for key, rows in costs.items()}
    except (MultituneError, *OF_A_TRIAL) as error:  # the fault of what is timed; trials of other methods may well run
        tidy(plan.backbone)
        return as_ours(error)
    processor = _processor(plan, timed)
    pace = math.fsum(s.seconds for s in spent) / max(1e-9, math.fsum(s.processor for s in spent))
    return Spent(seconds=pace * processor, processor=processor)


def _processor(plan: Plan, timed: Mapping[int, Cost]) -> float:
    """Processor time of all trials; costs by the id of a task's rows."""
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
    step = cost.step * config.batch_size / cost.batch_size
    return cost.fixed + factor * step * steps * config.gradient_accumulation + cost.row * judged


def _cost(backbone: Backbone, rows: Rows, spent: list[Spent]) -> Cost:
    """What a run on these rows consists of; what the runs took that tell it is added to `spent`."""

    def processor(steps: int, judged: int) -> float:
        spent.append(_time(backbone, rows, steps, judged))
        return spent[-1].processor

    _time(backbone, rows, 1, 1)  # what is done the first time alone, on every task: its shapes are new
    short = processor(1, 1)
    step = _each(processor(1 + _STEPS, 1), short, _STEPS)
    judged = min(1 + _ROWS, len(rows.data.validation))
    row = _each(processor(1, judged), short, judged - 1) if judged > 1 else 0.0
    batch_size = TrainConfig.from_dict(_of_a_step(rows)).batch_size
    row = min(row, step / batch_size)  # which has the gradients too
    return Cost(fixed=max(0.0, short - step), step=step, batch_size=batch_size, row=row)


def _each(long: float, short: float, more: int) -> float:
    """Seconds of one of `more` things that the longer run did beside what the short one did.

    Of two short runs the longer one may be the quicker. Nothing is known of its parts then but that they took no
    longer than all of it, which estimates too much rather than nothing at all.
    """
    return (long - short if long > short else long) / more


def _time(backbone: Backbone, rows: Rows, steps: int, judged: int) -> Spent:
    """What a run of so many steps takes that is judged by so many rows."""
    config = TrainConfig.from_dict({**_of_a_step(rows), "max_steps": steps, "progress": False})
    config = without_idle(backbone, rows.data.task, config)  # tasks of several kinds share settings
    data = _few(rows.data, config.batch_size * (1 + _STEPS), judged)
    start, processor = time.perf_counter(), time.process_time()
    train(backbone, data, _METHOD, config=config)
    return Spent(seconds=time.perf_counter() - start, processor=time.process_time() - processor)


def _of_a_step(rows: Rows) -> dict[str, Any]:
    return {name: value for name, value in rows.training.items() if name in _OF_A_STEP}


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
