"""One table of invariants for every registered method: a new method is tested from the day it is added."""

import copy
import dataclasses
import json
import pkgutil
import re
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import transformers
from torch.nn import functional

from multitune import (
    DRA,
    DSEE,
    IA3,
    MAM,
    SIFT,
    AdaLoRA,
    AoTFC,
    AoTKronecker,
    AttnScale,
    Backbone,
    BitFit,
    Compacter,
    CompacterPP,
    ConfigError,
    DeltaSet,
    DoRA,
    Freeze,
    FullFineTuning,
    HeadOnly,
    Houlsby,
    LayerNormTuning,
    LoRA,
    LoRAPlus,
    Method,
    ParallelAdapter,
    Pfeiffer,
    PiSSA,
    Plan,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
    Recipe,
    RsLoRA,
    SiteMethod,
    SoTU,
    TopLayers,
    UTuning,
    VeRA,
    get_method,
    method_names,
    methods,
    register,
)
from multitune.deltas import Bias
from multitune.merging import merge_deltas
from multitune.methods import registry
from multitune.methods.dsee import sparse_part
from multitune.methods.sparse_update import largest_places, random_places

MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]


@pytest.fixture(params=MIXABLE)
def method(request):
    return get_method(request.param)()


@pytest.fixture(params=method_names())
def any_method(request):
    return get_method(request.param)


def run(backbone, sets, rows, order=None):
    """Hidden states of a batch, gradients off."""
    with torch.no_grad():
        return backbone.run(Plan(sets), *rows.padded(order))


# ---- the registry


def test_every_file_is_registered_and_every_name_is_in_a_file():
    found = {get_method(name).__module__ for name in method_names()}
    for module in pkgutil.iter_modules(methods.__path__, "multitune.methods."):
        source = Path(module.module_finder.path, module.name.rsplit(".", 1)[1] + ".py").read_text("utf-8")
        assert ("\n@register\n" in source) == (module.name in found), module.name
    assert all(name.startswith("multitune.methods.") for name in found)
    assert method_names() == tuple(sorted(method_names()))


def test_what_every_method_declares(any_method):
    assert dataclasses.is_dataclass(any_method)
    assert any_method.__dataclass_params__.frozen
    assert all(f.kw_only for f in dataclasses.fields(any_method))
    assert any_method.__doc__ and any_method.title and any_method.paper
    assert any_method.recipe.learning_rate > 0 and any_method.recipe.source
    hash(any_method())  # the backbone remembers shapes by method


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no method is called 'lroa'\. Did you mean 'lora'\? Methods: .*prompt"):
        get_method("lroa")


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match=r"'lora' is taken by LoRA in .*lora\.py; give .*Impostor another name"):

        @register
        class Impostor(LoRA):
            pass


@pytest.mark.parametrize("attribute", ["name", "title", "paper", "recipe"])
def test_a_method_states_what_it_is(attribute):
    given = {"name": "x", "title": "X", "paper": "Y", "recipe": Recipe(learning_rate=1.0, source="test")}
    given.pop(attribute)
    with pytest.raises(ConfigError, match=f"Half needs a class attribute '{attribute}'"):
        register(type("Half", (Method,), given))


def test_a_new_method_mixes_with_the_others_at_once(bert, delta_set, random_rows, close):
    @register
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class QueryBias(SiteMethod):
        """A bias on the queries."""

        name = "query_bias"
        title = "Query bias"
        paper = "a test"
        recipe = Recipe(learning_rate=1e-3, source="test")

        def sites(self, backbone):
            return backbone.find_sites("linear", ("query",))

        def init_site(self, site, backbone, generator):
            return {"b": torch.zeros(site.out_features)}

        def delta(self, params, site, backbone):
            return Bias(b=params["b"])

    try:
        assert "query_bias" in method_names()
        sets = [delta_set(bert, get_method("query_bias")(), 1), delta_set(bert, LoRA(), 2), None]
        rows = random_rows(bert, [4, 6, 5])
        mixed = run(bert, sets, rows)
        for i, n in enumerate([4, 6, 5]):
            alone = bert.run(Plan([sets[i]]), rows.one(i))[0].detach()
            close(mixed[i, :n], alone)
        bare = run(bert, [None] * 3, rows)
        assert (mixed[0] - bare[0]).abs().max() > 0.01
    finally:
        registry._METHODS.pop("query_bias")


# ---- a fresh adapter


def test_fresh_tensors(any_method, bert):
    if any_method.changes_weights:
        assert any_method().init(bert, torch.Generator()).keys() <= bert.model.state_dict().keys()
    state = torch.get_rng_state()
    first = any_method().init(bert, torch.Generator().manual_seed(3))
    again = any_method().init(bert, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())  # the caller's generator is the only source of chance
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        indices = not any_method().trains(name) and not tensor.is_floating_point()
        assert (tensor.dtype == torch.float32 or indices) and tensor.device.type == "cpu"
        assert torch.isfinite(tensor).all() and not tensor.requires_grad
    method = any_method()
    assert method.num_parameters(bert) == sum(t.numel() for name, t in first.items() if method.trains(name))
    assert bert.shapes_of(any_method()) == {name: t.shape for name, t in first.items()}


