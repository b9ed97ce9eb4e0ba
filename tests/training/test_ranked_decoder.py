"""Rows with candidate answers on encoder-decoders: the prompt for the encoder, every answer for the decoder."""

import math

import pytest
import torch

from multitune import (
    Adapter,
    BackboneError,
    Bank,
    DataError,
    Head,
    LoRA,
    Pattern,
    Plan,
    PromptTuning,
    Task,
    evaluate,
    get_method,
    merge,
    method_names,
)
from multitune.errors import DataWarning, TaskError
from multitune.prompting import RandomExamples, rank
from multitune.ranked import encode_ranked
from multitune.tasks import TaskData
from multitune.training.config import LOSS_NAMES
from multitune.training.data import Collator, TaskRows
from multitune.training.model import TuningModel

WRITERS = ["t5/writes", "bart/writes"]
MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]
SMALL = {"ptuning_v2": dict(length=3), "prefix": dict(length=3, reparametrise=False), "prompt": dict(length=2)}
SAID = {"good": "very good", "bad": "bad", "mixed": "bad film a"}
MOOD = Task(
    name="mood",
    kind="classification",
    template=("text",),
    label="y",
    labels=("bad", "good", "mixed"),
    pattern=Pattern("text {text} is {mask}", SAID),
)
ROWS = [
    {"text": "good film", "y": "good"},
    {"text": "the bad bad film", "y": "bad"},
    {"text": "not a good film at all", "y": "mixed"},
    {"text": "x", "y": "good"},
    {"text": "cat dog", "y": "bad"},
]


@pytest.fixture(scope="module")
def tiny(make_backbone):
    made = {}
    return lambda name: made.setdefault(name, make_backbone(name))


@pytest.fixture
def data():
    return TaskData(task=MOOD, train=ROWS * 2, validation=ROWS, test=None)


def of_transformers(model, tokenizer, prompt):
    """Slow twin: per label the losses of its tokens by transformers' own model, from `labels`, one by one."""
    found = []
    for name in MOOD.labels:
        texts = {"input_ids": prompt, "labels": SAID[name]}
        given = {k: torch.tensor([tokenizer(text)["input_ids"]]) for k, text in texts.items()}
        assert given["labels"][0, 0] == 2 and given["labels"][0, -1] == model.config.eos_token_id
        with torch.no_grad():
            out = model(**given)
        own = out.logits[0].double().log_softmax(-1).gather(1, given["labels"][0, :, None])[:, 0].tolist()
        assert -sum(own) / len(own) == pytest.approx(out.loss.item(), rel=1e-4)
        found.append(own)
    return found


def one_by_one(backbone, row, deltas):
    """Slow twin: per label the log-probabilities of its tokens under an adapter, each in a pass of its own."""
    prompt = torch.tensor([backbone.tokenizer(MOOD.pattern.text(row))["input_ids"]])
    found = []
    for name in MOOD.labels:
        own = backbone.tokenizer(SAID[name])["input_ids"]
        with torch.no_grad():
            hidden = backbone.run(Plan([deltas]), prompt, decoder_input_ids=torch.tensor([[4, *own[:-1]]]))
            chances = backbone.lm_head(hidden)[0].double().log_softmax(-1)
        found.append([float(chances[i, token]) for i, token in enumerate(own)])
    return found


def means(per_choice):
    return [sum(c) / len(c) for c in per_choice]


def tuning(backbone, losses=LOSS_NAMES, noise=0.1):
    method = LoRA(r=2)
    params = {k: t + noise for k, t in method.init(backbone, torch.Generator().manual_seed(0)).items()}
    return TuningModel(backbone, method, params, Head.for_task(MOOD), {}, losses=losses).eval()


def batch_of(backbone):
    items = TaskRows(backbone, MOOD, ROWS, max_length=32, split="train").items
    return Collator(MOOD.kind, backbone.pad_id, start_ids=backbone.start_ids)(items)


