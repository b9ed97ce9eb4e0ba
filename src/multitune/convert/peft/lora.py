"""LoRA and rsLoRA:  PEFT keeps `lora_A [R, I]` and `lora_B [O, R]` per module, we keep their transposes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multitune.convert.names import ModuleNames, product_of
from multitune.convert.peft.family import Family, Source, Written, family, weight_of
from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.methods.lora import LoRA
from multitune.sites import Site

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
        check_pairs(source, source.by_module(A), source.by_module(B))
        a, b = _by_site(source)
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
            "fan_in_fan_out": any(s.transposed for s in sites),
            "bias": "none",
            "init_lora_weights": True,
        }
        return Written(config=config, tensors=_by_module(sites, params, backbone))

    def fold(self, source: Source, model: nn.Module) -> int:
        up = source.by_module(B)
        for name, down in source.by_module(A).items():
            rank = down.shape[0]
            scale = alpha_of(source, name) / (math.sqrt(rank) if source.config.get("use_rslora") else rank)
            update = scale * (up[name].double() @ down.double())
            weight = weight_of(model, ModuleNames(source.backbone).bare(name))
            weight += update
        return 0


def _by_site(source: Source) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """`lora_A [R, I]` and `lora_B [O, R]` by site: a fused projection shares its first factor among its parts."""
    names = ModuleNames(source.backbone)
    first: dict[Site, Tensor] = {}
    second: dict[Site, Tensor] = {}
    up = source.by_module(B)
    for path, down in source.by_module(A).items():
        for site in names.sites_of(path, source.where):
            begin, end = site.part or (0, up[path].shape[0])
            first[site], second[site] = down, up[path][begin:end]
    return first, second


def _by_module(sites: list[Site], params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The factors by module; a fused projection needs all its parts, with one first factor."""
    tensors = {}
    for module in dict.fromkeys(s.module for s in sites):
        parts = [s for s in backbone.sites if s.module == module]
        missing = [s.name for s in parts if s not in sites]
        first = params[f"{next(s for s in sites if s.module == module).name}.A"]
        if missing or any(not torch.equal(params[f"{s.name}.A"], first) for s in parts):
            raise AdapterError(
                f"the module '{module}' computes {', '.join(s.role for s in parts)} at once, for which PEFT has one "
                f"pair of factors, and this adapter has "
                + (f"none for {missing[0]}" if missing else "a first factor for each")
            )
        parts.sort(key=lambda s: s.part or (0, 0))
        tensors[module + A] = first.T
        tensors[module + B] = torch.cat([params[f"{s.name}.B"] for s in parts], dim=1).T
    return tensors


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
