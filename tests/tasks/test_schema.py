import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitune.errors import DataError, TaskError
from multitune.tasks import Example, Task, Template

SENTIMENT = Task(name="s", kind="classification", template=("text",), label="label", labels=("negative", "positive"))
SCORE = Task(name="r", kind="regression", template=("a", "b"), label="score")
TOPICS = Task(name="m", kind="multilabel", template=("text",), label="topics", labels=("art", "law", "war"))
COPA = Task(
    name="c",
    kind="multiple_choice",
    template=("{premise} What was the {question}?",),
    label="label",
    choices=("choice1", "choice2"),
)
NER = Task(
    name="t",
    kind="tagging",
    template=("tokens",),
    label="tags",
    labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
)
TASKS = (SENTIMENT, SCORE, TOPICS, COPA, NER)


# ---- encoding


@pytest.mark.parametrize(
    ("task", "row", "texts", "target"),
    [
        (SENTIMENT, {"text": "x", "label": "positive"}, (("x",),), 1),
        (SENTIMENT, {"text": "x", "label": " positive "}, (("x",),), 1),
        (SENTIMENT, {"text": "x", "label": 0}, (("x",),), 0),
        (SENTIMENT, {"text": "x", "label": 1.0}, (("x",),), 1),
        (SENTIMENT, {"text": "x", "label": "1"}, (("x",),), 1),
        (SENTIMENT, {"text": "x"}, (("x",),), None),
        (SENTIMENT, "x", (("x",),), None),
        (SCORE, {"a": "x", "b": "y", "score": 3}, (("x", "y"),), 3.0),
        (SCORE, {"a": "x", "b": "y", "score": "2.5"}, (("x", "y"),), 2.5),
        (SCORE, ["x", "y"], (("x", "y"),), None),
        (TOPICS, {"text": "x", "topics": ["war", "art"]}, (("x",),), (1, 0, 1)),
        (TOPICS, {"text": "x", "topics": [1]}, (("x",),), (0, 1, 0)),
        (TOPICS, {"text": "x", "topics": "law | art"}, (("x",),), (1, 1, 0)),
        (TOPICS, {"text": "x", "topics": "law,war"}, (("x",),), (0, 1, 1)),
        (TOPICS, {"text": "x", "topics": ""}, (("x",),), (0, 0, 0)),
        (TOPICS, {"text": "x", "topics": []}, (("x",),), (0, 0, 0)),
        (NER, {"tokens": ["Ada", "left"], "tags": ["B-PER", "O"]}, (("Ada", "left"),), (1, 0)),
        (NER, {"tokens": ["Ada", "left"], "tags": [1, 0]}, (("Ada", "left"),), (1, 0)),
        (NER, ["Ada", "left"], (("Ada", "left"),), None),
    ],
)
def test_encode(task, row, texts, target):
    assert task.encode(row) == Example(texts=texts, target=target)


@pytest.mark.parametrize("label", [1, "1", "choice2"])
def test_multiple_choice_has_a_sequence_per_choice(label):
    row = {
        "premise": "It rained.",
        "question": "effect",
        "choice1": "Sun.",
        "choice2": "Mud.",
        "label": label,
    }
    question = "It rained. What was the effect?"
    assert COPA.encode(row) == Example(texts=((question, "Sun."), (question, "Mud.")), target=1)
    assert COPA.columns == ("premise", "question", "choice1", "choice2")


def test_whole_numbers_that_are_names_are_never_ids():
    stars = Task(name="s", kind="classification", template=("text",), label="stars", labels=("1", "2", "3"))
    assert stars.encode({"text": "x", "stars": 1}).target == 0
    assert stars.encode({"text": "x", "stars": "3"}).target == 2
    with pytest.raises(DataError, match="unknown label 0; the labels are '1', '2', '3'"):
        stars.encode({"text": "x", "stars": 0})


