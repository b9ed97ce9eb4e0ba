"""Continuous batching: requests come and go at random, and each gets the text it would get alone."""

import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multitune import (
    AdapterError,
    BackboneError,
    Bank,
    ConfigError,
    DataError,
    Engine,
    Head,
    MixError,
    Plan,
    PlanError,
    Task,
    get_method,
    method_names,
)
from multitune.errors import DataWarning
from multitune.generation.prompts import encode_for_task
from multitune.generation.text import TextStream

MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]
NAMES = ["gpt2", "opt", "llama", "gemma2", "gemma3_text"]


@pytest.fixture(scope="module")
def bank(lm, small_method, random_adapter, tmp_path_factory):
    """`bank(name)`: a bank with one adapter of every method, by the method's name."""
    made = {}

    def make(name):
        if name not in made:
            backbone = lm(name)
            made[name] = Bank(backbone)
            for i, method in enumerate(MIXABLE):
                adapter = random_adapter(backbone, small_method(method, backbone), i)
                folder = tmp_path_factory.mktemp(name) / method
                adapter.save(folder)
                made[name].add(method, folder)
        return made[name]

    return make


def alone(bank, adapter, prompt, chosen):
    return bank.generate([(adapter, prompt)], chosen)[0]


requests = st.tuples(
    st.sampled_from([*MIXABLE, None]),
    st.integers(1, 14),
    st.builds(
        lambda new, ends, own: {"max_new_tokens": new, "stop_at_eos": ends} | own,
        st.integers(1, 10),
        st.booleans(),
        st.one_of(
            st.just({}),
            st.builds(lambda beams: {"num_beams": beams}, st.integers(2, 3)),
            st.builds(lambda seed, p: {"temperature": 1.2, "top_p": p, "seed": seed}, st.integers(0, 9), st.just(0.9)),
            st.just({"repetition_penalty": 2.0}),
        ),
    ),
    st.integers(0, 4),
)


@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    name=st.sampled_from(NAMES),
    drawn=st.lists(requests, min_size=2, max_size=9),
    max_rows=st.integers(3, 6),
    max_tokens=st.sampled_from([None, 90, 150]),
    seed=st.integers(0, 999),
)
def test_random_arrivals_change_no_text(bank, make_prompts, name, drawn, max_rows, max_tokens, seed):
    here = bank(name)
    prompts = make_prompts([n for _, n, _, _ in drawn], seed)
    engine = Engine(here, max_rows=max_rows, max_tokens=max_tokens)
    running, most = [], 0
    for (adapter, _, chosen, steps_before), prompt in zip(drawn, prompts, strict=True):
        for _ in range(steps_before):
            engine.step()
            most = max(most, engine.num_running)
        running.append(engine.submit(prompt, adapter=adapter, settings=chosen))
    engine.run()
    assert most <= max_rows
    assert engine.num_running == engine.num_waiting == 0
    for (adapter, _, chosen, _), prompt, request in zip(drawn, prompts, running, strict=True):
        found, expected = request.result(timeout=0), alone(here, adapter, prompt, chosen)
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert "".join(request) == found.text
        assert found.adapter == adapter


def test_rows_leave_and_others_take_their_places(bank, make_prompts):
    """No more forward passes than the rows need: 8 rows of 6 tokens, 4 at a time, are two times five steps."""
    here = bank("llama")
    engine = Engine(here, max_rows=4)
    for prompt in make_prompts([3] * 8):
        engine.submit(prompt, settings={"max_new_tokens": 6, "stop_at_eos": False})
    seen = []
    while engine.step():
        seen.append((engine.num_running, engine.num_waiting))
    # A step that lets requests in gives them the prompt's token and the next one.
    assert seen == [(4, 4)] * 4 + [(0, 4)] + [(4, 0)] * 4


def test_no_more_positions_are_held_than_allowed(bank, make_prompts):
    engine = Engine(bank("llama"), max_rows=8, max_tokens=40)
    for prompt in make_prompts([6] * 5):
        engine.submit(prompt, settings={"max_new_tokens": 10, "stop_at_eos": False})
    most = 0
    while engine.step():
        most = max(most, engine.num_running)
    assert most == 2  # of 16 positions each
    with pytest.raises(PlanError, match=r"request: it may come to hold 48 positions, but max_tokens=40"):
        engine.submit(make_prompts([6])[0], settings={"max_new_tokens": 10, "num_beams": 3})
    with pytest.raises(PlanError, match="9 beams are more rows than max_rows=8; lower num_beams"):
        engine.submit([5], settings={"max_new_tokens": 1, "num_beams": 9})
    with pytest.raises(ConfigError, match="max_rows=0 is not possible"):
        Engine(bank("llama"), max_rows=0)


