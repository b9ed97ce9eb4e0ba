import datasets
import pytest
from datasets import ClassLabel, Features, List, Value

from multitune.errors import DataError, DataWarning, TaskError
from multitune.tasks import Task, infer_task


def table(columns, **features):
    made = datasets.Dataset.from_dict(columns)
    return made.cast(Features({**made.features, **features})) if features else made


@pytest.mark.parametrize(
    ("columns", "parts", "label"),
    [
        ({"text": ["x", "y"], "label": ["b", "a"]}, ("text",), "label"),
        ({"sentence": ["x", "y"], "idx": [0, 1], "target": ["b", "a"]}, ("sentence",), "target"),
        (
            {"sentence1": ["x", "y"], "sentence2": ["p", "q"], "label": ["b", "a"]},
            ("sentence1", "sentence2"),
            "label",
        ),
        (
            {"premise": ["x", "y"], "hypothesis": ["p", "q"], "label": ["b", "a"]},
            ("premise", "hypothesis"),
            "label",
        ),
        ({"note": ["x", "y"], "label": ["b", "a"]}, ("note",), "label"),
        ({"text": ["x", "y"], "mood": ["b", "a"]}, ("text",), "mood"),
        ({"column_1": [0, 1], "text": ["x", "y"], "mood": ["b", "a"]}, ("text",), "mood"),
        ({"text": ["x", "y"], "author": ["p", "q"], "label": ["b", "a"]}, ("text",), "label"),
    ],
)
def test_columns_by_convention(columns, parts, label):
    task = infer_task(table(columns))
    assert task.template.parts == parts
    assert task.label == label
    assert task.labels == ("a", "b")
    assert (task.name, task.kind, task.metric) == ("task", "classification", "accuracy")


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([" b", "a", "b"], ("a", "b")),
        ([10, 9, 1], ("1", "9", "10")),
        (["10", "9", "1"], ("1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_label_names_in_order(values, labels):
    data = table({"text": ["x", "y", "z"], "label": values})
    task = infer_task(data)
    assert task.labels == labels
    assert [example.target for example in task.examples(data)] == [labels.index(str(value).strip()) for value in values]


def test_class_labels_keep_their_names_and_order():
    data = table({"text": ["x", "y"], "verdict": [0, 1]}, verdict=ClassLabel(names=["yes", "no", "never seen"]))
    task = infer_task(data, name="mine")
    assert (task.name, task.label, task.labels) == ("mine", "verdict", ("yes", "no", "never seen"))


def test_kind_by_the_type_of_the_label():
    words = [["a", "b"], ["c"]]
    assert infer_task(table({"text": ["x", "y"], "score": [0.5, 1.0]})).kind == "regression"
    tagging = infer_task(table({"tokens": words, "ner_tags": [["O", "B-x"], ["O"]]}))
    assert (tagging.kind, tagging.labels, tagging.metric) == ("tagging", ("B-x", "O"), "tag_f1")
    multilabel = infer_task(table({"text": ["x", "y"], "labels": [["b", "a"], []]}))
    assert (multilabel.kind, multilabel.labels) == ("multilabel", ("a", "b"))
    tags = List(ClassLabel(names=["O", "B-x"]))
    assert infer_task(table({"tokens": words, "tags": [[0, 1], [0]]}, tags=tags)).labels == ("O", "B-x")


def test_a_given_kind_is_taken():
    data = table({"text": ["x", "y"], "label": ["a|b", "b"], "score": [1, 2], "grade": [1.0, 2.0]})
    multilabel = infer_task(data, label="label", kind="multilabel")
    assert (multilabel.kind, multilabel.labels) == ("multilabel", ("a", "b"))
    assert infer_task(data, label="score", kind="regression").kind == "regression"
    assert infer_task(data, label="score", kind="classification").labels == ("1", "2")
    assert infer_task(data, label="grade", kind="classification").labels == ("1", "2")


def test_given_columns_and_templates_are_taken():
    data = table({"title": ["x", "y"], "body": ["p", "q"], "label": ["a", "b"]})
    assert infer_task(data, text="body").template.parts == ("body",)
    assert infer_task(data, text="title", text_pair="body").template.parts == ("title", "body")
    assert infer_task(data, text="{title}: {body}").template.columns == ("title", "body")


def test_of_columns_without_usual_names_the_label_is_the_one_that_repeats_itself():
    rows = range(40)
    notes = [f"note {i // 2}" if i > 30 else f"note {i}" for i in rows]
    data = table({"id": [*rows], "note": notes, "dept": [["body", "paint", "brakes"][i % 3] for i in rows]})
    found = infer_task(data)
    assert (found.label, found.template.columns, found.labels) == ("dept", ("note",), ("body", "brakes", "paint"))


def test_two_columns_that_repeat_themselves_are_asked_about():
    rows = range(40)
    data = table(
        {"note": [f"note {i}" for i in rows], "dept": ["ab"[i % 2] for i in rows], "city": ["xy"[i % 2] for i in rows]}
    )
    with pytest.raises(DataError, match=r"which column is the label.*Set --label"):
        infer_task(data)


def test_a_text_that_is_given_is_not_the_label():
    data = table({"sentiment": ["x", "y"], "label": ["a", "b"]})
    assert infer_task(data, text="sentiment").label == "label"


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (
            {"text": ["x"], "sentence": ["y"], "label": ["a"]},
            {},
            r"'text', 'sentence' all may hold it\. Set --text",
        ),
        (
            {"first": ["x"], "second": ["y"], "label": ["a"]},
            {},
            r"which column is the text.*Set --text.*--text-pair",
        ),
        ({"n": [1], "label": ["a"]}, {}, "none of them is sure to hold it"),
        (
            {"text": ["x"], "label": ["a"], "score": [1.0]},
            {},
            r"'label', 'score' all may hold it\. Set --label",
        ),
        ({"text": ["x"], "id": [1]}, {}, r"which column is the label.*Set --label"),
        ({"text": ["x"], "label": ["a"]}, {"text": "txet"}, r"no column 'txet'.*Did you mean 'text'.*--text"),
        (
            {"text": ["x"], "label": ["a"]},
            {"label": "lable"},
            r"no column 'lable'.*Did you mean 'label'.*--label",
        ),
        ({"text": ["x"], "label": ["a"]}, {"text_pair": "text"}, "Set --text"),
        ({"text": ["x", "y"], "label": ["a", "a"]}, {}, "every row has the label 'a'"),
        ({"text": ["x", "y"], "label": ["a", None]}, {}, "row 2: the label in column 'label' is empty"),
        ({"text": ["x", "y"], "label": ["", "a"]}, {}, "row 1: the label in column 'label' is empty"),
        ({"text": ["x", "y"], "score": [1, 2]}, {}, r"2 different whole numbers.*Set --kind"),
        ({"text": ["x"] * 101, "label": list(range(101))}, {}, r"101 different whole numbers.*Set --kind"),
        (
            {"text": ["x", "y"], "label": [0.5, 1.5]},
            {"kind": "classification"},
            "row 1: a label is a name or a whole",
        ),
        ({"text": ["x", "y"], "label": ["a", "b"]}, {"kind": "tagging"}, "row 1: tagging needs a list"),
    ],
)
def test_what_cannot_be_told(columns, given, message):
    with pytest.raises(DataError, match=message):
        infer_task(table(columns), **given)


