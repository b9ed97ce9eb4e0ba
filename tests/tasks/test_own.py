"""A user's own rows as a task with rows to learn from and rows to judge by."""

from pathlib import Path

import pytest

from multitune import ConfigError, DataError, Task, load_table, read_table
from multitune.tasks import split_table

ROWS = [{"text": f"Row {i}.", "label": "yes" if i % 2 else "no"} for i in range(20)]


def csv(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.write_text("\n".join(["text,label", *(f"{r['text']},{r['label']}" for r in rows)]), "utf-8")
    return path


def test_a_tenth_is_held_out_in_equal_shares_of_every_label(tmp_path: Path) -> None:
    file = csv(tmp_path / "pairs.csv")
    data = load_table(file, seed=3)
    expected = split_table(read_table(file), 0.1, 3, label="label")
    assert [list(data.train), list(data.validation)] == [list(part) for part in expected]
    assert sorted(data.validation["label"]) == ["no", "yes"]
    assert data.task.name == "pairs" and data.task.labels == ("no", "yes")
    assert list(load_table(file, seed=4).validation) != list(data.validation)


def test_another_share_and_another_file_are_honoured(tmp_path: Path) -> None:
    file = csv(tmp_path / "pairs.csv")
    assert len(load_table(file, validation=0.5).validation) == 10
    assert list(load_table(file, validation="0.5").validation) == list(load_table(file, validation=0.5).validation)
    data = load_table(ROWS, validation=csv(tmp_path / "more.csv", ROWS[:6]))
    assert (len(data.train), len(data.validation)) == (20, 6)


def test_a_folder_brings_its_own_validation_split(tmp_path: Path) -> None:
    csv(tmp_path / "train.csv")
    csv(tmp_path / "validation.csv", ROWS[:4])
    data = load_table(tmp_path)
    assert (len(data.train), len(data.validation)) == (20, 4)
    assert len(load_table(tmp_path, validation=0.5).train) == 10


def test_columns_and_metric_are_honoured() -> None:
    rows = [{"a": r["text"], "b": "x", "c": r["label"]} for r in ROWS]
    task = load_table(rows, text="a", text_pair="b", label="c", metric="macro_f1", name="mine").task
    assert (task.template.parts, task.label, task.metric, task.name) == (("a", "b"), "c", "macro_f1", "mine")


def test_a_task_made_by_hand_reads_the_rows() -> None:
    task = Task(name="t", kind="multiple_choice", template="text", choices=("a", "b"), label="answer")
    rows = [{"text": "Why?", "a": "So.", "b": "Not.", "answer": i % 2} for i in range(6)]
    data = load_table(rows, task=task, validation=0.5)
    assert data.task is task and len(data.train) == len(data.validation) == 3
    with pytest.raises(ConfigError, match="already says label"):
        load_table(rows, task=task, label="answer")


@pytest.mark.parametrize("share", [0, 1, 1.5])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(DataError, match="fraction to hold out is between 0 and 1"):
        load_table(ROWS, validation=share)


# ---- texts to write


def test_a_table_of_texts_to_write(tmp_path):
    file = tmp_path / "facts.csv"
    file.write_text("id,data,answer\n" + "".join(f"{i},name[{i}],It is {i}.\n" for i in range(20)), "utf-8")
    data = load_table(file, kind="generation", format="auto")
    assert data.task == Task(name="facts", kind="generation", template=("data",), label="answer", format="auto")
    assert (len(data.train), len(data.validation)) == (18, 2)
    stated = load_table(file, text="Describe {data}.", label="answer", kind="generation", metric="bleu")
    assert stated.task.encode(stated.train[0]).texts == (("Describe name[0].",),)
    assert stated.task.metric == "bleu"


@pytest.mark.parametrize(
    ("row", "template", "label"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "{instruction}\n{input}", "output"),
        ({"context": "c", "question": "q", "answer": "a"}, "{context}\n{question}", "answer"),
        ({"dialogue": "d", "summary": "s", "topic": "t"}, "dialogue", "summary"),
        ({"prompt": "p", "completion": "c"}, "prompt", "completion"),
        ({"question": "q", "answers": ["a", "b"]}, "question", "answers"),
    ],
)
def test_conventional_columns_of_texts_to_write(row, template, label):
    task = load_table([row, row], kind="generation").task
    assert (task.template.parts, task.label) == ((template,), label)


def test_columns_of_texts_to_write_that_are_not_sure():
    with pytest.raises(DataError, match=r"which column is the answer\?.*--label"):
        load_table([{"a": "x", "b": "y"}] * 2, kind="generation")
    with pytest.raises(DataError, match=r"which column is the prompt\?.*--text"):
        load_table([{"a": "x", "b": "y", "answer": "z"}] * 2, kind="generation")
