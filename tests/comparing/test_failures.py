"""Trials that fail: alone, with their reason, and again if asked; and a search of which nothing is left."""

import pytest
import torch
from typer.testing import CliRunner

import multitune.training.crew as together
from multitune import compare
from multitune.cli.shared import app, load_command
from multitune.comparing import Store, execute
from multitune.comparing.store import FILE


@pytest.fixture
def failing(monkeypatch):
    """`failing(name, of, error, module)`: every call of a function from call number `of` on raises the error."""

    def make(name, of, error, module=execute):
        own, calls = getattr(module, name), []

        def call(*arguments, **settings):
            calls.append(1)
            if len(calls) in of:
                raise error
            return own(*arguments, **settings)

        monkeypatch.setattr(module, name, call)
        return calls

    return make


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation.")


def test_a_trial_that_runs_out_of_memory_fails_alone(recipe, tmp_path, failing):
    failing("train", [2], OUT_OF_MEMORY)
    found = compare(recipe(seeds=1), tmp_path)
    good, bad, other = found.records
    assert [r.outcome.status for r in (good, bad, other)] == ["finished", "failed", "finished"]
    assert bad.outcome.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert found.failed == [bad] == [r for r in Store(tmp_path / FILE).records() if r.outcome.status == "failed"]


def test_a_trial_that_cannot_be_judged_fails_alone(recipe, tmp_path, failing):
    failing("predict_rows", [1], RuntimeError("no kernel for this"))
    bad, *good = compare(recipe(seeds=1), tmp_path).records
    assert bad.outcome.error == "judging failed: RuntimeError: no kernel for this" and bad.outcome.score is None
    assert bad.outcome.history and {r.outcome.status for r in good} == {"finished"}


def test_failed_trials_run_again_when_asked_and_only_they(recipe, tmp_path, failing, contents):
    calls = failing("train", [1, 3], OUT_OF_MEMORY)
    first = compare(recipe(seeds=1), tmp_path / "one")
    assert len(first.failed) == 2 and len(calls) == 3
    assert compare(recipe(seeds=1), tmp_path / "one").records == first.records and len(calls) == 3
    again = compare(recipe(seeds=1), tmp_path / "one", retry_failed=True)
    assert again.failed == [] and len(calls) == 5
    assert Store(tmp_path / "one" / FILE).records() == list(again.records)
    assert contents(again.records) == contents(compare(recipe(seeds=1), tmp_path / "two").records)


def test_a_later_failure_takes_nothing_from_a_finished_trial(recipe, tmp_path):
    store = Store(tmp_path / FILE)
    (record,) = compare(recipe(methods=["bitfit"], seeds=1), tmp_path).records
    outcome = execute.Outcome(status="failed", error="later", metric="accuracy")
    store.add(with_outcome(record, outcome))
    assert store.outcome(record.trial.key) == record.outcome


def with_outcome(record, outcome):
    return type(record)(trial=record.trial, outcome=outcome, purpose=record.purpose, budget=record.budget)


def test_a_shared_pass_that_fails_takes_nothing_from_its_trials(recipe, tmp_path, failing):
    failing("run_pass", [2], OUT_OF_MEMORY, module=together)
    found = compare(recipe(seeds=1), tmp_path, max_jobs=3).records
    assert {r.outcome.status for r in found} == {"finished"} and {r.outcome.together for r in found} == {3}


def test_trials_that_fail_in_company_run_one_by_one(recipe, tmp_path, failing):
    failing("run_pass", range(2, 99), OUT_OF_MEMORY, module=together)
    found = compare(recipe(seeds=1), tmp_path, max_jobs=3).records
    assert {r.outcome.status for r in found} == {"finished"} and {r.outcome.together for r in found} == {1}


def test_an_error_of_the_one_who_watches_is_not_taken_for_a_trials(recipe, tmp_path):
    def watch(progress):
        if progress.record is not None:
            raise RuntimeError("the screen is gone")

    for jobs in (1, 3):
        with pytest.raises(RuntimeError, match="the screen is gone"):
            compare(recipe(seeds=1), tmp_path / str(jobs), max_jobs=jobs, watch=watch)


# ------------------------------------------------------------------- searches of which nothing is left

DIVERGES = {"learning_rate": [1e30, 2e30]}


@pytest.fixture
def run(tmp_path, monkeypatch, recipe):
    """`run(**changes)`: the command on a recipe, and the report it wrote."""
    monkeypatch.chdir(tmp_path)
    load_command("compare")

    def make(*options, **changes):
        import yaml

        values = recipe(search={"trials": 2}, seeds=1, training={"max_steps": 4}, **changes).to_dict()
        (tmp_path / "lost.yaml").write_text(yaml.safe_dump(values), "utf-8")
        result = CliRunner().invoke(app, ["compare", "lost.yaml", "--out", "lost", *options])
        return result, (tmp_path / "lost" / "report.md").read_text("utf-8")

    return make


def test_a_method_whose_search_found_nothing_stands_in_table_and_report(run):
    result, report = run(methods={"lora": DIVERGES, "bitfit": {"learning_rate": [0.01, 0.02]}})
    assert result.exit_code == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.split()[1:2] == ["lora"])
    assert "failed" in line and "(--retry-failed runs them again)" in result.stderr
    assert "## Failed runs" in report and "all of its 2 trials failed; the first: " in report
    assert "1 of the search" not in report and "4 of the search" in report
    assert "multitune compare lost/recipe.yaml --out lost" in report


def test_a_comparison_whose_searches_all_found_nothing_is_reported_and_exits_with_one(run):
    result, report = run(methods={"lora": DIVERGES})
    assert result.exit_code == 1 and "no records" not in result.stderr
    assert "none of the 2 runs finished" in report and "## Failed runs" in report
