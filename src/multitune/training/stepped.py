"""One run of a `TuningTrainer`, cut open at its forward and backward pass, which it may so share with others.

Order of the rows, accumulation, clipping, optimizer, schedule, hooks of the method, log, evaluation, early stopping and
checkpoints are those of the trainer, step by step; only who runs the model is left open.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers.trainer_callback import ExportableState, TrainerState

from multitune.errors import ConfigError
from multitune.training.checkpoints import TRAINER_FILE
from multitune.training.streams import RandomStream
from multitune.training.trainer import TuningTrainer


class SteppedRun:
    """Where a run stands: the batch that it needs gradients of next."""

    def __init__(self, trainer: TuningTrainer, prompt_length: int) -> None:
        """
        Args:
            trainer: just made, so that the global random numbers are those of its seed.
            prompt_length: vectors that its method puts into every row.
        """
        self.trainer = trainer
        last, self.finished = trainer.open_checkpoint()
        self.stream = RandomStream(trainer.tuned.backbone.device)
        """Every random number of this run."""
        lsg = trainer.tuned.backbone.lsg
        self._beside_tokens = prompt_length + (0 if lsg is None else lsg.num_global)
        self.apart: object | None = None
        """Where set: it shares no pass, and which failed pass it shared last, by a mark of that pass."""
        self._pending: list[dict[str, Tensor]] = []
        self._taken = 0
        self._num_items = 0
        self._stepped = (torch.zeros(()), 0.0)
        """Norm of the gradient and learning rate of the last step."""
        if not self.finished:
            self._begin(last)
            self._next_step()

    @property
    def batch(self) -> dict[str, Tensor]:
        """What the model is to be called with next."""
        return self._pending[self._taken]

    @property
    def width(self) -> int:
        """Columns of `batch` in a pass: with the vectors of a prompt, and a converted backbone's global tokens."""
        return int(self.batch["input_ids"].shape[1]) + self._beside_tokens

    @property
    def num_items(self) -> int:
        """Terms of the loss in all batches of this optimizer step."""
        return self._num_items

    def took(self, loss: Tensor) -> None:
        """The gradients of `batch` were added up: with those of a whole step, the optimizer takes it.

        Runs side by side may do this at the same time. `go_on` comes next, whatever was due.

        Args:
            loss: its share of the loss, a scalar.

        Raises:
            ConfigError: the run has diverged.
            Exception: whatever hooks of its method raise.
        """
        self._loss += loss.detach().to(self._loss.device)
        self._taken += 1
        if self._taken == len(self._pending):
            self._step()

    def go_on(self) -> None:
        """Log, evaluate and save where it is time to, and make the next batches.

        No pass may be under way: the backbone is switched for an evaluation, and random numbers are this run's without
        a lock, which a caller who trains in turn when told of the evaluation would wait for.

        Raises:
            ConfigError: the run has diverged.
            Exception: whatever its metric, or writing its checkpoint raise.
        """
        if self._taken < len(self._pending):
            return
        with self.stream.only_one():
            self._report(*self._stepped)
        self.finished = bool(self.trainer.control.should_training_stop)
        if not self.finished:
            self._next_step()

    def restart(self, apart: object) -> None:
        """Begin this optimizer step again, and share no pass while `apart` is set: one that it shared has failed."""
        assert self.trainer.optimizer is not None
        self.trainer.optimizer.zero_grad()
        stream, loss = self._at_start
        self.stream, self._loss, self._taken = stream.copy(), loss.clone(), 0
        self.apart = apart

    # ---------------------------------------------------------------- inside

    def _begin(self, last: Path | None) -> None:
        t = self.trainer
        exported = [cb for cb in [*t.callback_handler.callbacks, t.control] if isinstance(cb, ExportableState)]
        t.state = TrainerState(stateful_callbacks=exported)  # type: ignore[arg-type]
        if last is not None:
            t.state = TrainerState.load_from_json(str(last / TRAINER_FILE))
            t._load_from_checkpoint(str(last))
        t.state.max_steps, t.state.train_batch_size = t.max_steps, t.config.batch_size
        t.state.num_train_epochs = math.ceil(t.max_steps / t.steps_per_epoch)
        t.create_optimizer()
        t.create_scheduler(num_training_steps=t.max_steps)
        if last is not None:
            t._load_optimizer_and_scheduler(str(last))
            with self.stream.drawing_all():
                t._load_rng_state(str(last))
        t.control = t.callback_handler.on_train_begin(t.args, t.state, t.control)
        self._loss = torch.zeros((), device=t.args.device)
        self._logged_step = t.state.global_step

    def _next_step(self) -> None:
        """Make the batches of the next optimizer step."""
        t = self.trainer
        per_step = t.config.gradient_accumulation
        epoch, step = divmod(t.state.global_step, t.steps_per_epoch)
        if step == 0 or not hasattr(self, "_batches"):
            t.loader.set_epoch(epoch)
            self._batches = list(t.loader.order)
        picked = self._batches[step * per_step : (step + 1) * per_step]
        self._pending = [t.collator([t.train_rows[i] for i in rows]) for rows in picked]
        self._taken = 0
        self._at_start: tuple[RandomStream, Tensor] = self.stream.copy(), self._loss.clone()
        self._num_items = t._get_num_items_in_batch(self._pending, t.args.device)
        self._epoch = epoch + min(len(self._batches), (step + 1) * per_step) / len(self._batches)
        t.control = t.callback_handler.on_step_begin(t.args, t.state, t.control)

    def _step(self) -> None:
        """One step of the optimizer."""
        t = self.trainer
        optimizer, scheduler, callbacks = t.optimizer, t.lr_scheduler, t.callback_handler
        assert optimizer is not None and scheduler is not None
        norm = clip_grad_norm_(t.tuned.parameters(), t.config.max_grad_norm or math.inf)
        if not bool(torch.isfinite(norm)):
            raise ConfigError(t.diverged(t.state.global_step + 1, f"the norm of the gradient is {float(norm)}"))
        optimizer.step()
        with self.stream.drawing_all():
            t.control = callbacks.on_optimizer_step(t.args, t.state, t.control)
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        optimizer.zero_grad()
        t.state.global_step += 1
        t.state.epoch = self._epoch
        t.control = callbacks.on_step_end(t.args, t.state, t.control)
        self._stepped = norm, float(rate)

    def _report(self, norm: Tensor, rate: float) -> None:
        """Log, evaluate and save where it is time to."""
        t = self.trainer
        if t.control.should_log:
            steps = t.state.global_step - self._logged_step
            t.log({"loss": self._loss.item() / steps, "grad_norm": norm.item(), "learning_rate": rate})
            self._loss.zero_()
            self._logged_step = t.state.global_step
        if t.control.should_evaluate:
            t._determine_best_metric(t.evaluate(), None)
        if t.control.should_save:
            t._save_checkpoint(t.tuned, None)
            t.control = t.callback_handler.on_save(t.args, t.state, t.control)
