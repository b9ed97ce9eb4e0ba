"""The head of masked language models: transformers' logits, tied to the backbone's words; refused where it lacks."""

import pytest
import torch

from multitune import (
    Adapter,
    AdapterError,
    Backbone,
    BackboneError,
    Bank,
    Head,
    LoRA,
    Pattern,
    Plan,
    Task,
    get_method,
    merge,
)
from multitune.lsg import convert_to_lsg

KINDS = (
    "bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2/v3", "deberta", "albert", "mpnet",
    "modernbert",
)  # fmt: skip
CLOZE = Task(
    name="cloze",
    kind="classification",
    template=("text",),
    label="y",
    labels=("no", "yes"),
    pattern=Pattern("{text} is {mask} film", {"no": "bad", "yes": "very good"}),
)


@pytest.fixture
def saved(make_masked, tmp_path):
    """`saved(name)`: a masked language model, and the folder of its checkpoint."""

    def make(name):
        model, tokenizer = make_masked(name)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return make


def logits(backbone, ids):
    with torch.no_grad():
        return backbone.masked_head(backbone.run(Plan([None] * len(ids)), ids))


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_transformers(name, saved):
    model, folder = saved(name)
    ids = torch.randint(6, 70, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    loaded = Backbone.load(folder)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-5, atol=1e-6)
    copied = loaded.clone()
    assert loaded.masked_head.weight is loaded.word_embeddings and copied.masked_head.weight is copied.word_embeddings
    torch.testing.assert_close(logits(Backbone(model), ids), expected, rtol=1e-5, atol=1e-6)


def test_words_that_are_trained_change_the_head_with_them(saved):
    _, folder = saved("bert")
    backbone = Backbone.load(folder)
    ids = torch.tensor([[7, 8, 9]])
    before = logits(backbone, ids)
    path = f"{backbone.architecture.embedding}.weight"
    words = torch.randn(backbone.word_embeddings.shape, generator=torch.Generator().manual_seed(0))
    moved = backbone.with_weights({path: words})
    hidden = moved.run(Plan([None]), ids)
    own = moved.masked_head.modules[0].predictions
    by_hand = own.transform(hidden) @ words.T + own.bias
    torch.testing.assert_close(moved.masked_head(hidden), by_hand)
    torch.testing.assert_close(logits(backbone, ids), before, rtol=0, atol=0)


def test_a_head_of_another_dtype_and_of_a_conversion(saved):
    model, folder = saved("bert")
    low = Backbone.load(folder, dtype="bfloat16")
    assert low.masked_head(torch.zeros(1, low.hidden_size, dtype=torch.bfloat16)).dtype == torch.bfloat16
    long = convert_to_lsg(Backbone.load(folder), max_length=80, block=8)
    ids = torch.randint(6, 70, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(long, ids).shape, model(input_ids=ids).logits.shape)


def test_a_checkpoint_without_the_head_is_named(make_model, tmp_path, make_backbone, saved):
    tokenizer = make_backbone("bert").tokenizer
    make_model("bert").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(BackboneError, match="holds the base model without it. Load a checkpoint with it"):
        _ = Backbone.load(tmp_path / "base").masked_head
    _, folder = saved("bert")
    gone = Backbone.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BackboneError, match="cannot read the head of the masked language model"):
        _ = gone.masked_head
    with pytest.raises(BackboneError, match="no language-model head: it is no causal model"):
        _ = gone.lm_head


def test_a_tokenizer_without_a_mask_is_refused(make_masked):
    model, tokenizer = make_masked("bert")
    tokenizer.mask_token = None
    backbone = Backbone(model, tokenizer)
    bank = Bank(backbone)
    bank.add("cloze", adapter_of(backbone, LoRA(r=2), {}))
    with pytest.raises(BackboneError, match="has no mask token"):
        bank.predict([("cloze", "film")])


def test_masked_answers_of_a_fully_tuned_backbone(make_masked, random_params):
    """Served as a backbone of its own, whose head follows its words; and not merged into a base model without head."""
    backbone = Backbone(*make_masked("bert"))
    adapter = adapter_of(backbone, get_method("full")(), random_params(backbone, get_method("full")()))
    bank = Bank(backbone)
    bank.add("cloze", adapter)
    (found,) = bank.predict([("cloze", "not good")])
    tuned = backbone.with_weights(adapter.params)
    ids = backbone.tokenizer("not good is [MASK] film", return_tensors="pt")["input_ids"]
    place = (ids[0] == backbone.tokenizer.mask_token_id).nonzero().item()
    word = backbone.tokenizer.convert_tokens_to_ids("bad")
    assert found.logits[0].item() == pytest.approx(logits(tuned, ids)[0, place].log_softmax(-1)[word].item(), rel=1e-4)
    with pytest.raises(AdapterError, match="through the head of a masked language model"):
        merge(adapter, backbone, "nowhere")


def test_a_ranking_adapter_merges_into_a_causal_language_model(make_backbone, random_params, tmp_path):
    import transformers

    backbone = make_backbone("llama", tie_word_embeddings=True)
    method = LoRA(r=2)
    task = Task.from_dict(CLOZE.to_dict() | {"pattern": {"prompt": "{text} is"}})
    adapter = adapter_of(backbone, method, random_params(backbone, method), task)
    bank = Bank(backbone)
    bank.add("a", adapter)
    (found,) = bank.predict([("a", "good film")])
    merge(adapter, backbone, tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompt, own = (backbone.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("good film is", "no"))
    with torch.no_grad():
        p = whole(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
    expected = sum(float(p[len(prompt) - 1 + i, token]) for i, token in enumerate(own)) / len(own)
    assert found.logits[0].item() == pytest.approx(expected, rel=1e-4)


def adapter_of(backbone, method, params, task=CLOZE):
    return Adapter(
        name="cloze",
        method=method,
        params=params or method.init(backbone, torch.Generator().manual_seed(0)),
        head=Head.for_task(task),
        head_params={},
        task=task,
        backbone=backbone.describe(),
    )