def test_truth_values_are_names():
    task = Task(name="b", kind="classification", template=("text",), label="label", labels=("False", "True"))
    assert task.encode({"text": "x", "label": True}).target == 1
    with pytest.raises(DataError, match="unknown label True"):
        SENTIMENT.encode({"text": "x", "label": True})


def test_a_label_with_a_comma_is_not_split():
    task = Task(name="m", kind="multilabel", template=("text",), label="l", labels=("arts, crafts", "law"))
    assert task.encode({"text": "x", "l": "arts, crafts"}).target == (1, 0)
    assert task.encode({"text": "x", "l": "arts, crafts|law"}).target == (1, 1)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            SENTIMENT,
            {"text": "x", "label": "positiv"},
            r"unknown label 'positiv'.*'negative', 'positive'.*Did you mean",
        ),
        (SENTIMENT, {"text": "x", "label": 2}, "unknown label 2"),
        (SENTIMENT, {"text": "x", "label": -1}, "unknown label -1"),
        (SENTIMENT, {"text": "x", "label": None}, "label is empty"),
        (SENTIMENT, {"text": "x", "label": ""}, "label is empty"),
        (
            SENTIMENT,
            {"txt": "x", "label": 0},
            r"no column 'text'; the row has 'txt', 'label'\. Did you mean 'txt'",
        ),
        (SCORE, {"a": "x", "b": "y", "score": float("nan")}, "finite number, not nan"),
        (SCORE, {"a": "x", "b": "y", "score": "high"}, "a number, not 'high'"),
        (SCORE, {"a": "x", "b": "y", "score": None}, "a number, not None"),
        (SCORE, {"a": "x", "b": "y", "score": True}, "a number, not True"),
        (TOPICS, {"text": "x", "topics": ["art", "tax"]}, "unknown label 'tax'"),
        (TOPICS, {"text": "x", "topics": [1, 0, 1]}, "stands twice"),
        (TOPICS, {"text": "x", "topics": None}, "list of names or ids"),
        (NER, {"tokens": ["Ada"], "tags": ["B-PER", "O"]}, "2 tags for 1 words"),
        (NER, {"tokens": ["Ada"], "tags": "B-PER"}, "one tag per word"),
        (NER, {"tokens": ["Ada"], "tags": ["B-ORG"]}, "unknown label 'B-ORG'"),
        (NER, {"tokens": "Ada left", "tags": ["O"]}, "Split the text into words"),
        (NER, "Ada left", "Split the text into words"),
        (COPA, "a text", "reads 'premise', 'question'"),
        (
            COPA,
            {"premise": "p", "question": "q", "choice1": "a", "choice2": "b", "label": 2},
            "0 … 1 or one of 'choice1'",
        ),
        (
            COPA,
            {"premise": "p", "question": "q", "choice1": "a", "choice2": "b", "label": "b"},
            "not 'b', which is the text of 'choice2': write 'choice2' or 1 instead",
        ),
    ],
)
def test_a_row_that_cannot_be_encoded(task, row, message):
    with pytest.raises(DataError, match=message) as caught:
        task.encode(row, number=7)
    assert f"task {task.name!r}, row 7: " in str(caught.value)


def test_a_fixed_multiple_choice_needs_a_mapping():
    task = Task(name="c", kind="multiple_choice", template=("text",), choices=("a", "b"))
    with pytest.raises(DataError, match="mapping with the columns text, a, b"):
        task.encode("a text")


# ---- whole tables


def table_of_class_labels(names):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)


def test_examples_go_by_the_names_of_the_table():
    assert [e.target for e in SENTIMENT.examples(table_of_class_labels(["negative", "positive"]))] == [0, 1]
    assert [e.target for e in SENTIMENT.examples(table_of_class_labels(["positive", "negative"]))] == [1, 0]


