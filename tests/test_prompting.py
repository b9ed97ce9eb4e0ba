"""Rank classification: scores by a slow twin, a prefix read once, examples that are never the row."""

import json
import logging
import sys

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multitune import Adapter, BackboneError, Bank, ConfigError, DataError, Head, Plan, Task, TaskError, get_method
from multitune.prompting import BM25Examples, Examples, NeighbourExamples, Pattern, RandomExamples, as_generation, rank
from multitune.ranked import answer_ids, text_ids
from multitune.tasks import TaskData
from multitune.training.choices import Candidates

MOOD = Task(name="mood", kind="classification", template=("text",), label="y", labels=("bad", "good"))
CAUSE = Task(
    name="cause", kind="multiple_choice", template=("{text}",), label="y", choices=("{one}", "{two}", "{three}")
)
PATTERN = Pattern("text {text} is :", {"good": "very good"})
ROWS = [
    {"text": "good film", "y": "good"},
    {"text": "the bad bad film", "y": "bad"},
    {"text": "not a good film at all", "y": "bad"},
    {"text": "x", "y": "good"},
]
POOL = [
    {"text": f"film {word}", "y": label} for word, label in [("a", "bad"), ("b", "good"), ("c", "bad"), ("d", "good")]
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, make_backbone):
    return make_backbone(request.param, tie_word_embeddings=True)


def by_hand(backbone, prompt, answer, deltas=None):
    """Log-probabilities of an answer's tokens, one row alone, from the whole row's logits."""
    ids, own = (backbone.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer))
    logits = backbone.logits(Plan([deltas]), torch.tensor([ids + own]))[0].double().log_softmax(-1)
    return [float(logits[len(ids) + i - 1, token].detach()) for i, token in enumerate(own)]


@pytest.mark.parametrize("normalised", [True, False])
def test_scores_are_log_probabilities_of_the_answers(model, normalised):
    found = rank(model, MOOD, PATTERN, ROWS, normalised=normalised, batch_size=3)
    for row, scores in zip(ROWS, found.scores, strict=True):
        for score, word in zip(scores, (" bad", " very good"), strict=True):
            chances = by_hand(model, f"text {row['text']} is :", word)
            assert score == pytest.approx(sum(chances) / (len(chances) if normalised else 1), rel=1e-4)
    assert found.predictions == tuple(int(s[1] > s[0]) for s in found.scores)
    hits = [p == MOOD.labels.index(r["y"]) for p, r in zip(found.predictions, ROWS, strict=True)]
    assert found.metrics == {"accuracy": sum(hits) / 4} and found.num_shared == 0


@pytest.mark.parametrize("doubles", [True, False])
def test_one_space_stands_in_front_of_an_answer_whatever_the_tokenizer_puts_there(make_backbone, doubles):
    """Llama 2's puts a space in front of every text, and newer ones in front of those that have none."""
    backbone = make_backbone("llama")
    words = ["<unk>", "▁", "▁good", "good", "▁bad", "▁a", "a", "▁▁"]
    whole = Tokenizer(models.Unigram([(word, -1.0 - (word == "▁▁")) for word in words], 0))
    if doubles:
        whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backbone.tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>")
    assert len(backbone.tokenizer.tokenize(" good")) == 1 + doubles
    assert answer_ids(backbone, " good") == answer_ids(backbone, "good") == [words.index("▁good")]
    assert text_ids(backbone, " a bad", first=False) == [words.index("▁a"), words.index("▁bad")]


def test_what_was_ranked_is_kept_and_saved(model, tmp_path):
    pattern = Pattern("text {text} is :", {"good": "a < b", "bad": "bad"}, instruction="film")
    found = rank(model, MOOD, pattern, ROWS)
    for row, of, scores, place in zip(ROWS, found.rows, found.scores, found.predictions, strict=True):
        assert of.prompt == f"film\n\ntext {row['text']} is :" and of.options == ("bad", "a < b")
        assert (of.scores, of.answer) == (scores, of.options[place])
        right = "a < b" if row["y"] == "good" else "bad"
        assert of.answers == (right,) and of.right is (of.answer == right)
    place = found.save(tmp_path / "ranked", "films & more")
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [row.answer for row in found.rows]
    assert json.loads((place / "scores.json").read_text()) == found.metrics
    page = (place / "predictions.html").read_text()
    assert "<h1>films &amp; more</h1>" in page and page.count("<tr>") == 1 + len(ROWS)
    assert "a &lt; b" in page and "a < b" not in page
    assert page.count("(wrong)") == sum(row.right is False for row in found.rows)
    unlabelled = rank(model, MOOD, pattern, [{"text": "x"}]).rows[0]
    assert (unlabelled.answers, unlabelled.right) == ((), None)


