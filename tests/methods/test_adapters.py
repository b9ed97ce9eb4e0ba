"""Adapters and their relatives against their equations, put into a plain transformers model by hooks of the test."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import multitune as mt
from multitune.merging import merge_deltas, why_not_mergeable
from multitune.methods.phm_adapter import phm

MODELS = ["bert", "distilbert", "deberta-v2/v3"]

#: model -> operation -> module whose first argument is its input, module whose (first) output is its output
BERT = {
    "attention": ("attention.self", "attention.output.dense"),
    "ffn": ("intermediate.dense", "output.dense"),
    "block": ("", ""),
}
OPERATIONS = {
    "bert": ("encoder.layer", BERT),
    "deberta-v2/v3": ("encoder.layer", BERT),
    "distilbert": (
        "transformer.layer",
        {"attention": ("attention", "attention.out_lin"), "ffn": ("ffn.lin1", "ffn.lin2"), "block": ("", "")},
    ),
}
PROJECTIONS = {
    "bert": ("attention.self.query", "attention.output.dense"),
    "deberta-v2/v3": ("attention.self.query_proj", "attention.output.dense"),
    "distilbert": ("attention.q_lin", "attention.out_lin"),
}


class Plain:
    """A model nobody instruments, into which a test puts an equation by hooks of its own."""

    def __init__(self, name, make_model):
        self.name = name
        self.model = make_model(name).eval()
        self.layers = self.model.get_submodule(OPERATIONS[name][0])

    def beside(self, layer, operation, branch):
        """`OP(x) + branch(x)`."""
        enters, leaves = (self.layers[layer].get_submodule(p) for p in OPERATIONS[self.name][1][operation])
        seen = []

        def enter(module, args, kwargs):
            seen.append(args[0] if args else kwargs["hidden_states"])

        def leave(module, args, output):
            update = branch(seen.pop())
            return output + update if isinstance(output, torch.Tensor) else (output[0] + update, *output[1:])

        enters.register_forward_pre_hook(enter, with_kwargs=True)
        leaves.register_forward_hook(leave)

    def behind(self, layer, operation, change):
        """`change(OP(x))`."""
        leaves = self.layers[layer].get_submodule(OPERATIONS[self.name][1][operation][1])
        leaves.register_forward_hook(lambda module, args, output: change(output))

    def run(self, ids, mask):
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.fixture(scope="module", params=MODELS)
def backbone_and_plain(request, make_backbone, make_model):
    return make_backbone(request.param), lambda: Plain(request.param, make_model)


def compare(backbone, plain, method, params, random_rows, close):
    """Ours alone and in a mixed batch, trainable and fused, against the plain model with the equation in it."""
    lengths = [6, 3, 5]
    ids, mask = random_rows(backbone, lengths).padded()
    theirs = plain.run(ids, mask)
    deltas = mt.DeltaSet(method.deltas(params, backbone))
    fused = deltas.fused(backbone.dtype, backbone.device)
    other = mt.LoRA(r=2).init(backbone, torch.Generator().manual_seed(5))
    other = mt.DeltaSet(mt.LoRA(r=2).deltas({k: t + 0.1 for k, t in other.items()}, backbone))
    with torch.no_grad():
        bare = backbone.run(mt.Plan([None] * 3), ids, mask)
        for sets in ([deltas] * 3, [fused] * 3, [fused, other, None], [None, fused, other]):
            ours = backbone.run(mt.Plan(sets), ids, mask)
            for i, n in enumerate(lengths):
                if sets[i] in (deltas, fused):
                    close(ours[i, :n], theirs[i, :n])
                    assert (bare[i, :n] - theirs[i, :n]).abs().max() > 1e-2


def of_site(params, site):
    return {k.rsplit(".", 1)[1]: t for k, t in params.items() if k.rsplit(".", 1)[0] == site}


# ---- bottlenecks beside the feed-forward


@pytest.mark.parametrize("learned", [False, True])
def test_parallel_adapter(backbone_and_plain, random_params, random_rows, close, learned):
    """He et al. 2022, table 1 and section 4.6: FFN(x) + s (ReLU(x W_d + b_d) W_u + b_u)."""
    backbone, make_plain = backbone_and_plain
    method = mt.ParallelAdapter(bottleneck=5, scale=4.0, learn_scale=learned)
    params, plain = random_params(backbone, method, 1), make_plain()
    for i in range(backbone.num_layers):
        p = of_site(params, f"layer.{i}.ffn_sublayer")
        s = float(p["scale"]) if learned else 4.0
        plain.beside(
            i,
            "ffn",
            lambda x, p=p, s=s: s * ((x @ p["down"] + p["down_bias"]).clamp(min=0) @ p["up"] + p["up_bias"]),
        )
    compare(backbone, plain, method, params, random_rows, close)


def test_a_learned_scale_starts_where_it_is_told_and_gets_a_gradient(bert, random_params, random_rows):
    method = mt.ParallelAdapter(bottleneck=3, scale=4.0, learn_scale=True)
    fresh = method.init(bert, torch.Generator().manual_seed(0))
    assert fresh["layer.1.ffn_sublayer.scale"].tolist() == [4.0]
    params = {k: t.requires_grad_() for k, t in random_params(bert, method, 1).items()}
    ids, mask = random_rows(bert, [4, 5]).padded()
    bert.run(mt.Plan([mt.DeltaSet(method.deltas(params, bert))] * 2), ids, mask).square().sum().backward()
    assert all(params[f"layer.{i}.ffn_sublayer.scale"].grad.abs() > 0 for i in range(bert.num_layers))


def test_the_parallel_start_is_the_papers(bert):
    fresh = mt.ParallelAdapter(bottleneck=16).init(bert, torch.Generator().manual_seed(0))
    down = fresh["layer.0.ffn_sublayer.down"]
    bound = 1 / math.sqrt(bert.hidden_size)  # Kaiming-uniform with a = sqrt(5)
    assert down.abs().max() <= bound and down.abs().max() > 0.95 * bound
    assert not any(fresh[f"layer.0.ffn_sublayer.{k}"].any() for k in ("down_bias", "up", "up_bias"))


def test_mam(make_backbone, make_model, random_params, random_rows, close):
    """The prefix as He et al. rewrite it (eq. 7): (1 - λ) Attn(x) + λ softmax(x W_1) W_2, λ the mass on the prefix."""
    backbone, plain = make_backbone("bert"), Plain("bert", make_model)
    method = mt.MAM(prefix_length=3, bottleneck=5, scale=2.0)
    params, heads = random_params(backbone, method, 1), 4

    def split(t):
        return t.unflatten(-1, (heads, -1)).transpose(-2, -3)  # [..., H, T, K]

    def attention(module, p):
        def hook(_, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            q, k, v = (split(getattr(module, name)(x)) for name in ("query", "key", "value"))
            size = q.shape[-1]
            own, prefix = q @ k.mT / math.sqrt(size), q @ split(p["keys"]).mT / math.sqrt(size)
            mass = prefix.exp().sum(-1) / (prefix.exp().sum(-1) + own.exp().sum(-1))
            mixed = (1 - mass)[..., None] * (own.softmax(-1) @ v)
            mixed = mixed + mass[..., None] * (prefix.softmax(-1) @ split(p["values"]))
            return (mixed.transpose(1, 2).flatten(2), *output[1:])

        return hook

    for i, layer in enumerate(plain.layers):
        module = layer.attention.self
        module.register_forward_hook(attention(module, of_site(params, f"layer.{i}.attention")), with_kwargs=True)
        p = of_site(params, f"layer.{i}.ffn_sublayer")
        plain.beside(i, "ffn", lambda x, p=p: 2 * ((x @ p["down"] + p["down_bias"]).relu() @ p["up"] + p["up_bias"]))
    deltas = mt.DeltaSet(method.deltas(params, backbone))
    ids, _ = random_rows(backbone, [5, 5]).padded()  # no padding, which the equation leaves out
    with torch.no_grad():
        close(backbone.run(mt.Plan([deltas, None]), ids)[0], plain.run(ids, torch.ones_like(ids))[0])
        close(backbone.run(mt.Plan([deltas] * 2), ids), plain.run(ids, torch.ones_like(ids)))


# ---- hypercomplex matrices


def test_phm_is_a_sum_of_kronecker_products():
    g = torch.Generator().manual_seed(0)
    n, a, b, r = 3, 4, 5, 2
    shared, left, right = (torch.randn(*s, generator=g).double() for s in ((n, n, n), (n, a, r), (n, r, b)))
    slow = sum(torch.kron(shared[i], left[i] @ right[i]) for i in range(n))
    torch.testing.assert_close(phm(shared, left, right), slow)


@pytest.mark.parametrize(("cls", "operations"), [(mt.Compacter, ("attention", "ffn")), (mt.CompacterPP, ("ffn",))])
def test_compacter(backbone_and_plain, random_params, random_rows, close, cls, operations):
    """Karimi Mahabadi et al. 2021, eq. 4 and 5, serial; every matrix made by torch.kron from the shared A."""
    backbone, make_plain = backbone_and_plain
    method = cls(bottleneck=8, phm_dim=4)
    params, plain = random_params(backbone, method, 1), make_plain()
    gelu_new = nn.GELU(approximate="tanh")

    def dense(p, which):
        factors = zip(params["A"], p[f"{which}_left"], p[f"{which}_right"], strict=True)
        return sum(torch.kron(a, torch.outer(s[:, 0], t[0])) for a, s, t in factors)

    for i in range(backbone.num_layers):
        for operation in operations:
            p = of_site(params, f"layer.{i}.{operation}_sublayer")
            plain.behind(
                i,
                operation,
                lambda h, p=p: h + gelu_new(h @ dense(p, "down") + p["down_bias"]) @ dense(p, "up") + p["up_bias"],
            )
    compare(backbone, plain, method, params, random_rows, close)


def test_compacter_starts_and_shares_as_published(bert):
    fresh = mt.Compacter().init(bert, torch.Generator().manual_seed(0))
    assert [name for name in fresh if not name.startswith("layer.")] == ["A"]
    assert fresh["A"].shape == (4, 4, 4) and 0.005 < fresh["A"].std() < 0.015
    left = fresh["layer.0.ffn_sublayer.down_left"]  # Glorot-uniform of [D/N, 1]
    assert left.abs().max() <= math.sqrt(6 / (bert.hidden_size // 4 + 1))
    assert not fresh["layer.0.ffn_sublayer.up_right"].any()


# ---- U-Tuning: any tuner beside any operation


def tuner(method, p, plain, layer, heads=4):
    """The three forms of methods.u_tuning, entry by entry where they are not one matrix product."""
    if method.tuner == "bottleneck":
        return lambda x: nn.functional.gelu(x @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]
    if method.tuner == "low_rank":
        return lambda x: x @ p["down"] @ p["up"]
    query, output = (plain.layers[layer].get_submodule(path) for path in PROJECTIONS[plain.name])

    def prefix(x):
        q = (x @ query.weight.T + query.bias).chunk(heads, -1)
        keys, values = p["keys"].chunk(heads, -1), p["values"].chunk(heads, -1)
        weights = [torch.softmax(q[h] @ keys[h].T / math.sqrt(keys[h].shape[1]), -1) for h in range(heads)]
        context = torch.cat([w @ v for w, v in zip(weights, values, strict=True)], -1)
        return context @ output.weight.T

    return prefix


@pytest.mark.parametrize("kind", ["bottleneck", "low_rank", "prefix"])
@pytest.mark.parametrize("operations", [("attention",), ("ffn",), ("block",), ("attention", "ffn", "block")], ids=str)
def test_u_tuning(backbone_and_plain, random_params, random_rows, close, kind, operations):
    """Jiang et al. 2023: x' = OP(x) + U-Tuner(x)."""
    backbone, make_plain = backbone_and_plain
    method = mt.UTuning(operations=operations, tuner=kind, width=3)
    params, plain = random_params(backbone, method, 1), make_plain()
    for i in range(backbone.num_layers):
        for operation in operations:
            p = of_site(params, f"layer.{i}.{operation}_sublayer")
            plain.beside(i, operation, tuner(method, p, plain, i))
    compare(backbone, plain, method, params, random_rows, close)


