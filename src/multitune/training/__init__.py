"""Training: one adapter for one task, on transformers' Trainer, with checkpoints that survive a kill.

from multitune.training import train, evaluate
result = train(Backbone.load("minilm"), load_task("demo/sentiment"), "lora", "adapters/sentiment")
"""

from typing import TYPE_CHECKING, Any

from multitune.training.config import TrainConfig

if TYPE_CHECKING:
    from multitune.training.api import TrainResult, evaluate, train

__all__ = ["TrainConfig", "TrainResult", "evaluate", "train"]


def __getattr__(name: str) -> Any:  # so that the settings can be read without the Trainer, which takes seconds to load
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from multitune.training import api

    return globals().setdefault(name, getattr(api, name))