def test_scores_are_those_of_the_loss_functions(model):
    """The scores that T-Few's losses compare, from the same logits."""
    (scores,) = rank(model, MOOD, PATTERN, ROWS[:1]).scores
    rows = [
        [model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("text good film is :", word)]
        for word in ("bad", "very good")
    ]
    width = max(len(a) + len(b) for a, b in rows)
    ids = torch.tensor([(a + b + [0] * width)[:width] for a, b in rows])
    mask = torch.tensor([[len(a) <= i < len(a) + len(b) for i in range(width)] for a, b in rows])
    there = (torch.arange(width) < torch.tensor([len(a) + len(b) for a, b in rows])[:, None]).long()
    with torch.no_grad():
        logits = model.logits(Plan([None] * 2), ids, there)
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    expected = Candidates(log_probs=log_probs, mask=mask[:, 1:], counts=(2,)).scores()
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_read_once_equals_one_read_with_every_row(model, monkeypatch):
    pattern = Pattern(PATTERN.prompt, PATTERN.verbalizer, instruction="film")
    once = rank(model, MOOD, pattern, ROWS, examples=RandomExamples(POOL, 2))
    assert once.num_shared == len(ROWS)
    monkeypatch.setattr("multitune.prompting.ranking._Reader._shares", False)
    each = rank(model, MOOD, pattern, ROWS, examples=RandomExamples(POOL, 2))
    assert each.num_shared == 0
    torch.testing.assert_close(torch.tensor(once.scores), torch.tensor(each.scores), rtol=1e-4, atol=1e-5)
    without = rank(model, MOOD, PATTERN, ROWS)
    assert not torch.allclose(torch.tensor(without.scores), torch.tensor(each.scores), atol=1e-3)


class Nearest(Examples):
    """Another order for every question."""

    def _ranked(self, texts):
        firsts = [[PATTERN.text(row) for row in ROWS].index(text) for text in texts]
        return [[first, *(i for i in range(len(self.rows)) if i != first)] for first in firsts]


def test_rows_behind_prefixes_of_their_own_run_in_batches(model, monkeypatch):
    passes, run = [], model.run
    monkeypatch.setattr(model, "run", lambda plan, *a, **k: passes.append(plan.num_rows) or run(plan, *a, **k))
    found = rank(model, MOOD, PATTERN, ROWS, examples=Nearest(POOL, 1), batch_size=3)
    examples = Nearest(POOL, 1)
    examples.prepare(PATTERN)
    prefixes = [PATTERN.prefix(MOOD, examples.choose(PATTERN.text(row))) for row in ROWS]
    assert len(set(prefixes)) == len(ROWS)
    assert found.num_shared == 0 and sorted(passes) == [2, 3, 3]
    for row, prefix, scores in zip(ROWS, prefixes, found.scores, strict=True):
        prompt = (prefix + PATTERN.text(row)).strip()
        chances = [by_hand(model, prompt, word) for word in (" bad", " very good")]
        assert scores == pytest.approx([sum(c) / len(c) for c in chances], rel=1e-4)


def test_shared_and_other_prefixes_give_each_row_its_own_scores(model):
    """One row reads like the usual example and gets another, so that it stands behind a prefix of its own."""
    shown = RandomExamples(POOL, 1)
    shown.prepare(PATTERN)
    rows = [*ROWS, {**shown.choose("else")[0], "y": "bad"}, ROWS[1]]
    found = rank(model, MOOD, PATTERN, rows, examples=RandomExamples(POOL, 1), batch_size=2)
    assert found.num_shared == len(ROWS) + 1 and found.scores[1] == pytest.approx(found.scores[-1])
    for row, scores in zip(rows, found.scores, strict=True):
        text = PATTERN.text(row)
        chances = by_hand(model, PATTERN.prefix(MOOD, shown.choose(text)) + text, " bad")
        assert scores[0] == pytest.approx(sum(chances) / len(chances), rel=1e-4)


def test_neighbours_of_many_questions_are_embedded_together(make_backbone, monkeypatch):
    embedder = make_backbone("bert")
    sizes, forward = [], embedder.model.forward
    monkeypatch.setattr(embedder.model, "forward", lambda **k: sizes.append(len(k["input_ids"])) or forward(**k))
    examples = NeighbourExamples(POOL, 2, embedder)
    examples.prepare(PATTERN)
    texts = ["a film", "the very bad cat", "film c"]
    together = examples.choose_all(texts)
    assert sizes == [len(POOL), len(texts)]
    assert together == [examples.choose(text) for text in texts]


