"""Draws of rows: the same everywhere, label by label, whole groups, and told apart by their fingerprint."""

from collections import Counter
from dataclasses import replace

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitune import ConfigError, DataError, Task, TaskData
from multitune.comparing.rows import draw, rows_fingerprint

LABELS = ("no", "yes", "maybe")
TASK = Task(name="mood", kind="classification", template=("text",), label="y", labels=LABELS)


def table(counts: dict[str, int], start: int = 0) -> list[dict]:
    """So many rows of each label, the labels in turn."""
    rows, left = [], dict(counts)
    while any(left.values()):
        for label in [label for label, count in left.items() if count]:
            left[label] -= 1
            rows.append({"text": f"row {start + len(rows)}", "y": label})
    return rows


def made(counts: dict[str, int], validation: dict[str, int] | None = None) -> TaskData:
    return TaskData(task=TASK, train=table(counts), validation=table(validation or {"no": 5, "yes": 7}, start=1000))


def texts(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def test_nothing_asked_for_is_everything():
    data = made({"no": 4, "yes": 3, "maybe": 2})
    assert draw(data) == draw(data, train_rows=9, validation_rows=12) == draw(data, train_rows=500) == data


counts = st.fixed_dictionaries({label: st.integers(1, 40) for label in LABELS})


@given(counts, st.integers(1, 130), st.integers(0, 5))
@settings(max_examples=60)
def test_a_draw_is_a_part_in_order_with_every_label_in_its_share(counts, num_rows, seed):
    data = made(counts)
    drawn = draw(data, train_rows=num_rows, subset_seed=seed)
    whole, total = texts(data.train), sum(counts.values())
    places = [whole.index(text) for text in texts(drawn.train)]
    assert places == sorted(set(places)) and len(places) == min(num_rows, total)
    for label, found in Counter(row["y"] for row in drawn.train).items():
        assert abs(found - len(places) * counts[label] / total) < 2
    assert drawn.validation == data.validation
    assert draw(data, train_rows=num_rows, subset_seed=seed) == drawn


@given(counts, st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=40)
def test_a_smaller_draw_is_part_of_a_larger_one(counts, one, other, seed):
    data, (small, large) = made(counts), sorted((one, other))
    drawn = [set(texts(draw(data, train_rows=n, subset_seed=seed).train)) for n in (small, large)]
    assert drawn[0] <= drawn[1]
    least = min(counts.values())
    by_class = [draw(data, per_class=min(n, least), subset_seed=seed).train for n in (small, large)]
    assert set(texts(by_class[0])) <= set(texts(by_class[1]))


@given(counts, st.integers(0, 5))
@settings(max_examples=30)
def test_per_class_takes_as_many_of_every_label(counts, seed):
    least = min(counts.values())
    drawn = draw(made(counts), per_class=least, subset_seed=seed)
    assert Counter(row["y"] for row in drawn.train) == dict.fromkeys(LABELS, least)


def test_seeds_draw_other_rows_to_learn_from_and_the_same_to_judge_by():
    data = made({"no": 30, "yes": 30, "maybe": 30}, {"no": 30, "yes": 30})
    drawn = [draw(data, per_class=5, validation_rows=20, subset_seed=seed) for seed in range(4)]
    assert len({tuple(texts(d.train)) for d in drawn}) == 4
    assert len({tuple(texts(d.validation)) for d in drawn}) == 1
    assert Counter(row["y"] for row in drawn[0].validation) == {"no": 10, "yes": 10}


def test_a_draw_is_the_same_on_every_machine_and_day():
    # golden: a changed draw would make the trials of an older store other trials
    data = made({"no": 10, "yes": 10, "maybe": 4})
    drawn = texts(draw(data, train_rows=6, subset_seed=1).train)
    assert drawn == ["row 0", "row 2", "row 7", "row 10", "row 12", "row 17"]
    assert texts(draw(data, per_class=2).train) == ["row 0", "row 2", "row 5", "row 9", "row 15", "row 17"]
    assert rows_fingerprint(data) == "b88e78b45915fcae43c1"


def test_rows_of_one_label_do_not_depend_on_those_of_another():
    few, many = (made({"no": 9, "yes": count, "maybe": 2}) for count in (2, 30))
    places = []
    for data in (few, many):
        own = [row for row in data.train if row["y"] == "no"]
        places.append([own.index(row) for row in draw(data, per_class=2).train if row["y"] == "no"])
    assert places[0] == places[1] and len(places[0]) == 2


def test_tables_and_lists_are_drawn_alike():
    data = made({"no": 20, "yes": 20, "maybe": 20})
    tables = {part: datasets.Dataset.from_list(getattr(data, part)) for part in ("train", "validation")}
    as_tables = replace(data, **tables)
    for asked in ({"train_rows": 7, "validation_rows": 3}, {"per_class": 3, "subset_seed": 2}):
        one, other = draw(data, **asked), draw(as_tables, **asked)
        assert one.train == other.train.to_list() and one.validation == other.validation.to_list()
        assert rows_fingerprint(one) == rows_fingerprint(other)


def test_rows_judged_as_one_group_are_drawn_together():
    task = Task(
        name="answers",
        kind="classification",
        template=("q", "a"),
        label="y",
        labels=LABELS[:2],
        metric="f1a_and_em",
        group=("q",),
    )
    rows = [{"q": f"q{i % 10}", "a": f"a{i}", "y": LABELS[i % 2]} for i in range(47)]
    data = TaskData(task=task, train=rows, validation=rows)
    drawn = draw(data, train_rows=20, validation_rows=18, subset_seed=3)
    found = Counter(row["q"] for row in drawn.validation)
    assert all(count == sum(row["q"] == q for row in rows) for q, count in found.items())
    assert 18 - 5 < len(drawn.validation) <= 18
    assert len(drawn.train) == 20 and Counter(row["y"] for row in drawn.train) == {"no": 10, "yes": 10}
    assert draw(data, validation_rows=47) == data
    assert len(draw(data, validation_rows=1).validation) in (4, 5)  # a group is not cut


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"train_rows": 0}, ConfigError, "train_rows=0 is not possible"),
        ({"validation_rows": -1}, ConfigError, "validation_rows=-1 is not possible"),
        ({"per_class": 0}, ConfigError, "per_class=0 is not possible"),
        ({"per_class": 2, "train_rows": 9}, ConfigError, "per_class=2 and train_rows=9 both say what to draw"),
        ({"per_class": 4}, DataError, "has 3 rows to learn from with the label 'maybe'.*give at most 3"),
    ],
)
def test_draws_that_cannot_be(asked, error, message):
    with pytest.raises(error, match=message):
        draw(made({"no": 9, "yes": 9, "maybe": 3}), **asked)