def test_a_fresh_adapter_leaves_the_output_unchanged(backbone, any_method, random_rows):
    method = any_method()
    rows = random_rows(backbone, [4, 7, 3])
    bare = run(backbone, [None] * 3, rows)
    params = method.init(backbone, torch.Generator().manual_seed(0))
    if method.changes_weights:
        assert torch.equal(run(backbone.with_weights(params), [None] * 3, rows), bare)
        return
    fresh = DeltaSet(method.deltas(params, backbone))
    real = rows.padded()[1].bool()
    for plan in ([fresh] * 3, [fresh, None, fresh]):
        out = run(backbone, plan, rows)
        touched = real & torch.tensor([s is not None for s in plan])[:, None]
        if method.identity_at_init:
            assert torch.equal(out[real], bare[real])
        else:
            assert ((out - bare)[touched].abs().amax(-1) > 1e-4).all()
            assert torch.allclose(out[1], bare[1], atol=1e-5) == (plan[1] is None)


# ---- batches


def test_batched_equals_the_row_loop(backbone, method, delta_set, random_rows, close):
    lengths = [4, 9, 1, 6, 5]
    rows = random_rows(backbone, lengths)
    bare = run(backbone, [None] * 5, rows)
    for fused in (False, True):
        one, two = (delta_set(backbone, method, seed, fused) for seed in (1, 2))
        for sets in ([one] * 5, [one, two, one, None, two], [two, None, None, None, None]):
            out = run(backbone, sets, rows)
            for i, n in enumerate(lengths):
                alone = backbone.run(Plan([sets[i]]), rows.one(i))[0].detach()
                close(out[i, :n], alone)
                if sets[i] is not None and n > 1 and method.name != "head":
                    assert (alone - bare[i, :n]).abs().max() > 1e-3  # else this test would see nothing


def test_neighbours_and_position_do_not_matter(backbone, method, delta_set, random_rows, close):
    own = delta_set(backbone, method, 1, fused=True)
    others = [delta_set(backbone, get_method(name)(), 5, fused=True) for name in MIXABLE]
    rows = random_rows(backbone, [6] + [3 + i % 5 for i in range(len(others))])
    alone = run(backbone, [own], random_rows(backbone, [6]))[0]
    for shift in (0, 1, len(others) // 2, len(others)):
        order = list(range(1, len(rows)))
        order.insert(shift, 0)
        sets = [own if i == 0 else others[i - 1] for i in order]
        close(run(backbone, sets, rows, order)[shift, :6], alone)


# ---- gradients


def trainable(backbone, method, random_params, seed):
    """Tensors to train, and a function that makes their deltas: a new graph for every backward pass."""
    params = {
        k: t.double().requires_grad_(method.trains(k)) if t.is_floating_point() else t
        for k, t in random_params(backbone, method, seed).items()
    }
    trained = {k: t for k, t in params.items() if t.requires_grad}
    return trained, lambda: DeltaSet(method.deltas(params, backbone))


def test_gradients_in_a_mixed_batch_equal_those_alone(
    backbone, method, make_model, request, random_params, random_rows, close, monkeypatch
):
    name = request.node.callspec.params["backbone"]
    double = Backbone(make_model(name).double())
    # Eager attention of newer models takes its softmax in float32 whatever the dtype; here it is to be as exact as all.
    monkeypatch.setattr(functional, "softmax", lambda x, dim, dtype=None, softmax=functional.softmax: softmax(x, dim))
    made = {
        "one": trainable(double, method, random_params, 1),
        "two": trainable(double, method, random_params, 2),
        "other": trainable(double, LoRA(r=3), random_params, 3),
        "prompted": trainable(double, PromptTuning(length=3), random_params, 4),
        "absent": trainable(double, method, random_params, 5),
    }
    owners = ["one", "two", "one", None, "other", "prompted"]
    lengths = [4, 6, 5, 3, 6, 2]
    rows = random_rows(double, lengths)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, double.hidden_size, generator=generator).double() for n in lengths]

    def gradients(wanted):
        """Gradients per owner of the weighted sum over the rows `wanted`, run as one batch."""
        for params, _ in made.values():
            for t in params.values():
                t.grad = None
        deltas = {owner: make() for owner, (_, make) in made.items()}
        sets = [deltas[owners[i]] if owners[i] else None for i in wanted]
        hidden = double.run(Plan(sets), *rows.padded(wanted))
        loss = sum((hidden[k, : lengths[i]] * weights[i]).sum() for k, i in enumerate(wanted))
        if loss.requires_grad:
            loss.backward()
        return {owner: {k: t.grad for k, t in params.items()} for owner, (params, _) in made.items()}

    mixed = gradients(list(range(len(owners))))
    for owner in ("one", "two", "other", "prompted"):
        alone = gradients([i for i, o in enumerate(owners) if o == owner])[owner]
        for key, gradient in alone.items():
            close(mixed[owner][key], gradient)
        assert not alone or max(g.abs().max() for g in alone.values()) > 1e-3
    # A slot that is not in the batch gets no gradient at all, so that no optimizer moves it.
    assert all(g is None for g in mixed["absent"].values())


