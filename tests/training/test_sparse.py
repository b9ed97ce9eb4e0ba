"""Sparse updates in training: which entries are chosen, and that training them is training the weight there."""

import copy

import pytest
import torch

from multitune import DSEE, SIFT, BitFit, Combined, Head, LoRA
from multitune.merging import merge_deltas
from multitune.plan import DeltaSet, Plan
from multitune.training.data import BatchOrder, Collator, TaskRows
from multitune.training.gradients import BatchGradients
from multitune.training.model import TuningModel

LINEARS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")


@pytest.fixture
def model(tiny, make_data):
    head = Head.for_task(make_data().task)
    tensors = head.init(tiny, torch.Generator().manual_seed(1))
    method = SIFT(density=0.05, targets=LINEARS)
    return TuningModel(tiny, method, method.init(tiny, torch.Generator().manual_seed(0)), head, tensors)


@pytest.fixture
def batches(tiny, make_data):
    rows = TaskRows(tiny, make_data().task, make_data().train, max_length=128, split="train")
    order = BatchOrder([len(i) for i in rows.items], 8, accumulation=1, seed=0, grouped=True)
    collate = Collator("classification", tiny.pad_id)
    return [collate([rows[i] for i in picked]) for picked in order]


def dense_gradients(model, batches):
    """The gradients of every weight, by autograd on a copy of the backbone without any delta."""
    copied = model.backbone.clone()
    copied.model.requires_grad_(True)
    for batch in batches:
        hidden = copied.run(Plan([None] * len(batch["input_ids"])), batch["input_ids"], batch.get("attention_mask"))
        weight, bias = model.head_params
        logits = hidden[:, 0] @ weight.detach().T + bias.detach()
        torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum").backward()
    return {s.name: copied.model.get_submodule(s.module).weight.grad for s in copied.find_sites("linear")}


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_frozen_weights_are_those_of_a_dense_copy(model, batches, count):
    expected, found = dense_gradients(model, batches[:count]), {}
    state = torch.get_rng_state()
    gradients = BatchGradients(model, lambda n: batches[:n])
    gradients(model.backbone.find_sites("linear"), count, lambda site, g: found.update({site.name: g.clone()}))
    assert torch.equal(state, torch.get_rng_state())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 1e-4
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_parts_of_a_transposed_weight(make_backbone, make_data, batches):
    gpt2 = make_backbone("gpt2")
    head = Head.for_task(make_data().task, pooling="last")
    method = SIFT(density=0.05, targets=LINEARS)
    tensors = head.init(gpt2, torch.Generator().manual_seed(1))
    model = TuningModel(gpt2, method, method.init(gpt2, torch.Generator().manual_seed(0)), head, tensors)
    copied, found = gpt2.clone(), {}
    copied.model.requires_grad_(True)
    dense = TuningModel(copied, method, method.init(gpt2, torch.Generator().manual_seed(0)), head, tensors)
    dense.eval()
    (dense(**batches[0])["loss"] * len(batches[0]["targets"])).backward()
    gradients = BatchGradients(model, lambda n: batches[:n])
    gradients(gpt2.find_sites("linear"), 1, lambda site, g: found.update({site.name: g.clone()}))
    fused = copied.model.h[0].attn.c_attn.weight.grad  # [I, 3 O]
    for i, role in enumerate(("query", "key", "value")):
        torch.testing.assert_close(found[f"layer.0.{role}"], fused[:, 32 * i : 32 * i + 32].T)
    torch.testing.assert_close(found["layer.1.ffn_in"], copied.model.h[1].mlp.c_fc.weight.grad.T)
    assert all(g.abs().max() > 1e-6 for g in found.values())


def test_one_gradient_exists_at_a_time(model, batches):
    weights = [model.backbone.model.get_submodule(s.module).weight for s in model.backbone.find_sites("linear")]
    alive = []

    def look(site, gradient):
        alive.append(sum(w.grad is not None for w in weights))

    BatchGradients(model, lambda n: batches[:n])(model.backbone.find_sites("linear"), 1, look)
    assert alive == [0] * len(weights)  # the one handed out is taken off its weight already


def test_sift_keeps_the_entries_with_the_largest_gradients(tiny, model, batches, make_data, quick):
    expected = dense_gradients(model, batches[:1])
    result = quick(tiny, make_data(), model.method, max_steps=1, head_dropout=0.0)
    counts = model.method.counts(tiny)
    for site, gradient in expected.items():
        # The run has a fresh head of its own, so the gradients are computed again with that.
        places = result.adapter.params[f"{site}.indices"]
        assert len(places) == counts[site] and places.dtype == torch.int32
        assert (places[1:] > places[:-1]).all() and places[-1] < gradient.numel()
    head = [p.clone() for p in model.head_params]
    fresh = Head.for_task(make_data().task).init(tiny, torch.Generator().manual_seed(2**32))
    with torch.no_grad():
        for own, t in zip(model.head_params, (fresh["weight"], fresh["bias"]), strict=True):
            own.copy_(t)
    assert not torch.equal(head[0], model.head_params[0])
    for site, gradient in dense_gradients(model, batches[:1]).items():
        flat = gradient.abs().flatten()
        kept = torch.zeros(len(flat), dtype=torch.bool)
        kept[result.adapter.params[f"{site}.indices"].long()] = True
        assert flat[kept].min() >= flat[~kept].max() * (1 - 1e-4)


