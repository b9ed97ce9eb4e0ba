"""Training an adapter that writes: loss on the answer alone, by tokens, with every method; judged, saved, resumed."""

import math

import pytest
import torch

from multitune import (
    Adapter,
    BackboneError,
    Bank,
    ConfigError,
    DataError,
    Plan,
    PromptTuning,
    PTuningV1,
    Task,
    TrainConfig,
    evaluate,
    get_method,
    method_names,
)
from multitune.errors import DataWarning
from multitune.heads import Head
from multitune.language_loss import IGNORED
from multitune.tasks import TaskData
from multitune.training.data import Collator, TaskRows
from multitune.training.model import TuningModel

WRITE = Task(name="name it", kind="generation", template=("{text} :",), label="answer")
ROWS = [
    {"text": "good film", "answer": "good"},
    {"text": "bad bad film x1", "answer": "bad bad"},
    {"text": "the very good film", "answer": ["good", "very good"]},
    {"text": "not good", "answer": "bad"},
]


@pytest.fixture(scope="module")
def gpt2(make_backbone):
    return make_backbone("gpt2")


@pytest.fixture
def data():
    return TaskData(task=WRITE, train=ROWS * 3, validation=ROWS, test=None)


def nll(backbone, deltas, ids, first):
    """Slow twin: the losses of tokens `first`... of one row, from its full logits, one by one."""
    logits = backbone.logits(Plan([deltas]), torch.tensor([ids]))[0].double().log_softmax(-1)
    return [-float(logits[t - 1, ids[t]]) for t in range(first, len(ids))]


@pytest.fixture
def model(gpt2, delta_set):
    method = get_method("lora")()
    params = method.init(gpt2, torch.Generator().manual_seed(0))
    params = {k: t + 0.1 for k, t in params.items()}
    return TuningModel(gpt2, method, params, Head.for_task(WRITE), {}).eval()


def test_every_answer_is_a_row_and_ends_with_the_end_of_text(gpt2):
    rows = TaskRows(gpt2, WRITE, ROWS, max_length=40, split="train")
    assert len(rows) == 5
    words = [gpt2.tokenizer.convert_ids_to_tokens(i.sequences[0].input_ids[-i.target :]) for i in rows.items]
    assert words[:4] == [["good", "[SEP]"], ["bad", "bad", "[SEP]"], ["good", "[SEP]"], ["very", "good", "[SEP]"]]
    assert all(i.sequences[0].input_ids[-1] == 3 for i in rows.items)  # eos_token_id of the tiny GPT-2


