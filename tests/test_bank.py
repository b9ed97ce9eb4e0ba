"""The bank: what is in it, what leaves it, and what it answers."""

import gc
import json
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch

import multitune.bank
from multitune import (
    IA3,
    Adapter,
    AdapterError,
    AoTFC,
    Backbone,
    BackboneError,
    Bank,
    ConfigError,
    DataError,
    FullFineTuning,
    Head,
    HeadOnly,
    Houlsby,
    LoRA,
    MixError,
    Plan,
    PlanError,
    PromptTuning,
    PTuningV2,
    Task,
    get_method,
    method_names,
)

KINDS = ("classification", "regression", "multilabel", "multiple_choice", "tagging")


@pytest.fixture
def saved(bert, random_adapter, tmp_path):
    """`saved(name, method, seed, **fields)`: the folder of a random adapter."""

    def save(name, method, seed=0, **fields):
        return random_adapter(bert, method, seed, **fields).save(tmp_path / name).path

    return save


@pytest.fixture
def forwards(bert):
    """Counts the forward passes of the shared backbone."""
    count = []
    handle = bert.model.register_forward_hook(lambda module, *_: count.append(1) if module is bert.model else None)
    yield count
    handle.remove()


def logits(bank, rows):
    return [p.logits for p in bank.predict(rows)]


# ---- contents


def test_names_keep_their_order_and_len_and_in(bert, random_adapter):
    bank = Bank(bert)
    assert (bank.names, len(bank), "a" in bank) == ((), 0, False)
    for name in ("b", "a", "c"):
        bank.add(name, random_adapter(bert, LoRA(), 1))
    assert (bank.names, len(bank), "a" in bank, "d" in bank) == (("b", "a", "c"), 3, True, False)
    assert bank.adapter("a").method == LoRA()
    bank.remove("a")
    assert (bank.names, "a" in bank) == (("b", "c"), False)


@pytest.mark.parametrize("ask", ["predict", "remove", "adapter", "plan"])
def test_an_unknown_name_shows_the_nearest_and_the_others(bert, random_adapter, forwards, ask):
    bank = Bank(bert)
    calls = {
        "predict": lambda: bank.predict([(None, "x"), ("sentimant", "x")]),
        "remove": lambda: bank.remove("sentimant"),
        "adapter": lambda: bank.adapter("sentimant"),
        "plan": lambda: bank.plan([None, "sentimant"]),
    }
    with pytest.raises(AdapterError, match=r"no adapter 'sentimant'\. It has: none\. Add it: bank\.add\('sentimant'"):
        calls[ask]()
    for name in ("topic", "sentiment"):
        bank.add(name, random_adapter(bert, LoRA(), 1))
    row = "row 1: " if ask in ("predict", "plan") else ""
    words = rf"^{row}the bank has no adapter 'sentimant'\. Did you mean 'sentiment'\? It has: topic, sentiment\."
    with pytest.raises(AdapterError, match=words):
        calls[ask]()
    assert not forwards


def test_a_long_list_of_names_is_cut_short(bert, random_adapter):
    bank = Bank(bert)
    adapter = random_adapter(bert, HeadOnly(), 1)
    for i in range(14):
        bank.add(f"task{i}", adapter)
    with pytest.raises(AdapterError, match=r"It has: task0, .*task11, \.\.\.\. Add it"):
        bank.adapter("nothing")


def test_a_name_is_taken_once_and_the_first_stays(bert, random_adapter, close):
    bank = Bank(bert)
    bank.add("a", random_adapter(bert, LoRA(), 1))
    before = logits(bank, [("a", "good film")])[0]
    with pytest.raises(AdapterError, match=r"already has an adapter 'a'; remove it first: bank\.remove\('a'\)"):
        bank.add("a", random_adapter(bert, LoRA(), 2))
    assert len(bank) == 1
    close(logits(bank, [("a", "good film")])[0], before)
    bank.remove("a")
    bank.add("a", random_adapter(bert, LoRA(), 2))
    assert not torch.allclose(logits(bank, [("a", "good film")])[0], before)