def test_a_few_shot_prompt_reads_as_it_should():
    pattern = Pattern("{text} :", {"good": "yes", "bad": "no"}, instruction="Is it good?", separator="\n")
    assert pattern.prefix(MOOD, ROWS[:2]) == "Is it good?\ngood film : yes\nthe bad bad film : no\n"
    assert pattern.answers(MOOD, ROWS[0]) == (" no", " yes")
    assert Pattern("{text}:\n").answers(MOOD, ROWS[0]) == ("bad", "good")  # white space stands there already


def test_choices_of_their_own(model):
    row = {"text": "the film", "one": "good", "two": "bad bad", "three": "x", "y": "two"}
    found = rank(model, CAUSE, Pattern("{text} so"), [row, {**row, "y": 0}])
    chances = [by_hand(model, "the film so", f" {row[name]}") for name in ("one", "two", "three")]
    assert found.scores[0] == pytest.approx([sum(c) / len(c) for c in chances], rel=1e-4)
    hits = [found.predictions[0] == 1, found.predictions[1] == 0]
    assert found.metrics["accuracy"] == sum(hits) / 2


def test_an_adapter_scores_in_place_of_the_bare_model(model, random_params, tmp_path):
    method = get_method("lora")()
    write = Task(name="w", kind="generation", template=("text",), label="y")
    adapter = Adapter(
        name="w",
        method=method,
        params=random_params(model, method),
        head=Head.for_task(write, pooling="last"),
        head_params={},
        task=write,
        backbone=model.describe(),
    )
    found = rank(model, MOOD, PATTERN, ROWS[:2], adapter=adapter, examples=RandomExamples(POOL, 1))
    adapter.save(tmp_path / "w")
    saved = rank(model, MOOD, PATTERN, ROWS[:2], adapter=tmp_path / "w", examples=RandomExamples(POOL, 1))
    assert saved.scores == found.scores
    chances = by_hand(
        model, f"{PATTERN.example(MOOD, RandomExamples(POOL, 1).rows[found_first(POOL)])} text good film is :", " bad",
        adapter.delta_set(model),
    )  # fmt: skip
    assert found.num_shared == 0
    assert found.scores[0][0] == pytest.approx(sum(chances) / len(chances), rel=1e-4)


def found_first(pool):
    """The place of the row that `RandomExamples(pool, 1)` draws."""
    examples = RandomExamples(pool, 1)
    examples.prepare(PATTERN)
    return pool.index(examples.choose("nothing like it")[0])


def test_random_examples_are_the_same_for_all_rows_and_another_where_one_is_the_row():
    examples = RandomExamples(POOL, 3, seed=1)
    examples.prepare(PATTERN)
    usual = examples.choose("text anything is :")
    assert len(usual) == 3 and usual == examples.choose("text else is :")
    asked = PATTERN.text(usual[1]).upper()
    assert usual[1] not in examples.choose(asked) and len(examples.choose(asked)) == 3
    other = RandomExamples(POOL, 3, seed=2)
    other.prepare(PATTERN)
    assert other.choose("text anything is :") != usual


def test_class_labels_in_another_order_than_the_tasks_mean_their_names(model):
    features = Features({"text": Value("string"), "y": ClassLabel(names=["good", "bad"])})

    def table(rows):
        return Dataset.from_list(rows, features=features)

    named, by_id = (rank(model, MOOD, PATTERN, of(ROWS), examples=RandomExamples(of(POOL), 2)) for of in (list, table))
    assert by_id.scores == named.scores and by_id.metrics == named.metrics
    assert table(ROWS)["y"] == [0, 1, 1, 0]  # ids, which the task would read the other way round
    made = as_generation(TaskData(task=MOOD, train=table(ROWS), validation=table(POOL)), PATTERN)
    assert [row["answers"] for row in made.train] == [["very good"], ["bad"], ["bad"], ["very good"]]


def test_bm25_finds_the_words_of_the_question():
    pytest.importorskip("bm25s", reason="pip install 'multitune[generation]'")
    pool = [
        {"text": t, "y": "good"} for t in ("red apples grow", "blue rivers flow", "apples fall", "RED  apples grow")
    ]
    examples = BM25Examples(pool, 2)
    examples.prepare(Pattern("{text}"))
    assert [e["text"] for e in examples.choose("do apples fall")] == ["red apples grow", "apples fall"]
    assert [e["text"] for e in examples.choose("red apples grow")] == ["blue rivers flow", "apples fall"]  # not itself
    assert len(examples.choose("zebra")) == 2  # no word in common


def test_neighbours_are_near_in_meaning(minilm):
    pool = [{"text": t, "y": "good"} for t in ("The cat sleeps.", "Shares fell sharply.", "It rained all day.")]
    examples = NeighbourExamples(pool, 2, minilm)
    examples.prepare(Pattern("{text}"))
    assert examples.choose("Stock prices dropped.")[-1]["text"] == "Shares fell sharply."
    assert examples.choose("A kitten is napping.")[-1]["text"] == "The cat sleeps."