def test_a_server_drives_it_from_a_thread(bank, make_prompts):
    here = bank("llama")
    engine = Engine(here, max_rows=3)
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            engine.step()

    server = threading.Thread(target=serve)
    server.start()
    try:
        prompts, got = make_prompts([5, 2, 7, 3, 4, 6]), {}

        def client(i):
            adapter = MIXABLE[i]
            got[i] = "".join(engine.submit(prompts[i], adapter=adapter, settings={"max_new_tokens": 8}))

        clients = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(timeout=60)
    finally:
        stop.set()
        server.join()
    for i, prompt in enumerate(prompts):
        assert got[i] == alone(here, MIXABLE[i], prompt, {"max_new_tokens": 8}).text


def test_a_cancelled_request_leaves_with_what_it_has(bank, make_prompts):
    here = bank("llama")
    engine = Engine(here, max_rows=2)
    chosen = {"max_new_tokens": 10, "stop_at_eos": False}
    first, second, third = (engine.submit(p, adapter="lora", settings=chosen) for p in make_prompts([4, 6, 3]))
    engine.step()
    engine.cancel(first)
    engine.cancel(third)
    engine.run()
    assert first.result().finish_reason == third.result().finish_reason == "cancelled"
    assert len(first.result().token_ids) == 2 and third.result().token_ids == ()
    expected = alone(here, "lora", make_prompts([4, 6, 3])[1], chosen)
    assert second.result().token_ids == expected.token_ids
    engine.cancel(second)  # done already
    assert second.result().finish_reason == "length"


def test_a_removed_adapter_serves_the_requests_it_had(lm, random_adapter, small_method, tmp_path, make_prompts):
    bank = Bank(lm("llama"))
    bank.add("a", random_adapter(lm("llama"), small_method("lora", None), 1))
    prompt = make_prompts([4])[0]
    expected = alone(bank, "a", prompt, {"max_new_tokens": 6})
    engine = Engine(bank)
    request = engine.submit(prompt, adapter="a", settings={"max_new_tokens": 6})
    bank.remove("a")
    engine.run()
    assert request.result().token_ids == expected.token_ids
    with pytest.raises(AdapterError, match="the bank has no adapter 'a'"):
        engine.submit(prompt, adapter="a")


def test_an_adapter_that_is_gone_is_not_kept_by_a_batch_that_goes_on(lm, random_adapter, small_method, make_prompts):
    bank = Bank(lm("llama"))
    bank.add("a", random_adapter(lm("llama"), small_method("ptuning_v2", None), 1))
    engine = Engine(bank)
    long, short = make_prompts([4, 5])
    going = engine.submit(long, settings={"max_new_tokens": 12, "stop_at_eos": False})
    engine.submit(short, adapter="a", settings={"max_new_tokens": 2})
    (deltas,) = map(weakref.ref, bank.delta_sets(["a"]))
    bank.remove("a")
    for _ in range(4):
        engine.step()
    gc.collect()
    assert not going.done and engine.num_running == 1
    assert deltas() is None


def test_an_adapter_that_is_replaced_while_it_is_read_is_asked_in_its_own_words(
    lm, small_method, random_adapter, monkeypatch
):
    """What writes a row out and what answers it are of one adapter."""
    backbone = lm("llama")
    put = dict(name="w", kind="generation", label="y", format="plain")
    tasks = [Task(template=(template,), **put) for template in ("{text}", "a {text}")]
    old, new = (
        dataclasses.replace(
            random_adapter(backbone, small_method("lora", backbone), i),
            task=task, head=Head.for_task(task), head_params={},
        )
        for i, task in enumerate(tasks)
    )  # fmt: skip
    bank, served = Bank(backbone), Bank.served
    bank.add("a", old)
    expected = alone(bank, "a", "good film", {"max_new_tokens": 6})

    def replaces(self, names, first=0):
        found = served(self, names, first)
        bank.remove("a")
        bank.add("a", new)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Bank, "served", replaces)
        found = alone(bank, "a", "good film", {"max_new_tokens": 6})
    assert found == expected
    assert alone(bank, "a", "good film", {"max_new_tokens": 6}).num_prompt_tokens == expected.num_prompt_tokens + 1


