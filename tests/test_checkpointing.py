"""Layers recomputed in the backward pass give the same loss and the same gradients, bit for bit, for every delta."""

import pytest
import torch

from multitune import (
    DSEE,
    IA3,
    AoTFC,
    AoTKronecker,
    BitFit,
    DeltaSet,
    DoRA,
    Houlsby,
    LayerNormTuning,
    LoRA,
    ParallelAdapter,
    Plan,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    SoTU,
    VeRA,
)
from multitune.deltas import ORDER

METHODS = {
    "low rank": LoRA(r=2, targets=("query", "ffn_in")),
    "low rank with dropout": LoRA(r=2, dropout=0.5),
    "words": LoRA(r=2, targets=("embedding",)),
    "shared low rank": VeRA(r=4),
    "three deltas": DoRA(r=2),
    "sparse": SoTU(density=0.1),
    "heads": DSEE(r=1, num_sparse=4, pruned_heads=0.5),
    "scale": IA3(),
    "bias": BitFit(),
    "norm": LayerNormTuning(),
    "token bias": AoTFC(r=2, dropout=0.2),
    "kronecker": AoTKronecker(r=2),
    "memory": PTuningV2(length=2),
    "memory of a network": PrefixTuning(length=2, hidden=3),
    "prompt": PromptTuning(length=2),
    "serial": Houlsby(bottleneck=3),
    "parallel": ParallelAdapter(bottleneck=3),
}


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama"])
def both(request, make_backbone):
    """A backbone with dropout."""
    rate = {"gpt2": "resid_pdrop", "llama": "attention_dropout"}.get(request.param, "hidden_dropout_prob")
    return make_backbone(request.param, **{rate: 0.1})


def gradients(backbone, names, random_params, rows, checkpointing):
    methods = [METHODS[name] for name in names]
    params = [random_params(backbone, m, i, 0.1) for i, m in enumerate(methods)]
    for method, of_method in zip(methods, params, strict=True):
        for name, t in of_method.items():
            t.requires_grad_(method.trains(name) and t.is_floating_point())
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    backbone.model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plan = Plan([DeltaSet(m.deltas(p, backbone)) for m, p in zip(methods, params, strict=True)])
            loss = backbone.run(plan, *rows.padded()).square().mean()
            loss.backward()
    finally:
        backbone.model.eval()
        backbone.disable_gradient_checkpointing()
    return loss, [t.grad for p in params for t in p.values() if t.requires_grad]


def check(backbone, names, random_params, rows):
    loss, plain = gradients(backbone, names, random_params, rows, False)
    again, recomputed = gradients(backbone, names, random_params, rows, True)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    return plain


@pytest.mark.parametrize("name", METHODS)
def test_one_method(name, both, random_params, random_rows):
    found = check(both, [name, name], random_params, random_rows(both, (6, 4)))
    assert all(float(g.abs().sum()) > 0 for g in found)


def test_all_of_them_in_one_batch(both, random_params, random_rows):
    names = list(METHODS)
    check(both, names, random_params, random_rows(both, [3 + i % 5 for i in range(len(names))]))


def test_every_kind_of_delta_is_among_them(both, random_params):
    kinds = set()
    for i, method in enumerate(METHODS.values()):
        for deltas in method.deltas(random_params(both, method, i), both).values():
            kinds |= {type(d) for d in deltas}
    assert kinds == set(ORDER)
