"""Each kind of delta against a slow twin: plain loops written from its equation, which never call `apply`."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.utils._python_dispatch
from torch import nn
from torch.autograd import gradcheck

from multitune import Backbone, ConfigError, DeltaSet, Plan, PTuningV2
from multitune.deltas import (
    ACTIVATIONS,
    ORDER,
    SOFTMAX,
    Affine,
    Bias,
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    FCRows,
    InputScale,
    KroneckerRows,
    LowRank,
    Memory,
    Prompt,
    Scale,
    SharedLowRank,
    SparseWeight,
    TableRows,
    TokenBias,
    build_table,
    table_error,
)
from multitune.deltas.prompt import in_slot
from multitune.plan import unpack

I, O, T = 4, 5, 3  # in, out, tokens


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- the twins: one row, x [T, I] and y [T, O], one entry at a time

FUNCTIONS = {
    "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / math.sqrt(2))),
    "relu": lambda v: v if v > 0 else v * 0,
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "tanh": lambda v: (torch.exp(v) - torch.exp(-v)) / (torch.exp(v) + torch.exp(-v)),
    "identity": lambda v: v,
    "gelu_new": lambda v: v * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


def rows_of(entries):
    return torch.stack([torch.stack(row) for row in entries])


def low_rank_twin(d, x, y, module):
    out = []
    for t in range(len(x)):
        h = [dot(x[t], d.A[:, r]) for r in range(d.A.shape[1])]
        out.append([y[t, o] + d.scale * dot(h, d.B[:, o]) for o in range(y.shape[1])])
    return rows_of(out)


def shared_low_rank(g, r=3):
    """Of one origin, so with the same matrices each time, and vectors of its own."""
    shared = torch.Generator().manual_seed(9)
    A, B = normal(shared, I, r), normal(shared, r, O)
    return SharedLowRank(A=A, B=B, d=normal(g, r), b=normal(g, O), origin=("test", r))


def shared_low_rank_twin(d, x, y, module):
    out = []
    for t in range(len(x)):
        h = [dot(x[t], d.A[:, r]) * d.d[r] for r in range(len(d.d))]
        out.append([y[t, o] + dot(h, d.B[:, o]) * d.b[o] for o in range(len(d.b))])
    return rows_of(out)


def bias_twin(d, x, y, module):
    return rows_of([[y[t, o] + d.b[o] for o in range(y.shape[1])] for t in range(len(y))])


def scale_twin(d, x, y, module):
    return rows_of([[y[t, o] * (1 + d.s[o]) for o in range(y.shape[1])] for t in range(len(y))])


def input_scale_twin(d, x, y, module):
    return rows_of([[x[t, i] * (1 + d.s[i]) for i in range(x.shape[1])] for t in range(len(x))])


def affine_twin(d, x, y, module):
    out = []
    for t in range(len(x)):
        mean = sum(x[t]) / x.shape[1]
        variance = sum((v - mean) ** 2 for v in x[t]) / x.shape[1]
        row = []
        for i in range(x.shape[1]):
            gain = module.weight[i] + (0 if d.gain is None else d.gain[i])
            offset = module.bias[i] + (0 if d.offset is None else d.offset[i])
            row.append((x[t, i] - mean) / (variance + module.eps).sqrt() * gain + offset)
        out.append(row)
    return rows_of(out)


def softmax_twin(values, groups):
    width = len(values) // groups
    runs = [[torch.exp(v) for v in values[k : k + width]] for k in range(0, len(values), width)]
    return [e / sum(run) for run in runs for e in run]


def normalised_twin(z, eps):
    mean = sum(z) / len(z)
    deviation = (sum((v - mean) ** 2 for v in z) / len(z) + eps) ** 0.5
    return torch.stack([(v - mean) / deviation for v in z])


def bottleneck_twin(d, x, y, module):
    out = []
    for t in range(len(y)):
        z = {"serial": y[t], "parallel": x[t], "sum": x[t] + y[t]}[d.placement]
        z = z if d.eps is None else normalised_twin(z, d.eps)
        h = [dot(z, d.down[:, m]) + d.down_bias[m] for m in range(d.down.shape[1])]
        h = softmax_twin(h, d.groups) if d.activation == SOFTMAX else [FUNCTIONS[d.activation](v) for v in h]
        out.append([y[t, i] + d.scale * (dot(h, d.up[:, i]) + d.up_bias[i]) for i in range(y.shape[1])])
    return rows_of(out)


def sparse_twin(d, x, y, module):
    out = [[y[t, o] for o in range(y.shape[1])] for t in range(len(y))]
    for value, place in zip(d.values, d.indices.tolist(), strict=True):
        for t in range(len(x)):
            out[t][place // x.shape[1]] = out[t][place // x.shape[1]] + d.scale * x[t, place % x.shape[1]] * value
    return rows_of(out)


def sparse(g, n=6, dtype=torch.int32, **settings):
    places = torch.randperm(I * O, generator=g)[:n].sort().values.to(dtype)
    return SparseWeight(values=normal(g, n), indices=places, shape=(O, I), **settings)


def low_rank(g, r=3, **settings):
    return LowRank(A=normal(g, I, r), B=normal(g, r, O), **settings)


def bottleneck(g, m=3, **settings):
    tensors = dict(down=normal(g, O, m), down_bias=normal(g, m), up=normal(g, m, O), up_bias=normal(g, O))
    return Bottleneck(**tensors, **settings)


#: name -> (make a random delta, its twin)
CASES = {
    "low_rank": (lambda g: low_rank(g, scale=0.7), low_rank_twin),
    "low_rank_rank_one": (lambda g: low_rank(g, r=1), low_rank_twin),
    "shared_low_rank": (shared_low_rank, shared_low_rank_twin),
    "sparse": (sparse, sparse_twin),
    "sparse_wide": (partial(sparse, n=15, dtype=torch.int64), sparse_twin),
    "sparse_one": (partial(sparse, n=1), sparse_twin),
    "sparse_scaled": (partial(sparse, scale=0.7), sparse_twin),
    "bias": (lambda g: Bias(b=normal(g, O)), bias_twin),
    "scale": (lambda g: Scale(s=normal(g, O)), scale_twin),
    "input_scale": (lambda g: InputScale(s=normal(g, I)), input_scale_twin),
    "affine": (lambda g: Affine(gain=normal(g, O), offset=normal(g, O)), affine_twin),
    "affine_gain": (lambda g: Affine(gain=normal(g, O)), affine_twin),
    "affine_offset": (lambda g: Affine(offset=normal(g, O)), affine_twin),
    **{f"bottleneck_{name}": (partial(bottleneck, activation=name), bottleneck_twin) for name in ACTIVATIONS},
    "bottleneck_scaled": (lambda g: bottleneck(g, m=5, scale=2.5), bottleneck_twin),
    "bottleneck_softmax": (lambda g: bottleneck(g, m=3, activation=SOFTMAX), bottleneck_twin),
    "bottleneck_softmax_in_groups": (
        lambda g: bottleneck(g, m=6, activation=SOFTMAX, groups=2, scale=0.5, placement="parallel"),
        bottleneck_twin,
    ),
    "bottleneck_parallel": (lambda g: bottleneck(g, placement="parallel", scale=0.5), bottleneck_twin),
    "bottleneck_sum": (lambda g: bottleneck(g, placement="sum"), bottleneck_twin),
    "bottleneck_sum_normalised": (lambda g: bottleneck(g, placement="sum", eps=0.1, scale=0.5), bottleneck_twin),
    "bottleneck_serial_normalised": (lambda g: bottleneck(g, eps=1e-3), bottleneck_twin),
}


def site_of(delta):
    """A frozen module that a delta fits, and the widths of its input and output."""
    g = torch.Generator().manual_seed(99)
    if isinstance(delta, Affine):
        module = nn.LayerNorm(O, eps=1e-3, dtype=torch.float64)
        width = O
    else:
        module = nn.Linear(I, O, dtype=torch.float64)
        width = O if isinstance(delta, Bottleneck) else I  # the sub-layer's own input, as wide as its output
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(normal(g, *parameter.shape))
    module.requires_grad_(False)
    return module, width


def site_rows(delta, num_rows, seed=7):
    """The site's input and output for `num_rows` rows, `[B, T, .]`."""
    module, width = site_of(delta)
    x = normal(torch.Generator().manual_seed(seed), num_rows, T, width)
    if isinstance(delta, InputScale):
        return module, x, x.clone()
    if isinstance(delta, Bottleneck):
        return module, x, normal(torch.Generator().manual_seed(seed + 1), num_rows, T, O)
    return module, x, module(x)