# ---- attaching


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_attach_and_detach_leave_no_trace(backbone, make_model, request, delta_set, random_rows):
    name = request.node.callspec.params["backbone"]
    model = make_model(name)
    model.eval().requires_grad_(False)  # torch multiplies small matrices by another path where one needs gradients
    rows = random_rows(backbone, [5, 3])
    ids, mask = rows.padded()
    plain_model = model.get_submodule(backbone.architecture.runs)
    implementation = plain_model.config._attn_implementation

    def parts(model):
        return [
            (n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
            for n, m in model.named_modules()
        ]

    def plain():
        with torch.no_grad():
            return plain_model(input_ids=ids, attention_mask=mask).last_hidden_state

    keys, bits, modules, output = list(model.state_dict()), snapshot(model), parts(model), plain()
    attached = Backbone(model)
    assert list(model.state_dict()) == keys
    assert [n for n, *_ in parts(model)] == [n for n, *_ in modules]
    for i, method_name in enumerate(MIXABLE):
        run(attached, [delta_set(attached, get_method(method_name)(), i, fused=True), None], rows)
    assert torch.equal(run(attached, [None, None], rows), output)
    attached.detach()
    assert list(model.state_dict()) == keys
    assert all(torch.equal(t, bits[n]) for n, t in model.state_dict().items())
    assert parts(model) == modules
    assert plain_model.config._attn_implementation == model.config._attn_implementation == implementation
    assert torch.equal(plain(), output)
    attached.attach()
    attached.attach()  # twice does no harm
    assert torch.equal(run(attached, [None, None], rows), output)


# ---- settings

SETTINGS = [
    LoRA(r=3, alpha=1.5, dropout=0.25, targets=("key", "ffn_in"), layers=(0, 2), rank_stabilised=True),
    LoRA(targets=("embedding", "query"), r=2, layers=(1,)),
    RsLoRA(r=3, targets=("embedding",)),
    LoRAPlus(r=2, ratio=4.0),
    PiSSA(r=3, alpha=6.0, niter=2, layers=(1,)),
    DoRA(r=2, constant_norm=False, dropout=0.1),
    VeRA(r=16, seed=7, d_initial=0.2),
    AdaLoRA(r=4, target_r=2, initial_share=0.2, ranks=(2, 0, 3, 4, 1, 2)),
    IA3(outputs=("query",), inputs=("ffn_out", "value"), layers=(1,)),
    BitFit(subset=("query", "ffn_norm"), layers=(0,)),
    LayerNormTuning(layers=(2,), embedding_norm=True),
    Houlsby(bottleneck=5, activation="silu", layers=(0,), layer_norms=True),
    Pfeiffer(reduction_factor=4, activation="tanh", layer_norms=True),
    PromptTuning(length=3, start="uniform", position=-1),
    PromptTuning(length=3, start="text", text="not, the film"),
    PromptTuning(length=3, start="labels", labels=("bad", "very good")),
    PrefixTuning(length=5, layers=(1, 2), hidden=7, start_text="good, bad"),
    PrefixTuning(length=5, layers=(1, 2), reparametrise=False, std=0.5),
    PTuningV1(pattern="{p} the {text} film {p*2}", position=0, reparametrise=False),
    PTuningV2(length=5, layers=(1, 2), std=0.5),
    PTuningV2(length=5, layers=(1, 2), reparametrise=True, hidden=7),
    AoTFC(r=3, activation="relu", dropout=0.1),
    AoTKronecker(r=3, a=10, b=12, dropout=0.1),
    ParallelAdapter(bottleneck=3, scale=4.0, learn_scale=True, activation="silu", sublayers=("block",), layers=(1,)),
    MAM(prefix_length=3, bottleneck=5, scale=4.0, learn_scale=True, activation="tanh", layers=(0, 2)),
    Compacter(bottleneck=12, phm_dim=2, rank=3, activation="relu", layers=(0,), layer_norms=True),
    CompacterPP(bottleneck=8, phm_dim=8, layer_norms=True),
    UTuning(operations=("block",), tuner="prefix", width=3, layers=(2,)),
    UTuning(activation="tanh", width=5),
    DRA(targets=("ffn_out",), layers=(1,)),
    AttnScale(layers=(0,)),
    DSEE(r=2, alpha=4.0, num_sparse=9, support="magnitude", pruned_heads=0.5, prune_at=0.3, layers=(1,)),
    SoTU(density=0.2, targets=("query",), mask_seed=3),
    TopLayers(count=1),
    Freeze(first=0, last=-2),
    SIFT(density=0.1, targets=("ffn_in", "key"), layers=(1,), batches=3),
    *[get_method(name)() for name in method_names()],
]


@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: m.name)
def test_settings_round_trip(method, bert):
    text = json.dumps(method.settings())
    again = type(method).from_settings(json.loads(text))
    assert again == method
    assert json.dumps(again.settings()) == text
    assert again.init(bert, torch.Generator()).keys() == method.init(bert, torch.Generator()).keys()


def test_settings_from_a_command_line():
    given = {"r": "4", "alpha": "2.5", "targets": "query, key", "layers": "0,2", "rank_stabilised": "yes"}
    wanted = LoRA(r=4, alpha=2.5, targets=("query", "key"), layers=(0, 2), rank_stabilised=True)
    assert LoRA.from_settings(given) == wanted
    assert LoRA.from_settings({"layers": "none"}) == LoRA()
    assert Houlsby.from_settings({"layer_norms": "0", "activation": "relu"}) == Houlsby(activation="relu")
    assert LoRA.from_settings({"r": 4.0}).r == 4


# ---- what cannot be honoured raises


def test_an_unknown_hyper_parameter_names_the_nearest(any_method):
    known = [f.name for f in dataclasses.fields(any_method)]
    if not known:
        with pytest.raises(ConfigError, match=f"method '{any_method.name}' has no hyper-parameter 'r'. It has: none"):
            any_method.from_settings({"r": 1})
        return
    wrong = known[-1] + "s"
    with pytest.raises(ConfigError, match=rf"has no hyper-parameter '{wrong}'\. Did you mean '{known[-1]}'\? It has: "):
        any_method.from_settings({wrong: 1})


