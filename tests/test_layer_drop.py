"""AdapterDrop: an adapter served without its deltas in some layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import multitune as mt

BY_LAYER = [
    mt.LoRA(r=2), mt.IA3(), mt.BitFit(), mt.LayerNormTuning(), mt.Houlsby(bottleneck=3), mt.PTuningV2(length=2),
    mt.UTuning(width=2), mt.Compacter(bottleneck=4), mt.MAM(prefix_length=2), mt.AttnScale(),
    mt.Combined(methods=(mt.LoRA(r=2), mt.PromptTuning(length=2))),
]  # fmt: skip


@pytest.mark.parametrize("method", BY_LAYER, ids=lambda m: m.name)
def test_a_dropped_layer_is_one_the_adapter_never_had(bert, random_adapter, method, close):
    """Against the same tensors of a method told to leave those layers out; a delta outside the layers stays."""
    adapter = random_adapter(bert, method, 1)
    text, bank = "not the very bad film", mt.Bank(bert)
    bank.add("whole", adapter)
    bank.add("dropped", adapter, drop_layers=(0, 1))

    def kept(m):
        if isinstance(m, mt.Combined):
            return mt.Combined(methods=tuple(kept(p) for p in m.methods))
        return dataclasses.replace(m, layers=(2,)) if "layers" in {f.name for f in dataclasses.fields(m)} else m

    smaller = kept(method)
    if isinstance(method, mt.BitFit):  # told to leave layers out, it leaves the norm of the embeddings out too
        bank.add("same", adapter, drop_layers=(1, 0, 1))
    else:
        params = {k: t for k, t in adapter.params.items() if ".0." not in f".{k}" and ".1." not in f".{k}"}
        bank.add("same", dataclasses.replace(adapter, method=smaller, params=params))
    whole, dropped, same, _ = bank.predict([(n, text) for n in ("whole", "dropped", "same", None)])
    close(dropped.logits, same.logits)
    assert (whole.logits - dropped.logits).abs().max() > 1e-3


def test_the_steps_of_a_dropped_layer_are_gone(bert, random_adapter):
    bank = mt.Bank(bert)
    bank.add("a", random_adapter(bert, mt.Houlsby(bottleneck=2), 1), drop_layers=(0, 1))
    assert set(bank.plan(["a", None]).steps) == {"layer.2.attention_sublayer", "layer.2.ffn_sublayer"}


def test_an_adapter_read_again_from_disk_is_still_without_its_layers(bert, random_adapter, tmp_path):
    one, two = (random_adapter(bert, mt.LoRA(r=2), seed).save(tmp_path / str(seed)) for seed in (1, 2))
    bank = mt.Bank(bert, memory_budget=1)
    bank.add("one", one, drop_layers=(0,))
    before = bank.predict([("one", "good film")])[0].logits
    bank.add("two", two)  # the budget drops the first
    bank.predict([("two", "good film")])
    assert torch.equal(bank.predict([("one", "good film")])[0].logits, before)


def test_evaluate_leaves_layers_out(bert, random_adapter):
    adapter = random_adapter(bert, mt.LoRA(r=4), 1)
    bank = mt.Bank(bert)
    bank.add("a", adapter, drop_layers=(0, 1))
    texts = ["good film", "bad", "the very good film", "not the film", "x"]
    labels = [bank.predict([("a", text)])[0].label for text in texts]
    rows = [{"text": text, "y": label} for text, label in zip(texts, labels, strict=True)]
    assert mt.evaluate(bert, adapter, rows, drop_layers=(0, 1)) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("method", "layers", "words"),
    [
        (mt.LoRA(), (0, 3), "drop_layers: layer 3 does not exist; this backbone has layers 0 to 2"),
        (mt.LoRA(), (-1,), "layer -1 does not exist"),
        (mt.LoRA(layers=(1, 2)), (0, 1), r"no deltas of its own in layer 0 .* it has some in layers \[1, 2\]"),
        (mt.PromptTuning(length=2), (0,), "no deltas of its own in layer 0 .* in no single layer, so serve it whole"),
        (mt.AoTFC(r=2), (0,), "no deltas of its own in layer 0"),
        (mt.HeadOnly(), (0,), "no deltas of its own in layer 0"),
        (mt.Combined(methods=(mt.LoRA(), mt.AoTFC(r=2))), (0,), "one TokenBias .* serves all layers at once"),
        (mt.FullFineTuning(), (0,), "Full fine-tuning, which changes the backbone's own weights"),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_what_cannot_be_left_out_is_refused(bert, random_adapter, method, layers, words):
    bank = mt.Bank(bert)
    with pytest.raises(mt.ConfigError, match=words):
        bank.add("a", random_adapter(bert, method, 1), drop_layers=layers)
    assert len(bank) == 0