def test_rows_have_the_names_of_the_table():
    table = table_of_class_labels(["positive", "negative"])
    assert SENTIMENT.rows(table) == [{"text": "x", "label": "positive"}, {"text": "y", "label": "negative"}]
    rows = [{"text": "x", "label": 0}, {"text": "y"}]
    assert SENTIMENT.rows(rows) == rows and SENTIMENT.rows(table.remove_columns("label"))[0] == {"text": "x"}


def test_examples_of_class_labels_that_are_numbers():
    stars = Task(name="s", kind="classification", template=("text",), label="label", labels=("1", "2"))
    assert [e.target for e in stars.examples(table_of_class_labels(["1", "2"]))] == [0, 1]


def test_examples_of_lists_of_class_labels():
    tags = datasets.List(datasets.ClassLabel(names=["B-PER", "O"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": tags})
    table = datasets.Dataset.from_dict({"tokens": [["Ada", "left"]], "tags": [[0, 1]]}, features=features)
    assert NER.examples(table)[0].target == (1, 0)


def test_examples_of_rows_and_without_labels():
    rows = [{"text": "x", "label": "positive"}, {"text": "y", "label": "?"}]
    assert [e.target for e in SENTIMENT.examples(rows, labelled=False)] == [None, None]
    assert [e.target for e in SENTIMENT.examples(table_of_class_labels(["a", "b"]), labelled=False)] == [
        None,
        None,
    ]
    with pytest.raises(DataError, match="task 's', row 2: unknown label"):
        SENTIMENT.examples(rows)
    assert SENTIMENT.examples(["x", "y"], labelled=False)[1] == Example(texts=(("y",),))
    with pytest.raises(DataError, match="row 1: no label column 'label'"):
        SENTIMENT.examples([{"text": "x"}])


def test_examples_name_a_missing_column():
    table = datasets.Dataset.from_dict({"txt": ["x"], "label": [0]})
    with pytest.raises(DataError, match=r"no column 'text'; the table has 'txt', 'label'\. Did you mean 'txt'"):
        SENTIMENT.examples(table)
    with pytest.raises(DataError, match="no label column"):
        Task(name="p", kind="regression", template=("txt",)).examples(table)


# ---- the fields


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (SENTIMENT, "accuracy"),
        (SCORE, "pearson_spearman"),
        (TOPICS, "micro_f1"),
        (COPA, "accuracy"),
        (NER, "tag_f1"),
    ],
)
def test_usual_metric(task, metric):
    assert task.metric == metric


def test_usual_metric_of_other_tags():
    task = Task(name="pos", kind="tagging", template=("{words}",), label="pos", labels=("NOUN", "VERB"))
    assert task.metric == "token_accuracy"


GOOD = {"name": "n", "kind": "classification", "template": ("text",), "label": "label", "labels": ("a", "b")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "needs a name"),
        ({"kind": "clasification"}, r"no kind of task 'clasification'.*Did you mean 'classification'"),
        ({"template": ()}, "one or two parts"),
        ({"label": 3}, "label is a text, not 3"),
        ({"metric": ["f1"]}, "metric is a text, not"),
        ({"labels": ("a",)}, "at least 2 label name"),
        ({"labels": ("a", "a")}, r"\['a', 'a'\] do not"),
        ({"labels": ("a", "")}, "not empty"),
        ({"labels": "ab"}, "labels is a list of texts"),
        ({"labels": (1, 2)}, "labels is a list of texts"),
        ({"label": "text"}, "both text and label"),
        ({"choices": ("x", "y")}, "only multiple_choice has choices"),
        ({"metric": "acuracy"}, "Did you mean 'accuracy'"),
        ({"metric": "mse"}, "does not judge classification; set metric to one of accuracy, f1"),
        ({"metric": "f1", "labels": ("a", "b", "c")}, "needs two labels"),
        ({"kind": "regression"}, "has no label names"),
        ({"kind": "multiple_choice", "labels": ()}, "at least two choices"),
        ({"kind": "multiple_choice", "labels": (), "choices": ("x", "{y.z}")}, "no attribute"),
        (
            {"kind": "multiple_choice", "labels": (), "choices": ("x", "y"), "template": ("a", "b")},
            "one part",
        ),
        ({"kind": "tagging", "template": ("a", "b")}, "one column that holds words"),
        ({"kind": "tagging", "template": ("words: {a}",)}, "one column that holds words"),
        ({"kind": "tagging", "metric": "tag_f1"}, "needs BIO tags"),
    ],
)
def test_malformed_fields(change, message):
    with pytest.raises(TaskError, match=message):
        Task(**{**GOOD, **change})


