"""Copies of a backbone's weights: for full fine-tuning, for merging, and as models of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from multitune import attention, hooks
from multitune.errors import BackboneError
from multitune.instrument import OWN_ATTENTION

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
    config = model.get_submodule(backbone.architecture.runs).config
    assert isinstance(config, PretrainedConfig)
    config._attn_implementation = str(config._attn_implementation).removeprefix(attention.PREFIX)
    model.__dict__.pop("_multitune_owner", None)
    copied = type(backbone)(model, backbone.tokenizer, backbone.name)
    copied.lm_linear = copy.deepcopy(backbone.lm_linear)
    copied.mlm_head, copied.source = mlm_head, backbone.source
    copied.eos_ids = backbone.eos_ids
    copied.__dict__["fingerprint"] = backbone.fingerprint
    copied.tokenizer_lock = backbone.tokenizer_lock  # one tokenizer, one lock
    return copied


def language_model(backbone: Backbone) -> PreTrainedModel:
    """`Backbone.language_model`: transformers' own model with copies of the weights."""
    head = backbone.lm_head
    config = copy.deepcopy(backbone.model.config)
    config._attn_implementation = str(config._attn_implementation).removeprefix(attention.PREFIX)
    model = AutoModelForCausalLM.from_config(config)
    model.base_model.load_state_dict(backbone.model.state_dict())
    if head.linear is not None:
        model.get_output_embeddings().load_state_dict(head.linear.state_dict())
    if backbone.eos_ids:
        model.generation_config.eos_token_id = list(backbone.eos_ids)
    found: PreTrainedModel = model.to(device=backbone.device, dtype=backbone.dtype).eval()
    return found


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
