"""Training: one adapter for one task, on transformers' Trainer, with checkpoints that survive a kill.

from multitune.training import train, evaluate
result = train(Backbone.load("minilm"), load_task("demo/sentiment"), "lora", "adapters/sentiment")
"""

from multitune.training.api import TrainResult, evaluate, train
from multitune.training.config import TrainConfig

__all__ = ["TrainConfig", "TrainResult", "evaluate", "train"]
