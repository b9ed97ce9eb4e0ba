"""Encoder-decoders that write: bare, transformers' own text; in a mix, every row's text is the one it gets alone."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from multitune import (
    Backbone,
    Bank,
    ConfigError,
    DeltaSet,
    Engine,
    Plan,
    PlanError,
    PTuningV2,
    get_method,
    method_names,
)
from multitune.cross_cache import CrossCache
from multitune.generation import GenerationSettings
from multitune.generation.batch import DecodingBatch
from multitune.generation.prompts import make_sequence

WRITERS = ["t5/writes", "t5/gated/writes", "bart/writes"]
MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]
ENDS = [11, 23, 37, 53, 71, 89]
LENGTHS = [7, 3, 9, 1]
NEW = 9


@pytest.fixture(scope="module")
def model(make_model):
    """`model(name)`: transformers' model with a head of its own, scores far apart."""

    def make(name, **overrides):
        whole = make_model(name, **overrides).eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(5)
            whole.lm_head.weight = nn.Parameter(torch.randn(97, 32) * (6 if name.startswith("t5/w") else 1))
        whole.generation_config.eos_token_id = ENDS
        return whole

    return make


@pytest.fixture(scope="module")
def writer(model, make_backbone):
    """`writer(name)`: the same model as a backbone; shared."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = Backbone(copy.deepcopy(model(name)), make_backbone("gpt2").tokenizer, name=name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def served(writer, small_method, random_params):
    """`served(name, method, seed)`: the deltas of a random adapter; `None` for no method or one that does not fit."""
    made = {}

    def make(name, method, seed=0):
        key = (name, method, seed)
        if key not in made:
            backbone = writer(name)
            try:
                chosen = small_method(method, backbone) if isinstance(method, str) else method
                if method == "ptuning_v2":
                    chosen = PTuningV2(length=5)
                params = random_params(backbone, chosen, seed, std=0.1) if chosen is not None else {}
            except ConfigError:
                chosen = None
            deltas = None if chosen is None else DeltaSet(chosen.deltas(params, backbone))
            made[key] = None if deltas is None else deltas.fused(backbone.dtype, backbone.device)
        return made[key]

    return make


def theirs(model, row, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    return cut(model.generate(torch.tensor([row]), **settings)[0, 1:].tolist())


def cut(tokens):
    end = next((i for i, token in enumerate(tokens) if token in ENDS), len(tokens))
    return tokens[: end + 1]


def alone(backbone, deltas, row, **kwargs):
    with torch.no_grad():
        return backbone.generate(Plan([deltas]), torch.tensor([row]), settings={"max_new_tokens": NEW} | kwargs)[0]


def without_cache(backbone, deltas, row, count):
    """The slow twin: both stacks anew for every token, and the most likely one appended."""
    written = [4]
    for _ in range(count):
        with torch.no_grad():
            hidden = backbone.run(Plan([deltas]), torch.tensor([row]), decoder_input_ids=torch.tensor([written]))
        written.append(int(backbone.lm_head(hidden)[0, -1].argmax()))
    return written[1:]


# ---- the bare model


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(repetition_penalty=1.5),
        dict(num_beams=3),
        dict(num_beams=2, early_stopping=True, length_penalty=2.0),
        dict(num_beams=3, early_stopping="never", length_penalty=0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", WRITERS)
def test_text_is_transformers_own(writer, model, make_prompts, padded, name, settings):
    backbone, own = writer(name), model(name)
    rows = make_prompts(LENGTHS, seed=1)
    expected = [theirs(own, row, **settings) for row in rows]
    for side in ("left", "right"):
        ours = backbone.generate(Plan([None] * 4), *padded(rows, side), settings={"max_new_tokens": NEW} | settings)
        assert [list(g.token_ids) for g in ours] == expected
    assert len({tuple(tokens) for tokens in expected}) > 2


def test_a_forced_first_word_is_forced(writer, model, make_prompts, padded):
    own = model("bart/writes", forced_bos_token_id=30)
    own.generation_config.forced_bos_token_id = 30
    backbone = Backbone(copy.deepcopy(own))
    rows = make_prompts(LENGTHS)
    for beams in (1, 3):
        ours = backbone.generate(Plan([None] * 4), *padded(rows), settings={"max_new_tokens": NEW, "num_beams": beams})
        assert all(g.token_ids[0] == 30 for g in ours)
        assert [list(g.token_ids) for g in ours] == [theirs(own, row, num_beams=beams) for row in rows]


# ---- mixes


@pytest.mark.parametrize("name", WRITERS)
def test_every_method_in_one_batch_equals_every_row_alone_and_without_a_cache(
    writer, served, make_prompts, padded, name
):
    backbone = writer(name)
    deltas = [*(served(name, method, i) for i, method in enumerate(MIXABLE)), None]
    rows = make_prompts([2 + (5 * i) % 11 for i in range(len(deltas))])
    with torch.no_grad():
        plan = Plan(deltas)
    ours = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": NEW, "stop_at_eos": False})
    for method, one, row, generation in zip([*MIXABLE, None], deltas, rows, ours, strict=True):
        assert list(generation.token_ids) == without_cache(backbone, one, row, NEW), method
    bare = backbone.generate(
        Plan([None] * len(rows)), *padded(rows), settings={"max_new_tokens": NEW, "stop_at_eos": False}
    )
    differ = sum(a.token_ids != b.token_ids for a, b in zip(ours, bare, strict=True))
    assert differ > len(rows) // 2  # or equality would say nothing about the adapters


@pytest.mark.parametrize("name", WRITERS)
def test_memories_of_other_lengths_and_layers_keep_their_places(writer, served, make_prompts, padded, name):
    """In decoder and cross-attention, of one length in one layer and another in the next."""
    backbone = writer(name)
    first = backbone.num_encoder_layers
    layers = (None, (first,), (first + 1,), (0, first + 1))
    methods = [PTuningV2(length=n, layers=at) for n, at in zip((7, 2, 9, 4), layers, strict=True)]
    deltas = [None, *(served(name, m, i) for i, m in enumerate(methods)), served(name, "lora", 4)]
    rows = make_prompts([9, 1, 8, 4, 6, 3], seed=3)
    with torch.no_grad():
        plan = Plan(deltas)
    ours = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": 10, "stop_at_eos": False})
    for one, row, generation in zip(deltas, rows, ours, strict=True):
        assert list(generation.token_ids) == without_cache(backbone, one, row, 10)


row_settings = st.one_of(
    st.just({}),
    st.builds(lambda k, p: {"num_beams": k, "length_penalty": p}, st.integers(2, 4), st.sampled_from([0.0, 1.0])),
    st.builds(lambda seed, t: {"temperature": t, "seed": seed}, st.integers(0, 99), st.sampled_from([0.7, 1.5])),
    st.just({"repetition_penalty": 2.0}),
)
one_row = st.tuples(
    st.sampled_from([*MIXABLE, None]), st.integers(1, 12), st.integers(1, NEW), row_settings, st.integers(0, 5)
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(WRITERS), drawn=st.lists(one_row, min_size=2, max_size=6), data=st.data())
def test_rows_that_come_and_go_get_the_text_they_get_alone(writer, served, make_prompts, name, drawn, data):
    """Greedy, sampled and by beams, entering after random numbers of steps, beside rows that leave."""
    backbone = writer(name)
    batch = DecodingBatch(backbone)
    waiting = []
    for i, (method, length, new, own, _) in enumerate(drawn):
        deltas = served(name, method, i % 2) if method else None
        (row,) = make_prompts([length], seed=i)
        chosen = GenerationSettings(max_new_tokens=new, **own)
        waiting.append((drawn[i][4], make_sequence(backbone, tuple(row), deltas, chosen), deltas, row, new, own))
    sequences, step = list(waiting), 0
    while waiting or batch.num_rows:
        entering = [w for w in waiting if w[0] <= step]
        waiting = [w for w in waiting if w[0] > step]
        batch.enter([w[1] for w in entering])
        batch.step()
        step += 1
    for _, sequence, deltas, row, new, own in sequences:
        expected = alone(backbone, deltas, row, **({"max_new_tokens": new} | own))
        assert sequence.result().token_ids == expected.token_ids


def test_an_engine_serves_requests_as_they_come_and_streams(writer, make_prompts):
    backbone = writer("t5/writes")
    bank = Bank(backbone)
    engine = Engine(bank, max_rows=2)
    rows = make_prompts([5, 2, 7, 4, 3])
    requests = [engine.submit(row, settings={"max_new_tokens": 1 + i}) for i, row in enumerate(rows)]
    engine.run()
    for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
        expected = alone(backbone, None, row, max_new_tokens=1 + i)
        assert request.result().token_ids == expected.token_ids
        assert "".join(request) == expected.text


def test_rooms_of_encoder_and_decoder_are_checked_apart(writer, make_prompts):
    backbone = writer("bart/writes")
    (row,) = make_prompts([40])
    assert len(alone(backbone, None, row, max_new_tokens=40, stop_at_eos=False).token_ids) == 40
    with pytest.raises(PlanError, match="row 0: up to 41 new tokens, but the decoder of backbone .* has 40"):
        alone(backbone, None, row, max_new_tokens=41)
    with pytest.raises(PlanError, match=r"row 0: 41 tokens and 0 of its adapter's prompt, but the encoder .* has 40"):
        alone(backbone, None, [*row, 5])


def test_one_rows_nan_stays_in_its_row(writer, served, make_prompts, padded):
    backbone = writer("t5/writes")
    good = served("t5/writes", "prefix", 0)
    bad = DeltaSet({site: [d.map(lambda t: t * float("nan")) for d in of] for site, of in good.by_site.items()})
    rows = make_prompts([5, 8, 3])
    bad = bad.fused(backbone.dtype, backbone.device)
    batch = DecodingBatch(backbone)
    chosen = GenerationSettings(max_new_tokens=NEW, stop_at_eos=False)
    first = [
        make_sequence(backbone, tuple(rows[0]), bad, chosen),
        make_sequence(backbone, tuple(rows[1]), good, chosen),
    ]
    batch.enter(first)
    batch.step()
    later = make_sequence(backbone, tuple(rows[2]), good, chosen)
    batch.enter([later])
    while batch.num_rows:
        batch.step()
    assert first[0].result().finish_reason == "not_finite"
    for sequence, row in ((first[1], rows[1]), (later, rows[2])):
        assert sequence.result().token_ids == alone(backbone, good, row, stop_at_eos=False).token_ids


# ---- the cache


def test_a_slot_holds_its_own_memory_and_tokens_through_moves():
    g = torch.Generator().manual_seed(0)
    cache = CrossCache(1, torch.device("cpu"))
    memory = torch.randn(2, 3, 4, generator=g)

    def enter(counts, memories):
        keys = torch.randn(len(counts), 2, max(counts), 4, generator=g)
        cache.enter(counts, memories)
        cache.update(keys, keys, 0)
        return keys

    first = enter([2, 4], [{}, {0: (memory, memory)}])
    second = enter([6], [{}])
    assert cache.layers[0].lengths == [2, 7, 6]
    cache.repeat(1, 2)
    cache.remove(0)
    kept = cache.layers[0].keys
    assert sorted(cache.layers[0].lengths) == [6, 7, 7, 7]
    order = cache.layers[0].lengths.index(6)
    assert torch.equal(kept[order, :, :6], second[0])
    for slot in {0, 1, 2, 3} - {order}:
        assert torch.equal(kept[slot, :, :3], memory)
        assert torch.equal(kept[slot, :, 3:7], first[1, :, :4])
