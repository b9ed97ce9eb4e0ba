"""Rows with several candidate answers, trained and judged as language: T-Few, patterns with masks, distillation."""

import dataclasses
import json
import math

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st

from multitune import (
    IA3,
    Adapter,
    Backbone,
    BackboneError,
    Bank,
    ConfigError,
    DataError,
    Head,
    LoRA,
    Pattern,
    Plan,
    PromptTuning,
    Task,
    TaskError,
    TrainConfig,
    TrainJob,
    evaluate,
    get_method,
    train_many,
)
from multitune.errors import DataWarning
from multitune.prompting import RandomExamples, rank
from multitune.ranked import encode_ranked, index_of
from multitune.tasks import TaskData
from multitune.training.choices import LOSSES
from multitune.training.config import LOSS_NAMES
from multitune.training.data import Collator, TaskRows
from multitune.training.model import TuningModel

SAID = {"good": "very good", "bad": "bad", "mixed": "a b"}
MOOD = Task(
    name="mood",
    kind="classification",
    template=("text",),
    label="y",
    labels=("bad", "good", "mixed"),
    pattern=Pattern("text {text} is :", SAID),
)
CLOZE = Task(
    name="cloze",
    kind="classification",
    template=("text",),
    label="y",
    labels=("bad", "good", "mixed"),
    pattern=Pattern("{text} is {mask} film", SAID),
)
CAUSE = Task(
    name="cause",
    kind="multiple_choice",
    template=("{text}",),
    label="y",
    choices=("{one}", "{two}"),
    pattern=Pattern("{text} so"),
)
ROWS = [
    {"text": "good film", "y": "good"},
    {"text": "the bad bad film", "y": "bad"},
    {"text": "not a good film at all", "y": "mixed"},
    {"text": "x", "y": "good"},
    {"text": "cat dog", "y": "bad"},
]
CAUSES = [
    {"text": "the film", "one": "good", "two": "bad bad", "y": "two"},
    {"text": "x", "one": "very good film", "two": "bad", "y": 0},
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def causal(request, make_backbone):
    return make_backbone(request.param, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def gpt2(make_backbone):
    return make_backbone("gpt2")


@pytest.fixture(scope="module")
def roomy(make_backbone):
    """With positions for examples."""
    return make_backbone("gpt2", n_positions=160)


@pytest.fixture(scope="module")
def masked(make_masked):
    return Backbone(*make_masked("bert"), name="masked")


@pytest.fixture
def data():
    return TaskData(task=MOOD, train=ROWS * 3, validation=ROWS, test=None)


def tokens(backbone, text):
    return backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def chances(backbone, row, task, deltas=None):
    """Slow twin: per choice the log-probabilities of its tokens, each choice in a pass of its own."""
    found = []
    for answer in task.pattern.answers(task, row):
        own = tokens(backbone, answer)
        if backbone.causal:
            prompt = tokens(backbone, task.pattern.text(row))
            logits = backbone.token_head(backbone.run(Plan([deltas]), torch.tensor([prompt + own])))
            places = range(len(prompt) - 1, len(prompt) + len(own) - 1)
        else:
            before, after = task.pattern.parts(row)
            cls, sep = backbone.tokenizer("")["input_ids"]
            lead = [cls, *tokens(backbone, before)]
            ids = [*lead, *[backbone.tokenizer.mask_token_id] * len(own), *tokens(backbone, after), sep]
            logits = backbone.token_head(backbone.run(Plan([deltas]), torch.tensor([ids])))
            places = range(len(lead), len(lead) + len(own))
        p = logits[0].detach().double().log_softmax(-1)
        found.append([float(p[place, token]) for place, token in zip(places, own, strict=True)])
    return found


def losses_by_hand(per_row, targets, eps=0.01):
    """The three losses of methods.md section 7, from log-probabilities per row and choice."""
    out = dict.fromkeys(LOSS_NAMES, 0.0)
    for row, y in zip(per_row, targets, strict=True):
        beta = [sum(c) / len(c) for c in row]
        out["language"] -= beta[y] / len(per_row)
        wrong = [p for n, c in enumerate(row) if n != y for p in c]
        out["unlikelihood"] -= sum(math.log(1 - math.exp(p) + eps) for p in wrong) / len(wrong) / len(per_row)
        out["choice"] -= math.log(math.exp(beta[y]) / sum(map(math.exp, beta))) / len(per_row)
    return out


def tuning(backbone, task, losses=LOSS_NAMES, **more):
    method = LoRA(r=2)
    params = {k: t + 0.1 for k, t in method.init(backbone, torch.Generator().manual_seed(0)).items()}
    return TuningModel(backbone, method, params, Head.for_task(task), {}, losses=losses, **more).eval()


def batch_of(backbone, task, rows):
    items = TaskRows(backbone, task, rows, max_length=32, split="train").items
    return Collator(task.kind, backbone.pad_id)(items)


# ---- losses and scores


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_each_loss_is_that_of_the_equation_on_a_causal_model(name, causal):
    model = tuning(causal, MOOD, (name,))
    batch = batch_of(causal, MOOD, ROWS)
    per_row = [chances(causal, row, MOOD, model.delta_set()) for row in ROWS]
    targets = [MOOD.labels.index(row["y"]) for row in ROWS]
    found = model(**batch)
    assert found["loss"].item() == pytest.approx(losses_by_hand(per_row, targets)[name], rel=2e-5)
    for scores, row in zip(found["logits"].tolist(), per_row, strict=True):
        assert scores == pytest.approx([sum(c) / len(c) for c in row], rel=2e-5)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_each_loss_is_that_of_the_equation_on_a_masked_model(name, masked):
    model = tuning(masked, CLOZE, (name,))
    per_row = [chances(masked, row, CLOZE, model.delta_set()) for row in ROWS]
    targets = [CLOZE.labels.index(row["y"]) for row in ROWS]
    found = model(**batch_of(masked, CLOZE, ROWS))["loss"].item()
    assert found == pytest.approx(losses_by_hand(per_row, targets)[name], rel=2e-5)


def test_several_right_choices_of_a_list(gpt2):
    """They share the language loss, are no wrong ones, and are right together; rows list as many as they like."""
    task = Task(
        name="list",
        kind="multiple_choice",
        template=("{text}",),
        label="y",
        choices=("options",),
        pattern=Pattern("{text} so"),
    )
    rows = [
        {"text": "the film", "options": ["good", "bad bad", "x"], "y": [0, 2]},
        {"text": "x", "options": ["not", "very good"], "y": "not"},
    ]
    expected = dict.fromkeys(LOSS_NAMES, 0.0)
    for row, right in zip(rows, ([0, 2], [0]), strict=True):
        per_choice = chances(gpt2, row, task, tuning(gpt2, task).delta_set())
        beta = [sum(c) / len(c) for c in per_choice]
        wrong = [p for i, c in enumerate(per_choice) if i not in right for p in c]
        expected["language"] -= sum(beta[i] for i in right) / len(right) / 2
        expected["unlikelihood"] -= sum(math.log(1 - math.exp(p) + 0.01) for p in wrong) / len(wrong) / 2
        expected["choice"] -= math.log(sum(math.exp(beta[i]) for i in right) / sum(map(math.exp, beta))) / 2
    for name in LOSS_NAMES:
        found = tuning(gpt2, task, (name,))(**batch_of(gpt2, task, rows))["loss"].item()
        assert found == pytest.approx(expected[name], rel=2e-5)


SYNONYMS = {"good": ["very good", "good"], "bad": "bad", "mixed": ["a b", "a", "film"]}


@pytest.mark.parametrize("where", ["gpt2", "masked"])
def test_a_label_that_several_texts_say_has_the_mean_of_their_scores(where, request):
    """The slow twin reads every text by a pattern that says it alone; so do the bank and what is saved."""
    backbone, base = request.getfixturevalue(where), CLOZE if where == "masked" else MOOD

    def saying(said):
        return dataclasses.replace(base, pattern=Pattern(base.pattern.prompt, said))

    task = saying(SYNONYMS)
    model = tuning(backbone, task, ("choice",))
    expected = []
    for row in ROWS:
        of_label = []
        for label, name in enumerate(task.labels):
            texts = [SYNONYMS[name]] if isinstance(SYNONYMS[name], str) else SYNONYMS[name]
            own = [chances(backbone, row, saying({name: text}), model.delta_set())[label] for text in texts]
            of_label.append(sum(sum(c) / len(c) for c in own) / len(own))
        expected.append(of_label)
    found = model(**batch_of(backbone, task, ROWS))
    torch.testing.assert_close(found["logits"].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)
    targets = torch.tensor([task.labels.index(row["y"]) for row in ROWS])
    loss = torch.nn.functional.cross_entropy(torch.tensor(expected), targets)
    assert found["loss"].item() == pytest.approx(float(loss), rel=1e-4)
    params = {name: p.detach() for name, p in model.own().items()}
    adapter = Adapter(
        name="a", method=model.method, params=params, head=Head.for_task(task), head_params={}, task=task,
        backbone=backbone.describe(), max_length=32,
    )  # fmt: skip
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    bank = Bank(backbone)
    bank.add("a", adapter)
    for answer, scores in zip(bank.predict([("a", row) for row in ROWS]), expected, strict=True):
        assert answer.logits.tolist() == pytest.approx(scores, rel=1e-3)


def test_words_of_one_label_average_their_logits(make_masked):
    """methods.md 4.2: of several verbalizers per label the mean of their logits, then a softmax over the labels."""
    model, tokenizer = make_masked("bert", seed=3)
    said = {"no": ["bad", "not"], "yes": ["good", "very", "film"]}
    task = Task(
        name="pet", kind="classification", template=("text",), label="y", labels=("no", "yes"),
        pattern=Pattern("{text} is {mask}", said),
    )  # fmt: skip
    made = tokenizer("the film is [MASK]", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=made).logits[0, (made[0] == tokenizer.mask_token_id).nonzero().item()]
    means = torch.stack([logits[torch.tensor(tokenizer.convert_tokens_to_ids(said[n]))].mean() for n in task.labels])
    backbone = Backbone(model, tokenizer)
    tuned = TuningModel(backbone, LoRA(r=2), LoRA(r=2).init(backbone, torch.Generator()), Head.for_task(task), {})
    found = tuned.eval()(**batch_of(backbone, task, [{"text": "the film", "y": "yes"}]))
    torch.testing.assert_close(found["logits"][0].softmax(0), means.softmax(0))
    torch.testing.assert_close(found["loss"], -means.log_softmax(0)[1])


def test_several_losses_are_their_plain_sum(gpt2):
    batch = batch_of(gpt2, MOOD, ROWS)
    one_by_one = [tuning(gpt2, MOOD, (name,))(**batch)["loss"] for name in LOSSES]
    torch.testing.assert_close(tuning(gpt2, MOOD)(**batch)["loss"], torch.stack(one_by_one).sum())


def test_the_language_loss_is_that_of_transformers(make_model, gpt2):
    """`labels` of transformers' own model, a row at a time: as L_LM, the mean over the answer's tokens."""
    whole = transformers.GPT2LMHeadModel(make_model("gpt2").config).eval()
    whole.transformer.load_state_dict(make_model("gpt2").state_dict())
    whole.tie_weights()
    expected = []
    for row in ROWS:
        prompt, own = tokens(gpt2, MOOD.pattern.text(row)), tokens(gpt2, SAID[row["y"]])
        labels = torch.tensor([[-100] * len(prompt) + own])
        with torch.no_grad():
            expected.append(whole(input_ids=torch.tensor([prompt + own]), labels=labels).loss)
    model = tuning(gpt2, MOOD, ("language",))
    for p in model.params:
        p.data.zero_()
    torch.testing.assert_close(model(**batch_of(gpt2, MOOD, ROWS))["loss"], torch.stack(expected).mean())


def test_pattern_based_fine_tuning_is_a_softmax_over_the_verbalisers_words(make_masked):
    """methods.md 4.2: the logits of single tokens at the mask, and cross-entropy over that set alone."""
    model, tokenizer = make_masked("bert", seed=3)
    task = Task(
        name="pet",
        kind="classification",
        template=("text",),
        label="y",
        labels=("no", "yes"),
        pattern=Pattern("{text} is {mask}", {"no": "bad", "yes": "good"}),
    )
    rows = [{"text": "the film", "y": "yes"}, {"text": "x1", "y": "no"}]
    expected = []
    for row in rows:
        made = tokenizer(f"{row['text']} is [MASK]", return_tensors="pt")
        place = (made["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
        with torch.no_grad():
            logits = model(input_ids=made["input_ids"]).logits[0, place]
        words = logits[torch.tensor(tokenizer.convert_tokens_to_ids(["bad", "good"]))]
        expected.append(torch.nn.functional.cross_entropy(words, torch.tensor(task.labels.index(row["y"]))))
    backbone = Backbone(model, tokenizer)
    tuned = TuningModel(
        backbone, LoRA(r=2), LoRA(r=2).init(backbone, torch.Generator()), Head.for_task(task), {}
    ).eval()
    torch.testing.assert_close(tuned(**batch_of(backbone, task, rows))["loss"], torch.stack(expected).mean())


def test_scores_are_those_of_prompting(causal):
    """Without an adapter, what a task with a pattern scores is what `rank` scores."""
    model = tuning(causal, MOOD)
    for p in model.params:
        p.data.zero_()
    scores = model(**batch_of(causal, MOOD, ROWS))["logits"]
    expected = rank(causal, MOOD, MOOD.pattern, ROWS).scores
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_answers_of_one_input_share_it(gpt2, masked):
    (row,) = encode_ranked(gpt2, MOOD, ROWS[:1], max_length=32, split="train")
    assert len(row.sequences) == 2  # "bad" reads what "very" or "a" follow in
    assert [c.tokens for c in row.choices] == [tuple(tokens(gpt2, SAID[label])) for label in MOOD.labels]
    (row,) = encode_ranked(masked, CLOZE, ROWS[:1], max_length=32, split="train")
    assert [s.input_ids.count(masked.tokenizer.mask_token_id) for s in row.sequences] == [1, 2]
    assert [c.sequence for c in row.choices] == [0, 1, 1]
    index = index_of([row, row])
    assert index[:, 0].tolist() == [0] * 5 + [1] * 5 and index[5:, 2].tolist() == [2, 3, 3, 3, 3]


def test_a_mask_in_the_text_is_not_the_answers_place(masked):
    row = {"text": "good [MASK] film", "y": "good"}
    (found,) = encode_ranked(masked, CLOZE, [row], max_length=32, split="train")
    ids = found.sequences[0].input_ids
    assert ids.count(masked.tokenizer.mask_token_id) == 2
    assert found.choices[0].places == (ids.index(masked.tokenizer.mask_token_id, 3),)


# ---- runs


@pytest.mark.parametrize(
    "name", ["lora", "ia3", "bitfit", "prefix", "prompt", "aot_fc", "pfeiffer", "top_layers", "full"]
)
@pytest.mark.parametrize("where", ["gpt2", "masked"])
def test_a_method_trains_saves_and_is_judged(name, where, request, quick, tmp_path, one_thread):
    backbone = request.getfixturevalue(where)
    task = CLOZE if where == "masked" else MOOD
    data = TaskData(task=task, train=ROWS * 2, validation=ROWS, test=None)
    before = {k: t.clone() for k, t in backbone.model.state_dict().items()}
    result = quick(backbone, data, name, max_steps=3, learning_rate=1e-2)
    assert result.metric == "accuracy" and result.num_head_parameters == 0
    assert result.adapter.recipe["losses"] == ("choice" if where == "masked" else "language+unlikelihood+choice")
    result.adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", backbone)
    assert loaded.task == task and loaded.task.pattern == task.pattern
    assert evaluate(backbone, loaded, data)["accuracy"] == pytest.approx(result.best_metric)
    assert all(torch.equal(t, before[k]) for k, t in backbone.model.state_dict().items())
    if not loaded.method.changes_weights:
        bank = Bank(backbone)
        bank.add("a", loaded)
        deltas = loaded.delta_set(backbone)
        for found, row in zip(bank.predict([("a", row) for row in ROWS]), ROWS, strict=True):
            expected = [sum(c) / len(c) for c in chances(backbone, row, task, deltas)] if name != "prompt" else None
            assert expected is None or found.logits.tolist() == pytest.approx(expected, rel=1e-3)


def test_training_lowers_the_loss_and_finds_the_answers(gpt2, quick, one_thread):
    rows = [{"text": word, "y": label} for word, label in [("cat", "good"), ("dog", "bad"), ("film", "mixed")]]
    data = TaskData(task=MOOD, train=rows * 4, validation=rows, test=None)
    result = quick(gpt2, data, LoRA(r=8), max_steps=40, learning_rate=3e-2, evaluations_per_epoch=1)
    assert result.best_metric == 1.0
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2


def test_a_resumed_run_ends_at_the_same_tensors(roomy, data, quick, same_tensors, tmp_path, stopping, one_thread):
    settings = dict(max_steps=6, evaluations_per_epoch=1, distill_examples=2, distill_weight=0.5)
    whole = quick(roomy, data, IA3(), **settings)
    with pytest.raises(stopping.error):
        quick(roomy, data, stopping(IA3, 7)(), tmp_path / "a", **settings)
    assert list((tmp_path / "a").glob("checkpoints/step-*"))
    again = quick(roomy, data, IA3(), tmp_path / "a", **settings)
    same_tensors(again.adapter, whole.adapter)
    with pytest.raises(ConfigError, match="finished adapter"):
        quick(roomy, data, IA3(), tmp_path / "a", **settings)


def test_an_unfinished_run_of_another_pattern_is_not_resumed(gpt2, data, quick, tmp_path, stopping):
    with pytest.raises(stopping.error):
        quick(gpt2, data, stopping(IA3, 7)(), tmp_path / "a", max_steps=6, evaluations_per_epoch=1)
    with pytest.raises(ConfigError, match=r"task\.pattern"):
        quick(gpt2, data.with_pattern(Pattern("{text} :", SAID)), IA3(), tmp_path / "a", max_steps=6)


@pytest.mark.parametrize("name", ["ia3", "prefix"])
def test_half_the_batch_and_twice_the_accumulation_are_the_same_run(name, gpt2, data, quick, one_thread):
    one = quick(gpt2, data, name, batch_size=4, max_steps=3)
    two = quick(gpt2, data, name, batch_size=2, gradient_accumulation=2, max_steps=3)
    for key, t in one.adapter.params.items():
        torch.testing.assert_close(two.adapter.params[key], t, rtol=1e-4, atol=1e-5)


def test_trained_together_each_is_as_if_alone(gpt2, data, make_data, quick, one_thread):
    settings = dict(progress=False, batch_size=8, max_steps=3)
    jobs = [
        TrainJob(data=data, method=LoRA(r=2), name="ranked", settings={"distill_examples": 1}),
        TrainJob(data=make_data(), method=LoRA(r=2), name="classified"),
    ]
    for job, result in zip(jobs, train_many(gpt2, jobs, **settings), strict=True):
        alone = quick(gpt2, job.data, job.method, max_steps=3, **job.settings)
        for key, t in alone.adapter.params.items():
            torch.testing.assert_close(result.adapter.params[key], t, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("where", ["gpt2", "masked"])
def test_frozen_layers_kept_change_nothing(where, request, quick, one_thread):
    backbone = request.getfixturevalue(where)
    data = TaskData(task=CLOZE if where == "masked" else MOOD, train=ROWS * 2, validation=ROWS, test=None)
    method = LoRA(r=2, layers=(backbone.num_layers - 1,))
    plain, kept = (quick(backbone, data, method, max_steps=3, cache_frozen=how) for how in (None, "memory"))
    assert kept.cached_bytes > 0
    for key, t in plain.adapter.params.items():
        torch.testing.assert_close(kept.adapter.params[key], t, rtol=1e-4, atol=1e-5)


# ---- mixed batches


def test_ranked_rows_in_a_mixed_batch_are_as_if_alone(gpt2, random_adapter, random_params, close):
    bank = Bank(gpt2)
    for name, method, task in [
        ("tfew", IA3(), MOOD),
        ("cause", PromptTuning(length=3), CAUSE),
        ("lora", LoRA(r=2), MOOD),
    ]:
        bank.add(name, ranked_adapter(gpt2, method, task, random_params))
    bank.add("classifier", random_adapter(gpt2, get_method("prefix")(), pooling="last"))
    bank.add("tags", random_adapter(gpt2, LoRA(r=3), kind="tagging"))
    rows = [
        *(("tfew", row) for row in ROWS),
        ("classifier", {"text": "good film"}),
        ("cause", CAUSES[0]),
        (None, "good film"),
        ("lora", "good film"),
        ("tags", ["good", "film"]),
        ("cause", CAUSES[1]),
        ("lora", ROWS[2]),
    ]
    mixed = bank.predict(rows, batch_size=5)
    for row, found in zip(rows, mixed, strict=True):
        (alone,) = bank.predict([row])
        assert found.label == alone.label
        close(found.logits if found.logits is not None else found.embedding, _numbers(alone))
    assert mixed[6].probabilities.keys() == {"0", "1"} and math.isclose(
        sum(mixed[6].probabilities.values()), 1.0, abs_tol=1e-5
    )


def _numbers(prediction):
    return prediction.logits if prediction.logits is not None else prediction.embedding


@pytest.fixture(scope="module")
def mixed_bank(gpt2, random_adapter, random_params):
    """Ranked and classified rows, `(name, row)`, and what each of them answers alone."""
    bank = Bank(gpt2)
    for name in ("ia3", "lora", "prefix", "prompt", "aot_fc", "bitfit", "pfeiffer"):
        task = CAUSE if name in ("prefix", "bitfit") else MOOD
        bank.add(name, ranked_adapter(gpt2, get_method(name)(), task, random_params))
    bank.add("classifier", random_adapter(gpt2, LoRA(r=3), pooling="last"))
    rows = [
        *((name, row) for name in ("ia3", "lora", "prompt", "aot_fc", "pfeiffer", "classifier") for row in ROWS[:3]),
        *((name, row) for name in ("prefix", "bitfit") for row in CAUSES),
        (None, "good film"),
    ]
    return bank, rows, [bank.predict([row])[0] for row in rows]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(picked=st.lists(st.integers(0, 22), min_size=1, max_size=12), batch_size=st.integers(1, 9))
def test_ranked_rows_of_random_mixes_are_as_if_alone(mixed_bank, close, picked, batch_size):
    bank, rows, alone = mixed_bank
    found = bank.predict([rows[i] for i in picked], batch_size=batch_size)
    for i, prediction in zip(picked, found, strict=True):
        close(_numbers(prediction), _numbers(alone[i]))
        assert prediction.probabilities.keys() == alone[i].probabilities.keys()


def test_masked_and_classified_rows_share_a_batch(masked, random_adapter, random_params, close):
    bank = Bank(masked)
    bank.add("cloze", ranked_adapter(masked, LoRA(r=2), CLOZE, random_params))
    bank.add("classifier", random_adapter(masked, IA3()))
    rows = [("cloze", ROWS[2]), ("classifier", "good film"), ("cloze", ROWS[0]), (None, "x")]
    for row, found in zip(rows, bank.predict(rows), strict=True):
        (alone,) = bank.predict([row])
        close(_numbers(found), _numbers(alone))
    deltas = bank.adapter("cloze")
    assert deltas.task.pattern == CLOZE.pattern


def test_one_rows_nan_stays_its_own(gpt2, random_params):
    bank = Bank(gpt2)
    bank.add("good", ranked_adapter(gpt2, LoRA(r=2), MOOD, random_params))
    broken = ranked_adapter(gpt2, LoRA(r=2), MOOD, random_params)
    broken.params[next(iter(broken.params))].fill_(math.nan)
    bank.add("broken", broken)
    found = bank.predict([("good", ROWS[0]), ("broken", ROWS[1]), ("good", ROWS[1])])
    assert found[1].label is None and found[1].probabilities == {}
    (alone,) = bank.predict([("good", ROWS[1])])
    torch.testing.assert_close(found[2].logits, alone.logits)


def ranked_adapter(backbone, method, task, random_params):
    return Adapter(
        name=task.name,
        method=method,
        params=random_params(backbone, method),
        head=Head.for_task(task),
        head_params={},
        task=task,
        backbone=backbone.describe(),
        max_length=32,
    )


# ---- context distillation


def test_the_distillation_loss_is_the_divergence_from_the_teacher_with_examples(gpt2, data):
    examples = RandomExamples(data.train, 2, seed=5)
    taught = rank(gpt2, MOOD, MOOD.pattern, ROWS, examples=examples).scores
    items = TaskRows(gpt2, MOOD, ROWS, max_length=32, split="train").with_teacher(taught).items
    batch = Collator("classification", gpt2.pad_id)(items)
    model = tuning(gpt2, MOOD, distill_weight=0.25)
    plain = model(**batch)["loss"].item()  # judged without the teacher
    divergence = 0.0
    for row, teacher in zip(ROWS, taught, strict=True):
        beta = [sum(c) / len(c) for c in chances(gpt2, row, MOOD, model.delta_set())]
        p, q = (torch.tensor(v, dtype=torch.float64).softmax(0) for v in (teacher, beta))
        divergence += float((p * (p / q).log()).sum()) / len(ROWS)
    model.train()
    loss = model(**batch)["loss"].item()
    model.eval()  # the backbone is shared
    assert loss == pytest.approx(0.25 * divergence + 0.75 * plain, rel=1e-4)


def test_a_student_comes_to_choose_as_its_teacher(roomy, quick, data, one_thread):
    """All rows in one batch: the first loss is how far the bare model is from itself with examples."""
    settings = dict(max_steps=60, learning_rate=1e-2, batch_size=len(data.train), distill_examples=3, seed=1)
    losses = [e["loss"] for e in quick(roomy, data, LoRA(r=8), **settings).history]
    with_examples = 3 * rank(roomy, MOOD, MOOD.pattern, ROWS, examples=RandomExamples(ROWS, 3, seed=1)).scores
    without = rank(roomy, MOOD, MOOD.pattern, data.train).scores
    p, q = (torch.tensor(scores).log_softmax(1) for scores in (with_examples, without))
    assert losses[0] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert losses[-1] < losses[0] / 10


# ---- refusals


def test_what_cannot_be_trained_is_refused(gpt2, masked, bert, make_backbone, data, make_data, quick):
    for backbone, rows, given, error, words in [
        (bert, data.with_pattern(CLOZE.pattern), {}, BackboneError, "no head of a masked language model"),
        (masked, data, {}, TaskError, r"has no \{mask\}"),
        (gpt2, data.with_pattern(CLOZE.pattern), {}, TaskError, r"text behind \{mask\}"),
        (make_backbone("t5"), data.with_pattern(CLOZE.pattern), {}, BackboneError, "Load it with its decoder"),
        (gpt2, make_data(), {"losses": "choice"}, ConfigError, "for tasks with a pattern"),
        (gpt2, make_data(), {"distill_examples": 2}, ConfigError, "for tasks with a pattern"),
        (gpt2, data, {"losses": "chioce"}, ConfigError, "Did you mean 'choice'"),
        (gpt2, data, {"distill_examples": 6}, DataError, "5 rows are too few for 6"),
        (masked, data.with_pattern(CLOZE.pattern), {"distill_examples": 2}, ConfigError, "needs a causal one"),
        (gpt2, data, {"distill_weight": 0.5}, ConfigError, "give distill_examples or distill_instruction too"),
        (gpt2, make_data(), {"distill_weight": 0.5}, ConfigError, "none was asked for"),
        (gpt2, data, {"label_smoothing": 0.1}, ConfigError, "is for generation"),
    ]:
        with pytest.raises(error, match=words):
            quick(backbone, rows, "lora", **given)
    with pytest.raises(ConfigError, match="pattern leaves no head to train"):
        quick(gpt2, data, "head")
    with pytest.raises(ConfigError, match="must stand in front of the prompt's last token"):
        quick(gpt2, data, PromptTuning(length=2, position=-1))


def test_rows_that_cannot_be_read_are_named(gpt2, data, quick):
    for rows, words in [
        ([*ROWS, {"text": "x", "y": "god"}], "row 6.*god"),
        ([{"text": "x", "y": None}], "row 1"),
        ([{"txt": "x", "y": "good"}], "no column 'text'"),
    ]:
        with pytest.raises(DataError, match=words):
            quick(gpt2, TaskData(task=MOOD, train=rows, validation=ROWS), "lora")
    with pytest.raises(DataError, match=r"train row 0.*pattern and answers alone take more than the 5 tokens"):
        quick(gpt2, data, "lora", max_length=5)
    empty = TaskData(task=CAUSE, train=[{**CAUSES[0], "one": ""}], validation=CAUSES)
    with pytest.warns(DataWarning, match="empty text"), pytest.raises(DataError, match="row 0.*' ' has no tokens"):
        quick(gpt2, empty, "lora")
    with pytest.raises(DataError, match=r"row \d: its examples, prompt and answer are \d+ tokens"):
        quick(gpt2, data, "lora", distill_examples=4)


def test_long_rows_lose_the_ends_of_their_longest_columns(gpt2, masked):
    task = Task(
        name="pair",
        kind="classification",
        template=("a", "b"),
        label="y",
        labels=("no", "yes"),
        pattern=Pattern("{a} film {b} is :"),
    )
    row = {"a": "good " * 30, "b": "not bad", "y": "yes"}
    with pytest.warns(DataWarning, match="1 of 1 train rows are longer than max_length=16"):
        (found,) = encode_ranked(gpt2, task, [row], max_length=16, split="train")
    ids = found.sequences[0].input_ids
    words = gpt2.tokenizer.convert_ids_to_tokens(ids)
    end = tokens(gpt2, "film not bad is :") + tokens(gpt2, "yes")[:-1]
    assert set(words[: -len(end)]) == {"good"} and ids[-len(end) :] == end
    with pytest.warns(DataWarning, match="longest needs"):
        (found,) = encode_ranked(masked, CLOZE, [{"text": "good " * 30, "y": "good"}], max_length=12, split="train")
    assert all(len(s) <= 12 for s in found.sequences)
    assert all(masked.tokenizer.mask_token_id in s.input_ids for s in found.sequences)


def test_a_served_row_that_is_too_long_is_cut_or_named(gpt2, random_params):
    bank = Bank(gpt2)
    adapter = ranked_adapter(gpt2, LoRA(r=2), MOOD, random_params)
    bank.add("cut", adapter)
    bank.add("short", dataclasses.replace(adapter, max_length=6))
    room = 32 - len(tokens(gpt2, MOOD.pattern.text({"text": ""}))) - 2  # of the longest answers
    whole, fits = bank.predict([("cut", "good " * 50), ("cut", "good " * room)])
    torch.testing.assert_close(whole.logits, fits.logits)
    with pytest.raises(DataError, match="row 1: pattern and answers alone take more than the 6 tokens"):
        bank.predict([("cut", "x"), ("short", "x")])
    with pytest.raises(DataError, match=r"row 0: .*got 2 text\(s\), but the pattern reads the columns text"):
        bank.predict([("cut", ("x", "y"))])


def test_patterns_that_no_model_can_read_are_refused():
    for make, words in [
        (lambda: Pattern("{mask} {text} {mask}"), "more than once"),
        (lambda: Pattern("text"), r"no column in braces.*such as '\{text\}'"),
        (lambda: Pattern("{text}", {"good": 1}), "label names to texts"),
        (lambda: Pattern("{text.x}"), "no attribute"),
        (lambda: Pattern.from_dict({"promt": "x"}), "Did you mean 'prompt'"),
        (lambda: Pattern.from_dict({}), "needs its prompt"),
    ]:
        with pytest.raises(TaskError, match=words):
            make()
    with pytest.raises(TaskError, match="kind regression"):
        Task(name="s", kind="regression", template=("text",), label="y", pattern=Pattern("{text}"))
    assert Task.from_dict(MOOD.to_dict()) == MOOD and Task.from_dict(CLOZE.to_dict()) == CLOZE
    assert hash(MOOD.pattern) == hash(Pattern(MOOD.pattern.prompt, SAID))


def test_settings_of_losses_are_checked():
    assert tuple(LOSSES) == LOSS_NAMES
    for wrong in ("", "choice+choice", "choice+"):
        with pytest.raises(ConfigError, match="join any of language, unlikelihood, choice"):
            TrainConfig(losses=wrong)
    with pytest.raises(ConfigError, match="1 at most"):
        TrainConfig(distill_weight=1.5)
    assert TrainConfig.from_dict({"losses": "none"}).losses is None