def test_training_the_values_is_training_the_weight_where_they_are(make_backbone, batches, random_params, make_data):
    """AdamW on values against AdamW on dense weights whose other gradients are zero: the same weights after each step,
    with nothing late and nothing lost."""
    tiny = make_backbone("bert").clone()
    method = SIFT(density=0.05, targets=LINEARS)
    head = Head.for_task(make_data().task, dropout=0.0)
    tensors = head.init(tiny, torch.Generator().manual_seed(1))
    model = TuningModel(tiny, method, method.init(tiny, torch.Generator().manual_seed(0)), head, tensors)
    dense = tiny.clone()
    weights = {s.name: dense.model.get_submodule(s.module).weight for s in dense.find_sites("linear")}
    for weight in weights.values():
        weight.requires_grad_(True)
    masks = {}
    for site, weight in weights.items():
        masks[site] = torch.zeros(weight.numel())
        masks[site][model.own()[f"{site}.indices"].long()] = 1
    own_head = copy.deepcopy(model.head_params)
    settings = dict(lr=1e-2, weight_decay=0.0)
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    theirs = torch.optim.AdamW([*weights.values(), *own_head], **settings)
    for batch in batches * 2:
        ours.zero_grad()
        theirs.zero_grad()
        model(**batch)["loss"].backward()
        hidden = dense.run(Plan([None] * len(batch["targets"])), batch["input_ids"], batch.get("attention_mask"))
        loss = torch.nn.functional.cross_entropy(hidden[:, 0] @ own_head[0].T + own_head[1], batch["targets"])
        loss.backward()
        for site, weight in weights.items():
            weight.grad.mul_(masks[site].view_as(weight))
        ours.step()
        theirs.step()
        merged = merge_deltas(tiny, DeltaSet(method.deltas({k: p.detach() for k, p in model.own().items()}, tiny)))
        for site in tiny.find_sites("linear"):
            after = merged.model.get_submodule(site.module).weight
            torch.testing.assert_close(after, weights[site.name].detach(), rtol=1e-3, atol=1e-4)
            assert not torch.equal(after, tiny.model.get_submodule(site.module).weight)


def test_only_the_values_have_gradients_and_optimizer_state(model, batches):
    model(**batches[0])["loss"].backward()
    sizes = {name: None if p.grad is None else p.grad.numel() for name, p in model.own().items()}
    assert all((size is None) == name.endswith(".indices") for name, size in sizes.items())
    total = sum(s.in_features * s.out_features for s in model.backbone.find_sites("linear"))
    assert 0.04 * total < sum(size for size in sizes.values() if size) == model.num_trained <= 0.05 * total


def test_a_method_without_the_wish_gets_no_gradients(tiny, make_data, quick, monkeypatch):
    def refuse(*args):
        raise AssertionError("computed for nothing")

    monkeypatch.setattr(BatchGradients, "__call__", refuse)
    quick(tiny, make_data(), LoRA())
    with pytest.raises(AssertionError, match="for nothing"):
        quick(tiny, make_data(), SIFT())


def test_several_batches_choose_other_entries_than_one(tiny, make_data, quick):
    one, all_of_them, more = (quick(tiny, make_data(), SIFT(density=0.1, batches=n)).adapter.params for n in (1, 3, 99))
    name = "layer.0.query.indices"
    assert not torch.equal(one[name], all_of_them[name])
    assert torch.equal(all_of_them[name], more[name])  # at most one pass over the rows


def test_sift_chooses_the_same_entries_beside_another_method(tiny, make_data, quick):
    alone = quick(tiny, make_data(), SIFT(), max_steps=1).adapter.params
    both = quick(tiny, make_data(), Combined(methods=(BitFit(), SIFT())), max_steps=1).adapter.params
    indices = {k: t for k, t in alone.items() if k.endswith(".indices")}
    assert indices and all(torch.equal(both[f"sift.{k}"], t) for k, t in indices.items())


def test_a_finished_run_of_dsee_has_its_heads_shut(tiny, make_data, quick, tmp_path):
    method = DSEE(pruned_heads=0.5, prune_at=0.75)
    settings = dict(max_steps=8, learning_rate=0.3, evaluations_per_epoch=3)  # so that early steps may well score best
    params = quick(tiny, make_data(), method, tmp_path / "out", **settings).adapter.params
    heads = [t for k, t in params.items() if k.endswith(".heads")]
    assert len(heads) == 3 and all(sorted(t.tolist()) == [0.0, 0.0, 1.0, 1.0] for t in heads)