# ---- JSON


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_json_round_trip(task):
    again = Task.from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    assert again.to_dict() == task.to_dict()


names = st.text(min_size=1, max_size=9)


@given(name=names.filter(str.strip), labels=st.lists(names, min_size=2, max_size=5, unique=True), text=names)
def test_json_round_trip_of_any_names(name, labels, text):
    column = text.replace("{", "(").replace("}", ")")
    task = Task(name=name, kind="classification", template=Template((column,)), labels=tuple(labels))
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "lable": "x"}, "no field 'lable'.*Did you mean 'label'"),
        ({"name": "n", "kind": "regression"}, "a task needs template; got name, kind"),
        ({}, "got nothing"),
        ({**GOOD, "template": "text"}, "template is a list of texts"),
    ],
)
def test_malformed_json(values, message):
    with pytest.raises(TaskError, match=message):
        Task.from_dict(values)


# ---- texts to write

WRITE = Task(name="w", kind="generation", template=("Say: {a}",), label="y")


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (" Hello. ", ("Hello.",)),
        (["Hello.", "Hi."], ("Hello.", "Hi.")),
        (42, ("42",)),
        (None, "the answer is empty"),
        (float("nan"), "the answer is empty"),
        ("\t", "the answer is empty"),
        ([], "the list of answers is empty"),
        (["Hi.", ""], "the answer is empty"),
        ({"b": 1}, "an answer is a text, not a dict"),
    ],
)
def test_answers_to_write(value, target):
    if isinstance(target, str):
        with pytest.raises(DataError, match=f"task 'w': {target}"):
            WRITE.encode({"a": "x", "y": value})
    else:
        assert WRITE.encode({"a": "x", "y": value}) == Example(texts=(("Say: x",),), target=target)


def test_lists_in_a_prompt_are_joined():
    assert WRITE.encode({"a": ["x | y", "z"]}).texts == (("Say: x | y && z",),)
    assert WRITE.encode({"a": [["x", "y", 3], ["z"]]}).texts == (("Say: x | y | 3 && z",),)
    with pytest.raises(DataError, match="column 'text' holds a list"):
        SENTIMENT.encode({"text": ["x"]})


def test_a_task_that_writes_survives_json_and_other_tasks_say_nothing_of_formats():
    chat = Task(name="w", kind="generation", template=("a",), label="y", format="chat", system="Be brief.")
    for task in (WRITE, chat):
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    assert (WRITE.format, WRITE.metric, WRITE.to_dict()["format"]) == ("plain", "perplexity", "plain")
    assert not {"format", "system"} & SENTIMENT.to_dict().keys()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(format="chatt"), "no format 'chatt'.*Did you mean 'chat'"),
        (dict(system="Be brief."), "only a chat has a system message"),
        (dict(template=("{a} {|}",)), "a prompt to write from has no slots"),
        (dict(template=("a", "b")), "the prompt of a generation has one part"),
        (dict(labels=("a", "b")), "generation has no label names"),
        (dict(metric="accuracy"), "does not judge generation.*perplexity, bleu"),
        (dict(template=("y",)), "both text and label"),
        (dict(kind="classification", labels=("a", "b"), format="chat"), "only generation has a format"),
    ],
)
def test_malformed_tasks_that_write(fields, words):
    with pytest.raises(TaskError, match=words):
        Task(**{**dict(name="w", kind="generation", template=("a",), label="y"), **fields})