def test_what_does_not_fit_stays_out(bert, make_backbone, random_adapter, saved, tmp_path):
    other = make_backbone("bert", seed=1)
    bank = Bank(bert)
    foreign = random_adapter(other, LoRA(), 1)
    with pytest.raises(BackboneError, match="same shape, other weights"):
        bank.add("a", foreign)
    with pytest.raises(BackboneError, match="same shape, other weights"):
        bank.add("a", foreign.save(tmp_path / "foreign").path)
    with pytest.raises(AdapterError, match="there is no folder .*nothing"):
        bank.add("a", tmp_path / "nothing")
    with pytest.raises(AdapterError, match=r"no table of token rows on disk; run `multitune fuse .*aot'?`"):
        Bank(bert, aot_store="mmap").add("a", saved("aot", AoTFC(r=2)))
    with pytest.raises(ConfigError, match="has no pretrained pooler; use pooling='cls' or pooling='mean'"):
        electra = make_backbone("electra")
        Bank(electra).add("a", _with_pooling(random_adapter(electra, LoRA(), 1), "pooler"))
    assert len(bank) == 0 and bank.resident_bytes == 0
    with pytest.raises(ConfigError, match="aot_store 'disk' is unknown; choose 'factors', 'ram' or 'mmap'"):
        Bank(bert, aot_store="disk")


def _with_pooling(adapter, pooling):
    fields = {k: getattr(adapter, k) for k in ("name", "method", "params", "head_params", "task", "backbone")}
    return Adapter(**fields, head=Head(kind="classification", num_outputs=3, pooling=pooling))


# ---- adding costs the adapter, not the bank


def test_adding_touches_neither_the_backbone_nor_the_others(bert, random_adapter):
    bank = Bank(bert)
    bank.add("first", random_adapter(bert, LoRA(), 0))
    entry = bank._entries["first"].served
    bits = {k: t.clone() for k, t in bert.model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in bert.model.modules()]
    per_adapter = bank.resident_bytes
    for i in range(1, 30):
        bank.add(str(i), random_adapter(bert, LoRA(), i))
    assert bank._entries["first"].served is entry
    one = random_adapter(bert, LoRA(), 0)
    assert bank.resident_bytes == 30 * per_adapter == 30 * 4 * (one.num_method_parameters + one.num_head_parameters)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in bert.model.modules()] == hooks
    assert all(torch.equal(t, bits[k]) for k, t in bert.model.state_dict().items())


def test_many_tasks_are_one_product_per_kind_and_shape(bert, random_adapter):
    bank = Bank(bert)
    for i in range(64):
        bank.add(f"lora{i}", random_adapter(bert, LoRA(r=5 + i % 4), i))
        bank.add(f"ia3{i}", random_adapter(bert, IA3(), i))
    plan = bank.plan(bank.names)
    assert {len(steps) for steps in plan.steps.values()} <= {1, 2}
    (lora,) = plan.steps["layer.0.query"]
    assert (lora.group.num_slots, lora.group.rows_per_slot) == (64, 1)
    assert {type(s.delta).__name__ for s in plan.steps["layer.1.value"]} == {"LowRank", "Scale"}
    assert all(len(steps) == 1 for steps in plan.input_steps.values())


# ---- removal


def test_removing_while_a_plan_is_alive(bert, random_adapter, random_rows, close):
    bank = Bank(bert)
    for i, name in enumerate("abc"):
        bank.add(name, random_adapter(bert, LoRA(), i))
    ids, mask = random_rows(bert, [4, 6, 5]).padded()
    with torch.no_grad():
        plan = bank.plan(["a", "b", "c"])
        before = bert.run(plan, ids, mask)
        bank.remove("b")
        bank.add("b", random_adapter(bert, LoRA(), 7))  # the slot and the memory may be used again
        bank.plan(["b", "b", "b"])
        assert torch.equal(bert.run(plan, ids, mask), before)
        after = bert.run(bank.plan(["a", "b", "c"]), ids, mask)
    close(after[[0, 2]][:, :4], before[[0, 2]][:, :4])
    assert not torch.allclose(after[1], before[1])


