"""What is particular to each relative of LoRA, against its equation written out; the shared invariants hold beside."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from multitune import (
    AdaLoRA,
    AoTFC,
    Backbone,
    DeltaSet,
    DoRA,
    LoRA,
    LoRAPlus,
    PiSSA,
    Plan,
    PromptTuning,
    RsLoRA,
    VeRA,
)
from multitune.deltas import EmbeddingLowRank, LowRank, SharedLowRank
from multitune.merging import merge_deltas
from multitune.methods.dora import weight_norm
from multitune.methods.pissa import randomised_svd
from multitune.methods.vera import random_matrices


def hidden(backbone, sets, ids):
    with torch.no_grad():
        return backbone.run(Plan(sets), ids)


@pytest.fixture(scope="module")
def ids(bert):
    return torch.randint(5, bert.vocab_size, (3, 6), generator=torch.Generator().manual_seed(0))


def with_linears(backbone, change):
    """A copy of the backbone whose queries and values have the weight `change(site, weight)` and their own bias."""
    copied = backbone.clone()
    with torch.no_grad():
        for site in copied.find_sites("linear", ("query", "value")):
            weight = copied.model.get_submodule(site.module).weight
            weight.copy_(change(site, weight.clone()))
    return copied


# ---- scales and rates


def test_rslora_is_lora_with_its_scale_rank_stabilised(bert, ids, random_params):
    params = random_params(bert, RsLoRA(r=3, alpha=5.0), 1)
    stabilised = LoRA(r=3, alpha=5.0, rank_stabilised=True)
    assert RsLoRA(r=3, alpha=5.0).scale == stabilised.scale == 5.0 / 3**0.5
    sets = [DeltaSet(m.deltas(params, bert)) for m in (RsLoRA(r=3, alpha=5.0), stabilised, LoRA(r=3, alpha=5.0))]
    a, b, plain = (hidden(bert, [s] * 3, ids) for s in sets)
    assert torch.equal(a, b) and not torch.allclose(a, plain, atol=1e-3)


def test_lora_plus_serves_what_lora_serves_and_has_one_fast_matrix(bert, ids, random_params):
    method = LoRAPlus(r=3, ratio=5.0)
    params = random_params(bert, method, 1)
    served = [DeltaSet(m.deltas(params, bert)) for m in (method, LoRA(r=3))]
    assert torch.equal(*(hidden(bert, [s] * 3, ids) for s in served))
    assert {name.rsplit(".", 1)[1]: method.learning_rate_factor(name) for name in params} == {"A": 1.0, "B": 5.0}


# ---- PiSSA


def test_pissa_starts_from_the_principal_part_and_trains_it(bert, ids, random_params, close):
    method = PiSSA(r=3, alpha=6.0)
    params = random_params(bert, method, 1, std=0.05)
    assert sorted({name.rsplit(".", 1)[1] for name in params if not method.trains(name)}) == ["A_start", "B_start"]

    def tuned(site, weight):
        U, S, Vh = np.linalg.svd(weight.double().numpy())
        principal = torch.from_numpy((U[:, :3] * S[:3]) @ Vh[:3]).float()
        start = 2.0 * (params[f"{site.name}.A_start"] @ params[f"{site.name}.B_start"]).T
        close(start, principal)
        A = params[f"{site.name}.A_start"] + params[f"{site.name}.A_change"]
        B = params[f"{site.name}.B_start"] + params[f"{site.name}.B_change"]
        return weight - principal + 2.0 * (A @ B).T

    expected = hidden(with_linears(bert, tuned), [None] * 3, ids)
    deltas = DeltaSet(method.deltas(params, bert))
    close(hidden(bert, [deltas] * 3, ids), expected)
    assert (expected - hidden(bert, [None] * 3, ids)).abs().max() > 0.01
    assert all(d.A.shape[1] == 6 for _, d in deltas.of(LowRank))


def test_pissa_gradients_are_those_of_its_two_matrices(make_model, random_params, close):
    double = Backbone(make_model("bert").double())
    method = PiSSA(r=2, layers=(0,), targets=("query",))
    params = {k: t.double() for k, t in random_params(double, method, 1).items()}
    (site,) = method.sites(double)
    x = torch.randn(4, site.in_features, generator=torch.Generator().manual_seed(3)).double()
    own = {k.rsplit(".", 1)[1]: t.requires_grad_() for k, t in params.items()}
    delta = method.delta(own, site, double)
    (x @ delta.A @ delta.B).square().sum().backward()
    A = (own["A_start"] + own["A_change"]).detach().requires_grad_()
    B = (own["B_start"] + own["B_change"]).detach().requires_grad_()
    (x @ (A @ B - (own["A_start"] @ own["B_start"]).detach())).square().sum().backward()
    close(own["A_change"].grad, A.grad)
    close(own["B_change"].grad, B.grad)


def test_the_randomised_decomposition_nears_the_exact_one():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 40, generator=g, dtype=torch.float64).float()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]

    def error(niter):
        U, S, Vh = randomised_svd(weight, 4, niter, torch.Generator().manual_seed(1))
        return float((best - (U[:, :4] * S[:4]) @ Vh[:4]).norm() / best.norm())

    assert error(0) > error(2) > error(8) and error(40) < 1e-3


def test_a_randomised_start_is_an_identity_too(bert, ids):
    method = PiSSA(r=3, niter=0)
    fresh = DeltaSet(method.deltas(method.init(bert, torch.Generator().manual_seed(0)), bert))
    assert torch.equal(hidden(bert, [fresh] * 3, ids), hidden(bert, [None] * 3, ids))


# ---- DoRA


def dora_weight(params, site, weight, scale, *, constant=False):
    """Equation 5 written out: `[O, I]`."""
    A, B, m = (params[f"{site.name}.{key}"] for key in ("A", "B", "m"))
    whole = weight + scale * (A @ B).T
    norm = whole.norm(dim=1)
    magnitude = weight.norm(dim=1) + m
    return (magnitude / (norm.detach() if constant else norm))[:, None] * whole


def test_dora_rescales_the_weights_and_leaves_the_bias(bert, ids, random_params, close):
    method = DoRA(r=3, alpha=6.0)
    params = random_params(bert, method, 1)
    expected = hidden(with_linears(bert, lambda s, w: dora_weight(params, s, w, 2.0)), [None] * 3, ids)
    deltas = DeltaSet(method.deltas(params, bert))
    fused = deltas.fused(bert.dtype, bert.device)
    for sets in ([deltas] * 3, [fused] * 3, [fused, None, fused]):
        out = hidden(bert, sets, ids)
        for i in (0, 2):
            close(out[i], expected[i])
    merged = merge_deltas(bert, deltas)
    for site in bert.find_sites("linear", ("query", "value")):
        frozen, own = (b.model.get_submodule(site.module) for b in (bert, merged))
        close(own.bias, frozen.bias)
        close(own.weight, dora_weight(params, site, frozen.weight, 2.0))


@pytest.mark.parametrize("constant", [True, False])
def test_dora_gradients_with_the_norm_constant_and_not(constant, make_model, random_params, close):
    double = Backbone(make_model("bert").double())
    method = DoRA(r=2, alpha=2.0, layers=(0,), targets=("query",), constant_norm=constant)
    params = {k: t.double().requires_grad_() for k, t in random_params(double, method, 1).items()}
    (site,) = method.sites(double)
    module = double.model.get_submodule(site.module)
    x = torch.randn(2, 3, site.in_features, generator=torch.Generator().manual_seed(3)).double()

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), list(params.values()))

    y = nn.functional.linear(x, module.weight, module.bias)
    for delta in DeltaSet(method.deltas(params, double)).by_site[site.name]:
        y = delta.apply(x, y, module)
    weight = dora_weight(params, site, module.weight, 1.0, constant=constant)
    for ours, theirs in zip(gradients(y), gradients(nn.functional.linear(x, weight, module.bias)), strict=True):
        close(ours, theirs)


def test_a_weight_row_of_zeros_stays_finite(make_backbone, random_params, ids):
    backbone = make_backbone("bert")
    site = backbone.find_sites("linear", ("query",))[0]
    backbone.model.get_submodule(site.module).weight.data[3] = 0
    for params in (DoRA().init(backbone, torch.Generator().manual_seed(0)), random_params(backbone, DoRA(), 1)):
        out = hidden(backbone, [DeltaSet(DoRA().deltas(params, backbone))] * 3, ids)
        assert torch.isfinite(out).all()


def test_the_norm_is_that_of_the_whole_matrix(close):
    g = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(*s, generator=g) for s in ((7, 5), (5, 3), (3, 7)))
    close(weight_norm(weight, A, B, 0.3), (weight + 0.3 * (A @ B).T).norm(dim=1))
    assert weight_norm(weight.bfloat16()).dtype == torch.float32


# ---- VeRA


def test_vera_is_its_equation_with_one_pair_of_matrices(bert, ids, random_params, close):
    method = VeRA(r=16, seed=3)
    params = random_params(bert, method, 1)
    A, B = random_matrices(3, 16, 32, 32, torch.float32, torch.device("cpu"))

    def tuned(site, weight):
        d, b = params[f"{site.name}.d"], params[f"{site.name}.b"]
        return weight + torch.diag(b) @ B.T @ torch.diag(d) @ A.T

    deltas = DeltaSet(method.deltas(params, bert))
    close(hidden(bert, [deltas] * 3, ids), hidden(with_linears(bert, tuned), [None] * 3, ids))
    shared = [d for _, d in deltas.of(SharedLowRank)]
    assert {d.A.data_ptr() for d in shared} == {A.data_ptr()} and {d.B.data_ptr() for d in shared} == {B.data_ptr()}


def test_vera_keeps_its_vectors_only(bert, delta_set):
    method = VeRA()
    assert delta_set(bert, method, 1, fused=True).nbytes() == 4 * method.num_parameters(bert)


def test_the_random_matrices_are_the_same_everywhere():
    """Pinned: another generator would change every VeRA adapter that was ever saved."""
    A, B = random_matrices(0, 4, 6, 5, torch.float32, torch.device("cpu"))
    assert A.shape == (6, 4) and B.shape == (4, 5)
    assert A.abs().max() <= 1.0 and B.abs().max() <= (6 / 4) ** 0.5  # √2 · √(3 / fan-in)
    torch.testing.assert_close(A[:2, 0], torch.tensor([-0.007487, 0.536444]), atol=1e-6, rtol=0)
    torch.testing.assert_close(B[0, :2], torch.tensor([-0.197408, -0.771023]), atol=1e-6, rtol=0)
    again = random_matrices.__wrapped__(0, 4, 6, 5, torch.float32, torch.device("cpu"))
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])
    assert not torch.equal(A, random_matrices(1, 4, 6, 5, torch.float32, torch.device("cpu"))[0])


def test_matrices_of_a_smaller_site_and_of_fewer_layers_are_parts_of_the_same(bert):
    everywhere, one = VeRA(r=4, targets=("query", "ffn_out")), VeRA(r=4, targets=("query", "ffn_out"), layers=(1,))
    fresh = [DeltaSet(m.deltas(m.init(bert, torch.Generator()), bert)).by_site for m in (everywhere, one)]
    (wide,), (narrow,) = (fresh[0][f"layer.1.{role}"] for role in ("ffn_out", "query"))
    assert wide.A.shape == (48, 4) and narrow.A.shape == (32, 4)
    assert torch.equal(wide.A[:32], narrow.A) and torch.equal(wide.B, narrow.B)
    assert torch.equal(fresh[1]["layer.1.query"][0].A, narrow.A)


def test_other_seeds_share_a_batch(bert, ids, delta_set, close):
    sets = [delta_set(bert, VeRA(r=8, seed=seed), 1, fused=True) for seed in (0, 1, 0)]
    mixed = hidden(bert, sets, ids)
    for i, one in enumerate(sets):
        close(mixed[i], hidden(bert, [one], ids[i : i + 1])[0])
    assert not torch.allclose(mixed[0], hidden(bert, [sets[1]], ids[:1])[0], atol=1e-3)


# ---- word embeddings


@pytest.mark.parametrize("method", [LoRA(targets=("embedding",), r=3), RsLoRA(targets=("embedding",), r=2)])
def test_adapted_word_embeddings_merge_and_mix(method, backbone, random_params, delta_set, random_rows, close):
    lengths = [5, 3, 6, 4]
    rows = random_rows(backbone, lengths)
    params = random_params(backbone, method, 1)
    table = method.scale * (params["embedding.A"] @ params["embedding.B"])
    deltas = DeltaSet(method.deltas(params, backbone))
    fused = deltas.fused(backbone.dtype, backbone.device)
    merged = merge_deltas(backbone, deltas)
    close(merged.word_embeddings, backbone.word_embeddings + table)
    expected = merged.run(Plan([None] * 4), *rows.padded()).detach()
    other, prompt = delta_set(backbone, method, 2, fused=True), delta_set(backbone, PromptTuning(length=3), 3)
    for sets in ([deltas] * 4, [fused] * 4, [fused, other, None, fused], [prompt, fused, fused, other]):
        with torch.no_grad():
            out = backbone.run(Plan(sets), *rows.padded())
        for i, n in enumerate(lengths):
            if sets[i] in (deltas, fused):
                close(out[i, :n], expected[i, :n])
            else:
                alone = backbone.run(Plan([sets[i]]), rows.one(i))[0].detach()
                close(out[i, :n], alone)


def test_a_token_that_was_never_seen_stays_as_it_was(bert):
    method = LoRA(targets=("embedding",), r=2)
    fresh = method.init(bert, torch.Generator().manual_seed(0))
    assert not fresh["embedding.A"].any() and fresh["embedding.B"].std() > 0.5
    params = {k: t.requires_grad_() for k, t in fresh.items()}
    bert.run(Plan([DeltaSet(method.deltas(params, bert))]), torch.tensor([[7, 9]])).square().sum().backward()
    assert params["embedding.A"].grad.any(1).nonzero().flatten().tolist() == [7, 9]


def test_a_table_made_from_the_frozen_embeddings_does_not_see_the_update(bert, ids, random_params, close):
    """AoT's rows and an embedding update in one adapter: the rows are those of the frozen embeddings."""
    lora, aot = LoRA(targets=("embedding",), r=2), AoTFC(r=2)
    update, rows = (m.deltas(random_params(bert, m, 1), bert) for m in (lora, aot))
    both = DeltaSet(update | rows)
    (delta,) = update["embedding"]
    assert isinstance(delta, EmbeddingLowRank)
    merged = merge_deltas(bert, DeltaSet(update))
    source = rows["layers"][0].source
    assert source.embedding.data_ptr() == bert.word_embeddings.data_ptr()
    close(hidden(bert, [both] * 3, ids), hidden(merged, [DeltaSet(rows)] * 3, ids))