@pytest.mark.parametrize("name", [*WRITERS, "t5/gated/writes"])
@pytest.mark.parametrize("normalised", [True, False])
def test_prompting_scores_what_transformers_gives_for_the_labels(tiny, make_model, name, normalised):
    backbone, model = tiny(name), make_model(name).eval()
    pattern = Pattern("text {text} is", SAID, instruction="not film", separator=" ")
    examples = RandomExamples(ROWS[:1], 1)
    found = rank(backbone, MOOD, pattern, ROWS[1:], examples=examples, normalised=normalised, batch_size=5)
    for row, scores in zip(ROWS[1:], found.scores, strict=True):
        prompt = f"not film text good film is very good text {row['text']} is"
        expected = of_transformers(model, backbone.tokenizer, prompt)
        assert scores == pytest.approx(means(expected) if normalised else [sum(c) for c in expected], rel=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_each_loss_is_that_of_the_equation_on_the_labels_of_transformers(tiny, make_model, name):
    backbone, model = tiny(name), make_model(name).eval()
    per_row = [of_transformers(model, backbone.tokenizer, MOOD.pattern.text(row)) for row in ROWS]
    expected = dict.fromkeys(LOSS_NAMES, 0.0)
    for row, per_choice in zip(ROWS, per_row, strict=True):
        y, beta = MOOD.labels.index(row["y"]), means(per_choice)
        wrong = [p for n, c in enumerate(per_choice) if n != y for p in c]
        expected["language"] -= beta[y] / len(ROWS)
        expected["unlikelihood"] -= sum(math.log(1 - math.exp(p) + 0.01) for p in wrong) / len(wrong) / len(ROWS)
        expected["choice"] -= math.log(math.exp(beta[y]) / sum(map(math.exp, beta))) / len(ROWS)
    for loss in LOSS_NAMES:
        tuned = tuning(backbone, (loss,), noise=0.0)  # B is zero, so that nothing is changed
        found = tuned(**batch_of(backbone))
        assert found["loss"].item() == pytest.approx(expected[loss], rel=5e-5)
        for scores, per_choice in zip(found["logits"].tolist(), per_row, strict=True):
            assert scores == pytest.approx(means(per_choice), rel=5e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_a_batch_under_an_adapter_equals_its_choices_one_by_one(tiny, name):
    backbone = tiny(name)
    model = tuning(backbone)
    logits = model(**batch_of(backbone))["logits"].tolist()
    for row, scores in zip(ROWS, logits, strict=True):
        assert scores == pytest.approx(means(one_by_one(backbone, row, model.delta_set())), rel=1e-4)


def test_an_answer_that_begins_another_shares_its_sequence(tiny):
    backbone = tiny("t5/writes")
    (row,) = encode_ranked(backbone, MOOD, ROWS[:1], max_length=32, split="train")
    prompt = backbone.tokenizer("text good film is")["input_ids"]
    assert [s.input_ids for s in row.sequences] == [prompt] * 2
    bad, good, mixed = (backbone.tokenizer(SAID[name])["input_ids"] for name in MOOD.labels)
    assert [s.decoder_ids for s in row.sequences] == [[4, *mixed[:-1]], [4, *good[:-1]]]
    assert [c.tokens for c in row.choices] == [tuple(ids) for ids in (bad, good, mixed)]
    assert [c.sequence for c in row.choices] == [0, 1, 0] and row.choices[0].places == (0, 1, 2)


@pytest.mark.parametrize("name", WRITERS)
def test_any_method_ranks_in_one_mixed_batch_as_alone(tiny, random_params, name):
    backbone = tiny(name)
    bank, deltas = Bank(backbone), {}
    for i, of in enumerate(MIXABLE):
        method = get_method(of)(**SMALL.get(of, {}))
        adapter = Adapter(
            name=of, method=method, params=random_params(backbone, method, i, std=0.1), head=Head.for_task(MOOD),
            head_params={}, task=MOOD, backbone=backbone.describe(), max_length=32,
        )  # fmt: skip
        bank.add(of, adapter)
        deltas[of] = adapter.delta_set(backbone)
    asked = [(of, ROWS[i % len(ROWS)]) for i, of in enumerate(MIXABLE)]
    for (of, row), found in zip(asked, bank.predict(asked, batch_size=64), strict=True):
        expected = means(one_by_one(backbone, row, deltas[of]))
        assert found.logits.tolist() == pytest.approx(expected, rel=1e-3)
        assert found.label == MOOD.labels[max(range(3), key=expected.__getitem__)]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("t5/writes", "ia3"),
        ("t5/writes", "prefix"),
        ("t5/writes", "full"),
        ("bart/writes", "lora"),
        ("bart/writes", PromptTuning(length=2)),
    ],
)
def test_a_method_trains_saves_and_is_judged(make_backbone, data, quick, tmp_path, one_thread, name, method):
    backbone = make_backbone(name)
    result = quick(backbone, data, method, max_steps=4, learning_rate=1e-2)
    assert result.metric == "accuracy" and result.num_head_parameters == 0
    assert result.adapter.recipe["losses"] == "language+unlikelihood+choice"
    result.adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", backbone)
    assert loaded.task == MOOD
    assert evaluate(backbone, loaded, data)["accuracy"] == pytest.approx(result.best_metric)
    if method == "lora":
        assert merge(loaded, backbone, tmp_path / "merged").max_difference < 1e-3


