"""Bottlenecks (seq_bn, double_seq_bn, par_bn, Compacter):  o + A(z) in the library's terms.

With o a sub-layer's output, x what it is added to and LN the norm behind the sum, the library computes, for
`original_ln_after=True` and `residual_before_ln=True`,

- `LN(x + o + A(o))` as it is, `LN(x + o + A(LN(x + o)))` with `original_ln_before`;
- `LN(x + o + s A(x))` with `is_parallel`, which reads x also where the sub-layer itself reads a norm of x.

A is `scaling * (f(z W_d + b_d) W_u + b_u)`, its matrices `[M, D]` and `[D, M]`, transposed to ours; with `phm_layer`
they are `Σ_i A_i ⊗ (s_i t_i)`, as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from multitune.convert.adapterhub.source import Read, Source, whole_layers
from multitune.deltas import ACTIVATIONS
from multitune.errors import AdapterError
from multitune.methods.compacter import Compacter
from multitune.methods.compacter_pp import CompacterPP
from multitune.methods.houlsby import Houlsby
from multitune.methods.parallel import ParallelAdapter
from multitune.methods.pfeiffer import Pfeiffer
from multitune.methods.phm_adapter import SHARED
from multitune.sites import Site

NAME = "bottleneck"
#: Name of the module that holds the adapters.
HOLDER = "adapters"

_SETTINGS = frozenset(
    {
        "mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before", "original_ln_after",
        "is_parallel", "scaling", "residual_before_ln", "leave_out", "phm_layer", "phm_dim", "factorized_phm_W",
        "shared_phm_rule", "factorized_phm_rule", "phm_rank", "phm_bias",
        # How it started, what only training does, and what needs a setting that is refused where it is on.
        "init_weights", "init_weights_seed", "dropout", "stochastic_depth", "phm_c_init", "phm_init_range", "learn_phm",
        "hypercomplex_nonlinearity", "inv_adapter_reduction_factor", "adapter_residual_before_ln",
    }
)  # fmt: skip

#: The library's names of activations -> ours.
ACTIVATION_NAMES = {name: name for name in ACTIVATIONS if name != "identity"} | {"swish": "silu"}


def read(source: Source) -> Read:
    """Our method and its tensors.

    Raises:
        AdapterError: something that our methods cannot express; names it.
    """
    _check(source)
    adapters = {
        site: _Adapter(source, own, path) for path, own in source.tensors.items() for site in _sites(source, path)
    }
    roles = tuple(dict.fromkeys(s.role for s in source.backbone.sites if s in adapters))
    layers = {s.layer for s in adapters if s.layer is not None}
    common: dict[str, Any] = {"activation": _activation(source), "layers": whole_layers(source, layers)}
    width = _width(source, adapters)
    if source.config.get("is_parallel"):
        return _parallel(adapters, common | {"sublayers": roles, "bottleneck": width})
    common["reads"] = "norm" if source.config.get("original_ln_before") else "output"
    if roles == ("attention",):
        raise source.refuse("output_adapter", "leaves attention alone with a serial adapter, which no method here has")
    if source.config.get("phm_layer"):
        return _hypercomplex(source, adapters, common | {"bottleneck": width}, both=len(roles) == 2)
    params = {f"{s.name}.{k}": t for s, a in adapters.items() for k, t in a.dense(scaled=True).items()}
    if len(roles) == 2:
        return Houlsby(bottleneck=width, **common), params
    factor = source.backbone.hidden_size // width
    if factor == 0 or source.backbone.hidden_size // factor != width:
        raise source.refuse("reduction_factor", f"gives a width of {width}, which no whole factor does")
    return Pfeiffer(reduction_factor=factor, **common), params


def _check(source: Source) -> None:
    """Raise `AdapterError` for settings that change what an adapter computes into something ours do not."""
    config, post_norm = source.config, source.backbone.architecture.post_norm
    if config.get("use_gating"):
        raise source.refuse("use_gating", "closes the adapter by a gate that depends on the whole text")
    for key in ("ln_before", "ln_after"):
        if config.get(key):
            raise source.refuse(key, "gives the adapter a layer norm of its own")
    if config.get("inv_adapter"):
        raise source.refuse("inv_adapter", "puts an invertible adapter behind the embeddings")
    if not config.get("original_ln_after", True):
        raise source.refuse("original_ln_after", "leaves out the norm behind the adapter, or moves it in front")
    before = bool(config.get("original_ln_before")) and not config.get("is_parallel")
    if before and config.get("residual_before_ln", True) is not True:
        raise source.refuse("residual_before_ln", "adds the adapter to something else than the sub-layer's output")
    if before and not post_norm:
        raise source.refuse("original_ln_before", "reads the sum of input and output where no norm stands behind it")
    if config.get("is_parallel") and not post_norm:
        raise source.refuse("is_parallel", "reads what is in front of the sub-layer's norm, and ours what is behind it")
    if config.get("phm_layer"):
        _check_hypercomplex(source)
    source.refuse_unknown(_SETTINGS)


def _check_hypercomplex(source: Source) -> None:
    if source.config.get("is_parallel"):
        raise source.refuse("phm_layer", "is not there for parallel adapters here")
    for key in ("factorized_phm_W", "shared_phm_rule"):
        if not source.config.get(key, True):
            raise source.refuse(key, "is another form of hypercomplex layer than Compacter's")
    if source.config.get("shared_W_phm"):
        raise source.refuse("shared_W_phm", "has the adapters of all layers share their matrices")


def _activation(source: Source) -> str:
    name = str(source.config.get("non_linearity", "")).lower()
    if name not in ACTIVATION_NAMES:
        raise source.refuse("non_linearity", f"is none of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _sites(source: Source, path: str) -> list[Site]:
    sites = source.sublayers(path)
    if sites[0].role == "attention" and sites[0].shared:
        raise source.refuse(
            "mh_adapter", "has another meaning where layers share weights (ALBERT): the library swaps input and output"
        )
    return sites


def _width(source: Source, adapters: Mapping[Site, _Adapter]) -> int:
    widths = {a.width: s.name for s, a in adapters.items()}
    if len(widths) > 1:
        shown = ", ".join(f"{width} at {name}" for width, name in sorted(widths.items()))
        raise source.refuse("reduction_factor", f"gives layers different widths ({shown}), and ours have one")
    return next(iter(widths))


class _Adapter:
    """The tensors of one bottleneck."""

    def __init__(self, source: Source, own: Mapping[str, Tensor], path: str) -> None:
        self.source, self.own, self.path = source, own, path
        names = (
            {"adapter_down.0.W_left", "adapter_down.0.W_right", "adapter_up.W_left", "adapter_up.W_right"}
            if source.config.get("phm_layer")
            else {"adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"}
        )
        if source.config.get("phm_layer") and source.config.get("phm_bias", True):
            names |= {"adapter_down.0.b", "adapter_up.b"}
        if isinstance(source.config.get("scaling"), str):
            names |= {"scaling"}
        wrong = sorted(names ^ set(own))
        if wrong:
            state = "lacks" if wrong[0] in names else "holds an unknown"
            raise AdapterError(f"{source.where}: the adapter at '{path}' {state} tensor '{wrong[0]}'")

    @property
    def width(self) -> int:
        """M."""
        if "adapter_up.weight" in self.own:
            return self.own["adapter_up.weight"].shape[1]
        right = self.own["adapter_down.0.W_right"]
        return right.shape[0] * right.shape[2]

    @property
    def scale(self) -> Tensor:
        """What the update is multiplied by: `[1]`, or `[D]` where each feature has its own."""
        if "scaling" in self.own:
            return self.own["scaling"]
        return torch.tensor([float(self.source.config.get("scaling", 1.0))])

    def dense(self, *, scaled: bool) -> dict[str, Tensor]:
        """Both matrices and offsets in our form."""
        scale = self.scale if scaled else torch.ones(1)
        return {
            "down": self.own["adapter_down.0.weight"].T,
            "down_bias": self.own["adapter_down.0.bias"],
            "up": self.own["adapter_up.weight"].T * scale,
            "up_bias": self.own["adapter_up.bias"] * scale,
        }

    def factors(self) -> dict[str, Tensor]:
        """The factors of both matrices, and the offsets."""
        if self.scale.numel() > 1:
            raise self.source.refuse(
                "scaling", "scales features one by one, for which Compacter's factors have no place"
            )
        own, width = self.own, self.width
        return {
            "down_left": own["adapter_down.0.W_left"],
            "down_right": own["adapter_down.0.W_right"],
            "down_bias": own.get("adapter_down.0.b", torch.zeros(width)),
            "up_left": own["adapter_up.W_left"],
            "up_right": own["adapter_up.W_right"] * self.scale,
            "up_bias": own.get("adapter_up.b", torch.zeros(self.source.backbone.hidden_size)) * self.scale,
        }


def _parallel(adapters: Mapping[Site, _Adapter], settings: Mapping[str, Any]) -> Read:
    scaling = next(iter(adapters.values())).source.config.get("scaling", 1.0)
    learned = scaling == "learned"
    constant = scaling if isinstance(scaling, int | float) else 1.0
    method = ParallelAdapter(scale=float(constant), learn_scale=learned, **settings)
    params = {
        f"{site.name}.{key}": tensor
        for site, adapter in adapters.items()
        for key, tensor in adapter.dense(scaled=scaling == "channel").items()
    }
    return method, params | ({f"{s.name}.scale": a.scale for s, a in adapters.items()} if learned else {})


def _hypercomplex(source: Source, adapters: Mapping[Site, _Adapter], settings: Mapping[str, Any], both: bool) -> Read:
    shared = source.shared
    rule = shared.get("phm_rule")
    if rule is None and {"phm_rule_left", "phm_rule_right"} <= set(shared):
        rule = shared["phm_rule_left"] @ shared["phm_rule_right"]
    if rule is None:
        raise AdapterError(f"{source.where}: it lacks the 'phm_rule' that all hypercomplex layers share; save it again")
    params = {f"{site.name}.{key}": t for site, a in adapters.items() for key, t in a.factors().items()}
    rank = next(iter(adapters.values())).own["adapter_down.0.W_left"].shape[-1]
    method = (Compacter if both else CompacterPP)(phm_dim=rule.shape[0], rank=rank, **settings)
    return method, {SHARED: rule} | params
