"""Causal backbones, sites that share a module, and norms without offset: each against the plain transformers model."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from multitune import (
    IA3,
    AdapterError,
    AoTFC,
    Backbone,
    Bank,
    BitFit,
    ConfigError,
    DeltaSet,
    Head,
    Houlsby,
    LayerNormTuning,
    LoRA,
    Plan,
    PromptTuning,
    PTuningV2,
    merge,
    train,
)
from multitune.deltas import Affine, Bias, InputScale, LowRank, Scale
from multitune.heads import pool
from multitune.merging import merge_deltas
from multitune.sites import find_sites

CAUSAL = ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
RMS = [name for name in CAUSAL if name not in ("gpt2", "opt")]
SHARED = {"gpt2": ("query", "key", "value"), "modernbert": ("query", "key", "value", "ffn_gate", "ffn_in")}


@pytest.fixture(scope="module")
def tiny(make_backbone):
    """`tiny(name)`: one backbone per architecture, shared."""
    made = {}
    return lambda name: made.setdefault(name, make_backbone(name))


@pytest.fixture
def plain(make_model):
    """`plain(name)`: the model as transformers has it, weights of `tiny(name)`."""
    return lambda name, **overrides: make_model(name, **overrides).eval()


def run(backbone, sets, ids, mask=None):
    with torch.no_grad():
        return backbone.run(Plan(sets), ids, mask)


def left(rows):
    """`input_ids` and `attention_mask` of the same rows padded on the left."""
    width = max(len(r) for r in rows.rows)
    ids = torch.stack([torch.cat([r.new_full((width - len(r),), rows.pad_id), r]) for r in rows.rows])
    mask = torch.stack([(torch.arange(width) >= width - len(r)).long() for r in rows.rows])
    return ids, mask


# ---- memories under causal masks, windows, rotary positions, shared heads and capped scores


def masks_by_hand(config, length, memory):
    """Per kind of layer an additive mask `[1, 1, T, M + T]`: all of the memory, then what the window holds."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = {"full_attention": key <= query}
    window = getattr(config, "sliding_window", None) or length
    seen["sliding_attention"] = seen["full_attention"] & (query - key < window)
    front = torch.ones(length, memory, dtype=torch.bool)
    masks = {kind: torch.cat([front, own], 1)[None, None] for kind, own in seen.items()}
    least = torch.finfo(torch.float32).min
    return {kind: torch.zeros(m.shape).masked_fill(~m, least) for kind, m in masks.items()}