def test_a_block_reads_what_the_layer_reads_with_a_token_bias_on_it(bert, random_params, random_rows, close):
    """The bias enters the layer, so a tuner beside the layer sees it too: both in one adapter, against hooks."""
    method = mt.Combined(methods=(mt.AoTFC(r=2), mt.UTuning(operations=("block",), tuner="low_rank", width=3)))
    params = random_params(bert, method, 1)
    rows = random_rows(bert, [5, 5])
    ids, _ = rows.padded()
    deltas = mt.DeltaSet(method.deltas(params, bert))
    bias = deltas.by_site["layers"][0].source.rows(ids.flatten()).unflatten(0, ids.shape)  # [B, T, L, D]
    copied = bert.clone()
    copied.detach()
    for i, layer in enumerate(copied.model.encoder.layer):
        p = of_site(params, f"u_tuning.layer.{i}.block_sublayer")
        layer.register_forward_pre_hook(lambda _, args, i=i: (args[0] + bias[:, :, i], *args[1:]))
        layer.register_forward_hook(lambda _, args, out, p=p: out + args[0] @ p["down"] @ p["up"])
    with torch.no_grad():
        expected = copied.model(input_ids=ids).last_hidden_state
        close(bert.run(mt.Plan([deltas] * 2), ids), expected)