def test_an_inserted_prompt_vector_is_no_word(bert, ids, random_params, close):
    """The placeholder id behind a prompt vector gets no update, though its row of A is not zero."""
    lora, prompt = LoRA(targets=("embedding",), r=2), PromptTuning(length=2)
    update, vectors = (m.deltas(random_params(bert, m, 1), bert) for m in (lora, prompt))
    both = DeltaSet({"embedding": [*update["embedding"], *vectors["embedding"]]})
    expected = hidden(merge_deltas(bert, DeltaSet(update)), [DeltaSet(vectors)] * 3, ids)
    close(hidden(bert, [both] * 3, ids), expected)
    close(hidden(bert, [both, None, both], ids)[2], expected[2])


# ---- AdaLoRA: the schedule and the scores


def test_the_budget_falls_as_a_cube_from_the_first_rank_to_the_target():
    method = AdaLoRA(r=12, target_r=8, initial_share=0.1, final_share=0.4)
    budgets = [method.budget(step, 100, 6) for step in range(101)]
    assert budgets[:11] == [72] * 11 and budgets[60:] == [48] * 41
    assert budgets[35] == int(48 + 24 * (1 - 25 / 50) ** 3) == 51
    assert all(a >= b for a, b in pairwise(budgets))
    assert [method.is_settled(s, 100) for s in (0, 59, 60, 100)] == [False, False, True, True]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_a_run_of_any_length_ends_at_the_target(num_steps):
    for shares in ((0.1, 0.4), (0.0, 0.0), (0.5, 0.5), (0.0, 0.99)):
        method = AdaLoRA(initial_share=shares[0], final_share=shares[1])
        assert 1 <= method.last_pruning(num_steps) <= num_steps
        assert method.budget(num_steps, num_steps, 3) == 24 and method.is_settled(num_steps, num_steps)


