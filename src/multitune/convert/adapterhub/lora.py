"""LoRA and (IA)³:  the library keeps `lora_A [R, I]` and `lora_B [O, R]`, for (IA)³ `lora_B [O, 1]` alone.

Its (IA)³ scales outputs only: that of the feed-forward's first map stands in front of the activation, where the paper's
stands behind it. A fused projection has the factors of the parts it adapts one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from multitune.convert.adapterhub.source import Read, Source, whole_layers
from multitune.convert.names import product_of
from multitune.errors import AdapterError
from multitune.methods.ia3 import IA3
from multitune.methods.lora import LoRA
from multitune.sites import Site

NAME = "lora"
HOLDER = "loras"

_SETTINGS = frozenset(
    {
        "architecture", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha", "dropout",
        "attn_matrices", "composition_mode", "init_weights", "init_weights_seed", "dtype",
    }
)  # fmt: skip
#: Parts of a fused projection, as `attn_matrices` abbreviates them.
PARTS = {"query": "q", "key": "k", "value": "v"}


def read(source: Source) -> Read:
    """Our method and its tensors.

    Raises:
        AdapterError: something that our methods cannot express; names it.
    """
    _check(source)
    scales = source.config.get("composition_mode", "add") == "scale"
    names = {"lora_B"} if scales else {"lora_A", "lora_B"}
    first: dict[Site, Tensor] = {}
    second: dict[Site, Tensor] = {}
    for path, own in source.tensors.items():
        if set(own) != names:
            wrong = min(names ^ set(own))
            raise AdapterError(
                f"{source.where}: '{path}' {'lacks' if wrong in names else 'holds'} the tensor '{wrong}'"
            )
        for site, down, up in _cut(source, path, own):
            second[site] = up
            if down is not None:
                first[site] = down
    roles, layers = product_of(second, source.backbone, source.where)
    layers = whole_layers(source, {s.layer for s in second if s.layer is not None})
    if scales:
        alpha = float(source.config.get("alpha", 1))
        params = {f"{s.name}.s": t.flatten() * alpha - 1 for s, t in second.items()}
        return IA3(outputs=roles, inputs=(), layers=layers), params
    rank = next(iter(first.values())).shape[0]
    params = {f"{s.name}.A": t.T for s, t in first.items()} | {f"{s.name}.B": t.T for s, t in second.items()}
    dropout = float(source.config.get("dropout") or 0.0)
    return LoRA(r=rank, alpha=_alpha(source, rank), dropout=dropout, targets=roles, layers=layers), params


def _check(source: Source) -> None:
    config = source.config
    if config.get("use_gating"):
        raise source.refuse("use_gating", "closes the update by a gate that depends on the whole text")
    if config.get("use_dora"):
        raise source.refuse("use_dora", "is another DoRA than the paper's: it rescales the frozen bias too")
    for key in ("vera_d", "vera_b"):
        if config.get(key) is not None:
            raise source.refuse(key, "is VeRA with random matrices of the library's own")
    source.refuse_unknown(_SETTINGS)


def _alpha(source: Source, rank: int) -> float:
    """The numerator of the update's scale. Before version 1.1.0 the library ignored it and scaled by one."""
    old = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", source.version)
    if old is not None and (int(old[1]), int(old[2])) < (1, 1):
        return float(rank)
    return float(source.config.get("alpha", 8))


def _cut(source: Source, path: str, own: Mapping[str, Tensor]) -> list[tuple[Site, Tensor | None, Tensor]]:
    """Each site of a module with its first factor, if any, and its second one."""
    sites = source.linears(path)
    down, up = own.get("lora_A"), own["lora_B"]
    if sites[0].part is None:
        return [(site, down, up) for site in sites]
    _check_fused(source, sites)
    chosen = [s for s in sites if PARTS.get(s.role) in (source.config.get("attn_matrices") or ())]
    if len(chosen) * sites[0].out_features != up.shape[0]:
        raise AdapterError(
            f"{source.where}: the second factor of '{path}' is {tuple(up.shape)} where attn_matrices="
            f"{source.config.get('attn_matrices')} makes it {len(chosen) * sites[0].out_features} high"
        )
    downs: list[Any] = [None] * len(chosen) if down is None else list(down.chunk(len(chosen)))
    return list(zip(chosen, downs, up.chunk(len(chosen)), strict=True))


def _check_fused(source: Source, sites: list[Site]) -> None:
    if sites[0].blocks > 1:
        raise source.refuse(
            "attn_matrices", "means thirds of a projection in which query, key and value take turns head by head"
        )
    if source.config.get("composition_mode") == "scale" and float(source.config.get("alpha", 1)) != 1:
        raise source.refuse("alpha", "rescales the parts of a fused projection that are not adapted, too")