@pytest.mark.parametrize(
    ("given", "meant"), [("rank", "r"), ("lora_alpha", "alpha"), ("dropuot", "dropout"), ("target_modules", "targets")]
)
def test_a_class_refuses_what_is_no_hyper_parameter_of_it_and_knows_other_names(given, meant):
    with pytest.raises(ConfigError, match=rf"method 'lora' has no hyper-parameter '{given}'\. Did you mean '{meant}'"):
        LoRA(**{given: 3})
    with pytest.raises(ConfigError, match="given by name"):
        LoRA(3)
    assert dataclasses.replace(copy.deepcopy(LoRA(r=3)), alpha=2.0) == LoRA(r=3, alpha=2.0)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", r"learning_rate \(--learning-rate\)"),
        ("learning_rate", r"learning_rate \(--learning-rate\)"),
        ("num_train_epochs", r"epochs \(--epochs\)"),
        ("batch_size", r"batch_size \(--batch-size\)"),
    ],
)
def test_a_setting_of_training_is_no_hyper_parameter(given, meant):
    words = rf"method 'lora' has no hyper-parameter '{given}'\. That is a setting of training, {meant}\. It has: alpha"
    for make in (lambda: LoRA(**{given: 1}), lambda: LoRA.from_settings({given: "1"})):
        with pytest.raises(ConfigError, match=words):
            make()


def _does_not_fit(hint):
    """Values that a field of this type cannot hold."""
    options = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        kinds = [_does_not_fit(o) for o in options if o is not type(None)]
        return [value for value in kinds[0] if all(value in others for others in kinds[1:])]
    if get_origin(hint) is tuple:
        return [3, 2.5, True, {"a": 1}, *([part] for part in _does_not_fit(options[0]))]
    if get_origin(hint) is Literal:
        return ["zebra", 3, 2.5, True, ["zebra"]]
    return {
        int: ["8", 8.0, 2.5, True, [3]], float: ["0.5", True, [0.5]], str: [3, 2.5, ["a"]], bool: ["true", 1, 0.0, [3]]
    }[hint]  # fmt: skip


def test_a_class_refuses_values_of_another_type(any_method):
    for name, hint in get_type_hints(any_method).items():
        if name not in {f.name for f in dataclasses.fields(any_method)}:
            continue
        assert _does_not_fit(hint), name
        for wrong in _does_not_fit(hint):
            words = rf"^method '{any_method.name}': {name}={re.escape(repr(wrong))} is not possible; (give|choose) \w+"
            with pytest.raises(ConfigError, match=words):
                any_method(**{name: wrong})


@pytest.mark.parametrize(
    ("method", "given", "same"),
    [
        (LoRA, {"targets": ["query", "value"], "layers": [0, 1]}, {"targets": ("query", "value"), "layers": (0, 1)}),
        (LoRA, {"targets": "value", "layers": range(2)}, {"targets": ("value",), "layers": (0, 1)}),
        (LoRA, {"targets": "query, key", "layers": "semantic"}, {"targets": ("query", "key"), "layers": "semantic"}),
        (IA3, {"outputs": "key", "inputs": []}, {"outputs": ("key",), "inputs": ()}),
        (PromptTuning, {"start": "labels", "labels": [" a", "b"]}, {"start": "labels", "labels": (" a", "b")}),
        (AdaLoRA, {"ranks": [1, 2], "beta1": 0}, {"ranks": (1, 2), "beta1": 0.0}),
        (TopLayers, {"count": torch.tensor(2).numpy()[()]}, {"count": 2}),
    ],
)
def test_a_class_takes_lists_and_single_words(method, given, same):
    made = method(**given)
    assert made == method(**same) and hash(made) == hash(method(**same))
    assert method.from_settings(json.loads(json.dumps(made.settings()))) == made
    assert {name: getattr(made, name) for name in same} == same


