import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from multitune.errors import DataError, TaskError
from multitune.tasks import compute, higher_is_better
from multitune.tasks.metrics import METRICS
from multitune.tasks.spans import is_bio, spans

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


# predictions 0 1 1 0 against 0 1 0 0: one true and one false positive, two true negatives
@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", {"accuracy": 3 / 4}),
        ("f1", {"f1": 2 / 3}),
        ("macro_f1", {"macro_f1": (4 / 5 + 2 / 3) / 2}),
        ("matthews", {"matthews": (1 * 2 - 1 * 0) / math.sqrt(2 * 1 * 3 * 2)}),
        ("accuracy_and_f1", {"accuracy_and_f1": (3 / 4 + 2 / 3) / 2, "accuracy": 3 / 4, "f1": 2 / 3}),
        (
            "accuracy_and_macro_f1",
            {"accuracy_and_macro_f1": (3 / 4 + 11 / 15) / 2, "accuracy": 3 / 4, "macro_f1": 11 / 15},
        ),
    ],
)
def test_classification_by_hand(metric, expected):
    scores = compute(metric, [0, 1, 1, 0], [0, 1, 0, 0], ("no", "yes"))
    assert scores == pytest.approx(expected)
    assert next(iter(scores)) == metric
    assert all(type(value) is float for value in scores.values())


def test_stance_f1_leaves_out_the_first_label():
    # label 1: 1 hit, 1 false alarm, 0 misses: 2/3; label 2: 1 hit, 0 false alarms, 1 miss: 2/3
    labels = ("none", "against", "favor")
    scores = compute("stance_f1", [1, 1, 2, 0], [1, 0, 2, 2], labels)
    assert scores == pytest.approx({"stance_f1": 2 / 3})
    assert compute("stance_f1", [0, 0], [0, 0], labels) == {"stance_f1": 0.0}


def test_regression_by_hand():
    # deviations -1 0 1 and -4/3 -1/3 5/3: r = 3 / (sqrt(2) sqrt(42)/3); ranks agree
    assert compute("pearson", [1, 2, 3], [1, 2, 4]) == pytest.approx({"pearson": 9 / math.sqrt(84)})
    assert compute("spearman", [1, 3, 2], [1, 2, 3]) == pytest.approx({"spearman": 0.5})
    assert compute("spearman", [1, 2, 3], [1, 2, 4]) == pytest.approx({"spearman": 1.0})
    both = compute("pearson_spearman", [1, 2, 3], [1, 2, 4])
    pearson = 9 / math.sqrt(84)
    assert both == pytest.approx({"pearson_spearman": (pearson + 1) / 2, "pearson": pearson, "spearman": 1.0})
    assert compute("mse", [1.0, 2.0], [2.0, 4.0]) == {"mse": 2.5}
    assert compute("mae", [1.0, 2.0], [2.0, 4.0]) == {"mae": 1.5}


def test_multilabel_by_hand():
    # 2 hits, 3 predicted, 2 present
    assert compute("micro_f1", [[1, 0], [1, 1]], [[1, 0], [0, 1]]) == pytest.approx({"micro_f1": 4 / 5})
    assert compute("micro_f1", [[1], [0]], [[1], [1]]) == pytest.approx({"micro_f1": 2 / 3})
    assert compute("micro_f1", [[0, 0]], [[0, 0]]) == {"micro_f1": 0.0}


def test_tagging_by_hand():
    gold = [[1, 2, 0, 3], [0]]
    scores = compute("tag_f1", [[1, 2, 0, 0], [0]], gold, BIO)
    assert scores == pytest.approx({"tag_f1": 2 / 3, "precision": 1.0, "recall": 0.5, "token_accuracy": 4 / 5})
    # a span that is one word short is wrong altogether
    assert compute("tag_f1", [[1, 0, 0, 3], [0]], gold, BIO)["tag_f1"] == 0.5
    # the same words as another type, too
    assert compute("tag_f1", [[3, 4, 0, 3], [0]], gold, BIO)["tag_f1"] == 0.5
    # the same span in another sequence is another span
    assert compute("tag_f1", [[0], [1]], [[1], [0]], BIO)["tag_f1"] == 0.0
    assert compute("tag_f1", [[0]], [[0]], BIO)["tag_f1"] == 0.0
    assert compute("token_accuracy", [[0, 1], [1]], [[0, 1], [0]], ("a", "b")) == pytest.approx(
        {"token_accuracy": 2 / 3}
    )


