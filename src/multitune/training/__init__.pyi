"""Generated from exports.py and the registry of methods by `make docs`; do not edit."""

from multitune.training.api import train as train
from multitune.training.config import TrainConfig as TrainConfig
from multitune.training.jobs import FailedJob as FailedJob
from multitune.training.jobs import TrainJob as TrainJob
from multitune.training.jobs import TrainingInterrupted as TrainingInterrupted
from multitune.training.judging import evaluate as evaluate
from multitune.training.many import train_many as train_many
from multitune.training.results import TrainResult as TrainResult

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