def test_removing_frees_the_tensors(bert, random_adapter):
    bank = Bank(bert)
    for _ in range(3):
        bank.add("a", random_adapter(bert, PTuningV2(), 1))
        held = weakref.ref(bank._entries["a"].served.delta_set)
        assert bank.resident_bytes > 0
        bank.remove("a")
        gc.collect()
        assert held() is None
        assert bank.resident_bytes == 0
    with pytest.raises(AdapterError, match="no adapter 'a'"):
        bank.predict([("a", "good film")])


def test_the_budget_evicts_the_one_used_longest_ago_and_reloads_it(bert, saved, close):
    unlimited = Bank(bert)
    folders = {name: saved(name, LoRA(), i) for i, name in enumerate("abc")}
    for name, folder in folders.items():
        unlimited.add(name, folder)
    one = unlimited.resident_bytes // 3
    expected = {name: logits(unlimited, [(name, "good film")])[0] for name in folders}
    bank = Bank(bert, memory_budget=2 * one)
    for name, folder in folders.items():
        bank.add(name, folder)
        assert bank.resident_bytes <= 2 * one

    def resident():
        return {n for n, e in bank._entries.items() if e.served is not None}

    assert resident() == {"b", "c"}
    close(logits(bank, [("b", "good film")])[0], expected["b"])
    close(logits(bank, [("a", "good film")])[0], expected["a"])  # read again; "c" was used longest ago
    assert resident() == {"a", "b"}
    for _ in range(2):
        for name in "cab":
            close(logits(bank, [(name, "good film")])[0], expected[name])
            assert bank.resident_bytes <= 2 * one
    # one batch may need more than the budget: its rows are answered all the same
    for got, name in zip(logits(bank, [(n, "good film") for n in "abc"]), "abc", strict=True):
        close(got, expected[name])
    assert bank.resident_bytes <= 2 * one
    assert bank.names == ("a", "b", "c")


def test_what_an_eviction_costs_does_not_grow_with_the_bank(bert, saved, monkeypatch):
    folder = saved("a", LoRA(r=1), 1)
    looked_at = []

    class Watched(multitune.bank._Entry):
        def __getattribute__(self, name):
            looked_at.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(multitune.bank, "_Entry", Watched)

    def looks(number):
        bank = Bank(bert, memory_budget=1)
        for i in range(number):
            bank.add(str(i), folder)
        assert [name for name, e in bank._entries.items() if e.served is not None] == [str(number - 1)]
        looked_at.clear()
        bank.predict([("0", "good film")])  # reads it again, and drops the last one
        return len(looked_at)

    assert looks(2) == looks(12)


@pytest.mark.parametrize("name", [n for n in method_names() if n != "head"])
def test_every_method_answers_the_same_after_eviction(bert, name, saved, close):
    bank = Bank(bert, memory_budget=0)
    bank.add("a", saved("a", get_method(name)(), 1))
    before = bank.predict([("a", "good film")])[0]
    bank.add("b", saved("b", LoRA(), 2))
    bank.predict([("b", "good film")])
    assert bank._entries["a"].served is None
    after = bank.predict([("a", "good film")])[0]
    close(after.logits, before.logits)
    assert after.label == before.label


def test_what_is_only_in_memory_is_never_evicted(bert, random_adapter, saved):
    bank = Bank(bert, memory_budget=0)
    bank.add("memory", random_adapter(bert, LoRA(), 1))
    bank.add("disk", saved("disk", LoRA(), 2))
    first = logits(bank, [("memory", "good film")])[0]
    bank.predict([("disk", "good film")])
    assert bank._entries["memory"].served is not None
    assert torch.equal(logits(bank, [("memory", "good film")])[0], first)


