"""Which runs belong together, and which numbers follow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml
from invented import ENVIRONMENT, comparison, failed, record

from multitune.comparing.gathering import summarise
from multitune.comparing.overhead import OverheadRow
from multitune.comparing.recipe import Recipe
from multitune.comparing.records import Record
from multitune.comparing.report.content import how_to_read
from multitune.comparing.report.rerun import recipes_of
from multitune.comparing.summary import paired_runs
from multitune.comparing.trials import Plan


def test_settings_that_differ_within_a_task_tell_candidates_apart():
    records = [record("lora", task, s, settings={"r": r, "alpha": 16}) for task in "ab" for s in (0, 1) for r in (4, 8)]
    assert {c.name for c in summarise(records).candidates} == {"lora, r=4", "lora, r=8"}


def test_settings_that_a_search_chose_for_each_task_do_not():
    rates = {"a": 1e-3, "b": 3e-3}
    records = [record("lora", t, s, training={"learning_rate": rate}) for t, rate in rates.items() for s in (0, 1)]
    (candidate,) = summarise(records).candidates
    assert candidate.name == "lora" and candidate.overall.n == 2


def test_a_setting_that_came_later_is_named_as_it_was_before():
    records = [record("lora", seed=s, training=t) for s in (0, 1) for t in ({}, {"packing": True})]
    assert {c.name for c in summarise(records).candidates} == {"lora, packing=false", "lora, packing=true"}


def test_budgets_and_backbones_stand_in_the_name():
    records = [record("lora", budget=b, backbone=m) for b in ("0.1%", None) for m in ("minilm", "roberta")]
    names = {c.name for c in summarise(records).candidates}
    assert names == {f"lora{b} on {m}" for b in (", 0.1%", "") for m in ("minilm", "roberta")}


def test_weights_that_changed_under_a_name_are_a_backbone_of_their_own():
    one = [record("lora", seed=s, score=0.5 + 0.01 * s) for s in (0, 1)]
    other = [replace(r, trial=replace(r.trial, backbone_fingerprint="f00dcafe")) for r in one]
    found = {c.name: c for c in summarise([*one, *other]).candidates}
    assert set(found) == {"lora on minilm (weights beef)", "lora on minilm (weights f00dca)"}
    assert {c.overall.n for c in found.values()} == {2} and {c.backbone for c in found.values()} == {"minilm"}
    assert [c.name for c in summarise(one).candidates] == ["lora"]
    elsewhere = summarise([*one, *other, record("lora", backbone="small")])
    assert {c.name for c in elsewhere.candidates} == {*found, "lora on small"}


def test_few_rows_are_tasks_of_their_own_and_draws_are_what_is_counted():
    records = [
        record("lora", "t", seed, 0.5 + 0.1 * draw + 0.01 * seed, data={"per_class": n, "subset_seed": draw})
        for n in (16, 64)
        for draw in (0, 1, 2)
        for seed in (0, 1)
    ]
    summary = summarise(records)
    assert summary.tasks == ("t, 16 per class", "t, 64 per class")
    score = summary.candidates[0].cells["t, 16 per class"].score
    assert score.n == 3 and score.mean == pytest.approx(0.605) and score.sd == pytest.approx(0.1)


def test_rows_that_changed_are_not_averaged_with_the_old_ones():
    summary = summarise([record(data={"fingerprint": f}, score=s) for f, s in (("aaaaaaa", 0.5), ("bbbbbbb", 0.9))])
    assert len(summary.tasks) == 2 and all("rows" in task for task in summary.tasks)


def test_a_candidate_without_a_score_on_some_task_has_no_mean_and_no_rank():
    records = [record("lora", "a"), record("lora", "b"), record("bitfit", "a"), failed("bitfit", "b")]
    summary = summarise(records)
    assert [c.name for c in summary.complete] == ["lora"] and summary.candidates[1].overall is None
    assert set(summary.rank) == {"lora"}


def test_a_score_that_is_not_a_number_is_a_failed_run():
    cell = summarise([record(score=float("nan")), record(seed=1, score=0.7)]).candidates[0].cells["glue/rte"]
    assert (len(cell.finished), len(cell.failed), cell.score.mean) == (1, 1, 0.7)


def test_times_of_runs_that_shared_their_process_or_ran_elsewhere_are_left_out():
    other = {**ENVIRONMENT, "machine": "another"}
    records = [record("lora"), record("ia3"), record("bitfit", together=4), record("head", environment=other)]
    seconds = summarise(records).seconds
    assert seconds == {"lora": 30.0, "ia3": 30.0, "bitfit": None, "head": None}


def test_runs_of_the_search_count_only_where_there_is_nothing_else():
    search = record(score=0.9, purpose="search", training={"epochs": 1})
    assert summarise([search]).only_search
    both = summarise([search, record(score=0.7)])
    assert not both.only_search and both.num_search == 1 and both.candidates[0].overall.mean == 0.7


def test_runs_are_paired_by_seed_and_row_whatever_their_order():
    rows = {("lora", s): np.arange(6) % (s + 2) == 0 for s in (0, 1)} | {
        ("bitfit", s): np.arange(6) % (s + 3) == 0 for s in (0, 1, 2)
    }
    records = [record(m, seed=s, row_scores=tuple(map(float, r))) for (m, s), r in reversed(rows.items())]
    cells = {c.name: c.cells["glue/rte"] for c in summarise(records).candidates}
    expected = [rows["lora", s].astype(float) - rows["bitfit", s] for s in (0, 1)]
    np.testing.assert_array_equal(paired_runs(cells["lora"], cells["bitfit"]), expected)


@pytest.mark.parametrize("rows", [(-0.5, -2.0), (0.5, 3.0), None, ()])
def test_what_is_no_share_of_right_rows_is_compared_by_its_main_score(rows):
    records = [
        record(m, seed=s, score=0.5 + 0.1 * s * (m == "lora"), row_scores=rows) for m in ("lora", "ia3") for s in (0, 1)
    ]
    one, other = (c.cells["glue/rte"] for c in summarise(records).candidates)
    np.testing.assert_allclose(paired_runs(one, other), [[0.0], [0.1]])


def test_the_letters_follow_the_tests():
    summary = summarise(comparison({"lora": (0.2, 100), "ia3": (0.2, 90), "head": (0.0, 1)}, {"a": 0.5, "b": 0.6}))
    assert summary.letters["lora"] == summary.letters["ia3"] == "a" and summary.letters["head"] == "b"
    assert all(p >= d.p for d, p in summary.differences.values())


def test_the_order_of_records_changes_nothing():
    records = comparison({"lora": (0.2, 100), "ia3": (0.1, 90)}, {"a": 0.5, "b": 0.6}, num_rows=30)
    one, other = summarise(records), summarise(records[::-1])
    assert [c.overall for c in one.candidates] == [c.overall for c in other.candidates]
    assert one.differences == other.differences and one.letters == other.letters


def test_overhead_is_the_mean_over_shapes_that_every_method_has():
    def row(method, length, ratio, **more):
        values = {"form": "alone", "rows": 1, "length": length, "milliseconds": 1.0, "rounds": 5}
        return OverheadRow(method=method, ratio=ratio, **{**values, **more})

    overhead = [row("lora", 16, 1.1), row("lora", 64, 1.2), row("ia3", 16, 1.05), row("ia3", 64, 1.05)]
    overhead += [row("lora", 128, 9.0), row("lora", 16, 2.0, form="mixed"), row("lora", 16, 5.0, backbone="other")]
    found = {c.name: c for c in summarise([record("lora"), record("ia3"), record("head")], overhead).candidates}
    assert found["lora"].overhead_alone == pytest.approx((1.1 * 1.2) ** 0.5)
    assert (found["lora"].overhead_mixed, found["ia3"].overhead_mixed) == (2.0, None)
    assert found["head"].overhead_alone is None


def test_a_report_says_that_steps_were_chosen_by_the_rows_of_the_scores():
    assert any("keeps the step that was best on these very rows" in said for said in how_to_read(summarise([record()])))


def test_a_report_says_which_runs_others_have_and_a_candidate_lacks():
    whole = [record(m, t, s) for m in ("lora", "ia3", "head") for t in "ab" for s in (0, 1, 2)]

    def said(records):
        return [s for s in how_to_read(summarise(records)) if "every run that others have" in s]

    assert said(whole) == []
    lost = [failed(r.trial.method, r.trial.task, r.trial.seed) if r.trial.seed == 1 else r for r in whole]
    assert said(lost) == []  # a run that failed was made
    (one,) = said(whole[:-1])
    assert "1 run is not there, of head (1)." in one
    (some,) = said([r for r in whole if (r.trial.method, r.trial.task) != ("ia3", "b")][:-2])
    assert "5 runs are not there, of head (2) and ia3 (3)." in some
    (nothing_found,) = ([r for r in whole if r.trial.method != "head"] + [failed("head", t) for t in "ab"],)
    assert said(nothing_found) == []


def test_times_of_serving_are_of_one_place():
    def row(method, length, ratio, threads):
        return OverheadRow(method=method, form="alone", rows=1, length=length, ratio=ratio, milliseconds=1.0, rounds=5,
                           environment={"machine": "m", "threads": threads, "device": "cpu"})  # fmt: skip

    overhead = [row(m, n, 1.5, 2) for m in ("lora", "ia3") for n in (16, 64)] + [row("lora", 16, 9.0, 1)]
    summary = summarise([record("lora"), record("ia3")], overhead)
    assert [c.overhead_alone for c in summary.candidates] == pytest.approx([1.5, 1.5])
    assert any("several places; Alone and Mixed are of m, threads 2, cpu." in said for said in how_to_read(summary))


def test_a_search_that_found_nothing_stands_among_the_failed_runs():
    lost = [failed("lora", task, settings={"r": r}, purpose="search") for task in ("a", "b") for r in (4, 8)]
    found = [record("lora", "b", settings={"r": 4}), record("ia3", "a"), record("ia3", "b")]
    going = [record("vera", "a", purpose="search"), failed("vera", "a", purpose="search", settings={"r": 2})]
    summary = summarise([*lost, *going, *found])
    assert set(summary.by_name) == {"lora", "ia3"} and summary.num_search == 6 and not summary.only_search
    assert [c.name for c in summary.complete] == ["ia3"]
    cells = summary.by_name["lora"].cells
    assert (len(cells["a"].failed), len(cells["b"].failed)) == (1, 0)
    assert "all of its 2 trials failed; the first: it ran out of memory" in cells["a"].failed[0].outcome.error


@pytest.mark.parametrize(
    "recipe",
    [
        {"methods": {"lora": {"r": [2, 4], "learning_rate": [1e-3, 2e-3]}, "vera": {}, "full": {}}, "seeds": [0, 3]},
        {"methods": ["lora", "ptuning_v2", "lora+bitfit", "aot_kronecker"], "budgets": ["1%", 40000], "seeds": [5]},
        {"methods": ["bitfit"], "few_shot": {"per_class": [2, 4], "subset_seeds": [1, 4]}, "seeds": 2},
        {
            "methods": {"lora": {"targets": [["query"], ["query", "value"]]}},
            "training": {"epochs": 2, "pooling": "mean"},
        },
        {
            "methods": ["bitfit"],
            "tasks": [{"task": "demo/topic", "train_rows": n, "validation_rows": 9} for n in (20, 40)],
            "seeds": 1,
        },
    ],
)
def test_the_recipe_of_a_row_gives_its_very_trials(recipe, minilm):
    tasks = ["demo/topic", {"task": "demo/intent", "train_rows": 20, "subset_seed": 2, "max_length": 32}]
    tasks = tasks[:1] if "few_shot" in recipe else tasks
    jobs = Plan(Recipe.from_dict({"name": "a", "tasks": tasks, **recipe}), minilm).finals()
    records = [Record(trial=j.trial, budget=j.budget, outcome=record().outcome) for j in jobs]
    again = set()
    for candidate in summarise(records).candidates:
        keys = set()
        for text in recipes_of(candidate):
            values = yaml.safe_load(text)
            keys |= {j.trial.key for j in Plan(Recipe.from_dict(values), minilm).finals()}
        assert keys == {r.trial.key for r in candidate.records}
        again |= keys
    assert again == {j.trial.key for j in jobs}
