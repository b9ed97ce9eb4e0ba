from collections import Counter

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitune.errors import DataError
from multitune.tasks import split_table


def table(labels):
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels})


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_are_stratified_disjoint_and_complete(labels, fraction, seed):
    whole = table(labels)
    rest, held = split_table(whole, fraction, seed)
    assert sorted([*rest["text"], *held["text"]]) == sorted(whole["text"])
    assert len(held) == min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    for part in (rest, held):
        numbers = [int(text[1:]) for text in part["text"]]
        assert numbers == sorted(numbers)
    share = len(held) / len(labels)
    counts = Counter(held["label"])
    for label, size in Counter(labels).items():
        assert abs(counts[label] - share * size) < 1


def test_the_seed_decides():
    whole = table(["a", "b"] * 20)
    first = split_table(whole, 0.25, seed=1)[1]["text"]
    assert list(first) == list(split_table(whole, 0.25, seed=1)[1]["text"])
    assert list(first) != list(split_table(whole, 0.25, seed=2)[1]["text"])


def test_a_golden_split():
    # pinned: a split that changed between versions would move rows from validation to training
    rest, held = split_table(table(["a", "b"] * 5), 0.4, seed=0)
    assert list(held["text"]) == GOLDEN
    assert Counter(held["label"]) == {"a": 2, "b": 2}
    assert len(rest) == 6


GOLDEN = ["t3", "t4", "t8", "t9"]


def test_what_is_stratified():
    scores = datasets.Dataset.from_dict({"text": list("abcd"), "score": [0.1, 0.2, 0.3, 0.4]})
    assert len(split_table(scores, 0.5, 0)[1]) == 2
    lists = datasets.Dataset.from_dict({"text": list("abcd"), "labels": [["x"], [], ["y"], []]})
    assert len(split_table(lists, 0.5, 0)[1]) == 2
    plain = datasets.Dataset.from_dict({"text": list("abcd")})
    assert len(split_table(plain, 0.5, 0)[1]) == 2
    mood = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 0, 0, 0], "mood": list("xxyy")})
    for seed in range(5):
        assert sorted(split_table(mood, 0.5, seed, label="mood")[1]["mood"]) == ["x", "y"]


def test_labels_that_are_all_different_leave_the_draw_to_the_seed():
    whole = table([f"l{i}" for i in range(40)])
    held = {tuple(split_table(whole, 0.25, seed)[1]["text"]) for seed in range(3)}
    assert len(held) == 3


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_fractions_out_of_range(fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        split_table(table(["a", "b"]), fraction, 0)


def test_tables_that_cannot_be_split():
    with pytest.raises(DataError, match=r"1 row\(s\) cannot be split"):
        split_table(table(["a"]), 0.5, 0)
    with pytest.raises(DataError, match="no column 'lable'.*Did you mean 'label'"):
        split_table(table(["a", "b"]), 0.5, 0, label="lable")
