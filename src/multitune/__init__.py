"""multitune: one frozen backbone, every tuning method, any mix of tasks in one batch."""

from multitune.adapter import Adapter
from multitune.attach import attach, detach
from multitune.backbone import Backbone
from multitune.bank import Bank, Prediction
from multitune.convert import export_adapter, import_adapter
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
from multitune.lsg import LSG, convert_to_lsg
from multitune.merge import MergeReport, merge
from multitune.methods import (
    Combined,
    Method,
    Recipe,
    SiteMethod,
    get_method,
    make_method,
    method_names,
    register,
)
from multitune.methods.adalora import AdaLoRA
from multitune.methods.aot_fc import AoTFC
from multitune.methods.aot_kronecker import AoTKronecker
from multitune.methods.attn_scale import AttnScale
from multitune.methods.bitfit import BitFit
from multitune.methods.compacter import Compacter
from multitune.methods.compacter_pp import CompacterPP
from multitune.methods.dora import DoRA
from multitune.methods.dra import DRA
from multitune.methods.dsee import DSEE
from multitune.methods.freeze import Freeze
from multitune.methods.full import FullFineTuning
from multitune.methods.head import HeadOnly
from multitune.methods.houlsby import Houlsby
from multitune.methods.ia3 import IA3
from multitune.methods.layernorm import LayerNormTuning
from multitune.methods.lora import LoRA
from multitune.methods.lora_plus import LoRAPlus
from multitune.methods.mam import MAM
from multitune.methods.parallel import ParallelAdapter
from multitune.methods.pfeiffer import Pfeiffer
from multitune.methods.pissa import PiSSA
from multitune.methods.prefix_tuning import PrefixTuning
from multitune.methods.prompt_tuning import PromptTuning
from multitune.methods.ptuning_v1 import PTuningV1
from multitune.methods.ptuning_v2 import PTuningV2
from multitune.methods.rslora import RsLoRA
from multitune.methods.sift import SIFT
from multitune.methods.sotu import SoTU
from multitune.methods.top_layers import TopLayers
from multitune.methods.u_tuning import UTuning
from multitune.methods.vera import VeRA
from multitune.plan import DeltaSet, Plan
from multitune.tasks import Task, TaskData, Template, infer_task, list_tasks, load_table, load_task, read_table
from multitune.training import TrainConfig, TrainResult, evaluate, train
from multitune.version import __version__

__all__ = [
    "DRA",
    "DSEE",
    "IA3",
    "LSG",
    "MAM",
    "SIFT",
    "AdaLoRA",
    "Adapter",
    "AdapterError",
    "AoTFC",
    "AoTKronecker",
    "AttnScale",
    "Backbone",
    "BackboneError",
    "Bank",
    "BitFit",
    "Combined",
    "Compacter",
    "CompacterPP",
    "ConfigError",
    "DataError",
    "DeltaSet",
    "DoRA",
    "Freeze",
    "FullFineTuning",
    "Head",
    "HeadOnly",
    "Houlsby",
    "LayerNormTuning",
    "LoRA",
    "LoRAPlus",
    "MergeReport",
    "Method",
    "MixError",
    "MultituneError",
    "PTuningV1",
    "PTuningV2",
    "ParallelAdapter",
    "Pfeiffer",
    "PiSSA",
    "Plan",
    "PlanError",
    "Prediction",
    "PrefixTuning",
    "PromptTuning",
    "Recipe",
    "RsLoRA",
    "SiteMethod",
    "SoTU",
    "Task",
    "TaskData",
    "TaskError",
    "Template",
    "TopLayers",
    "TrainConfig",
    "TrainResult",
    "UTuning",
    "VeRA",
    "__version__",
    "attach",
    "convert_to_lsg",
    "detach",
    "evaluate",
    "export_adapter",
    "get_method",
    "import_adapter",
    "infer_task",
    "list_tasks",
    "load_table",
    "load_task",
    "make_method",
    "merge",
    "method_names",
    "read_table",
    "register",
    "train",
]
