"""Rows of several texts: each text's states are those it has in a row of its own, whatever stands beside it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multitune import IA3, MAM, AoTFC, Houlsby, LayerNormTuning, LoRA, Plan, PlanError, PromptTuning, PTuningV2
from multitune.inputs import Batch

CAUSAL = ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
METHODS = [
    None,
    LoRA(r=3),
    AoTFC(r=4),
    PTuningV2(length=3),
    PTuningV2(length=2, shift_positions=True),
    MAM(),
    Houlsby(bottleneck=4),
    IA3(),
    LayerNormTuning(),
]


@pytest.fixture(scope="module")
def tiny(make_backbone):
    """`tiny(name)`: one backbone per architecture, shared."""
    made = {}
    return lambda name: made.setdefault(name, make_backbone(name))


def packed(rows, pad_id):
    """`input_ids`, `attention_mask` and `pieces [B, T]` of rows, each of several texts."""
    width = max(sum(map(len, row)) for row in rows)
    ids, mask, pieces = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long), []
    for i, row in enumerate(rows):
        whole = torch.cat(row)
        ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
        numbers = torch.arange(len(row)).repeat_interleave(torch.tensor([len(t) for t in row]))
        pieces.append(torch.cat([numbers, numbers[-1:].expand(width - len(whole))]))
    return ids, None if bool(mask.all()) else mask, torch.stack(pieces)


@pytest.mark.parametrize("name", CAUSAL)
@given(
    st.lists(
        st.tuples(st.sampled_from(range(len(METHODS))), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_text_among_others_is_as_alone(tiny, name, delta_set, random_rows, close, drawn):
    backbone = tiny(name)
    sets = [None if METHODS[m] is None else delta_set(backbone, METHODS[m], i) for i, (m, _) in enumerate(drawn)]
    rows = [list(random_rows(backbone, lengths, seed=i).rows) for i, (_, lengths) in enumerate(drawn)]
    ids, mask, pieces = packed(rows, backbone.pad_id)
    with torch.no_grad():
        hidden = backbone.run(Plan(sets), ids, mask, pieces=pieces)
        for found, own, texts in zip(hidden, sets, rows, strict=True):
            start = 0
            for text in texts:
                alone = backbone.run(Plan([own]), text[None])[0]
                close(found[start : start + len(text)], alone)
                start += len(text)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_a_pass_cut_in_two_keeps_texts_apart(tiny, name, delta_set, random_rows, close):
    backbone = tiny(name)
    rows = [list(random_rows(backbone, lengths).rows) for lengths in ([3, 8, 2], [7])]
    ids, mask, pieces = packed(rows, backbone.pad_id)
    plan = Plan([delta_set(backbone, LoRA(r=2)), None])
    batch = Batch(input_ids=ids, attention_mask=mask, pieces=pieces)
    with torch.no_grad():
        below = backbone.run_below(plan, 1, batch)
        found = backbone.run_above(plan, 1, below, batch)
        close(found[mask > 0], backbone.run(plan, ids, mask, pieces=pieces)[mask > 0])


def test_the_compiled_pass_keeps_texts_apart(make_backbone, delta_set, random_rows, close):
    plain, compiled = make_backbone("llama", num_hidden_layers=1), make_backbone("llama", num_hidden_layers=1)
    compiled.compile(backend="eager")
    plan = Plan([delta_set(plain, LoRA(r=2))])
    with torch.no_grad():
        for lengths in ([3, 8], [5, 1, 5], [4, 7]):
            ids, _, pieces = packed([list(random_rows(plain, lengths).rows)], plain.pad_id)
            close(compiled.run(plan, ids, pieces=pieces), plain.run(plan, ids, pieces=pieces))


def test_rows_that_cannot_hold_several_texts_are_refused_by_number(tiny, bert, delta_set):
    gpt2 = tiny("gpt2")
    ids = torch.full((2, 4), 7)
    whole = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])

    def run(backbone, pieces, mask=None, method=None):
        deltas = None if method is None else delta_set(backbone, method)
        return backbone.run(Plan([None, deltas]), ids, mask, pieces=pieces)

    with pytest.raises(PlanError, match=r"needs a causal backbone, and 'bert' \(bert\) is none; give every text"):
        run(bert, whole)
    with pytest.raises(PlanError, match="row 1: pieces falls from position 1 to 2; number a row's texts in the order"):
        run(gpt2, torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]))
    with pytest.raises(PlanError, match="row 0: attention_mask rises from position 0 to 1; where a row holds several"):
        run(gpt2, whole, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    with pytest.raises(PlanError, match=r"pieces has shape \(2, 3\), but input_ids has shape \(2, 4\)"):
        run(gpt2, whole[:, :3])
    with pytest.raises(PlanError, match=r"row 1: its adapter inserts vectors into a row \(a prompt\)"):
        run(gpt2, whole, method=PromptTuning(length=2))