@pytest.mark.parametrize(
    ("metric", "predictions", "targets", "headline"),
    [
        ("pearson", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ("pearson", [1.0, 2.0], [5.0, 5.0], 0.0),
        ("pearson", [1.0], [2.0], 0.0),
        ("pearson", [0.0, 0.0], [1.0, 2.0], 0.0),
        ("spearman", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ("pearson_spearman", [float("nan"), 1.0], [1.0, 2.0], 0.0),
        ("pearson", [float("inf"), 1.0], [1.0, 2.0], 0.0),
        ("pearson", [1e300, -1e300], [1.0, -2.0], 1.0),
        ("mse", [float("nan"), 1.0], [1.0, 2.0], math.inf),
        ("mse", [1e200], [1.0], math.inf),
        ("mae", [float("inf"), 1.0], [1.0, 2.0], math.inf),
        ("matthews", [1, 1, 1], [0, 1, 1], 0.0),
        ("matthews", [0, 1], [1, 1], 0.0),
        ("f1", [0, 0], [0, 0], 0.0),
        ("macro_f1", [1, 1], [0, 0], 0.0),
    ],
)
def test_degenerate_inputs_give_a_number(metric, predictions, targets, headline):
    assert compute(metric, predictions, targets)[metric] == headline


@pytest.mark.parametrize(
    ("metric", "predictions", "targets", "labels", "message"),
    [
        ("accuracy", [], [], (), "N at least 1"),
        ("accuracy", [0, 1], [0], (), r"shape \[2\] and targets of shape \[1\]"),
        ("accuracy", [[0, 1]], [[0, 1]], (), "need the shape"),
        ("accuracy", [0.2, 0.8], [0, 1], (), "take the argmax"),
        ("accuracy", [0, 2], [0, 1], ("a", "b"), "prediction 2 is out of range; ids run from 0 to 1"),
        ("accuracy", [0, 1], [0, -1], (), "target -1 is out of range"),
        ("f1", [0, 2], [0, 1], (), "ids run from 0 to 1"),
        ("micro_f1", [0, 1], [0, 1], (), "N, L"),
        ("micro_f1", [[0, 2]], [[0, 1]], (), "prediction 2"),
        ("mse", [1.0], [float("nan")], (), "target 0 is not a finite number"),
        ("tag_f1", [[0, 1]], [[0]], BIO, "of the same lengths"),
        ("tag_f1", [], [], BIO, "not all empty"),
        ("tag_f1", [[7]], [[0]], BIO, "prediction 7"),
        ("token_accuracy", [[0]], [[-100]], (), "target -100"),
    ],
)
def test_inputs_that_cannot_be_judged(metric, predictions, targets, labels, message):
    with pytest.raises(DataError, match=message):
        compute(metric, predictions, targets, labels)


def test_tag_f1_of_other_tags():
    with pytest.raises(TaskError, match="token_accuracy"):
        compute("tag_f1", [[0]], [[0]], ("NOUN", "VERB"))


def test_unknown_metric():
    with pytest.raises(TaskError, match=r"no metric 'f2'; there are accuracy, f1, macro_f1"):
        compute("f2", [0], [0])
    with pytest.raises(TaskError, match="Did you mean 'accuracy'"):
        higher_is_better("acuracy")


def test_only_errors_are_better_when_lower():
    assert {name for name in METRICS if not higher_is_better(name)} == {"mse", "mae", "perplexity"}


numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=20))
def test_correlations_agree_with_scipy(pairs):
    p, t = np.array(pairs).T
    if len(set(p)) < 3 or len(set(t)) < 3 or np.std(p) < 1e-3 or np.std(t) < 1e-3:
        return
    assert compute("pearson", p, t)["pearson"] == pytest.approx(stats.pearsonr(p, t).statistic, abs=1e-6)
    assert compute("spearman", p, t)["spearman"] == pytest.approx(stats.spearmanr(p, t).statistic, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_f1_agrees_with_its_definition(pairs):
    hits = sum(p and t for p, t in pairs)
    stated = sum(p + t for p, t in pairs)
    expected = 2 * hits / stated if stated else 0.0
    predictions, targets = zip(*pairs, strict=True)
    assert compute("f1", predictions, targets)["f1"] == pytest.approx(expected)


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=4))
def test_perfect_tags_are_perfect(rows):
    scores = compute("tag_f1", rows, rows, BIO)
    assert scores["token_accuracy"] == 1.0
    assert scores["tag_f1"] == (1.0 if any(tag for row in rows for tag in row) else 0.0)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-x I-x O B-y", [(0, 2, "x"), (3, 4, "y")]),
        ("B-x B-x", [(0, 1, "x"), (1, 2, "x")]),
        ("B-x I-y", [(0, 1, "x"), (1, 2, "y")]),
        ("I-x I-x", [(0, 2, "x")]),
        ("O I-x-y", [(1, 2, "x-y")]),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["x", "y", ""])), max_size=8))
def test_spans_are_read_back(pieces):
    tags, expected = [], []
    for length, kind in pieces:
        if kind:
            expected.append((len(tags), len(tags) + length, kind))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1)] if kind else ["O"] * length
    assert spans(tags) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (BIO, True),
        (("O", "I-x"), True),
        (("O",), False),
        (("B-x",), False),
        (("O", "NN"), False),
        (("O", "B-"), False),
    ],
)
def test_is_bio(labels, expected):
    assert is_bio(labels) is expected