def test_a_text_that_cannot_be_decoded_fails_its_own_request(bank, make_prompts):
    here, prompts = bank("llama"), make_prompts([4, 6, 3])
    chosen = {"max_new_tokens": 5, "stop_at_eos": False}
    engine = Engine(here)
    requests = [engine.submit(prompt, settings=chosen) for prompt in prompts]

    def decode(ids):
        raise TypeError("no such piece")

    requests[1].sequence.stream = TextStream(decode)
    engine.run()
    for ask in (requests[1].result, lambda: list(requests[1])):
        with pytest.raises(TypeError, match="no such piece"):
            ask()
    for i in (0, 2):
        assert requests[i].result(timeout=0) == alone(here, None, prompts[i], chosen)


def test_a_failing_step_reaches_its_requests_and_no_later_ones(bank, make_prompts, monkeypatch):
    here = bank("llama")
    engine = Engine(here)
    prompt = make_prompts([4])[0]
    failed = engine.submit(prompt, settings={"max_new_tokens": 4})

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(here.backbone.model.layers[1].mlp, "forward", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    with pytest.raises(RuntimeError, match="out of memory"):
        failed.result()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(failed)
    request = engine.submit(prompt, settings={"max_new_tokens": 4})
    engine.run()
    assert request.result().token_ids == alone(here, None, prompt, {"max_new_tokens": 4}).token_ids


@pytest.mark.parametrize(
    "chosen",
    [
        {"num_beams": 2, "length_penalty": "1"}, {"temperature": None}, {"max_new_tokens": "4"}, {"seed": "3"},
        {"stop": None}, {"num_beams": 2, "length_penalty": 1e9}, [{"temperature": 1}, {}], 3, ["hot"],
    ],
)  # fmt: skip
def test_settings_of_a_wrong_type_are_refused_and_other_requests_go_on(bank, make_prompts, chosen):
    here, prompt = bank("llama"), make_prompts([4])[0]
    engine = Engine(here)
    running = [engine.submit(prompt, adapter=name, settings={"max_new_tokens": 6}) for name in ("lora", None)]
    engine.step()
    with pytest.raises(ConfigError):
        engine.submit(prompt, settings=chosen)
    assert (engine.num_running, engine.num_waiting) == (2, 0)
    engine.run()
    for name, request in zip(("lora", None), running, strict=True):
        assert request.result(timeout=0).token_ids == alone(here, name, prompt, {"max_new_tokens": 6}).token_ids


def test_a_result_that_nobody_works_on_times_out(bank):
    with pytest.raises(TimeoutError, match=r"is a thread calling Engine\.step"):
        Engine(bank("llama")).submit([20], settings={"max_new_tokens": 4}).result(timeout=0.01)


# ---- the bank


def test_a_bank_generates_for_texts_chats_and_token_ids(bank):
    here = bank("llama")
    tokenizer = here.backbone.tokenizer
    rows = [("lora", "good film"), (None, tokenizer("good film")["input_ids"]), ("ia3", "bad")]
    found = here.generate(rows, {"max_new_tokens": 5}, batch_size=2)
    assert [g.adapter for g in found] == ["lora", None, "ia3"]
    assert found[0].num_prompt_tokens == found[1].num_prompt_tokens == 4
    assert found[0].text == tokenizer.decode(found[0].token_ids, skip_special_tokens=True)
    with pytest.raises(DataError, match=r"row 1: the tokenizer of backbone 'llama' has no chat template"):
        here.generate([(None, "a"), (None, [{"role": "user", "content": "hi"}])], {"max_new_tokens": 3})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}bot"
    try:
        chat = here.generate([(None, [{"role": "user", "content": "hi"}])], {"max_new_tokens": 3})[0]
        ids = tokenizer("user hi bot", add_special_tokens=False)["input_ids"]
    finally:
        tokenizer.chat_template = None
    assert chat.token_ids == here.generate([(None, ids)], {"max_new_tokens": 3})[0].token_ids


def test_a_chat_that_the_template_refuses_is_named(bank):
    here, short = bank("llama"), {"max_new_tokens": 3}
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}said"
    said = [{"role": "user", "content": "hi"}]
    here.backbone.tokenizer.chat_template = refuses
    words = r"row 1: the chat template of backbone 'llama' refuses messages of system, user: no system here\. Most"
    try:
        with pytest.raises(DataError, match=words):
            here.generate([(None, said), (None, [{"role": "system", "content": "a"}, *said])], short)
        with pytest.raises(DataError, match=r"row 0: a prompt is a text, a list of messages with the texts 'role'"):
            here.generate([(None, [{"role": "user", "content": None}])], short)
    finally:
        here.backbone.tokenizer.chat_template = None


