"""Copies of a backbone's weights: for full fine-tuning, for merging, and as models of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from multitune import attention, hooks
from multitune.errors import BackboneError
from multitune.instrument import OWN_ATTENTION, attention_configs
from multitune.placing import place

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def clone(backbone: Backbone) -> Backbone:
    """`Backbone.clone`: an independent copy."""
    shared: dict[int, Any] = {}  # a head that is tied to the word embeddings stays tied to the copy's
    # wrappers and all: other threads may be running batches, which need them
    model, mlm_head = copy.deepcopy(backbone.model, shared), copy.deepcopy(backbone.mlm_head, shared)
    hooks.strip(model)
    for site in backbone.sites:
        if site.kind == "attention" and backbone.architecture.attention_kind in OWN_ATTENTION:
            model.get_submodule(site.module).__dict__.pop("forward", None)
    for config in attention_configs(model, backbone.architecture):
        config._attn_implementation = str(config._attn_implementation).removeprefix(attention.PREFIX)
    model.__dict__.pop("_multitune_owner", None)
    own = replace(backbone.parts, base=model, linear=copy.deepcopy(backbone.lm_linear))
    copied = type(backbone)(model, backbone.tokenizer, backbone.name, decoder=backbone.decodes, parts=own)
    copied.mlm_head, copied.source = mlm_head, backbone.source
    copied.__dict__["fingerprint"] = backbone.fingerprint
    copied.tokenizer_lock = backbone.tokenizer_lock  # one tokenizer, one lock
    return copied


def language_model(backbone: Backbone) -> PreTrainedModel:
    """`Backbone.language_model`: transformers' own model with copies of the weights."""
    head = backbone.lm_head
    config = copy.deepcopy(backbone.model.config)
    config._attn_implementation = str(config._attn_implementation).removeprefix(attention.PREFIX)
    if backbone.decodes:
        model = _with_decoder(backbone, config)
    else:
        model = AutoModelForCausalLM.from_config(config)
        place(model, "cpu", backbone.dtype)
        model.base_model.load_state_dict(backbone.model.state_dict())
    if head.linear is not None and not backbone.decodes:
        model.get_output_embeddings().load_state_dict(head.linear.state_dict())
    if backbone.eos_ids:
        model.generation_config.eos_token_id = list(backbone.eos_ids)
    place(model, backbone.device, backbone.dtype)
    found: PreTrainedModel = model.eval()
    return found


def _with_decoder(backbone: Backbone, config: PretrainedConfig) -> Any:
    """An encoder-decoder of transformers' with copies of the weights; its head is tied where the backbone's is."""
    model: Any = AutoModelForSeq2SeqLM.from_config(config)
    place(model, "cpu", backbone.dtype)
    head, decoder, base = backbone.lm_head, backbone.architecture.decoder, model.base_model
    weights = backbone.model.state_dict()
    if base is model:  # T5 keeps its stacks beside its head
        model.load_state_dict(weights, strict=False)
    else:
        base.load_state_dict(weights)
    if head.linear is not None:
        model.set_output_embeddings(copy.deepcopy(head.linear))
    if head.bias is not None and decoder is not None and decoder.logit_bias is not None:
        getattr(model, decoder.logit_bias).copy_(head.bias)
    return model


def with_weights(backbone: Backbone, weights: Mapping[str, Tensor]) -> Backbone:
    """`Backbone.with_weights`: a copy with some weights replaced."""
    if backbone.quantized is not None:
        raise BackboneError(backbone.quantized.refusal(backbone.name, "have its weights replaced"))
    copied = clone(backbone)
    del copied.__dict__["fingerprint"]
    state = copied.model.state_dict()
    for name, tensor in weights.items():
        if name not in state:
            raise BackboneError(f"the adapter changes weight '{name}', which {backbone.name} does not have")
        state[name].copy_(tensor)
    return copied
