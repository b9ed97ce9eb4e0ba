"""LoRA and rsLoRA:  PEFT keeps `lora_A [R, I]` and `lora_B [O, R]` per module, we keep their transposes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from multitune.convert.names import ModuleNames, product_of
from multitune.convert.peft.family import Family, Source, Written, family, weight_of
from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.methods.lora import LoRA

if TYPE_CHECKING:
    from multitune.backbone import Backbone

A, B = ".lora_A.weight", ".lora_B.weight"

#: Starts that PEFT reaches by changing the base model's weights; the checkpoint then fits the changed ones only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@family
class LoRAFamily(Family):
    """`peft_type` LORA without DoRA."""

    peft_type = "LORA"
    methods = ("lora",)
    suffixes = (A, B)
    settings = frozenset(
        {
            "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform",
            "layers_pattern", "fan_in_fan_out", "init_lora_weights", "bias", "megatron_core", "qalora_group_size",
            "ensure_weight_tying",
        }
    )  # fmt: skip

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        check_lora_settings(source)
        a, b = source.by_site(A), source.by_site(B)
        check_pairs(source, source.by_module(A), source.by_module(B))
        rank = _uniform(source, "rank_pattern", {name: t.shape[0] for name, t in source.by_module(A).items()})
        alpha = _uniform(source, "alpha_pattern", {name: alpha_of(source, name) for name in source.by_module(A)})
        roles, layers = product_of(a, source.backbone, source.where)
        method = LoRA(
            r=int(rank),
            alpha=float(alpha),
            dropout=float(source.config.get("lora_dropout") or 0.0),
            targets=roles,
            layers=layers,
            rank_stabilised=bool(source.config.get("use_rslora")),
        )
        params = {f"{s.name}.A": t.T for s, t in a.items()} | {f"{s.name}.B": t.T for s, t in b.items()}
        return method, params

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        assert isinstance(method, LoRA)
        sites = list(method.sites(backbone))
        config = {
            "r": method.r,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "use_rslora": method.rank_stabilised,
            "target_modules": ModuleNames(backbone).target_modules(sites),
            "bias": "none",
            "init_lora_weights": True,
        }
        tensors = {s.module + A: params[f"{s.name}.A"].T for s in sites}
        tensors |= {s.module + B: params[f"{s.name}.B"].T for s in sites}
        return Written(config=config, tensors=tensors)

    def fold(self, source: Source, model: nn.Module) -> int:
        up = source.by_module(B)
        for name, down in source.by_module(A).items():
            rank = down.shape[0]
            scale = alpha_of(source, name) / (math.sqrt(rank) if source.config.get("use_rslora") else rank)
            update = scale * (up[name].double() @ down.double())
            weight = weight_of(model, ModuleNames(source.backbone).bare(name))
            weight.data += update if weight.shape == update.shape else update.T
        return 0


def check_lora_settings(source: Source) -> None:
    """Raise `AdapterError` for settings of LoRA's that change what a checkpoint means."""
    start = source.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{source.where}: init_lora_weights={start!r} changed the base model's weights, so that these tensors fit "
            f"only the changed ones; save it again as a plain LoRA: "
            f"save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START)"
        )
    bias = source.config.get("bias", "none")
    if bias != "none":
        raise AdapterError(f"{source.where}: bias={bias!r} trained biases beside LoRA, which our method has none of")


def check_pairs(source: Source, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raise `AdapterError` unless both factors of every module are there, and any at all."""
    alone = sorted(set(first) ^ set(second))
    if alone or not first:
        which = f"only one of the two factors of '{alone[0]}'" if alone else "no LoRA factors"
        raise AdapterError(f"{source.where}: the checkpoint holds {which}; it is damaged, save it again")


def alpha_of(source: Source, module: str) -> float:
    """`lora_alpha` of a module: that of the first pattern that fits the end of its path, or the common one."""
    for pattern, alpha in (source.config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(source.config.get("lora_alpha", 8))


def _uniform(source: Source, setting: str, values: Mapping[str, float]) -> float:
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    examples = {value: name for name, value in values.items()}
    shown = ", ".join(f"{value:g} at {name}" for value, name in sorted(examples.items()))
    raise AdapterError(
        f"{source.where}: {setting}={source.config.get(setting)!r} gives modules different values ({shown}), and our "
        f"LoRA has one for all; merge it with PEFT, or train it again without {setting}"
    )