def test_the_loss_is_the_mean_over_tokens_of_answers_only(gpt2, model):
    rows = TaskRows(gpt2, WRITE, ROWS, max_length=40, split="train")
    batch = Collator("generation", gpt2.pad_id)(rows.items)
    assert (batch["targets"] != IGNORED).sum() == sum(i.target for i in rows.items)
    expected = [
        loss for i in rows.items for loss in nll(gpt2, model.delta_set(), i.sequences[0].input_ids, len(i) - i.target)
    ]
    assert model(**batch)["loss"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_smoothing_counts_in_training_alone(gpt2, model):
    rows = TaskRows(gpt2, WRITE, ROWS, max_length=40, split="train")
    batch = Collator("generation", gpt2.pad_id)(rows.items)
    plain = model(**batch)["loss"]
    model.label_smoothing = 0.2
    torch.testing.assert_close(model(**batch)["loss"], plain, rtol=0, atol=0)
    logits = model(**{k: t for k, t in batch.items() if k != "targets"})["logits"].log_softmax(-1)
    here = batch["targets"][:, 1:] != IGNORED
    uniform = -logits[:, :-1][here].mean(-1).mean()
    model.train()
    torch.testing.assert_close(model(**batch)["loss"], 0.8 * plain + 0.2 * uniform)


def test_logits_in_pieces_give_the_same_gradients(gpt2, model, monkeypatch):
    batch = Collator("generation", gpt2.pad_id)(TaskRows(gpt2, WRITE, ROWS, max_length=40, split="train").items)

    def gradients():
        model.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        return loss, [p.grad.clone() for p in model.params]

    whole = gradients()
    monkeypatch.setattr("multitune.language_loss.MOST_LOGITS", 3 * gpt2.vocab_size)
    torch.testing.assert_close(gradients(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", method_names())
def test_every_method_learns_to_write(name, make_backbone, data, quick, tmp_path, one_thread):
    backbone = make_backbone("llama", tie_word_embeddings=True)
    before = {k: t.clone() for k, t in backbone.model.state_dict().items()}
    method = get_method(name)()
    if name == "head":
        with pytest.raises(ConfigError, match="trains nothing"):
            quick(backbone, data, method)
        return
    result = quick(backbone, data, method, max_steps=4, evaluations_per_epoch=1)
    assert result.metric == "perplexity" and result.num_head_parameters == 0
    losses = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert result.best_metric == pytest.approx(math.exp(min(losses)))
    result.adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", backbone)
    assert loaded.task == WRITE and loaded.head.kind == "generation" and not loaded.head_params
    scores = evaluate(backbone, loaded, data, batch_size=3)
    assert scores == pytest.approx({k: result.adapter.metrics[k] for k in ("loss", "perplexity")}, rel=2e-4)
    assert all(torch.equal(t, before[k]) for k, t in backbone.model.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "prompt", "prefix", "aot_fc"])
def test_half_the_batch_and_twice_the_accumulation_are_the_same_run(name, gpt2, data, quick, same_tensors, one_thread):
    one = quick(gpt2, data, name, batch_size=4, max_steps=3)
    two = quick(gpt2, data, name, batch_size=2, gradient_accumulation=2, max_steps=3)
    for key, t in one.adapter.params.items():
        torch.testing.assert_close(two.adapter.params[key], t, rtol=1e-4, atol=1e-5)
    uneven = [e["loss"] for e in one.history if "loss" in e]
    assert [e["loss"] for e in two.history if "loss" in e] == pytest.approx(uneven, rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_tensors(name, gpt2, data, quick, same_tensors, stopping, tmp_path):
    settings = dict(epochs=3, max_steps=None, evaluations_per_epoch=2, batch_size=4)
    whole = quick(gpt2, data, name, **settings)
    with pytest.raises(stopping.error):
        quick(gpt2, data, stopping(get_method(name), 13)(), tmp_path / "a", **settings)
    again = quick(gpt2, data, name, tmp_path / "a", **settings)
    same_tensors(whole.adapter, again.adapter)
    assert again.history == whole.history


def test_a_run_learns_its_answers(gpt2, quick):
    data = TaskData(task=WRITE, train=ROWS[:2], validation=ROWS[:2], test=None)
    result = quick(gpt2, data, "full", max_steps=40, learning_rate=1e-2, scheduler="constant")
    assert result.best_metric < 1.5  # nearly every token is certain


def test_an_adapter_that_writes_shares_a_bank_with_classifiers(gpt2, random_adapter, data, quick):
    bank = Bank(gpt2)
    bank.add("mood", random_adapter(gpt2, get_method("lora")(), pooling="last"))
    bank.add("writer", quick(gpt2, data, "ia3").adapter)
    assert bank.predict([("mood", "good film")])[0].label in ("bad", "good", "mixed")
    with pytest.raises(DataError, match=r"row 1: adapter 'writer' writes texts.*use Bank\.generate"):
        bank.predict([("mood", "good film"), ("writer", "good film")])


@pytest.mark.parametrize("method", [PromptTuning(length=2, position=-1), PTuningV1(pattern="{p*2} {text} {p}")])
def test_vectors_behind_the_prompt_are_refused(method, gpt2, data, quick):
    with pytest.raises(ConfigError, match="must stand in front of the prompt's last token"):
        quick(gpt2, data, method)


def test_answers_that_do_not_fit_are_named_and_prompts_are_cut_with_a_warning(gpt2, data, quick):
    with pytest.raises(DataError, match=r"answers of 6 of 15.*\(rows 1, 2, 5, 6, 9, \.\.\., .*Set max_length=\d+"):
        quick(gpt2, data, "lora", max_length=5)
    with pytest.warns(DataWarning, match="longer than max_length=8.*front of their prompts is cut off"):
        quick(gpt2, data, "lora", max_length=8)


def test_what_cannot_write_is_refused(make_backbone, gpt2, data, quick, make_data):
    with pytest.raises(BackboneError, match="no language-model head"):
        quick(make_backbone("bert"), data, "lora")
    with pytest.raises(BackboneError, match="no token that ends a text"):
        quick(make_backbone("gpt2", eos_token_id=None), data, "lora")
    with pytest.raises(ConfigError, match="label_smoothing=0.1 is for generation"):
        quick(gpt2, make_data(), "lora", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="label_smoothing=1.0"):
        TrainConfig(label_smoothing=1.0)


def test_an_empty_answer_is_named(gpt2, quick):
    data = TaskData(task=WRITE, train=[*ROWS, {"text": "x", "answer": " "}], validation=ROWS, test=None)
    with pytest.raises(DataError, match="train rows of task 'name it', row 5: the answer is empty"):
        quick(gpt2, data, "lora")