@pytest.mark.parametrize("said", [{"good": []}, {"good": ["a", 3]}, {"good": None}, ["good"]])
def test_a_verbalizer_of_another_form_is_refused(said):
    with pytest.raises(TaskError, match="maps label names to texts or lists of them"):
        Pattern("{text}", said)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_label_of_several_texts_has_the_mean_of_their_scores(model, normalised):
    pattern = Pattern("text {text} is :", {"good": ["very good", "good", "a b"], "bad": ("bad",)})
    assert pattern.to_dict()["verbalizer"] == {"good": ["very good", "good", "a b"], "bad": ["bad"]}
    assert Pattern.from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
    assert pattern.answers(MOOD, ROWS[0]) == (" bad", " very good")
    found = rank(model, MOOD, pattern, ROWS, normalised=normalised, batch_size=3)
    once = {
        text: rank(model, MOOD, Pattern("text {text} is :", {"good": text}), ROWS, normalised=normalised).scores
        for text in ("very good", "good", "a b")
    }
    for i, (bad, good) in enumerate(found.scores):
        assert bad == pytest.approx(once["very good"][i][0], rel=1e-4)
        assert good == pytest.approx(sum(scores[i][1] for scores in once.values()) / 3, rel=1e-4)
    assert [row.options for row in found.rows] == [("bad", "very good")] * 4


@pytest.mark.parametrize(
    ("pattern", "task", "words"),
    [
        (Pattern("{text}", {"god": "yes"}), MOOD, "the label 'god', which task 'mood' has not. Did you mean 'good'"),
        (Pattern("{text}", {"good": "bad"}), MOOD, "says 'bad' twice"),
        (Pattern("{text}", {"good": " bad"}), MOOD, "says 'bad' twice"),
        (Pattern("{text}", {"good": ["fine", "fine"]}), MOOD, "says 'fine' twice"),
        (Pattern("It is {mask}"), MOOD, "reads no column"),
        (Pattern("{text} {y}"), MOOD, "reads the answer"),
        (Pattern("{text}"), Task(name="s", kind="regression", template=("text",), label="y"), "of kind regression"),
    ],
)
def test_patterns_that_do_not_fit(pattern, task, words, model):
    with pytest.raises(TaskError, match=words):
        rank(model, task, pattern, ROWS)


def test_what_cannot_be_ranked(model, bert):
    with pytest.raises(DataError, match="row 1: no column 'text'"):
        rank(model, MOOD, PATTERN, [ROWS[0], {"txt": "x"}])
    with pytest.raises(DataError, match=r"row 0: its examples, prompt and answer are \d+ tokens.*40 positions"):
        rank(model, MOOD, PATTERN, [{"text": "film " * 50}])
    with pytest.raises(DataError, match="4 rows are too few for 5 examples"):
        RandomExamples(POOL, 5)
    with pytest.raises(ConfigError, match="k=0"):
        RandomExamples(POOL, 0)
    with pytest.raises(BackboneError, match="no language-model head"):
        rank(bert, MOOD, PATTERN, ROWS)


def test_smollm2_knows_a_capital(smollm2):
    task = Task(name="capitals", kind="classification", template=("q",), label="y", labels=("Paris", "Berlin", "Rome"))
    rows = [{"q": c, "y": y} for c, y in [("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome")]]
    found = rank(smollm2, task, Pattern("The capital of {q} is the city of"), rows)
    assert found.metrics["accuracy"] == 1.0


def test_looking_examples_up_logs_nothing_of_its_index(monkeypatch, caplog):
    """bm25s sets its logger to DEBUG when it is imported, which any root handler then prints."""
    monkeypatch.delitem(sys.modules, "bm25s", raising=False)
    caplog.set_level(logging.DEBUG)
    BM25Examples(POOL, 1).prepare(PATTERN)
    assert not [record for record in caplog.records if record.name == "bm25s"]
    caplog.set_level(logging.DEBUG, "bm25s")  # the user's own wish
    BM25Examples(POOL, 1).prepare(PATTERN)
    assert [record for record in caplog.records if record.name == "bm25s"]


def test_ranking_says_what_it_takes(model):
    data = TaskData(task=MOOD, train=ROWS, validation=ROWS)
    with pytest.raises(ConfigError, match=r"rank takes a Task, not a TaskData; give its task: data\.task"):
        rank(model, data, PATTERN, ROWS)
    with pytest.raises(ConfigError, match=r"rank takes a Backbone, not a Bank; give Backbone\.load\(NAME\)"):
        rank(Bank(model), MOOD, PATTERN, ROWS)