def stacked(deltas):
    """The many-slot form, made as a plan makes it."""
    packs = [next(iter(DeltaSet({"site": [d]}).packs.values())) for d in deltas]
    ((_, delta),) = unpack(
        packs[0].layout, [torch.stack(same, 1) for same in zip(*(p.pieces for p in packs), strict=True)]
    )
    return delta


def stacked_as_given(deltas):
    """The many-slot form of deltas that were not brought into canonical form first."""
    stacks = {name: torch.stack([d.tensors()[name] for d in deltas]) for name in deltas[0].tensors()}
    # vectors become `[G, 1, n]`, so that they broadcast over tokens
    return deltas[0].with_tensors({name: t.unsqueeze(1) if t.ndim == 2 else t for name, t in stacks.items()})


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def make_deltas(case, count):
    return [case[0](torch.Generator().manual_seed(seed)) for seed in range(count)]


# ---- apply


@pytest.mark.parametrize("gradients", [False, True])
def test_one_slot_is_its_equation(case, close, gradients):
    (delta,) = make_deltas(case, 1)
    module, x, y = site_rows(delta, 2)
    expected = torch.stack([case[1](delta, x[b], y[b], module) for b in range(2)])
    assert not torch.allclose(expected, y)
    with torch.set_grad_enabled(gradients):
        close(delta.apply(x, y.clone(), module), expected)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows_per_slot", [1, 3])
