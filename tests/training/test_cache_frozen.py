"""What frozen layers give is kept: the run is the uncached one without dropout there, and the layers run once."""

import pytest
import torch

import multitune as mt

SETTINGS = dict(max_steps=5, learning_rate=1e-3, evaluations_per_epoch=1)
UNKEPT = dict(cache_frozen="auto", cache_bytes=0)


def _quiet_below(backbone, layer):
    """Take dropout out of everything but the layers from `layer` on, module by module."""
    upper = {m for part in backbone.model.encoder.layer[layer:] for m in part.modules()}
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.Dropout) and module not in upper:
            module.p = 0.0
        if hasattr(module, "dropout_prob") and module not in upper:
            module.dropout_prob = 0.0
        if hasattr(module, "attention_dropout") and module not in upper:
            module.attention_dropout = 0.0


def _close(a, b):
    assert [e["step"] for e in a.history] == [e["step"] for e in b.history]
    for mine, theirs in zip(a.history, b.history, strict=True):
        for key in theirs.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-5), key
    for mine, theirs in ((a.adapter.params, b.adapter.params), (a.adapter.head_params, b.adapter.head_params)):
        assert set(mine) == set(theirs)
        for name, t in mine.items():
            if name == "bias" and a.adapter.task.kind == "multiple_choice":
                continue  # all choices share it, so that its gradient is rounding alone
            torch.testing.assert_close(t, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", [mt.TopLayers(count=1), mt.LoRA(layers=(2,)), mt.BitFit(layers=(1, 2))])
def test_the_frozen_part_runs_without_dropout(method, tiny, make_backbone, make_data, quick, same_tensors):
    layer = 1 if method.name == "bitfit" else 2
    found = quick(tiny, make_data(), method, **SETTINGS, **UNKEPT)
    other = make_backbone("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    _quiet_below(other, layer)
    same_tensors(found.adapter, quick(other, make_data(), method, **SETTINGS).adapter)
    assert found.cached_bytes == 0
    noisy = quick(tiny, make_data(), method, **SETTINGS)
    assert noisy.history != found.history  # so that the dropout above is a test


@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [
        (mt.TopLayers(count=1), "classification", {}),
        (mt.Freeze(first=1, last=1), "regression", {"pooling": "mean"}),
        (mt.LoRA(layers=(1, 2), dropout=0.1), "multiple_choice", {}),
        (mt.LoRA(layers=(2,)), "tagging", {"length_grouped": False}),
        (mt.make_method("lora+bitfit", {"lora.layers": (2,), "bitfit.layers": (1,)}), "classification", {}),
        (mt.SIFT(layers=(2,), density=0.1), "classification", {}),
        (mt.HeadOnly(), "classification", {"pooling": "cls"}),
        (mt.HeadOnly(), "multilabel", {"pooling": "mean"}),
        (mt.HeadOnly(), "multiple_choice", {"pooling": "last"}),
        (mt.HeadOnly(), "regression", {"pooling": "pooler"}),
        (mt.HeadOnly(), "tagging", {}),
        (mt.LoRA(layers=(2,)), "classification", {"gradient_checkpointing": True, "gradient_accumulation": 2}),
    ],
    ids=lambda value: getattr(value, "name", value if isinstance(value, str) else ""),
)
def test_a_cached_run_is_the_uncached_one(method, kind, more, tiny, make_data, quick):
    data, settings = make_data(kind), SETTINGS | more
    kept = quick(tiny, data, method, **settings, cache_frozen="memory")
    _close(kept, quick(tiny, data, method, **settings, **UNKEPT))
    assert kept.cached_bytes > 0


@pytest.mark.parametrize("name", ["t5", "gpt2", "deberta-v2/conv", "mpnet", "opt", "bart", "gemma3_text"])
def test_every_kind_of_layer_can_be_cached(name, make_backbone, make_data, quick, one_thread):
    backbone, method = make_backbone(name), mt.LoRA(layers=(1,))
    kept = quick(backbone, make_data(), method, **SETTINGS, cache_frozen="memory")
    _close(kept, quick(backbone, make_data(), method, **SETTINGS))  # no dropout in these backbones


def test_global_tokens_are_kept_too(tiny, make_data, quick):
    backbone = mt.convert_to_lsg(tiny, block=4, sparse=2, num_global=1)
    kept = quick(backbone, make_data(), mt.LoRA(layers=(2,)), **SETTINGS, cache_frozen="memory")
    _close(kept, quick(backbone, make_data(), mt.LoRA(layers=(2,)), **SETTINGS, **UNKEPT))


def test_mixed_precision_keeps_what_its_layers_give(tiny, make_data, quick):
    settings = SETTINGS | dict(precision="bf16", head_dropout=0.0)
    kept = quick(tiny, make_data(), mt.TopLayers(count=1), **settings, cache_frozen="memory")
    other = quick(tiny, make_data(), mt.TopLayers(count=1), **settings, **UNKEPT)
    for mine, theirs in zip(kept.history, other.history, strict=True):
        assert [mine[k] for k in mine if "loss" in k] == pytest.approx(
            [theirs[k] for k in mine if "loss" in k], rel=2e-2
        )


@pytest.mark.parametrize(("method", "below"), [(mt.LoRA(layers=(2,)), 2), (mt.HeadOnly(), 3)])
def test_frozen_layers_run_once_for_a_row(method, below, tiny, make_data, quick):
    rows = [0] * 3

    def count(module, args, kwargs, layer):
        rows[layer] += len(args[0])

    handles = [
        part.attention.register_forward_pre_hook(lambda m, a, k, i=i: count(m, a, k, i), with_kwargs=True)
        for i, part in enumerate(tiny.model.encoder.layer)
    ]
    quick(tiny, make_data(), method, **SETTINGS, cache_frozen="auto")
    for handle in handles:
        handle.remove()
    distinct = len({r["text"] for r in [*make_data().train, *make_data().validation]})
    assert rows[:below] == [distinct] * below
    assert all(count > distinct for count in rows[below:])


@pytest.mark.parametrize(
    ("method", "where"), [(mt.LoRA(layers=(2,)), "disk"), (mt.TopLayers(count=1), "memory"), (mt.HeadOnly(), "memory")]
)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    method, where, tiny, make_data, quick, same_tensors, tmp_path, monkeypatch
):
    settings = dict(epochs=3, max_steps=None, evaluations_per_epoch=2, cache_frozen=where)
    whole = quick(tiny, make_data(), method, tmp_path / "whole", **settings)
    calls = 0
    forward = mt.training.model.TuningModel.forward

    def stopping(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 9:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mt.training.model.TuningModel, "forward", stopping)
        quick(tiny, make_data(), method, tmp_path / "broken", **settings)
    assert not [p for p in (tmp_path / "broken").rglob("*") if ".frozen" in p.name]
    resumed = quick(tiny, make_data(), method, tmp_path / "broken", **settings)
    same_tensors(whole.adapter, resumed.adapter)
    assert resumed.history == whole.history


