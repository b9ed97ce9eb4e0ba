import csv
import json
import math
import os
import subprocess
import sys

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitune.errors import DataError
from multitune.tasks import list_splits, read_table

ROWS = [{"text": "x, y", "label": 1}, {"text": "z\nnext", "label": 0}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- every kind of source


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", 'text,label\n"x, y",1\n"z\nnext",0\n'),
        ("d.CSV", 'text,label\r\n"x, y",1\r\n\r\n"z\nnext",0'),
        ("bom.csv", '\ufefftext,label\n"x, y",1\n"z\nnext",0\n'),
        ("d.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("bom.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, ROWS))),
        ("d.json", json.dumps(ROWS, indent=2)),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
    ],
)
def test_text_files(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert read_table(path).to_list() == ROWS
    assert read_table(str(path), split="train").to_list() == ROWS


def test_parquet_keeps_class_labels_and_ignores_folder_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    folder = tmp_path / "year=2024"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS, features=features).to_parquet(folder / "d.parquet")
    table = read_table(folder / "d.parquet")
    assert table.features == features
    assert table.to_list() == ROWS


def test_memory():
    table = datasets.Dataset.from_list(ROWS)
    assert read_table(table) is table
    assert read_table(ROWS).to_list() == ROWS
    both = datasets.DatasetDict(train=table, test=table.select([0]))
    assert read_table(both, split="test").to_list() == ROWS[:1]
    assert list_splits(both) == ("train", "test")


def test_columns_that_a_row_lacks_are_none():
    assert read_table([{"a": 1}, {"b": "x"}]).to_list() == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


def test_a_folder_has_a_file_per_split(tmp_path):
    for name in ("validation.csv", "train.csv", "extra.jsonl"):
        write(tmp_path / name, "a\nx\n" if name.endswith("csv") else '{"a": "x"}\n')
    write(tmp_path / "README.md", "no table")
    assert list_splits(tmp_path) == ("train", "validation", "extra")
    assert read_table(tmp_path, split="extra").to_list() == [{"a": "x"}]
    with pytest.raises(DataError, match="several splits: train, validation, extra. Choose one: split='train'"):
        read_table(tmp_path)
    with pytest.raises(
        DataError, match=r"no split 'valid'; it has train, validation, extra\. Did you mean 'validation'"
    ):
        read_table(tmp_path, split="valid")


def test_a_folder_with_one_file_needs_no_split(tmp_path):
    write(tmp_path / "train.csv", "a\nx\n")
    assert read_table(tmp_path).to_list() == [{"a": "x"}]


def test_nothing_is_written_to_the_home_folder(tmp_path):
    path = write(tmp_path / "train.csv", "text,label\n" + "\n".join(f"t{i},{i % 2}" for i in range(20)))
    home = tmp_path / "home"
    home.mkdir()
    code = f"from multitune.tasks import read_table, split_table; split_table(read_table({str(path)!r}), 0.5, 0)"
    run(code, HOME=str(home), HF_HOME=str(home / "hf"))
    assert list(home.rglob("*")) == []


