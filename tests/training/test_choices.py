"""T-Few's losses against the equations, token by token in plain Python."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multitune as mt
from multitune.training.choices import LOSSES, Candidates, choice_loss, language_loss, unlikelihood_loss


def logits_of(probabilities):
    """`[S, T, 2]`: logits over two tokens, of which token 1 has these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([torch.log1p(-p), torch.log(p)], -1)


def from_logits(logits, ids, mask, counts, *, shift):
    """Candidates from whole logits `[S, T, V]`; with `shift` a position is about the next token."""
    mask = mask.bool()
    if shift:
        logits, ids, mask = logits[:, :-1], ids[:, 1:], mask[:, 1:]
    ids = ids.masked_fill(~mask, 0)
    log_probs = logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return Candidates(log_probs=log_probs.masked_fill(~mask, 0.0), mask=mask, counts=tuple(counts))


def whole_loss(candidates, answers):
    """All three of T-Few's losses."""
    return sum(loss(candidates, answers) for loss in LOSSES.values())


def hand_made():
    """Two rows: choices of 2 and 1 tokens; choices of 1, 2 and 1 tokens, all of them token 1."""
    p = [[0.5, 0.25], [0.1, 0.9], [0.2, 0.9], [0.5, 0.5], [0.8, 0.9]]
    mask = [[1, 1], [1, 0], [1, 0], [1, 1], [1, 0]]
    logits = logits_of(p)
    ids = torch.ones(5, 2, dtype=torch.long)
    return from_logits(logits, ids, torch.tensor(mask), (2, 3), shift=False)


def test_golden_numbers():
    c, answers = hand_made(), torch.tensor([0, 2])
    half = math.log(0.5)
    beta = [(half + math.log(0.25)) / 2, math.log(0.1), math.log(0.2), half, math.log(0.8)]
    assert c.scores().tolist() == pytest.approx(beta, rel=1e-6)
    # -(1.0397 + 0.2231) / 2
    assert float(language_loss(c, answers)) == pytest.approx(0.6314323, rel=1e-6)
    # row 0: -ln 0.9; row 1: -(ln 0.8 + ln 0.5 + ln 0.5) / 3
    expected = (-math.log(0.9) - (math.log(0.8) + 2 * half) / 3) / 2
    assert float(unlikelihood_loss(c, answers, eps=0)) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.3209199, rel=1e-6)
    # e^β: 0.3535534 of 0.4535534, and 0.8 of 1.5
    assert float(choice_loss(c, answers)) == pytest.approx((math.log(0.4535534 / 0.3535534) + math.log(1.5 / 0.8)) / 2)


def test_the_released_codes_stabiliser_keeps_certain_tokens_finite():
    """-log(1 - 1 + 0.01) is 4.605 a token, with a gradient; the equation itself is infinite there."""
    logits = torch.tensor([[[0.0, 1.0]], [[-200.0, 200.0]]], requires_grad=True)
    c = from_logits(logits, torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1), (2,), shift=False)
    value = unlikelihood_loss(c, torch.tensor([0]))
    assert value.item() == pytest.approx(-math.log(0.01), rel=1e-6)
    value.backward()
    assert torch.isfinite(logits.grad).all()
    assert unlikelihood_loss(c, torch.tensor([0]), eps=0).item() == math.inf
    with pytest.raises(mt.ConfigError, match="eps=-1"):
        unlikelihood_loss(c, torch.tensor([0]), eps=-1)


# ---- against the equations, on random batches


def by_the_equations(logits, ids, mask, counts, answers, eps):
    """L_LM, L_UL, L_LN and β in plain Python floats, position t predicting token t + 1."""
    s, betas, languages, unlikely, chosen = 0, [], [], [], []
    for count, answer in zip(counts, answers, strict=True):
        row, wrong, tokens = [], 0.0, 0
        for n in range(count):
            ps = []
            for t in range(1, len(ids[s])):
                if mask[s][t]:
                    scores = [math.exp(v) for v in logits[s][t - 1]]
                    ps.append(scores[ids[s][t]] / sum(scores))
            row.append(sum(math.log(p) for p in ps) / len(ps))
            if n != answer:
                wrong -= sum(math.log(1 - p + eps) for p in ps)
                tokens += len(ps)
            s += 1
        betas += row
        languages.append(-row[answer])
        unlikely.append(wrong / tokens if tokens else 0.0)
        chosen.append(-math.log(math.exp(row[answer]) / sum(math.exp(b) for b in row)))
    return *(sum(v) / len(counts) for v in (languages, unlikely, chosen)), betas


@st.composite
def batches(draw):
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    answers = [draw(st.integers(0, n - 1)) for n in counts]
    width = draw(st.integers(2, 6))
    spans = []
    for _ in range(sum(counts)):
        start = draw(st.integers(1, width - 1))
        spans.append((start, draw(st.integers(start + 1, width))))
    return counts, answers, width, spans, draw(st.integers(0, 2**20))


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_losses_are_those_of_the_equations(batch):
    counts, answers, width, spans, seed = batch
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(counts), width, 5, generator=g, dtype=torch.float64)
    ids = torch.randint(5, (sum(counts), width), generator=g)
    columns = torch.arange(width)
    mask = torch.stack([(columns >= a) & (columns < b) for a, b in spans])
    expected = by_the_equations(logits.tolist(), ids.tolist(), mask.tolist(), counts, answers, 0.01)
    read = torch.where(mask, ids, -100)  # what stands elsewhere is nobody's business
    c = from_logits(logits, read, mask, counts, shift=True)
    found = [float(loss(c, torch.tensor(answers))) for loss in (language_loss, unlikelihood_loss, choice_loss)]
    assert found == pytest.approx(expected[:3], rel=1e-4, abs=1e-6)
    assert c.scores().tolist() == pytest.approx(expected[3], rel=1e-4)