def with_cache(model, ids, params):
    """The plain model on one row, the memory in its cache, positions counted without it."""
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    cache = DynamicCache()
    for i in range(model.config.num_hidden_layers):
        keys, values = (params[f"layer.{i}.attention.{k}"] for k in ("keys", "values"))
        cache.update(*(t.view(len(t), heads, -1).transpose(0, 1)[None] for t in (keys, values)), i)
    masks = masks_by_hand(model.config, len(ids), len(keys))
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if model.config.model_type == "mistral":  # it has one mask for all of its layers
        kinds = {"sliding_attention"}
    mask = {kind: masks[kind] for kind in masks} if len(kinds) > 1 else masks[kinds.pop()]
    with torch.no_grad():
        out = model(
            input_ids=ids[None], position_ids=torch.arange(len(ids))[None], past_key_values=cache, attention_mask=mask
        )
    return out.last_hidden_state[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_memory_equals_a_cache_filled_beforehand(tiny, plain, name, random_params, random_rows, close):
    backbone, model = tiny(name), plain(name)
    method = PTuningV2(length=3)
    params = [random_params(backbone, method, seed) for seed in (1, 2)]
    sets = [DeltaSet(method.deltas(p, backbone)) for p in params]
    for lengths in ([9, 9, 9], [9, 1, 7]):  # without a mask, and with one
        rows = random_rows(backbone, lengths)
        expected = [with_cache(model, rows.rows[i], params[i]) for i in (0, 1)]
        for ids, mask in (rows.padded(), left(rows)):
            mixed = run(backbone, [*sets, None], ids, mask)
            for i, n in enumerate(lengths[:2]):
                own = slice(0, n) if mask is None else mask[i].bool()
                close(mixed[i, own], expected[i])
        close(run(backbone, [sets[0]], rows.one(0))[0], expected[0])
        bare = run(backbone, [None], rows.one(0))[0]
        assert (bare - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_a_later_one(tiny, name, delta_set, random_rows):
    backbone = tiny(name)
    methods = [PTuningV2(length=3), PromptTuning(length=2), LoRA(), AoTFC(r=2)]
    sets = [*(delta_set(backbone, m, i, fused=True) for i, m in enumerate(methods)), None]
    ids = torch.stack(random_rows(backbone, [8] * len(sets)).rows)
    changed = ids.clone()
    changed[:, 5] = 5 + (changed[:, 5] + 1) % 80
    before, after = run(backbone, sets, ids), run(backbone, sets, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-5, atol=1e-6)
    assert ((before - after)[:, 5:].abs().amax((1, 2)) > 1e-3).all()


# ---- padding


@pytest.mark.parametrize("name", [*CAUSAL, "modernbert"])
def test_rows_padded_on_either_side_equal_the_rows_alone(tiny, plain, name, delta_set, random_rows, close):
    backbone, model = tiny(name), plain(name)
    methods = [
        LoRA(targets=("query", "key", "value", "attention_output", "ffn_in", "ffn_out")), PromptTuning(length=3),
        PromptTuning(length=2, position=-1), PTuningV2(length=3), BitFit(), AoTFC(r=2), Houlsby(bottleneck=3),
    ]  # fmt: skip
    sets = [*(delta_set(backbone, m, i, fused=True) for i, m in enumerate(methods)), None]
    lengths = [5, 3, 9, 7, 1, 6, 8, 4]
    rows = random_rows(backbone, lengths)
    right, mask = rows.padded()
    right_padded, left_padded = run(backbone, sets, right, mask), run(backbone, sets, *left(rows))
    for i, n in enumerate(lengths):
        alone = run(backbone, [sets[i]], rows.one(i))[0]
        close(right_padded[i, :n], alone)
        close(left_padded[i, -n:], alone)
    with torch.no_grad():
        close(alone, model(input_ids=rows.one(7)).last_hidden_state[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_the_id_that_pads_never_matters(tiny, name, delta_set, random_rows, close):
    backbone = tiny(name)
    assert 0 <= backbone.pad_id < backbone.vocab_size
    sets = [delta_set(backbone, AoTFC(r=2), 1, fused=True), delta_set(backbone, PromptTuning(length=2), 2), None]
    ids, mask = random_rows(backbone, [3, 4, 9]).padded()
    other = ids.masked_fill(mask == 0, 50)
    a, b = run(backbone, sets, ids, mask), run(backbone, sets, other, mask)
    close(a[mask.bool()], b[mask.bool()])


def test_a_model_without_a_padding_id_pads_with_the_end_of_text(make_model):
    ids = {"gpt2": 3, "llama": 2}
    for name, expected in ids.items():
        model = make_model(name)
        assert model.config.pad_token_id is None
        assert Backbone(model).pad_id == expected
    assert Backbone(make_model("llama", eos_token_id=[7, 8])).pad_id == 7
    assert Backbone(make_model("llama", eos_token_id=None)).pad_id == 0


def test_a_prompt_starts_at_the_size_that_the_model_gives_its_words(tiny):
    backbone = tiny("gemma3_text")
    vectors = PromptTuning(length=5).init(backbone, torch.Generator().manual_seed(0))["vectors"]
    words = backbone.word_embeddings * 32**0.5
    assert all(torch.isclose(words, v, rtol=1e-5).all(1).any() for v in vectors)


# ---- pooling


def test_the_last_real_token_is_pooled(tiny, random_rows):
    backbone = tiny("llama")
    assert backbone.default_pooling == "last" and tiny("modernbert").default_pooling == "cls"
    rows = random_rows(backbone, [3, 7, 1])
    for ids, mask in (rows.padded(), left(rows)):
        hidden = run(backbone, [None] * 3, ids, mask)
        last = [int(m.nonzero().max()) for m in mask]
        assert torch.equal(
            pool(backbone, hidden, mask, "last"), torch.stack([hidden[i, n] for i, n in enumerate(last)])
        )
    hidden = run(backbone, [None], rows.one(1))
    assert torch.equal(pool(backbone, hidden, None, "last"), hidden[:, 6])
    with pytest.raises(ConfigError, match="has no pretrained pooler; use pooling='last' or pooling='mean'"):
        Head(kind="classification", num_outputs=2, pooling="pooler").check(backbone)


# ---- sites that are a part of a module


def plain_weight(model, site):
    """The rows of a site in a plain model's weight as `[O, I]`, and in its bias, as views."""
    module = model.get_submodule(site.module)
    weight = module.weight.T if isinstance(module, transformers.pytorch_utils.Conv1D) else module.weight
    own = slice(*site.part) if site.part is not None else slice(None)
    return weight[own], module.bias[own] if module.bias is not None else None


@pytest.mark.parametrize("name", SHARED)
def test_a_part_of_a_module_is_a_site_of_its_own(tiny, plain, name, random_rows, close):
    """Each role by itself changes its own rows of the weight and no other, alone, in a mix and merged."""
    backbone = tiny(name)
    rows = random_rows(backbone, [6, 6, 6])
    ids, _ = rows.padded()
    g = torch.Generator().manual_seed(0)
    for role in SHARED[name]:
        (site,) = backbone.find_sites("linear", (role,), (1,))
        A, B, s, t = (torch.randn(n, generator=g) * 0.3 for n in (
            (site.in_features, 2), (2, site.out_features), (site.out_features,), (site.in_features,)
        ))  # fmt: skip
        b = torch.randn(site.out_features, generator=g) * 0.3 if site.bias else None
        deltas = [LowRank(A=A, B=B, scale=0.5), Scale(s=s), InputScale(s=t), *([Bias(b=b)] if b is not None else [])]
        one = DeltaSet({site.name: deltas})
        model = plain(name)
        with torch.no_grad():
            weight, bias = plain_weight(model, site)
            weight.copy_((weight + 0.5 * (A @ B).T) * (1 + s)[:, None] * (1 + t))
            if bias is not None:
                bias.copy_(bias * (1 + s) + b)
            expected = model(input_ids=ids).last_hidden_state
        served = one.fused(backbone.dtype, backbone.device)
        other = DeltaSet({site.name: [Scale(s=-s)], "layer.1.key": [InputScale(s=t)]}).fused(torch.float32, "cpu")
        for sets in ([one] * 3, [served, other, None], [None, served, other], [other, served, served]):
            out = run(backbone, sets, ids)
            for i, chosen in enumerate(sets):
                if chosen in (one, served):
                    close(out[i], expected[i])
        close(run(merge_deltas(backbone, one), [None] * 3, ids), expected)
        with torch.enable_grad():
            close(backbone.run(Plan([one, other, None]), ids)[0].detach(), expected[0])


@pytest.mark.parametrize("name", [*SHARED, "llama"])
def test_a_merged_checkpoint_is_an_ordinary_one(tiny, name, random_adapter, random_rows, close, tmp_path):
    backbone = tiny(name)
    targets = ("query", "value", "ffn_in", "attention_output")
    adapter = random_adapter(backbone, LoRA(r=2, targets=targets), 1)
    report = merge(adapter, backbone, tmp_path / "merged")
    assert report.max_difference < 1e-4 * report.max_magnitude
    model = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    rows = random_rows(backbone, [6, 6])
    deltas = DeltaSet(adapter.method.deltas(adapter.params, backbone))
    with torch.no_grad():
        close(model(input_ids=rows.padded()[0]).last_hidden_state, run(backbone, [deltas] * 2, rows.padded()[0]))


def test_a_module_that_is_not_made_of_equal_parts_is_refused(make_model):
    model = make_model("gpt2")
    model.h[0].attn.c_attn = nn.Linear(32, 95)
    with pytest.raises(Exception, match=r"the 95 outputs of 'h\.0\.attn\.c_attn' are not 3 equal parts"):
        find_sites(model, Backbone(make_model("gpt2")).architecture)


# ---- norms


@pytest.mark.parametrize("name", [*RMS, "modernbert"])
def test_a_gain_is_one_of_the_frozen_norm(tiny, plain, name, random_params, random_rows, close):
    """Every norm's weight raised by the gain, whether the model counts it from zero or from one."""
    backbone, model = tiny(name), plain(name)
    method = LayerNormTuning(embedding_norm=not backbone.causal)
    params = random_params(backbone, method, 1)
    assert {k.rsplit(".", 1)[1] for k in params} == {"gain"}
    assert len(params) == sum(s.kind == "norm" for s in backbone.sites)
    paths = {s.name: s.module for s in backbone.sites}
    with torch.no_grad():
        for key, gain in params.items():
            model.get_submodule(paths[key.removesuffix(".gain")]).weight.add_(gain)
    rows = random_rows(backbone, [6, 6])
    ids, _ = rows.padded()
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    close(run(backbone, [DeltaSet(method.deltas(params, backbone)), None], ids)[0], expected[0])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_offset_behind_a_norm_without_one_works_and_does_not_merge(tiny, plain, name, random_rows, close):
    backbone, model = tiny(name), plain(name)
    offset, gain = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    one = DeltaSet({"layer.1.ffn_norm": [Affine(gain=gain, offset=offset)]})
    (site,) = backbone.find_sites("norm", ("ffn_norm",), (1,))
    norm = model.get_submodule(site.module)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    twin = torch.stack([row / (sum(v * v for v in row) / 32 + eps).sqrt() for row in x])
    close(backbone.frozen(site.name).normalise(x), twin)
    with torch.no_grad():
        norm.weight.add_(gain)
    norm.register_forward_hook(lambda m, args, out: out + offset)
    ids = random_rows(backbone, [6, 6]).padded()[0]
    with torch.no_grad():
        close(run(backbone, [one, None], ids)[0], model(input_ids=ids).last_hidden_state[0])
    with pytest.raises(AdapterError, match=r"its Affine at layer\.1\.ffn_norm .*: the frozen norm has no offset"):
        merge_deltas(backbone, one)


def test_bitfit_adds_the_biases_that_linears_lack(tiny, random_adapter, tmp_path):
    roles = {site.role for site in BitFit().sites(tiny("llama"))}
    assert roles == {"query", "key", "value", "attention_output", "ffn_gate", "ffn_in", "ffn_out"}
    assert {s.role for s in BitFit().sites(tiny("gpt2"))} >= {"attention_norm", "ffn_norm", "final_norm", "query"}
    adapter = random_adapter(tiny("llama"), BitFit(), 1)
    with pytest.raises(AdapterError, match=r"its Bias at layer\.0\.query .*: the frozen linear map has no bias"):
        merge(adapter, tiny("llama"), tmp_path / "a")
    merge(random_adapter(tiny("qwen2"), BitFit(subset=("query", "value")), 1), tiny("qwen2"), tmp_path / "b")
    with pytest.raises(ConfigError, match="no bias there"):
        BitFit(subset=("ffn_norm",)).init(tiny("llama"), torch.Generator())


# ---- all methods at once, loading, training


def test_the_smaller_opt_with_norms_behind_and_projected_embeddings(make_model, delta_set, random_rows, tasks, close):
    overrides = dict(word_embed_proj_dim=20, do_layer_norm_before=False)
    plain = make_model("opt", **overrides).eval()
    backbone = Backbone(copy.deepcopy(plain))
    assert (backbone.hidden_size, backbone.output_size, backbone.word_embeddings.shape[1]) == (32, 20, 20)
    assert not any(s.role == "final_norm" for s in backbone.sites)
    head = Head.for_task(tasks["classification"], pooling="last")
    assert head.init(backbone, torch.Generator())["weight"].shape == (3, 20)
    methods = [PromptTuning(length=2), LoRA(), IA3(), AoTFC(r=2), LayerNormTuning(), Houlsby(bottleneck=2)]
    sets = [*(delta_set(backbone, m, i, fused=True) for i, m in enumerate(methods)), None]
    rows = random_rows(backbone, [4, 6, 2, 5, 3, 7, 6])
    mixed = run(backbone, sets, *rows.padded())
    for i, r in enumerate(rows.rows):
        close(mixed[i, : len(r)], run(backbone, [sets[i]], rows.one(i))[0])
    with torch.no_grad():
        close(mixed[6, :6], plain(input_ids=rows.one(6)).last_hidden_state[0])


@pytest.mark.parametrize("model_class", ["GPT2LMHeadModel", "LlamaForCausalLM", "ModernBertForMaskedLM"])
def test_a_language_models_checkpoint_loads_as_a_backbone(model_class, make_model, make_backbone, tmp_path):
    name = {"G": "gpt2", "L": "llama", "M": "modernbert"}[model_class[0]]
    body = make_model(name)
    whole = getattr(transformers, model_class)(body.config)
    whole.base_model.load_state_dict(body.state_dict())
    whole.save_pretrained(tmp_path)
    make_backbone(name).tokenizer.save_pretrained(tmp_path)
    loaded = Backbone.load(tmp_path)
    assert loaded.fingerprint == Backbone(body).fingerprint
    bank = Bank(loaded)
    assert bank.predict([(None, "good film")])[0].embedding.shape == (32,)


WORDS = ("the film", "not the very film", "very film film", "the")
ROWS = [{"text": f"{w} {y}" if i % 2 else f"{y} {w}", "y": y} for i, w in enumerate(WORDS * 4) for y in ("good", "bad")]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_a_causal_backbone(make_backbone, tasks, tmp_path, checkpointing):
    from multitune.tasks import TaskData

    data = TaskData(task=tasks["classification"], train=ROWS, validation=ROWS[:8], test=None)
    backbone = make_backbone("llama")
    settings = dict(epochs=4, batch_size=8, learning_rate=1e-2, progress=False, gradient_checkpointing=checkpointing)
    result = train(backbone, data, LoRA(r=4), tmp_path / "a", **settings)
    assert result.adapter.head.pooling == "last"
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.best_metric == 1.0
    bank = Bank(backbone)
    bank.add("a", tmp_path / "a")
    answers = bank.predict([("a", row["text"]) for row in ROWS[:8]] + [(None, "good")])
    assert [p.label for p in answers[:8]] == [row["y"] for row in ROWS[:8]]