def test_a_folder_that_holds_another_adapter_after_eviction_is_refused(bert, saved, random_adapter):
    bank = Bank(bert, memory_budget=0)
    bank.add("a", saved("a", LoRA(), 1))
    bank.add("b", saved("b", LoRA(), 2))
    saved("a", LoRA(), 3)
    with pytest.raises(AdapterError, match=r"a was replaced since adapter 'lora-1' was loaded from it"):
        bank.predict([("a", "good film")])
    bank.remove("a")
    bank.add("a", folder := saved("a", LoRA(), 3))
    assert bank.predict([("a", "good film")]) and bank.adapter("a").path == folder


def test_rows_of_one_adapter_do_not_wait_while_another_is_read(bert, saved):
    bank = Bank(bert)
    for i, name in enumerate("ab"):
        bank.add(name, saved(name, LoRA(), i))
    answered = threading.Event()

    def ask():
        bank.predict([("b", "good film")])
        answered.set()

    with bank._entries["a"].loading:  # as a thread holds it that reads the folder of "a"
        thread = threading.Thread(target=ask)
        thread.start()
        assert answered.wait(60)
    thread.join()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the mappings of a Linux process")
def test_no_file_of_an_adapter_stays_mapped(bert, saved):
    """A mapping would keep the whole file in memory, and a file cut short meanwhile would kill the process."""
    bank, folder = Bank(bert), saved("a", LoRA(), 1)
    bank.add("a", folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_folder_that_is_gone_after_eviction_is_named(bert, saved):
    bank = Bank(bert, memory_budget=0)
    folder = saved("a", LoRA(), 1)
    bank.add("a", folder)
    bank.add("b", saved("b", LoRA(), 2))
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match=f"there is no folder {folder}"):
        bank.predict([("a", "x")])
    assert bank.predict([("b", "x")])[0].adapter == "b"


# ---- full fine-tuning


def test_full_fine_tuning_alone_and_never_mixed(bert, random_adapter, forwards, close):
    adapter = random_adapter(bert, FullFineTuning(), 1)
    bank = Bank(bert)
    bank.add("full", adapter)
    bank.add("full2", random_adapter(bert, FullFineTuning(), 2))
    bank.add("lora", random_adapter(bert, LoRA(), 3))
    rows = [("full", "good film"), ("full", "not the bad film")]
    tuned = bert.with_weights(adapter.params)
    tuned.detach()
    for (_, text), got in zip(rows, bank.predict(rows), strict=True):
        with torch.no_grad():
            encoded = bert.tokenizer(text, return_tensors="pt")
            hidden = tuned.model(**encoded).last_hidden_state[0, 0]
        close(got.logits, adapter.head_params["weight"] @ hidden + adapter.head_params["bias"])
        assert got.adapter == "full"
    assert not forwards  # the shared backbone took no part
    for mix, row in (
        ([("lora", "x"), (None, "x"), ("full", "x")], 2),
        ([("full", "x"), (None, "x")], 0),
        ([("lora", "x"), ("full2", "x"), ("full", "x")], 1),
    ):
        words = f"^row {row}: adapter '{mix[row][0]}' uses Full fine-tuning, which changes the backbone's own weights"
        with pytest.raises(MixError, match=words):
            bank.predict(mix)
        with pytest.raises(MixError, match="cannot share a batch .* such as LoRA"):
            bank.plan([name for name, _ in mix])
    assert not forwards
    one = bank.adapter("lora")
    assert bank.resident_bytes == 4 * (one.num_method_parameters + one.num_head_parameters)
    bank.remove("full")
    with pytest.raises(AdapterError, match="no adapter 'full'"):
        bank.predict(rows)
    close(logits(bank, [("lora", "good film")])[0], _single(bert, random_adapter(bert, LoRA(), 3), "good film"))


def _single(backbone, adapter, text):
    bank = Bank(backbone)
    bank.add("only", adapter)
    return bank.predict([("only", text)])[0].logits


