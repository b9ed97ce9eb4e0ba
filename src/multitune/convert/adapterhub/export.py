"""From our methods to checkpoints of `adapters`: what `bottleneck.py`, `lora.py` and `prefix.py` read, written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from multitune.convert.adapterhub import bottleneck, lora, prefix
from multitune.convert.adapterhub.bridge import MODEL_TYPES
from multitune.convert.adapterhub.files import CONFIG_FILE, HEAD_CONFIG_FILE, HEAD_FILE, TENSOR_FILE
from multitune.convert.names import check_passes
from multitune.deltas import LowRank
from multitune.errors import AdapterError
from multitune.methods import Method, SiteMethod
from multitune.methods.ia3 import IA3
from multitune.methods.parallel import ParallelAdapter
from multitune.methods.phm_adapter import SHARED, PHMAdapter
from multitune.methods.prefix_memory import PrefixMemory
from multitune.methods.serial_adapter import SerialAdapter
from multitune.sites import Site

if TYPE_CHECKING:
    from multitune.adapter import Adapter
    from multitune.backbone import Backbone

#: The version whose form is written.
VERSION = "adapters.1.3.0"

#: Settings and tensors of a checkpoint: by module path, by the module that holds adapters, and by own name. Those that
#: all layers share have the holder `shared_parameters` and no path.
Written = tuple[dict[str, Any], dict[tuple[str, str, str], Tensor]]

_NESTED = ("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2")
"""Model types whose adapters sit in the modules `attention.output` and `output` of a layer."""
_SWAPPED = ("llama", "mistral")
"""Model types in which the library calls the feed-forward's last map `intermediate`, and one in front `output`."""
_NO_POOLER = ("deberta", "deberta-v2")


def export_adapterhub(adapter: Adapter, backbone: Backbone, folder: Path) -> str:
    """Write an adapter into a folder that exists.

    Returns:
        The library's type of the head that was written; `none` where it has none like ours.

    Raises:
        AdapterError: the library cannot express the method; says why.
    """
    model_type = str(backbone.model.config.model_type)
    try:
        if model_type not in MODEL_TYPES:
            raise AdapterError(f"not for '{model_type}', only for {', '.join(MODEL_TYPES)}")
        check_passes(adapter.params, backbone, "the library")
        config, tensors = _writer(adapter.method)(adapter.method, adapter.params, backbone)
    except AdapterError as error:
        raise AdapterError(f"adapter '{adapter.name}' cannot be exported to adapters: {error}") from error
    name = adapter.name.replace(".", "_")  # torch's modules cannot be called otherwise
    start = f"{backbone.model.base_model_prefix}."
    named = {
        f"{start}{path}{'.' if path else ''}{holder}.{name}.{own}": t for (path, holder, own), t in tensors.items()
    }
    common = {
        "name": name,
        "model_type": model_type,
        "model_name": backbone.name,
        "hidden_size": backbone.hidden_size,
        "model_class": type(backbone.model).__name__.removesuffix("Model") + "AdapterModel",
        "version": VERSION,
    }
    _write(folder / CONFIG_FILE, folder / TENSOR_FILE, common | {"config": config}, named)
    head = _head(adapter, backbone, name)
    if head is None:
        return "none"
    _write(folder / HEAD_CONFIG_FILE, folder / HEAD_FILE, common | {"config": head[0]}, head[1])
    return str(head[0]["head_type"])


def _write(file: Path, tensor_file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    # One buffer per tensor: safetensors refuses views that share memory.
    save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, tensor_file)


def _writer(method: Method) -> Callable[[Any, Mapping[str, Tensor], Backbone], Written]:
    if isinstance(method, SerialAdapter | ParallelAdapter):
        return _bottleneck
    if isinstance(method, IA3):
        return _ia3
    if isinstance(method, PrefixMemory):
        return _prefix
    if isinstance(method, SiteMethod) and method.name in ("lora", "rslora", "lora_plus", "adalora"):
        return _lora
    raise AdapterError(
        f"method '{method.name}' ({method.title}) has no counterpart that is written; what can be: pfeiffer, houlsby, "
        f"parallel, compacter, compacter_pp, lora, rslora, lora_plus, adalora, ia3, prefix, ptuning_v2"
    )


def _left_out(sites: list[Site], backbone: Backbone) -> list[int]:
    return sorted(set(range(backbone.num_layers)) - {s.layer for s in sites if s.layer is not None})


# ---------------------------------------------------------------- bottlenecks