def test_a_text_taken_for_the_label():
    columns = {
        "text": [f"text {i}" for i in range(150)],
        "label": [f"note {i}" for i in range(150)],
        "mood": ["good", "bad", "fair"] * 50,
        "id": list(range(150)),
    }
    with pytest.raises(
        DataError,
        match=r"150 different values in 150 rows.*Did you mean 'mood' \(3 values\)\? Set --label mood",
    ):
        infer_task(table(columns))
    columns.pop("mood")
    with pytest.raises(DataError, match="No other column looks like one"):
        infer_task(table(columns), label="label")


def test_labels_of_one_row_each_are_taken_and_said_to_look_like_texts():
    columns = {"text": [f"text {i}" for i in range(30)], "label": [f"note {i}" for i in range(30)]}
    words = "30 different values in 30 rows.*If a model is to write such texts, set --kind generation"
    with pytest.warns(DataWarning, match=words):
        assert len(infer_task(table(columns)).labels) == 30
    few = {column: values[:19] for column, values in columns.items()}
    assert len(infer_task(table(few)).labels) == 19  # warnings are errors here


def test_whole_numbers_that_hardly_recur_are_asked_about():
    rows = {"text": [f"x {i}" for i in range(40)], "price": [-(i // 2) if i < 20 else i for i in range(40)]}
    with pytest.raises(DataError, match="'price' holds 30 different whole numbers: classes, or an amount"):
        infer_task(table(rows), label="price")
    assert infer_task(table({**rows, "price": [i // 4 for i in range(40)]}), label="price").kind == "classification"


def test_labels_that_seem_to_be_several_in_a_cell_are_said():
    rows = {"text": ["a", "b", "c", "d", "e"], "tags": ["x", "y", "x|y", "y|z", "x|y|z"]}
    with pytest.warns(DataWarning, match=r"holds 'x\|y', 'x\|y\|z', 'y\|z', .*set --kind multilabel"):
        assert infer_task(table(rows)).kind == "classification"
    assert infer_task(table(rows), kind="multilabel").labels == ("x", "y", "z")  # and no warning
    assert len(infer_task(table({**rows, "tags": ["x|y", "x|z", "x|y", "w", "w"]})).labels) == 3


def test_a_file_whose_first_line_is_a_row_is_said():
    with pytest.warns(DataWarning, match="column 'billing' is called as one of its own labels.*text,label"):
        infer_task(table({"The card is lost.": list("abcdefghij"), "billing": ["billing", "account"] * 5}))


def test_a_column_of_spam_called_spam_beside_texts_that_are_called_so_is_no_row():
    named = {"Message": list("abcdefghij"), "spam": ["spam", "ham"] * 5}
    assert infer_task(table(named), label="spam").labels == ("ham", "spam")  # warnings are errors here


def test_all_rows_without_a_label_are_named():
    with pytest.raises(DataError, match="rows 2, 4: the label in column 'label' is empty in 2 of 5 rows"):
        infer_task(table({"text": list("abcde"), "label": ["x", "", "y", " ", "x"]}))
    assert infer_task(table({"text": list("abc"), "tags": ["x|y", "", ""]}), kind="multilabel").labels == ("x", "y")
    with pytest.raises(DataError, match="row 3: the label in column 'label' is empty"):
        infer_task(table({"text": list("abcde"), "label": ["x", "y", None, "y", "x"]}))


def test_many_labels_that_recur_are_labels():
    columns = {"text": ["x"] * 450, "label": [f"intent {i % 150}" for i in range(450)]}
    assert len(infer_task(table(columns)).labels) == 150


def test_kinds_that_cannot_be_guessed():
    data = table({"text": ["x", "y"], "label": ["a", "b"]})
    with pytest.raises(TaskError, match=r"no kind of task 'regresion'.*Did you mean 'regression'"):
        infer_task(data, kind="regresion")
    with pytest.raises(TaskError, match="choices of a multiple choice are not guessed"):
        infer_task(data, kind="multiple_choice")


def test_from_rows_and_files(tmp_path):
    rows = [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}]
    path = tmp_path / "data.csv"
    path.write_text("text,label\nx,b\ny,a\n")
    assert infer_task(rows) == infer_task(path) == infer_task(str(path))


def test_large_strings_are_texts():
    data = table({"text": ["x", "y"], "label": ["a", "b"]}, text=Value("large_string"))
    assert infer_task(data).template.parts == ("text",)


def test_label_names_that_are_given_are_taken_in_their_order():
    data = table({"text": ["x", "y", "z"], "label": ["yes", "no", "yes"]})
    task = infer_task(data, labels=("yes", "no"))
    assert task.labels == ("yes", "no")
    assert [example.target for example in task.examples(data)] == [0, 1, 0]
    ids = table({"text": ["x", "y"], "score": [1, 0]})  # amounts or classes? the names say it
    task = infer_task(ids, labels=["bad", "good"])
    assert (task.kind, [example.target for example in task.examples(ids)]) == ("classification", [1, 0])
    named = table({"text": ["x", "y"], "label": [1, 0]}, label=ClassLabel(names=["no", "yes"]))
    assert [example.target for example in infer_task(named, labels=["yes", "no"]).examples(named)] == [0, 1]
    words = table({"tokens": [["a", "b"]], "tags": [["B-x", "O"]]})
    assert infer_task(words, labels=["O", "B-x", "I-x"]).labels == ("O", "B-x", "I-x")
    with pytest.raises(
        DataError, match=r"row 2: unknown label 'no'; the labels are 'yes', 'nope'.*Did you mean 'nope'"
    ):
        infer_task(data, labels=["yes", "nope"]).examples(data)
    with pytest.raises(TaskError, match="generation has no label names"):
        infer_task(data, kind="generation", label="label", text="text", labels=["yes", "no"])
    with pytest.raises(TaskError, match="regression has no label names"):
        infer_task(ids, kind="regression", labels=["bad", "good"])


CAUSES = {"premise": ["x", "y"], "first": ["p", "q"], "second": ["r", "s"], "answer": [0, 1]}


def test_choices_that_are_given_make_a_multiple_choice():
    data = table(CAUSES)
    task = infer_task(data, choices=["first", "second"])  # the text and the answer are what is left
    expected = {"template": ("premise",), "choices": ("first", "second"), "label": "answer"}
    assert task == Task(name="task", kind="multiple_choice", **expected)
    assert [example.target for example in task.examples(data)] == [0, 1]
    task = infer_task(data, text="{premise} Why?", choices=["{first}.", "{second}."], kind="multiple_choice")
    assert task.encode(data[0]).texts == (("x Why?", "p."), ("x Why?", "r."))
    listed = table({"question": ["x"], "options": [["p", "q", "r"]], "answer": ["q"]})
    task = infer_task(listed, choices=["options"])
    assert (task.template.columns, task.choices, task.label) == (("question",), ("options",), "answer")
    assert task.examples(listed)[0].target == (1,)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"choices": ["frst", "second"]}, DataError, r"no column 'frst'.*Did you mean 'first'.*--choices"),
        ({"choices": ["first", "second"], "kind": "classification"}, TaskError, "only multiple_choice has choices"),
        ({"choices": ["first", "second"], "kind": "generation", "text": "premise"}, TaskError, "has choices, not gen"),
        (
            {"choices": ["first"], "text_pair": "second", "text": "premise"},
            TaskError,
            r'--text "\{premise\} \{second\}"',
        ),
        ({"choices": ["first", "second"], "labels": ["a", "b"]}, TaskError, "multiple_choice has no label names"),
        ({"choices": ["first", "second"], "label": "first"}, TaskError, "is both text and label"),
        ({"kind": "multiple_choice", "text": "premise", "label": "answer"}, TaskError, "set --choices"),
    ],
)
def test_choices_are_honoured_or_refused(given, error, message):
    with pytest.raises(error, match=message):
        infer_task(table(CAUSES), **given)
