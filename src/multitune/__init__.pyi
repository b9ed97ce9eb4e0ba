"""Generated from exports.py and the registry of methods by `make docs`; do not edit."""

from multitune.adapter import Adapter as Adapter
from multitune.attaching import attach as attach
from multitune.attaching import detach as detach
from multitune.backbone import Backbone as Backbone
from multitune.bank import Bank as Bank
from multitune.comparing.run import compare as compare
from multitune.convert import export_adapter as export_adapter
from multitune.convert import import_adapter as import_adapter
from multitune.errors import AdapterError as AdapterError
from multitune.errors import BackboneError as BackboneError
from multitune.errors import ConfigError as ConfigError
from multitune.errors import DataError as DataError
from multitune.errors import MixError as MixError
from multitune.errors import MultituneError as MultituneError
from multitune.errors import PlanError as PlanError
from multitune.errors import TaskError as TaskError
from multitune.generation import Engine as Engine
from multitune.generation import Generation as Generation
from multitune.generation import GenerationSettings as GenerationSettings
from multitune.heads import Head as Head
from multitune.lsg import LSG as LSG
from multitune.lsg import convert_to_lsg as convert_to_lsg
from multitune.merging import MergeReport as MergeReport
from multitune.merging import merge as merge
from multitune.methods import Combined as Combined
from multitune.methods import Method as Method
from multitune.methods import Recipe as Recipe
from multitune.methods import SiteMethod as SiteMethod
from multitune.methods import get_method as get_method
from multitune.methods import make_method as make_method
from multitune.methods import method_names as method_names
from multitune.methods import register as register
from multitune.methods.adalora import AdaLoRA as AdaLoRA
from multitune.methods.aot_fc import AoTFC as AoTFC
from multitune.methods.aot_kronecker import AoTKronecker as AoTKronecker
from multitune.methods.attn_scale import AttnScale as AttnScale
from multitune.methods.bitfit import BitFit as BitFit
from multitune.methods.compacter import Compacter as Compacter
from multitune.methods.compacter_pp import CompacterPP as CompacterPP
from multitune.methods.dora import DoRA as DoRA
from multitune.methods.dra import DRA as DRA
from multitune.methods.dsee import DSEE as DSEE
from multitune.methods.freeze import Freeze as Freeze
from multitune.methods.full import FullFineTuning as FullFineTuning
from multitune.methods.head import HeadOnly as HeadOnly
from multitune.methods.houlsby import Houlsby as Houlsby
from multitune.methods.ia3 import IA3 as IA3
from multitune.methods.layernorm import LayerNormTuning as LayerNormTuning
from multitune.methods.lora import LoRA as LoRA
from multitune.methods.lora_plus import LoRAPlus as LoRAPlus
from multitune.methods.mam import MAM as MAM
from multitune.methods.parallel import ParallelAdapter as ParallelAdapter
from multitune.methods.pfeiffer import Pfeiffer as Pfeiffer
from multitune.methods.pissa import PiSSA as PiSSA
from multitune.methods.prefix_tuning import PrefixTuning as PrefixTuning
from multitune.methods.prompt_tuning import PromptTuning as PromptTuning
from multitune.methods.ptuning_v1 import PTuningV1 as PTuningV1
from multitune.methods.ptuning_v2 import PTuningV2 as PTuningV2
from multitune.methods.rslora import RsLoRA as RsLoRA
from multitune.methods.sift import SIFT as SIFT
from multitune.methods.sotu import SoTU as SoTU
from multitune.methods.top_layers import TopLayers as TopLayers
from multitune.methods.u_tuning import UTuning as UTuning
from multitune.methods.vera import VeRA as VeRA
from multitune.plan import DeltaSet as DeltaSet
from multitune.plan import Plan as Plan
from multitune.prediction import Prediction as Prediction
from multitune.pruned import prune as prune
from multitune.quantized import quantize as quantize
from multitune.tasks import Pattern as Pattern
from multitune.tasks import Task as Task
from multitune.tasks import TaskData as TaskData
from multitune.tasks import Template as Template
from multitune.tasks import infer_task as infer_task
from multitune.tasks import list_tasks as list_tasks
from multitune.tasks import load_table as load_table
from multitune.tasks import load_task as load_task
from multitune.tasks import read_table as read_table
from multitune.training.api import train as train
from multitune.training.config import TrainConfig as TrainConfig
from multitune.training.jobs import FailedJob as FailedJob
from multitune.training.jobs import TrainJob as TrainJob
from multitune.training.jobs import TrainingInterrupted as TrainingInterrupted
from multitune.training.judging import evaluate as evaluate
from multitune.training.many import train_many as train_many
from multitune.training.results import TrainResult as TrainResult
from multitune.version import __version__ as __version__

__all__ = [
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
    "DRA",
    "DSEE",
    "DataError",
    "DeltaSet",
    "DoRA",
    "Engine",
    "FailedJob",
    "Freeze",
    "FullFineTuning",
    "Generation",
    "GenerationSettings",
    "Head",
    "HeadOnly",
    "Houlsby",
    "IA3",
    "LSG",
    "LayerNormTuning",
    "LoRA",
    "LoRAPlus",
    "MAM",
    "MergeReport",
    "Method",
    "MixError",
    "MultituneError",
    "PTuningV1",
    "PTuningV2",
    "ParallelAdapter",
    "Pattern",
    "Pfeiffer",
    "PiSSA",
    "Plan",
    "PlanError",
    "Prediction",
    "PrefixTuning",
    "PromptTuning",
    "Recipe",
    "RsLoRA",
    "SIFT",
    "SiteMethod",
    "SoTU",
    "Task",
    "TaskData",
    "TaskError",
    "Template",
    "TopLayers",
    "TrainConfig",
    "TrainJob",
    "TrainResult",
    "TrainingInterrupted",
    "UTuning",
    "VeRA",
    "__version__",
    "attach",
    "compare",
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
    "prune",
    "quantize",
    "read_table",
    "register",
    "train",
    "train_many",
]
