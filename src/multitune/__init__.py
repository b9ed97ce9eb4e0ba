"""multitune: one frozen backbone, every tuning method, any mix of tasks in one batch."""

from multitune.adapter import Adapter
from multitune.backbone import Backbone
from multitune.bank import Bank, Prediction
from multitune.errors import (
    AdapterError,
    BackboneError,
    ConfigError,
    DataError,
    MixError,
    MultituneError,
    PlanError,
    TaskError,
)
from multitune.heads import Head
from multitune.merge import MergeReport, merge
from multitune.methods import Method, Recipe, SiteMethod, get_method, method_names, register
from multitune.methods.aot_fc import AoTFC
from multitune.methods.aot_kronecker import AoTKronecker
from multitune.methods.bitfit import BitFit
from multitune.methods.full import FullFineTuning
from multitune.methods.head import HeadOnly
from multitune.methods.houlsby import Houlsby
from multitune.methods.ia3 import IA3
from multitune.methods.layernorm import LayerNormTuning
from multitune.methods.lora import LoRA
from multitune.methods.pfeiffer import Pfeiffer
from multitune.methods.prompt_tuning import PromptTuning
from multitune.methods.ptuning_v2 import PTuningV2
from multitune.plan import DeltaSet, Plan
from multitune.tasks import Task, infer_task, load_task, read_table
from multitune.training import TrainConfig, TrainResult, evaluate, train
from multitune.version import __version__

__all__ = [
    "IA3",
    "Adapter",
    "AdapterError",
    "AoTFC",
    "AoTKronecker",
    "Backbone",
    "BackboneError",
    "Bank",
    "BitFit",
    "ConfigError",
    "DataError",
    "DeltaSet",
    "FullFineTuning",
    "Head",
    "HeadOnly",
    "Houlsby",
    "LayerNormTuning",
    "LoRA",
    "MergeReport",
    "Method",
    "MixError",
    "MultituneError",
    "PTuningV2",
    "Pfeiffer",
    "Plan",
    "PlanError",
    "Prediction",
    "PromptTuning",
    "Recipe",
    "SiteMethod",
    "Task",
    "TaskError",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "evaluate",
    "get_method",
    "infer_task",
    "load_task",
    "merge",
    "method_names",
    "read_table",
    "register",
    "train",
]