def test_full_fine_tuning_is_read_from_disk(bert, random_adapter, tmp_path, close):
    adapter = random_adapter(bert, FullFineTuning(), 1)
    bank = Bank(bert)
    bank.add("full", adapter.save(tmp_path / "full").path)
    close(logits(bank, [("full", "good film")])[0], _single(bert, adapter, "good film"))


# ---- bare rows


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2/v3", "albert", "mpnet"])
def test_bare_rows_are_plain_transformers_and_a_mean(name, make_backbone, make_model, random_adapter, close):
    backbone, plain = make_backbone(name), make_model(name)
    plain.eval()
    bank = Bank(backbone)
    bank.add("prompt", random_adapter(backbone, PromptTuning(length=4), 1))
    bank.add("lora", random_adapter(backbone, LoRA(), 2))
    texts = ["good film", "x", "not the very bad film", ("good film", "bad film")]
    rows = [
        (None, texts[0]),
        ("prompt", "film"),
        (None, texts[1]),
        ("lora", "film"),
        (None, texts[2]),
        (None, texts[3]),
    ]
    predictions = [p for p in bank.predict(rows) if p.adapter is None]
    for text, got in zip(texts, predictions, strict=True):
        encoded = backbone.tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")
        if not backbone.takes_token_types:
            encoded.pop("token_type_ids")
        with torch.no_grad():
            hidden = plain(**encoded).last_hidden_state
        close(got.embedding, hidden[0].mean(0))
        assert (got.label, got.logits, got.probabilities) == (None, None, {})
        written = json.loads(json.dumps(got.to_dict()))
        assert written["adapter"] is None and torch.equal(torch.tensor(written["embedding"]), got.embedding)
        assert max(len(f"{value:.17g}") for value in got.embedding.tolist()) > 15  # the doubles that they become
        assert max(len(f"{value!r}") for value in written["embedding"]) <= 15


# ---- rows that cannot be read


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        (("mood", {"txt": "x"}), DataError, "row 2: task 'mood': no column 'text'"),
        (("score", "one text"), DataError, "row 2: task 'score'"),
        (("names", "not words"), DataError, "row 2: task 'names': tagging reads a list of words"),
        (("choose", "one text"), DataError, "row 2: task 'choose': a multiple choice is a mapping"),
        ((None, {"text": "x"}), DataError, "row 2: a row without an adapter is a text or a pair of texts, not dict"),
        ((None, ("a", "b", "c")), DataError, "row 2: a row without an adapter"),
        ((None, 3), DataError, "row 2: a row without an adapter"),
        (("mood", None), DataError, "row 2: task 'mood'"),
        ("a text alone", DataError, "row 2: 'a text alone' is not a pair of an adapter's name"),
        ("ab", DataError, "row 2: 'ab' is not a pair"),
        (("mood",), DataError, r"row 2: \('mood',\) is not a pair"),
        ((3, "x"), DataError, r"row 2: \(3, 'x'\) is not a pair"),
        (("full", "x"), MixError, "row 2: adapter 'full' uses Full fine-tuning"),
        (("mod", "x"), AdapterError, "row 2: the bank has no adapter 'mod'. Did you mean 'mood'"),
    ],
    ids=str,
)
def test_a_bad_row_is_named_before_any_forward_pass(bert, random_adapter, forwards, row, error, words):
    bank = Bank(bert)
    kinds = {"mood": "classification", "score": "regression", "names": "tagging", "choose": "multiple_choice"}
    for i, (name, kind) in enumerate(kinds.items()):
        bank.add(name, random_adapter(bert, LoRA(), i, kind=kind))
    bank.add("full", random_adapter(bert, FullFineTuning(), 9))
    good = ("mood", "good film")
    with pytest.raises(error, match=f"^{words}"):
        bank.predict([good, good, row, good], batch_size=1)
    with pytest.raises(error, match=f"^{words.replace('row 2', 'row 6')}"):
        list(bank.predict_stream([good] * 6 + [row], window=4))
    assert len(forwards) == 1  # the stream's first window, and nothing else
    assert len(bank.predict([good])) == 1


