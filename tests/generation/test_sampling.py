"""What is drawn: transformers' distributions, by the row's own random numbers."""

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from multitune import ConfigError, GenerationSettings, Plan
from multitune.generation.sampling import Chooser, choose

DRAWS = 4000
SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.6, top_k=7),
    dict(temperature=1.7, top_p=0.7),
    dict(temperature=1.2, top_k=9, top_p=0.5),
    dict(temperature=1.0, repetition_penalty=1.8, top_p=0.9),
    dict(temperature=1.0, top_k=500),
    dict(temperature=1.0, top_p=1e-6),
]
SEEN = [3, 5, 8]


def theirs(logits, chosen):
    """Probabilities `[V]` by transformers' own processors."""
    steps = LogitsProcessorList()
    if "repetition_penalty" in chosen:
        steps.append(RepetitionPenaltyLogitsProcessor(chosen["repetition_penalty"]))
    steps.append(TemperatureLogitsWarper(chosen["temperature"]))
    if "top_k" in chosen:
        steps.append(TopKLogitsWarper(chosen["top_k"]))
    if "top_p" in chosen:
        steps.append(TopPLogitsWarper(chosen["top_p"]))
    return steps(torch.tensor([SEEN]), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_draws_follow_transformers_distribution(chosen):
    """Every setting in one batch with others, and the counts of many draws against the probabilities."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    expected = theirs(logits, chosen)
    others = [GenerationSettings(temperature=0.3, top_k=2, seed=1), GenerationSettings()]
    counts = torch.zeros(40)
    batch = 100
    for start in range(0, DRAWS, batch):
        mine = [Chooser(GenerationSettings(**chosen, seed=start + i), set(SEEN)) for i in range(batch)]
        rows = torch.stack([logits] * batch + [torch.randn(40)] * 2)
        tokens, _ = choose(rows, [*mine, *(Chooser(o, {1}) for o in others)], False)
        counts += torch.bincount(torch.tensor(tokens[:batch]), minlength=40)
    assert (counts[expected == 0] == 0).all()
    # A count is binomial: five standard deviations leave one chance in a million per token.
    spread = (expected * (1 - expected) * DRAWS).sqrt()
    assert ((counts - expected * DRAWS).abs() <= 5 * spread + 1e-3).all()


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e308])
def test_no_temperature_is_too_low_or_too_high_for_a_float(temperature):
    logits = torch.tensor([[3.0, 21.0, 20.9, -5.0], [0.0, 5.0, 5.0, 1.0]])
    mine = [Chooser(GenerationSettings(temperature=temperature, seed=seed), set()) for seed in (1, 2)]
    tokens = [choose(logits, mine, False)[0] for _ in range(40)]
    expected = {(1, 1), (1, 2)} if temperature < 1 else {(a, b) for a in range(4) for b in range(4)}
    assert {tuple(row) for row in tokens} <= expected and len({tuple(row) for row in tokens}) > 1


def test_a_rows_sample_depends_on_its_seed_and_on_no_other_row(lm, make_prompts, padded):
    backbone = lm("llama")
    rows = make_prompts([5, 8, 5, 3])
    rows[2] = rows[0]
    own = [dict(max_new_tokens=10, temperature=2.0, seed=seed, stop_at_eos=False) for seed in (7, 7, 7, 9)]
    mixed = backbone.generate(Plan([None] * 4), *padded(rows), settings=own)
    for row, chosen, generation in zip(rows, own, mixed, strict=True):
        single = backbone.generate(Plan([None]), torch.tensor([row]), settings=chosen)[0]
        assert generation.token_ids == single.token_ids
    assert mixed[0].token_ids == mixed[2].token_ids  # one prompt and one seed
    other = backbone.generate(Plan([None]), torch.tensor([rows[0]]), settings=own[0] | {"seed": 8})[0]
    assert other.token_ids != mixed[0].token_ids
    free = [backbone.generate(Plan([None]), torch.tensor([rows[0]]), settings=own[0] | {"seed": None})[0] for _ in "ab"]
    assert free[0].token_ids != free[1].token_ids


@pytest.mark.parametrize("beams", [1, 3])
def test_logprobs_are_the_models_own(lm, language_model, make_prompts, close, beams):
    """Before temperature, penalty and top k, whatever was chosen by them."""
    own = {"num_beams": 3} if beams > 1 else {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "seed": 1}
    row = make_prompts([5])[0]
    settings = {"max_new_tokens": 6, "logprobs": True, "stop_at_eos": False} | own
    found = lm("llama").generate(Plan([None]), torch.tensor([row]), settings=settings)[0]
    with torch.no_grad():
        scores = language_model("llama")(input_ids=torch.tensor([[*row, *found.token_ids]])).logits[0].log_softmax(-1)
    expected = scores[4:-1].gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
    close(torch.tensor(found.logprobs), expected)
    quiet = lm("llama").generate(Plan([None]), torch.tensor([row]), settings=settings | {"logprobs": False})[0]
    assert quiet.logprobs is None and quiet.token_ids == found.token_ids


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (dict(max_new_tokens=0), r"max_new_tokens=0 is not possible; give at least 1"),
        (dict(max_new_tokens=True), r"max_new_tokens=True is not possible"),
        (dict(temperature=-1), r"temperature=-1 is not possible; give 0 or more"),
        (dict(temperature=float("nan")), r"temperature=nan is not possible"),
        (dict(top_k=3), r"top_k and top_p narrow what is drawn; give a temperature"),
        (dict(top_p=1.5, temperature=1), r"top_p=1.5 is not possible; give above 0 and at most 1"),
        (dict(num_beams=2, temperature=1.0), r"a beam search draws nothing"),
        (dict(early_stopping="soon"), r"early_stopping='soon' is not possible; give a bool or 'never'"),
        (dict(stop=("",)), r"give strings that are not empty"),
        (dict(seed=-1), r"seed=-1 is not possible"),
        (dict(repetition_penalty=0), r"repetition_penalty=0 is not possible; give above 0"),
        (dict(max_new_tokens="20"), r"max_new_tokens='20' is not possible; give a whole number, at least 1"),
        (dict(temperature=None), r"temperature=None is not possible; give a number, 0 or more"),
        (dict(seed="3"), r"seed='3' is not possible; give a whole number, from 0, or None"),
        (dict(stop=None), r"stop=None is not possible; give strings"),
        (dict(num_beams=2, length_penalty="1"), r"length_penalty='1' is not possible; give a number, between"),
        (dict(num_beams=2, length_penalty=float("nan")), r"length_penalty=nan is not possible"),
        (dict(num_beams=2, length_penalty=-400.0), r"length_penalty=-400\.0 is not possible; give between -10 and 10"),
        (dict(early_stopping=1, num_beams=2), r"early_stopping=1 is not possible; give a bool or 'never'"),
        (dict(stop_at_eos="no"), r"stop_at_eos='no' is not possible; give True or False"),
        (dict(logprobs=1), r"logprobs=1 is not possible; give True or False"),
        (dict(length_penalty=2.0), r"length_penalty=2\.0 is for a beam search; give num_beams above 1"),
        (dict(early_stopping="never"), r"early_stopping='never' is for a beam search"),
    ],
)
def test_impossible_settings_are_refused(chosen, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**chosen)


@pytest.mark.parametrize("penalty", [-10, 10.0])
def test_the_steepest_length_penalties_give_scores(lm, make_prompts, penalty):
    settings = {"max_new_tokens": 30, "num_beams": 2, "length_penalty": penalty, "logprobs": True}
    found = lm("llama").generate(Plan([None]), torch.tensor(make_prompts([5])), settings=settings)[0]
    assert found.score == pytest.approx(sum(found.logprobs) / len(found.token_ids) ** penalty, rel=1e-3)
