"""Which method is recommended, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from invented import comparison, failed, record

from multitune.comparing.overhead import OverheadRow
from multitune.comparing.report import recommend

TASKS = {"a": 0.5, "b": 0.55}


def said(records, **more):
    """The recommendation and its reasons as one text."""
    advice = recommend(records, **more)
    return advice, str(advice)


def runs(method, scores, parameters=1000, **more):
    """A run for each score, with rows that give exactly it."""
    found = []
    for seed, score in enumerate(scores):
        rows = tuple(float(i < round(200 * score)) for i in range(200))
        found.append(record(method, seed=seed, score=score, parameters=parameters, row_scores=rows, **more))
    return found


def test_a_method_that_is_clearly_better_is_taken_whatever_it_costs():
    advice, text = said(comparison({"houlsby": (0.25, 900_000), "bitfit": (0.0, 50_000)}, TASKS))
    assert (advice.method, advice.tied, advice.settled) == ("houlsby", (), True)
    assert "houlsby has the highest mean score over 2 tasks" in text and "larger than chance explains" in text


def test_of_methods_within_one_error_the_smallest_is_taken():
    records = runs("houlsby", [0.80, 0.83, 0.81], 900_000) + runs("bitfit", [0.82, 0.80, 0.815], 50_000)
    advice, text = said(records)
    assert advice.method == "bitfit" and advice.tied == ("houlsby",) and not advice.settled
    assert "difference within one standard error" in text and "cannot tell the 2 methods apart" in text
    assert "50,000 parameters" in text and "the fewest of the 2" in text


def test_equal_scores_are_called_a_tie_and_few_rows_coarse():
    records = []
    for method, parameters in (("lora", 9000), ("head", 0)):
        for seed in range(2):
            records.append(record(method, seed=seed, score=1.0, parameters=parameters, row_scores=(1.0,) * 8))
    advice, text = said(records)
    assert advice.method == "head" and "head ties with lora for the highest mean score" in text
    assert "judged by only 8 rows: one row more or less is 12.5 points" in text
    assert "a table of your own: --validation 0.3" in text
    limited = [replace(r, trial=replace(r.trial, data={**r.trial.data, "validation_rows": 8})) for r in records]
    assert "judge by more than the recipe's validation_rows: 8." in said(limited)[1]
    assert "It trains no parameters beside the head" in text and "0 B" not in text
    assert "judged by only" not in said(runs("lora", [0.8, 0.82]) + runs("head", [0.7, 0.71]))[1]


def test_a_tie_in_the_test_is_not_enough_to_give_up_points():
    rng = np.random.default_rng(0)
    records = []
    for method, scores in (("houlsby", [0.72, 0.78, 0.75]), ("head", [0.70, 0.69, 0.71])):
        for seed, score in enumerate(scores):
            rows = tuple(rng.permutation(np.arange(100) < round(100 * score)).astype(float))
            records.append(
                record(method, seed=seed, score=score, parameters=0 if method == "head" else 9, row_scores=rows)
            )
    advice, _ = said(records)
    assert "head" in advice.tied and advice.method == "houlsby"


def test_a_model_of_its_own_is_the_dearest():
    records = runs("full", [0.8, 0.82], 10) + runs("houlsby", [0.8, 0.82], 900_000)
    advice, text = said(records)
    assert advice.method == "houlsby" and "share batches" in text and "cannot be folded" in text
    alone, text = said(runs("full", [0.8, 0.82]))
    assert alone.method == "full" and "every task needs a model of its own" in text


def test_what_is_cheaper_to_serve_wins_among_equals():
    def row(method, ratio):
        return OverheadRow(method=method, form="mixed", rows=1, length=16, ratio=ratio, milliseconds=1.0, rounds=3)

    records = runs("lora", [0.8, 0.82]) + runs("ia3", [0.8, 0.82])
    for ratios in ((1.3, 1.1), (1.1, 1.3)):
        advice, text = said(records, overhead=[row("lora", ratios[0]), row("ia3", ratios[1])])
        assert advice.method == ("ia3" if ratios[1] < ratios[0] else "lora") and "1.10 times" in text


def test_one_run_each_is_too_little_and_it_says_so():
    advice, text = said([record("lora", score=0.8), record("bitfit", score=0.79, parameters=5)])
    assert advice.method == "lora" and not advice.settled and advice.tied == ("bitfit",)
    assert "run at least three seeds" in text


def test_one_seed_with_rows_is_tested_and_the_seed_is_mentioned():
    _, text = said(comparison({"lora": (0.3, 10), "head": (0.0, 0)}, TASKS, num_seeds=1))
    assert "larger than chance explains" in text and "one seed only" in text


def test_one_method_has_nothing_to_be_compared_with():
    advice, text = said(runs("lora", [0.8, 0.7]))
    assert advice.method == "lora" and not advice.settled and "nothing to compare it with" in text


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([failed(), failed("ia3")], "none of the 2 runs finished"),
        ([failed()], "the only run has not finished"),
        ([record("lora", "a"), record("ia3", "b")], "none has a score on each of the 2 tasks"),
    ],
)
def test_without_scores_nothing_is_recommended(records, words):
    advice, text = said(records)
    assert advice.method is None and advice.candidate is None and words in text


def test_methods_that_lack_a_task_are_named():
    _, text = said([*comparison({"lora": (0.3, 10)}, TASKS), record("ia3", "a", settings={"size": 8})])
    assert "lack a score on some task: ia3" in text


def test_the_method_is_named_with_its_budget_and_settings():
    records = [
        record("lora", seed=s, score=0.5 + r / 20, budget="1%", settings={"r": r}) for s in (0, 1) for r in (2, 8)
    ]
    advice, _ = said(records)
    assert (advice.candidate, advice.method) == ("lora, 1%, r=8", "lora")
