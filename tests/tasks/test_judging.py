"""Metrics that need more than ids: groups of rows, texts of choices, several right choices."""

import re
import string
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from multitune.errors import DataError, TaskError
from multitune.tasks import Example, Task, compute, judge

ANSWERS = Task(
    name="answers",
    kind="classification",
    template=("paragraph", "{question} {answer}"),
    label="label",
    labels=("no", "yes"),
    metric="f1a_and_em",
    group=("paragraph", "question"),
)
CLOZE = Task(
    name="cloze",
    kind="multiple_choice",
    template=("passage",),
    choices=("{before}{entities}{after}",),
    label="answers",
    metric="choice_f1_and_em",
)


def answer(paragraph: str, question: str, label: int) -> dict:
    return {"paragraph": paragraph, "question": question, "answer": "a", "label": label}


def cloze(entities: list[str], answers: object) -> dict:
    return {"passage": "p", "before": "It was ", "after": ".", "entities": entities, "answers": answers}


# ---- groups of rows: MultiRC


def test_a_question_counts_when_all_its_answers_are_right():
    # question 0 has one answer wrong, questions 1 and 2 none; 3 hits, 4 stated, 3 true: F1 = 6/7
    scores = compute("f1a_and_em", [1, 1, 0, 1, 1], [1, 0, 0, 1, 1], ("no", "yes"), groups=[0, 0, 1, 1, 2])
    assert scores == pytest.approx({"f1a_and_em": (6 / 7 + 2 / 3) / 2, "f1a": 6 / 7, "question_em": 2 / 3})
    assert next(iter(scores)) == "f1a_and_em"


def test_rows_of_a_group_may_lie_apart():
    together = compute("f1a_and_em", [1, 0, 1], [1, 1, 1], groups=["a", "a", "b"])
    assert compute("f1a_and_em", [1, 1, 0], [1, 1, 1], groups=["a", "b", "a"]) == together
    assert together["question_em"] == 0.5


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.tuples(st.integers(0, 3), st.sampled_from("xy"))),
        min_size=1,
        max_size=30,
    )
)
def test_multirc_agrees_with_a_loop_over_questions(rows):
    predictions, targets, groups = zip(*rows, strict=True)
    right = []
    for question in set(groups):
        own = [(p, t) for p, t, g in rows if g == question]
        right.append(all(p == t for p, t in own))
    scores = compute("f1a_and_em", predictions, targets, ("no", "yes"), groups=groups)
    assert scores["question_em"] == pytest.approx(sum(right) / len(right))
    assert scores["f1a"] == pytest.approx(f1_score(targets, predictions, zero_division=0))
    assert scores["f1a_and_em"] == pytest.approx((scores["f1a"] + scores["question_em"]) / 2)


def test_the_columns_of_a_task_tell_its_groups():
    rows = [answer("p", "q", 1), answer("p", "q", 0), answer("p", "r", 1), answer("o", "q", 1)]
    examples = ANSWERS.examples(rows)
    assert [e.group for e in examples] == [("p", "q"), ("p", "q"), ("p", "r"), ("o", "q")]
    assert judge(ANSWERS, [1, 1, 1, 1], examples)["question_em"] == pytest.approx(2 / 3)
    assert ANSWERS.encode({"paragraph": "p", "question": "q", "answer": "a"}).group == ()
    assert Task.from_dict(ANSWERS.to_dict()) == ANSWERS
    assert "group" not in CLOZE.to_dict()


def test_a_column_that_tells_the_groups_must_be_there():
    task = Task.from_dict(ANSWERS.to_dict() | {"group": ["number"]})
    with pytest.raises(DataError, match="no column 'number'"):
        task.examples([answer("p", "q", 1)])


@pytest.mark.parametrize(
    ("metric", "groups", "message"),
    [
        ("f1a_and_em", None, "metric 'f1a_and_em' needs groups"),
        ("accuracy", [0, 1], "metric 'accuracy' judges row by row; leave groups out"),
        ("f1a_and_em", [0], "2 predictions and 1 groups do not fit"),
    ],
)
def test_groups_are_honoured_or_refused(metric, groups, message):
    with pytest.raises(DataError, match=message):
        compute(metric, [0, 1], [0, 1], groups=groups)


# ---- the texts of choices: ReCoRD


def reference_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def reference_f1(prediction: str, answer: str) -> float:
    ours, theirs = reference_words(prediction), reference_words(answer)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


names = st.lists(st.sampled_from(["North Korea", "Korea", "the North", "Seoul", "U.S.", "West Brom"]), min_size=1)


