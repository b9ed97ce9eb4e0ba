"""The head of a masked language model: taken off a model that has it, or read from the backbone's checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from multitune.architectures import Architecture
from multitune.errors import BackboneError
from multitune.language_head import MaskedHead
from multitune.packaged import quietly

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def masked_head_of(model: PreTrainedModel, architecture: Architecture) -> MaskedHead | None:
    """The head of a masked language model; `None` for a model without one."""
    output, base = model.get_output_embeddings(), model.base_model
    here = all(hasattr(model, path) for path in architecture.masked_head)
    if not architecture.masked_head or base is model or not here or not isinstance(output, nn.Linear):
        return None
    return MaskedHead([model.get_submodule(path) for path in architecture.masked_head], output)


def read_masked_head(backbone: Backbone) -> MaskedHead:
    """The head in the checkpoint that a backbone was loaded from, tied to the backbone's own word embeddings.

    The base model was loaded without it, since a masked language model of transformers has no pooler.

    Raises:
        BackboneError: the checkpoint has none, or is not there any more.
    """
    paths, why = backbone.architecture.masked_head, "its checkpoint holds the base model without it"
    if not paths:
        why = "models of this type have none"
    elif backbone.source:
        model, missing = _load(backbone)
        head = masked_head_of(model, backbone.architecture)
        if head is not None and not any(key.startswith(tuple(f"{path}." for path in paths)) for key in missing):
            if head.weight is model.get_input_embeddings().weight:
                head.output.weight = backbone.word_embeddings
            head.modules.to(backbone.device)
            return head
    raise BackboneError(
        f"backbone '{backbone.name}' ({backbone.model.config.model_type}) has no head of a masked language model: "
        f"{why}. Load a checkpoint with it, such as one of class BertForMaskedLM, or give the pattern to a causal "
        f"language model, such as Backbone.load('smollm2')"
    )


def _load(backbone: Backbone) -> tuple[PreTrainedModel, list[str]]:
    """The masked language model with its own base, and the weights that its checkpoint lacks."""
    try:
        with quietly():
            model, report = AutoModelForMaskedLM.from_pretrained(
                backbone.source, dtype=backbone.dtype, output_loading_info=True, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BackboneError(
            f"cannot read the head of the masked language model from {backbone.source}: "
            f"{str(error).splitlines()[0]}. It is read when it is first needed; keep the checkpoint there"
        ) from error
    return model, list(report["missing_keys"])
