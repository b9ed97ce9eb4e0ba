"""What a PEFT checkpoint computes: by PEFT where it is installed, else by its tensors folded into plain weights."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from multitune.convert.heads import SEQUENCE, TOKEN, model_with_head
from multitune.convert.peft.bridge import split, task_of
from multitune.convert.peft.family import Source, family_of_type
from multitune.convert.peft.files import Checkpoint, read_checkpoint
from multitune.convert.probe import Check, Outputs, compare
from multitune.placing import place

if TYPE_CHECKING:
    from multitune.adapter import Adapter
    from multitune.backbone import Backbone

#: Why nothing was compared, and how to.
UNCHECKED = "PEFT is not installed here, and this method is no change of weights. To compare, pip install peft"


def check_peft(adapter: Adapter, backbone: Backbone, folder: Path, *, head: bool) -> Check | None:
    """Compare an adapter with the PEFT checkpoint in a folder.

    Args:
        head: whether to compare logits; hidden states otherwise.

    Returns:
        What was found; `None` where PEFT is not installed and the checkpoint is no change of weights.

    Raises:
        AdapterError: they do not compute the same.
    """
    checkpoint = read_checkpoint(folder)
    task = task_of(checkpoint)
    if importlib.util.find_spec("peft") is not None:
        import peft

        theirs = _by_peft(checkpoint, backbone, task, logits=head)
        return compare(adapter, backbone, theirs, by=f"PEFT {peft.__version__}", hidden=not head)
    folded = _by_folding(checkpoint, backbone, task if head else None)
    if folded is None:
        return None
    return compare(adapter, backbone, folded, by="its tensors folded into plain float64 weights", hidden=not head)


def _plain_model(backbone: Backbone, task: str | None, num_outputs: int) -> Any:
    """A model without instruments that PEFT would wrap for a task."""
    if task in (SEQUENCE, TOKEN):
        return model_with_head(backbone, task, num_outputs)
    bare = backbone.clone()
    bare.detach()
    if task != "CAUSAL_LM":
        return bare.model
    config = copy.deepcopy(bare.model.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    model.base_model.load_state_dict(bare.model.state_dict())
    place(model, backbone.device, backbone.dtype)
    return model.eval()


def _num_outputs(checkpoint: Checkpoint) -> int:
    ends = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
    return next((t.shape[0] for k, t in checkpoint.tensors.items() if k.endswith(ends) and t.ndim == 2), 2)


def _by_peft(checkpoint: Checkpoint, backbone: Backbone, task: str, *, logits: bool) -> Outputs:
    import peft

    one = family_of_type(checkpoint.peft_type, str(checkpoint.folder))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        model = _plain_model(backbone, task, _num_outputs(checkpoint))
        wrapped = peft.PeftModel.from_pretrained(model, str(checkpoint.folder)).to(backbone.device).eval()

    def outputs(ids: Tensor, mask: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if logits or task not in (SEQUENCE, TOKEN, "CAUSAL_LM"):
                out = wrapped(input_ids=ids, attention_mask=mask)
                found: Tensor = out.logits if logits else out.last_hidden_state
            else:
                found = wrapped(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        # Vectors of a prompt stand in front; a prefix is not among the outputs.
        return found[:, -ids.shape[1] :] if one.prompt and found.ndim == 3 else found

    return outputs


def _by_folding(checkpoint: Checkpoint, backbone: Backbone, task: str | None) -> Outputs | None:
    """What the model computes once changed by the checkpoint; `None` for a method that is no change of weights."""
    one = family_of_type(checkpoint.peft_type, str(checkpoint.folder))
    source, rest = split(checkpoint, one, backbone)
    with torch.random.fork_rng():  # on the CPU, where the checkpoint is, and where float64 is not slow
        model: Any = _plain_model(backbone, task, _num_outputs(checkpoint)).cpu().double()
    num_vectors = one.fold(source, model.base_model)
    if num_vectors is None:
        return None
    own = {k: t.double() for k, t in rest.items()}
    if task is not None:
        unexpected = model.load_state_dict(own, strict=False).unexpected_keys
        assert not unexpected, unexpected
    return _run_folded(model, source, num_vectors, backbone, logits=task is not None)


def _run_folded(model: Any, source: Source, num_vectors: int, backbone: Backbone, *, logits: bool) -> Outputs:
    words: Callable[[Tensor], Tensor] = model.base_model.get_submodule(backbone.architecture.embedding)
    assert isinstance(words, nn.Module)

    def outputs(ids: Tensor, mask: Tensor) -> Tensor:
        device, ids, mask = ids.device, ids.cpu(), mask.cpu()
        if num_vectors:
            front = source.tensors["prompt_embeddings"].double().expand(len(ids), -1, -1)
            inputs = torch.cat([front, words(ids)], dim=1)
            longer = torch.cat([mask.new_ones(len(ids), num_vectors), mask], dim=1)
            out = model(inputs_embeds=inputs, attention_mask=longer)
        else:
            out = model(input_ids=ids, attention_mask=mask)
        found: Tensor = (out.logits if logits else out.last_hidden_state).to(device)
        return found[:, -ids.shape[1] :] if found.ndim == 3 else found

    return outputs
