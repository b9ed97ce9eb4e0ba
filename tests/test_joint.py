"""Several calls in one forward pass: hidden states and gradients of each are those of its own pass, masks included."""

import pytest
import torch

from multitune import DeltaSet, MultituneError, Plan, make_method
from multitune.joint import JointBatch
from multitune.training.streams import RandomStream

#: Between them, every kind of delta, some with dropout of their own.
METHODS = {
    "lora": {"dropout": 0.3}, "bitfit": {}, "prompt": {"length": 3}, "ptuning_v2": {}, "aot_fc": {"dropout": 0.2},
    "houlsby": {}, "ia3": {}, "head": {}, "mam": {}, "vera": {"dropout": 0.2}, "dora": {}, "u_tuning": {}, "sift": {},
    "attn_scale": {}, "ptuning_v1": {}, "dra": {},
}  # fmt: skip


def _batches(backbone, random_params, methods=None):
    """Per method that the backbone can have: method, tensors, ids `[K, W]` and mask, of different K and W."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for i, (name, settings) in enumerate(methods or METHODS.items()):
        try:
            method = make_method(name, settings)
            params = random_params(backbone, method, seed=i, std=0.05)
        except MultituneError:
            continue
        ids = torch.randint(5, backbone.vocab_size, (2 + i % 3, 3 + i * 5 % 9), generator=draw)
        mask = None
        if i % 2:
            mask = torch.ones_like(ids)
            mask[0, -1], ids[0, -1] = 0, backbone.pad_id
        found.append((method, params, ids, mask))
    return found


def _trained(method, params):
    return {k: t.clone().requires_grad_(method.trains(k)) for k, t in params.items()}


def _backward(hidden, masks):
    """The hidden states of real tokens, after the backward pass of losses that weigh each of them differently."""
    kept = [h if m is None else h * m.unsqueeze(-1) for h, m in zip(hidden, masks, strict=True)]
    losses = [(k * torch.arange(k.numel()).view(k.shape).cos()).sum() for k in kept if k.requires_grad]
    if losses:
        torch.autograd.backward(losses)
    return [k.detach() for k in kept]


def _run(backbone, batches, change=lambda i, t: t):
    """One joint pass, and a backward pass; hidden states and trained tensors of every call."""
    joint, tensors = [], []
    for i, (method, params, ids, mask) in enumerate(batches):
        torch.manual_seed(i)
        tensors.append(_trained(method, params))
        given = {k: change(i, t) for k, t in tensors[-1].items()}
        plan = Plan([DeltaSet(method.deltas(given, backbone))] * len(ids))
        joint.append(JointBatch(plan=plan, input_ids=ids, attention_mask=mask, stream=RandomStream(backbone.device)))
    hidden = backbone.run_joint(joint)
    torch.manual_seed(99)  # what is recomputed draws from the calls' own streams too
    return _backward(hidden, [mask for *_, mask in batches]), tensors


def _check_alone(backbone, batches, close):
    found, tensors = _run(backbone, batches)
    for i, (method, params, ids, mask) in enumerate(batches):
        torch.manual_seed(i)
        own = _trained(method, params)
        plan = Plan([DeltaSet(method.deltas(own, backbone))] * len(ids))
        (expected,) = _backward([backbone.run(plan, ids, mask)], [mask])
        close(found[i], expected)
        for name, t in own.items():
            mine = tensors[i][name].grad
            assert (mine is None) == (t.grad is None), name
            if mine is not None:
                torch.testing.assert_close(mine, t.grad, rtol=1e-3, atol=1e-3 * float(t.grad.abs().max()) + 1e-4)


def test_each_call_is_as_by_itself(dropping, random_params, close):
    _check_alone(dropping, _batches(dropping, random_params), close)


#: Between them, every placement of a bottleneck.
SERIAL, SUM = ("houlsby", {"bottleneck": 4}), ("houlsby", {"bottleneck": 4, "reads": "norm"})
PARALLEL = ("parallel", {"bottleneck": 4, "sublayers": ("attention", "ffn")})


@pytest.mark.parametrize("methods", [(SERIAL, SUM), (SUM, SERIAL), (SERIAL, PARALLEL), (SERIAL, SUM, PARALLEL)])
@pytest.mark.parametrize("dropping", ["bert", "distilbert"], indirect=True)
def test_bottlenecks_of_every_placement_read_their_own(dropping, random_params, close, methods):
    _check_alone(dropping, _batches(dropping, random_params, methods), close)


@pytest.mark.parametrize("dropping", ["bert", "albert", "t5", "deberta-v2/v3"], indirect=True)
def test_recomputed_layers_draw_the_same_masks(dropping, random_params, close):
    dropping.enable_gradient_checkpointing()
    _check_alone(dropping, _batches(dropping, random_params)[:5], close)


def test_nothing_of_one_call_reaches_another(dropping, random_params):
    """NaN in every tensor and gradient of one call leaves every bit of the others."""
    batches = _batches(dropping, random_params)[::2]
    clean, grads = _run(dropping, batches)
    poisoned, poisoned_grads = _run(dropping, batches, lambda i, t: t if i else t * torch.nan)
    assert bool(poisoned[0].isnan().any())
    for i in range(1, len(batches)):
        assert torch.equal(clean[i], poisoned[i]), batches[i][0].name
        for name, t in grads[i].items():
            other = poisoned_grads[i][name].grad
            assert t.grad is None if other is None else torch.equal(t.grad, other), (batches[i][0].name, name)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "mistral"])
def test_rows_of_several_texts_stand_beside_rows_of_one(name, make_backbone, random_params, close):
    """Packed and not, with a prompt and a memory beside them, padded and not, of different widths."""
    backbone = make_backbone(name)
    draw = torch.Generator().manual_seed(5)
    calls = [
        ("lora", {}, [[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]], 9),
        ("prompt", {"length": 3}, None, 6),
        ("ptuning_v2", {"length": 2}, [[0, 0, 1, 1, 1, 1, 1]], 5),
        ("bitfit", {}, None, 11),
    ]
    joint = []
    for i, (method, settings, pieces, real) in enumerate(calls):
        made = make_method(method, settings)
        deltas = DeltaSet(made.deltas(random_params(backbone, made, seed=i, std=0.05), backbone))
        shape = (2, real) if pieces is None else (len(pieces), len(pieces[0]))
        mask = torch.ones(shape, dtype=torch.long)
        mask[:, real:] = 0
        joint.append(
            JointBatch(
                plan=Plan([deltas] * shape[0]),
                input_ids=torch.randint(5, backbone.vocab_size, shape, generator=draw),
                attention_mask=mask if real < shape[1] else None,
                pieces=None if pieces is None else torch.tensor(pieces),
            )
        )
    with torch.no_grad():
        for own, found in zip(joint, backbone.run_joint(joint), strict=True):
            alone = backbone.run(own.plan, own.input_ids, own.attention_mask, pieces=own.pieces)
            real = torch.ones_like(own.input_ids) if own.attention_mask is None else own.attention_mask
            close(found[real > 0], alone[real > 0])
            if own.pieces is not None:  # or there is nothing to keep apart
                assert not torch.allclose(alone, backbone.run(own.plan, own.input_ids, own.attention_mask), atol=1e-3)


def test_masks_come_from_the_stream_and_not_from_the_company(make_backbone):
    backbone = make_backbone("bert", hidden_dropout_prob=0.3)
    backbone.model.train()
    ids = torch.full((2, 4), 7)

    def run(*seeds):
        joint = []
        for seed in seeds:
            torch.manual_seed(seed)
            joint.append(JointBatch(plan=Plan([None] * 2), input_ids=ids, stream=RandomStream(backbone.device)))
        return backbone.run_joint(joint)

    first, second, same = run(1, 2, 1)
    assert torch.equal(first, same) and not torch.equal(first, second)
    assert torch.equal(run(2, 1)[1], first)