@pytest.mark.parametrize("method", [LoRA, RsLoRA])
@pytest.mark.parametrize(("name", "value"), [("dropout", 0.5), ("layers", (99,))])
def test_settings_of_linear_sites_are_refused_for_word_embeddings_alone(method, name, value):
    words = rf"method '{method.name}': {name}={re.escape(repr(value))} is for linear sites, and .* leave {name} out"
    with pytest.raises(ConfigError, match=words):
        method(targets=("embedding",), **{name: value})
    assert getattr(method(targets=("embedding", "query"), **{name: value}), name) == value


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (LoRA, {"r": 0}, "method 'lora': r=0 is not possible; give r of at least 1"),
        (LoRA, {"r": -3}, "r=-3 is not possible"),
        (LoRA, {"dropout": 1.5}, r"dropout=1.5 is not a probability below 1; give 0 <= dropout < 1"),
        (LoRA, {"dropout": 1.0}, "dropout=1.0 is not a probability"),
        (LoRA, {"dropout": -0.1}, "dropout=-0.1 is not a probability"),
        (LoRA, {"dropout": "nan"}, "dropout=nan is not a probability"),
        (RsLoRA, {"r": 0}, "method 'rslora': r=0 is not possible"),
        (LoRAPlus, {"ratio": 0.5}, "method 'lora_plus': ratio=0.5 slows B down; give ratio of at least 1"),
        (PiSSA, {"alpha": 0}, "alpha=0.0 gives no start; give a positive alpha"),
        (PiSSA, {"niter": -1}, "niter=-1 is not possible"),
        (VeRA, {"seed": -1}, "seed=-1 is not possible"),
        (AdaLoRA, {"target_r": 13}, "target_r=13 exceeds r=12"),
        (AdaLoRA, {"target_r": 0}, "target_r=0 is not possible"),
        (AdaLoRA, {"beta1": 1.0}, "beta1=1.0 is not a probability below 1"),
        (AdaLoRA, {"initial_share": 0.7}, "initial_share and final_share add up to 1.1"),
        (AdaLoRA, {"orthogonality": -1}, "orthogonality=-1.0 rewards overlap"),
        (AdaLoRA, {"ranks": [1, -1]}, r"ranks=\(1, -1\); give none below 0"),
        (AoTFC, {"r": 0}, "method 'aot_fc': r=0 is not possible"),
        (AoTFC, {"dropout": 1.5}, "dropout=1.5 is not a probability"),
        (AoTKronecker, {"r": 0}, "method 'aot_kronecker': r=0 is not possible"),
        (AoTKronecker, {"dropout": 1.5}, "dropout=1.5 is not a probability"),
        (AoTKronecker, {"a": 3}, "only one of a and b is given; give both or none"),
        (AoTKronecker, {"a": -5, "b": -20}, "a=-5 is not possible"),
        (Houlsby, {"bottleneck": 0}, "bottleneck=0 is not possible"),
        (Pfeiffer, {"reduction_factor": 0}, "reduction_factor=0 is not possible"),
        (PromptTuning, {"length": 0}, "length=0 is not possible"),
        (PromptTuning, {"position": -2}, "position=-2 is not possible; give -1, 0, 1"),
        (PromptTuning, {"start": "text"}, "start=text has no text to start from; give text="),
        (PromptTuning, {"start": "labels", "labels": []}, "start=labels has no labels to start from"),
        (PromptTuning, {"text": "good"}, "text='good' without start=text; give start=text as well"),
        (PromptTuning, {"start": "labels", "labels": "a,b", "length": 1}, "2 labels do not fit length=1"),
        (PTuningV2, {"length": 0}, "length=0 is not possible"),
        (DSEE, {"num_sparse": 0}, "num_sparse=0 is not possible"),
        (DSEE, {"pruned_heads": 1}, "pruned_heads=1.0 is not a share below 1; give 0 <= pruned_heads < 1"),
        (SIFT, {"density": 0}, "method 'sift': density=0.0 is not a share; give 0 < density <= 1"),
        (SIFT, {"density": 1.5}, "density=1.5 is not a share"),
        (SIFT, {"batches": 0}, "batches=0 is not possible"),
        (SoTU, {"mask_seed": -1}, "mask_seed=-1 is not a seed"),
        (TopLayers, {"count": 0}, "count=0 is not possible"),
        (PTuningV2, {"std": -1}, "std=-1.0 is not possible; give 0 or more"),
        (PrefixTuning, {"hidden": 0}, "hidden=0 is not possible"),
        (PTuningV1, {"pattern": "{p}"}, r"pattern='\{p\}' needs \{text\} exactly once; write \{text\} once"),
        (PTuningV1, {"pattern": "{text} {text} {p}"}, r"needs \{text\} exactly once"),
        (PTuningV1, {"pattern": "is it good ? {text}"}, "has no pseudo token"),
        (PTuningV1, {"pattern": "{p*0} {text}"}, "has no pseudo token"),
        (PTuningV1, {"pattern": "{p} {text} {q}"}, "has other braces"),
        (PTuningV1, {"position": -1}, "position=-1 is not possible; give 0, 1"),
        (IA3, {"outputs": ["key"], "inputs": ["key"]}, r"\['key'\] are in outputs and in inputs"),
        (ParallelAdapter, {"bottleneck": 0}, "bottleneck=0 is not possible"),
        (MAM, {"prefix_length": 0}, "prefix_length=0 is not possible"),
        (Compacter, {"bottleneck": 10}, "bottleneck=10 is not a multiple of phm_dim=4; give for example 8"),
        (CompacterPP, {"rank": 0}, "rank=0 is not possible"),
        (UTuning, {"width": 0}, "width=0 is not possible"),
        (UTuning, {"tuner": "prompt"}, "tuner='prompt' .*choose one of bottleneck, low_rank, prefix"),
        (UTuning, {"tuner": "prefix", "activation": "relu"}, "tuner=prefix has no use for activation=relu"),
        (LoRA, {"r": "eight"}, "r='eight' is not possible; give a whole number"),
        (LoRA, {"r": 2.5}, "r=2.5 is not possible; give a whole number"),
        (LoRA, {"r": True}, "r=True is not possible; give a whole number"),
        (LoRA, {"r": None}, "r=None is not possible; give a whole number"),
        (LoRA, {"alpha": True}, "alpha=True is not possible; give a number"),
        (LoRA, {"targets": [1]}, "targets=.* is not possible; give a list of texts"),
        (LoRA, {"rank_stabilised": "maybe"}, "rank_stabilised='maybe' is not possible; give true or false"),
        (Houlsby, {"activation": "swish"}, "activation='swish' .*choose one of gelu, relu, silu, tanh"),
        (PromptTuning, {"start": "zeros"}, "start='zeros' .*choose one of vocabulary, uniform, text, labels"),
    ],
)
def test_a_bad_value_says_what_is_wrong(method, settings, words):
    with pytest.raises(ConfigError, match=words):
        method.from_settings(settings)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            LoRA(targets=("qury",)),
            r"no linear site has the role 'qury'\. Did you mean 'query'\? This backbone has: ",
        ),
        (LoRA(targets=("o_proj",)), r"'o_proj'\. Did you mean 'attention_output'\? This backbone has: "),
        (LoRA(targets=("query", "nothing")), "no linear site has the role 'nothing'"),
        (LoRA(targets=()), "no linear site matches"),
        (LoRA(targets=("embedding", "qury")), "no linear site has the role 'qury'"),
        (DoRA(targets=("embedding",)), "no linear site has the role 'embedding'"),
        (PiSSA(r=33), r"r=33 exceeds the 32 singular values of layer\.0\.query; lower r"),
        (AdaLoRA(ranks=(1, 2)), "ranks has 2 entries for 6 sites; give one for each"),
        (IA3(outputs=("keys",)), "no linear site has the role 'keys'.* Did you mean 'key'"),
        (IA3(inputs=("ffn",)), "no linear site has the role 'ffn'"),
        (IA3(outputs=(), inputs=()), "no linear site matches"),
        (BitFit(subset=("query", "kee")), r"no linear or norm has the role \['kee'\]; choose from .*key"),
        (BitFit(subset=("embedding_norm",), layers=(0,)), "no bias there"),
        (AoTKronecker(a=4, b=5), r"a·b = 20 rows do not cover 97 ids; give larger factors"),
        (Compacter(bottleneck=12, phm_dim=6), r"phm_dim=6 does not divide the width 32; give one of \[1, 2, 4\]"),
        (UTuning(operations=("blok",)), "no sublayer site has the role 'blok'. Did you mean 'block'"),
        (ParallelAdapter(sublayers=()), "no sublayer site matches"),
        (DSEE(num_sparse=1025), "num_sparse=1025 is more than the 1024 entries of layer.0.query"),
        (TopLayers(count=4), "count=4 is more than the 3 layers; give at most 3"),
        (Freeze(first=3), "there is no layer first=3; give -3 to 2"),
        (Freeze(last=-4), "there is no layer last=-4"),
        (Freeze(first=2, last=1), "layers 2 to 1 are none; give a first layer that is not above the last"),
        (PromptTuning(length=39), "length=39 leaves no room; give at most 38"),
        (PromptTuning(length=39, start="text", text="good"), "length=39 leaves no room; give at most 38"),
        (PromptTuning(start="text", text=" "), "text=' ' has no tokens; give at least one word"),
        (PrefixTuning(length=41, start_text="good"), "start_text does not reach length=41; give at most 40"),
        (PTuningV1(pattern="{p*38} {text} good"), "leaves no room; make it 38 tokens long"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_backbone_says_so(method, words, bert):
    with pytest.raises(ConfigError, match=words):
        method.init(bert, torch.Generator())


@pytest.mark.parametrize("layers", [(0, 99), (-1,), (3,)])
@pytest.mark.parametrize(
    "name", [n for n in method_names() if "layers" in {f.name for f in dataclasses.fields(get_method(n))}]
)
def test_a_layer_out_of_range_raises(name, layers, bert):
    with pytest.raises(ConfigError, match=f"layer {layers[-1]} does not exist; this backbone has layers 0 to 2"):
        get_method(name)(layers=layers).init(bert, torch.Generator())


@pytest.mark.parametrize("layers", [(0,), (1, 2)])
@pytest.mark.parametrize(
    "name", [n for n in method_names() if "layers" in {f.name for f in dataclasses.fields(get_method(n))}]
)
def test_layers_are_honoured(name, layers, bert):
    method = get_method(name)(layers=layers)
    touched = {int(key.split(".")[1]) for key in method.init(bert, torch.Generator()) if key.startswith("layer.")}
    assert touched == set(layers)


# ---- golden numbers: parameters on RoBERTa-base (methods.md, section 0 and the sections)

ALL_LINEARS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")

COUNTS = [
    (LayerNormTuning(), 36_864),
    (LayerNormTuning(embedding_norm=True), 38_400),
    (BitFit(), 102_144),
    (BitFit(layers=tuple(range(12))), 101_376),
    (BitFit(subset=("query", "ffn_in")), 46_080),
    (Houlsby(bottleneck=8), 313_536),
    (Houlsby(bottleneck=48), 1_789_056),
    (Houlsby(), 2_379_264),
    (Houlsby(layer_norms=True), 2_416_128),
    (Houlsby(bottleneck=256), 9_461_760),
    (Pfeiffer(), 894_528),
    (Pfeiffer(reduction_factor=12), 1_189_632),
    (PrefixTuning(), 9_857_024),
    (PrefixTuning(reparametrise=False), 184_320),
    (PrefixTuning(length=200, reparametrise=False), 3_686_400),
    (PTuningV1(), 8_278_272),
    (PTuningV1(reparametrise=False), 6_912),
    (PTuningV2(length=10, reparametrise=True), 9_857_024),
    (PTuningV2(length=5), 92_160),
    (PTuningV2(length=8), 147_456),
    (PTuningV2(length=20), 368_640),
    (PTuningV2(length=128), 2_359_296),
    (PromptTuning(length=1, start="uniform"), 768),
    (PromptTuning(length=20, start="uniform"), 15_360),
    (PromptTuning(length=100, start="uniform"), 76_800),
    (LoRA(r=1), 36_864),
    (LoRA(r=4), 147_456),
    (LoRA(), 294_912),
    (LoRA(r=16), 589_824),
    (LoRA(targets=("query", "key", "value", "attention_output")), 589_824),
    (LoRA(targets=("query", "key", "value", "attention_output", "ffn_in", "ffn_out")), 1_327_104),
    (LoRA(targets=("embedding",)), 408_264),  # (50,265 + 768) · 8
    (RsLoRA(), 294_912),
    (LoRAPlus(), 294_912),
    (PiSSA(), 294_912),
    (DoRA(), 313_344),
    (VeRA(), 24_576),
    (VeRA(r=1024), 43_008),
    (AdaLoRA(), 442_656),  # 24 sites · 12 · (768 + 768 + 1)
    (AdaLoRA(ranks=(8,) * 24), 295_104),
    (IA3(), 55_296),
    (AoTKronecker(r=5, a=256, b=200), 257_760),
    (AoTKronecker(r=10, a=256, b=200), 976_320),
    (AoTKronecker(r=20, a=256, b=200), 3_795_840),
    (AoTKronecker(r=30, a=256, b=200), 8_458_560),
    (AoTFC(r=5), 101_436),
    (AoTFC(r=20), 378_096),
    (AoTFC(r=128), 2_370_048),
    (AoTFC(r=256), 4_730_880),
    (AoTFC(r=512), 9_452_544),
    (SIFT(), 226_488),
    (SIFT(density=0.01, targets=ALL_LINEARS), 849_336),
    (DSEE(support="random"), 150_528),
    (DSEE(r=8, num_sparse=64, support="random"), 296_448),
    (DSEE(r=16, num_sparse=64, support="random", pruned_heads=0.25), 591_360),
    (SoTU(targets=ALL_LINEARS), 8_493_456),
    (SoTU(targets=("query", "value"), density=0.01), 141_552),
    (TopLayers(count=1), 7_087_872),
    (TopLayers(), 14_175_744),
    (TopLayers(count=4), 28_351_488),
    (Freeze(), 14_175_744),
    (Freeze(first=6), 42_527_232),
    (Freeze(first=0, last=-1), 85_054_464),
    (HeadOnly(), 0),
    (ParallelAdapter(bottleneck=384), 7_091_712),
    (ParallelAdapter(bottleneck=512), 9_452_544),
    (ParallelAdapter(bottleneck=512, learn_scale=True), 9_452_556),
    (MAM(), 599_232),
    (Compacter(), 57_088),
    (CompacterPP(), 28_576),
    (UTuning(), 912_960),
    (UTuning(tuner="low_rank"), 884_736),
    (UTuning(tuner="prefix", operations=("attention",)), 294_912),
    (DRA(), 18_432),
    (AttnScale(), 144),
]


@pytest.fixture(scope="module")
def roberta_base():
    config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        return Backbone(transformers.RobertaModel(config), name="roberta-base")


@pytest.mark.parametrize(("method", "count"), COUNTS, ids=lambda v: f"{v:_}" if isinstance(v, int) else v.name)
def test_parameter_counts(method, count, roberta_base):
    assert method.num_parameters(roberta_base) == count


def test_every_method_has_a_golden_count():
    missing = sorted(set(method_names()) - {m.name for m, _ in COUNTS} - {"full"})
    assert not missing, "\n".join(
        f"add a line ({get_method(name).__name__}(), <count>) to COUNTS in this file: the parameters that '{name}' "
        f"trains on RoBERTa-base without the head, by its paper's formula and not copied from num_parameters"
        for name in missing
    )


def test_parameter_count_of_the_backbone(roberta_base):
    assert roberta_base.num_parameters == 124_055_040
    assert roberta_base.num_layers * roberta_base.vocab_size * roberta_base.hidden_size == 463_242_240


def test_the_sparse_part_of_a_matrix_is_found():
    g = torch.Generator().manual_seed(0)
    planted = random_places(20, 64 * 48, g)
    matrix = torch.randn(64, 2, generator=g) @ torch.randn(2, 48, generator=g)
    matrix.view(-1)[planted.long()] += 6.0
    assert torch.equal(sparse_part(matrix, 2, 20, g), planted)
    assert not torch.equal(largest_places(matrix.abs(), 20), planted)  # so magnitude alone does not find it


def test_dsee_is_its_equation(bert, random_params, random_rows, close):
    method = DSEE(r=3, alpha=6.0, num_sparse=20)
    params = random_params(bert, method, 1)
    weights = dict(bert.model.state_dict())
    for site in bert.find_sites("linear", ("query", "value")):
        u, v, values, indices = (params[f"{site.name}.{k}"] for k in ("U", "V", "values", "indices"))
        sparse = torch.zeros(site.out_features * site.in_features)
        sparse[indices.long()] = values
        name = f"{site.module}.weight"
        weights[name] = weights[name] + 2.0 * ((u @ v).T + sparse.view(site.out_features, site.in_features))
    rows = random_rows(bert, [5, 5])
    found = run(bert, [DeltaSet(method.deltas(params, bert))] * 2, rows)
    close(found, run(bert.with_weights(weights), [None] * 2, rows))


def test_dsee_shuts_the_heads_that_were_updated_least(bert, random_params, random_rows, close):
    method = DSEE(pruned_heads=0.5, prune_at=0.5)
    params = random_params(bert, method, 1)
    with torch.no_grad():
        for site in bert.find_sites("linear", ("query", "value")):
            for role, least in (("query", (0, 2)), ("value", (0, 2))):  # of four heads, eight rows each
                if site.role == role:
                    for head in least:
                        params[f"{site.name}.V"][:, 8 * head : 8 * head + 8] *= 0.01
                    params[f"{site.name}.values"] *= 0.01
        for step in (1, 2, 3, 5, 6, 7, 8):
            method.after_step(params, step, 8)
        assert all(t.tolist() == [1.0] * 4 for k, t in params.items() if k.endswith(".heads"))
        method.after_step(params, 4, 8)
    assert all(t.tolist() == [0.0, 1.0, 0.0, 1.0] for k, t in params.items() if k.endswith(".heads"))
    deltas = DeltaSet(method.deltas(params, bert))
    weights = dict(merge_deltas(bert, DeltaSet({k: d for k, d in deltas.by_site.items()
                                               if not k.endswith("attention_output")})).model.state_dict())  # fmt: skip
    for site in bert.find_sites("linear", ("attention_output",)):
        weights[f"{site.module}.weight"] = weights[f"{site.module}.weight"].clone()
        for head in (0, 2):
            weights[f"{site.module}.weight"][:, 8 * head : 8 * head + 8] = 0
    rows = random_rows(bert, [5, 5])
    close(run(bert, [deltas] * 2, rows), run(bert.with_weights(weights), [None] * 2, rows))


def test_dsee_shuts_query_heads_that_share_a_value_head(make_backbone, random_params, random_rows):
    llama = make_backbone("llama")  # four query heads, two of values
    method = DSEE(pruned_heads=0.5)
    params = random_params(llama, method, 1)
    for site in llama.find_sites("linear", ("query", "value")):
        kept = torch.arange(site.out_features) >= site.out_features // 2
        params[f"{site.name}.V"] *= torch.where(kept, 1.0, 0.01)
        params[f"{site.name}.values"] *= 0.01
    method.after_step(params, 4, 8)
    assert all(t.tolist() == [0.0, 0.0, 1.0, 1.0] for k, t in params.items() if k.endswith(".heads"))
    deltas = DeltaSet(method.deltas(params, llama))
    assert torch.isfinite(run(llama, [deltas, None], random_rows(llama, [4, 4]))).all()


def test_partial_tuning_trains_the_layers_it_names_and_nothing_else(bert):
    def layers(method):
        return {".".join(k.split(".")[:3]) for k in method.init(bert, torch.Generator())}

    assert layers(TopLayers(count=1)) == {"encoder.layer.2"} == layers(Freeze(first=-1))
    assert layers(Freeze(first=0, last=1)) == {"encoder.layer.0", "encoder.layer.1"}


def test_sotu_draws_other_places_for_other_seeds(bert):
    def places(mask_seed, seed):
        method = SoTU(mask_seed=mask_seed)
        return method.init(bert, torch.Generator().manual_seed(seed))["layer.0.query.indices"]

    assert torch.equal(places(1, 0), places(1, 5))
    assert not torch.equal(places(1, 0), places(2, 0))
    assert torch.equal(places(None, 5), places(5, 0)) and not torch.equal(places(None, 5), places(None, 6))


@pytest.mark.parametrize(("count", "size"), [(0, 5), (1, 1), (5, 5), (3, 8), (50, 100), (51, 100), (900, 10**6)])
def test_random_places_are_different_ascending_and_anywhere(count, size):
    places = random_places(count, size, torch.Generator().manual_seed(0))
    assert places.dtype == torch.int32 and len(places) == count
    assert (places[1:] > places[:-1]).all()
    assert not count or (places.min() >= 0 and places.max() < size)


def test_every_place_is_equally_likely():
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(8)
    for _ in range(4000):
        seen[random_places(3, 8, generator).long()] += 1
    assert (seen / 4000 - 3 / 8).abs().max() < 0.03  # four standard deviations


def test_parameter_count_of_full_fine_tuning(bert):
    assert FullFineTuning().num_parameters(bert) == bert.num_parameters
    pooler = sum(p.numel() for p in bert.pooler.parameters())
    assert bert.num_parameters + pooler == sum(p.numel() for p in bert.model.parameters())


# ---- starts


def test_prompts_start_from_words_or_uniformly(bert):
    words = PromptTuning(length=5).init(bert, torch.Generator().manual_seed(0))["vectors"]
    assert all((bert.word_embeddings == w).all(1).any() for w in words)
    uniform = PromptTuning(length=200, start="uniform")
    with pytest.raises(ConfigError, match="leaves no room"):
        uniform.init(bert, torch.Generator())
    vectors = PromptTuning(length=38, start="uniform").init(bert, torch.Generator().manual_seed(0))["vectors"]
    assert -0.5 <= vectors.min() < -0.4 and 0.4 < vectors.max() <= 0.5


def test_rank_stabilised_scale(bert):
    for stabilised, scale in ((False, 16 / 8), (True, 16 / 8**0.5)):
        method = LoRA(rank_stabilised=stabilised)
        (delta,) = method.deltas(method.init(bert, torch.Generator()), bert)["layer.0.query"]
        assert delta.scale == pytest.approx(scale)


def test_kronecker_picks_factors_that_cover_the_vocabulary():
    for size in (1, 2, 97, 100, 101, 30522, 50265):
        a, b = AoTKronecker().factors(size)
        assert a * b >= size
        assert (a - 1) * b < size and abs(a - b) <= 2
