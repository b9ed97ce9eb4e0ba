"""The loop: transformers' Trainer with our own order of rows, evaluation, and checkpoints that hold no pickle."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from multitune import heads
from multitune.errors import ConfigError
from multitune.language_loss import perplexity_of
from multitune.tasks import judge
from multitune.training.callbacks import Bar, callbacks_of
from multitune.training.checkpoints import TRAINER_FILE, Checkpoints, random_state, set_random_state
from multitune.training.config import TrainConfig
from multitune.training.data import Collator, RowLoader, TaskRows, num_targets, order_of
from multitune.training.frozen_states import FrozenStates, keep_frozen_states
from multitune.training.gradients import BatchGradients
from multitune.training.model import TuningModel
from multitune.training.process_state import globals_kept
from multitune.training.written import DISTILLATION, TextJudge, judge_of_run, rises

_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class TuningTrainer(Trainer):
    """Trains one `TuningModel`; `train_to_end` leaves the best tensors in `best`."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: TuningModel,
        config: TrainConfig,
        train: TaskRows,
        validation: TaskRows,
        checkpoints: Checkpoints | None,
        scratch: Path,
        report: Callable[[str], None] | None = None,
        states: FrozenStates | None = None,
    ) -> None:
        """
        Args:
            config: resolved, see `TrainConfig.resolve`.
            checkpoints: where to save, `None` to save nothing.
            scratch: an empty folder that transformers may think of as its output.
            report: called with a line when the run resumes, and after each evaluation unless a bar shows it.
            states: what the frozen layers give for every row, if it is kept.
        """
        self.config = config
        self.train_rows = train
        self.validation_rows = validation
        self.checkpoints = checkpoints
        self.metric = judge_of_run(train.task, config)
        self.judge: TextJudge | None = None
        if config.eval_texts:
            self.judge = TextJudge.of_run(model, train.task, validation.examples, config)
        self.report = report
        self.best: dict[str, Tensor] | None = None
        self.best_metrics: dict[str, float] = {}
        kind, backbone = train.task.kind, model.backbone
        self.judged_collator = Collator(kind, backbone.pad_id, states, backbone.start_ids)
        """Of evaluations, whose batches are not packed."""
        room = train.max_length if config.packing else None
        self.collator = Collator(kind, backbone.pad_id, states, backbone.start_ids, room)
        self.cached_bytes = 0 if states is None else states.nbytes
        order = order_of(train, config)
        self.loader = RowLoader(train, order, self.collator)
        steps_per_epoch = max(1, math.ceil(len(order) / config.gradient_accumulation))
        self.steps_per_epoch = steps_per_epoch
        self.max_steps = config.max_steps or math.ceil(config.epochs * steps_per_epoch)
        args = _arguments(model, config, scratch, self.max_steps)
        callbacks = callbacks_of(model, config, self.metric, steps_per_epoch, self.max_steps, report)
        super().__init__(model=model, args=args, train_dataset=train, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    @property
    def tuned(self) -> TuningModel:
        """The model, typed."""
        assert isinstance(self.model, TuningModel)
        return self.model

    def train_to_end(self) -> None:
        """Train from the last checkpoint, or from the start, to the last step or an early stop."""
        last, done = self.open_checkpoint()
        if not done:
            self.train(resume_from_checkpoint=None if last is None else str(last))

    def open_checkpoint(self) -> tuple[Path | None, bool]:
        """Read the last checkpoint, or without one let the method choose its first tensors.

        Returns:
            The checkpoint's folder, if there is one, and whether the run was at its end by then.
        """
        steps = self.checkpoints.steps if self.checkpoints is not None else []
        if self.checkpoints is None or not steps:
            self._start()
            return None, False
        last = self.checkpoints.path(steps[-1])
        tensors, state = self.checkpoints.load(last)
        best_tensors, _ = self.checkpoints.load(self.checkpoints.path(state["best_step"]))
        self.best = {k: best_tensors[f"tensors.{k}"] for k in self.tuned.tensors()}
        self.best_metrics = state["best_metrics"]
        self._resumed = (tensors, state)
        if self.report is not None:
            self.report(f"resuming at step {steps[-1]} of {self.max_steps}")
        if state["done"]:
            self.state = TrainerState.load_from_json(str(last / TRAINER_FILE))
        return last, bool(state["done"])

    def _start(self) -> None:
        """Let the method choose its first tensors by gradients on the rows of the first batches; they train again."""
        tuned = self.tuned
        if tuned.method.needs_gradients:
            fresh = {name: p.detach().clone() for name, p in tuned.own().items()}
            chosen = tuned.method.calibrate(fresh, tuned.backbone, BatchGradients(tuned, self._first_batches))
            tuned.load_own(chosen)

    def _first_batches(self, count: int) -> list[dict[str, Tensor]]:
        self.loader.set_epoch(0)
        return [self.collator([self.train_rows[i] for i in rows]) for rows in islice(self.loader.order, count)]

    # ---------------------------------------------------------------- data, optimizer, step

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.device_placement = False  # the tensors are where the backbone is

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: the tensors are where the backbone is."""

    def get_train_dataloader(self) -> RowLoader:
        return self.loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW. Deltas decay towards none, which is the backbone; of its own weights only matrices decay."""
        if self.optimizer is None:
            tuned, rate = self.tuned, self.config.learning_rate or 0.0
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, p in tuned.own().items():
                if p.requires_grad:
                    absolute = tuned.method.changes_weights and (p.ndim < 2 or name.endswith(".bias"))
                    decay = 0.0 if absolute else self.config.weight_decay or 0.0
                    groups.setdefault((decay, tuned.method.learning_rate_factor(name)), []).append(p)
            for name, p in zip(tuned.head_names, tuned.head_params, strict=True):
                decay = (self.config.weight_decay or 0.0) if name == "weight" else 0.0
                groups.setdefault((decay, 1.0), []).append(p)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": params, "weight_decay": decay, "lr": rate * factor}
                    for (decay, factor), params in groups.items()
                ],
                lr=rate,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None
            self.lr_scheduler = get_scheduler(
                _SCHEDULERS[self.config.scheduler],
                optimizer=chosen,
                num_warmup_steps=math.ceil((self.config.warmup_ratio or 0.0) * num_training_steps),
                num_training_steps=num_training_steps,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # the model moves them to the backbone's device

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return sum(num_targets(self.tuned.head.kind, batch["targets"]) for batch in batch_samples)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's share of the mean over all rows of one optimizer step, so that 2 x 8 equals 1 x 16."""
        outputs = model(**inputs)
        loss = self.share_of_loss(outputs, inputs["targets"], num_items_in_batch).to(self.args.device)
        return (loss, outputs) if return_outputs else loss

    def share_of_loss(self, outputs: dict[str, Tensor], targets: Tensor, num_items_in_batch: Any) -> Tensor:
        """A batch's share of the loss of one optimizer step, penalty included.

        Raises:
            ConfigError: it is not finite, or no gradient of it would reach the method's tensors.
        """
        self.tuned.check_reached()  # here, where jobs that run together fail one by one
        items = num_targets(self.tuned.head.kind, targets)
        share = items / num_items_in_batch if num_items_in_batch else 1.0
        # Where every word was cut off there is nothing to learn, and the mean of nothing is not a number.
        loss = outputs["loss"] * share if items else outputs["logits"].sum() * 0.0
        penalty = self.tuned.method.penalty(self.tuned.own()) if items else None
        if penalty is not None:
            loss = loss + penalty.to(loss.device) * share  # the shares of one optimizer step add up to one
        if not bool(torch.isfinite(loss)):
            raise ConfigError(self.diverged(self.state.global_step + 1, f"the loss is {float(loss.detach())}"))
        return loss

    def diverged(self, step: int, what: str) -> str:
        """The message that ends a run which diverged."""
        rate, method = self.config.learning_rate, self.tuned.method
        assert rate is not None
        usual = method.recipe.learning_rate
        lower = f"{rate / 10:g}" if rate <= usual else f"{usual:g}, the usual one of {method.name}"
        return (
            f"training diverged at step {step}: {what}. Nothing of it was saved; "
            f"lower learning_rate={rate:g}, for example to {lower}"
        )

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics on the validation rows.

        Raises:
            ConfigError: a trained tensor or the validation loss is not finite.
        """
        bad = [name for name, t in self.tuned.tensors().items() if not bool(torch.isfinite(t).all())]
        if bad:
            raise ConfigError(self.diverged(self.state.global_step, f"tensor '{bad[0]}' is not finite"))
        scores = self._scores()
        if not math.isfinite(scores["loss"]):
            raise ConfigError(self.diverged(self.state.global_step, f"the validation loss is {scores['loss']}"))
        found = {f"{metric_key_prefix}_{k}": v for k, v in scores.items()}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _scores(self) -> dict[str, float]:
        rows, tuned = self.validation_rows, self.tuned
        task = rows.task
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        predictions: list[Any] = [None] * len(rows)
        loss = count = distilled = 0.0
        tuned.eval()
        for start in range(0, len(order), self.config.eval_batch_size):
            picked = order[start : start + self.config.eval_batch_size]
            batch = self.judged_collator([rows[i] for i in picked])
            with torch.no_grad():
                outputs = tuned(**batch)
            items = num_targets(task.kind, batch["targets"])
            if items:
                loss, count = loss + float(outputs["loss"]) * items, count + items
            if task.kind == "generation":
                distilled += float(outputs.get(DISTILLATION, 0.0)) * items
                continue
            for i, values in zip(picked, outputs["logits"].cpu(), strict=True):
                predictions[i] = heads.prediction(task, values, rows[i].sequences[0].word_starts)
        if task.kind == "generation":
            taught = {DISTILLATION: distilled / count} if DISTILLATION in outputs else {}
            return perplexity_of(loss / count) | taught | ({} if self.judge is None else self.judge.scores(tuned))
        return {"loss": loss / max(count, 1), **judge(task, predictions, rows.examples)}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Keep the tensors if they are the best so far, and stop when the metric has not risen for long enough.

        Few validation rows soon give equal scores: of those the lower validation loss is better, then the later step.
        """
        value, best = metrics[f"eval_{self.metric}"], self.state.best_metric
        settled = self.tuned.method.is_settled(self.state.global_step, self.max_steps)
        better = best is None or (value > best if rises(self.metric) else value < best)
        if settled and not self.tuned.method.is_settled(self.state.best_global_step or 0, self.max_steps):
            better = True  # what was best so far is not in the method's final form
        tied = value == best and metrics["eval_loss"] <= self.best_metrics["loss"]
        if better or tied:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.best = self.tuned.snapshot()
            self.best_metrics = {k.removeprefix("eval_"): v for k, v in metrics.items()}
        patience = self.config.early_stopping
        if settled and patience is not None and self._evaluations_without_a_better_one() >= patience:
            self.control.should_training_stop = True
        return better or tied

    def _evaluations_without_a_better_one(self) -> int:
        """How many evaluations have passed since the best value of the metric was first reached."""
        key = f"eval_{self.metric}"
        settled = self.tuned.method.is_settled
        by_step = {
            e["step"]: e[key] for e in self.state.log_history if key in e and settled(int(e["step"]), self.max_steps)
        }
        reached = min(step for step, value in by_step.items() if value == self.state.best_metric)
        return sum(step > reached for step in by_step)

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.checkpoints is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        device = self.tuned.backbone.device
        optimizer = self.optimizer.state_dict()
        tensors = {f"tensors.{k}": t for k, t in self.tuned.snapshot().items()}
        for index, state in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{k}": t.cpu() for k, t in state.items()}
        rng_tensors, rng_values = random_state(device)
        state = {
            "done": self.control.should_training_stop,
            "best_step": self.state.best_global_step,
            "best_metrics": self.best_metrics,
            "learning_rates": [group["lr"] for group in optimizer["param_groups"]],
            "scheduler": self.lr_scheduler.state_dict(),
            "random": rng_values,
        }
        self.checkpoints.save(
            self.state.global_step, self.state.best_global_step, tensors | rng_tensors, state, self.state
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors, _ = self._resumed
        self.tuned.load_tensors({k: tensors[f"tensors.{k}"] for k in self.tuned.tensors()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        tensors, state = self._resumed
        optimizer = self.optimizer.state_dict()
        for group, rate in zip(optimizer["param_groups"], state["learning_rates"], strict=True):
            group["lr"] = rate
        for name, t in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                optimizer["state"].setdefault(int(index), {})[key] = t
        self.optimizer.load_state_dict(optimizer)
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, state = self._resumed
            set_random_state(self.tuned.backbone.device, tensors, state["random"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: there is no gradient scaler."""


def _arguments(model: TuningModel, config: TrainConfig, scratch: Path, max_steps: int) -> TrainingArguments:
    """transformers' own settings: order, evaluation, checkpoints and log are ours."""
    assert config.learning_rate is not None
    args = TrainingArguments(
        output_dir=str(scratch),
        learning_rate=config.learning_rate,
        max_steps=max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=model.backbone.device.type == "cpu",
    )
    _ = args.device  # sets the number of GPUs, which must then be one: the backbone sits on one device
    args._n_gpu = min(args._n_gpu, 1)
    return args


def run(
    model: TuningModel,
    config: TrainConfig,
    train: TaskRows,
    validation: TaskRows,
    checkpoints: Checkpoints | None,
    report: Callable[[str], None] | None = None,
) -> TuningTrainer:
    """Train to the end and return the trainer; global state and the backbone's mode are left as they were.

    Raises:
        ConfigError: the loss or a tensor is not finite, or what the frozen layers give cannot be kept as asked.
    """
    with tempfile.TemporaryDirectory() as scratch, globals_kept():
        folder = None if checkpoints is None else checkpoints.folder
        sequences = (train.sequences, validation.sequences)
        states = keep_frozen_states(model, config, sequences, folder, report or (lambda line: None))
        trainer = TuningTrainer(model, config, train, validation, checkpoints, Path(scratch), report, states)
        try:
            trainer.train_to_end()
        finally:
            model.eval()
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, Bar):
                    callback.close()
    return trainer
