"""Several methods in one adapter: each part is what it is alone, and what cannot be together is refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import multitune as mt
from multitune.methods import registry
from multitune.training.model import TuningModel

PAIR = mt.Combined(methods=(mt.LoRA(r=2, targets=("query",)), mt.BitFit(subset=("key",))))


def run(backbone, sets, rows):
    with torch.no_grad():
        return backbone.run(mt.Plan(sets), *rows.padded())


# ---- what it is


def test_it_is_named_after_its_parts():
    assert (PAIR.name, PAIR.title) == ("lora+bitfit", "LoRA + BitFit")
    assert "2106.09685" in PAIR.paper and "2106.10199" in PAIR.paper
    assert PAIR.identity_at_init and not PAIR.fuses_to_table and not PAIR.changes_weights
    assert not mt.Combined(methods=(mt.LoRA(), mt.PromptTuning())).identity_at_init
    assert mt.Combined(methods=(mt.LoRA(), mt.AoTFC())).fuses_to_table


def test_its_tensors_are_those_of_its_parts_under_their_names(bert):
    fresh = PAIR.init(bert, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    expected = {f"{m.name}.{k}": t for m in PAIR.methods for k, t in m.init(bert, generator).items()}
    assert list(fresh) == list(expected)
    assert all(torch.equal(t, expected[k]) for k, t in fresh.items())
    assert "lora.layer.0.query.A" in fresh and "bitfit.layer.2.key.b" in fresh
    assert PAIR.num_parameters(bert) == sum(m.num_parameters(bert) for m in PAIR.methods)


def test_a_method_that_occurs_twice_is_numbered(bert):
    twice = mt.Combined(methods=(mt.LoRA(r=2), mt.LoRA(r=3), mt.DRA()))
    assert list(twice.parts) == ["lora", "lora2", "dra"]
    shapes = {k: t.shape for k, t in twice.init(bert, torch.Generator()).items()}
    assert shapes["lora.layer.0.query.A"][1] == 2 and shapes["lora2.layer.0.query.A"][1] == 3


@pytest.mark.parametrize(
    "parts",
    [
        (mt.PrefixTuning(start_text="good film", length=2), mt.VeRA(r=4)),
        (mt.AdaLoRA(), mt.LayerNormTuning()),
        (mt.PTuningV1(), mt.AoTFC(r=2), mt.LoRA(r=2)),
    ],
    ids=lambda parts: "+".join(m.name for m in parts),
)
def test_shapes_are_those_of_what_is_made(bert, parts):
    """Parts may know their shapes without making the tensors; files are checked against them."""
    combined = mt.Combined(methods=parts)
    fresh = combined.init(bert, torch.Generator().manual_seed(0))
    assert combined.shapes(bert) == {name: t.shape for name, t in fresh.items()}


def test_combined_parts_count_as_theirs():
    assert mt.Combined(methods=(PAIR, mt.IA3())) == mt.Combined(methods=(*PAIR.methods, mt.IA3()))


# ---- what it does


def test_two_updates_of_one_map_add_up(bert, random_params, random_rows, close):
    """Rank 2 and rank 3 at the same site are one update of rank 5, made by hand."""
    parts = (mt.LoRA(r=2, alpha=2), mt.LoRA(r=3, alpha=3))
    twice = mt.Combined(methods=parts)
    params = random_params(bert, twice, 1)
    joined = {}
    for site in bert.find_sites("linear", ("query", "value")):
        for key, dim in (("A", 1), ("B", 0)):
            joined[f"{site.name}.{key}"] = torch.cat([params[f"{p}.{site.name}.{key}"] for p in ("lora", "lora2")], dim)
    rows = random_rows(bert, [5, 3, 4])
    both = mt.DeltaSet(twice.deltas(params, bert))
    one = mt.DeltaSet(mt.LoRA(r=5, alpha=5).deltas(joined, bert))
    for sets, theirs in (([both] * 3, [one] * 3), ([both, None, both], [one, None, one])):
        close(run(bert, sets, rows)[0], run(bert, theirs, rows)[0])


def test_a_part_at_its_start_leaves_the_other_alone(bert, random_params, random_rows, close):
    pair = mt.Combined(methods=(mt.LoRA(r=2), mt.Houlsby(bottleneck=4)))
    rows = random_rows(bert, [5, 3])
    for kept in pair.parts:
        params = pair.init(bert, torch.Generator().manual_seed(0))
        moved = random_params(bert, pair.parts[kept], 1)
        params |= {f"{kept}.{k}": t for k, t in moved.items()}
        alone = mt.DeltaSet(pair.parts[kept].deltas(moved, bert))
        together = mt.DeltaSet(pair.deltas(params, bert))
        close(run(bert, [together, None], rows), run(bert, [alone, None], rows))


def test_it_merges_if_all_parts_merge(bert, random_adapter, tmp_path):
    good = mt.Combined(methods=(mt.LoRA(r=2), mt.IA3(), mt.BitFit(), mt.DRA(), mt.AttnScale()))
    report = mt.merge(random_adapter(bert, good, 1), bert, tmp_path / "merged")
    assert report.max_difference < 1e-4 * report.max_magnitude
    assert report.num_deltas == sum(
        len(of_site) for m in good.methods for of_site in m.deltas(m.init(bert, torch.Generator()), bert).values()
    )
    bad = mt.Combined(methods=(mt.LoRA(r=2), mt.Houlsby(bottleneck=2)))
    with pytest.raises(
        mt.AdapterError, match=r"LoRA \+ Houlsby adapter\) cannot be merged: its Bottleneck at layer\.0"
    ):
        mt.merge(random_adapter(bert, bad, 1), bert, tmp_path / "bad")


def test_a_table_of_tokens_serves_beside_the_other_part(bert, random_adapter, tmp_path, close):
    """Fused, the table replaces the factors, and only those."""
    method = mt.Combined(methods=(mt.LoRA(r=2), mt.AoTFC(r=2)))
    random_adapter(bert, method, 1).save(tmp_path / "a").fuse(bert)
    answers = {}
    for store in ("factors", "ram", "mmap"):
        bank = mt.Bank(bert, aot_store=store)
        bank.add("a", tmp_path / "a")
        answers[store] = bank.predict([("a", "good film"), (None, "x")])[0].logits
    close(answers["ram"], answers["factors"])
    close(answers["mmap"], answers["factors"])


# ---- training


@pytest.fixture
def odd_method():
    """A method with a tensor that is not trained, a rate of its own, a step of its own, and a smaller finished form."""

    @registry.register
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(mt.DRA):
        """DRA that trains half of its offset; finished, it is DRA."""

        name = "odd"
        title = "Odd"
        recipe = mt.Recipe(learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0.5, source="test")

        def init(self, backbone, generator):
            own = super().init(backbone, generator)
            return own | {"half": torch.full((1,), 0.5), "steps": torch.zeros(1)}

        def trains(self, name):
            return name not in ("half", "steps")

        def learning_rate_factor(self, name):
            return 3.0 if name.startswith("layer.0") else 1.0

        def after_step(self, params, step, num_steps):
            assert params["layer.0.ffn_out.b"].grad is not None
            params["steps"].fill_(step)

        def deltas(self, params, backbone):
            own = {k: t * params["half"] for k, t in params.items() if k not in ("half", "steps")}
            return super().deltas(own, backbone)

        def finish(self, params, backbone):
            own = {k: t * params["half"] for k, t in params.items() if k not in ("half", "steps")}
            return mt.DRA(targets=self.targets, layers=self.layers), own

    yield Odd
    registry._METHODS.pop("odd")


def test_what_parts_do_in_training_is_done_for_each(odd_method, bert, random_params):
    method = mt.Combined(methods=(odd_method(), mt.LoRA(r=2), odd_method(layers=(1,))))
    assert list(method.parts) == ["odd", "lora", "odd2"]
    assert method.trains("odd.layer.0.ffn_out.b") and not method.trains("odd2.half")
    assert (method.recipe.learning_rate, method.recipe.weight_decay, method.recipe.warmup_ratio) == (3e-3, 0.0, 0.5)
    for name, rate in (
        ("odd.layer.1.ffn_out.b", 1e-2),
        ("odd.layer.0.ffn_out.b", 3e-2),
        ("lora.layer.0.query.A", 3e-3),
    ):
        assert method.learning_rate_factor(name) * method.recipe.learning_rate == pytest.approx(rate)
    params = random_params(bert, method, 1)
    finished, tensors = method.finish(params, bert)
    assert finished.name == "dra+lora+dra" and set(tensors) == set(finished.init(bert, torch.Generator()))
    for before, after in ((method, params), (finished, tensors)):
        made = before.deltas(after, bert)["layer.1.ffn_out"]
        assert torch.allclose(sum(d.b for d in made), sum(d.b for d in method.deltas(params, bert)["layer.1.ffn_out"]))


def test_a_run_trains_every_part_with_its_own_rate(odd_method, make_backbone, tasks, tmp_path):
    backbone = make_backbone("bert")
    data = mt.tasks.TaskData(
        task=tasks["classification"],
        train=[{"text": "good film", "y": "good"}, {"text": "bad film", "y": "bad"}] * 4,
        validation=[{"text": "good", "y": "good"}],
        test=None,
    )
    method = mt.Combined(methods=(odd_method(), mt.LoRA(r=2)))
    result = mt.train(backbone, data, method, tmp_path / "a", max_steps=1, warmup_ratio=0.0, progress=False)
    assert result.adapter.method == mt.Combined(methods=(mt.DRA(), mt.LoRA(r=2)))
    start = method.init(backbone, torch.Generator().manual_seed(0))
    # AdamW's first step moves every entry by its learning rate; the finished offset is half of what was trained.
    for name, rate in (("dra.layer.0.ffn_out.b", 0.5 * 3e-2), ("dra.layer.1.ffn_out.b", 0.5 * 1e-2)):
        assert result.adapter.params[name].abs().median() == pytest.approx(rate, rel=1e-3)
    moved = (result.adapter.params["lora.layer.0.query.B"] - start["lora.layer.0.query.B"]).abs()
    assert moved.median() == pytest.approx(3e-3, rel=1e-3)
    loaded = mt.Adapter.load(tmp_path / "a", backbone)
    assert loaded.method == result.adapter.method
    assert loaded.num_method_parameters == sum(t.numel() for t in loaded.params.values())
    assert mt.evaluate(backbone, loaded, data) == {"accuracy": result.adapter.metrics["accuracy"]}


def test_after_step_reaches_its_own_part(odd_method, bert):
    method = mt.Combined(methods=(mt.LoRA(r=2), odd_method()))
    task = mt.Task(name="t", kind="regression", template=("{a}",), label="y")
    head = mt.Head.for_task(task)
    params = method.init(bert, torch.Generator())
    model = TuningModel(bert, method, params, head, head.init(bert, torch.Generator()))
    for p in model.params:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with torch.no_grad():
        method.after_step(model.own(), 7, 9)
    assert float(model.own()["odd.steps"]) == 7


# ---- names and settings


@pytest.mark.parametrize(
    "method",
    [
        PAIR,
        mt.Combined(methods=(mt.LoRA(r=3, layers=(0, 2)), mt.LoRA(targets=("ffn_in",)), mt.HeadOnly())),
        mt.Combined(methods=(mt.IA3(), mt.UTuning(tuner="prefix", width=2))),
    ],
    ids=lambda m: m.name,
)
def test_settings_round_trip(method, bert, random_adapter, tmp_path):
    text = json.dumps(method.settings())
    for again in (
        mt.Combined.from_settings(json.loads(text)),
        mt.make_method(method.name, json.loads(text)),
    ):
        assert again == method and again.name == method.name and json.dumps(again.settings()) == text
    random_adapter(bert, method, 1).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter.json").read_text("utf-8"))["method"]
    assert config == {"name": method.name, "settings": json.loads(text)}
    assert mt.Adapter.load(tmp_path / "a", bert).method == method


def test_a_name_and_settings_make_the_method():
    assert mt.make_method("lora", {"r": "4"}) == mt.LoRA(r=4)
    assert mt.make_method("lora+bitfit") == mt.Combined(methods=(mt.LoRA(), mt.BitFit()))
    wanted = mt.Combined(methods=(mt.LoRA(r=4, targets=("key",)), mt.LoRA(r=2), mt.BitFit()))
    flat = {"lora.r": "4", "lora.targets": "key", "lora2.r": 2}
    assert mt.make_method("lora+lora+bitfit", flat) == wanted
    assert mt.make_method("lora+lora+bitfit", {"lora": {"r": 4, "targets": "key"}, "lora2.r": 2}) == wanted


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mt.Combined(methods=(mt.LoRA(),)), r"at least two, not 1; give for example \(LoRA\(\), BitFit\(\)\)"),
        (
            lambda: mt.Combined(methods=(mt.LoRA(), mt.FullFineTuning(), mt.IA3())),
            "method 'full' changes the backbone's own weights and cannot be combined with 'lora', 'ia3'; train one",
        ),
        (lambda: mt.make_method("lora+bitfitt"), "no method is called 'bitfitt'. Did you mean 'bitfit'"),
        (lambda: mt.make_method("lora+bitfit", {"r": 4}), r"has no setting 'r'\. Say whose it is, such as lora\.r\."),
        (
            lambda: mt.make_method("lora+bitfit", {"lroa.r": 4}),
            r"no setting 'lroa\.r'\. Did you mean 'lora'\? Its parts",
        ),
        (
            lambda: mt.make_method("lora+bitfit", {"lora.rr": 4}),
            "method 'lora' has no hyper-parameter 'rr'. Did you me",
        ),
        (lambda: mt.make_method("lora+bitfit", {"lora.r": 0}), "method 'lora': r=0 is not possible"),
        (lambda: mt.make_method("lora+ia3", {"methods": ["lora", "dra"]}), r"'lora\+ia3' has settings for lora\+dra"),
        (lambda: mt.get_method("lora+ia3"), r"several methods in one adapter, which make_method\('lora\+ia3'\)"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(mt.ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((mt.Houlsby(), mt.Pfeiffer()), r"'houlsby' and 'pfeiffer' .* both put a Bottleneck at layer\.0\.ffn_sublayer"),
        ((mt.PromptTuning(), mt.LoRA(), mt.PromptTuning()), "'prompt' and 'prompt2' .* both put a Prompt at embedding"),
        ((mt.PTuningV2(), mt.MAM()), r"'ptuning_v2' and 'mam' .* both put a Memory at layer\.0\.attention"),
        ((mt.AoTFC(), mt.AoTKronecker()), "'aot_fc' and 'aot_kronecker' .* both put a TokenBias at layers"),
    ],
)
def test_two_that_want_one_place_are_refused_by_name(parts, words, bert):
    with pytest.raises(mt.ConfigError, match=words):
        mt.Combined(methods=parts).init(bert, torch.Generator())
    mt.Combined(methods=(mt.Houlsby(layers=(0,)), mt.Pfeiffer(layers=(1,)))).init(bert, torch.Generator())
