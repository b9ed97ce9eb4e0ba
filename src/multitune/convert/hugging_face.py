"""A tuned Hugging Face model's adapter: its method's tensors, and its task head in our form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from multitune.convert.heads import SEQUENCE, TOKEN, classifier_of, read_head
from multitune.heads import Head
from multitune.methods import Method
from multitune.tasks import Task, Template

if TYPE_CHECKING:
    from multitune.adapter import Adapter
    from multitune.backbone import Backbone

#: What `config.problem_type` means in our words.
_KINDS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}


def adapter_of(
    model: PreTrainedModel,
    backbone: Backbone,
    method: Method,
    params: Mapping[str, Tensor],
    name: str,
    *,
    template: Template | None,
    max_length: int,
) -> Adapter:
    """An adapter with the head of `model`; one that embeds texts where our heads cannot hold the model's head."""
    from multitune.adapter import Adapter

    head, tensors = _head(model, backbone, name)
    task = Task(
        name=name,
        kind=head.kind,  # type: ignore[arg-type]  # the task checks it
        template=template or Template(("words",) if head.kind == "tagging" else ("{text}",)),
        labels=_labels(model, head.num_outputs) if head.kind not in ("regression", "embedding") else (),
    )
    return Adapter(
        name=name,
        method=method,
        params=params,
        head=head,
        head_params=tensors,
        task=task,
        backbone=backbone.describe(),
        max_length=max_length,
        recipe={"trained_by": f"attached to {type(model).__name__}"},
    )


def check_template(model: PreTrainedModel, template: Template) -> None:
    """Raise `TaskError` for a template by which an adapter of `model` could not read rows.

    For a check before training: `adapter_of` would refuse it after.
    """
    tags = _held(model)[0] == TOKEN
    labels = _labels(model, model.config.num_labels or 0) if tags else ()
    Task(name="attached", kind="tagging" if tags else "embedding", template=template, labels=labels)


def _labels(model: PreTrainedModel, number: int) -> tuple[str, ...]:
    named: dict[Any, str] = dict(model.config.id2label or {})
    return tuple(str(named.get(i, f"LABEL_{i}")) for i in range(number))


def _held(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """transformers' task of a head that ours can hold, or `None`; and the kind of task, where the model says it."""
    ends = {"ForSequenceClassification": SEQUENCE, "ForTokenClassification": TOKEN}
    task = next((t for end, t in ends.items() if type(model).__name__.endswith(end)), None)
    kind = _KINDS.get(str(getattr(model.config, "problem_type", None))) if task == SEQUENCE else None
    several = kind == "regression" and model.config.num_labels != 1  # our regression is of one number
    if task is None or several or classifier_of(model.config, task) is None:
        return None, None
    return task, kind


def _head(model: PreTrainedModel, backbone: Backbone, name: str) -> tuple[Head, dict[str, Tensor]]:
    task, kind = _held(model)
    if task is None:
        return Head(kind="embedding", num_outputs=0, pooling="mean"), {}
    inside = {id(p) for p in model.base_model.parameters()}
    own = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if id(p) not in inside}
    own = {n: t for n, t in own.items() if not n.startswith("multitune.")}
    return read_head(own, backbone, task, kind, f"adapter '{name}'")