def test_batch_size_and_training_mode(bert, make_backbone, random_adapter):
    bank = Bank(bert)
    with pytest.raises(ConfigError, match="batch_size=0 is not possible; give at least 1"):
        bank.predict([(None, "x")], batch_size=0)
    for given in ({"batch_size": 0}, {"window": 0}, {"window": -1}):  # before the first answer is asked for
        ((name, value),) = given.items()
        with pytest.raises(ConfigError, match=f"{name}={value} is not possible; give at least 1"):
            bank.predict_stream([(None, "x")], **given)
    backbone = make_backbone()
    bank = Bank(backbone)
    backbone.model.train()
    with pytest.raises(PlanError, match="the backbone is in training mode"):
        bank.predict([(None, "x")])


def test_no_rows_and_an_iterator_of_rows(bert, random_adapter):
    bank = Bank(bert)
    bank.add("a", random_adapter(bert, LoRA(), 1))
    assert bank.predict([]) == []
    assert list(bank.predict_stream([])) == []
    assert [p.adapter for p in bank.predict(iter([("a", "x"), (None, "x")]))] == ["a", None]


# ---- truncation


def test_a_prompt_and_a_long_text_share_the_positions(bert, random_adapter, close):
    long = "good bad film " * 20  # 60 tokens, where the backbone has 40 positions
    adapter = random_adapter(bert, PromptTuning(length=7), 1, max_length=64)
    plain = random_adapter(bert, LoRA(), 2, max_length=64)
    short = random_adapter(bert, LoRA(), 3, max_length=10)
    bank = Bank(bert)
    for name, a in {"prompt": adapter, "lora": plain, "short": short}.items():
        bank.add(name, a)
    got = logits(bank, [("prompt", long), ("lora", long), ("short", long)])
    for i, (a, room) in enumerate(((adapter, 33), (plain, 40), (short, 10))):
        ids = bert.tokenizer(long, truncation=True, max_length=room, return_tensors="pt")["input_ids"]
        assert ids.shape[1] == room
        with torch.no_grad():
            hidden = bert.run(Plan([a.delta_set(bert)]), ids)[0, 0]
        close(got[i], a.head_params["weight"] @ hidden + a.head_params["bias"])


def test_a_prompt_that_leaves_no_room_is_refused_with_the_row(bert, random_adapter, forwards):
    bank = Bank(bert)
    bank.add("full of it", random_adapter(bert, PromptTuning(length=38), 1, kind="regression"))
    row = ("full of it", {"a": "good", "b": "bad"})
    with pytest.raises(PlanError, match="^row 1: .* tokens cannot be cut to the 2 that .*; shorten the prompt"):
        bank.predict([(None, "x"), row])
    assert not forwards


# ---- every kind of head in one batch