@given(
    st.lists(
        names.flatmap(lambda n: st.tuples(st.just(n), st.sampled_from(n), st.sets(st.sampled_from(n), min_size=1))),
        min_size=1,
        max_size=8,
    )
)
def test_record_agrees_with_a_loop_over_right_answers(rows):
    examples = CLOZE.examples([cloze(entities, sorted(right)) for entities, _, right in rows])
    chosen = [entities.index(choice) for entities, choice, _ in rows]
    f1 = [max(reference_f1(choice, r) for r in right) for _, choice, right in rows]
    em = [any(reference_words(choice) == reference_words(r) for r in right) for _, choice, right in rows]
    scores = judge(CLOZE, chosen, examples)
    assert scores["token_f1"] == pytest.approx(sum(f1) / len(f1))
    assert scores["exact_match"] == pytest.approx(sum(em) / len(em))
    assert scores["choice_f1_and_em"] == pytest.approx((scores["token_f1"] + scores["exact_match"]) / 2)


def test_any_right_choice_is_right_for_accuracy():
    task = Task.from_dict(CLOZE.to_dict() | {"metric": "accuracy"})
    examples = task.examples([cloze(["a", "b", "c"], ["a", "c"]), cloze(["a", "b"], "a")])
    assert [e.target for e in examples] == [(0, 2), (0,)]
    assert [judge(task, p, examples)["accuracy"] for p in ([2, 0], [0, 1], [1, 1])] == [1.0, 0.5, 0.0]


# ---- choices that are a list in the row


@pytest.mark.parametrize(
    ("entities", "right", "target"),
    [
        (["x", "y"], "y", (1,)),
        (["x", "y"], 1, (1,)),
        (["x", "y"], "1", (1,)),
        (["x", "y", "z"], ["z", "x"], (0, 2)),
        (["x", "y", "x"], "x", (0, 2)),
        (["x", "y"], [0, "y"], (0, 1)),
        (["3", "0"], "3", (0,)),
        (["3", "0"], 0, (0,)),
        ([3, 0], "0", (1,)),
        (["only"], "only", (0,)),
    ],
)
def test_what_is_right_in_a_list(entities, right, target):
    found = CLOZE.encode(cloze(entities, right))
    assert found.target == target
    assert found.choices == tuple(map(str, entities))
    assert found.texts == tuple(("p", f"It was {entity}.") for entity in entities)


@pytest.mark.parametrize(
    ("entities", "right", "message"),
    [
        (["Seoul", "Pyongyang"], "Soul", "no choice 'Soul'; there are 'Seoul', 'Pyongyang'.* Did you mean 'Seoul'"),
        (["x", "y"], 2, "no choice 2"),
        (["x", "y"], -1, "no choice -1"),
        (["3", "0"], "1", "no choice '1'"),
        (["x", "y"], [], "no choice is right"),
        ([], "x", "column 'entities' is a list of choices"),
        (["x", " "], "x", "column 'entities' is a list of choices"),
        ("xy", "x", "of the columns 'before', 'entities', 'after' none hold one"),
    ],
)
def test_lists_and_answers_that_do_not_fit(entities, right, message):
    with pytest.raises(DataError, match=rf"task 'cloze', row 1: .*{message}"):
        CLOZE.examples([cloze(entities, right)])


def test_one_column_of_choices_that_holds_no_list_says_what_is_wanted():
    task = replace(CLOZE, choices=("entities",))
    with pytest.raises(DataError, match=r"column 'entities' of the choices holds no list; --choices .* two or more"):
        task.encode(cloze("xy", "x"))


def test_two_lists_in_one_choice_are_refused():
    with pytest.raises(DataError, match="'entities', 'after' hold one"):
        CLOZE.encode(cloze(["x"], "x") | {"after": ["y"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": []}, r"judges groups of rows; say which columns.*group=\("),
        ({"group": ["label"]}, "'label' is the label, and so tells no groups apart"),
        ({"metric": "choice_f1_and_em"}, "does not judge classification"),
    ],
)
def test_groups_that_a_task_cannot_have(changes, message):
    with pytest.raises(TaskError, match=message):
        Task.from_dict(ANSWERS.to_dict() | changes)


def test_texts_of_choices_are_read_from_a_list_only():
    with pytest.raises(TaskError, match=r"reads the texts of choices, which a row has in a list: choices=\(COLUMN,\)"):
        Task.from_dict(CLOZE.to_dict() | {"choices": ["before", "after"]})


def test_tags_that_were_cut_off_are_not_judged():
    task = Task(name="t", kind="tagging", template=("words",), label="y", labels=("O", "B-x"))
    examples = [Example(texts=(("a", "b"),), target=(1, 1)), Example(texts=(("a",),), target=(0,))]
    assert judge(task, [(1,), (0,)], examples)["token_accuracy"] == 1.0