def test_memory_and_disk_keep_the_same(tiny, make_data, quick, same_tensors, tmp_path):
    runs = (("memory", None), ("disk", tmp_path / "a"), ("disk", None), ("auto", None))
    results = [
        quick(tiny, make_data(), mt.LoRA(layers=(2,)), out, **SETTINGS, cache_frozen=where) for where, out in runs
    ]
    for other in results[1:]:
        same_tensors(results[0].adapter, other.adapter)
        assert other.cached_bytes == results[0].cached_bytes
    texts = {r["text"] for r in [*make_data().train, *make_data().validation]}
    distinct = {tuple(tiny.tokenizer(text)["input_ids"]) for text in texts}
    assert results[0].cached_bytes == sum(map(len, distinct)) * 32 * 4


def test_what_cannot_be_kept_is_refused_or_reported(tiny, make_backbone, make_data, quick):
    lines = []
    with pytest.raises(mt.ConfigError, match="method 'lora' trains something in the lowest layer"):
        quick(tiny, make_data(), "lora", cache_frozen="memory")
    plain = quick(tiny, make_data(), "lora", **SETTINGS)
    found = quick(tiny, make_data(), "lora", **SETTINGS, cache_frozen="auto", report=lines.append)
    assert found.history == plain.history and "nothing is cached: method 'lora' trains" in lines[0]
    with pytest.raises(mt.ConfigError, match=r"takes \d+ bytes, more than cache_bytes=100"):
        quick(tiny, make_data(), mt.HeadOnly(), cache_frozen="disk", cache_bytes=100)
    quick(tiny, make_data(), mt.HeadOnly(), cache_frozen="auto", max_steps=2, report=lines.append)
    assert any("reads its rows only once" in line for line in lines)
    albert = make_backbone("albert")
    with pytest.raises(mt.ConfigError, match="share their weights"):
        quick(albert, make_data(), mt.LoRA(layers=(7,)), cache_frozen="memory")
    assert not tiny.model.training


def test_the_setting_is_recorded(tiny, make_data, quick, tmp_path):
    quick(tiny, make_data(), mt.HeadOnly(), tmp_path / "a", **SETTINGS, cache_frozen="memory")
    recipe = mt.Adapter.load(tmp_path / "a", tiny).recipe
    assert recipe["cache_frozen"] == "memory" and recipe["cache_bytes"] == 2 * 2**30