def run(code, **environment):
    """Run code in an interpreter of its own; gives its standard output."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- columns of text files


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-2", "0"], [1, -2, 0]),
        (["1", "", "3"], [1, None, 3]),
        (["1", "2.5", "-1e3"], [1.0, 2.5, -1000.0]),
        (["0.5", "", ".5"], [0.5, None, 0.5]),
        (["007", "8"], ["007", "8"]),
        (["00.5", "1.5"], ["00.5", "1.5"]),
        (["1234567890123456789", "1"], ["1234567890123456789", "1"]),
        (["1", "NA"], ["1", "NA"]),
        (["nan", "nan"], ["nan", "nan"]),
        (["True", "False"], ["True", "False"]),
        (["2024-01-01", "2024-01-02"], ["2024-01-01", "2024-01-02"]),
        (["x", ""], ["x", ""]),
        (["", ""], ["", ""]),
    ],
)
def test_types_of_a_column(tmp_path, cells, values):
    path = write(tmp_path / "d.csv", "n,a\n" + "".join(f"row,{cell}\n" for cell in cells))
    assert list(read_table(path)["a"]) == values


def test_nan_among_numbers_is_a_number(tmp_path):
    one, two = read_table(write(tmp_path / "d.csv", "n,a\nrow,1.5\nrow,NaN\n"))["a"]
    assert one == 1.5
    assert math.isnan(two)


def test_quotation_marks_are_text_in_tsv(tmp_path):
    path = write(tmp_path / "d.tsv", 'text\tlabel\n"Well\t1\nhe said "no"\t0\n')
    assert list(read_table(path)["text"]) == ['"Well', 'he said "no"']


def test_long_cells_and_the_setting_of_the_process(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path / "d.csv", f"text,label\n{'x' * 200_000},1\n")
    assert len(read_table(path)["text"][0]) == 200_000
    assert csv.field_size_limit() == before


def test_the_nameless_index_of_a_csv_file_gets_a_name(tmp_path):
    assert read_table(write(tmp_path / "d.csv", ",text\n0,x\n")).column_names == ["column_1", "text"]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1).map("t".__add__)


@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
def test_csv_text_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "d.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("a", "b"), *rows])
    assert [tuple(row.values()) for row in read_table(path)] == rows


# ---- errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "", "d.csv is empty"),
        ("d.csv", "\n\n", "d.csv is empty"),
        ("d.csv", "text,label\n", "d.csv holds no rows"),
        ("d.csv", "\ntext,label\nx,1\n", "line 1: no header"),
        ("d.csv", "text,label\nx,1\ny\n", r"line 3: 1 cells, but the header names 2 columns \(text, label\)"),
        ("d.csv", 'text,label\n"x\n1",1\na,b,c\n', "line 4: 3 cells"),
        ("d.csv", 'text,label\n"x,1\ny,2\n', "line 3: unexpected end of data"),
        ("d.csv", "text,text\nx,1\n", "two columns are named 'text'"),
        (
            "d.csv",
            "good,1\nbad,0\n",
            r"'good, 1' looks like data. Put a header above it, such as 'text,label'",
        ),
        ("d.csv", "text;label\nx;1\n", r"separated by ';'. Separate them by ','"),
        ("d.tsv", "text,label\nx,1\n", r"separated by ','"),
        (
            "d.csv",
            b"text,label\nx,1\ncaf\xe9,0\n",
            r"line 3: not UTF-8 \(byte 0xe9\); it may be WINDOWS-1252.*iconv",
        ),
        ("d.csv", "text,label\nx,1\n".encode("utf-16"), r"line 1: not UTF-8.*UTF-16"),
        ("d.jsonl", '{"a": 1}\n{"a": \n', "line 2, column 7: no valid JSON"),
        ("d.jsonl", '{"a": 1}\n[1]\n', "line 2: each line is an object"),
        ("d.json", '[{"a": 1},\n{"a" 2}]', "line 2, column 6: no valid JSON"),
        ("d.json", "[1, 2]", "row 1 is a int, not a mapping"),
        ("d.json", "[]", "holds no rows"),
        ("d.jsonl", "{}\n", "rows without columns"),
        ("d.jsonl", '{"a": 1}\n{"a": "x"}\n', "column 'a' holds a number in row 1 and a str in row 2"),
        ("d.jsonl", '{"a": [1]}\n{"a": ["x"]}\n', "cannot be made a table"),
        ("d.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("d.xlsx", b"PK", "ends in none of .csv, .tsv, .jsonl, .json, .parquet"),
        ("d.jsonlines", b"{}", "Did you mean '.jsonl'"),
        ("d.pkl", b"\x80\x04N.", "ends in none of"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_table(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_sources_that_cannot_be_found(tmp_path):
    write(tmp_path / "train.csv", "a\nx\n")
    with pytest.raises(DataError, match=r"no file or folder '.*trian.csv'. Did you mean 'train.csv'"):
        read_table(tmp_path / "trian.csv")
    with pytest.raises(DataError, match="holds train.csv"):
        read_table(tmp_path / "zzz")
    with pytest.raises(DataError, match="There is no folder"):
        read_table(tmp_path / "zzz" / "yyy" / "train.csv")
    with pytest.raises(DataError, match="no file or folder 'glue'"):
        read_table("glue")
    with pytest.raises(DataError, match="no file or folder '../x/y'"):
        read_table("../x/y")
    with pytest.raises(DataError, match="from a int"):
        read_table(3)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="holds no table; it holds nothing"):
        read_table(tmp_path)
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(DataError, match=r"it holds notes.txt. Name its files after their splits: train.csv"):
        read_table(tmp_path)
    write(tmp_path / "train.csv", "a\nx\n")
    write(tmp_path / "train.jsonl", '{"a": 1}')
    with pytest.raises(DataError, match="holds train.csv and train.jsonl; keep one"):
        read_table(tmp_path)


def test_lists_that_cannot_be_read():
    with pytest.raises(DataError, match="the list holds no rows"):
        read_table([])
    with pytest.raises(DataError, match="row 2 is a str"):
        read_table([{"a": 1}, "x"])
    with pytest.raises(DataError, match="the list has no split 'test'; it has train"):
        read_table([{"a": 1}], split="test")


def test_a_split_is_honoured_or_refused():
    table = datasets.Dataset.from_dict({"a": [1]}, split="validation")
    assert read_table(table, split="validation") is table
    with pytest.raises(DataError, match="no split 'train'; it has validation"):
        read_table(table, split="train")


@pytest.mark.parametrize("source", ["owner/name", "owner/name:config", "name:config"])
def test_a_hub_that_cannot_be_reached(source, tmp_path):
    code = f"""
from multitune.tasks import read_table
try:
    read_table({source!r})
except ValueError as error:
    print(type(error).__name__, error)
"""
    said = run(code, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path))
    assert said.startswith(f"DataError {source.split(':')[0]!r} is no local file or folder, and the data set could not")
    assert "save the table as a .csv, .jsonl or .parquet file and give its path" in said


def test_an_ending_that_files_share_makes_no_name_near(tmp_path):
    (tmp_path / "score.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match=r"no file or folder '.*nosuch.csv'\. Folder '.*' holds score\.csv"):
        read_table(tmp_path / "nosuch.csv")
    with pytest.raises(DataError, match=r"Did you mean 'score\.csv'"):
        read_table(tmp_path / "scores.tsv")