def test_an_adapter_whose_vectors_stand_in_slots_is_refused_by_row(lm, random_adapter, make_prompts):
    bank = Bank(lm("llama"))
    method = get_method("ptuning_v1")(pattern="{p} {text}", slots=("{p*2}",), reparametrise=False)
    bank.add("between", random_adapter(lm("llama"), method, 1))
    prompt = make_prompts([4])[0]
    with pytest.raises(PlanError, match="row 1: its adapter's vectors stand in slots of a task's text"):
        bank.generate([(None, prompt), ("between", prompt)], {"max_new_tokens": 2})


def test_a_stream_gives_pieces_of_every_row_as_they_come(bank):
    here = bank("gpt2")
    rows = [(None, "good film"), ("lora", "bad"), ("prefix", "the very film"), (None, "not")]
    own = [{"max_new_tokens": n, "stop_at_eos": False} for n in (4, 9, 6, 5)]
    own[3]["num_beams"] = 2
    pieces = list(here.generate_stream(rows, own, batch_size=3))
    texts = [g.text for g in here.generate(rows, own)]
    assert ["".join(p for i, p in pieces if i == row) for row in range(4)] == texts
    assert sum(i == 3 for i, _ in pieces) == 1  # beams
    order = [i for i, _ in pieces]
    assert order.index(2) < len(order) - 1 - order[::-1].index(0)  # interleaved


def test_a_stream_refuses_what_is_wrong_when_it_is_asked_for(bank):
    here = bank("gpt2")
    with pytest.raises(AdapterError, match="row 1: the bank has no adapter 'lorra'"):
        here.generate_stream([(None, "a"), ("lorra", "a")])


def test_limits_go_by_the_name_that_the_caller_gave(bank):
    here = bank("gpt2")
    words = "row 1: 3 beams are more rows than batch_size=2; raise it, or lower num_beams"
    for generate in (here.generate, here.generate_stream):
        with pytest.raises(PlanError, match=words):
            generate([(None, "a"), (None, "b")], [{}, {"num_beams": 3}], batch_size=2)
        with pytest.raises(ConfigError, match="^batch_size=0 is not possible; give at least 1"):
            generate([(None, "a")], batch_size=0)


