"""Law 1 for text: a row of a mixed batch gets the tokens it gets alone, and those of a model without any cache."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multitune import Adapter, Backbone, Bank, DeltaSet, LoRA, Plan, PromptTuning, PTuningV2, get_method, method_names
from multitune.generation import GenerationSettings
from multitune.generation.batch import DecodingBatch
from multitune.generation.prompts import make_sequence

SHAPES = ["gpt2", "opt", "llama", "gemma2", "gemma3_text"]
MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]
NEW = 8


def draws(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)


def alone(backbone, deltas, row, **kwargs):
    """One row's generation in a batch of its own."""
    with torch.no_grad():
        return backbone.generate(Plan([deltas]), torch.tensor([row]), settings={"max_new_tokens": NEW} | kwargs)[0]


def without_cache(backbone, deltas, row, count):
    """The slow twin: the whole row anew for every token, and the most likely one appended."""
    row = list(row)
    for _ in range(count):
        with torch.no_grad():
            row.append(int(backbone.logits(Plan([deltas]), torch.tensor([row]))[0, -1].argmax()))
    return row[-count:]


@pytest.mark.parametrize("name", SHAPES)
def test_every_method_in_one_batch_equals_every_row_alone_and_without_a_cache(lm, adapted, make_prompts, padded, name):
    backbone = lm(name)
    methods = [*MIXABLE, LoRA(r=2, targets=("embedding", "query"))]
    deltas = [*(adapted(name, method, i) for i, method in enumerate(methods)), None]
    lengths = [2 + (5 * i) % 11 for i in range(len(deltas))]
    rows = make_prompts(lengths)
    with torch.no_grad():
        plan = Plan(deltas)
    for side in ("left", "right"):
        ours = backbone.generate(plan, *padded(rows, side), settings={"max_new_tokens": NEW, "stop_at_eos": False})
        for method, one, row, generation in zip([*methods, None], deltas, rows, ours, strict=True):
            expected = without_cache(backbone, one, row, NEW)
            assert list(generation.token_ids) == expected, f"{method} padded on the {side}"
    bare = backbone.generate(Plan([None] * len(rows)), *padded(rows), settings={"max_new_tokens": NEW})
    differ = sum(a.token_ids[:3] != b.token_ids[:3] for a, b in zip(ours, bare, strict=True))
    assert differ > len(rows) // 2  # or equality would say nothing about the adapters


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_architectures_like_these_keep_rows_apart_too(lm, adapted, make_prompts, padded, name):
    """A method of every kind, in prompts shorter and longer than the windows."""
    backbone = lm(name)
    methods = ["lora", "ia3", "prefix", "ptuning_v2", "prompt", "aot_fc", "houlsby", None]
    deltas = [method and adapted(name, method, i) for i, method in enumerate(methods)]
    rows = make_prompts([2 + (5 * i) % 11 for i in range(len(methods))])
    with torch.no_grad():
        plan = Plan(deltas)
    ours = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": NEW, "stop_at_eos": False})
    for method, one, row, generation in zip(methods, deltas, rows, ours, strict=True):
        assert list(generation.token_ids) == without_cache(backbone, one, row, NEW), method


