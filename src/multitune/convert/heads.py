"""What transformers' own task heads compute, per kind of model, and which tensors of theirs our `Head` takes over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

from multitune.errors import AdapterError, ConfigError, suggest
from multitune.heads import Dense, Head
from multitune.placing import place
from multitune.pooling import Pooling

if TYPE_CHECKING:
    from multitune.backbone import Backbone

SEQUENCE, TOKEN = "SEQ_CLS", "TOKEN_CLS"

#: Our kinds of task -> how transformers calls them in a model's configuration.
_PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}

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
    """Activation of that layer; by default that of the setting below."""
    activation_setting: str | None = None
    """Attribute of the configuration that names it, where there is one."""
    dense_bias: bool = True
    """Whether that layer has a bias."""
    norm: str | None = None
    """Path of a layer norm behind the activation."""
    eps: float = 0.0
    """What that norm adds to the variance."""
    norm_bias: bool = True
    """Whether that norm has an offset."""
    pretrained: bool = False
    """Whether that layer is the base model's pooler, which a checkpoint may leave out because it is not trained."""
    bias: bool = True
    """Whether the last linear map has a bias."""

    @property
    def places(self) -> dict[str, str]:
        """Paths of its tensors -> what we call them; the norm's are `gain` and `offset`, which ours folds away."""
        found = {f"{self.out}.weight": "weight"} | ({f"{self.out}.bias": "bias"} if self.bias else {})
        if self.dense is not None:
            found[f"{self.dense}.weight"] = "dense_weight"
            if self.dense_bias:
                found[f"{self.dense}.bias"] = "dense_bias"
        if self.norm is not None:
            found[f"{self.norm}.weight"] = "gain"
            if self.norm_bias:
                found[f"{self.norm}.bias"] = "offset"
        return found


#: Classifiers that read the decoder, which does not run here.
_READ_DECODER = ("t5", "bart")
_DECODER = Classifier(pooling="last", out="score", bias=False)
_MODERNBERT = Classifier(dense="head.dense", activation_setting="classifier_activation", norm="head.norm")
_SEQUENCE = {
    "bert": Classifier(dense="bert.pooler.dense", activation="tanh", pretrained=True),
    "roberta": Classifier(dense="classifier.dense", activation="tanh", out="classifier.out_proj"),
    "xlm-roberta": Classifier(dense="classifier.dense", activation="tanh", out="classifier.out_proj"),
    "electra": Classifier(dense="classifier.dense", activation="gelu", out="classifier.out_proj"),
    "mpnet": Classifier(dense="classifier.dense", activation="tanh", out="classifier.out_proj"),
    "albert": Classifier(dense="albert.pooler", activation="tanh", pretrained=True),
    "distilbert": Classifier(dense="pre_classifier", activation="relu"),
    **dict.fromkeys(
        ("deberta", "deberta-v2"), Classifier(dense="pooler.dense", activation_setting="pooler_hidden_act")
    ),
    "modernbert": _MODERNBERT,
    **dict.fromkeys(("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2"), _DECODER),
}
_PLAIN_TOKEN = (
    "bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta", "deberta-v2", "albert", "mpnet", "t5",
)  # fmt: skip
_TOKEN = {**dict.fromkeys(_PLAIN_TOKEN, Classifier()), "modernbert": _MODERNBERT}


def classifier_of(config: Any, task: str | None) -> Classifier | None:
    """transformers' head for a task on models of a configuration, or `None` where ours has no form of it."""
    forms: Mapping[str, Classifier] = {SEQUENCE: _SEQUENCE, TOKEN: _TOKEN}.get(task or "", {})
    form = forms.get(str(config.model_type))
    if form is None or form.activation_setting is None:
        return form
    activation = getattr(config, form.activation_setting)
    if activation not in get_args(Dense):
        return None
    pooling: Pooling = "mean" if getattr(config, "classifier_pooling", "cls") == "mean" else form.pooling
    if form.norm is None:
        return replace(form, activation=activation)
    return replace(
        form,
        activation=activation,
        pooling=pooling,
        dense_bias=bool(config.classifier_bias),
        norm_bias=bool(config.norm_bias),
        eps=float(config.norm_eps),
    )


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
    form = classifier_of(backbone.model.config, task)
    if form is None:
        why = "reads the decoder, which does not run here" if model_type in _READ_DECODER else "is not known here"
        raise AdapterError(
            f"{where}: the head that transformers puts on '{model_type}' for {task} {why}. Give fresh_head=True "
            f"(--fresh-head) to import the adapter without it"
        )
    places = form.places
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
            f"checkpoint is loaded; save it again with modules_to_save={saved_modules(places)!r}"
        )
    if form.pretrained and not has_dense and backbone.pooler is None:
        raise AdapterError(
            f"{where}: its head reads the pooler of the base model, which backbone '{backbone.name}' has not got"
        )
    outputs = found["weight"].shape[0]
    found.setdefault("bias", torch.zeros(outputs))
    if has_dense:
        found.setdefault("dense_bias", torch.zeros(len(found["dense_weight"])))
    if form.norm is not None:  # linear, and so are the outputs behind it
        if "offset" in found:
            found["bias"] = found["bias"] + found["weight"] @ found.pop("offset")
        found["weight"] = found["weight"] * found.pop("gain")
    if kind is None:
        kind = "tagging" if task == TOKEN else "regression" if outputs == 1 else "classification"
    pooling: Pooling = "pooler" if form.pretrained and not has_dense else form.pooling
    head = Head(
        kind=kind,
        num_outputs=outputs,
        pooling=pooling,
        dense=form.activation if has_dense else "none",
        norm_eps=None if form.norm is None else form.eps,
    )
    return head, found