def test_a_rows_loss_is_its_own(close):
    """A batch's loss is the mean over its rows, whatever their numbers of choices and tokens."""
    g = torch.Generator().manual_seed(0)
    counts, answers = (3, 1, 2), torch.tensor([1, 0, 0])
    logits, ids = torch.randn(6, 5, 7, generator=g), torch.randint(7, (6, 5), generator=g)
    mask = torch.tensor(
        [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
    )
    whole = whole_loss(from_logits(logits, ids, mask, counts, shift=True), answers)
    each, first = [], 0
    for n, answer in zip(counts, answers, strict=True):
        own = slice(first, first + n)
        one = from_logits(logits[own], ids[own], mask[own], (n,), shift=True)
        each.append(whole_loss(one, answer[None]))
        first += n
    close(whole, torch.stack(each).mean())


def test_gradients_reach_candidates_alone_and_raise_the_right_one():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 4, 6, generator=g, requires_grad=True)
    ids = torch.randint(6, (3, 4), generator=g)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]])
    c = from_logits(logits, ids, mask, (3,), shift=True)
    before = c.scores().softmax(0)[1]
    whole_loss(c, torch.tensor([1])).backward()
    predicting = torch.zeros(3, 4, dtype=torch.bool)
    predicting[:, :-1] = mask[:, 1:].bool()
    assert bool((logits.grad[~predicting] == 0).all()) and bool((logits.grad[predicting].abs().sum(-1) > 0).all())
    moved = from_logits((logits - logits.grad).detach(), ids, mask, (3,), shift=True)
    assert moved.scores().softmax(0)[1] > before


def test_batches_that_do_not_fit_are_refused():
    logits, ids, mask = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [0, 0, 1]])
    for wrong, problem in [
        (dict(counts=(3,)), "one sequence for every choice"),
        (dict(counts=(2, 0)), "every row at least one"),
        (dict(mask=mask * torch.tensor([[1], [0]])), "sequence 1 has no token of a candidate"),
    ]:
        with pytest.raises(mt.ConfigError, match=problem):
            from_logits(**(dict(logits=logits, ids=ids, mask=mask, counts=(2,)) | wrong), shift=True)
    c = from_logits(logits, ids, mask, (2,), shift=True)
    for answers in ([2], [-1], [0, 0]):
        for loss in (language_loss, unlikelihood_loss, choice_loss):
            with pytest.raises(mt.ConfigError, match=r"do not fit rows of \[2\] choices"):
                loss(c, torch.tensor(answers))


def test_a_choice_of_several_texts_has_the_mean_of_their_scores():
    """The second of two choices is said by a text of two tokens and one of one: all of them wrong, or all right."""
    p, mask = [[0.4, 0.1], [0.5, 0.25], [0.2, 0.9]], [[1, 0], [1, 1], [1, 0]]
    c = from_logits(logits_of(p), torch.ones(3, 2, dtype=torch.long), torch.tensor(mask), (3,), shift=False)
    c = dataclasses.replace(c, counts=(2,), texts=(1, 2))
    beta = (math.log(0.4), ((math.log(0.5) + math.log(0.25)) / 2 + math.log(0.2)) / 2)
    assert c.scores().tolist() == pytest.approx(beta, rel=1e-6)
    first, second = torch.tensor([0]), torch.tensor([1])
    assert float(language_loss(c, second)) == pytest.approx(-beta[1], rel=1e-6)
    expected = -(math.log(0.5) + math.log(0.75) + math.log(0.8)) / 3
    assert float(unlikelihood_loss(c, first, eps=0)) == pytest.approx(expected, rel=1e-6)
    assert float(unlikelihood_loss(c, second, eps=0)) == pytest.approx(-math.log(0.6), rel=1e-6)
    expected = -math.log(math.exp(beta[1]) / sum(map(math.exp, beta)))
    assert float(choice_loss(c, second)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(mt.ConfigError, match=r"texts \(1, 1\) do not fit"):
        dataclasses.replace(c, texts=(1, 1))


def test_several_texts_of_a_row_do_not_reach_into_the_next():
    p, mask = [[0.4], [0.5], [0.2], [0.9], [0.7]], torch.ones(5, 1)
    c = from_logits(logits_of(p), torch.ones(5, 1, dtype=torch.long), mask, (5,), shift=False)
    c = dataclasses.replace(c, counts=(2, 2), texts=(2, 1, 1, 1))
    expected = (-math.log(1 - 0.2) - math.log(1 - 0.9)) / 2
    assert float(unlikelihood_loss(c, torch.tensor([0, 1]), eps=0)) == pytest.approx(expected, rel=1e-6)
    expected = (-(math.log(0.6) + math.log(0.5)) / 2 - math.log(1 - 0.7)) / 2
    assert float(unlikelihood_loss(c, torch.tensor([1, 0]), eps=0)) == pytest.approx(expected, rel=1e-5)