def test_recomputed_layers_run_their_block_tuners_again(make_backbone, random_params, random_rows, close):
    backbone = make_backbone("bert")
    backbone.model.train()  # transformers recomputes in training only; this model has no dropout
    method = mt.UTuning(width=3)
    ids, mask = random_rows(backbone, [4, 6]).padded()
    gradients = []
    for recompute in (False, True):
        if recompute:
            backbone.enable_gradient_checkpointing()
        params = {k: t.requires_grad_() for k, t in random_params(backbone, method, 1).items()}
        backbone.run(mt.Plan([mt.DeltaSet(method.deltas(params, backbone))] * 2), ids, mask).square().sum().backward()
        gradients.append({k: t.grad for k, t in params.items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


# ---- offsets and head factors, which merge


def test_dra(backbone_and_plain, random_params, random_rows, close):
    """Xu et al. 2022: x + Attn(x) + δ_a and x + FFN(x) + δ_f."""
    backbone, make_plain = backbone_and_plain
    params, plain = random_params(backbone, mt.DRA(), 1), make_plain()
    for i in range(backbone.num_layers):
        for operation, role in (("attention", "attention_output"), ("ffn", "ffn_out")):
            plain.behind(i, operation, lambda h, b=params[f"layer.{i}.{role}.b"]: h + b)
    compare(backbone, plain, mt.DRA(), params, random_rows, close)


def test_attn_scale(make_backbone, make_model, random_params, random_rows, close):
    """Basu et al. 2023: the matrix S_h A_h of each head, written out, in place of A_h."""
    backbone, plain = make_backbone("bert"), Plain("bert", make_model)
    params, heads = random_params(backbone, mt.AttnScale(), 1), 4
    _, mask = random_rows(backbone, [6, 3, 5]).padded()  # of the rows that `compare` draws

    def attention(module, s):
        def hook(_, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            contexts = []
            for h in range(heads):
                q, k, v = (getattr(module, n)(x).chunk(heads, -1)[h] for n in ("query", "key", "value"))
                scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(mask[:, None] == 0, -torch.inf)
                contexts.append((1 + s[h]) * scores.softmax(-1) @ v)
            return (torch.cat(contexts, -1), *output[1:])

        return hook

    for i, layer in enumerate(plain.layers):
        module = layer.attention.self
        module.register_forward_hook(attention(module, params[f"layer.{i}.attention_output.s"]), with_kwargs=True)
    compare(backbone, plain, mt.AttnScale(), params, random_rows, close)


@pytest.mark.parametrize("method", [mt.DRA(), mt.AttnScale(), mt.Combined(methods=(mt.AttnScale(), mt.DRA()))], ids=str)
def test_offsets_and_head_factors_merge(backbone, method, delta_set, random_rows, close):
    deltas = delta_set(backbone, method, 1)
    reason = why_not_mergeable(backbone, deltas)
    if reason is not None:  # into weights that other layers share, or a bias that is not there
        with pytest.raises(mt.AdapterError, match=r"cannot be folded into weights: (other layers|the frozen)"):
            merge_deltas(backbone, deltas)
        assert backbone.model.config.model_type in ("albert", "llama", "mistral", "qwen2", "qwen3", "t5") or (
            backbone.model.config.model_type.startswith(("gemma", "modernbert"))
        )
        return
    ids, mask = random_rows(backbone, [5, 3]).padded()
    with torch.no_grad():
        merged = merge_deltas(backbone, deltas).run(mt.Plan([None] * 2), ids, mask)
        attached = backbone.run(mt.Plan([deltas] * 2), ids, mask)
        bare = backbone.run(mt.Plan([None] * 2), ids, mask)
    close(merged[mask.bool()], attached[mask.bool()])
    assert (bare - merged)[mask.bool()].abs().max() > 1e-2


def test_where_the_merged_values_go(bert, random_params):
    dra, scale = (random_params(bert, m, 1) for m in (mt.DRA(), mt.AttnScale()))
    before = bert.model.encoder.layer[1]
    merged = merge_deltas(bert, mt.DeltaSet(mt.DRA().deltas(dra, bert))).model.encoder.layer[1]
    assert torch.equal(merged.output.dense.bias, before.output.dense.bias + dra["layer.1.ffn_out.b"])
    merged = merge_deltas(bert, mt.DeltaSet(mt.AttnScale().deltas(scale, bert))).model.encoder.layer[1]
    factors = 1 + scale["layer.1.attention_output.s"].repeat_interleave(bert.hidden_size // 4)
    assert torch.equal(merged.attention.output.dense.weight, before.attention.output.dense.weight * factors)


@pytest.mark.parametrize(
    "method", [mt.ParallelAdapter(), mt.MAM(), mt.Compacter(), mt.CompacterPP(), mt.UTuning()], ids=lambda m: m.name
)
def test_what_does_not_merge_says_why(bert, random_adapter, tmp_path, method):
    with pytest.raises(mt.AdapterError, match=r"cannot be merged: its (Bottleneck|Memory) at layer\.0.*Serve it unmer"):
        mt.merge(random_adapter(bert, method, 1), bert, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---- adapters that read the frozen norm's output


def by_the_equation(model, sites, norms, params, function):
    """`LN(x + OP(x) + A(LN(x + OP(x))))` put into a plain model at every sub-layer, one hook per module."""
    for module, site in {s.module: s for s in sites}.items():
        norm, p, seen = model.get_submodule(norms[site.name]), of_site(params, site.name), []

        def enter(module, args, kwargs, seen=seen):
            seen.append(args[0] if args else kwargs["hidden_states"])

        def leave(module, args, output, norm=norm, p=p, seen=seen):
            z = norm(seen.pop() + output)
            return output + function(z @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]

        model.get_submodule(site.enters).register_forward_pre_hook(enter, with_kwargs=True)
        model.get_submodule(module).register_forward_hook(leave)


POST_NORM = ["bert", "roberta", "electra", "distilbert", "deberta-v2/v3", "deberta", "albert", "mpnet", "bart"]


@pytest.mark.parametrize("name", POST_NORM)
def test_an_adapter_reads_what_the_frozen_norm_makes_of_the_sub_layer(
    make_backbone, make_model, random_params, random_rows, close, name
):
    """Pfeiffer et al. 2020 (AdapterFusion), figure 3: the adapter's input is the pretrained norm's output."""
    backbone = make_backbone(name)
    for method in (mt.Houlsby(bottleneck=5, reads="norm"), mt.Pfeiffer(reduction_factor=8, reads="norm")):
        params = random_params(backbone, method, 1)
        first = {s.module: s.name for s in reversed(backbone.sites) if s.kind == "sublayer"}
        for s in method.sites(backbone):  # a module that runs as several layers has one hook, so one adapter
            own = {k: params[f"{first[s.module]}.{k}"] for k in ("down", "down_bias", "up", "up_bias")}
            params |= {f"{s.name}.{k}": t for k, t in own.items()}
        plain = make_model(name).eval()
        norms = {f"layer.{s.layer}.{s.role[:-5]}_sublayer": s.module for s in backbone.sites if s.kind == "norm"}
        function = torch.relu if method.activation == "relu" else torch.nn.functional.gelu
        by_the_equation(plain, method.sites(backbone), norms, params, function)
        run = plain.get_submodule(backbone.architecture.runs)
        compare(backbone, PlainRun(run), method, params, random_rows, close)


class PlainRun:
    def __init__(self, model):
        self.model = model

    run = Plain.run


def test_reading_the_norm_needs_one_that_is_frozen_and_behind(make_backbone):
    with pytest.raises(mt.ConfigError, match="gpt2 norms in front of it; give reads=output"):
        mt.Pfeiffer(reads="norm").init(make_backbone("gpt2"), torch.Generator())
    for method in (mt.Pfeiffer, mt.Houlsby, mt.Compacter, mt.CompacterPP):
        with pytest.raises(mt.ConfigError, match="layer_norms=true trains them; give one of the two"):
            method(reads="norm", layer_norms=True)


def test_hypercomplex_adapters_read_the_norm_like_dense_ones(bert, random_params, random_rows):
    method = mt.CompacterPP(bottleneck=8, reads="norm")
    params = random_params(bert, method, 3)
    dense = {}
    for site in method.sites(bert):
        p = of_site(params, site.name)
        dense |= {f"{site.name}.{k}": phm(params["A"], p[f"{k}_left"], p[f"{k}_right"]) for k in ("down", "up")}
        dense |= {f"{site.name}.{k}": p[k] for k in ("down_bias", "up_bias")}
    ids, mask = random_rows(bert, [5, 3]).padded()
    same = mt.Pfeiffer(reduction_factor=4, activation="gelu_new", reads="norm")
    sets = [mt.DeltaSet(m.deltas(t, bert)) for m, t in ((method, params), (same, dense))]
    with torch.no_grad():
        one, other = (bert.run(mt.Plan([s, s]), ids, mask) for s in sets)
    torch.testing.assert_close(one, other)
