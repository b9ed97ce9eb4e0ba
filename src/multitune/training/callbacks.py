"""What happens after the steps of a run: what is due, what the method changes, what is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from multitune.training.config import TrainConfig
from multitune.training.model import TuningModel

#: Points of the training curve; a longer run averages its loss over several steps.
_POINTS = 200


def callbacks_of(
    model: TuningModel,
    config: TrainConfig,
    metric: str,
    steps_per_epoch: int,
    max_steps: int,
    report: Callable[[str], None] | None,
) -> list[TrainerCallback]:
    """The callbacks of one run.

    Args:
        metric: the one by which the run keeps its best tensors.
        report: called with a line after each evaluation, unless a bar shows it.
    """
    rhythm = _Rhythm(steps_per_epoch, max_steps, config.evaluations_per_epoch)
    callbacks: list[TrainerCallback] = [rhythm, _AfterStep(model, max_steps)]
    if config.progress:
        callbacks.append(Bar(metric))
    if report is not None and not (config.progress and Console(stderr=True).is_terminal):
        callbacks.append(_Lines(metric, report))
    return callbacks


class _Rhythm(TrainerCallback):
    """Says after which steps to log, to evaluate and to save."""

    def __init__(self, steps_per_epoch: int, max_steps: int, evaluations_per_epoch: int) -> None:
        parts = range(1, evaluations_per_epoch + 1)
        self.in_epoch = {round(steps_per_epoch * k / evaluations_per_epoch) for k in parts} - {0}
        self.steps_per_epoch = steps_per_epoch
        self.max_steps = max_steps
        self.log_every = math.ceil(max_steps / _POINTS)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        in_epoch = (step - 1) % self.steps_per_epoch + 1
        evaluate = in_epoch in self.in_epoch or step >= self.max_steps
        control.should_log = evaluate or step % self.log_every == 0
        control.should_evaluate = control.should_save = evaluate


class _AfterStep(TrainerCallback):
    """Lets the method change its tensors after each optimizer step, while the gradients are still there."""

    def __init__(self, model: TuningModel, num_steps: int) -> None:
        self.model = model
        self.num_steps = num_steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.model.method.after_step(self.model.own(), state.global_step + 1, self.num_steps)


class _Lines(TrainerCallback):
    """A line after each evaluation."""

    def __init__(self, metric: str, report: Callable[[str], None]) -> None:
        self.metric = metric
        self.report = report

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        found = f"{self.metric} {metrics[f'eval_{self.metric}']:.3f}, loss {metrics['eval_loss']:.4g}"
        self.report(f"step {state.global_step} of {state.max_steps}: {found}")


class Bar(TrainerCallback):
    """A progress bar on standard error, if that is a terminal."""

    def __init__(self, metric: str) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
        self.metric = metric
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task: TaskID | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, shown="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.task is not None
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert self.task is not None
        for key in ("loss", f"eval_{self.metric}"):
            if logs and key in logs:
                self.shown[key.removeprefix("eval_")] = f"{logs[key]:.4g}"
        self.bar.update(self.task, shown=", ".join(f"{k} {v}" for k, v in self.shown.items()))

    def close(self) -> None:
        """Leave the terminal in order, also after an error."""
        self.bar.stop()
