"""Metrics of texts: golden numbers, worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitune.errors import ConfigError, DataError
from multitune.tasks import compute, text_metrics
from multitune.tasks.metrics import higher_is_better, judge_of_training

pytest.importorskip("sacrebleu", reason="pip install 'multitune[generation]'")
pytest.importorskip("rouge_score", reason="pip install 'multitune[generation]'")

TEXTS = ["the cat sat on the mat", "there is a dog"]
REFERENCES = [("the cat sat on the mat .", "a cat sat on a mat"), ("there is a small dog",)]


def by_hand():
    """Corpus BLEU of TEXTS: clipped matches over n-grams, brevity by the nearest reference length.

    Row 1 has 6 words, all n-grams in its first reference; the lengths of its references are 7 and 6. Row 2 has 4 words:
    4 of 4, 2 of 3 (there is, is a), 1 of 2, 0 of 1. So 10/10, 7/8, 5/6, 3/4, and 10 words against 6 + 5.
    """
    precisions = [10 / 10, 7 / 8, 5 / 6, 3 / 4]
    return 100 * math.exp(1 - 11 / 10) * math.prod(precisions) ** (1 / 4)


def test_bleu_of_several_references_by_hand():
    assert compute("bleu", TEXTS, REFERENCES)["bleu"] == pytest.approx(by_hand(), abs=1e-9)
    assert by_hand() == pytest.approx(77.8, abs=0.05)


def test_nist_by_hand():
    """Words of one reference tell log2(3) bits each, its word pairs nothing; two thirds of its length halve that."""
    assert compute("nist", ["A b"], ["a B c"]) == {"nist": pytest.approx(math.log2(3) / 2)}
    # a: 3 of 5 words, told twice since a reference has it twice; "a a": once behind 3 a; lengths 2 against 5 / 2
    penalty = math.exp(math.log(0.5) * (math.log(2 / 2.5) / math.log(1.5)) ** 2)
    found = compute("nist", ["a a"], [("a b", "a a c")])["nist"]
    assert found == pytest.approx((math.log2(5 / 3) + math.log2(3)) * penalty)
    assert compute("nist", ["x", ""], ["a", "b"])["nist"] == 0
    assert compute("nist", [""], [""])["nist"] == 0


def test_nist_of_one_reference_is_nltks():
    theirs = pytest.importorskip("nltk.translate.nist_score").corpus_nist
    texts = ["the cat sat on the mat , did it ?", "there is a very small dog here", "a mat sat on a cat"]
    references = [
        "a cat sat on the mat , did it not ?",
        "there is a small dog over there .",
        "no one knows a cat at all",
    ]
    expected = theirs([[r.split()] for r in references], [t.split() for t in texts])
    assert compute("nist", texts, references)["nist"] == pytest.approx(expected)


def test_the_headline_comes_first_and_the_parts_follow():
    assert list(compute("bleu", TEXTS, REFERENCES)) == ["bleu", "chrf"]
    assert list(compute("rouge_l", TEXTS, REFERENCES)) == ["rouge_l", "rouge_1", "rouge_2"]
    assert list(compute("token_f1", TEXTS, REFERENCES)) == ["token_f1", "exact_match"]


def test_rouge_takes_the_best_reference_and_the_mean_over_rows():
    # row 1 against its first reference: 6 of 6 words and punctuation is no word; row 2: 4 of 4 found, 4 of 5 there
    assert compute("rouge_l", TEXTS, REFERENCES)["rouge_l"] == pytest.approx((1 + 2 * 4 / 9) / 2)
    assert compute("rouge_l", TEXTS, REFERENCES)["rouge_2"] == pytest.approx((1 + 2 * 2 / 7) / 2)


def test_exact_match_and_f1_read_over_case_articles_and_punctuation():
    texts, references = ["The  Cat!", "a red dog", "no"], [("cat",), ("red cat", "the red big dog"), ("yes",)]
    assert compute("exact_match", texts, references) == {"exact_match": pytest.approx(1 / 3)}
    assert compute("token_f1", texts, references)["token_f1"] == pytest.approx((1 + 2 * 2 / 5 + 0) / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7", 7.0),
        ("#### 1,250", 1250.0),
        ("It costs $2.50.", 2.5),
        ("-3 degrees", -3.0),
        ("none", None),
        ("first 1,2", 2.0),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert text_metrics.last_number(text) == number


def test_numbers_match_by_value():
    assert compute("number_match", ["so 7.0", "8", "?"], ["a #### 7", "9", "3"])["number_match"] == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="holds no number"):
        compute("number_match", ["7"], ["seven"])


@given(st.lists(st.text(st.sampled_from("ab c"), min_size=1), min_size=1, max_size=4))
def test_a_reference_itself_scores_best(texts):
    for metric, best in (("exact_match", 1), ("token_f1", 1)):
        assert compute(metric, texts, [("zz", text) for text in texts])[metric] == best


def test_an_interval_holds_its_score_and_narrows_with_rows():
    few = text_metrics.bleu_interval(TEXTS * 3, REFERENCES * 3)
    many = text_metrics.bleu_interval(TEXTS * 60, REFERENCES * 60)
    assert few.low <= few.score <= few.high and few.score == pytest.approx(by_hand())
    assert (many.high - many.low) < (few.high - few.low) / 2
    assert text_metrics.bleu_interval(TEXTS * 3, REFERENCES * 3) == few  # always the same samples


def test_perplexity_chooses_in_training_and_is_no_metric_of_texts():
    assert judge_of_training("bleu") == judge_of_training("perplexity") == "perplexity"
    assert judge_of_training("matthews") == "matthews"
    assert not higher_is_better("perplexity") and higher_is_better("bleu")
    with pytest.raises(DataError, match="perplexity is no metric of texts"):
        compute("perplexity", ["a"], ["a"])


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [()]), (["a"], ["a", "b"])])
def test_what_cannot_be_compared(texts, references):
    with pytest.raises(DataError, match="cannot be compared"):
        compute("bleu", texts, references)


def test_a_library_that_is_not_there_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"sacrebleu, which is not installed: pip install 'multitune\[generation\]'"):
        compute("bleu", TEXTS, REFERENCES)