@pytest.mark.parametrize(
    ("rows", "chosen", "error", "message"),
    [
        ([(None, "a"), ("lorra", "a")], {}, AdapterError, r"row 1: the bank has no adapter 'lorra'\. Did you mean"),
        ([(None, "a"), "b"], {}, DataError, r"row 1: 'b' is not a pair of an adapter's name \(or None\) and a prompt"),
        ([(None, "a"), (None, 3)], {}, DataError, r"row 1: a prompt is a text, a list of messages"),
        ([(None, "a"), (None, [])], {}, DataError, r"row 1: a prompt is a text"),
        ([(None, "a"), (None, [5, 97])], {}, PlanError, r"row 1: token id 97 is outside the vocabulary 0\.\.96"),
        ([(None, "a"), (None, "a " * 30)], {}, PlanError, r"row 1: 32 tokens .*lower max_new_tokens by 2"),
        ([(None, [5] * 40)], {}, PlanError, r"has 40; shorten the text, which leaves no room for a new token"),
        ([("prompt", [5] * 28)], {}, PlanError, r"row 0: 28 tokens, 3 of its adapter's prompt and up to 10"),
        ([(None, "a")], {"max_tokens": 3}, ConfigError, r"no setting 'max_tokens'\. Did you mean 'max_new_tokens'"),
        ([(None, "a")], {"do_sample": True}, ConfigError, r"'do_sample'\. A temperature above 0 draws.*It has: m"),
        ([(None, "a")], [{}, {}], ConfigError, r"there are 1 rows, but settings for 2"),
        ([(None, "a"), (None, "a")], [{}, {"top_p": 0}], ConfigError, r"row 1: top_p=0 is not possible; give above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_named_before_any_forward_pass(bank, monkeypatch, rows, chosen, error, message):
    here = bank("llama")
    monkeypatch.setattr(type(here.backbone.model), "forward", lambda *a, **k: pytest.fail("a forward pass ran"))
    if isinstance(chosen, dict) and "max_tokens" not in chosen:
        chosen = {"max_new_tokens": 10} | chosen
    with pytest.raises(error, match=message):
        here.generate(rows, chosen)


def test_settings_of_all_rows_may_be_given_by_name(bank):
    here, rows = bank("llama"), [(None, "a b"), (None, "b")]
    named = here.generate(rows, max_new_tokens=3, temperature=0.7, seed=5)
    assert named == here.generate(rows, {"max_new_tokens": 3, "temperature": 0.7, "seed": 5})
    assert all(len(g.token_ids) <= 3 for g in named)
    assert dict(here.generate_stream(rows[:1], max_new_tokens=1)) == {
        0: here.generate(rows[:1], max_new_tokens=1)[0].text
    }
    with pytest.raises(ConfigError, match=r"no setting 'max_tokens'\. Did you mean 'max_new_tokens'"):
        here.generate(rows, max_tokens=3)
    with pytest.raises(ConfigError, match="give top_p, seed in `settings`, or no `settings` but names alone"):
        here.generate(rows, {"temperature": 0.5}, top_p=0.5, seed=1)


def test_a_fully_tuned_adapter_generates_alone_and_is_refused_in_a_mix(lm, random_adapter, tmp_path, make_prompts):
    backbone = lm("llama")
    adapter = random_adapter(backbone, get_method("full")(), 1)
    adapter.save(tmp_path / "full")
    bank = Bank(backbone)
    bank.add("full", tmp_path / "full")
    prompt = make_prompts([5])[0]
    tuned = backbone.with_weights(adapter.params)
    expected = tuned.generate(Plan([None]), torch.tensor([prompt]), settings={"max_new_tokens": 5})[0]
    assert bank.generate([("full", prompt)], {"max_new_tokens": 5})[0].token_ids == expected.token_ids
    with pytest.raises(MixError, match="row 1: adapter 'full' uses Full fine-tuning"):
        bank.generate([(None, prompt), ("full", prompt)])


def test_a_bank_of_an_encoder_generates_nothing(bert):
    with pytest.raises(BackboneError, match="has no language-model head: it is no causal model"):
        Bank(bert).generate([(None, "good")])


def test_rows_of_a_task_that_writes_start_from_the_ids_of_training(lm, small_method, random_adapter):
    backbone = lm("llama")
    task = Task(name="w", kind="generation", template=("{text} to {other}",), label="y", format="plain")
    adapter = dataclasses.replace(
        random_adapter(backbone, small_method("prompt", backbone), 1),
        task=task, head=Head.for_task(task), head_params={},
    )  # fmt: skip
    bank = Bank(backbone)
    bank.add("writer", adapter)
    row = {"text": "good film", "other": "bad", "y": "never read"}
    ids = encode_for_task(backbone, task, row, 40, "row 0")
    chosen = {"max_new_tokens": 5, "stop_at_eos": False}
    by_row, by_ids, bare = bank.generate([("writer", row), ("writer", ids), (None, ids)], chosen)
    assert by_row == by_ids and by_row.num_prompt_tokens == len(ids)
    assert by_row.token_ids != bare.token_ids
    with pytest.raises(DataError, match=r"row 1: task 'w': .*other"):
        bank.generate([(None, "a"), ("writer", {"text": "good"})], chosen)
    with pytest.warns(
        DataWarning, match=r"row 1: its prompt has 45 tokens and there is room for 30 \(it was trained with max"
    ):
        long = bank.generate([(None, "a"), ("writer", row | {"text": "film " * 40})], chosen)[1]
    assert long.num_prompt_tokens <= 30
    words = r"the 0 tokens left \(backbone 'llama' has 40 positions, of which max_new_tokens=39 takes as many\)"
    with pytest.raises(DataError, match=rf"row 0: not a word of its prompt fits into {words}"):
        bank.generate([("writer", row)], {"max_new_tokens": 39})


def test_what_is_no_bank_no_backbone_and_no_adapter_of_it_is_refused(bank):
    here = bank("gpt2")
    with pytest.raises(ConfigError, match=r"an Engine takes a Bank, not a Backbone; give Engine\(Bank\(backbone\)\)"):
        Engine(here.backbone)
    with pytest.raises(ConfigError, match=r"a Bank takes a Backbone, not 'smollm2'; give Backbone\.load\('smollm2'\)$"):
        Bank("smollm2")
    with pytest.raises(AdapterError, match=r"^request: the bank has no adapter 'lorra'"):
        Engine(here).submit("a", adapter="lorra")