def test_only_classes_are_drawn_by_class():
    task = Task(name="score", kind="regression", template=("text",), label="y")
    data = TaskData(task=task, train=[{"text": "a", "y": 1.0}] * 4, validation=[{"text": "b", "y": 0.0}])
    with pytest.raises(ConfigError, match="task 'score' is of kind regression; give train_rows"):
        draw(data, per_class=1)
    assert len(draw(data, train_rows=3).train) == 3


def test_a_label_without_rows_is_named():
    with pytest.raises(DataError, match="has 0 rows .* label 'maybe'.*give train_rows instead"):
        draw(made({"no": 9, "yes": 9}), per_class=1)


# ---- fingerprints


def test_a_fingerprint_depends_on_what_the_task_reads():
    data = made({"no": 3, "yes": 3})
    plain = rows_fingerprint(data)

    def changed(**columns):
        return replace(data, train=[{**data.train[0], **columns}, *data.train[1:]])

    others = [
        changed(text="another"),
        changed(y="maybe"),
        replace(data, train=data.train[::-1]),
        replace(data, train=data.train[:-1]),
        replace(data, validation=data.validation[:-1]),
        replace(data, train=[*data.train, data.validation[0]], validation=data.validation[1:]),
        replace(data, task=replace(TASK, metric="macro_f1")),
        replace(data, task=replace(TASK, labels=LABELS[::-1])),
    ]
    found = [rows_fingerprint(other) for other in others]
    assert len({plain, *found}) == 1 + len(others)
    assert rows_fingerprint(changed(note="unread")) == plain
    assert rows_fingerprint(changed(y=0)) == plain  # the same label, by its id
    assert len(plain) == 20 and set(plain) <= set("0123456789abcdef")


def test_the_boundary_between_texts_counts():
    task = Task(name="pair", kind="regression", template=("a", "b"), label="y")
    rows = [{"a": "x", "b": "yz", "y": 1.0}], [{"a": "xy", "b": "z", "y": 1.0}]
    one, other = (rows_fingerprint(TaskData(task=task, train=r, validation=r)) for r in rows)
    assert one != other
