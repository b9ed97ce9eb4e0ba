"""The statistics of a comparison, against scipy, slow references from the formulas, and simulated runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from multitune.comparing.statistics import (
    estimate,
    holm,
    letters,
    mean_over_tasks,
    paired_difference,
    pareto_front,
    ranks,
)

SCORES = st.lists(st.floats(-1, 1, allow_nan=False), min_size=2, max_size=8)


@pytest.mark.parametrize("values", [(0.8, 0.82), (0.61, 0.55, 0.72), (0.1, 0.9, 0.5, 0.4, 0.45)])
def test_the_interval_of_one_task_is_scipys(values):
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert estimate(values).interval == pytest.approx(tuple(expected), rel=1e-12)


def test_one_run_has_a_mean_and_no_interval():
    found = estimate([0.7])
    assert (found.mean, found.n, found.interval, found.sd) == (0.7, 1, None, None)
    assert mean_over_tasks([found, estimate([0.5, 0.6])]).interval is None


def test_a_known_interval():
    found = estimate([0.80, 0.82, 0.84])  # sd 0.02, t(0.975; 2) = 4.302653
    assert found.interval == pytest.approx((0.82 - 0.0496828, 0.82 + 0.0496828), abs=1e-6)


def test_the_interval_over_two_tasks_is_welchs():
    one, other = [0.81, 0.83, 0.9], [0.5, 0.61, 0.52, 0.58]
    welch = stats.ttest_ind(one, [-x for x in other], equal_var=False).confidence_interval(0.95)
    assert mean_over_tasks([estimate(one), estimate(other)]).interval == pytest.approx([end / 2 for end in welch])


# ------------------------------------------------------------------------ the paired test


def test_one_seed_is_scipys_paired_test_over_rows():
    rng = np.random.default_rng(0)
    one, other = rng.random(60), rng.random(60)
    assert paired_difference([(one - other)[None]]).p == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_without_rows_it_is_scipys_paired_test_over_seeds():
    one, other = np.array([0.8, 0.83, 0.79, 0.84]), np.array([0.78, 0.79, 0.8, 0.8])
    assert paired_difference([(one - other)[:, None]]).p == pytest.approx(stats.ttest_rel(one, other).pvalue)


def slow_error(d):
    """Standard error of a task's mean difference by loops over the two-way table."""
    num_seeds, num_rows = len(d), len(d[0])
    mean = sum(map(sum, d)) / (num_seeds * num_rows)
    seed = [sum(row) / num_rows for row in d]
    row = [sum(d[s][r] for s in range(num_seeds)) / num_seeds for r in range(num_rows)]
    ms_seed = num_rows * sum((x - mean) ** 2 for x in seed) / (num_seeds - 1)
    ms_row = num_seeds * sum((x - mean) ** 2 for x in row) / (num_rows - 1)
    ms_error = sum(
        (d[s][r] - seed[s] - row[r] + mean) ** 2 for s in range(num_seeds) for r in range(num_rows)
    ) / ((num_seeds - 1) * (num_rows - 1))  # fmt: skip
    return ((ms_seed + max(ms_row - ms_error, 0)) / (num_seeds * num_rows)) ** 0.5


def test_the_error_of_seeds_and_rows_equals_the_loops():
    rng = np.random.default_rng(3)
    tasks = [rng.integers(-1, 2, (3, 40)) * 1.0, rng.integers(-1, 2, (4, 25)) * 1.0]
    expected = sum(slow_error(d.tolist()) ** 2 for d in tasks) ** 0.5 / 2
    assert paired_difference(tasks).error == pytest.approx(expected)
    assert paired_difference(tasks).mean == pytest.approx((tasks[0].mean() + tasks[1].mean()) / 2)


