"""Pseudo tokens inside a text: a row with them is the row of the words they stand for; others never see a slot."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import multitune as mt
from multitune import Bank, DeltaSet, Plan, PTuningV1, Task, Template
from multitune.batching import encode, pad

TEXTS = [("the good film", "not very bad"), ("x", "film film the xy"), ("bad", "good")]


# ---- templates


@pytest.mark.parametrize(
    ("part", "text", "slots"),
    [
        ("{a} {|} {b}", "the cat ran", (7,)),
        ("{a}{|}{b}", "the catran", (7,)),
        ("{|} {a}", "the cat", (0,)),
        ("{a} {|}", "the cat", (7,)),
        ("{|} {a} {|} ? {b} {|} {|} it", "the cat ? ran it", (0, 7, 13, 13)),
        ("{a}: {|}{b}", "the cat: ran", (8,)),
    ],
)
def test_a_slot_is_no_text(part, text, slots):
    template = Template((part,))
    (rendered,) = template.render({"a": "the cat", "b": "ran"})
    assert rendered == text and rendered.slots == slots and isinstance(rendered, str)
    assert template.num_slots == len(slots) and set(template.columns) <= {"a", "b"}


def test_a_template_with_slots_is_saved_and_read():
    task = Task(name="t", kind="regression", template=("{a} {|}", "{|} {b}"), label="y")
    assert Task.from_dict(task.to_dict()) == task and task.template.num_slots == 2
    assert task.template.render(["x", "y"]) == ("x", "y")


# ---- tokens


@pytest.mark.parametrize(
    ("texts", "max_length", "places"),
    [
        (("{|} the {|} film {|}",), 20, (1, 2, 3)),
        (("the {|}", "{|} film {|} bad {|}"), 20, (2, 3, 4, 5)),
        (("the {|} film {|} bad good {|}",), 4, (2, 3, 3)),
        (("good{|}film x",), 20, (2,)),
        (("{|}",), 20, (1,)),
    ],
)
def test_a_slot_stands_in_front_of_the_token_that_follows_it(bert, texts, max_length, places):
    template = Template(texts)
    (slotted,) = encode(bert, [template.render({})], max_length=max_length)
    (plain,) = encode(bert, [tuple(str(t) for t in template.render({}))], max_length=max_length)
    assert slotted.input_ids == plain.input_ids and plain.slots == ()
    assert slotted.slots == places


def test_rows_with_fewer_slots_are_filled_up(bert):
    texts = [Template((part,)).render({"x": "x"}) for part in ("the {|} film {|}", "x", "{|} the film")]
    batch = pad(encode(bert, texts, max_length=9), bert.pad_id)
    assert batch.slots.tolist() == [[2, 3], [-1, -1], [1, -1]]
    assert pad(encode(bert, [("x",)], max_length=9), 0).slots is None


@pytest.mark.parametrize("trim", [True, False])
def test_a_space_belongs_to_the_token_that_follows_it(trim, make_model):
    """Byte-level tokens have their space in front, and some tokenizers count it as theirs and some do not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet[:93], "Ġ", "Ġ?"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "?")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    backbone = mt.Backbone(make_model("gpt2"), PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    text = Template(("{a} {|} ? {|} yes",)).render({"a": "ab"})
    (row,) = encode(backbone, [text], max_length=20)
    assert backbone.tokenizer.convert_ids_to_tokens(row.input_ids) == ["a", "b", "Ġ?", "Ġ", "y", "e", "s"]
    assert row.slots == (2, 3)


# ---- vectors that are words

CASES = [
    # template, slots, and the texts with everything written out: 1 to 4 are pseudo tokens in the order they are read
    (("{a} {|} {b}",), ("{p*2}",), ("{a} 2 3 {b}",)),
    (("{a} {|} {b} {|}",), ("{p}", "8 {p*2} 9"), ("{a} 2 {b} 8 3 4 9",)),
    (("{|} {a}", "{b} {|}"), ("{p} 9", "{p*2}"), ("2 9 {a}", "{b} 3 4")),
    (("{a} {|}", "{|} {b}"), ("{p*2}", "8 {p}"), ("{a} 2 3", "8 4 {b}")),
]


@pytest.mark.parametrize("case", CASES, ids=["middle", "two", "ends", "between"])
def test_vectors_in_slots_are_the_words_written_out(backbone, case, close):
    """Where pseudo tokens are the embeddings of digits, the prompted row is the row with these digits in it."""
    template, slots, written = case
    method = PTuningV1(pattern="{p} {text}", position=1, slots=slots, reparametrise=False)
    params = method.init(backbone, torch.Generator())
    digits = backbone.tokenizer.convert_tokens_to_ids([str(i + 1) for i in range(len(params["vectors"]))])
    params["vectors"] = backbone.embed(torch.tensor(digits)).float()
    deltas = DeltaSet(method.deltas(params, backbone))
    rows = [{"a": a, "b": b} for a, b in TEXTS]
    ours = pad(encode(backbone, [Template(template).render(row) for row in rows], max_length=40), backbone.pad_id)
    with torch.no_grad():
        plan = Plan([deltas, None, deltas])
        found = backbone.run(plan, ours.input_ids, ours.attention_mask, ours.token_type_ids, ours.slots)
        length = int(ours.attention_mask[1].sum())
        types = None if ours.token_type_ids is None else ours.token_type_ids[1:2, :length]
        alone = backbone.run(Plan([None]), ours.input_ids[1:2, :length], None, types)
    close(found[1, : alone.shape[1]], alone[0])
    inserted = set(backbone.tokenizer.convert_tokens_to_ids(list("123489")))
    for i in (0, 2):
        (whole,) = encode(backbone, [Template(written).render(rows[i])], max_length=40)
        ids = [whole.input_ids[0], digits[0], *whole.input_ids[1:]]
        types = None if whole.token_type_ids is None else torch.tensor([[0, *whole.token_type_ids]])
        with torch.no_grad():
            expected = backbone.run(Plan([None]), torch.tensor([ids]), None, types)[0]
        own = [place for place, token in enumerate(ids) if token not in inserted]
        assert [ids[place] for place in own] == ours.input_ids[i, : len(own)].tolist()
        close(found[i, : len(own)], expected[own])


def test_padding_on_the_left_moves_slots(make_backbone, close, random_params):
    bert = make_backbone("roberta")  # its positions count tokens, wherever the padding is
    method = PTuningV1(slots=("{p*2}",), reparametrise=False)
    deltas = DeltaSet(method.deltas(random_params(bert, method, 1), bert))
    ids, slots = torch.tensor([[2, 7, 8, 9, 3]]), torch.tensor([[3]])
    with torch.no_grad():
        plain = bert.run(Plan([deltas]), ids, slots=slots)
        padded = torch.cat([torch.full((1, 2), bert.pad_id), ids], 1)
        left = bert.run(Plan([deltas]), padded, (padded != bert.pad_id).long(), slots=slots)
    assert plain.shape[1] == 5 and left.shape[1] == 7
    close(left[:, 2:], plain)


def test_a_row_with_slots_does_not_depend_on_its_neighbours(make_backbone, random_adapter, close):
    backbone = make_backbone("roberta")
    task = Task(name="t", kind="classification", template=("{a} {|} {b} {|} is",), label="y", labels=("n", "y", "m"))
    bank = Bank(backbone)
    made = {
        "slots": PTuningV1(slots=("{p*2}", "good {p}"), position=1),
        "one": PTuningV1(pattern="{text} {p}", slots=("{p*3}",), reparametrise=False),
        "prompt": mt.PromptTuning(length=3),
        "lora": mt.LoRA(),
        "head": mt.HeadOnly(),
        "aot": mt.AoTFC(r=2),
    }
    for i, (name, method) in enumerate(made.items()):
        bank.add(name, dataclasses.replace(random_adapter(backbone, method, i), task=task))
    rows = [(name, {"a": a, "b": b}) for name in bank.names for a, b in TEXTS]
    mixed = bank.predict(rows, batch_size=64)
    for together, row in zip(mixed, rows, strict=True):
        close(together.logits, bank.predict([row])[0].logits)
    without = Task(name="t", kind="classification", template=("{a} {b} is",), label="y", labels=("n", "y", "m"))
    bank.add("plain", dataclasses.replace(random_adapter(backbone, mt.LoRA(), list(made).index("lora")), task=without))
    for a, b in TEXTS:  # what has nothing for slots reads the text without them
        left, right = bank.predict([("lora", {"a": a, "b": b}), ("plain", {"a": a, "b": b})])
        close(left.logits, right.logits)


def test_an_adapter_with_slots_is_saved_and_read(bert, random_adapter, tmp_path):
    task = Task(name="t", kind="classification", template=("{a} {|} {b}",), label="y", labels=("n", "y", "m"))
    method = PTuningV1(pattern="{p} {text} film", slots=("good {p*2}",))
    adapter = dataclasses.replace(random_adapter(bert, method, 1), task=task)
    good, film = bert.tokenizer.convert_tokens_to_ids(["good", "film"])
    assert adapter.params["layout"].tolist() == [-1, -3, good, -1, -1, -2, film]
    adapter.save(tmp_path / "a")
    bank = Bank(bert)
    bank.add("before", adapter)
    bank.add("after", mt.Adapter.load(tmp_path / "a", bert))
    row = {"a": "the film", "b": "x"}
    before, after = bank.predict([("before", row), ("after", row)])
    assert torch.equal(before.logits, after.logits)


def test_pseudo_tokens_in_slots_are_trained(make_backbone):
    task = Task(name="t", kind="classification", template=("{a} {|}", "{|} {b} {|}"), label="y", labels=("n", "y", "m"))
    rows = [{"a": TEXTS[i % 3][0], "b": TEXTS[i // 3 % 3][1], "y": "ny"[i % 2]} for i in range(12)]
    data = mt.TaskData(task=task, train=rows, validation=rows, test=None)
    backbone, method = make_backbone("bert"), PTuningV1(slots=("{p}", "{p} ?", "{p*2}"), pattern="{text}")
    settings = dict(progress=False, batch_size=4, epochs=1, cache_frozen="auto")
    result = mt.train(backbone, data, method, **settings, learning_rate=1e-2)
    assert result.adapter.params["vectors"].shape == (4, 32) and not result.adapter.method.reparametrise
    scores = mt.evaluate(backbone, result.adapter, data)
    assert scores["accuracy"] == pytest.approx(result.best_metric)


def test_slots_that_are_not_there_are_refused(bert, random_adapter, tasks):
    bank = Bank(bert)
    bank.add("a", random_adapter(bert, PTuningV1(slots=("{p}", "{p}"))))
    with pytest.raises(
        mt.PlanError, match=r"row 0: its prompt has vectors for slot 0, .*has 0 slots; write \{\|\} into"
    ):
        bank.predict([("a", "the film")])
    task = Task(name="t", kind="classification", template=("{a} {|}",), label="y", labels=("n", "y", "m"))
    bank.add("b", dataclasses.replace(random_adapter(bert, PTuningV1(slots=("{p}", "{p}"))), task=task))
    with pytest.raises(mt.PlanError, match="for slot 1, from 0, but the row's text has 1 slots"):
        bank.predict([("b", "the film")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "{text}", "slots": ("good",)}, "has no pseudo token"),
        ({"slots": ("{text} {p}",)}, "slot '{text} {p}' is not possible"),
        ({"slots": ("",)}, "slot '' is not possible; give pseudo tokens"),
        ({"slots": ("{q}",)}, "has other braces"),
    ],
)
def test_slots_that_cannot_be_filled_are_refused(settings, message):
    with pytest.raises(mt.ConfigError, match=message):
        PTuningV1(**settings)
