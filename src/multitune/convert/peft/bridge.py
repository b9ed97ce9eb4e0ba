"""Importing and exporting PEFT checkpoints: the adapter's own tensors by its family, the head by transformers' form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multitune.convert.heads import SEQUENCE, TOKEN, classifier_of, read_head, saved_modules, write_head
from multitune.convert.names import ModuleNames, check_passes
from multitune.convert.peft.family import Family, Source, family_of_method, family_of_type
from multitune.convert.peft.files import CONFIG_FILE, Checkpoint, read_checkpoint, write_checkpoint
from multitune.convert.result import Taken
from multitune.errors import AdapterError
from multitune.heads import Head

if TYPE_CHECKING:
    from multitune.adapter import Adapter
    from multitune.backbone import Backbone

#: Tasks of PEFT's whose model's own head is frozen: the adapter is the whole checkpoint.
_HEADLESS = ("FEATURE_EXTRACTION", "CAUSAL_LM")


def import_peft(folder: Path, backbone: Backbone, kind: str | None, *, with_head: bool = True) -> Taken:
    """Read a checkpoint: our method, its tensors, and the head if it holds one.

    Args:
        kind: kind of task; by default what the head's size suggests.
        with_head: whether to take over the head of a classifier.

    Raises:
        AdapterError: a missing or damaged file, or anything that our methods cannot express, by name.
    """
    checkpoint = read_checkpoint(folder)
    one = family_of_type(checkpoint.peft_type, str(folder))
    checkpoint.refuse_unknown(one.settings)
    source, rest = split(checkpoint, one, backbone)
    method, params = one.read(source)
    task = task_of(checkpoint)
    head: tuple[Head, dict[str, Tensor]] | None = None
    if task in (SEQUENCE, TOKEN) and with_head:
        head = read_head(rest, backbone, task, kind, str(folder))
        _check_prompt_head(checkpoint, one, head[0], task, backbone)
    elif rest and task not in (SEQUENCE, TOKEN):
        raise AdapterError(
            f"{folder}: '{min(rest)}' is no tensor of {checkpoint.peft_type}, and modules_to_save="
            f"{checkpoint.config.get('modules_to_save')!r} has no place in an adapter but for a classifier"
        )
    return Taken(
        method=method,
        # Layers that share weights share an adapter there and have one each here; files hold no tensor twice.
        params={k: t.float().contiguous().clone() for k, t in params.items()},
        head=head,
        origin={"imported_from": "peft", "peft_type": checkpoint.peft_type, "task_type": task},
    )


def task_of(checkpoint: Checkpoint) -> str:
    """PEFT's task, from the class of the model where the configuration does not say it.

    Raises:
        AdapterError: a task with a head that we have no counterpart of.
    """
    task = checkpoint.config.get("task_type")
    mapping: Mapping[str, Any] = checkpoint.config.get("auto_mapping") or {}
    name = str(mapping.get("base_model_class") or "")
    if task is None:
        ends = {"ForSequenceClassification": SEQUENCE, "ForTokenClassification": TOKEN, "ForCausalLM": "CAUSAL_LM"}
        task = next((t for end, t in ends.items() if name.endswith(end)), None)
        task = task or ("FEATURE_EXTRACTION" if "For" not in name and "LMHead" not in name else name)
    if task not in (SEQUENCE, TOKEN, *_HEADLESS):
        raise AdapterError(
            f"{checkpoint.folder / CONFIG_FILE}: task '{task}' has a head that is not supported here. What can be "
            f"imported: {', '.join((SEQUENCE, TOKEN, *_HEADLESS))}"
        )
    return str(task)


def split(checkpoint: Checkpoint, one: Family, backbone: Backbone) -> tuple[Source, dict[str, Tensor]]:
    """A checkpoint's own tensors as a source, and the others by their path in the model."""
    names = ModuleNames(backbone)
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        path = key.removeprefix("base_model.").removeprefix("model.")
        if one.owns(path):
            own[names.bare(path)] = tensor
        else:
            rest[path] = tensor
    return Source(checkpoint=checkpoint, tensors=own, backbone=backbone), rest


def _check_prompt_head(checkpoint: Checkpoint, one: Family, head: Head, task: str, backbone: Backbone) -> None:
    """Refuse heads that read something else behind a prompt than ours do."""
    where, name = checkpoint.folder, checkpoint.peft_type
    if not one.prompt or task == TOKEN:
        return
    if name != "PREFIX_TUNING":
        raise AdapterError(
            f"{where}: behind a prompt, PEFT's classifier on '{backbone.model.config.model_type}' reads the first "
            f"vector of the prompt instead of the first token, which our heads do not; import it without its head "
            f"(head='fresh', --fresh-head), and train that"
        )
    form = classifier_of(backbone.model.config, task)
    if form is None or not form.pretrained or head.dense != "none":
        raise AdapterError(f"{where}: PEFT itself cannot run this head behind a prefix, so there is nothing to equal")


def export_peft(adapter: Adapter, backbone: Backbone, folder: Path) -> str:
    """Write an adapter as a PEFT checkpoint into a folder that exists.

    Returns:
        The task it was written for: `CAUSAL_LM` of an adapter that writes; `FEATURE_EXTRACTION` where transformers has
        no head like ours.

    Raises:
        AdapterError: PEFT cannot express it; says why.
    """
    one = family_of_method(adapter.method)
    try:
        check_passes(adapter.params, backbone, "PEFT")
        written = one.write(adapter.method, adapter.params, backbone)
    except AdapterError as error:
        raise AdapterError(f"adapter '{adapter.name}' cannot be exported to PEFT: {error}") from error
    names = ModuleNames(backbone)
    task = "FEATURE_EXTRACTION"
    head: dict[str, Tensor] = {}
    fits = write_head(adapter.head, adapter.head_params, backbone)
    if fits is not None and not (one.prompt and not _reads_tokens(adapter.head, one)):
        task, head = fits
    if adapter.head.kind == "generation" or (adapter.head.kind == "ranking" and backbone.causal):
        task = "CAUSAL_LM"
    prefix = f"{names.prefix}." if task != "FEATURE_EXTRACTION" else ""
    start = "base_model." if one.prompt else "base_model.model."
    tensors = {k if one.prompt else f"{start}{prefix}{k}": t for k, t in written.tensors.items()}
    tensors |= {f"{start}{k}": t for k, t in head.items()}
    tensors |= {f"base_model.{k}": t for k, t in written.whole.items()}
    config = {
        "peft_type": one.peft_type,
        "task_type": task,
        "base_model_name_or_path": backbone.name,
        "inference_mode": True,
        "modules_to_save": saved_modules(head) or None,
        **written.config,
    }
    write_checkpoint(folder, config, tensors)
    return task


def _reads_tokens(head: Head, one: Family) -> bool:
    """Whether PEFT's head reads the same position as ours behind a prompt."""
    return head.kind == "tagging" or (one.peft_type == "PREFIX_TUNING" and head.dense == "none")