@pytest.mark.parametrize("stack", [stacked, stacked_as_given])
def test_many_slots_are_the_equation_row_by_row(case, close, gradients, rows_per_slot, stack):
    deltas = make_deltas(case, 3)
    module, x, y = site_rows(deltas[0], 3 * rows_per_slot)
    expected = torch.stack([case[1](deltas[b // rows_per_slot], x[b], y[b], module) for b in range(len(x))])

    def by_slot(t):
        return t.clone().reshape(3, rows_per_slot * T, -1)

    with torch.set_grad_enabled(gradients):
        out = stack(deltas).apply(by_slot(x), by_slot(y), module)
    close(out.reshape(expected.shape), expected)


def test_many_slots_equal_vmap_over_one_slot(case, close):
    if case[1] is sparse_twin:
        pytest.skip("a bag of embeddings has no form under vmap")
    deltas = [d.canonical() for d in make_deltas(case, 3)]
    module, x, y = site_rows(deltas[0], 3)
    tensors = {name: torch.stack([d.tensors()[name] for d in deltas]) for name in deltas[0].tensors()}

    def one(own, x, y):
        names = iter(own)
        return deltas[0].map(lambda _: own[next(names)]).apply(x, y, module)

    close(stacked(deltas).apply(x, y, module), torch.func.vmap(one)(tensors, x, y))


def floats(delta):
    """The tensors a delta has gradients for."""
    return [t for t in delta.tensors().values() if t.is_floating_point()]


def with_tensors(delta, values):
    """The delta with these tensors in place of its floating-point ones."""
    values = iter(values)
    return delta.map(lambda t: next(values) if t.is_floating_point() else t)


@pytest.mark.parametrize("slots", [1, 2])
def test_gradients(case, slots):
    deltas = make_deltas(case, slots)
    module, x, y = site_rows(deltas[0], slots)
    per_slot = [floats(d) for d in deltas]

    def run(x, y, *flat):
        own = [with_tensors(d, flat[i * len(per_slot[0]) :][: len(per_slot[0])]) for i, d in enumerate(deltas)]
        delta = own[0] if slots == 1 else stacked(own)
        return delta.apply(x, y, module)

    inputs = [x, y, *(t for tensors in per_slot for t in tensors)]
    assert gradcheck(run, [t.clone().requires_grad_() for t in inputs])


def test_gradients_equal_those_of_the_equation(case, close):
    (delta,) = make_deltas(case, 1)
    module, x, y = site_rows(delta, 1)
    weights = normal(torch.Generator().manual_seed(3), *y[0].shape)

    def gradients(run):
        tensors = [t.clone().requires_grad_() for t in floats(delta)]
        own_x = x.clone().requires_grad_()
        (run(with_tensors(delta, tensors), own_x) * weights).sum().backward()
        return [t.grad for t in tensors]

    fast = gradients(lambda d, own_x: d.apply(own_x, y, module)[0])
    slow = gradients(lambda d, own_x: case[1](d, own_x[0], y[0], module))
    for ours, theirs in zip(fast, slow, strict=True):
        close(ours, theirs)


# ---- other forms of the same delta


def test_canonical_equals_the_original(case, close):
    (delta,) = make_deltas(case, 1)
    module, x, y = site_rows(delta, 2)
    expected = delta.apply(x.clone(), y.clone(), module)
    for same in (delta.canonical(), delta.canonical().canonical(), delta.served()):
        close(same.apply(x.clone(), y.clone(), module), expected)


@pytest.mark.parametrize(("width", "rounded"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16)])
def test_canonical_rounds_widths_so_that_neighbours_pack_together(width, rounded):
    g = torch.Generator().manual_seed(0)
    assert low_rank(g, r=width, scale=3.0).canonical().A.shape == (I, rounded)
    assert bottleneck(g, m=width).canonical().down.shape == (O, rounded)
    memory = Memory(keys=normal(g, width, 2, 3), values=normal(g, width, 2, 3), open=torch.ones(width)).canonical()
    assert memory.keys.shape[0] == memory.values.shape[0] == rounded
    assert memory.open.tolist() == [1.0] * width + [0.0] * (rounded - width)


def test_widths_that_round_alike_share_one_product():
    g = torch.Generator().manual_seed(0)
    signatures = [next(iter(DeltaSet({"s": [low_rank(g, r=r, scale=s)]}).packs)) for r, s in [(5, 1.0), (8, 0.3)]]
    assert signatures[0] == signatures[1]
    assert signatures[0] != next(iter(DeltaSet({"s": [low_rank(g, r=9)]}).packs))
    assert signatures[0] != next(iter(DeltaSet({"other": [low_rank(g, r=8)]}).packs))


@pytest.mark.parametrize("name", [n for n, (make, _) in CASES.items() if not n.startswith("bottleneck")])
def test_merged_equals_applied(name, close):
    (delta,) = make_deltas(CASES[name], 1)
    module, x, _ = site_rows(delta, 2)
    copied, _ = site_of(delta)
    delta.merge(copied)
    if delta.changes_input:
        expected = module(delta.apply(x, x, module))
    else:
        expected = delta.apply(x, module(x), module)
    close(copied(x), expected)
    assert any(not torch.equal(a, b) for a, b in zip(copied.parameters(), module.parameters(), strict=True))


def test_what_cannot_merge_says_why():
    g = torch.Generator().manual_seed(0)
    memory = Memory(keys=normal(g, 2, 2, 3), values=normal(g, 2, 2, 3), open=torch.ones(2))
    prompt = Prompt(vectors=normal(g, 2, 4), at=(0, 0))
    bias = TokenBias(source=TableRows(table=normal(g, 3, 2, 4)))
    for delta in (bottleneck(g), memory, prompt, bias):
        assert delta.cannot_merge
        with pytest.raises(NotImplementedError, match=delta.cannot_merge):
            delta.merge(nn.Linear(I, O))


@pytest.mark.parametrize("at", [(-1, 0), (1, 0), (-2, 0), (0, -2), (0,)])
def test_a_prompt_has_its_places_in_order(at):
    g = torch.Generator().manual_seed(0)
    for good in ((0, 0), (0, 3), (2, -1), (-1, -1), (in_slot(1), 0), (-1, in_slot(0))):
        assert Prompt(vectors=normal(g, 2, 4), at=good).at == good
    with pytest.raises(ConfigError, match=r"2 vectors needs as many places, non-decreasing from 0, then -1, not at="):
        Prompt(vectors=normal(g, 2, 4), at=at)


def test_every_kind_has_a_place_in_the_order():
    by_hand = {Affine, Bias, Bottleneck, InputScale, LowRank, Memory, Prompt, Scale, SparseWeight, TokenBias}
    assert set(ORDER) == by_hand | {EmbeddingLowRank, SharedLowRank}
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize(
    ("count", "rounded"), [(1, 1), (8, 8), (9, 10), (64, 64), (65, 80), (4718, 5120), (4719, 5120)]
)
def test_entries_of_a_sparse_update_are_rounded_up_by_a_quarter_at_most(count, rounded):
    places = torch.arange(10_000 - count, 10_000)
    padded = SparseWeight(values=torch.ones(count), indices=places, shape=(100, 100)).canonical()
    assert padded.values.shape == padded.indices.shape == (rounded,) and padded.indices.dtype == torch.int32
    assert padded.indices.tolist() == [0] * (rounded - count) + places.tolist()
    assert padded.values.tolist() == [0.0] * (rounded - count) + [1.0] * count


def test_places_of_a_sparse_update_that_are_there_twice_add_up(close):
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    delta = SparseWeight(values=values, indices=torch.tensor([7, 7, 9]), shape=(O, I))
    module, x, y = site_rows(delta, 2)
    close(delta.apply(x, y, module), torch.stack([sparse_twin(delta, x[b], y[b], module) for b in range(2)]))
    before = module.weight.clone()
    delta.merge(module)
    changed = (module.weight - before).flatten()
    assert changed[[7, 9]].tolist() == pytest.approx([3.0, 4.0]) and int((changed != 0).sum()) == 2


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([0, 20], r"has the place 20, but its weight of shape \(5, 4\) has the places 0 to 19"),
        ([-1, 3], "has the place -1"),
        ([3, 2], "must be in ascending order"),
    ],
)
def test_a_sparse_update_with_impossible_places_is_not_served(indices, words):
    delta = SparseWeight(values=torch.ones(2), indices=torch.tensor(indices), shape=(O, I))
    with pytest.raises(ConfigError, match=words):
        DeltaSet({"site": [delta]}).fused(torch.float32, torch.device("cpu"))


def test_a_sparse_update_makes_no_dense_matrix():
    """Of a weight with 2^26 places: a dense update, or a dense gradient of one, would be 512 MiB."""
    width, seen = 2**13, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    values = torch.ones(10, requires_grad=True)
    places = torch.randint(width * width, (10,), generator=torch.Generator().manual_seed(0)).sort().values
    delta = SparseWeight(values=values, indices=places, shape=(width, width))
    x, module = torch.ones(2, 3, width, requires_grad=True), nn.Identity()
    with Watch():
        delta.apply(x, torch.zeros(2, 3, width), module).sum().backward()
    assert max(seen) == 6 * width and values.grad.tolist() == [6.0] * 10


def test_kinds_at_one_site_apply_in_a_fixed_order(close):
    g = torch.Generator().manual_seed(0)
    parts = [Bias(b=normal(g, O)), Scale(s=normal(g, O)), low_rank(g)]
    ((_, kinds),) = DeltaSet({"site": parts}).by_site.items()
    assert [type(d) for d in kinds] == [LowRank, Scale, Bias]
    module, x, y = site_rows(parts[2], 1)
    expected = (low_rank_twin(parts[2], x[0], y[0], module) * (1 + parts[1].s)) + parts[0].b
    for d in kinds:
        y = d.apply(x, y, module)
    close(y[0], expected)


# ---- dropout


def test_dropout_only_in_training_and_only_in_the_trained_form():
    torch.manual_seed(0)
    delta = low_rank(torch.Generator().manual_seed(0), dropout=0.5)
    module, x, y = site_rows(delta, 2)
    clean = low_rank(torch.Generator().manual_seed(0)).apply(x, y, module)
    module.eval()
    assert torch.equal(delta.apply(x, y, module), clean)
    module.train()
    draws = torch.stack([delta.apply(x, y, module) for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - clean).abs() < 5 * standard_error + 1e-9).all()
    assert delta.canonical().dropout == 0.5
    assert delta.served().dropout == 0.0


# ---- token biases


V, L, E, D, R = 11, 2, 4, 5, 3


def fc_rows(g, **settings):
    return FCRows(
        embedding=normal(torch.Generator().manual_seed(5), V, E),
        w1=normal(g, E, L, R),
        b1=normal(g, L, R),
        w2=normal(g, L, R, D),
        b2=normal(g, L, D),
        **settings,
    )


def kronecker_rows(g):
    return KroneckerRows(left=normal(g, 3, L, R), middle=normal(g, 4, L, R), right=normal(g, L, R * R, D))


def fc_twin(source, token):
    """Rows `[L, D]` of one token."""
    out = []
    for layer in range(L):
        words = source.embedding[token]
        h = [FUNCTIONS[source.activation](dot(words, source.w1[:, layer, r]) + source.b1[layer, r]) for r in range(R)]
        out.append([dot(h, source.w2[layer, :, d]) + source.b2[layer, d] for d in range(D)])
    return rows_of(out)


def kronecker_twin(source, token):
    """Row `token` of the whole `(W_L ⊗ W_M) W_R`, which the library never builds."""
    return torch.stack(
        [(torch.kron(source.left[:, i], source.middle[:, i]) @ source.right[i])[token] for i in range(L)]
    )


SOURCES = {
    **{f"fc_{name}": (partial(fc_rows, activation=name), fc_twin) for name in ACTIVATIONS},
    "kronecker": (kronecker_rows, kronecker_twin),
}


@pytest.mark.parametrize("name", SOURCES)
def test_token_rows_are_their_equation(name, close):
    make, twin = SOURCES[name]
    source = make(torch.Generator().manual_seed(1))
    ids = torch.tensor([0, 10, 3, 3, 7])
    close(source.rows(ids), torch.stack([twin(source, int(i)) for i in ids]))
    close(source.served().rows(ids), source.rows(ids))
    table = build_table(source, V, torch.float64, chunk=4).table
    close(table, torch.stack([twin(source, i) for i in range(V)]))
    assert torch.equal(TableRows(table=table).rows(ids), table[ids])
    assert table.shape == (V, L, D)


@pytest.mark.parametrize("name", ["fc_gelu", "kronecker"])
def test_an_int8_table_is_off_by_half_a_step_of_its_row(name):
    source = SOURCES[name][0](torch.Generator().manual_seed(1))
    rows = build_table(source, V, torch.float64).table
    table = build_table(source, V, torch.int8, chunk=4)
    found = table.rows(torch.arange(V))
    assert table.table.dtype == torch.int8
    assert table.nbytes == V * L * (D + 4)
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert bool(((rows - found).abs() <= step * (0.5 + 1e-5)).all())
    largest, relative = table_error(source, table, chunk=3)
    assert largest == pytest.approx(float((rows - found).abs().max()), rel=1e-6)
    assert relative == pytest.approx(float((rows - found).norm() / rows.norm()), rel=1e-6)
    assert largest <= float(step.max()) * (0.5 + 1e-5)
    out = torch.empty(2, L, D)
    table.rows_into(torch.tensor([3, 1]), out)
    torch.testing.assert_close(out, found[[3, 1]].float())


def test_rows_of_zeros_stay_zeros_in_an_int8_table():
    ids = torch.arange(V)
    source = KroneckerRows(left=torch.zeros(4, L, 2), middle=torch.ones(4, L, 2), right=torch.ones(L, 4, D))
    table = build_table(source, V, torch.int8)
    assert not table.rows(ids).any()
    assert table_error(source, table) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["fc_gelu", "kronecker"])
