"""A compiled backbone gives what the plain one gives, whatever plan comes next.

Tests run the compiler's front end ("eager") and its functional form of the graph and of the gradients ("aot_eager"):
these decide what is compiled for which plan. Machine code ("inductor") takes half a minute for each structure of plans,
so it is compared where it is timed, in benchmarks/compiled.py.
"""

import logging
import threading

import pytest
import torch

from multitune import (
    IA3,
    MAM,
    AoTFC,
    BackboneError,
    BitFit,
    ConfigError,
    DeltaSet,
    LoRA,
    Plan,
    PromptTuning,
    convert_to_lsg,
)
from multitune.deltas import Scale

METHODS = {
    "a": LoRA(r=2),
    "b": LoRA(r=2),
    "wide": LoRA(r=4, targets=("query", "ffn_in")),
    "scaled": IA3(),
    "aot": AoTFC(r=2),
    "mam": MAM(prefix_length=2, bottleneck=2),
    "prompt": PromptTuning(length=2),
    "bias": BitFit(),
}


def one_layer(make_backbone, name):
    return make_backbone(name, **{{"gpt2": "n_layer", "t5": "num_layers"}.get(name, "num_hidden_layers"): 1})


@pytest.fixture(params=["bert", "gpt2"])
def pair(request, make_backbone, delta_set, random_rows):
    """A plain backbone, a compiled one of the same weights, their delta sets and a batch."""
    plain, compiled = (one_layer(make_backbone, request.param) for _ in range(2))
    compiled.compile(backend="aot_eager")
    sets = {None: None} | {n: delta_set(plain, m, seed, fused=True) for seed, (n, m) in enumerate(METHODS.items())}
    return plain, compiled, sets, random_rows(plain, (6, 9, 4, 7)).padded()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run(backbone, plan, batch):
    with torch.no_grad():
        return backbone.run(plan, *batch)


def same(pair, names, close):
    plain, compiled, sets, batch = pair
    with torch.no_grad():
        plan = Plan([sets[n] for n in names])
        close(run(compiled, plan, batch), run(plain, plan, batch))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    # The compiler's trace, which pytest would keep, takes longer than compiling does.
    trace = logging.getLogger("torch.__trace")
    trace.disabled = True
    yield
    trace.disabled = False
    torch._dynamo.reset()


def test_every_plan_is_its_own_whatever_was_compiled_before(pair, close):
    for names in [
        ("a", "b", None, "wide"),
        (None, "a", "wide", "b"),
        ("mam", "aot", "prompt", "bias"),
        (None, None, None, None),
        ("a", "a", "a", "a"),
        ("b", "b", "b", "b"),
    ]:
        same(pair, names, close)


@pytest.mark.parametrize("pair", ["bert"], indirect=True)
def test_plans_of_one_structure_share_a_graph(pair, close):
    same(pair, ("a", "b", None, None), close)
    before = graphs()
    same(pair, ("b", "a", None, None), close)
    same(pair, (None, "b", "a", None), close)
    assert graphs() == before
    same(pair, ("a", "a", None, None), close)
    assert graphs() == before + 1


@pytest.fixture
def compiled_bert(make_backbone):
    backbone = make_backbone("bert", num_hidden_layers=1)
    backbone.compile(backend="eager")
    return backbone


@pytest.fixture(scope="module")
def bert(make_backbone):
    """The same, not compiled."""
    return make_backbone("bert", num_hidden_layers=1)


@pytest.mark.parametrize("name", ["llama", "t5", "deberta-v2/v3", "bert+lsg"])
def test_other_architectures_compile_too(name, make_backbone, delta_set, random_rows, close):
    plain, compiled = (one_layer(make_backbone, name.removesuffix("+lsg")) for _ in range(2))
    if name.endswith("+lsg"):
        plain, compiled = (convert_to_lsg(b, block=4, sparse=2, max_length=64) for b in (plain, compiled))
    compiled.compile(backend="eager")
    batch = random_rows(plain, (6, 9, 4)).padded()
    sets = [delta_set(plain, m, i, fused=True) for i, m in enumerate((LoRA(r=2), METHODS["mam"], METHODS["aot"]))]
    for order in ((0, 1, 2), (1, 2, 0)):
        with torch.no_grad():
            plan = Plan([sets[i] for i in order])
        close(run(compiled, plan, batch), run(plain, plan, batch))


def test_a_number_of_a_delta_is_not_baked_in(compiled_bert, bert, random_params, random_rows, close):
    batch = random_rows(bert, (5, 5)).padded()
    params = random_params(bert, LoRA(r=2), 1)
    for alpha in (2.0, 8.0, 2.0):  # unfused, the factor is a number beside the tensors
        deltas = DeltaSet(LoRA(r=2, alpha=alpha).deltas(params, bert))
        plan = Plan([deltas, deltas])
        close(run(compiled_bert, plan, batch), run(bert, plan, batch))


