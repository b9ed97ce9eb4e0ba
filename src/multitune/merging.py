"""Merging: fold an adapter's deltas into a copy of the backbone and write an ordinary transformers checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from multitune.adapter import Adapter
from multitune.backbone import Backbone
from multitune.errors import AdapterError
from multitune.files import replace_folder
from multitune.frozen import writable
from multitune.plan import DeltaSet, Plan

HEAD_FILE, HEAD_CONFIG_FILE = "head.safetensors", "head.json"

#: Files of an earlier merge, which a new one may replace.
_MERGED = (
    HEAD_FILE, HEAD_CONFIG_FILE, "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "spm.model", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did."""

    path: Path
    """Folder of the checkpoint."""
    num_deltas: int
    """Deltas folded into weights."""
    max_difference: float | None
    """Largest absolute difference, merged against attached, on probe inputs: of the logits of words where the
    checkpoint is a language model, else of the last hidden states. `None` where the weights themselves were trained
    (full fine-tuning, tuning of layers): they are the checkpoint's and have no attached form."""
    max_magnitude: float | None
    """Largest absolute value of those logits or hidden states, to judge the difference by."""
    architecture: str
    """The class of transformers that the checkpoint is of."""
    head_beside: bool
    """Whether the adapter's head stands beside the model, in `head.safetensors` and `head.json`, because that class has
    no place for it."""


def why_not_mergeable(backbone: Backbone, deltas: DeltaSet, *, writes: bool = False) -> str | None:
    """The reason why some delta cannot be folded into the backbone's weights, or `None` if all can.

    Args:
        writes: whether the merged model is read through its language-model head.
    """
    if backbone.quantized is not None:
        return backbone.quantized.refusal(backbone.name, "take deltas into its weights")
    shared = {site.name for site in backbone.sites if site.shared}
    one_table = _why_not_the_words(backbone, writes)
    words = {site.name for site in backbone.sites if site.kind == "embedding"}
    for site, of_site in deltas.by_site.items():
        for delta in of_site:
            reason = delta.why_not_merge(backbone.frozen(site))
            if reason is None and site in shared:
                reason = "other layers run with the same weights, which cannot differ from layer to layer"
            if reason is None and site in words:
                reason = one_table
            if reason is not None:
                return f"its {delta.kind} at {site} cannot be folded into weights: {reason}"
    return None


def _why_not_the_words(backbone: Backbone, writes: bool) -> str | None:
    """Why the table of words cannot be changed for what reads it first alone, or `None` if it can."""
    if backbone.decodes:
        return "encoder, decoder and head have one table of words, which cannot differ among them"
    if writes and backbone.has_lm_head and backbone.lm_head.tied:
        return (
            "the language-model head is tied to the word embeddings; the adapter was trained with the head as it was, "
            "and a tied head would change with the words"
        )
    return None


def merge_deltas(backbone: Backbone, deltas: DeltaSet, *, writes: bool = False) -> Backbone:
    """A copy of the backbone with the deltas folded in; the backbone itself is not touched.

    Args:
        writes: whether the copy is to be read through its language-model head.

    Raises:
        AdapterError: a delta that cannot be merged; names the site and the reason.
    """
    reason = why_not_mergeable(backbone, deltas, writes=writes)
    if reason is not None:
        raise AdapterError(reason)
    merged = backbone.clone()
    with torch.no_grad():
        for site, of_site in deltas.by_site.items():
            # In the order they apply, so that a scale finds the low-rank update it scales; what changes the input
            # comes last, because it acts on all that reads the input.
            with writable(merged.frozen(site)) as module:
                for delta in sorted(of_site, key=lambda d: d.changes_input):
                    delta.merge(module)
    return merged