def write_head(head: Head, tensors: Mapping[str, Tensor], backbone: Backbone) -> tuple[str, dict[str, Tensor]] | None:
    """The task and tensors of the transformers head that computes the same as ours; `None` where there is none."""
    task = TOKEN if head.kind == "tagging" else SEQUENCE
    form = classifier_of(backbone.model.config, task)
    head, tensors = head.folded(tensors)
    if (
        form is None
        or head.kind in ("multiple_choice", "embedding", "generation", "ranking")
        or not _same_form(head, form)
    ):
        return None
    have = dict(tensors)
    if form.norm is not None:  # what the norm multiplies by and adds is in the outputs already
        have |= {"gain": torch.ones(have["weight"].shape[1]), "offset": torch.zeros(have["weight"].shape[1])}
    places = {path: ours for path, ours in form.places.items() if ours in have}
    if any(bool(have[k].any()) for k in set(tensors) - set(places.values())):  # a bias that theirs has no place for
        return None
    return task, {path: have[ours] for path, ours in places.items()}


def classifier_with(
    head: Head, tensors: Mapping[str, Tensor], labels: Sequence[str], backbone: Backbone
) -> PreTrainedModel | None:
    """transformers' model for a task, with the backbone's weights, our head and its labels' names in it.

    `None` where transformers has no head that computes what ours does, or the backbone's dtype rounds a regression's
    mean by more than a hundredth of its deviation.
    """
    fits = write_head(head, tensors, backbone)
    if fits is None or _rounds_the_mean(head, tensors, backbone.dtype):
        return None
    task, found = fits
    model: Any = model_with_head(backbone, task, head.num_outputs)
    unknown = model.load_state_dict(found, strict=False).unexpected_keys
    assert not unknown, unknown
    model.config.problem_type = _PROBLEMS.get(head.kind)
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
    whole: PreTrainedModel = model
    return whole


def _rounds_the_mean(head: Head, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether the folded head's bias, where the mean of a regression stands, is another number in this dtype."""
    if not head.rescales:
        return False
    bias = head.folded(tensors)[1]["bias"]
    return not bool(((bias.to(dtype).double() - bias.double()).abs() <= 0.01 * head.target_std).all())


def _same_form(head: Head, form: Classifier) -> bool:
    """Whether transformers' head computes what ours does, up to biases."""
    same_pooling = head.kind == "tagging" or head.pooling == form.pooling
    if head.dense == "none":
        return (form.dense is None and same_pooling) or (form.pretrained and head.pooling == "pooler")
    eps = None if form.norm is None else form.eps
    return form.dense is not None and same_pooling and (head.dense, head.norm_eps) == (form.activation, eps)


def saved_modules(paths: Iterable[str]) -> list[str]:
    """`modules_to_save` of the modules with these tensors: the names that PEFT looks for."""
    named = {path.rsplit(".", 1)[0] for path in paths}
    for inner in (".dense", ".out_proj", ".norm"):
        named = {name.removesuffix(inner) for name in named}
    return sorted({name.rsplit(".", 1)[-1] for name in named})


def model_with_head(backbone: Backbone, task: str, num_outputs: int) -> nn.Module:
    """A fresh transformers model for a task with the backbone's weights in it; its head is random."""
    import copy

    config = copy.deepcopy(backbone.model.config)
    config.num_labels = num_outputs
    config.pad_token_id = backbone.pad_id  # by which a decoder's classifier finds the last token
    implementation = str(backbone.model.config._attn_implementation).removeprefix("multitune_")
    model: Any = BUILDERS[task].from_config(config, attn_implementation=implementation)
    loaded = model.base_model.load_state_dict(backbone.model.state_dict(), strict=False)  # with or without the pooler
    # What the backbone has beyond that (T5's decoder) is not read; what it lacked would be random.
    odd = [key for key in loaded.missing_keys if "pooler" not in key]
    assert not odd, f"backbone '{backbone.name}' has no {odd} for {type(model).__name__}"
    place(model, backbone.device, backbone.dtype)
    found: nn.Module = model.eval()
    return found