def observed(method, bert, steps, num_steps):
    """Tensors after `steps` steps with random gradients, and those gradients."""
    params = {k: nn.Parameter(t, requires_grad=method.trains(k)) for k, t in
              method.init(bert, torch.Generator().manual_seed(0)).items()}  # fmt: skip
    g = torch.Generator().manual_seed(1)
    history = []
    with torch.no_grad():
        for step in range(1, steps + 1):
            for name, t in params.items():
                if method.trains(name):
                    t.grad = torch.randn(t.shape, generator=g)
                    t.sub_(0.01 * t.grad)
            history.append({k: (t.clone(), t.grad.clone()) for k, t in params.items() if method.trains(k)})
            method.after_step(params, step, num_steps)
    return params, history


def test_scores_are_sensitivity_times_uncertainty_triplet_by_triplet(bert):
    method = AdaLoRA(r=3, target_r=2, interval=100, beta1=0.7, beta2=0.6, final_share=0.5)
    params, history = observed(method, bert, 5, 10)  # step 5 prunes, for the first and last time

    def score(name, index):
        average = uncertainty = 0.0
        for tensors in history:
            w, grad = (float(t[index]) for t in tensors[name])
            average = 0.7 * average + 0.3 * abs(w * grad)
            uncertainty = 0.6 * uncertainty + 0.4 * abs(abs(w * grad) - average)
        return average * uncertainty

    scores = {}
    for site in bert.find_sites("linear", ("query", "value")):
        for k in range(3):
            A = np.mean([score(f"{site.name}.A", (i, k)) for i in range(site.in_features)])
            B = np.mean([score(f"{site.name}.B", (k, o)) for o in range(site.out_features)])
            scores[site.name, k] = score(f"{site.name}.E", (k,)) + A + B
    kept = set(sorted(scores, key=scores.get, reverse=True)[: 2 * 6])
    for (site, k), _ in scores.items():
        assert bool(params[f"{site}.kept"][k]) == ((site, k) in kept)
        assert bool(params[f"{site}.E"][k] != 0) == ((site, k) in kept)