def test_token_rows_of_many_slots(name, close):
    make, twin = SOURCES[name]
    sources = [make(torch.Generator().manual_seed(seed)) for seed in range(3)]
    many = stacked([TokenBias(source=s) for s in sources]).source
    ids = torch.tensor([[0, 4], [9, 9], [10, 1]])
    expected = torch.stack([torch.stack([twin(s, int(i)) for i in row]) for s, row in zip(sources, ids, strict=True)])
    close(many.rows(ids), expected)


@pytest.mark.parametrize("name", ["fc_tanh", "kronecker"])
def test_token_rows_gradients(name):
    source = SOURCES[name][0](torch.Generator().manual_seed(1))
    ids = torch.tensor([0, 10, 3, 3])

    def run(*tensors):
        values = iter(tensors)
        return source.map(lambda _: next(values)).rows(ids)

    assert gradcheck(run, [t.clone().requires_grad_() for t in source.tensors().values()])


def test_the_frozen_embedding_is_not_the_adapters(bert):
    source = fc_rows(torch.Generator().manual_seed(1))
    assert set(source.tensors()) == {"w1", "b1", "w2", "b2"}
    pack = next(iter(DeltaSet({"layers": [TokenBias(source=source)]}).packs.values()))
    assert sum(p.numel() for p in pack.pieces) == sum(t.numel() for t in source.tensors().values())