def _bottleneck(method: SerialAdapter | ParallelAdapter, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
    sites = list(method.sites(backbone))
    _check_bottleneck(method, sites, backbone)
    roles = {s.role for s in sites}
    width, d = params[f"{sites[0].name}.down_bias"].shape[0], backbone.hidden_size
    activations = {ours: theirs for theirs, ours in bottleneck.ACTIVATION_NAMES.items()}
    config: dict[str, Any] = {
        "mh_adapter": "attention" in roles,
        "output_adapter": "ffn" in roles,
        "reduction_factor": d // width if d % width == 0 else d / (width + 0.5),  # of which the library takes the floor
        "non_linearity": activations[method.activation],
        "original_ln_before": isinstance(method, SerialAdapter) and method.reads == "norm",
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": isinstance(method, ParallelAdapter),
        "scaling": 1.0,
        "leave_out": _left_out(sites, backbone),
    }
    if isinstance(method, ParallelAdapter):
        config["scaling"] = "learned" if method.learn_scale else method.scale
    tensors: dict[tuple[str, str, str], Tensor] = {}
    if isinstance(method, PHMAdapter):
        config |= {"phm_layer": True, "phm_dim": method.phm_dim, "phm_rank": method.rank}
        tensors[("", "shared_parameters", "phm_rule")] = params[SHARED]
    for site in sites:
        for ours, theirs in _names(method).items():
            tensor = params[f"{site.name}.{ours}"]
            tensors[(_place(site, backbone), bottleneck.HOLDER, theirs)] = (
                tensor.T if ours in ("down", "up") else tensor
            )
    return config, tensors


def _names(method: Method) -> dict[str, str]:
    """Our names of a bottleneck's tensors -> the library's."""
    if isinstance(method, PHMAdapter):
        inside = {f"down_{side}": f"adapter_down.0.W_{side}" for side in ("left", "right")}
        inside |= {f"up_{side}": f"adapter_up.W_{side}" for side in ("left", "right")}
        return inside | {"down_bias": "adapter_down.0.b", "up_bias": "adapter_up.b"}
    names = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias"}
    names |= {"up": "adapter_up.weight", "up_bias": "adapter_up.bias"}
    return names | ({"scale": "scaling"} if getattr(method, "learn_scale", False) else {})


def _place(site: Site, backbone: Backbone) -> str:
    (layers,) = backbone.find_sites("layers")
    assert site.layer is not None
    nested = backbone.model.config.model_type in _NESTED
    ends = ("attention.output", "output") if nested else ("attention_adapters", "output_adapters")
    return f"{layers.layers[site.layer]}.{ends[site.role == 'ffn']}"


def _check_bottleneck(method: SerialAdapter | ParallelAdapter, sites: list[Site], backbone: Backbone) -> None:
    if getattr(method, "layer_norms", False):
        raise AdapterError("it trained layer norms too, and the library's adapters leave them frozen")
    other = [s.name for s in sites if s.role not in ("attention", "ffn")]
    if other:
        raise AdapterError(f"it stands behind {other[0]}, and the library's adapters behind attention and feed-forward")
    if isinstance(method, ParallelAdapter) and not backbone.architecture.post_norm:
        raise AdapterError("it reads what is behind the sub-layer's norm, and the library's what is in front of it")
    if any(s.shared and s.role == "attention" for s in sites):
        raise AdapterError("where layers share weights (ALBERT), the library swaps input and output behind attention")


# ---------------------------------------------------------------- LoRA, (IA)³ and prefixes


def _lora(method: SiteMethod, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
    sites = list(method.sites(backbone))
    deltas: dict[Site, LowRank] = {}
    for site in sites:
        own = {k.removeprefix(f"{site.name}."): t for k, t in params.items() if k.startswith(f"{site.name}.")}
        delta = method.delta(own, site, backbone)
        if not isinstance(delta, LowRank):
            raise AdapterError(f"it adapts {site.name}, where the library has no LoRA")
        deltas[site] = delta
    rank = max(d.A.shape[1] for d in deltas.values())
    config = _linear_config(sites, backbone) | {"r": rank, "alpha": deltas[sites[0]].scale * rank}
    config |= {"composition_mode": "add", "dropout": getattr(method, "dropout", 0.0), "init_weights": "lora"}
    tensors: dict[tuple[str, str, str], Tensor] = {}
    for module in dict.fromkeys(s.module for s in sites):
        parts = _parts(module, sites)
        wider = {s: (0, rank - deltas[s].A.shape[1]) for s in parts}  # zeros where a site's rank is lower
        tensors[(module, lora.HOLDER, "lora_A")] = torch.cat([F.pad(deltas[s].A, wider[s]).T for s in parts])
        tensors[(module, lora.HOLDER, "lora_B")] = torch.cat([F.pad(deltas[s].B.T, wider[s]) for s in parts])
    return config, tensors


def _ia3(method: IA3, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
    if method.inputs:
        raise AdapterError(
            f"it rescales the input of {', '.join(method.inputs)}, and the library rescales outputs only"
        )
    sites = list(method.sites(backbone))
    config = _linear_config(sites, backbone) | {"r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3"}
    tensors = {
        (module, lora.HOLDER, "lora_B"): torch.cat([1 + params[f"{s.name}.s"] for s in _parts(module, sites)])[:, None]
        for module in dict.fromkeys(s.module for s in sites)
    }
    return config, tensors


def _parts(module: str, sites: list[Site]) -> list[Site]:
    """The chosen parts of a module in the order of its outputs; of its passes, the first."""
    found = {s.part: s for s in reversed(sites) if s.module == module}
    return sorted(found.values(), key=lambda s: s.part or ())


def _linear_config(sites: list[Site], backbone: Backbone) -> dict[str, Any]:
    """Which maps of a layer are adapted, in the library's words."""
    if any(s.blocks > 1 for s in sites):
        raise AdapterError(
            "query, key and value take turns head by head in one projection, which the library cuts in three"
        )
    maps = ("ffn_in", "ffn_out")
    intermediate, output = maps[::-1] if backbone.model.config.model_type in _SWAPPED else maps
    roles = {s.role for s in sites}
    wrong = sorted(roles - set(lora.PARTS) - {intermediate, output})
    if wrong:
        raise AdapterError(f"it adapts {', '.join(wrong)}, where the library has no LoRA")
    attention = [short for role, short in lora.PARTS.items() if role in roles]
    return {
        "architecture": lora.NAME,
        "selfattn_lora": bool(attention),
        "attn_matrices": attention,
        "intermediate_lora": intermediate in roles,
        "output_lora": output in roles,
        "leave_out": _left_out(sites, backbone),
    }


def _prefix(method: PrefixMemory, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
    finished, params = method.finish(params, backbone)
    assert isinstance(finished, PrefixMemory)
    model_type = backbone.model.config.model_type
    if model_type not in prefix.SAME_IN_EVERY_BATCH:
        raise AdapterError(f"on '{model_type}' the library masks prefixes wrongly where another row is padded")
    if finished.shift_positions:
        raise AdapterError("it shifts the positions of the text, and the library's prefixes do not")
    sites = list(finished.sites(backbone))
    vectors = torch.stack([params[f"{s.name}.{key}"] for s in sites for key in ("keys", "values")], dim=1)
    config = {
        "architecture": prefix.NAME,
        "flat": True,
        "prefix_length": finished.length,
        "leave_out": _left_out(sites, backbone),
    }
    return config, {("prefix_tuning", prefix.HOLDER, "self_prefix.control_trans"): vectors.flatten()}


# ---------------------------------------------------------------- heads


def _head(adapter: Adapter, backbone: Backbone, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Settings and tensors of the library's head that computes what ours does; `None` where it has none."""
    head, tensors = adapter.head.folded(adapter.head_params)
    types = {"classification": "classification", "regression": "classification", "tagging": "tagging"}
    head_type = (types | {"multilabel": "multilabel_classification"}).get(head.kind)
    first = "last" if backbone.causal else "cls"
    use_pooler = head.pooling == "pooler" and backbone.model.config.model_type not in _NO_POOLER
    if head_type is None or head.norm_eps is not None:
        return None
    if head.kind != "tagging" and head.pooling != first and not use_pooler:
        return None
    layered = head.dense != "none"
    config: dict[str, Any] = {
        "head_type": head_type,
        "num_labels": head.num_outputs,
        "layers": 2 if layered else 1,
        "activation_function": head.dense if layered else None,
        "label2id": {label: i for i, label in enumerate(adapter.task.labels)} or None,
    }
    config |= {} if head.kind == "tagging" else {"use_pooler": use_pooler, "bias": True}
    last = f"heads.{name}.{4 if layered else 1}"
    found = {f"{last}.{k}": tensors[k] for k in ("weight", "bias")}
    return config, found | (
        {f"heads.{name}.1.{k}": tensors[f"dense_{k}"] for k in ("weight", "bias")} if layered else {}
    )
