"""Adapters that were trained to write: their templates in generation, and what they write judged and kept."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
import transformers

from multitune import Adapter, AdapterError, Backbone, Bank, ConfigError, DataError, Head, Task, get_method, merge
from multitune.answers import Answered
from multitune.generation import evaluate_texts
from multitune.generation.prompts import encode_for_task
from multitune.training.language import answer_losses, served

WRITE = Task(name="w", kind="generation", template=("{text} :",), label="y", metric="exact_match", format="plain")
ROWS = [
    {"text": "good film", "y": "good"},
    {"text": "bad & <film>", "y": ["bad", "not good"]},
    {"text": "good film", "y": "very good"},
]
SETTINGS = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def gpt2(make_backbone):
    return make_backbone("gpt2")


@pytest.fixture(scope="module")
def writer(gpt2, random_params):
    def make(name):
        method = get_method(name)()
        return Adapter(
            name=name,
            method=method,
            params=random_params(gpt2, method),
            head=Head.for_task(WRITE, pooling="last"),
            head_params={},
            task=WRITE,
            backbone=gpt2.describe(),
            max_length=20,
        )

    return make


@pytest.fixture
def bank(gpt2, writer, random_adapter):
    bank = Bank(gpt2)
    for name in ("lora", "prefix", "aot_fc"):
        bank.add(name, writer(name))
    bank.add("mood", random_adapter(gpt2, get_method("ia3")(), pooling="last"))
    return bank


def test_rows_are_put_into_the_template_as_in_training(bank, gpt2):
    ids = encode_for_task(gpt2, WRITE, ROWS[0], 18, "row 0")
    rows = [("lora", ROWS[0]), ("lora", "good film"), ("prefix", {"text": "good film"}), ("mood", "good film : ")]
    by_hand = [("lora", ids), ("lora", ids), ("prefix", ids), ("mood", "good film : ")]
    found, expected = bank.generate(rows, SETTINGS), bank.generate(by_hand, SETTINGS)
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    assert found[0].token_ids != found[2].token_ids  # the adapters do differ


def test_a_row_that_does_not_fit_is_named_before_anything_is_written(bank):
    words = "row 1: task 'w': no column 'text'; the row has 'txt'. Did you mean 'txt'?"
    with pytest.raises(DataError, match=re.escape(words)):
        bank.generate([("mood", "x"), ("lora", {"txt": "x"})], SETTINGS)
    with pytest.raises(AdapterError, match="row 1: the bank has no adapter 'lara'"):
        bank.generate([("lora", "x"), ("lara", {"text": "x"})], SETTINGS)


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt", "aot_fc", "houlsby", "full"])
def test_decoding_and_training_find_a_text_equally_likely(name, gpt2, writer):
    """Two paths to one number: log-probabilities step by step through the cache, and the loss of the whole row."""
    adapter = writer(name)
    bank = Bank(gpt2)
    bank.add(name, adapter)
    settings = {"max_new_tokens": 6, "stop_at_eos": False, "logprobs": True}
    (written,) = bank.generate([(name, ROWS[0])], settings)
    ids = encode_for_task(gpt2, WRITE, ROWS[0], 18, "row 0")
    on, deltas = served(gpt2, adapter)
    whole = Answered(input_ids=[*ids, *written.token_ids], num_answer=6, row=0)
    ((loss, count),) = answer_losses(on, deltas, [whole], batch_size=1)
    assert count == 6 and -loss == pytest.approx(sum(written.logprobs), rel=1e-4, abs=1e-4)


def test_what_is_written_stands_beside_what_is_right(bank, tmp_path):
    found = evaluate_texts(bank, "lora", ROWS, SETTINGS)
    assert [(w.prompt, w.references) for w in found.rows] == [
        ("good film :", ("good", "very good")),
        ("bad & <film> :", ("bad", "not good")),
    ]
    texts = [g.text.strip() for g in bank.generate([("lora", ROWS[0]), ("lora", ROWS[1])], SETTINGS)]
    assert [w.text for w in found.rows] == texts and found.scores.keys() == {"exact_match"}
    folder = found.save(tmp_path / "out")
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [line["text"] for line in lines] == texts and lines[1]["references"] == ["bad", "not good"]
    facts = json.loads((folder / "scores.json").read_text())
    assert facts["scores"] == found.scores
    assert facts["settings"]["max_new_tokens"] == 5 and facts["settings"]["temperature"] == 0
    cells = []

    class Reader(HTMLParser):
        def handle_data(self, data):
            cells.append(data)

    page = (folder / "predictions.html").read_text("utf-8")
    Reader().feed(page)
    assert {"bad & <film> :", "not good", "very good"} <= set(cells)
    assert "at most 5 tokens each<" in page
    assert "http" not in page and "src=" not in page  # nothing from elsewhere


def test_only_so_many_rows_and_only_adapters_that_write(bank):
    assert len(evaluate_texts(bank, "prefix", ROWS, SETTINGS, num_rows=1).rows) == 1
    with pytest.raises(DataError, match="adapter 'mood' is for classification and writes nothing"):
        evaluate_texts(bank, "mood", ROWS)
    with pytest.raises(DataError, match="task '.*' is of kind classification and writes nothing"):
        evaluate_texts(bank, None, ROWS, task=bank.adapter("mood").task)
    with pytest.raises(DataError, match="row 0: not a word of its prompt fits into the 1 tokens left"):
        evaluate_texts(bank, None, ROWS, {"max_new_tokens": bank.backbone.max_length - 1}, task=WRITE)
    with pytest.raises(DataError, match="no rows to judge"):
        evaluate_texts(bank, "lora", [])
    for num_rows in (0, -1):
        with pytest.raises(ConfigError, match=f"num_rows={num_rows} is not possible; give at least 1"):
            evaluate_texts(bank, "lora", ROWS, num_rows=num_rows)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_merged_writer_is_a_language_model_that_writes_the_same(
    name, tied, make_model, make_backbone, random_params, tmp_path
):
    body = make_model("llama", tie_word_embeddings=tied, eos_token_id=3)
    whole = transformers.LlamaForCausalLM(body.config).eval()
    whole.base_model.load_state_dict(body.state_dict())
    backbone = Backbone(whole, make_backbone("llama").tokenizer)
    method = get_method(name)()
    adapter = Adapter(
        name=name,
        method=method,
        params=random_params(backbone, method),
        head=Head.for_task(WRITE, pooling="last"),
        head_params={},
        task=WRITE,
        backbone=backbone.describe(),
        max_length=20,
    )
    bank = Bank(backbone)
    bank.add(name, adapter)
    (written,) = bank.generate([(name, ROWS[0])], {"max_new_tokens": 8})
    merge(adapter, backbone, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([encode_for_task(backbone, WRITE, ROWS[0], 18, "row 0")])
    theirs = merged.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert tuple(theirs.tolist()) == written.token_ids
