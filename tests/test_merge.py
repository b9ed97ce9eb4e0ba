"""Merging: what is written equals what was attached, and nothing else is lost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import multitune as mt
from multitune.deltas import InputScale, LowRank, Scale
from multitune.heads import mixed_logits
from multitune.merging import _compare, merge_deltas
from multitune.plan import DeltaSet, Plan


def pair(site, generator):
    """A low-rank update under scales of its input and of its output."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    low_rank = LowRank(A=draw(site.in_features, 2), B=draw(2, site.out_features), scale=0.5)
    return [low_rank, InputScale(s=draw(site.in_features)), Scale(s=draw(site.out_features))]


def test_scales_around_a_low_rank_update_merge_as_they_apply(bert):
    generator = torch.Generator().manual_seed(0)
    deltas = DeltaSet({s.name: pair(s, generator) for s in bert.find_sites("linear", ("ffn_out", "query"))})
    ids = torch.randint(5, bert.vocab_size, (3, 6), generator=generator)
    with torch.no_grad():
        attached = bert.run(Plan([deltas] * 3), ids)
        merged = merge_deltas(bert, deltas).run(Plan([None] * 3), ids)
        bare = bert.run(Plan([None] * 3), ids)
    assert not torch.allclose(attached, bare, atol=1e-3)
    torch.testing.assert_close(merged, attached, rtol=1e-4, atol=1e-5)


def test_a_half_precision_backbone_merges(make_backbone, random_adapter, tmp_path):
    backbone = make_backbone("bert")
    backbone.model.to(torch.bfloat16)
    report = mt.merge(random_adapter(backbone, mt.LoRA(r=2), 1), backbone, tmp_path / "out")
    assert report.max_difference < 0.1 * report.max_magnitude


@pytest.mark.parametrize(
    ("name", "kind", "pooling", "end"),
    [
        ("bert", "classification", "pooler", "ForSequenceClassification"),
        ("bert", "regression", "pooler", "ForSequenceClassification"),
        ("bert", "tagging", "cls", "ForTokenClassification"),
        ("llama", "multilabel", "last", "ForSequenceClassification"),
        ("t5", "tagging", "mean", "ForTokenClassification"),
        ("deberta-v2/v3", "tagging", "mean", "ForTokenClassification"),
    ],
)
def test_a_head_that_transformers_has_too_is_in_the_checkpoint(
    name, kind, pooling, end, make_backbone, random_adapter, tmp_path
):
    backbone = make_backbone(name)
    adapter = random_adapter(backbone, mt.LoRA(r=2), 1, kind=kind, pooling=pooling)
    if name == "llama":  # a decoder's classifier has no bias
        adapter.head_params["bias"].zero_()
    report = mt.merge(adapter, backbone, tmp_path)
    assert report.architecture.endswith(end) and not report.head_beside
    model, loading = getattr(transformers, f"AutoModel{end}").from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not (tmp_path / "head.safetensors").exists()
    if adapter.task.labels:
        assert tuple(model.config.id2label.values()) == adapter.task.labels
    ids = torch.randint(5, backbone.vocab_size, (3, 6), generator=torch.Generator().manual_seed(0))
    own = (adapter.head, adapter.head_params)
    with torch.no_grad():
        hidden = backbone.run(Plan([adapter.delta_set(backbone)] * 3), ids)
        ours = torch.stack(mixed_logits(backbone, [own] * 3, hidden, None))
        theirs = model.eval()(ids).logits
    torch.testing.assert_close(theirs.view_as(ours), ours, rtol=1e-4, atol=1e-5)