def test_beams_of_every_method_in_one_batch_equal_every_rows_own(lm, adapted, make_prompts, padded):
    backbone, names = lm("gpt2"), [*MIXABLE, None]
    deltas = [method and adapted("gpt2", method, i) for i, method in enumerate(names)]
    rows = make_prompts([2 + (5 * i) % 11 for i in range(len(names))])
    with torch.no_grad():
        plan = Plan(deltas)
    mixed = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": NEW, "num_beams": 2})
    for method, one, row, generation in zip(names, deltas, rows, mixed, strict=True):
        single = alone(backbone, one, row, num_beams=2)
        assert generation.token_ids == single.token_ids, method
        assert generation.score == pytest.approx(single.score, rel=1e-4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shift", [False, True])
def test_memories_of_other_lengths_and_layers_keep_their_places_under_windows(
    lm, adapted, make_prompts, padded, name, shift
):
    """Longer than the window, and of one length in one layer and another in the next."""
    backbone = lm(name)
    methods = [PTuningV2(length=n, shift_positions=shift, layers=at) for n, at in ((7, None), (2, (0,)), (9, (1,)))]
    deltas = [None, *(adapted(name, m, i) for i, m in enumerate(methods)), adapted(name, "lora", 4)]
    rows = make_prompts([9, 1, 8, 4, 6], seed=3)
    with torch.no_grad():
        plan = Plan(deltas)
    ours = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": 10, "stop_at_eos": False})
    for one, row, generation in zip(deltas, rows, ours, strict=True):
        assert list(generation.token_ids) == without_cache(backbone, one, row, 10)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_behind_the_text_stay_in_front_of_what_is_generated(lm, adapted, make_prompts, padded, name):
    """Without a cache that is a prompt at the place where the given text ended.

    The first token follows the last vector, whose state `Backbone.run` does not give, so the twin starts behind it.
    """
    backbone = lm(name)
    rows = make_prompts([5, 3, 6])
    deltas = [adapted(name, PromptTuning(length=2, position=p), 1) for p in (-1, 1, -1)]
    twins = [adapted(name, PromptTuning(length=2, position=p), 1) for p in (5, 1, 6)]
    with torch.no_grad():
        plan = Plan(deltas)
    ours = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": NEW, "stop_at_eos": False})
    for one, row, generation in zip(twins, rows, ours, strict=True):
        first, *rest = generation.token_ids
        assert rest == without_cache(backbone, one, [*row, first], NEW - 1)


def test_many_prompt_vectors_split_the_prefill_and_not_the_steps(lm, adapted, make_prompts, padded, monkeypatch):
    monkeypatch.setattr("multitune.plan.SPLIT_POSITIONS", 4)
    backbone = lm("llama")
    rows = make_prompts([5, 3, 6, 2])
    deltas = [None, adapted("llama", PromptTuning(length=6), 1), adapted("llama", "lora", 2), None]
    with torch.no_grad():
        plan = Plan(deltas)
    assert plan.parts
    ours = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": NEW, "stop_at_eos": False})
    for one, row, generation in zip(deltas, rows, ours, strict=True):
        assert list(generation.token_ids) == without_cache(backbone, one, row, NEW)


row_settings = st.one_of(
    st.just({}),
    st.builds(lambda k, p: {"num_beams": k, "length_penalty": p}, st.integers(2, 4), st.sampled_from([0.0, 1.0])),
    st.builds(
        lambda seed, t, k, p: {"temperature": t, "top_k": k, "top_p": p, "seed": seed},
        st.integers(0, 99),
        st.sampled_from([0.7, 1.5]),
        st.sampled_from([0, 5]),
        st.sampled_from([1.0, 0.8]),
    ),
    st.just({"repetition_penalty": 2.0}),
)
one_row = st.tuples(
    st.sampled_from([*MIXABLE, None]), st.integers(1, 14), st.integers(1, NEW), row_settings, st.integers(0, 3)
)


@draws(20)
@given(name=st.sampled_from(SHAPES), drawn=st.lists(one_row, min_size=2, max_size=6), seed=st.integers(0, 999))
def test_any_row_of_any_mix_equals_the_row_alone(lm, adapted, make_prompts, padded, name, drawn, seed):
    """Methods, lengths, numbers of tokens, beams, samples and penalties at random; rows end at other times."""
    backbone = lm(name)
    rows = make_prompts([n for _, n, _, _, _ in drawn], seed)
    deltas = [None if m is None else adapted(name, m, which) for m, _, _, _, which in drawn]
    own = [{"max_new_tokens": new} | chosen for _, _, new, chosen, _ in drawn]
    with torch.no_grad():
        plan = Plan(deltas)
    mixed = backbone.generate(plan, *padded(rows), settings=own)
    for one, row, chosen, generation in zip(deltas, rows, own, mixed, strict=True):
        single = alone(backbone, one, row, **chosen)
        assert generation.token_ids == single.token_ids
        assert generation.finish_reason == single.finish_reason


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_row_of_nans_ends_alone(lm, adapted, make_prompts, padded, name):
    """Its slot is taken by a later row, whose scores are numbers still."""
    backbone = lm(name)
    broken = nan_of(adapted(name, PTuningV2(length=3), 50))
    rows = make_prompts([4, 9, 6])
    with torch.no_grad():
        plan = Plan([None, broken, None])
    found = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": 10, "stop_at_eos": False})
    assert [g.finish_reason for g in found] == ["length", "not_finite", "length"]
    for i in (0, 2):
        assert list(found[i].token_ids) == without_cache(backbone, None, rows[i], 10)


def nan_of(deltas):
    """The same memories, all values NaN."""
    by_site = {
        site: [d.with_tensors({"values": d.values * torch.nan}) for d in of] for site, of in deltas.by_site.items()
    }
    return DeltaSet(by_site)


def test_aot_tables_and_factors_generate_the_same(lm, random_adapter, small_method, tmp_path, make_prompts):
    backbone = lm("llama")
    adapter = random_adapter(backbone, small_method("aot_fc", backbone), 1)
    adapter.save(tmp_path / "a")
    Adapter.load(tmp_path / "a").fuse(backbone)
    rows = [("a", row) for row in make_prompts([5, 3])] + [(None, make_prompts([4])[0])]
    texts = []
    for store in ("factors", "ram"):
        bank = Bank(backbone, aot_store=store)
        bank.add("a", tmp_path / "a")
        texts.append([g.token_ids for g in bank.generate(rows, {"max_new_tokens": NEW})])
    assert texts[0] == texts[1]


@draws(10)
@given(
    name=st.sampled_from(SHAPES),
    drawn=st.lists(
        st.tuples(st.sampled_from(["lora", "prefix", "ptuning_v2", "prompt", "aot_fc", "houlsby", None]),
                  st.integers(0, 1), st.integers(1, 5), st.sampled_from([{}, {"num_beams": 2}])),
        min_size=3, max_size=8,
    ),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_what_prompts_have_in_common_runs_once_and_changes_no_text(
    lm, adapted, make_prompts, monkeypatch, name, drawn, seed
):
    """Two beginnings, of which rows of one adapter may share one, and ends of other lengths."""
    backbone = lm(name)
    beginning = make_prompts([7], seed)[0]
    rows = [(beginning[:4] if fork else beginning) + end for (_, fork, _, _), end in
            zip(drawn, make_prompts([n for _, _, n, _ in drawn], seed + 1), strict=True)]  # fmt: skip
    found = []
    for least, most in ((1, 16), (1, 8192), (10**6, 8192)):  # shared in several passes, in one, and not
        monkeypatch.setattr("multitune.generation.batch.SHARED_POSITIONS", least)
        monkeypatch.setattr("multitune.generation.batch.PROMPT_POSITIONS", most)
        sequences = [
            make_sequence(
                backbone, tuple(row), m and adapted(name, m, 0), GenerationSettings(max_new_tokens=NEW, **chosen)
            )
            for row, (m, _, _, chosen) in zip(rows, drawn, strict=True)
        ]
        batch = DecodingBatch(backbone)
        batch.enter(sequences[:2])
        batch.step()
        batch.enter(sequences[2:])
        while batch.num_rows:
            batch.step()
        found.append([s.result().token_ids for s in sequences])
    assert found[0] == found[1] == found[2]


def test_a_shared_beginning_is_run_once(lm, make_prompts, monkeypatch):
    backbone = lm("llama")
    examples, ends = make_prompts([22])[0], make_prompts([3, 5, 2, 4], seed=1)
    sizes, forward = [], backbone.model.forward
    monkeypatch.setattr(backbone.model, "forward", lambda **k: sizes.append(k["input_ids"].numel()) or forward(**k))
    rows = [(None, examples + end) for end in ends]
    shared = Bank(backbone).generate(rows, {"max_new_tokens": 2, "stop_at_eos": False})
    assert sizes == [22, 4 * 5, 4]  # the examples, the ends, a step
    assert [g.token_ids for g in shared] == [tuple(without_cache(backbone, None, row, 2)) for _, row in rows]


def test_what_follows_a_shared_beginning_runs_in_passes_of_bounded_size(lm, make_prompts, monkeypatch):
    backbone = lm("llama")
    examples, ends = make_prompts([22])[0], make_prompts([3, 9, 2, 7, 8], seed=1)
    sizes, forward = [], backbone.model.forward
    monkeypatch.setattr(backbone.model, "forward", lambda **k: sizes.append(k["input_ids"].shape) or forward(**k))
    monkeypatch.setattr("multitune.generation.batch.PROMPT_POSITIONS", 20)
    rows = [(None, examples + end) for end in ends]
    found = Bank(backbone).generate(rows, {"max_new_tokens": 2, "stop_at_eos": False})
    assert sizes == [(1, 22), (2, 9), (2, 7), (1, 2), (5, 1)]
    assert [g.token_ids for g in found] == [tuple(without_cache(backbone, None, row, 2)) for _, row in rows]


def test_rows_that_are_done_leave_and_one_plan_serves_the_steps_between(lm, adapted, make_prompts, monkeypatch):
    backbone, plans, sizes = lm("llama"), [], []
    forward = backbone.model.forward
    monkeypatch.setattr(backbone.model, "forward", lambda **k: sizes.append(k["input_ids"].shape) or forward(**k))
    monkeypatch.setattr("multitune.generation.batch.Plan", lambda *a, **k: plans.append(len(a[0])) or Plan(*a, **k))
    batch = DecodingBatch(backbone)
    deltas = [None, *(adapted("llama", method) for method in ("lora", "prefix", "aot_fc"))]
    chosen = [GenerationSettings(max_new_tokens=3 if i < 4 else 8, stop_at_eos=False) for i in range(9)]
    rows = make_prompts([4] * 9)
    batch.enter([make_sequence(backbone, tuple(r), deltas[i % 4], chosen[i]) for i, r in enumerate(rows)])
    while batch.num_rows:
        batch.step()
    assert sizes == [(9, 4), *[(9, 1)] * 2, *[(5, 1)] * 5]
    assert plans == [9, 5]


@pytest.mark.parametrize("name", ["gemma2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_rows_apart_too(language_model, random_params, make_prompts, padded, name, dtype):
    """One eager, one fused attention; in bfloat16 another sum may be another token, so that shapes are all there is."""
    backbone = Backbone(language_model(name).to(dtype))
    methods = [PTuningV2(length=3), get_method("lora")(r=2), PromptTuning(length=2)]
    with torch.no_grad():
        deltas = [
            DeltaSet(m.deltas(random_params(backbone, m, i, std=0.1), backbone)).fused(dtype, backbone.device)
            for i, m in enumerate(methods)
        ]
        plan = Plan([*deltas, None])
    rows = make_prompts([5, 8, 3, 6])
    found = backbone.generate(plan, *padded(rows), settings={"max_new_tokens": NEW, "stop_at_eos": False})
    assert [(len(g.token_ids), g.finish_reason) for g in found] == [(NEW, "length")] * 4
    if dtype == torch.float64:
        for one, row, generation in zip([*deltas, None], rows, found, strict=True):
            assert list(generation.token_ids) == without_cache(backbone, one, row, NEW)
