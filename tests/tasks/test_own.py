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
