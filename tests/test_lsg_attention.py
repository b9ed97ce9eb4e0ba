"""LSG attention against its definition, one query of one head of one row at a time."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from multitune.lsg import LSG
from multitune.lsg_attention import lsg_attention
from multitune.lsg_sparse import KINDS, Reduction, lsh_projection

HEADS, WIDTH = 3, 4


def dense(query, key, value, mask):
    scores = query @ key.transpose(-1, -2) / WIDTH**0.5
    return ((scores if mask is None else scores + mask).softmax(-1) @ value).transpose(1, 2)


# ---- the definition


def norm(block, head, r, project):
    kept = sorted(block, key=lambda item: float(item[1].norm()), reverse=True)[:r]
    return [item[1:] for item in sorted(kept, key=lambda item: item[0])]


def mean(items):
    if not items:
        return None
    return torch.stack([i[1] for i in items]).mean(0), torch.stack([i[2] for i in items]).mean(0)


def pooling(block, head, r, project, size):
    factor = size // r
    return [mean([i for i in block if i[0] // factor == j]) for j in range(r)]


def lsh(block, head, r, project):
    buckets = [[] for _ in range(r)]
    for item in block:
        sides = (item[1] / item[1].norm()) @ project[head]
        buckets[int(torch.cat([sides, -sides]).argmax())].append(item)
    return [mean(bucket) for bucket in buckets]


def stride(block, head, r, project, size):
    factor = size // r
    return [next((i[1:] for i in block if i[0] == j * factor + head % factor), None) for j in range(r)]


def block_stride(block, head, r, project, size):
    first = head * r % size
    return [next((i[1:] for i in block if i[0] == first + j), None) for j in range(r)]


def reduced(lsg, head, keys, values, is_open, project):
    """Sparse candidates of the whole row in order, `None` where there is nothing."""
    b, r, n = lsg.block, lsg.block // lsg.sparsity, len(keys)
    out = []
    for start in range(0, -(-n // b) * b, b):
        block = [(p - start, keys[p], values[p]) for p in range(start, min(start + b, n)) if is_open[p]]
        if lsg.sparsity == 1:
            found = [next((i[1:] for i in block if i[0] == j), None) for j in range(b)]
        elif lsg.kind in ("norm", "lsh"):
            found = {"norm": norm, "lsh": lsh}[lsg.kind](block, head, r, project)
        else:
            functions = {"pooling": pooling, "stride": stride, "block_stride": block_stride}
            found = functions[lsg.kind](block, head, r, project, b)
        out += found + [None] * (r - len(found))
    return out


def visible(lsg, place, head, keys, values, is_open, candidates):
    """Keys and values among the tokens that the query at `place` sees."""
    b, r, s, n = lsg.block, lsg.block // lsg.sparsity, lsg.sparse, len(keys)
    if place is None or n <= 2 * b:
        near = range(n)
    else:
        near = range(max(place // b - 1, 0) * b, min((place // b + 2) * b, n))
    seen = [(keys[p], values[p]) for p in near if is_open[p]]
    if place is not None and n > 2 * b and lsg.kind != "none":
        left, right = (place // b - 1) * r, (place // b + 2) * r
        far = [*range(left - s, left), *range(right, right + s)]
        seen += [candidates[j] for j in far if 0 <= j < len(candidates) and candidates[j] is not None]
    return seen


def reference(query, key, value, is_open, lsg, layer, memory):
    out = torch.zeros_like(query)
    g = lsg.num_global
    how = Reduction(lsg.block, lsg.sparsity, lsg.seed_of(layer))
    project = lsh_projection(HEADS, WIDTH, how).to(key) if lsg.kind == "lsh" else None
    for row in range(len(query)):
        for head in range(HEADS):
            keys, values = key[row, head], value[row, head]
            front = [(keys[i], values[i]) for i in range(g)]
            if memory is not None:
                mk, mv, mo = (t[row] for t in memory)
                front += [(mk[head, i], mv[head, i]) for i in range(len(mo)) if mo[i]]
            candidates = None
            if lsg.has_sparse:
                candidates = reduced(lsg, head, keys[g:], values[g:], is_open[row], project)
            for i in range(query.shape[2]):
                place = None if i < g else i - g
                seen = front + visible(lsg, place, head, keys[g:], values[g:], is_open[row], candidates or [])
                if not seen:
                    continue  # a query of padding that sees only padding: any finite value will do
                scores = torch.stack([query[row, head, i] @ k for k, _ in seen]) / WIDTH**0.5
                out[row, head, i] = scores.softmax(0) @ torch.stack([v for _, v in seen])
    return out.transpose(1, 2)


def draw(lsg, lengths, memory_length=0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = max(lengths)
    shape = (len(lengths), HEADS, lsg.num_global + width, WIDTH)
    is_open = torch.arange(width) < torch.tensor(lengths)[:, None]
    memory = None
    if memory_length:
        memory = (rand(len(lengths), HEADS, memory_length, WIDTH), rand(len(lengths), HEADS, memory_length, WIDTH))
        entries = torch.ones(len(lengths), memory_length)
        entries[0, -1] = 0  # one entry only fills up
        memory = (*memory, entries)
    return rand(*shape), rand(*shape), rand(*shape), is_open, memory


@st.composite
def cases(draw):
    factor = draw(st.sampled_from([1, 2, 4]))
    block = factor * draw(st.sampled_from([2, 4]))
    lsg = LSG(
        kind=draw(st.sampled_from([*KINDS, "none"])),
        block=block,
        sparsity=factor,
        sparse=draw(st.integers(0, 2 * block)),
        num_global=draw(st.integers(0, 3)),
    )
    lengths = draw(st.lists(st.integers(1, 6 * block), min_size=1, max_size=2))
    return lsg, lengths, draw(st.integers(0, 3)), draw(st.integers(0, 99))


def compare(lsg, lengths, memory_length, seed):
    query, key, value, is_open, memory = draw(lsg, lengths, memory_length, seed)
    found = lsg_attention(dense, query, key, value, is_open, lsg, 2, memory)
    expected = reference(query, key, value, is_open, lsg, 2, memory)
    assert bool(found.isfinite().all())
    real = torch.cat([is_open.new_ones(len(is_open), lsg.num_global), is_open], dim=1)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-10)


@given(cases())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_every_query_sees_what_the_definition_says(case):
    compare(*case)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_each_kind_meets_its_definition_on_a_long_padded_row(kind):
    lsg = LSG(kind=kind, block=8, sparsity=2, sparse=6, num_global=2)
    compare(lsg, [67, 45], memory_length=3, seed=1)


def test_the_largest_keys_are_chosen_and_padding_never():
    lsg = LSG(kind="norm", block=4, sparsity=4, sparse=1)
    _, key, value, is_open, _ = draw(lsg, [10])
    key[:, :, lsg.num_global + 9] = 1000  # open
    key = torch.cat([key, torch.full_like(key[:, :, :2], 5000)], dim=2)  # padding, larger than all
    value = torch.cat([value, torch.full_like(value[:, :, :2], 5000)], dim=2)
    is_open = torch.cat([is_open, torch.zeros(1, 2, dtype=torch.bool)], dim=1)
    query = torch.zeros_like(key)
    found = lsg_attention(dense, query, key, value, is_open, lsg, 0)
    # Zero queries weigh all they see alike: the first block sees the global token, two blocks and one key beyond.
    seen = torch.cat([value[:, :, :9], value[:, :, lsg.num_global + 9 : lsg.num_global + 10]], dim=2)
    torch.testing.assert_close(found[:, 1], seen.mean(2))


def test_no_gradient_passes_through_the_choice_and_some_through_the_chosen():
    lsg = LSG(kind="norm", block=4, sparsity=2, sparse=4)
    query, key, value, is_open, _ = draw(lsg, [30], seed=3)
    inputs = [t.requires_grad_() for t in (query, key, value)]

    def function(*qkv):
        return lsg_attention(dense, *qkv, is_open, lsg, 0)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["pooling", "lsh", "stride", "block_stride"])
def test_gradients_are_those_of_finite_differences(kind):
    lsg = LSG(kind=kind, block=4, sparsity=2, sparse=4)
    query, key, value, is_open, memory = draw(lsg, [27, 18], 2, seed=3)
    inputs = [t.requires_grad_() for t in (query, key, value, *memory[:2])]

    def function(q, k, v, mk, mv):
        return lsg_attention(dense, q, k, v, is_open, lsg, 0, (mk, mv, memory[2]))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


class Largest(TorchDispatchMode):
    """The most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_nothing_grows_faster_than_the_length(kind):
    lsg = LSG(kind=kind, block=8, sparsity=2, sparse=8)
    sizes = []
    for length in (256, 1024):
        query, key, value, is_open, _ = draw(lsg, [length])
        with Largest() as largest:
            lsg_attention(dense, query, key, value, is_open, lsg, 0)
        sizes.append(largest.numel)
    assert sizes[1] <= 4 * sizes[0]
    assert sizes[1] < HEADS * 1024 * 1024 / 8