def test_token_dropout_only_in_training():
    torch.manual_seed(0)
    source = fc_rows(torch.Generator().manual_seed(1), dropout=0.5)
    ids = torch.arange(V)
    assert torch.equal(source.rows(ids), source.compute(ids))
    dropped = source.rows(ids, training=True)
    zeros = (dropped == 0).double().mean()
    assert 0.3 < zeros < 0.7
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * source.compute(ids)[kept])
    assert source.served().dropout == 0.0


# ---- word embeddings


def embedding_low_rank(g, r=3):
    return EmbeddingLowRank(A=normal(g, V, r), B=normal(g, r, E), scale=0.7)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows_per_slot", [1, 2])
def test_an_embedding_update_is_its_equation(gradients, rows_per_slot, close):
    deltas = [embedding_low_rank(torch.Generator().manual_seed(seed), r) for seed, r in ((0, 3), (1, 4), (2, 3))]
    ids = torch.tensor([[0, 10, 3, 3], [4, 4, 1, 0], [9, 2, 2, 5]]).repeat_interleave(rows_per_slot, 0)
    module = nn.Embedding(V, E, dtype=torch.float64).requires_grad_(False)
    y = module(ids)

    def twin(d, b, t, e):
        return y[b, t, e] + 0.7 * dot(d.A[ids[b, t]], d.B[:, e])

    rows, words, width = (range(n) for n in y.shape)
    expected = [rows_of([[twin(deltas[b // rows_per_slot], b, t, e) for e in width] for t in words]) for b in rows]
    with torch.set_grad_enabled(gradients):
        for b in rows:
            close(deltas[b // rows_per_slot].apply(ids[b : b + 1], y[b : b + 1], module)[0], expected[b])
        by_slot = (t.reshape(3, -1, *t.shape[2:]) for t in (ids, y))
        close(stacked(deltas).apply(*by_slot, module).reshape(y.shape), torch.stack(expected))
    deltas[0].merge(module)
    close(module(ids[:1])[0], expected[0])


def test_an_embedding_update_is_multiplied_by_what_the_model_rounds():
    delta = embedding_low_rank(torch.Generator().manual_seed(0)).canonical().map(torch.Tensor.bfloat16)
    module = nn.Embedding(V, E)
    module.embed_scale = torch.tensor(33.94)  # Gemma's, a float32 buffer in models of every dtype
    ids, nothing = torch.arange(V)[None], torch.zeros(1, V, E, dtype=torch.bfloat16)
    found = delta.apply(ids, nothing, module)
    module.embed_scale = module.embed_scale.bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, delta.apply(ids, nothing, module))


# ---- matrices that adapters share


def test_shared_matrices_are_never_packed_and_other_origins_never_share_a_product():
    g = torch.Generator().manual_seed(0)
    one, two, wider = shared_low_rank(g), shared_low_rank(g), shared_low_rank(g, r=4)
    packs = [next(iter(DeltaSet({"s": [d]}).packs.values())) for d in (one, two, wider)]
    assert [sum(t.numel() for t in p.pieces) for p in packs] == [3 + O, 3 + O, 4 + O]
    assert packs[0].signature == packs[1].signature
    other_seed = replace(one, origin=("other", 3))
    assert packs[0].signature not in DeltaSet({"s": [other_seed]}).packs
    ((_, unpacked),) = unpack(packs[1].layout, [t.unsqueeze(1) for t in packs[1].pieces])
    assert unpacked.A is two.A and unpacked.B is two.B


# ---- memory: attention over extra keys and values


def attention_twin(q, k, v, keys, values, mask, bias, scaling):
    """One row and head at a time: `q, k, v [T, H, K]`, memory `[M, H, K]`, `mask [T]` and `bias [H, T, T]` of the
    row's own keys; a memory's entries have no bias."""
    num_tokens, heads, _ = q.shape
    out = torch.zeros_like(q)
    for h in range(heads):
        for t in range(num_tokens):
            entries = [(dot(q[t, h], key[h]) * scaling, value[h]) for key, value in zip(keys, values)]  # noqa: B905
            own = (s for s in range(num_tokens) if mask[s])
            entries += [(dot(q[t, h], k[s, h]) * scaling + bias[h, t, s], v[s, h]) for s in own]
            weights = [torch.exp(score) for score, _ in entries]
            out[t, h] = sum(w * value for w, (_, value) in zip(weights, entries, strict=True)) / sum(weights)
    return out.flatten(1)


def position_bias(backbone, num_tokens):
    """`[H, T, T]`: what the model itself adds to the scores of its first layer."""
    encoder = backbone.running.encoder if hasattr(backbone.running, "encoder") else None
    if hasattr(encoder, "compute_position_bias"):  # MPNet
        return encoder.compute_position_bias(torch.zeros(1, num_tokens, 1))[0].detach()
    if hasattr(backbone.running, "block"):  # T5
        return backbone.running.block[0].layer[0].SelfAttention.compute_bias(num_tokens, num_tokens)[0].detach()
    return torch.zeros(4, num_tokens, num_tokens)


@pytest.mark.parametrize("name", ["bert", "bert/eager", "distilbert", "bart", "mpnet", "t5", "t5/eager"])
@pytest.mark.parametrize("gradients", [False, True])
def test_memory_is_its_equation(name, gradients, make_model, random_params, random_rows, close):
    backbone = Backbone(make_model(name).double())
    width = 10 if name.startswith("t5") else 8  # of a head
    lengths, counts = [3, 5, 4, 5], [3, None, 4, 2]  # of tokens, of memory entries: two groups of 4, one of 2
    sets, memories = [], []
    for i, count in enumerate(counts):
        if count is None:
            sets.append(None)
            memories.append((torch.zeros(0, 4, width).double(), torch.zeros(0, 4, width).double()))
            continue
        params = random_params(backbone, PTuningV2(length=count), i, std=1.0)
        params = {k: t.double() for k, t in params.items()}
        sets.append(DeltaSet(PTuningV2(length=count).deltas(params, backbone)))
        memories.append(tuple(params[f"layer.0.attention.{k}"].view(count, 4, width) for k in ("keys", "values")))
    site = next(s for s in backbone.sites if s.name == "layer.0.attention")
    linears = {s.role: backbone.model.get_submodule(s.module) for s in backbone.sites if s.layer == 0}
    seen = {}

    def look(module, args, kwargs, output):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    def look_out(module, args):
        seen["attended"] = args[0]

    attention = backbone.model.get_submodule(site.module)
    handles = [
        attention.register_forward_hook(look, with_kwargs=True),
        linears["attention_output"].register_forward_pre_hook(look_out),
    ]
    ids, mask = random_rows(backbone, lengths).padded()
    with torch.set_grad_enabled(gradients):
        plan = Plan(sets)
        backbone.run(plan, ids, mask)
    for handle in handles:
        handle.remove()
    order = plan.order if plan.order is not None else torch.arange(4)
    bias = position_bias(backbone, ids.shape[1])
    scaling = 1.0 if name.startswith("t5") else width**-0.5
    for place, row in enumerate(order.tolist()):
        hidden = seen["hidden"][place]
        q, k, v = (nn.functional.linear(hidden, linears[r].weight, linears[r].bias).view(-1, 4, width)
                   for r in ("query", "key", "value"))  # fmt: skip
        expected = attention_twin(q, k, v, *memories[row], mask[row], bias, scaling)
        n = lengths[row]
        close(seen["attended"][place, :n], expected[:n])


def test_a_delta_without_apply_fails_loudly():
    with pytest.raises(NotImplementedError, match="Memory"):
        Memory(keys=torch.zeros(1, 1, 1), values=torch.zeros(1, 1, 1), open=torch.ones(1)).apply(None, None, None)
    assert Delta.cannot_merge is None
