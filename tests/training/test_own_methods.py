"""Methods of one's own: a mistake in what they yield is named before the first step."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import multitune as mt
from multitune.deltas import Affine, Bias, LowRank, Scale
from multitune.methods import Method, Recipe, SiteMethod
from multitune.methods.yielded import check_deltas, check_trainable
from multitune.training import TrainJob, train_many

SITE = "layer.0.ffn_out"


def method_of(make_deltas, size=32):
    """A method with one trained vector `v` of the name "own", whose deltas `make_deltas(v)` gives."""

    @dataclass(frozen=True, kw_only=True)
    class Own(Method):
        name = "own"
        title = "Own"
        paper = "a test"
        recipe = Recipe(learning_rate=1e-2, source="test")

        def init(self, backbone, generator):
            return {"v": torch.zeros(size)}

        def deltas(self, params, backbone):
            return make_deltas(params["v"])

    return Own()


MISTAKES = [
    (lambda v: [Bias(b=v)], r"method 'own': deltas returned a list; return a dict from the names of sites to lists"),
    (lambda v: {SITE: Bias(b=v)}, rf"method 'own': deltas returned a Bias for site '{SITE}'; return a dict"),
    (lambda v: {SITE: [v]}, rf"deltas returned a list with a Tensor in it for site '{SITE}'"),
    (lambda v: {SITE: None}, rf"deltas returned a NoneType for site '{SITE}'"),
    (lambda v: {"layer.0.ffn_uot": [Bias(b=v)]}, r"'layer\.0\.ffn_uot', which is no site .*Did you mean '"),
    (lambda v: {3: [Bias(b=v)]}, r"for 3, which is no site .*Give the site's name: site\.name"),
    (lambda v: {SITE: [Affine(offset=v)]}, rf"Affine acts at sites of kind norm, and '{SITE}' is of kind linear"),
    (lambda v: {"layer.0.ffn_in": [Bias(b=v)]}, r"the b of Bias has shape \[32\], expected \[48\]"),
    (lambda v: {SITE: [Scale(s=v[None])]}, r"the s of Scale has shape \[1, 32\], expected \[32\]"),
    (
        lambda v: {SITE: [LowRank(A=v.new_zeros(48, 4), B=v.expand(3, 32))]},
        r"the B of LowRank has shape \[3, 32\], expected \[4, 32\]",
    ),
    (
        lambda v: {SITE: [LowRank(A=v.expand(4, 32), B=v.expand(4, 32))]},
        r"the A of LowRank has shape \[4, 32\], expected \[48, .*in_features=48 to out_features=32",
    ),
    (lambda v: {SITE: [Bias(b=v.detach())]}, r"no gradient reaches the tensors it trains \(v\).*detach"),
    (lambda v: {}, r"no gradient reaches the tensors it trains \(v\)"),
]


@pytest.mark.parametrize(("make_deltas", "message"), MISTAKES)
def test_a_mistake_in_the_deltas_is_named_before_the_first_step(make_deltas, message, tiny, make_data, quick):
    with pytest.raises(mt.ConfigError, match=message):
        quick(tiny, make_data(), method_of(make_deltas))


def test_deltas_of_a_right_form_train_whether_lists_or_tuples(tiny, make_data, quick):
    for listed in (list, tuple):
        trained = quick(tiny, make_data(), method_of(lambda v, listed=listed: {SITE: listed([Bias(b=v)])})).adapter
        assert trained.params["v"].abs().max() > 0


def test_one_tensor_with_a_gradient_is_enough(tiny, make_data, quick):
    method = method_of(lambda v: {SITE: [Bias(b=v)], "layer.1.ffn_out": [Bias(b=v.detach())]})
    assert quick(tiny, make_data(), method).num_steps == 2


def test_among_many_jobs_the_one_that_trains_nothing_fails_by_itself(tiny, make_data):
    jobs = [
        TrainJob(data=make_data(), method=method_of(lambda v: {SITE: [Bias(b=v.detach())]}), name="bad"),
        TrainJob(data=make_data(), method="bitfit", name="good"),
    ]
    bad, good = train_many(tiny, jobs, max_steps=1, batch_size=4, progress=False)
    assert "no gradient reaches" in str(bad.error)
    assert good.num_steps == 1


def test_a_refused_method_leaves_the_model_as_it_was(make_model):
    model = make_model("bert")
    for make_deltas, message in (
        (lambda v: {SITE: [Bias(b=v.detach())]}, "no gradient reaches"),
        (lambda v: {SITE: [Affine(offset=v)]}, "Affine acts at"),
    ):
        with pytest.raises(mt.ConfigError, match=message):
            mt.attach(model, method_of(make_deltas))
    assert all(p.requires_grad for p in model.parameters())
    mt.detach(mt.attach(model, method_of(lambda v: {SITE: [Bias(b=v)]})))


def check_all_methods(backbone):
    checked = 0
    for name in mt.method_names():
        method = mt.get_method(name)()
        try:
            params = method.init(backbone, torch.Generator().manual_seed(0))
        except mt.ConfigError:  # a method that does not fit this architecture
            continue
        own = {k: t.requires_grad_(t.is_floating_point() and method.trains(k)) for k, t in params.items()}
        yielded = method.deltas(own, backbone)
        check_deltas(method, yielded, backbone)
        check_trainable(method, own, yielded)
        checked += 1
    assert checked > 20


def test_the_deltas_of_every_method_meet_the_check(backbone):
    check_all_methods(backbone)


@pytest.mark.parametrize("name", ["t5/writes", "bart/writes"])
def test_the_deltas_of_every_method_meet_the_check_with_a_decoder(name, make_backbone):
    check_all_methods(make_backbone(name))


def test_hyper_parameters_without_the_decorator_are_refused():
    class Forgotten(SiteMethod):
        name = "forgotten"
        q: int = 3

    with pytest.raises(mt.ConfigError, match=r"Forgotten states hyper-parameters \(q\).*@dataclass\(frozen=True, kw_"):
        Forgotten(q=4)
    with pytest.raises(mt.ConfigError, match="no dataclass"):
        Forgotten()
    assert dataclasses.dataclass(frozen=True, kw_only=True)(Forgotten)(q=4).q == 4


def test_a_subclass_that_adds_no_hyper_parameter_needs_no_decorator():
    class Renamed(mt.LoRA):
        name = "renamed"

    assert Renamed(r=3).r == 3


def test_an_unknown_kind_of_site_is_told_the_kinds(tiny):
    with pytest.raises(mt.ConfigError, match=r"no site is of kind 'layer'\. Did you mean 'layers'\? There are: emb"):
        tiny.find_sites("layer")
