"""LoRA, rsLoRA and DoRA:  PEFT keeps `lora_A [R, I]` and `lora_B [O, R]` per module, we keep their transposes.

DoRA's `lora_magnitude_vector [O]` is the whole magnitude, ours what differs from the norm of the frozen weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitune.convert.names import ModuleNames, part_of, product_of, whole_of
from multitune.convert.peft import lora_words
from multitune.convert.peft.family import Family, Source, Written, family, weight_of
from multitune.deltas import EmbeddingLowRank, LowRank
from multitune.errors import AdapterError
from multitune.methods import Method, SiteMethod
from multitune.methods.dora import DoRA, weight_norm
from multitune.methods.lora import LoRA
from multitune.methods.low_rank import frozen_weight
from multitune.sites import Site

if TYPE_CHECKING:
    from multitune.backbone import Backbone

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

#: Starts that PEFT reaches by changing the base model's weights; the checkpoint then fits the changed ones only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@family
class LoRAFamily(Family):
    """`peft_type` LORA. What trains otherwise and is served as one low-rank update is written as LoRA, too."""

    peft_type = "LORA"
    methods = ("lora", "rslora", "lora_plus", "pissa", "adalora", "dora")
    suffixes = (A, B, MAGNITUDE, lora_words.A, lora_words.B, lora_words.FROZEN)
    settings = frozenset(
        {
            "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
            "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_lora_weights", "bias", "megatron_core",
            "qalora_group_size", "ensure_weight_tying",
        }
    )  # fmt: skip

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        check_lora_settings(source)
        words, their_second = lora_words.read_words(source)
        all_first = source.by_module(A) | words
        check_pairs(source, all_first, source.by_module(B) | their_second)
        first, second, magnitudes = _by_site(source)
        rank = int(_uniform(source, "rank_pattern", {name: t.shape[0] for name, t in all_first.items()}))
        alpha = _uniform(source, "alpha_pattern", {name: alpha_of(source, name) for name in all_first})
        roles, layers = product_of(first, source.backbone, source.where) if first else ((), None)
        stabilised = bool(source.config.get("use_rslora"))
        common: dict[str, Any] = {
            "r": rank,
            # PEFT drops nothing in front of a word embedding's update.
            "dropout": float(source.config.get("lora_dropout") or 0.0) if first else 0.0,
            "targets": (*(("embedding",) if words else ()), *roles),
            "layers": layers,
        }
        params = {f"{s.name}.A": t.T for s, t in first.items()} | {f"{s.name}.B": t.T for s, t in second.items()}
        for path, down in words.items():  # there is one table
            params |= {"embedding.A": down.T, "embedding.B": their_second[path].T}
        if not source.config.get("use_dora"):
            return LoRA(alpha=alpha, rank_stabilised=stabilised, **common), params
        if set(magnitudes) != set(first):
            raise AdapterError(f"{source.where}: use_dora=True, but some modules have no '{MAGNITUDE[1:]}'")
        for site, whole in magnitudes.items():
            params[f"{site.name}.m"] = whole.flatten() - _norm_of(site, source.backbone)
        return DoRA(alpha=alpha * (math.sqrt(rank) if stabilised else 1), **common), params

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        assert isinstance(method, SiteMethod)
        sites = list(method.sites(backbone))
        deltas = {s: _low_rank(method, params, s, backbone) for s in sites}
        rank, scale = max(d.A.shape[1] for d in deltas.values()), next(iter(deltas.values())).scale
        stabilised = method.name == "rslora" or getattr(method, "rank_stabilised", False)
        dora = isinstance(method, DoRA)
        config = {
            "r": rank,
            "lora_alpha": scale * (math.sqrt(rank) if stabilised else rank),
            "lora_dropout": getattr(method, "dropout", 0.0),
            "use_rslora": stabilised,
            "use_dora": dora,
            "target_modules": ModuleNames(backbone).target_modules(sites),
            "fan_in_fan_out": any(s.transposed for s in sites),
            "bias": "none",
            "init_lora_weights": True,
        }
        first = {s: F.pad(d.A, (0, rank - d.A.shape[1])) for s, d in deltas.items()}
        second = {s: F.pad(d.B, (0, 0, 0, rank - d.B.shape[0])) for s, d in deltas.items()}
        tensors = _by_module({s: t for s, t in first.items() if s.kind == "linear"}, second, backbone)
        for site in (s for s in sites if s.kind == "embedding"):
            tensors[site.module + lora_words.A] = first[site].T
            tensors[site.module + lora_words.B] = second[site].T
        if dora:
            whole = {s: params[f"{s.name}.m"] + _norm_of(s, backbone) for s in sites}
            for module in dict.fromkeys(s.module for s in sites):
                tensors[module + MAGNITUDE] = whole_of({s: whole[s] for s in _parts(module, backbone)})
        return Written(config=config, tensors=tensors)

    def fold(self, source: Source, model: nn.Module) -> int:
        up, magnitudes = source.by_module(B), source.by_module(MAGNITUDE)
        words = source.by_module(lora_words.B)
        for name, down in source.by_module(lora_words.A).items():
            table = weight_of(model, ModuleNames(source.backbone).bare(name))
            table += _scale_of(source, name, down.shape[0]) * (down.double().T @ words[name].double().T)
        for name, down in source.by_module(A).items():
            scale = _scale_of(source, name, down.shape[0])
            weight = weight_of(model, ModuleNames(source.backbone).bare(name))
            weight += scale * (up[name].double() @ down.double())
            if name in magnitudes:
                weight *= magnitudes[name].double().view(-1, 1) / weight.norm(dim=1, keepdim=True)
        return 0


def _scale_of(source: Source, name: str, rank: int) -> float:
    """What PEFT multiplies a module's update by."""
    return alpha_of(source, name) / (math.sqrt(rank) if source.config.get("use_rslora") else rank)


