"""What transformers' own task heads compute, per kind of model, and which tensors of theirs our `Head` takes over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from multitune.errors import AdapterError, ConfigError, suggest
from multitune.heads import Dense, Head
from multitune.pooling import Pooling

if TYPE_CHECKING:
    from multitune.backbone import Backbone

SEQUENCE, TOKEN = "SEQ_CLS", "TOKEN_CLS"

#: Task -> the class that builds the model of a configuration.
BUILDERS: dict[str, Any] = {SEQUENCE: AutoModelForSequenceClassification, TOKEN: AutoModelForTokenClassification}


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """One of transformers' heads: `out(f(dense(pooled)))`, with the paths of its modules in the model."""

    pooling: Pooling = "cls"
    """What it reads, if it has no `dense` of its own or a trained one."""
    out: str = "classifier"
    """Path of the last linear map."""
    dense: str | None = None
    """Path of the layer before it."""
    activation: Dense = "none"
    """Activation of that layer."""
    pretrained: bool = False
    """Whether that layer is the base model's pooler, which a checkpoint may leave out because it is not trained."""
    bias: bool = True
    """Whether the last linear map has a bias."""


_DECODER = Classifier(pooling="last", out="score", bias=False)
_SEQUENCE = {
    "bert": Classifier(dense="bert.pooler.dense", activation="tanh", pretrained=True),
    "roberta": Classifier(dense="classifier.dense", activation="tanh", out="classifier.out_proj"),
    "xlm-roberta": Classifier(dense="classifier.dense", activation="tanh", out="classifier.out_proj"),
    "electra": Classifier(dense="classifier.dense", activation="gelu", out="classifier.out_proj"),
    "distilbert": Classifier(dense="pre_classifier", activation="relu"),
    "deberta-v2": Classifier(dense="pooler.dense", activation="gelu"),
    **dict.fromkeys(("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2"), _DECODER),
}
_TOKEN = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2")


def classifier_of(model_type: str, task: str | None) -> Classifier | None:
    """transformers' head for a task on a kind of model, or `None` where it has none that is known here."""
    if task == TOKEN:
        return Classifier() if model_type in _TOKEN else None
    return _SEQUENCE.get(model_type) if task == SEQUENCE else None


def read_head(
    tensors: Mapping[str, Tensor], backbone: Backbone, task: str, kind: str | None, where: str
) -> tuple[Head, dict[str, Tensor]]:
    """Our head from the tensors of transformers' one, by their paths in the model.

    Args:
        task: `SEQ_CLS` or `TOKEN_CLS`.
        kind: kind of task; by default regression for one output of a sequence, classification for several.

    Raises:
        AdapterError: a tensor is missing, or one that our head has no place for.
        ConfigError: a kind of task that this head is not for.
    """
    model_type = str(backbone.model.config.model_type)
    kinds = ("tagging",) if task == TOKEN else ("classification", "regression", "multilabel")
    if kind is not None and kind not in kinds:
        raise ConfigError(
            f"{where}: its head is for {task}, which is a task of kind {' or '.join(kinds)}, not '{kind}'."
            f"{suggest(kind, kinds)}"
        )
    form = classifier_of(model_type, task)
    if form is None:
        raise AdapterError(f"{where}: the head that transformers puts on '{model_type}' for {task} is not known here")
    places = {f"{form.out}.weight": "weight"} | ({f"{form.out}.bias": "bias"} if form.bias else {})
    if form.dense is not None:
        places |= {f"{form.dense}.weight": "dense_weight", f"{form.dense}.bias": "dense_bias"}
    unknown = sorted(set(tensors) - set(places))
    if unknown:
        raise AdapterError(
            f"{where}: it holds '{unknown[0]}', which is neither an adapter's tensor nor one of the head's "
            f"({', '.join(places)}); nothing else of the model can be taken over"
        )
    found = {ours: tensors[path].float() for path, ours in places.items() if path in tensors}
    missing = [path for path, ours in places.items() if ours not in found]
    has_dense = "dense_weight" in found
    if missing and not (form.pretrained and missing == [f"{form.dense}.weight", f"{form.dense}.bias"]):
        raise AdapterError(
            f"{where}: it lacks the head's '{missing[0]}'. Without it the head is a random one, another each time the "
            f"checkpoint is loaded; save it again with modules_to_save={_modules(form)!r}"
        )
    if form.pretrained and not has_dense and backbone.pooler is None:
        raise AdapterError(
            f"{where}: its head reads the pooler of the base model, which backbone '{backbone.name}' has not got"
        )
    outputs = found["weight"].shape[0]
    found.setdefault("bias", torch.zeros(outputs))
    if kind is None:
        kind = "tagging" if task == TOKEN else "regression" if outputs == 1 else "classification"
    pooling: Pooling = "pooler" if form.pretrained and not has_dense else form.pooling
    head = Head(kind=kind, num_outputs=outputs, pooling=pooling, dense=form.activation if has_dense else "none")
    return head, found


def write_head(head: Head, tensors: Mapping[str, Tensor], backbone: Backbone) -> tuple[str, dict[str, Tensor]] | None:
    """The task and tensors of the transformers head that computes the same as ours; `None` where there is none."""
    task = TOKEN if head.kind == "tagging" else SEQUENCE
    form = classifier_of(str(backbone.model.config.model_type), task)
    if form is None or head.kind in ("multiple_choice", "embedding"):
        return None
    if not form.bias and bool(tensors["bias"].any()):
        return None
    plain = task == TOKEN or (form.pretrained and head.pooling == "pooler")
    plain = plain or (form.dense is None and head.pooling == form.pooling)
    if head.dense == "none" and not plain:
        return None
    if head.dense != "none" and (form.dense is None or (head.pooling, head.dense) != (form.pooling, form.activation)):
        return None
    out = {f"{form.out}.{k}": tensors[k] for k in (("weight", "bias") if form.bias else ("weight",))}
    if head.dense != "none":
        out |= {f"{form.dense}.{k}": tensors[f"dense_{k}"] for k in ("weight", "bias")}
    return task, out


def saved_modules(task: str, paths: Mapping[str, Tensor]) -> list[str]:
    """`modules_to_save` of the modules with these tensors: the names that PEFT looks for."""
    named = {path.rsplit(".", 1)[0] for path in paths}
    return sorted({name.removesuffix(".dense").removesuffix(".out_proj").rsplit(".", 1)[-1] for name in named})


def _modules(form: Classifier) -> list[str]:
    paths = [form.out, *([form.dense] if form.dense else [])]
    return sorted({p.removesuffix(".dense").removesuffix(".out_proj").rsplit(".", 1)[-1] for p in paths})


def model_with_head(backbone: Backbone, task: str, num_outputs: int) -> nn.Module:
    """A fresh transformers model for a task with the backbone's weights in it; its head is random."""
    import copy

    config = copy.deepcopy(backbone.model.config)
    config.num_labels = num_outputs
    config.pad_token_id = backbone.pad_id  # by which a decoder's classifier finds the last token
    implementation = str(backbone.model.config._attn_implementation).removeprefix("multitune_")
    model = BUILDERS[task].from_config(config, attn_implementation=implementation)
    model.base_model.load_state_dict(backbone.model.state_dict(), strict=False)  # with or without the pooler
    return model.to(backbone.device, backbone.dtype).eval()
