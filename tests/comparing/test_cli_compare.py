"""`multitune compare`: what it says before, while and after."""

import json
import math
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from multitune.cli.compare import duration, in_words
from multitune.cli.shared import app, load_command
from multitune.comparing import Recipe, Store, execute
from multitune.comparing import estimate as timing
from multitune.comparing.estimate import Cost, Spent, _each, _run, estimate
from multitune.comparing.run import load
from multitune.comparing.sources import recipe_of, suites
from multitune.comparing.store import FILE
from multitune.training import TrainConfig


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(*arguments)`: the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    load_command("compare")
    return lambda *arguments: CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def file(values, tmp_path):
    """`file(**changes)`: a recipe's file."""

    def make(**changes):
        path = tmp_path / "evening.yaml"
        path.write_text(yaml.safe_dump(values(name=None, **changes), sort_keys=False), "utf-8")
        return path

    return make


def test_a_dry_run_prints_the_trials_and_trains_nothing(run, file, tmp_path):
    result = run(file(), "--dry-run")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("6 trials; about ")
    assert [line.split()[1] for line in lines[2:-1]] == ["lora", "lora", "bitfit"] * 2
    assert not (tmp_path / "compare-evening").exists()
    told = json.loads(run(file(), "--dry-run", "--json").stdout)
    assert told["trials"] == len(told["final"]) == 6


def test_a_dry_run_says_what_it_took_for_text_and_answer(run, moods, tiny_folder):
    given = ("--backbone", tiny_folder, "--methods", "head", "--dry-run")
    result = run(moods, *given)
    assert "text from text, answer from mood" in result.stderr
    told = run(moods, *given, "--json")
    assert json.loads(told.stdout)["trials"] and "answer from mood" in told.stderr


def test_more_rows_can_be_held_out_of_a_table_and_run_again(run, moods, tiny_folder, tmp_path):
    given = ("--backbone", tiny_folder, "--methods", "head", "--seeds", "1", "--validation", "0.5")
    told = run(moods, *given, "--dry-run")
    assert "24 rows to learn from, 24 to judge by" in told.stderr and "--validation FILE before" in told.stderr
    (tmp_path / "again.yaml").write_text(run(moods, *given, "--print-recipe").stdout)
    again = run("again.yaml", "--dry-run")
    assert "24 rows to learn from, 24 to judge by" in again.stderr


def test_a_warning_of_a_table_stands_there_once(run, tiny_folder, tmp_path):
    (tmp_path / "tags.csv").write_text("text,tags\n" + "the film,a|b\na film,a\nfilm,b\n" * 8)
    given = ("--backbone", tiny_folder, "--methods", "head", "--seeds", "1", "--dry-run")
    assert run("tags.csv", *given).stderr.count("set --kind multilabel") == 1
    (tmp_path / "tags.xlsx").write_text("no table")
    assert "tags.xlsx is of a kind that is not read; save its rows as one of .csv" in run("tags.xlsx").stderr


def test_rows_to_judge_by_that_are_learnt_from_are_said_before_anything_runs(run, tiny_folder, tmp_path):
    rows = [f"film number {i % 10},{'good' if i % 2 else 'bad'}" for i in range(40)]
    (tmp_path / "doubles.csv").write_text("\n".join(["text,label", *rows]))
    given = ("--backbone", tiny_folder, "--methods", "head", "--seeds", "1", "--dry-run")
    assert "4 of the 4 rows to judge by have the texts of rows to learn from" in run("doubles.csv", *given).stderr
    (tmp_path / "single.csv").write_text("\n".join(["text,label", *rows[:11]]))  # one double at most
    assert "have the texts" not in run("single.csv", *given).stderr


def test_a_dry_run_of_a_search_says_the_most_it_can_come_to(run, file):
    result = run(file(search={"trials": 1}), "--dry-run")
    assert result.stdout.splitlines()[-1].startswith(
        "4 trials at most; about "
    )  # of lora 1 + 1, and bitfit with 2 seeds


def test_methods_and_seeds_of_the_command_line_replace_the_recipes(run, file):
    told = json.loads(run(file(), "--dry-run", "--json", "--methods", "head,lora", "--seeds", "5,").stdout)
    assert {(t["method"], t["settings"].get("r"), t["training"]["seed"]) for t in told["final"]} == {
        ("head", None, 5),
        ("lora", 2, 5),
        ("lora", 4, 5),
    }


def test_budgets_and_a_search_of_the_command_line_suit_a_table(run, moods, tiny_folder):
    pytest.importorskip("optuna", reason="the extra [compare] is not installed")
    given = ("--backbone", tiny_folder, "--methods", "lora,head", "--budgets", "500,5%", "--trials", "2")
    told = json.loads(run(moods, *given, "--seeds", "1", "--dry-run", "--json").stdout)
    lora = [t for t in told["final"] if t["method"] == "lora"]
    assert len({t["settings"]["r"] for t in lora}) == 2
    assert sorted({t["training"]["learning_rate"] for t in lora}) == [1e-3, 3e-3, 9e-3]
    assert told["trials"] == 2 * 2 * 2


def test_a_printed_recipe_is_the_one_that_runs(run, file, moods, tmp_path):
    suite = run("glue", "--print-recipe").stdout
    assert suite == suites()["glue"].read_text("utf-8")
    changed = yaml.safe_load(run("glue", "--print-recipe", "--methods", "lora", "--trials", "3").stdout)
    assert list(changed["methods"][0]["lora"]) == ["learning_rate"] and changed["search"] == {"trials": 3}
    (tmp_path / "own.yaml").write_text(run(moods, "--print-recipe", "--seeds", "2").stdout, "utf-8")
    assert Recipe.read(tmp_path / "own.yaml") == replace(recipe_of(str(moods)), seeds=(0, 1))


def test_a_budget_that_is_too_small_is_said(run, file):
    result = run(file(methods=["lora", "head"], budgets=[5]), "--dry-run")
    assert "lora is left out at 5: its smallest form has more parameters" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "three"], "--seeds takes a number"),
        (["--methods", ","], "--methods takes values"),
        (["--methods", "lora,bitfitt"], "Did you mean 'bitfit'"),
        (["--label", "mood"], "--label is for a table"),
        (["--budgets", "much"], "a budget is a share of the backbone"),
        (["--trials", "0"], "'trials' is a whole number of at least 1"),
        (["--runner", "cluster"], "no runner is called 'cluster'"),
    ],
)
def test_a_slip_is_one_line(run, file, arguments, message):
    result = run(file(), *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_ctrl_c_says_how_to_go_on(run, file, tmp_path, monkeypatch):
    train, calls = execute.train, []

    def second_time_interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*arguments, **settings)

    monkeypatch.setattr(execute, "train", second_time_interrupted)
    result = run(file(), "--out", "here")
    assert result.exit_code == 130
    assert result.stderr.strip().endswith("interrupted; 1 of 6 trials are in here; the same command goes on")
    assert len(Store(tmp_path / "here" / FILE).records()) == 1


def test_a_table_of_choices_is_read_as_the_options_say(run, causes):
    given = (causes, "--text", "premise", "--label", "answer", "--print-recipe")
    once = run(*given, "--choices", "first,second")
    (task,) = yaml.safe_load(once.stdout)["tasks"]
    assert task["choices"] == ["first", "second"] and "labels" not in task
    assert run(*given, "--choices", "first", "--choices", "second").stdout == once.stdout
    assert "--choices is for a table" in run("glue", "--choices", "first,second").stderr


def test_a_table_is_read_compared_and_reported_in_one_command(run, moods, tiny_folder, tmp_path):
    arguments = (moods, "--backbone", tiny_folder, "--methods", "head,bitfit", "--seeds", "2")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    said = result.stderr.splitlines()
    assert said[0].startswith("moods: classification, 2 labels, text from text, answer from mood; 43 rows")
    assert said[1].startswith("judged by only 5 rows: one row more or less is 20.0 points")
    assert said[-6].startswith("4 trials: 2 methods on 1 task, 2 seeds; about ")
    assert said[-5].startswith("1 of 4: moods head seed 0 accuracy ")
    assert "recommended: " in result.stdout and "report: compare-moods/report.html" in result.stdout
    assert {"report.html", "report.md", "report.csv", "recipe.yaml", FILE} <= {
        p.name for p in (tmp_path / "compare-moods").iterdir()
    }
    told = json.loads((again := run(*arguments, "--json")).stdout)
    assert "4 trials, 4 of them from earlier runs," in again.stderr
    assert [line["trials"] for line in told["results"]] == [2, 2]
    assert told["recommendation"]["method"] in ("head", "bitfit") and told["recommendation"]["reasons"]
    scores = [r.outcome.score for r in Store(tmp_path / "compare-moods" / FILE).records() if r.trial.method == "head"]
    (line,) = (line for line in told["results"] if line["method"] == "head")
    assert line["score"] == pytest.approx(sum(scores) / 2)
    assert "other comparisons" not in again.stderr
    fewer = run(moods, "--backbone", tiny_folder, "--methods", "bitfit", "--seeds", "1")
    assert "compare-moods holds 3 trials of other comparisons, which this report leaves out" in fewer.stderr
    assert "`multitune report compare-moods` writes one of all" in fewer.stderr


COST = Cost(fixed=3.0, step=0.5, batch_size=16, row=0.01)


def test_the_estimate_grows_with_the_steps(recipe):
    def seconds(steps):
        plan = load(recipe(methods=["bitfit"], training={"max_steps": steps}, seeds=1))
        return estimate(plan), _run(TrainConfig(max_steps=steps), COST, plan.cells[0].draws[0].data, 2.0)

    (timed, few), (_, many) = seconds(10), seconds(4000)
    assert 0 < timed.processor < 60 and timed.seconds > 0
    assert few >= 3 + 10 and many - few >= 2 * 0.5 * 3990
    data = load(recipe(methods=["bitfit"], seeds=1)).cells[0].draws[0].data
    small, large = (_run(TrainConfig(max_steps=100, batch_size=n), replace(COST, row=0.0), data, 1.0) for n in (8, 32))
    assert (small, large) == (3 + 25, 3 + 100)  # a step of a grid's own batch size, in proportion


def test_others_on_the_machine_lengthen_the_wall_time_and_not_the_processor_time(recipe, monkeypatch):
    plan = load(recipe(methods=["bitfit"], seeds=1, training={"max_steps": 100, "batch_size": 8}))
    first, waits = [9.0], iter([0.0, 5.0, 0.1, 0.1])  # the first run warms up; the shortest that counts waits longest

    def timed(backbone, rows, steps, judged):
        processor = 1.0 + 0.1 * steps + 0.005 * judged + (first.pop() if first else 0.0)
        return Spent(seconds=processor + next(waits), processor=processor)

    monkeypatch.setattr(timing, "_time", timed)
    found, data = estimate(plan), plan.cells[0].draws[0].data
    evaluations = math.ceil(100 / math.ceil(len(data.train) / 8))
    judged = (evaluations + 1) * len(data.validation)
    assert found.processor == pytest.approx(1.0 + 0.1 * 100 + 0.005 * judged, rel=0.05)
    assert found.is_waiting and found.seconds > 2 * found.processor


def test_an_estimate_says_how_much_of_it_is_waiting():
    assert in_words(Spent(seconds=7200, processor=7200)) == "about 2.0 hours in one process"
    assert in_words(Spent(seconds=7200, processor=14000)) == "about 2.0 hours in one process"  # two threads
    assert in_words(Spent(seconds=72000, processor=7200), 0.5) == (
        "about 10.0 hours in one process while this machine is as busy as now, 60 minutes of processor time"
    )


def test_a_setting_that_another_kind_of_task_shares_stops_no_estimate(recipe, monkeypatch):
    plan = load(recipe(methods=["head"], seeds=1, training={"max_steps": 1, "batch_size": 8, "packing": True}))
    given = []
    monkeypatch.setattr(timing, "train", lambda *_, config: given.append(config))
    assert isinstance(estimate(plan), Spent) and {config.packing for config in given} == {False}


def test_a_run_that_cannot_be_timed_stops_no_comparison(recipe, monkeypatch):
    plan = load(recipe(methods=["head"], seeds=1))

    def fails(backbone, *_, **__):
        backbone.model.train()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timing, "train", fails)
    why = in_words(estimate(plan))
    assert why == "how long is not known, for a run that would tell it failed: RuntimeError: out of memory"
    assert not plan.backbone.model.training


def test_a_longer_run_that_was_quicker_says_what_a_step_takes_at_most():
    assert _each(5.0, 2.0, 3) == 1.0
    assert _each(1.5, 2.0, 3) == 0.5


def test_times_are_said_in_words():
    assert [duration(s) for s in (0.2, 1.4, 89, 100, 5000, 7200)] == [
        "1 second", "1 second", "89 seconds", "2 minutes", "83 minutes", "2.0 hours"
    ]  # fmt: skip