def test_training_finds_the_answers(make_backbone, quick, one_thread):
    rows = [{"text": word, "y": label} for word, label in [("cat", "good"), ("dog", "bad"), ("film", "mixed")]]
    data = TaskData(task=MOOD, train=rows * 4, validation=rows, test=None)
    result = quick(make_backbone("bart/writes"), data, LoRA(r=8), max_steps=40, learning_rate=3e-2)
    assert result.best_metric == 1.0


def test_what_examples_teach_is_distilled(make_backbone, data, quick, one_thread):
    backbone = make_backbone("t5/writes", max_position_embeddings=160)
    settings = dict(distill_examples=3, max_steps=1, batch_size=10, losses="choice", evaluations_per_epoch=1, seed=1)
    examples = RandomExamples(ROWS, 3, seed=1)
    taught = rank(backbone, MOOD, MOOD.pattern, ROWS, examples=examples).scores
    bare = rank(backbone, MOOD, MOOD.pattern, ROWS).scores
    p, q = (torch.tensor(scores).log_softmax(1) for scores in (taught, bare))
    found = quick(backbone, data, "lora", **settings).history[0]["loss"]
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)


def test_prompt_and_answer_have_all_positions_each(tiny):
    backbone = tiny("bart/writes")
    long = [{"text": "film " * 60, "y": "bad"}]
    with pytest.warns(DataWarning, match="1 of 1 train rows are longer than max_length=20"):
        (row,) = encode_ranked(backbone, MOOD, long, max_length=20, split="train")
    assert 18 <= len(row.sequences[0].input_ids) <= 20
    with pytest.raises(DataError, match="row 0.*pattern and answers alone take more than the 4 tokens"):
        encode_ranked(backbone, MOOD, ROWS, max_length=4, split="train")
    with pytest.raises(DataError, match=r"row 0: its examples, prompt and answer are 68 tokens.*40 positions"):
        rank(backbone, MOOD, MOOD.pattern, long)


def test_what_cannot_be_is_refused(tiny, make_backbone, data, quick):
    backbone = tiny("bart/writes")
    with pytest.raises(TaskError, match=r"text behind \{mask\}"):
        quick(backbone, data.with_pattern(Pattern("{text} is {mask} film", SAID)), "lora")
    with pytest.raises(BackboneError, match="row 0: .*a row without an adapter has no embedding; name an adapter"):
        Bank(backbone).predict([(None, "good")])
    with pytest.raises(BackboneError, match=r"its encoder runs alone.*\+decoder"):
        quick(make_backbone("t5"), data, "lora")
