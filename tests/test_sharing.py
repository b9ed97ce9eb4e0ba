"""Rows of one text share the layers below what their adapters touch, and each is as if alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multitune as mt
from multitune import Plan
from multitune.inputs import Batch
from multitune.sharing import WORTH, find_cut, first_touched, first_trained

TEXTS = ["good film", "not the very bad film", "x"]


@pytest.fixture
def passes(monkeypatch):
    """`passes(backbone)`: a list that fills with the rows of every layer that really runs, by layer."""

    def watch(backbone):
        found = [0] * backbone.num_layers
        for s in (s for s in backbone.sites if s.kind == "attention"):
            module = backbone.model.get_submodule(s.module)

            def count(module, args, kwargs, layer=s.layer):
                found[layer] += len(args[0] if args else kwargs["hidden_states"])

            module.register_forward_pre_hook(count, with_kwargs=True)
        return found

    return watch


def test_a_pass_cut_in_two_is_the_whole_pass(backbone, delta_set, random_rows, close):
    rows = random_rows(backbone, [5, 9, 3, 9])
    ids, mask = rows.padded()
    upper = backbone.num_layers - 1
    sets = [delta_set(backbone, mt.LoRA(layers=(upper,)), seed) for seed in (0, 1)]
    assert {first_touched(s, backbone) for s in sets} == {upper}
    plan, batch = Plan([sets[1], None, sets[0], sets[1]]), Batch(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        whole = backbone.run(plan, ids, mask)
        states = backbone.run_below(Plan([None] * 4), upper, batch)
        cut = backbone.run_above(plan, upper, states, batch)
    close(cut[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("layer", [0, 3])
def test_a_cut_that_is_none_is_refused(layer, bert, random_rows):
    ids, _ = random_rows(bert, [4]).padded()
    with pytest.raises(mt.PlanError, match=f"cannot be cut at layer {layer} of 3; cut between layer 1 and 2"):
        bert.run_below(Plan([None]), layer, Batch(input_ids=ids))


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (mt.HeadOnly(), 3),
        (mt.LoRA(layers=(1, 2)), 1),
        (mt.IA3(layers=(2,)), 2),
        (mt.BitFit(layers=(2,)), 2),
        (mt.Pfeiffer(layers=(1,)), 1),
        (mt.LoRA(), 0),
        (mt.LoRA(targets=("embedding", "query"), layers=(2,)), 0),
        (mt.PTuningV2(length=3, layers=(2,)), 2),
        (mt.PromptTuning(length=2), 0),
        (mt.AoTFC(r=2), 0),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_first_touched_layer_is_the_lowest_with_a_delta(method, layer, bert, delta_set):
    assert first_touched(delta_set(bert, method), bert) == layer


def test_a_norm_behind_the_last_layer_leaves_the_layers_below_alone(make_backbone, delta_set):
    gpt2 = make_backbone("gpt2")
    assert first_touched(delta_set(gpt2, mt.LayerNormTuning()), gpt2) == 0
    final = mt.DeltaSet({k: v for k, v in delta_set(gpt2, mt.LayerNormTuning()).by_site.items() if "layer." not in k})
    assert list(final.by_site) == ["final_norm"] and first_touched(final, gpt2) == 1
    assert first_trained([n for n, _ in gpt2.model.named_parameters() if n.startswith("ln_f")], gpt2) == 1


def test_the_first_trained_layer_is_the_lowest_with_a_weight(bert, make_backbone):
    def lowest(method, backbone=bert):
        return first_trained(method.init(backbone, torch.Generator()), backbone)

    assert lowest(mt.Freeze(first=1, last=1)) == 1
    assert lowest(mt.TopLayers(count=1)) == 2
    assert lowest(mt.FullFineTuning()) == 0
    assert lowest(mt.HeadOnly()) == 3
    assert lowest(mt.TopLayers(count=1), make_backbone("albert")) == 5, "and 7, the same module"


def _saved(rows, bare, texts, layer):
    """Passes through layers that sharing spares: all but one of the bare rows of a text, below the cut."""
    together = [t for t, b in zip(texts, bare, strict=True) if b]
    return layer * (len(together) - len(set(together)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_cut_is_the_one_that_saves_most(rows):
    texts, touched = zip(*rows, strict=True)
    savings = {c: _saved(rows, [t >= c for t in touched], texts, c) for c in range(1, 7)}
    best = max(savings.values())
    cut = find_cut(texts, touched, 6)
    if cut is None:
        assert best < max(1, WORTH * 6 * len(rows))
        return
    assert savings[cut.layer] == best >= max(1, WORTH * 6 * len(rows))
    for i, place in enumerate(cut.expand):
        stands_in = cut.rows[place]
        assert texts[stands_in] == texts[i]
        assert stands_in == i or (touched[i] >= cut.layer and touched[stands_in] >= cut.layer and cut.bare[place])


@pytest.fixture(scope="module")
def mixed_bank(random_adapter):
    """`mixed_bank(backbone)`: adapters that begin in every layer, at none, and in front of all."""

    def make(backbone):
        top = backbone.num_layers - 1
        methods = [mt.HeadOnly(), mt.LoRA(layers=(top,)), mt.Pfeiffer(layers=(top,)), mt.LoRA(), mt.AoTFC(r=2)]
        bank = mt.Bank(backbone)
        for i, method in enumerate(methods):
            for pooling in ("cls", "mean"):
                bank.add(f"{method.name}-{i}-{pooling}", random_adapter(backbone, method, i, pooling=pooling))
        return bank

    return make


def test_rows_of_one_text_are_each_as_if_alone(backbone, mixed_bank, close):
    bank = mixed_bank(backbone)
    rows = [(name, text) for text in TEXTS for name in (*bank.names, None, None)]
    alone = [bank.predict([row])[0] for row in rows]
    for together, single in zip(bank.predict(rows, batch_size=20), alone, strict=True):
        close(*((p.embedding if p.logits is None else p.logits) for p in (together, single)))


def test_prompts_beside_shared_rows_change_nothing(make_backbone, mixed_bank, random_adapter, close):
    backbone = make_backbone("roberta")
    bank = mixed_bank(backbone)
    bank.add("prompt", random_adapter(backbone, mt.PromptTuning(length=3), 9))
    bank.add("prefix", random_adapter(backbone, mt.PrefixTuning(length=3), 9))
    rows = [(name, text) for text in TEXTS for name in bank.names]
    for together, row in zip(bank.predict(rows, batch_size=64), rows, strict=True):
        close(together.logits, bank.predict([row])[0].logits)


def test_layers_below_the_cut_run_once_for_a_text(make_backbone, random_adapter, passes):
    backbone = make_backbone("bert")
    bank, seen = mt.Bank(backbone), passes(backbone)
    for i in range(4):
        bank.add(f"top{i}", random_adapter(backbone, mt.LoRA(layers=(2,)), i))
        bank.add(f"head{i}", random_adapter(backbone, mt.HeadOnly(), i))
    bank.predict([(name, TEXTS[0]) for name in bank.names])
    assert seen == [1, 1, 8]
    seen[:] = [0] * 3
    bank.predict([(f"head{i}", text) for text in TEXTS for i in range(4)])
    assert seen == [3, 3, 3]


def test_an_adapter_served_without_its_lower_layers_shares_them(make_backbone, random_adapter, passes, close):
    backbone = make_backbone("bert")
    bank, seen = mt.Bank(backbone), passes(backbone)
    for i in range(3):
        bank.add(f"m{i}", random_adapter(backbone, mt.Pfeiffer(), i), drop_layers=(0, 1))
    found = bank.predict([(f"m{i}", TEXTS[1]) for i in range(3)])
    assert seen == [1, 1, 3]
    close(found[2].logits, bank.predict([("m2", TEXTS[1])])[0].logits)


def test_lsg_rows_share_too(make_backbone, random_adapter, close):
    backbone = mt.convert_to_lsg(make_backbone("bert"), block=4, sparse=2, sparsity=2, num_global=1)
    bank = mt.Bank(backbone)
    for i in range(3):
        bank.add(f"m{i}", random_adapter(backbone, mt.LoRA(layers=(2,)), i))
    rows = [(f"m{i}", text) for text in TEXTS for i in range(3)]
    for together, row in zip(bank.predict(rows), rows, strict=True):
        close(together.logits, bank.predict([row])[0].logits)