def merge(adapter: Adapter, backbone: Backbone, output_dir: str | Path) -> MergeReport:
    """Write the merged model as a plain transformers checkpoint, with its tokenizer.

    The folder holds `config.json`, `model.safetensors` and the tokenizer's files. Where transformers has a head that
    computes what the adapter's does (`...ForSequenceClassification`, `...ForTokenClassification`), the model is of that
    class, with the labels' names. Else it is the base model, and the head stands beside it: its tensors in
    `head.safetensors` as `Head.shapes` names them, what it reads and its labels in `head.json`. Of an adapter that
    writes, or ranks texts, it is a language model with its head, causal or an encoder-decoder.

    Args:
        adapter: a trained adapter of this backbone.
        output_dir: the folder to write; an earlier checkpoint there is replaced atomically.

    Raises:
        AdapterError: the adapter's method does not merge, its backbone has LSG attention, it ranks texts by the head
            of a masked language model, or it writes with new words on a model whose head is tied to the old ones; says
            why.
        BackboneError: the adapter belongs to another backbone.
        ConfigError: `output_dir` is a file, or a folder that holds something else.
    """
    from multitune.convert.heads import classifier_with  # its package imports this module

    adapter.check_backbone(backbone)
    if backbone.lsg is not None:
        raise AdapterError(
            f"adapter '{adapter.name}' cannot be merged: its backbone '{backbone.name}' has LSG attention, which a "
            f"plain transformers checkpoint cannot say. Serve it unmerged with Bank.predict"
        )
    if adapter.head.kind == "ranking" and not backbone.writes:
        raise AdapterError(
            f"adapter '{adapter.name}' cannot be merged: it answers through the head of a masked language model, which "
            f"the checkpoint of a base model has no place for. Serve it unmerged with Bank.predict"
        )
    writes = adapter.head.kind in ("generation", "ranking")
    if adapter.method.changes_weights:
        merged, num_deltas = backbone.with_weights(adapter.params), len(adapter.params)
        attached: Backbone | None = None
        deltas = DeltaSet({})
    else:
        params = {k: t.to(backbone.device) for k, t in adapter.params.items()}
        deltas = DeltaSet(adapter.method.deltas(params, backbone))
        try:
            merged = merge_deltas(backbone, deltas, writes=writes)
        except AdapterError as error:
            raise AdapterError(
                f"adapter '{adapter.name}' ({adapter.method.title}) cannot be merged: {error}. Serve it unmerged with "
                f"Bank.predict, which mixes it with any other"
            ) from error
        num_deltas = sum(len(d) for d in deltas.by_site.values())
        attached = backbone
    difference, magnitude = (None, None) if attached is None else _compare(attached, deltas, merged, writes=writes)
    folder = Path(output_dir)
    merged.detach()  # a checkpoint must not record the instrumented attention

    labels = adapter.task.labels
    whole = merged.language_model() if writes else classifier_with(adapter.head, adapter.head_params, labels, merged)
    model = merged.model if whole is None else whole
    beside = whole is None and bool(adapter.head_params)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        if backbone.tokenizer is not None:
            backbone.tokenizer.save_pretrained(temporary)
        if beside:
            save_head_beside(adapter, temporary)

    replace_folder(folder, write, ours=_MERGED)
    return MergeReport(
        path=folder,
        num_deltas=num_deltas,
        max_difference=difference,
        max_magnitude=magnitude,
        architecture=type(model).__name__,
        head_beside=beside,
    )


def save_head_beside(adapter: Adapter, folder: Path) -> None:
    """Write an adapter's head into the folder of a checkpoint that has no place for it.

    Its tensors, a regression's mean and deviation folded into them, go to `head.safetensors` as `Head.shapes` names
    them, what it reads and its labels to `head.json`.
    """
    head, folded = adapter.head.folded(adapter.head_params)
    tensors = {k: t.detach().cpu().contiguous() for k, t in folded.items()}
    save_file(tensors, folder / HEAD_FILE)
    about = {**head.settings(), "labels": list(adapter.task.labels)}
    (folder / HEAD_CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def _compare(attached: Backbone, deltas: DeltaSet, merged: Backbone, *, writes: bool) -> tuple[float, float]:
    """Largest difference of logits, or of hidden states, between attached and merged on eight rows of random ids."""
    generator = torch.Generator().manual_seed(0)
    length = min(32, attached.max_length)
    ids = torch.randint(attached.vocab_size, (8, length), generator=generator)
    ids[ids == attached.pad_id] = attached.placeholder_id  # some models derive positions from padding ids
    ids = ids.to(attached.device)
    with torch.no_grad():
        served = deltas.fused(attached.dtype, attached.device)
        written = ids if attached.decodes else None
        expected: Tensor = attached.run(Plan([served] * len(ids)), ids, decoder_input_ids=written)
        found = merged.run(Plan([None] * len(ids)), ids, decoder_input_ids=written)
        if writes:  # each by its own head, which is what the checkpoint answers with
            expected, found = attached.lm_head(expected), merged.lm_head(found)
    return float((expected - found).abs().max()), float(expected.abs().max())
