"""What a training run leaves: its result, its log, the memory it took."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from multitune.adapter import Adapter
from multitune.layers import LayerChoice

if TYPE_CHECKING:
    from multitune.training.trainer import TuningTrainer


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainResult:
    """What a run leaves."""

    adapter: Adapter
    """The best adapter by the validation metric; on disk if `output_dir` was given."""
    history: list[dict[str, float]]
    """Per logged step: step, epoch, loss, learning_rate, grad_norm, and after an evaluation eval_loss and eval_*."""
    seconds: float
    """Wall time of this call; of a resumed run, the time since it was resumed."""
    metric: str
    """Name of the metric that chose the tensors: the task's headline metric, or perplexity where that judges texts;
    "distillation", the loss on the validation rows, where texts are distilled."""
    best_metric: float
    """Best value of that metric on the validation rows."""
    best_step: int
    """Step that reached it and is kept: of equal values that with the lowest validation loss, then the latest."""
    num_steps: int
    """Optimizer steps taken."""
    num_method_parameters: int
    """Trained parameters without the head."""
    num_head_parameters: int
    """Trained parameters of the head."""
    peak_memory_bytes: int
    """Most memory in use: the device's on a GPU, the process's own on a CPU."""
    cached_bytes: int = 0
    """Bytes of what the frozen layers gave for the rows, where `cache_frozen` kept it."""
    layer_choice: LayerChoice | None = None
    """What was measured where the method's layers were "semantic"; those chosen are the adapter's method's."""

    def __repr__(self) -> str:
        where = f", saved in {self.adapter.path}" if self.adapter.path is not None else ""
        score = f"{self.metric} {self.best_metric:.3f} at step {self.best_step} of {self.num_steps}"
        size = f"{self.num_method_parameters:,} parameters and {self.num_head_parameters:,} of the head"
        what = f"{self.adapter.name}: {self.adapter.method.name}"
        return f"<TrainResult {what}, {score}, {size}, {self.seconds:.1f} s{where}>"


def history_of(trainer: TuningTrainer) -> list[dict[str, float]]:
    """The trainer's log, one entry per step."""
    wanted = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    by_step: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        kept = {k: v for k, v in entry.items() if k in wanted or k.startswith("eval_")}
        if "loss" in kept or "eval_loss" in kept:
            by_step.setdefault(int(entry["step"]), {}).update(kept)
    # In one order, whether the entry comes from this process or from a checkpoint.
    order = [*wanted, *sorted({k for e in by_step.values() for k in e} - set(wanted))]
    return [{k: by_step[step][k] for k in order if k in by_step[step]} for step in sorted(by_step)]


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: tensors on the device if it is a GPU, else all of this process since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # no such module on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
