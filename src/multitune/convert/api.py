"""`import_adapter` and `export_adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from multitune.adapter import Adapter
from multitune.convert.adapterhub import files
from multitune.convert.adapterhub.bridge import import_adapterhub
from multitune.convert.adapterhub.check import UNCHECKED, check_adapterhub
from multitune.convert.adapterhub.export import export_adapterhub
from multitune.convert.peft.bridge import export_peft, import_peft
from multitune.convert.peft.check import UNCHECKED as UNCHECKED_PEFT
from multitune.convert.peft.check import check_peft
from multitune.convert.peft.files import CONFIG_FILE, TENSOR_FILE
from multitune.convert.probe import Check
from multitune.convert.result import Exported, Imported, Taken
from multitune.errors import AdapterError, ConfigError, suggest
from multitune.files import replace_folder
from multitune.heads import Head
from multitune.merging import HEAD_CONFIG_FILE, HEAD_FILE, save_head_beside
from multitune.tasks import Task

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: Libraries whose checkpoints can be imported, and to which adapters can be exported.
FORMATS = {"import": ("peft", "adapters"), "export": ("peft", "adapters")}

_UNCHECKED = {"peft": UNCHECKED_PEFT, "adapters": UNCHECKED}

#: What an export writes.
_FILES = {
    "peft": (CONFIG_FILE, TENSOR_FILE),
    "adapters": (files.CONFIG_FILE, files.TENSOR_FILE, files.HEAD_CONFIG_FILE, files.HEAD_FILE),
}


def import_adapter(
    folder: str | Path,
    backbone: Backbone,
    output_dir: str | Path | None = None,
    *,
    source: str = "peft",
    name: str | None = None,
    kind: str | None = None,
    labels: Sequence[str] = (),
    template: Sequence[str] = ("{text}",),
    label: str = "",
    fresh_head: bool = False,
    max_length: int = 128,
    check_with: str | Path | None = None,
) -> Imported:
    """Take over another library's checkpoint.

    Args:
        folder: the checkpoint.
        backbone: the very model that it was trained on.
        output_dir: where to save the adapter; `None` keeps it in memory.
        source: library that wrote it, one of `FORMATS["import"]`.
        name: what to call the adapter; by default the folder's name.
        kind: kind of task; by default classification, regression for one output, tagging for a token classifier.
        labels: label names in the order of the head's outputs; by default the checkpoint's, or `LABEL_0`, ...
        template: parts of the task's template; their columns are what a row has to have.
        label: column of the answer in tables to evaluate on; "" for none.
        fresh_head: leave the checkpoint's head, or the lack of one, and draw a new one for `labels`, to be trained.
        max_length: tokens a text is cut to; checkpoints do not say.
        check_with: the Python of an environment that has the library `adapters`, to compare outputs with; PEFT is
            compared with in this one.

    Raises:
        AdapterError: the checkpoint is damaged, holds what our methods cannot express, or does not compute the same
            here; nothing is written.
        BackboneError: an encoder-decoder whose decoder runs.
        ConfigError: an unknown library; a head whose outputs are not as many as the labels, or as the kind of task
            needs; or an `output_dir` that holds something else.
        TaskError: labels, template and kind that do not fit one another.
    """
    _check_format("import", source, check_with)
    _check_whole(backbone)
    path = Path(folder)
    read = import_peft if source == "peft" else import_adapterhub
    taken = read(path, backbone, kind, with_head=not fresh_head)
    head, head_params, head_from = _head(taken, backbone, path, kind, labels, fresh_head)
    names = tuple(labels) or taken.labels or tuple(f"LABEL_{i}" for i in range(head.num_outputs))
    adapter = Adapter(
        name=name or path.resolve().name,
        method=taken.method,
        params=taken.params,
        head=head,
        head_params=head_params,
        task=Task(
            name=name or path.resolve().name,
            kind=head.kind,  # type: ignore[arg-type]  # the task checks it
            template=tuple(template),  # type: ignore[arg-type]
            label=label,
            labels=() if head.kind in ("regression", "embedding") else names,
        ),
        backbone=backbone.describe(),
        max_length=max_length,
        recipe=dict(taken.origin),
    )
    _check_labels(adapter)
    _check_shapes(adapter, backbone, path)
    logits = head_from == "checkpoint"
    if source == "peft":
        check = check_peft(adapter, backbone, path, head=logits)
    else:
        check = check_adapterhub(adapter, backbone, path, head=logits, python=check_with)
    saved = adapter if output_dir is None else adapter.save(output_dir)
    return Imported(adapter=saved, head=head_from, check=check, unchecked="" if check else _UNCHECKED[source])


def export_adapter(
    adapter: Adapter,
    backbone: Backbone,
    output_dir: str | Path,
    *,
    target: str = "peft",
    overwrite: bool = False,
    check_with: str | Path | None = None,
) -> Exported:
    """Write an adapter as another library's checkpoint.

    Where that library has no head that computes what ours does, the checkpoint holds the method alone, and
    beside it `head.safetensors` the head's tensors as `Head.shapes` names them, `head.json` what it reads and its
    labels.

    Args:
        output_dir: the folder to write.
        target: library to write for, one of `FORMATS["export"]`.
        overwrite: replace an earlier export there.
        check_with: as `import_adapter`.

    Raises:
        AdapterError: the library has no such method, or cannot express this one; says why. Nothing is written.
        BackboneError: the adapter belongs to another backbone, or one that runs an encoder and its decoder.
        ConfigError: an unknown library, or the folder holds something, unless it is an earlier export and `overwrite`.
    """
    _check_format("export", target, check_with)
    _check_whole(backbone)
    adapter.check_backbone(backbone)
    path = Path(output_dir)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"{path} exists and would be replaced; choose another folder, or give overwrite=True")
    done: list[tuple[str, bool, Check | None]] = []

    def write(temporary: Path) -> None:
        if target == "peft":
            task = export_peft(adapter, backbone, temporary)
            head = task not in ("FEATURE_EXTRACTION", "CAUSAL_LM")
            check = check_peft(adapter, backbone, temporary, head=head)
        else:
            task = export_adapterhub(adapter, backbone, temporary)
            head = task != "none"
            check = check_adapterhub(adapter, backbone, temporary, head=head, python=check_with)
        done.append((task, head, check))
        if not head and adapter.head_params:
            save_head_beside(adapter, temporary)

    replace_folder(path, write, ours=(*_FILES[target], HEAD_FILE, HEAD_CONFIG_FILE))
    ((task, inside, check),) = done
    head = "checkpoint" if inside else "beside" if adapter.head_params else "none"
    return Exported(path=path, task=task, head=head, check=check, unchecked="" if check else _UNCHECKED[target])


def _check_whole(backbone: Backbone) -> None:
    """Raise `AdapterError` for a quantised backbone, on which the other library would not compute the same.

    And `BackboneError` for an encoder-decoder whose decoder runs.
    """
    backbone.refuse_decoder("adapters are not converted yet", "train one here, or convert one of the encoder alone")
    if backbone.quantized is not None:
        name = backbone.name.removesuffix(f"+{backbone.quantized.scheme}")
        raise AdapterError(
            f"backbone '{backbone.name}' is quantised, and checkpoints of other libraries are compared on the "
            f"original: load {name!r}, and take adapters from one to the other with Adapter.moved_to(backbone)"
        )


def _check_format(direction: str, name: str, check_with: str | Path | None) -> None:
    known = FORMATS[direction]
    if name not in known:
        raise ConfigError(f"no format '{name}' to {direction}.{suggest(name, known)} There is {', '.join(known)}")
    if name == "peft" and check_with is not None:
        raise ConfigError("check_with is for adapters; PEFT is compared with where it is installed, here")


def _head(
    taken: Taken, backbone: Backbone, path: Path, kind: str | None, labels: Sequence[str], fresh: bool
) -> tuple[Head, dict[str, torch.Tensor], str]:
    if taken.head is not None:
        return *taken.head, "checkpoint"
    if not fresh and (labels or kind not in (None, "embedding")):
        raise AdapterError(
            f"{path}: the checkpoint holds no head that could answer with labels. Give fresh_head=True (--fresh-head) "
            f"for a new one, which has yet to be trained; or no labels, for an adapter that embeds texts"
        )
    if not fresh:
        return Head(kind="embedding", num_outputs=0, pooling="mean"), {}, "none"
    outputs = 1 if kind == "regression" else len(labels)
    if outputs == 0:
        raise ConfigError("a fresh head needs label names; give labels=('no', 'yes'), or --labels no,yes")
    head = Head(kind=kind or "classification", num_outputs=outputs)
    return head, head.init(backbone, torch.Generator().manual_seed(0)), "fresh"


def _check_labels(adapter: Adapter) -> None:
    if adapter.task.labels and len(adapter.task.labels) != adapter.head.num_outputs:
        raise ConfigError(
            f"the head has {adapter.head.num_outputs} outputs, but {len(adapter.task.labels)} labels were given: "
            f"{', '.join(adapter.task.labels)}; give one for each, in the order of the outputs"
        )
    adapter.head.check_task(adapter.task)


def _check_shapes(adapter: Adapter, backbone: Backbone, path: Path) -> None:
    expected = backbone.shapes_of(adapter.method)
    for name in sorted(set(expected) | set(adapter.params)):
        found = adapter.params[name].shape if name in adapter.params else None
        if found != expected.get(name):
            shown = [None if s is None else tuple(s) for s in (found, expected.get(name))]
            raise AdapterError(
                f"{path}: '{name}' would be {shown[0]} where {shown[1]} is expected; the checkpoint is of another model"
            )
