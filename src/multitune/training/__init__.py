"""Training: one adapter for one task, on transformers' Trainer, with checkpoints that survive a kill; or many together.

from multitune.training import train, evaluate
result = train(Backbone.load("minilm"), load_task("demo/sentiment"), "lora", "adapters/sentiment")
"""

from typing import TYPE_CHECKING, Any

from multitune.training.config import TrainConfig

if TYPE_CHECKING:
    from multitune.training.api import TrainResult, evaluate, train
    from multitune.training.many import FailedJob, TrainingInterrupted, TrainJob, train_many

_MANY = ("FailedJob", "TrainJob", "TrainingInterrupted", "train_many")
__all__ = [
    "FailedJob",
    "TrainConfig",
    "TrainJob",
    "TrainResult",
    "TrainingInterrupted",
    "evaluate",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:  # so that the settings can be read without the Trainer, which takes seconds to load
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from multitune.training import api, many

    return globals().setdefault(name, getattr(many if name in _MANY else api, name))