def test_every_kind_of_head_in_one_batch(bert, random_adapter, tasks, close):
    methods = [LoRA(r=2), PromptTuning(length=3), IA3(), Houlsby(bottleneck=3), PTuningV2(length=3)]
    bank, adapters = Bank(bert), {}
    for i, kind in enumerate(KINDS):
        adapters[kind] = random_adapter(bert, methods[i], i, kind=kind, pooling="mean" if i % 2 else "cls")
        bank.add(kind, adapters[kind])
    rows = {
        "classification": {"text": "good film", "y": "no label of the task"},  # labels are not read
        "regression": {"a": "good film", "b": "bad"},
        "multilabel": {"text": "the film"},
        "multiple_choice": {"text": "good", "one": "film", "two": "not good", "three": "x"},
        "tagging": {"words": ["ada", "not", "lovelace"]},
    }
    got = {p.adapter: p for p in bank.predict([(kind, rows[kind]) for kind in reversed(KINDS)])}

    def head_of(kind, *texts, words=False):
        adapter = adapters[kind]
        first = list(texts[0]) if words else texts[0]
        encoded = bert.tokenizer(first, *texts[1:], is_split_into_words=words, return_tensors="pt")
        with torch.no_grad():
            plan = Plan([adapter.delta_set(bert)])
            hidden = bert.run(plan, encoded["input_ids"], None, encoded["token_type_ids"])[0]
        if kind != "tagging":
            hidden = hidden[0] if adapter.head.pooling == "cls" else hidden.mean(0)
        return hidden @ adapter.head_params["weight"].T + adapter.head_params["bias"], encoded

    values, _ = head_of("classification", "good film")
    close(got["classification"].logits, values)
    labels = tasks["classification"].labels
    assert got["classification"].label == labels[int(values.argmax())]
    wanted = dict(zip(labels, values.softmax(-1).tolist(), strict=True))
    assert got["classification"].probabilities == pytest.approx(wanted, rel=1e-4)

    values, _ = head_of("regression", "good film", "bad")
    values = values * adapters["regression"].head.target_std + adapters["regression"].head.target_mean
    close(got["regression"].logits, values)
    assert got["regression"].label == pytest.approx(float(values[0]), rel=1e-4)
    assert got["regression"].probabilities == {}

    values, _ = head_of("multilabel", "the film")
    close(got["multilabel"].logits, values)
    names = tasks["multilabel"].labels
    assert got["multilabel"].label == tuple(n for n, v in zip(names, values, strict=True) if v >= 0)
    wanted = dict(zip(names, values.sigmoid().tolist(), strict=True))
    assert got["multilabel"].probabilities == pytest.approx(wanted, rel=1e-4)

    texts = ("film", "not good", "x")
    values = torch.cat([head_of("multiple_choice", "good so", t)[0] for t in texts])
    close(got["multiple_choice"].logits, values)
    assert got["multiple_choice"].label == str(int(values.argmax()))
    wanted = {str(i): p for i, p in enumerate(values.softmax(-1).tolist())}
    assert got["multiple_choice"].probabilities == pytest.approx(wanted, rel=1e-4)

    values, encoded = head_of("tagging", ["ada", "not", "lovelace"], words=True)
    starts = [encoded.word_ids().index(w) for w in range(3)]
    close(got["tagging"].logits, values[starts])
    tags = tasks["tagging"].labels
    assert got["tagging"].label == tuple(tags[int(v.argmax())] for v in values[starts])
    assert json.loads(json.dumps(got["tagging"].to_dict()))["label"] == list(got["tagging"].label)


def test_tags_stay_with_their_words(bert, random_adapter, close):
    bank = Bank(bert)
    bank.add("t", random_adapter(bert, LoRA(), 1, kind="tagging"))
    bank.add("short", random_adapter(bert, LoRA(), 1, kind="tagging", max_length=12))
    words = ["ada", "lovelace", "not"]
    whole = bank.predict([("t", words)])[0]
    assert len(whole.label) == len(whole.logits) == 3
    # a word without any token keeps its place, so that place i is still word i
    gap = bank.predict([("t", ["ada", " ", "lovelace", "not"])])[0]
    assert len(gap.label) == 4
    close(gap.logits[[0, 2, 3]], whole.logits)
    cut = bank.predict([("short", ["ada", "lovelace", "lovelace", "ada"])])[0]
    assert len(cut.label) == 2  # ten tokens fit, a-d-a l-o-v-e-l-a-c; what is cut off has no tag
    assert bank.predict([("t", [" "])])[0].label == ()


def test_logits_that_are_not_finite_have_no_label(bert, random_adapter):
    sick = random_adapter(bert, LoRA(), 1)
    sick.head_params["bias"][0] = float("nan")
    bank = Bank(bert)
    bank.add("sick", sick)
    bank.add("well", random_adapter(bert, LoRA(), 2))
    ill, well = bank.predict([("sick", "good film"), ("well", "good film")])
    assert (ill.label, ill.probabilities) == (None, {})
    assert well.label in ("bad", "good", "mixed")


# ---- order


