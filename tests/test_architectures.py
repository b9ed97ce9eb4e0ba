"""What single architectures need: layers that share their weights, encoders of encoder-decoders, factorised words."""

import pytest
import torch

from multitune import (
    IA3,
    AdapterError,
    Backbone,
    BitFit,
    DeltaSet,
    FullFineTuning,
    LoRA,
    Plan,
    PTuningV2,
    get_method,
    method_names,
)
from multitune.merging import merge, merge_deltas

MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]


def run(backbone, sets, rows):
    with torch.no_grad():
        return backbone.run(Plan(sets), *rows.padded())


# ---- ALBERT: one module runs as several layers


@pytest.fixture(scope="module")
def unshared(make_model):
    """The tiny ALBERT with a copy of its weights for every layer, so that each module runs once."""
    shared = make_model("albert")
    config = shared.config
    groups, passes = config.num_hidden_groups, config.num_hidden_layers
    model = make_model("albert", num_hidden_groups=passes)
    state = shared.state_dict()
    place = "encoder.albert_layer_groups."
    for name in model.state_dict():
        if name.startswith(place):
            group, rest = name.removeprefix(place).split(".", 1)
            state[name] = shared.state_dict()[f"{place}{int(group) * groups // passes}.{rest}"]
    model.load_state_dict(state)
    return Backbone(model)


def test_layers_of_shared_weights_are_sites_of_their_own(make_backbone, unshared):
    shared = make_backbone("albert")
    assert shared.num_layers == unshared.num_layers == 8
    assert [s.name for s in shared.sites] == [s.name for s in unshared.sites]
    assert not any(s.shared for s in unshared.sites)
    assert {s.layer for s in shared.sites if s.shared} == set(range(8))
    modules = [s.module.split(".attention")[0] for s in shared.find_sites("linear", "query")]
    place = "encoder.albert_layer_groups."
    order = ["0.albert_layers.0", "0.albert_layers.1"] * 2 + ["1.albert_layers.0", "1.albert_layers.1"] * 2
    assert modules == [place + path for path in order]


@pytest.mark.parametrize("name", MIXABLE)
def test_a_delta_of_one_layer_acts_in_that_pass_alone(name, make_backbone, unshared, random_params, random_rows, close):
    shared, method = make_backbone("albert"), get_method(name)()
    rows = random_rows(shared, [4, 7, 5, 6])
    params = [random_params(shared, method, seed) for seed in (1, 2)]
    for fused in (False, True):
        outputs = []
        for backbone in (shared, unshared):
            sets = [DeltaSet(method.deltas(p, backbone)) for p in params]
            sets = [s.fused(backbone.dtype, backbone.device) for s in sets] if fused else sets
            outputs.append([run(backbone, [sets[i] for i in mix], rows) for mix in ([0, 0, 0, 0], [0, 1, 1, 0])])
        for ours, expected in zip(*outputs, strict=True):
            assert torch.isfinite(expected).all()
            close(ours, expected)


def test_one_layer_of_many_that_share_weights(make_backbone, unshared, random_params, random_rows, close):
    shared = make_backbone("albert")
    rows = random_rows(shared, [4, 6])
    seen = []
    for layer in range(8):
        method = LoRA(r=2, targets=("query", "value", "ffn_in", "ffn_out"), layers=(layer,))
        params = random_params(shared, method, 1, std=0.5)
        sets = DeltaSet(method.deltas(params, shared))
        out = run(shared, [sets, None], rows)
        close(out[0, :4], run(merge_deltas(unshared, sets), [None, None], rows)[0, :4])
        close(out[1], run(shared, [None, None], rows)[1])
        seen.append(out[0, :4])
        with pytest.raises(AdapterError, match=rf"at layer\.{layer}\.query cannot be folded .*other layers run with"):
            merge_deltas(shared, sets)
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(seen) for b in seen[:i])