@pytest.mark.parametrize(("seed_sd", "row_sd"), [(0.0, 0.5), (0.05, 0.5), (0.2, 0.1)])
def test_methods_that_are_equal_are_rarely_called_different(seed_sd, row_sd):
    rng, shape, wrong, bootstrap = np.random.default_rng(7), (3, 80), 0, 0
    for _ in range(1500):
        seeds, rows = rng.normal(0, seed_sd, (3, 1)), rng.normal(0, row_sd, (1, 80))
        d = seeds + rows + rng.normal(0, 0.3, shape)
        wrong += paired_difference([d]).p < 0.05
        # What a bootstrap of the seeds' means would do: too small an error, and a normal quantile.
        bootstrap += abs(d.mean()) > 1.96 * d.mean(axis=1).std(ddof=0) / 3**0.5
    # 8,000 draws gave 0.048, 0.050 and 0.059 (Satterthwaite's degrees are not exact), and here are 1,500 of them.
    assert wrong / 1500 <= 0.06 + 3 * (0.06 * 0.94 / 1500) ** 0.5
    assert bootstrap / 1500 > 0.12


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(1)
    d = 0.1 + rng.normal(0, 0.01, (3, 1)) + rng.normal(0, 0.3, (1, 300)) + rng.normal(0, 0.2, (3, 300))
    assert paired_difference([d]).p < 0.01


def test_without_spread_only_the_signs_are_left():
    assert paired_difference([np.zeros((3, 50))]).p == 1
    assert paired_difference([np.full((2, 1), 0.1)]).p == 0.5  # two seeds, both the same way
    assert paired_difference([np.ones((3, 50))]).p < 1e-9
    assert paired_difference([np.array([[0.1]])]).p is None


@given(SCORES, st.floats(0.1, 10))
def test_the_test_does_not_depend_on_the_unit_or_the_order(values, factor):
    d = np.array(values)[:, None]
    one, scaled, back = paired_difference([d]), paired_difference([d * factor]), paired_difference([-d[::-1]])
    assert scaled.mean == pytest.approx(one.mean * factor)
    assert back.mean == pytest.approx(-one.mean) and back.p == pytest.approx(one.p, abs=1e-9)


# ------------------------------------------------------------------------ many tests


def test_holms_correction_of_a_known_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=12))
def test_holm_rejects_as_the_steps_say(p_values):
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = set()
    for step, i in enumerate(order):  # the procedure as Holm wrote it down
        if p_values[i] * (len(p_values) - step) > 0.05:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(adjusted) if p <= 0.05} == rejected


NAMES = "ABCDEFG"


@settings(max_examples=150)
@given(st.sets(st.sampled_from([frozenset(pair) for pair in itertools.combinations(NAMES, 2)])))
def test_two_share_a_letter_exactly_where_they_do_not_differ(differing):
    found = letters(NAMES, {pair: True for pair in differing})
    for one, other in itertools.combinations(NAMES, 2):
        assert bool(set(found[one]) & set(found[other])) == (frozenset((one, other)) not in differing)
    assert all(found.values())


def test_the_best_has_the_first_letter():
    differ = {frozenset("AC"): True, frozenset("AB"): False, frozenset("BC"): False}
    assert letters("ABC", differ) == {"A": "a", "B": "ab", "C": "b"}


# ------------------------------------------------------------------------ fronts and ranks


@given(st.dictionaries(st.text("xyz", min_size=1), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9))
def test_the_front_is_what_nothing_beats(points):
    def beaten(mine):
        return any(cost <= mine[0] and score >= mine[1] and (cost, score) != mine for cost, score in points.values())

    front = pareto_front({name: (float(c), float(s)) for name, (c, s) in points.items()})
    assert set(front) == {name for name, point in points.items() if not beaten(point)}
    assert [points[name][0] for name in front] == sorted(points[name][0] for name in front)


def test_equal_scores_share_their_ranks():
    assert ranks({"a": 0.5, "b": 0.9, "c": 0.5, "d": 0.1}) == {"a": 2.5, "b": 1.0, "c": 2.5, "d": 4.0}