def test_a_site_that_gains_or_loses_a_delta_is_noticed(compiled_bert, bert, random_rows, close):
    batch = random_rows(bert, (5, 5)).padded()
    changed = {name: [Scale(s=torch.full((32,), 0.5))] for name in ("layer.0.query", "layer.0.value")}
    for sites in (["layer.0.query"], ["layer.0.value"], ["layer.0.query", "layer.0.value"], []):
        plan = Plan([DeltaSet({s: changed[s] for s in sites})] * 2)
        close(run(compiled_bert, plan, batch), run(bert, plan, batch))


def test_lengths_and_masks_may_change(compiled_bert, bert, delta_set, random_rows, close):
    deltas = delta_set(bert, MAM(prefix_length=2, bottleneck=2), 1, fused=True)
    for lengths in ((5, 7), (5, 5), (9, 3), (20, 6)):
        with torch.no_grad():
            plan = Plan([deltas, None])
        batch = random_rows(bert, lengths).padded()
        close(run(compiled_bert, plan, batch), run(bert, plan, batch))


# The compiler asks every tensor for its .grad, and those of a mixed batch's plan are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_gradients_are_those_of_the_plain_backbone(make_backbone, random_params, random_rows, close):
    found = []
    for is_compiled in (False, True):
        backbone = make_backbone("bert", num_hidden_layers=1)
        if is_compiled:
            backbone.compile(backend="aot_eager")
        methods = (LoRA(r=2), IA3(), MAM(prefix_length=2, bottleneck=2))
        params = [random_params(backbone, m, i) for i, m in enumerate(methods)]
        leaves = [t.requires_grad_(True) for p in params for t in p.values()]
        plan = Plan([DeltaSet(m.deltas(p, backbone)) for m, p in zip(methods, params, strict=True)])
        backbone.run(plan, *random_rows(backbone, (6, 8, 5)).padded()).square().mean().backward()
        found.append([t.grad for t in leaves])
    assert all(g is not None and g.abs().sum() > 0 for g in found[0])
    for a, b in zip(*found, strict=True):
        close(b, a)


def test_beyond_the_limit_batches_run_uncompiled(make_backbone, bert, delta_set, random_rows, close):
    backbone = make_backbone("bert", num_hidden_layers=1)
    backbone.compile(backend="eager", max_graphs=1)
    before = graphs()
    batch = random_rows(bert, (5, 5)).padded()
    sets = [delta_set(bert, m, 1, fused=True) for m in (LoRA(r=2), IA3(), BitFit())]
    for deltas in (*sets, *sets):
        plan = Plan([deltas, deltas])
        close(run(backbone, plan, batch), run(bert, plan, batch))
    assert graphs() == before + 1


def test_threads_keep_their_own_plans(compiled_bert, bert, delta_set, random_rows):
    batch = random_rows(bert, (6, 6)).padded()
    plans = [Plan([delta_set(bert, LoRA(r=2), seed, fused=True)] * 2) for seed in range(4)]
    expected = [run(bert, plan, batch) for plan in plans]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.allclose(run(compiled_bert, plans[i], batch), expected[i], rtol=1e-4, atol=1e-5):
                wrong.append(i)

    run(compiled_bert, plans[0], batch)  # compiled once; what threads share is the compiled code
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(plans))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_detaching_and_attaching_again_is_noticed(compiled_bert, bert, delta_set, random_rows, close):
    batch = random_rows(bert, (5, 5)).padded()
    plan = Plan([delta_set(bert, LoRA(r=2), 1, fused=True)] * 2)
    expected = run(bert, plan, batch)
    close(run(compiled_bert, plan, batch), expected)
    compiled_bert.detach()
    compiled_bert.attach()
    close(run(compiled_bert, plan, batch), expected)
    compiled_bert.uncompile()
    close(run(compiled_bert, plan, batch), expected)


def test_checkpointing_and_compiling_refuse_each_other(compiled_bert):
    with pytest.raises(ConfigError, match="uncompile"):
        compiled_bert.enable_gradient_checkpointing()
    compiled_bert.uncompile()
    compiled_bert.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="disable_gradient_checkpointing"):
        compiled_bert.compile()
    compiled_bert.disable_gradient_checkpointing()
    compiled_bert.compile()
    with pytest.raises(ConfigError, match="at least 1"):
        compiled_bert.compile(max_graphs=0)


def test_a_model_that_cannot_be_compiled_is_refused_with_the_reason(compiled_bert, bert, random_rows):
    layer = compiled_bert.model.encoder.layer[0]
    original = layer.forward

    def forward(*args, **kwargs):
        torch._dynamo.graph_break()
        return original(*args, **kwargs)

    layer.forward = forward
    with pytest.raises(BackboneError, match=r"'bert' cannot be compiled: .*uncompile"):
        run(compiled_bert, Plan([None]), random_rows(bert, (5,)).padded())
