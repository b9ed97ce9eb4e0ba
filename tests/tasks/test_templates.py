import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitune.errors import DataError, TaskError
from multitune.tasks import Template

ROW = {"premise": "It rains.", "question": "cause", "n": 3}


@pytest.mark.parametrize(
    ("parts", "columns", "texts"),
    [
        (("premise",), ("premise",), ("It rains.",)),
        (("premise", "question"), ("premise", "question"), ("It rains.", "cause")),
        (
            ("{premise} What was the {question}?",),
            ("premise", "question"),
            ("It rains. What was the cause?",),
        ),
        (("{n}: {premise}", "{premise}"), ("n", "premise"), ("3: It rains.", "It rains.")),
        (("{{{question}}}",), ("question",), ("{cause}",)),
        (("a {{literal}} brace",), (), ("a {literal} brace",)),
        ("premise", ("premise",), ("It rains.",)),
    ],
)
def test_render(parts, columns, texts):
    template = Template(parts)
    assert template.columns == columns
    assert template.render(ROW) == texts


def test_a_bare_part_names_its_column_even_with_a_dot():
    assert Template(("a.b",)).render({"a.b": "x"}) == ("x",)


def test_texts_in_place_of_a_mapping():
    assert Template(("Review: {text}",)).render("good") == ("Review: good",)
    assert Template(("text", "again: {text}")).render("good") == ("good", "again: good")
    assert Template(("premise", "so: {hypothesis}")).render(["a", "b"]) == ("a", "so: b")
    assert Template(("text",)).render(("a",)) == ("a",)


@pytest.mark.parametrize(
    ("parts", "row", "message"),
    [
        (("premise", "hypothesis"), "one text", "'premise', 'hypothesis'"),
        (("{a} {b}",), ["one text"], "Give a mapping such as"),
        (("a", "b"), ["one"], "length 1, but the template has 2"),
        (("a",), 5, "not int"),
        (("a",), [1], "not list"),
    ],
)
def test_texts_that_do_not_fit(parts, row, message):
    with pytest.raises(DataError, match=message):
        Template(parts).render(row)


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(
        DataError,
        match=r"no column 'premis'; the row has 'premise', 'question', 'n'\. Did you mean 'premise'",
    ):
        Template(("premis",)).render(ROW)


@pytest.mark.parametrize("value", [None, float("nan"), ["a", "list"], {"a": 1}, b"bytes"])
def test_a_value_that_is_no_text(value):
    with pytest.raises(DataError, match="column 'a'"):
        Template(("a",)).render({"a": value})


@pytest.mark.parametrize(
    "part", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{a", "a}", "", "{a.__class__}", 3]
)
def test_a_part_that_is_no_plain_format(part):
    with pytest.raises(TaskError):
        Template((part,))


@pytest.mark.parametrize("parts", [(), ("a", "b", "c")])
def test_one_or_two_parts(parts):
    with pytest.raises(TaskError, match="one or two parts"):
        Template(parts)


def test_it_is_a_value():
    template = Template(["a", "b"])
    assert template == Template(("a", "b"))
    assert hash(template) == hash(Template(("a", "b")))
    assert pickle.loads(pickle.dumps(template)) == template


@given(st.text(), st.text(), st.text())
def test_text_goes_through_unchanged(before, value, after):
    def escape(text):
        return text.replace("{", "{{").replace("}", "}}")

    template = Template((escape(before) + "{column}" + escape(after),))
    assert template.render({"column": value}) == (before + value + after,)
