"""Putting a backbone's instruments on: wrappers at its sites, attention that carries memories, layers run twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig, PreTrainedModel

from multitune import attention, hooks
from multitune.architectures import Architecture, AttentionKind
from multitune.current import recompute_context
from multitune.errors import BackboneError
from multitune.lsg import GLOBALS

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: Attention that does not go through transformers' attention interface: kind -> its form with deltas.
OWN_ATTENTION: dict[AttentionKind, Callable[..., Any]] = {
    "biased": attention.biased_attention,
    "disentangled": attention.disentangled_attention,
    "disentangled_fused": attention.disentangled_fused_attention,
}


def attach(backbone: Backbone) -> None:
    """Instrument the sites of a model that has no instruments; what takes them off goes to `backbone.undo`."""
    model = backbone.model
    if getattr(model, "_multitune_owner", None):
        raise BackboneError("this model already belongs to another Backbone; use that one, or detach() it first")
    backbone.undo = hooks.install(model, backbone.sites)
    try:
        _attach_attention(backbone)
        _attach_globals(backbone)
        _attach_decoder(backbone)
    except BackboneError:
        backbone.detach()
        raise
    model.__dict__["_multitune_owner"] = True
    backbone.undo.append(lambda: model.__dict__.pop("_multitune_owner", None))


def _attach_attention(backbone: Backbone) -> None:
    model, kind = backbone.model, backbone.architecture.attention_kind
    sites = [s for s in backbone.sites if s.kind == "attention"]
    here = hooks.by_module(sites)
    backbone.attention_names = {model.get_submodule(path): hooks.name_at(s) for (_, path), s in here.items()}
    if kind == "disentangled":
        for site in sites:
            prefix = site.name.rsplit(".", 1)[0]
            module = model.get_submodule(site.module)
            backbone.disentangled_sites[module] = (f"{prefix}.query", f"{prefix}.key", site.name)
    own = OWN_ATTENTION.get(kind)
    if own is not None:
        for module in backbone.attention_names:
            backbone.undo.append(hooks.wrap_forward(module, partial(partial, own, module)))
        return
    attention.register_attention()
    for config in attention_configs(model, backbone.architecture):
        before = config._attn_implementation
        if before not in attention.WRAPPED:
            raise BackboneError(
                f"attention implementation '{before}' cannot carry per-row memories; load the model with "
                f"attn_implementation='sdpa' or 'eager'"
            )
        config._attn_implementation = attention.PREFIX + before
        backbone.undo.append(partial(setattr, config, "_attn_implementation", before))


def attention_configs(model: PreTrainedModel, architecture: Architecture) -> list[PretrainedConfig]:
    """Where the running stacks read which attention to call: an encoder-decoder's may have configs of their own."""
    paths = [architecture.runs]
    if architecture.decoder is not None:
        paths = [architecture.layers.split(".")[0], architecture.decoder.runs]
    configs: list[Any] = [model.get_submodule(path).config for path in paths]
    return list({id(config): config for config in configs}.values())


def _attach_decoder(backbone: Backbone) -> None:
    """A decoder says when it begins, and takes its learned positions from the call where rows differ in them."""
    decoder = backbone.architecture.decoder
    if decoder is None:
        return
    backbone.undo.append(hooks.note_decoding(backbone.stepping))
    model, sites = backbone.model, [s for s in backbone.sites if s.kind == "attention"]
    backbone.cross_attention = frozenset(model.get_submodule(s.module) for s in sites if s.stack == "cross")
    own = [model.get_submodule(s.module) for s in sites if s.stack == "decoder"]
    by_distance = next((m for m in own if getattr(m, "has_relative_attention_bias", False)), None)
    backbone.distance_bias = None if by_distance is None else attention.distance_bias(by_distance)
    if decoder.positions is not None:
        backbone.undo.append(hooks.place_rows(backbone.model.get_submodule(decoder.positions)))


def _attach_globals(backbone: Backbone) -> None:
    """LSG: the global tokens go in front of every row where the embeddings are summed up and not yet normed."""
    if backbone.lsg is None or not backbone.lsg.num_global:
        return
    states = backbone.running._parameters.get(GLOBALS)
    if states is None:
        raise BackboneError(
            f"the configuration of '{backbone.name}' says that it was converted to LSG attention, but the model has no "
            f"global tokens; load the original by the name of the converted one: Backbone.load('NAME+lsg')"
        )
    (norm,) = backbone.architecture.embedding_norms.values()
    backbone.undo.append(hooks.prepend(backbone.model.get_submodule(norm), states))


def recompute_layers(backbone: Backbone) -> list[hooks.Undo]:
    """Have the layers recomputed in the backward pass; returns what undoes it where the model cannot by itself."""
    model = backbone.model
    if not model.supports_gradient_checkpointing:
        layers = next(s.layers for s in backbone.sites if s.kind == "layers")
        return hooks.checkpoint_layers(model, layers)
    settings = {"use_reentrant": False, "context_fn": recompute_context}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.23
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)
    return []


def keep_layers(backbone: Backbone) -> None:
    """Undo `recompute_layers` where the model recomputes them by itself."""
    model = backbone.model
    if not model.supports_gradient_checkpointing:
        return
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
