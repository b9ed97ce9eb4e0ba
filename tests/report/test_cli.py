"""`multitune report`."""

from __future__ import annotations

import json

import pytest
from invented import comparison
from typer.testing import CliRunner

from multitune.cli import app
from multitune.comparing.overhead import OverheadRow
from multitune.comparing.store import FILE, Store

RECORDS = comparison({"lora": (0.2, 1000), "head": (0.0, 0)}, {"demo/topic": 0.5, "demo/intent": 0.6}, num_rows=40)


@pytest.fixture
def folder(tmp_path):
    """A folder as `multitune compare` leaves it."""
    store = Store(tmp_path / "done" / FILE)
    for record in RECORDS:
        store.add(record)
    (tmp_path / "done" / "recipe.yaml").write_text("name: the-recipe\n")
    return tmp_path / "done"


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_it_writes_the_report_beside_the_store(folder):
    result = run(folder)
    assert result.exit_code == 0, result.stderr
    assert "recommended: lora" in result.stdout and "report.html" in result.stderr
    assert "the-recipe" in (folder / "report.html").read_text()
    assert (folder / "report.csv").read_text().count("\n") == 1 + 2 * 3


@pytest.mark.parametrize(
    ("methods", "seeds", "tasks", "others"),
    [
        ("[head, lora]", 3, "[demo/topic, demo/intent]", ""),
        ("[lora]", 3, "[demo/topic, demo/intent]", "head"),
        ("[head, lora]", 2, "[demo/topic, demo/intent]", "seed 2"),
        ("[lora]", 1, "[demo/topic, demo/intent]", "head and seed 1, 2"),
        ("[head, lora]", 3, "[demo/topic]", "task demo/intent"),
    ],
)
def test_a_recipe_that_gave_only_some_of_the_runs_is_not_said_to_give_them_all(folder, methods, seeds, tasks, others):
    recipe = f"name: the-recipe\ntasks: {tasks}\nmethods: {methods}\nseeds: {seeds}\n"
    (folder / "recipe.yaml").write_text(recipe)
    result = run(folder)
    page = (folder / "report.html").read_text()
    assert ("the-recipe" in page) == ("multitune compare " + str(folder) in page) == (not others)
    assert (f"these runs are of {others} too" in result.stderr) == bool(others)


def test_a_store_its_tasks_and_the_time_of_serving_can_be_chosen(folder, tmp_path):
    row = OverheadRow(method="lora", form="alone", rows=1, length=16, ratio=1.25, milliseconds=1.0, rounds=3)
    (tmp_path / "overhead.jsonl").write_text(json.dumps(row.to_dict()) + "\n" + '{"method": "lo')
    out = ("--out", tmp_path / "else", "--title", "A heading", "--json", "--overhead", tmp_path / "overhead.jsonl")
    result = run(folder / FILE, "--task", "demo/topic", *out)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["recommendation"]["method"] == "lora" and found["html"] == str(tmp_path / "else" / "report.html")
    page = (tmp_path / "else" / "report.html").read_text()
    assert "A heading" in page and "demo/intent" not in page and "1.25" in page


def test_several_stores_are_one_report(folder, tmp_path):
    other = Store(tmp_path / "other" / FILE)
    for record in comparison({"ia3": (0.1, 500)}, {"demo/topic": 0.5, "demo/intent": 0.6}, num_rows=40):
        other.add(record)
    result = run(folder, tmp_path / "other", "--out", tmp_path / "both")
    assert result.exit_code == 0 and "ia3" in (tmp_path / "both" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dome"], "there is no dome"),
        (["."], f"holds no {FILE}"),
        (["done", "--task", "demo/topc"], "Did you mean 'demo/topic'"),
        (["done", "--overhead", "done/recipe.yaml"], "lines 1"),
    ],
)
def test_what_is_not_there_is_named(arguments, words, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    if words == "lines 1":
        (folder / "recipe.yaml").write_text('{"method": "lora"}\n{"method": "lora"}\n')
        words = "line 1: a row of overhead has or lacks form"
    result = run(*arguments)
    assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.stderr
    assert not (folder.parent / FILE).exists()


def test_an_empty_store_is_refused(tmp_path):
    Store(tmp_path / FILE)
    result = run(tmp_path)
    assert result.exit_code == 1 and "holds no finished trial yet" in result.stderr