def test_a_batch_that_failed_leaves_no_count_behind(make_backbone, delta_set, random_rows):
    backbone = make_backbone("albert")
    sets = [delta_set(backbone, LoRA(), 1)]
    rows = random_rows(backbone, [5])
    before = run(backbone, sets, rows)
    stop = backbone.model.encoder.albert_layer_groups[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(backbone, sets, rows)
    stop.remove()
    assert torch.equal(run(backbone, sets, rows), before)


def test_albert_pools_as_transformers_does(make_backbone, make_model, random_rows, close):
    backbone, plain = make_backbone("albert"), make_model("albert").eval()
    ids = random_rows(backbone, [6]).one(0)
    with torch.no_grad():
        close(backbone.pooler(backbone.run(Plan([None]), ids)), plain(input_ids=ids).pooler_output)


# ---- encoder-decoders: the encoder runs, the rest stays as it is


@pytest.fixture(params=["bart", "t5", "t5/gated", "t5/eager"])
def encoder_decoder(request, make_backbone):
    return make_backbone(request.param)


def test_only_the_encoder_runs_and_is_trained(encoder_decoder):
    backbone = encoder_decoder
    model, encoder = backbone.model, backbone.model.encoder
    assert backbone.running is encoder
    assert {s.module.split(".")[0] for s in backbone.sites} == {"encoder"}
    ran = []
    parts = [(n, m) for n, m in model.named_children() if n not in ("encoder", "shared")]
    handles = [m.register_forward_pre_hook(lambda *_: ran.append(1)) for _, m in parts]
    backbone.run(Plan([None]), torch.tensor([[5, 6, 7]]))
    for handle in handles:
        handle.remove()
    assert not ran and [n for n, _ in parts] == (["decoder"] if hasattr(model, "decoder") else [])
    names = FullFineTuning().init(backbone, torch.Generator()).keys()
    assert {id(model.get_parameter(n)) for n in names} == {id(p) for p in encoder.parameters()}
    assert backbone.num_parameters == sum(p.numel() for p in encoder.parameters())
    assert "shared.weight" in names and not any(n.startswith("decoder.") for n in names)


def test_an_encoder_decoder_is_kept_whole(encoder_decoder, make_model, random_adapter, delta_set, close, tmp_path):
    backbone = encoder_decoder
    plain = make_model(backbone.name).eval()
    assert list(backbone.model.state_dict()) == list(plain.state_dict())
    plain.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    loaded = Backbone.load(tmp_path)
    assert type(loaded.model) is type(plain)
    assert loaded.fingerprint == backbone.fingerprint
    ids = torch.tensor([[5, 6, 7, 8]])
    report = merge(random_adapter(loaded, LoRA(r=2), 1), loaded, tmp_path / "merged")
    assert report.max_difference < 1e-4 * report.max_magnitude
    merged = type(plain).from_pretrained(report.path).eval()
    sets = delta_set(loaded, LoRA(r=2), 1)
    with torch.no_grad():
        close(merged.encoder(input_ids=ids).last_hidden_state, loaded.run(Plan([sets]), ids))
    backbone.detach()
    words = dict(input_ids=ids) | (dict(decoder_input_ids=ids) if hasattr(plain, "decoder") else {})
    with torch.no_grad():  # decoder and all
        assert torch.equal(backbone.model(**words).last_hidden_state, plain(**words).last_hidden_state)


def test_the_longest_row_of_a_model_without_a_position_table(make_model):
    """T5's buckets of distances serve any length; the limit is the table's unless the config has one."""
    model = make_model("t5")
    del model.config.max_position_embeddings
    backbone = Backbone(model)
    assert backbone.max_length == 2048
    model.config.max_position_embeddings = 64
    assert backbone.max_length == 64


def test_the_pooling_that_suits_a_backbone(make_backbone):
    suits = {name: make_backbone(name).default_pooling for name in ("albert", "bart", "t5", "t5/gated", "mpnet")}
    assert suits == {"albert": "cls", "bart": "cls", "t5": "mean", "t5/gated": "mean", "mpnet": "cls"}


# ---- the first DeBERTa: query, key and value take turns head by head in one module, two of three with a bias apart


def split_by_hand(attention, head, which):
    """Weight `[K, I]` and bias `[K]` of one head's query, key or value, as the model's code lays them out."""
    width = attention.attention_head_size
    start = (3 * head + ("query", "key", "value").index(which)) * width
    bias = {"query": attention.q_bias, "value": attention.v_bias}.get(which, torch.zeros(attention.all_head_size))
    return attention.in_proj.weight[start : start + width], bias[head * width : (head + 1) * width]


def attention_by_hand(attention, rel_embeddings, x, mask, deltas):
    """One row `x [T, D]`: eq. 4 of arXiv 2006.03654, entry by entry, with a change of each kind; `[T, H*K]`."""
    tokens, heads, width = x.shape[0], attention.num_attention_heads, attention.attention_head_size
    terms = 1 + len(attention.pos_att_type)
    memory = len(deltas["keys"])
    span = min(tokens, attention.max_relative_positions)
    middle = attention.max_relative_positions
    rel = rel_embeddings[middle - span : middle + span]
    scores = torch.zeros(heads, tokens, memory + tokens, dtype=x.dtype)
    values = []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        q, k, v = (x @ w.T + b for w, b in (split_by_hand(attention, h, r) for r in ("query", "key", "value")))
        q = q + (x @ deltas["query.A"] @ deltas["query.B"])[:, own] * 2.0
        k = k + deltas["key.b"][own]
        v = v * (1 + deltas["value.s"][own])
        values.append(torch.cat([deltas["values"][:, own], v]))
        for i in range(tokens):
            scores[h, i, :memory] = deltas["keys"][:, own] @ q[i]
            for j in range(tokens):
                where = min(max(i - j + span, 0), 2 * span - 1)
                scores[h, i, memory + j] = q[i] @ k[j]
                if "c2p" in attention.pos_att_type:
                    scores[h, i, memory + j] += q[i] @ attention.pos_proj(rel)[where, own]
                if "p2c" in attention.pos_att_type:
                    scores[h, i, memory + j] += k[j] @ attention.pos_q_proj(rel)[where, own]
    scores = scores / torch.tensor(float(width * terms)).sqrt()  # in float32, as the model's code has it
    if attention.talking_head:
        scores = torch.einsum("gh,hqs->gqs", attention.head_logits_proj.weight, scores)
    scores[:, :, memory:][:, :, ~mask.bool()] = -torch.inf
    weights = scores.softmax(-1)
    if attention.talking_head:
        weights = torch.einsum("gh,hqs->gqs", attention.head_weights_proj.weight, weights)
    return torch.cat([weights[h] @ values[h] for h in range(heads)], dim=-1)


@pytest.mark.parametrize("name", ["deberta", "deberta/talking"])
@pytest.mark.parametrize("gradients", [False, True])
def test_projections_that_take_turns(name, gradients, make_model, random_params, random_rows, close):
    backbone = Backbone(make_model(name).double())
    methods = {
        "low rank": LoRA(r=2, alpha=4.0, targets=("query",)),
        "scale": IA3(outputs=("value",), inputs=()),
        "bias": BitFit(subset=("key",)),
        "memory": PTuningV2(length=3),
    }
    params, by_site = {}, {}
    for seed, method in enumerate(methods.values()):
        own = {k: t.double() for k, t in random_params(backbone, method, seed, std=0.5).items()}
        params |= {k.removeprefix("layer.0.").removeprefix("attention."): t for k, t in own.items() if "layer.0." in k}
        by_site |= method.deltas(own, backbone)
    sets = DeltaSet(by_site)
    width = backbone.hidden_size
    none = {k: t * 0 for k, t in params.items()} | {k: torch.zeros(0, width).double() for k in ("keys", "values")}
    attention = backbone.model.encoder.layer[0].attention
    seen = {}
    handles = [
        attention.register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0])),
        attention.output.dense.register_forward_pre_hook(lambda m, args: seen.update(attended=args[0])),
    ]
    ids, mask = random_rows(backbone, [5, 3, 4]).padded()
    plan = Plan([sets, sets, None])
    with torch.set_grad_enabled(gradients):
        backbone.run(plan, ids, mask)
    for handle in handles:
        handle.remove()
    order = range(3) if plan.order is None else plan.order.tolist()
    backbone.detach()
    with torch.no_grad():
        for place, row in enumerate(order):
            rel, x = backbone.model.encoder.get_rel_embedding(), seen["hidden"][place]
            expected = attention_by_hand(attention.self, rel, x, mask[row], params if row < 2 else none)
            real = mask[row].bool()
            close(seen["attended"][place][real], expected[real])


def test_parts_that_take_turns_merge(make_backbone, random_params):
    backbone = make_backbone("deberta")
    method = LoRA(r=2, alpha=4.0, targets=("query", "value"))
    params = random_params(backbone, method, 1)
    merged = merge_deltas(backbone, DeltaSet(method.deltas(params, backbone)))
    width, site = 8, "layer.0.value"
    update = (2.0 * params[f"{site}.A"] @ params[f"{site}.B"]).T
    for h in range(4):
        new, old = (split_by_hand(b.model.encoder.layer[0].attention.self, h, "value")[0] for b in (merged, backbone))
        torch.testing.assert_close(new, old + update[h * width : (h + 1) * width])
        new, old = (split_by_hand(b.model.encoder.layer[0].attention.self, h, "key")[0] for b in (merged, backbone))
        assert torch.equal(new, old)
    with pytest.raises(AdapterError, match=r"its Bias at layer\.0\.key cannot be folded .*has no bias to add it to"):
        method = BitFit(subset=("key", "query"))
        merge_deltas(backbone, DeltaSet(method.deltas(method.init(backbone, torch.Generator()), backbone)))
