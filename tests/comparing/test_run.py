"""Running a comparison: every trial once, the same scores wherever it runs, and nothing lost in a kill."""

import math
import sys

import numpy as np
import pytest
import torch

import multitune as mt
from multitune import Backbone, ConfigError, DataError, compare, make_method, train, train_many
from multitune.comparing import Store, execute, memory
from multitune.comparing.execute import row_score
from multitune.comparing.run import load
from multitune.comparing.runners import make_runner
from multitune.comparing.store import FILE
from multitune.tasks import compute


def ran(recipe, folder, **how):
    """The trials that a comparison ran, and what it gave."""
    keys = []

    def watch(progress):
        if progress.record is not None and not progress.known:
            keys.append(progress.record.trial.key)

    return keys, compare(recipe, folder, watch=watch, **how)


#: Settings with which `train_many` refuses a job, and `train` takes it.
KEPT = {"count": 1, "cache_frozen": "memory"}


def test_each_trial_is_the_run_that_train_gives(recipe, tiny_folder, tmp_path):
    found = compare(recipe(methods={"lora": {"r": 2}, "full": {}, "top_layers": KEPT}, seeds=[4]), tmp_path)
    data = load(recipe()).cells[0].draws[0].data
    for record in found.records:
        trial, outcome = record.trial, record.outcome
        alone = train(
            Backbone.load(tiny_folder),
            data,
            make_method(trial.method, trial.settings),
            progress=False,
            **trial.training,
        )
        assert outcome.score == alone.best_metric
        assert list(outcome.history) == alone.history
        assert (outcome.parameters, outcome.head_parameters) == (alone.num_method_parameters, alone.num_head_parameters)
        assert outcome.file_bytes == 4 * sum(t.numel() for t in alone.adapter.params.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_scores_of_the_rows_add_up_to_the_score(recipe, tmp_path, method):
    (record,) = compare(recipe(methods=[method], seeds=1), tmp_path).records
    rows = record.outcome.row_scores
    assert len(rows) == len(load(recipe()).cells[0].draws[0].data.validation)
    assert math.isclose(sum(rows) / len(rows), record.outcome.score, rel_tol=1e-12)


def test_a_multiple_choice_of_ones_own_is_the_run_that_train_gives(recipe, causes, tiny_folder, tmp_path):
    own = {"text": "premise", "label": "answer", "choices": ["first", "second"]}
    (record,) = compare(recipe(tasks=[{"data": str(causes), **own}], methods=["bitfit"], seeds=[4]), tmp_path).records
    data = mt.load_table(causes, **own)
    config = {**record.trial.training, "progress": False}
    alone = train(Backbone.load(str(tiny_folder)), data, make_method("bitfit"), **config)
    assert (data.task.kind, record.outcome.metric, record.outcome.error) == ("multiple_choice", "accuracy", None)
    assert record.outcome.score == alone.best_metric and list(record.outcome.history) == alone.history
    assert record.trial.data["choices"] == ["first", "second"]


def test_errors_count_negative_and_rows_of_numbers_have_squared_errors(recipe, tmp_path):
    rows = tmp_path / "numbers.csv"
    rows.write_text(
        "text,grade\n" + "".join(f"good film {'very ' * (i % 4)},{i % 4 / 2}\n" for i in range(40)), "utf-8"
    )
    task = {"data": str(rows), "label": "grade", "kind": "regression", "metric": "mse"}
    (record,) = compare(recipe(tasks=[task], methods=["bitfit"], seeds=1), tmp_path / "out").records
    outcome = record.outcome
    assert outcome.metric == "mse" and outcome.score == -outcome.scores["mse"] < 0
    assert math.isclose(sum(outcome.row_scores) / len(outcome.row_scores), outcome.score, rel_tol=1e-4)


@pytest.mark.parametrize("max_jobs", [1, 2])
def test_mixed_precision_makes_other_trials_and_judges_rows_as_it_does_the_score(recipe, tmp_path, max_jobs):
    rows = tmp_path / "numbers.csv"
    lines = [f"good film {'very ' * (i % 4)},{i % 4 / 2}" for i in range(40)]
    rows.write_text("\n".join(["text,grade", *lines]), "utf-8")
    task = {"data": str(rows), "label": "grade", "kind": "regression", "metric": "mse"}

    def ran_in(precision):
        training = {"max_steps": 3, "learning_rate": 0.01, "precision": precision}
        given = recipe(tasks=[task], methods=["lora", "prompt", "full"], seeds=1, training=training)
        return compare(given, tmp_path / "out", max_jobs=max_jobs).records

    for rounded, exact in zip(ran_in("bf16"), ran_in("fp32"), strict=True):
        assert rounded.trial.key != exact.trial.key and rounded.outcome.score != exact.outcome.score
        assert {r.outcome.together for r in (rounded, exact)} == {1 if rounded.trial.method == "full" else max_jobs}
        judged = rounded.outcome.row_scores
        assert math.isclose(sum(judged) / len(judged), rounded.outcome.score, rel_tol=1e-6)


def test_a_row_is_right_wrong_or_so_far_off(tasks):
    assert row_score(tasks["classification"], 2, 2) == 1.0
    assert row_score(tasks["classification"], 2, 1) == 0.0
    assert row_score(tasks["multilabel"], (1, 0, 1, 0), (1, 0, 1, 0)) == 1.0
    assert row_score(tasks["multilabel"], (1, 0, 1, 1), (1, 0, 1, 0)) == 0.0
    assert row_score(tasks["regression"], 2.5, 4.0) == -2.25
    assert row_score(tasks["tagging"], (0, 1, 1, 0), (0, 1, 0, 0)) == 0.75
    draw = np.random.default_rng(0)
    p, t = draw.integers(3, size=(2, 50)).tolist()
    mean = sum(row_score(tasks["classification"], a, b) for a, b in zip(p, t, strict=True)) / 50
    assert math.isclose(mean, compute("accuracy", p, t, tasks["classification"].labels)["accuracy"])


def test_a_second_call_runs_nothing_and_a_larger_recipe_only_what_is_new(recipe, tmp_path, contents):
    first, before = ran(recipe(), tmp_path)
    again, after = ran(recipe(), tmp_path)
    assert len(first) == 6 and again == []
    assert after.records == before.records  # times and all
    more, _ = ran(recipe(seeds=3), tmp_path)
    assert len(more) == 3
    assert len(Store(tmp_path / FILE).records()) == 9


def test_what_is_in_the_store_is_what_was_returned(recipe, tmp_path):
    found = compare(recipe(), tmp_path)
    assert Store(tmp_path / FILE).records() == list(found.records)
    assert recipe().to_dict() == type(recipe()).read(tmp_path / "recipe.yaml").to_dict()


def test_trials_that_share_passes_come_to_the_same_up_to_rounding(recipe, tmp_path):
    given = recipe(methods={"lora": {"r": [2, 4]}, "bitfit": {}, "full": {}}, seeds=1)
    alone = compare(given, tmp_path / "alone").records
    together = compare(given, tmp_path / "together", max_jobs=3).records
    for a, b in zip(alone, together, strict=True):
        assert a.trial.key == b.trial.key
        assert math.isclose(a.outcome.scores["loss"], b.outcome.scores["loss"], rel_tol=1e-3)
        assert a.outcome.together == 1 and a.outcome.processor_seconds > 0
        by_itself = b.trial.method == "full"
        assert b.outcome.together == (1 if by_itself else 3)
        assert (b.outcome.processor_seconds is not None) == (b.outcome.peak_memory is not None) == by_itself


def test_how_passes_are_shared_is_what_was_asked_for(recipe, tmp_path, monkeypatch):
    given, seen = recipe(methods={"lora": {}, "bitfit": {}}, seeds=1), []

    def watched(*args, **settings):
        seen.append({name: settings[name] for name in ("max_jobs", "token_budget", "passes")})
        return train_many(*args, **settings)

    monkeypatch.setattr(execute, "train_many", watched)
    scores = {
        number: [r.outcome.score for r in compare(given, tmp_path / str(number), max_jobs=2, **how).records]
        for number, how in enumerate(({}, {"passes": 2, "token_budget": 64}))
    }
    assert seen == [
        {"max_jobs": 2, "token_budget": 512, "passes": None},
        {"max_jobs": 2, "token_budget": 64, "passes": 2},
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_trial_that_diverges_fails_alone_and_is_not_run_again(recipe, tmp_path):
    given = recipe(methods={"lora": {"learning_rate": [0.01, 1e30]}}, seeds=1, training={"max_steps": 6})
    keys, found = ran(given, tmp_path)
    good, bad = found.records
    assert good.outcome.status == "finished" and good.outcome.score is not None
    assert bad.outcome.status == "failed" and "lower learning_rate" in bad.outcome.error and bad.outcome.score is None
    assert bad.trial.key not in bad.outcome.error
    assert found.failed == [bad] and len(keys) == 2
    assert ran(given, tmp_path)[0] == []


# ------------------------------------------------------------------- search

GRID = {
    "lora": {"r": [1, 2, 4], "learning_rate": [1e-3, 1e-2, 1e-1]},
    "bitfit": {"learning_rate": [1e-3, 1e-2]},
    "head": {},
}


def test_a_search_gives_every_method_its_trials_and_its_best_setting_all_seeds(recipe, tmp_path):
    pytest.importorskip("optuna", reason="the extra [compare] is not installed")
    keys, found = ran(recipe(methods=GRID, search={"trials": 4}, seeds=[2, 5]), tmp_path)
    by_method = {name: [r for r in found.searched if r.trial.method == name] for name in GRID}
    assert {name: len(of) for name, of in by_method.items()} == {"lora": 4, "bitfit": 2, "head": 0}
    assert {r.trial.seed for r in found.searched} == {2}
    for name, of in by_method.items():
        finals = [r for r in found.records if r.trial.method == name]
        assert [r.trial.seed for r in finals] == [2, 5] and len({r.trial.group for r in finals}) == 1
        if of:
            best = max(r.outcome.score for r in of)
            assert finals[0].trial.key in [r.trial.key for r in of if r.outcome.score == best]
    assert len(keys) == len(set(keys)) == 4 + 2 + 1 + 1 + 2  # the best of a search has its first seed already


def test_a_search_goes_on_to_the_trials_it_would_have_run(recipe, tmp_path, contents):
    pytest.importorskip("optuna", reason="the extra [compare] is not installed")
    given = recipe(methods=GRID, search={"trials": 4}, seeds=1)
    whole = compare(given, tmp_path / "whole")

    class Halt(KeyboardInterrupt):
        pass

    for stop in (2, 2, 1):

        def watch(progress, stop=stop, count=[0]):  # noqa: B006  # counts within one call
            if progress.record is not None and not progress.known:
                count[0] += 1
                if count[0] % stop == 0:
                    raise Halt

        with pytest.raises(Halt):
            compare(given, tmp_path / "halted", watch=watch)
    found = compare(given, tmp_path / "halted")
    assert contents(found.records) == contents(whole.records)
    assert contents(Store(tmp_path / "halted" / FILE).records()) == contents(Store(tmp_path / "whole" / FILE).records())


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"runner": "proceses"}, "no runner is called 'proceses'.* Did you mean 'processes'"),
        ({"runner": "packed", "workers": 4}, "packed runs in one process"),
        ({"runner": "processes", "max_jobs": 4}, "only the runner 'packed'"),
        ({"workers": 0}, "workers=0 is not possible"),
        ({"max_jobs": 0}, "max_jobs=0 is not possible"),
        ({"token_budget": 0}, "token_budget=0 is not possible"),
        ({"token_budget": 64}, "token_budget=64 is for trials that share passes"),
        ({"token_budget": 64, "max_jobs": 1}, "give max_jobs above 1 too"),
        ({"token_budget": 64, "runner": "processes"}, "token_budget=64: only the runner 'packed'"),
        ({"passes": 0, "max_jobs": 2}, "passes=0 is not possible"),
        ({"passes": 2}, "passes=2 is for trials that share passes; give max_jobs above 1 too"),
        ({"passes": 2, "runner": "ray"}, "passes=2: only the runner 'packed'"),
    ],
)
def test_what_a_runner_cannot_do_is_refused(recipe, tmp_path, how, message):
    with pytest.raises(ConfigError, match=message):
        compare(recipe(), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_a_missing_ray_is_refused_with_the_line_that_installs_it(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'multitune\[ray\]'"):
        make_runner("ray", bert, "minilm", workers=None, max_jobs=None, token_budget=None, passes=None)


def test_a_store_that_is_none_is_refused_before_anything_runs(recipe, tmp_path):
    (tmp_path / FILE).write_text("no database\n" * 100)
    with pytest.raises(DataError, match="cannot be read as a store"):
        compare(recipe(), tmp_path)


def test_a_folder_that_is_a_file_is_refused_before_anything_runs(recipe, tmp_path):
    (tmp_path / "notes").write_text("of mine", "utf-8")
    with pytest.raises(DataError, match="notes is a file; give a folder"):
        compare(recipe(), tmp_path / "notes")


def test_head_only_counts_no_parameters_and_the_store_has_what_was_returned(values, tmp_path):
    found = mt.compare(values(methods=["head"], seeds=1), tmp_path)
    assert found.records[0].outcome.parameters == 0
    assert Store(tmp_path / FILE).records() == list(found.records)


def test_peak_memory_begins_anew_with_every_trial():
    cpu = torch.device("cpu")
    if not memory.reset_peak(cpu):
        pytest.skip("this system does not let a process reset its peak")
    before = memory.peak(cpu)
    large = torch.ones(50_000_000)
    with_it = memory.peak(cpu)
    assert with_it - before >= large.nbytes * 0.9
    del large
    assert memory.peak(cpu) > with_it - 2**20  # the kernel counts pages in batches
    memory.reset_peak(cpu)
    assert memory.peak(cpu) < with_it - 100_000_000
