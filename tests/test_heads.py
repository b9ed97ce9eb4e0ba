"""Heads: pooling, logits, losses and answers, each against a plain formula."""

import json
import math
from dataclasses import replace

import pytest
import torch

from multitune import ConfigError, DataError, Head, Task
from multitune.heads import IGNORED, answer, logits, loss, mixed_logits, pool, prediction


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def hidden():
    """Hidden states `[3, 5, 32]`, the mask of rows of 5, 2 and 1 tokens, and NaN where there is padding."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    return normal(3, 5, 32).masked_fill(mask.unsqueeze(-1) == 0, float("nan")), mask


# ---- settings


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [("classification", 3), ("regression", 1), ("multilabel", 4), ("multiple_choice", 1), ("tagging", 3)],
)
def test_a_head_fits_its_task(bert, tasks, kind, outputs):
    head = Head.for_task(tasks[kind], pooling="mean", dropout=0.2)
    assert (head.kind, head.num_outputs, head.pooling, head.dropout) == (kind, outputs, "mean", 0.2)
    assert Head(**json.loads(json.dumps(head.settings()))) == head
    tensors = head.init(bert, torch.Generator().manual_seed(0))
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {"weight": (outputs, 32), "bias": (outputs,)}
    assert 0.01 < tensors["weight"].std() < 0.03 and not tensors["bias"].any()
    assert all(t.dtype == torch.float32 for t in tensors.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "men"}, "pooling 'men' is unknown. Did you mean 'mean'. Choose cls, mean, pooler"),
        ({"dropout": 1.0}, "head dropout 1.0 is not a probability below 1"),
        ({"dropout": -0.1}, "head dropout -0.1 is not a probability"),
        ({"target_mean": 2.0}, "target_mean=2.0 .* of a head of kind classification: .* any other head takes neither"),
        ({"kind": "regression", "target_std": 0.0}, "target_std=0.0 of a head of kind regression: .* a positive one"),
        ({"kind": "regression", "target_mean": math.inf}, "target_mean=inf .*: a regression takes a finite number"),
    ],
)
def test_a_bad_head_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Head(**{"kind": "classification", "num_outputs": 2} | settings)


def test_a_pooler_that_is_not_there_is_refused(backbone):
    head = Head(kind="classification", num_outputs=2, pooling="pooler")
    if backbone.pooler is not None:
        return head.check(backbone)
    with pytest.raises(ConfigError, match=r"has no pretrained pooler; use (pooling='(cls|last)' or )?pooling='mean'$"):
        head.init(backbone, torch.Generator())
    return None


# ---- pooling


def test_pooling(bert, hidden, close):
    states, mask = hidden
    assert torch.equal(pool(bert, states, mask, "cls"), states[:, 0])
    means = torch.stack([states[0].mean(0), states[1, :2].mean(0), states[2, 0]])
    close(pool(bert, states, mask, "mean"), means)  # what stands in the padding, NaN here, does not matter
    close(pool(bert, states[:1], None, "mean"), means[:1])
    dense = bert.pooler.dense
    close(pool(bert, states, mask, "pooler"), torch.tanh(states[:, 0] @ dense.weight.T + dense.bias))


# ---- logits


def test_a_mean_in_bfloat16_counts_every_token(bert):
    states = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(0)).add(1).bfloat16()
    mask = (torch.arange(300) < 257).long()[None]  # a number that bfloat16 has not got
    exact = states[:, :257].double().mean(1)
    found = pool(bert, states, mask, "mean")
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8).all()  # the last bit, and no more


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_one_head_and_many_heads_agree(bert, hidden, close, kind, pooling):
    states, mask = hidden
    head = Head(kind=kind, num_outputs=4, pooling=pooling)
    tensors = {"weight": normal(4, 32, seed=1), "bias": normal(4, seed=2)}
    one = logits(bert, head, tensors, states, mask, training=False)
    many = mixed_logits(bert, [(head, tensors)] * 3, states, mask)
    for i, own in enumerate(many):
        torch.testing.assert_close(own, one[i], equal_nan=True)
    features = states if kind == "tagging" else pool(bert, states, mask, pooling)
    torch.testing.assert_close(one, features @ tensors["weight"].T + tensors["bias"], equal_nan=True)


def test_heads_of_other_sizes_and_rows_without_one(bert, hidden, close):
    states, mask = hidden
    small, large = Head(kind="classification", num_outputs=2), Head(kind="multilabel", num_outputs=7, pooling="mean")
    tensors = [{"weight": normal(h.num_outputs, 32, seed=3), "bias": normal(h.num_outputs)} for h in (small, large)]
    first, none, last = mixed_logits(bert, [(small, tensors[0]), None, (large, tensors[1])], states, mask)
    assert none is None
    close(first, tensors[0]["weight"] @ states[0, 0] + tensors[0]["bias"])
    close(last, tensors[1]["weight"] @ states[2, 0] + tensors[1]["bias"])
    assert mixed_logits(bert, [None], states[:1], None) == [None]


def test_a_dense_layer_stands_before_the_outputs(bert, hidden, close):
    states, mask = hidden
    functions = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "none": lambda x: x}
    own, expected = [], []
    for i, (name, function) in enumerate(functions.items()):
        head = Head(kind="classification", num_outputs=2 + i, pooling="cls", dense=name)
        tensors = {k: normal(*shape, seed=i) for k, shape in head.shapes(bert).items()}
        row = states[i % 3, 0]
        before = function(tensors["dense_weight"] @ row + tensors["dense_bias"]) if name != "none" else row
        expected.append(tensors["weight"] @ before + tensors["bias"])
        own.append((head, tensors))
        one = logits(bert, head, tensors, states[[i % 3]], mask[[i % 3]], training=False)
        close(one[0], expected[-1])
    embedding = Head(kind="embedding", num_outputs=0, pooling="mean")
    assert embedding.shapes(bert) == {}
    rows = [0, 1, 2, 0, 1]
    found = mixed_logits(bert, [*own, (embedding, {})], states[rows], mask[rows])
    for a, b in zip(found, [*expected, states[1, :2].mean(0)], strict=True):
        close(a, b)
    with pytest.raises(ConfigError, match="'tan' of the head's layer is unknown. Did you mean 'tanh'"):
        Head(kind="classification", num_outputs=2, dense="tan")


def test_what_a_dense_layer_gives_is_normalised_where_the_head_says_so(bert, hidden, close):
    states, mask = hidden
    own, expected = [], []
    for i, eps in enumerate((1e-5, 0.5, None)):
        head = Head(kind="classification", num_outputs=2, dense="gelu", norm_eps=eps)
        tensors = {k: normal(*shape, seed=i) for k, shape in head.shapes(bert).items()}
        before = torch.nn.functional.gelu(tensors["dense_weight"] @ states[i, 0] + tensors["dense_bias"])
        if eps is not None:
            before = before - before.mean()
            before = before / (before.square().mean() + eps).sqrt()
        expected.append(tensors["weight"] @ before + tensors["bias"])
        own.append((head, tensors))
        close(logits(bert, head, tensors, states[[i]], mask[[i]], training=False)[0], expected[-1])
    for a, b in zip(mixed_logits(bert, own, states[:3], mask[:3]), expected, strict=True):
        close(a, b)
    for wrong in ({"norm_eps": 1e-5}, {"norm_eps": 0.0, "dense": "gelu"}):
        with pytest.raises(ConfigError, match="is a positive number, and normalises what its layer gives"):
            Head(kind="classification", num_outputs=2, **wrong)


def test_dropout_in_training_only(bert):
    head = Head(kind="classification", num_outputs=2, dropout=0.5)
    tensors = {"weight": torch.ones(2, 32), "bias": torch.zeros(2)}
    states = torch.ones(200, 3, 32)
    torch.manual_seed(0)
    trained = logits(bert, head, tensors, states, None, training=True)
    served = logits(bert, head, tensors, states, None, training=False)
    assert (served == 32).all()
    assert trained.std() > 1
    assert abs(trained.mean() - 32) < 1.5


# ---- losses


def test_losses(close):
    values = normal(4, 3)
    targets = torch.tensor([0, 2, 1, 1])
    log_softmax = values - values.exp().sum(-1, keepdim=True).log()
    cross_entropy = -torch.stack([log_softmax[i, t] for i, t in enumerate(targets)]).mean()
    for kind in ("classification", "multiple_choice"):
        close(loss(Head(kind=kind, num_outputs=3), values, targets), cross_entropy)
    wanted = torch.tensor([1.0, -2, 0.5, 3])
    close(loss(Head(kind="regression", num_outputs=1), values[:, :1], wanted), ((values[:, 0] - wanted) ** 2).mean())
    holds = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    p = 1 / (1 + (-values).exp())
    entropy = -(holds * p.log() + (1 - holds) * (1 - p).log()).mean()
    close(loss(Head(kind="multilabel", num_outputs=3), values, holds), entropy)
    tags = torch.tensor([[0, IGNORED], [IGNORED, 2]])
    by_word = values.view(2, 2, 3)
    log_softmax = log_softmax.view(2, 2, 3)
    close(loss(Head(kind="tagging", num_outputs=3), by_word, tags), -(log_softmax[0, 0, 0] + log_softmax[1, 1, 2]) / 2)
    half = loss(Head(kind="classification", num_outputs=3), values.bfloat16(), targets)
    assert half.dtype == torch.float32


# ---- regressions of any size


def test_a_head_is_fitted_to_the_targets_of_a_regression():
    head = Head(kind="regression", num_outputs=1)
    assert head.fitted([1, 2, 3, 4]) == replace(head, target_mean=2.5, target_std=math.sqrt(1.25))
    flat = head.fitted([7.1] * 10)  # nothing is spread, and what rounding leaves of it does not count
    assert (flat.target_mean, flat.target_std) == (pytest.approx(7.1), 1.0)
    other = Head(kind="classification", num_outputs=2)
    assert other.fitted([0, 1]) is other
    assert not head.rescales and head.fitted([1, 2]).rescales


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            [1.7e9, 1.7e9 + 60, 1.7e9 + 120],
            "1700000060 on average with a standard deviation of 49: .*Take 1700000060 off",
        ),
        ([1e200, 2e200], r"up to 2e\+200 are too large for float32; divide them all by 2e\+200"),
    ],
)
def test_targets_that_float32_cannot_tell_apart_are_refused(targets, words):
    with pytest.raises(DataError, match=words):
        Head(kind="regression", num_outputs=1).fitted(targets)


def test_a_head_answers_in_float64_where_the_backbone_does(bert, hidden):
    states, mask = hidden[0].double(), hidden[1]
    head = Head(kind="regression", num_outputs=1).fitted([1990, 2010])
    tensors = {k: normal(*t.shape).double() for k, t in head.init(bert, torch.Generator()).items()}
    expected = 10 * (states[:, 0] @ tensors["weight"][0] + tensors["bias"]) + 2000
    for found in (
        logits(bert, head, tensors, states, mask, training=False)[:, 0],
        torch.cat(mixed_logits(bert, [(head, tensors)] * 3, states, mask)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_in_the_thousands_keep_their_digits(bert, hidden, dtype):
    """float16 ends at 65504 and bfloat16 counts there by 512; what is rounded is the number around 0 alone."""
    states, mask = hidden[0].to(dtype), hidden[1]
    prices, topic = Head(kind="regression", num_outputs=1).fitted([2e5, 2.1e5]), Head.for_task(task_of_three())
    own = [{k: normal(*t.shape, seed=s) * 0.1 for k, t in h.init(bert, torch.Generator()).items()}
           for s, h in enumerate((prices, topic))]  # fmt: skip
    tensors = [{k: t.to(dtype) for k, t in o.items()} for o in own]
    plain = states[0, 0].float() @ tensors[0]["weight"][0].float() + tensors[0]["bias"].float()
    expected = plain.double() * 5000 + 205_000
    alone = logits(bert, prices, tensors[0], states[:1], mask[:1], training=False)[0]
    slack = 5000 * {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    assert alone.dtype == torch.float32 and abs(float(alone) - float(expected)) < slack
    mixed = mixed_logits(bert, [(prices, tensors[0]), (topic, tensors[1])], states[:2], mask[:2])
    assert abs(float(mixed[0]) - float(expected)) < slack
    company = mixed_logits(bert, [(topic, tensors[1])], states[1:2], mask[1:2])[0]
    assert company.dtype == dtype
    torch.testing.assert_close(mixed[1].to(dtype), company)


def task_of_three():
    return Task(name="t", kind="classification", template=("{a}",), label="y", labels=("a", "b", "c"))


def test_a_folded_head_answers_the_same(bert, hidden, close):
    states, mask = hidden
    head = Head(kind="regression", num_outputs=1, pooling="mean", dense="tanh").fitted([10, 30, 80])
    tensors = {k: normal(*t.shape, seed=1) for k, t in head.init(bert, torch.Generator()).items()}
    plain, folded = head.folded(tensors)
    assert not plain.rescales and folded["weight"] is not tensors["weight"]
    one, other = (
        torch.stack(mixed_logits(bert, [own] * 3, states, mask)) for own in ((plain, folded), (head, tensors))
    )
    close(one, other)


def test_the_loss_of_a_regression_is_in_variances_of_its_targets(close):
    targets = torch.tensor([100.0, 300, 400, 900])
    head = Head(kind="regression", num_outputs=1).fitted(targets.tolist())
    close(loss(head, targets.mean().expand(4, 1), targets), torch.tensor(1.0))
    close(loss(head, targets[:, None] + head.target_std * 0.5, targets), torch.tensor(0.25))


# ---- answers


@pytest.mark.parametrize(
    ("kind", "values", "starts", "label", "probabilities", "id_"),
    [
        ("classification", [0.0, math.log(3), 0.0], (), "good", {"bad": 0.2, "good": 0.6, "mixed": 0.2}, 1),
        ("regression", [1.5], (), 1.5, {}, 1.5),
        (
            "multilabel",
            [0.0, -1e9, 1e9, -0.1],
            (),
            ("art", "war"),
            {"art": 0.5, "law": 0.0, "war": 1.0, "sport": 0.475021},
            (1, 0, 1, 0),
        ),
        ("multiple_choice", [0.0, 0.0, math.log(2)], (), "2", {"0": 0.25, "1": 0.25, "2": 0.5}, 2),
        ("tagging", [[9.0, 0, 0], [0, 1.0, 0], [0, 9.0, 0], [0, 0, 0.1]], (1, 3), ("B-PER", "I-PER"), {}, (1, 2)),
    ],
)
def test_answers(tasks, kind, values, starts, label, probabilities, id_):
    task = tasks[kind]
    got = answer(task, torch.tensor(values), starts)
    assert got.label == label
    assert got.probabilities == pytest.approx(probabilities, abs=1e-6)
    assert prediction(task, torch.tensor(values), starts) == id_


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel", "multiple_choice", "tagging"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_have_no_label(tasks, kind, bad):
    values = torch.zeros(2, 3) if kind == "tagging" else torch.zeros(4)
    values.view(-1)[0] = bad
    got = answer(tasks[kind], values, (0, 1))
    assert (got.label, got.probabilities) == (None, {})
    if kind == "tagging":  # a token that starts no word is nobody's answer
        assert answer(tasks[kind], values, (1,)).label == ("O",)
