"""A batch that is run in pieces, because prompts would lengthen the rows that have none, is the batch in one piece."""

from __future__ import annotations

import pytest
import torch

from multitune import errors, plan
from multitune.deltas import Prompt
from multitune.plan import DeltaSet, Plan


def prompts(backbone, lengths, seed=0):
    """One prompt per length; `None` where the length is 0."""
    generator = torch.Generator().manual_seed(seed)
    width = backbone.word_embeddings.shape[1]
    return [
        None
        if n == 0
        else DeltaSet({"embedding": [Prompt(vectors=torch.randn(n, width, generator=generator), at=(0,) * n)]})
        for n in lengths
    ]


@pytest.fixture
def batch(bert):
    ids = torch.randint(5, bert.vocab_size, (5, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[4, 5:] = 0
    return ids, mask


def test_pieces_equal_one_piece(bert, batch, monkeypatch):
    ids, mask = batch
    rows = prompts(bert, (3, 0, 2, 0, 0))
    whole = Plan(rows)
    monkeypatch.setattr(plan, "SPLIT_POSITIONS", 0)
    split = Plan(rows)
    assert not whole.parts and [mine for mine, _ in split.parts] == [[0, 2], [1, 3, 4]]
    with torch.no_grad():
        expected, found = bert.run(whole, ids, mask), bert.run(split, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_pieces(bert, batch, monkeypatch):
    ids, mask = batch
    rows = prompts(bert, (3, 0, 2, 0, 0))
    vectors = rows[0].by_site["embedding"][0].vectors.requires_grad_(True)
    weights = mask[..., None] * torch.randn(5, 7, bert.hidden_size, generator=torch.Generator().manual_seed(2))
    grads = []
    for limit in (10_000, 0):
        monkeypatch.setattr(plan, "SPLIT_POSITIONS", limit)
        (bert.run(Plan(rows), ids, mask) * weights).sum().backward()
        grads.append(vectors.grad.clone())
        vectors.grad = None
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_messages_name_the_rows_of_the_whole_batch(bert, monkeypatch):
    monkeypatch.setattr(plan, "SPLIT_POSITIONS", 0)
    split = Plan(prompts(bert, (0, 0, 0, 4)))
    ids = torch.full((4, bert.max_length), 7)
    with pytest.raises(errors.PlanError, match="row 3"):
        bert.run(split, ids)
    ids = torch.full((4, 5), 7)
    ids[2, 1] = bert.vocab_size
    with pytest.raises(errors.PlanError, match="row 2"):
        bert.run(split, ids)