def test_what_was_pruned_last_stays_pruned_and_finishing_drops_it(bert, ids, close):
    method = AdaLoRA(r=4, target_r=1, interval=2, initial_share=0.0, final_share=0.5)
    params, _ = observed(method, bert, 12, 12)
    sizes = {k: int((t != 0).sum()) for k, t in params.items() if k.endswith(".E")}
    assert sum(sizes.values()) == 6
    finished, cut = method.finish(params, bert)
    assert finished.ranks == tuple(sizes.values()) and 0 in finished.ranks and max(finished.ranks) > 1
    assert {k: t.shape for k, t in cut.items()} == bert.shapes_of(finished)
    assert finished.num_parameters(bert) == sum(t.numel() for t in cut.values())
    assert finished.finish(cut, bert) == (finished, cut)
    before, after = (DeltaSet(m.deltas(p, bert)) for m, p in ((method, params), (finished, cut)))
    out = hidden(bert, [before] * 3, ids)
    close(hidden(bert, [after] * 3, ids), out)
    close(hidden(bert, [after.fused(bert.dtype, bert.device), None, after], ids)[2], out[2])
    assert (out - hidden(bert, [None] * 3, ids)).abs().max() > 1e-4


def test_a_pruned_triplet_can_come_back_before_the_last_pruning(bert):
    method = AdaLoRA(r=4, target_r=2, interval=4, initial_share=0.0, final_share=0.2)
    params, _ = observed(method, bert, 9, 20)  # pruned at 8, moved by the step after it
    pruned = [params[k.removesuffix("E") + "kept"] == 0 for k in params if k.endswith(".E")]
    values = [t for k, t in params.items() if k.endswith(".E")]
    assert sum(int(p.sum()) for p in pruned) > 0
    assert all((v[p] != 0).all() for v, p in zip(values, pruned, strict=True))


def test_the_penalty_pulls_towards_orthonormal_factors(bert):
    method = AdaLoRA(r=3, target_r=3)
    params = method.init(bert, torch.Generator().manual_seed(0))
    norms = []
    for name, t in params.items():
        if name.endswith((".A", ".B")):
            gram = t.T @ t if name.endswith(".A") else t @ t.T
            norms.append(sum((float(gram[i, j]) - (i == j)) ** 2 for i in range(3) for j in range(3)) ** 0.5)
    assert float(method.penalty(params)) == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)
    columns = {k: torch.linalg.qr(t).Q for k, t in params.items() if k.endswith(".A")}
    rows = {k: torch.linalg.qr(t.T).Q.T for k, t in params.items() if k.endswith(".B")}
    assert float(method.penalty(columns | rows)) == pytest.approx(0, abs=1e-5)
    assert AdaLoRA(orthogonality=0.0).penalty(params) is None