def test_a_head_that_transformers_has_not_stands_beside_the_checkpoint(bert, random_adapter, tmp_path):
    adapter = random_adapter(bert, mt.LoRA(r=2), 1, pooling="mean")
    report = mt.merge(adapter, bert, tmp_path)
    assert report.architecture == "BertModel" and report.head_beside
    about = json.loads((tmp_path / "head.json").read_text())
    assert (about["kind"], about["pooling"], about["labels"]) == ("classification", "mean", ["bad", "good", "mixed"])
    assert load_file(tmp_path / "head.safetensors").keys() == adapter.head_params.keys()
    score = random_adapter(bert, mt.LoRA(r=2), 1, pooling="mean", kind="regression")
    mt.merge(score, bert, tmp_path)  # no reader of these files need know of mean and deviation
    assert not any(key.startswith("target") for key in json.loads((tmp_path / "head.json").read_text()))
    weight = score.head_params["weight"] * score.head.target_std
    assert torch.equal(load_file(tmp_path / "head.safetensors")["weight"], weight)
    mt.merge(random_adapter(bert, mt.LoRA(r=2), 1, pooling="pooler"), bert, tmp_path)  # its head is in the model
    assert not (tmp_path / "head.json").exists() and not (tmp_path / "head.safetensors").exists()


@pytest.mark.parametrize(("dtype", "beside"), [("float32", False), ("bfloat16", True), ("float16", True)])
def test_a_mean_that_the_checkpoint_would_round_stands_beside_it(dtype, beside, make_model, random_adapter, tmp_path):
    """250,000 ± 4,000 is infinite in float16, and in bfloat16 a multiple of 1024."""
    backbone = mt.Backbone(make_model("bert").to(getattr(torch, dtype)))
    adapter = random_adapter(backbone, mt.LoRA(r=2), 1, kind="regression", pooling="pooler")
    adapter = replace(adapter, head=adapter.head.fitted([246_300, 254_500]))
    assert mt.merge(adapter, backbone, tmp_path).head_beside == beside
    if beside:
        bias = adapter.head_params["bias"] * adapter.head.target_std + adapter.head.target_mean
        assert torch.equal(load_file(tmp_path / "head.safetensors")["bias"], bias)


def test_other_files_are_not_replaced(bert, random_adapter, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    adapter = random_adapter(bert, mt.LoRA(r=2), 1)
    for write in (adapter.save, lambda folder: mt.merge(adapter, bert, folder)):
        with pytest.raises(mt.ConfigError, match=r"notes\.txt"):
            write(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    with pytest.raises(mt.ConfigError, match="is a file"):
        adapter.save(tmp_path / "notes.txt")


# ---- language models

WRITE = mt.Task(name="write", kind="generation", template=("{text} :",), label="y")
WORDS = mt.LoRA(r=2, targets=("embedding", "query"))


def writing(adapter):
    """The same adapter for a task that writes."""
    return replace(adapter, task=WRITE, head=mt.Head.for_task(WRITE), head_params={})


def test_words_that_a_tied_head_reads_too_are_not_changed(make_backbone, random_adapter, tmp_path):
    tied = make_backbone("gpt2")
    assert tied.lm_head.tied
    with pytest.raises(mt.AdapterError, match=r"at embedding .* head is tied to the word embeddings.*Bank\.predict"):
        mt.merge(writing(random_adapter(tied, WORDS, 1)), tied, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = mt.merge(random_adapter(tied, WORDS, 1, pooling="last"), tied, tmp_path / "out")  # no head reads words
    assert report.max_difference < 1e-4 * report.max_magnitude


def test_a_head_of_its_own_answers_as_before_with_merged_words(make_model, random_adapter, tmp_path, close):
    untied = mt.Backbone(make_model("gpt2", class_name="GPT2LMHeadModel", tie_word_embeddings=False))
    adapter = writing(random_adapter(untied, WORDS, 1))
    mt.merge(adapter, untied, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(5, untied.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(model(input_ids=ids).logits, untied.logits(Plan([adapter.delta_set(untied)] * 2), ids))


def test_what_is_compared_of_a_model_that_writes_are_its_logits(make_model, random_adapter):
    untied = mt.Backbone(make_model("gpt2", class_name="GPT2LMHeadModel", tie_word_embeddings=False))
    deltas = random_adapter(untied, mt.LoRA(r=2), 1).delta_set(untied)
    merged = merge_deltas(untied, deltas, writes=True)
    merged.lm_linear.weight.data.neg_()  # the hidden states are right, and the answers are not
    hidden, _ = _compare(untied, deltas, merged, writes=False)
    logits, magnitude = _compare(untied, deltas, merged, writes=True)
    assert hidden < 1e-4 and logits == pytest.approx(2 * magnitude, rel=1e-3)