def test_answers_come_in_the_order_of_the_rows(bert, random_adapter, close):
    bank = Bank(bert)
    for i, method in enumerate((LoRA(), PromptTuning(length=2), IA3())):
        bank.add(str(i), random_adapter(bert, method, i))
    rows = [(str(i % 3) if i % 4 else None, "good film " * (1 + i * 5 % 7)) for i in range(23)]
    expected = [bank.predict([row])[0] for row in rows]
    for predictions in (
        bank.predict(rows),
        bank.predict(rows, batch_size=1),
        bank.predict(rows, batch_size=5),
        list(bank.predict_stream(rows, batch_size=4, window=6)),
        list(bank.predict_stream(iter(rows), window=1)),
    ):
        for got, wanted in zip(predictions, expected, strict=True):
            assert (got.adapter, got.label) == (wanted.adapter, wanted.label)
            close(got.embedding if got.adapter is None else got.logits,
                  wanted.embedding if wanted.adapter is None else wanted.logits)  # fmt: skip


def test_a_stream_is_read_a_window_at_a_time(bert, random_adapter):
    bank = Bank(bert)
    bank.add("a", random_adapter(bert, LoRA(), 1))
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield ("a", "good film")

    stream = bank.predict_stream(source(), window=8)
    assert read == []
    next(stream)
    assert len(read) == 8


def test_batch_size_is_the_most_sequences_in_a_pass(bert, random_adapter, forwards):
    bank = Bank(bert)
    bank.add("c", random_adapter(bert, LoRA(), 1, kind="multiple_choice"))
    row = {"text": "good", "one": "a", "two": "b", "three": "c"}
    bank.predict([("c", row)] * 4, batch_size=5)  # 12 sequences
    assert len(forwards) == 3


# ---- backbones without a tokenizer, in another dtype


def test_texts_need_a_tokenizer(make_model, random_adapter):
    backbone = Backbone(make_model("bert"), name="bare")
    bank = Bank(backbone)
    bank.add("a", random_adapter(backbone, LoRA(), 1))
    with pytest.raises(BackboneError, match=r"backbone 'bare' has no tokenizer, .*Backbone\(model, tokenizer\)"):
        bank.predict([("a", "x")])


def test_a_bfloat16_backbone_serves_a_mix(make_model, make_backbone, random_adapter, tolerances):
    tokenizer, answers, adapters = make_backbone().tokenizer, [], {}
    for dtype in (torch.float32, torch.bfloat16):
        backbone = Backbone(make_model("bert").to(dtype), tokenizer)
        bank = Bank(backbone)
        for i, name in enumerate(n for n in method_names() if not get_method(n).changes_weights):
            if name not in adapters:  # made once: some methods read the weights to choose where they start
                adapters[name] = random_adapter(backbone, get_method(name)(), i, pooling="mean")
            bank.add(name, adapters[name])
        answers.append(torch.stack(logits(bank, [(name, "good film") for name in bank.names])))
        assert answers[-1].dtype == torch.float32
    difference = (answers[0] - answers[1]).norm() / answers[0].norm()
    assert 0 < difference < tolerances[torch.bfloat16]["rtol"]


def test_one_task_object_may_serve_two_names(bert, random_adapter):
    task = Task(name="t", kind="classification", template=("{text}",), labels=("no", "yes"))
    adapter = random_adapter(bert, LoRA(), 1)
    fields = {k: getattr(adapter, k) for k in ("name", "method", "params", "backbone")}
    two = Adapter(
        **fields,
        task=task,
        head=Head.for_task(task),
        head_params={"weight": torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(2)},
    )
    bank = Bank(bert)
    bank.add("a", two)
    bank.add("b", two)
    first, second = bank.predict([("a", "good film"), ("b", "good film")])
    assert (first.adapter, second.adapter) == ("a", "b")
    assert first.label == second.label


def test_a_plan_takes_one_name_per_row(bert):
    with pytest.raises(PlanError, match=r"not a single text; give bank\.plan\(\['topic'\]\)"):
        Bank(bert).plan("topic")