def _low_rank(
    method: SiteMethod, params: Mapping[str, Tensor], site: Site, backbone: Backbone
) -> LowRank | EmbeddingLowRank:
    """The low-rank update of a site, as it is served."""
    own = {k.removeprefix(f"{site.name}."): t for k, t in params.items() if k.startswith(f"{site.name}.")}
    delta = method.delta(own, site, backbone)
    assert isinstance(delta, LowRank | EmbeddingLowRank)
    return delta


def _norm_of(site: Site, backbone: Backbone) -> Tensor:
    """The norm of each output feature's frozen weights, float32 `[O]` on the CPU."""
    return weight_norm(frozen_weight(site, backbone)[0]).float().cpu()


def _parts(module: str, backbone: Backbone) -> list[Site]:
    """The sites of a module, in the order of its output features; where it runs as several layers, the first's."""
    found: dict[tuple[int, int] | None, Site] = {}
    for site in backbone.sites:
        if site.module == module and site.kind == "linear":
            found.setdefault(site.part, site)
    return sorted(found.values(), key=lambda s: s.part or ())


def _by_site(source: Source) -> tuple[dict[Site, Tensor], dict[Site, Tensor], dict[Site, Tensor]]:
    """`lora_A [R, I]`, `lora_B [O, R]` and DoRA's magnitudes `[O]` by site.

    A fused projection shares its first factor among its parts, and the others are cut.
    """
    names = ModuleNames(source.backbone)
    first: dict[Site, Tensor] = {}
    second: dict[Site, Tensor] = {}
    third: dict[Site, Tensor] = {}
    up, magnitudes = source.by_module(B), source.by_module(MAGNITUDE)
    for path, down in source.by_module(A).items():
        for site in names.sites_of(path, source.where):
            first[site], second[site] = down, part_of(up[path], site)
            if path in magnitudes:
                third[site] = part_of(magnitudes[path].flatten(), site)
    return first, second, third


def _by_module(first: Mapping[Site, Tensor], second: Mapping[Site, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The factors by module; a fused projection needs all its parts, with one first factor."""
    tensors = {}
    for module in dict.fromkeys(s.module for s in first):
        parts = _parts(module, backbone)
        missing = [s.name for s in parts if s not in first]
        mine = next(t for s, t in first.items() if s.module == module)
        if missing or any(not torch.equal(first[s], mine) for s in parts):
            raise AdapterError(
                f"the module '{module}' computes {', '.join(s.role for s in parts)} at once, for which PEFT has one "
                f"pair of factors, and this adapter has "
                + (f"none for {missing[0]}" if missing else "a first factor for each")
            )
        tensors[module + A] = mine.T
        tensors[module + B] = whole_of({s: second[s].T for s in parts})
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
