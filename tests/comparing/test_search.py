"""The search: each point once, as many for every method, the same ones after a kill."""

import itertools
import sys

import pytest

pytest.importorskip("optuna", reason="the extra [compare] is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from multitune import ConfigError
from multitune.comparing.search import Search

GRID = [
    dict(zip(("r", "rate", "targets"), values, strict=True))
    for values in itertools.product((8, 2, 4, 16), (1e-2, 1e-4, 1e-3), (["query"], ["query", "value"]))
]
NAME = "0123456789abcdef0123"


def score(point):
    """Best at r=4, rate=1e-3, query and value."""
    return -abs(point["r"] - 4) - abs(point["rate"] - 1e-3) * 100 + len(point["targets"])


def search(trials=8, name=NAME, points=GRID, tell=score):
    made = Search(name, points, trials)
    seen = []
    while not made.finished:
        seen.append(made.propose())
        made.tell(tell(seen[-1]))
    return made, seen


@settings(max_examples=20, deadline=None)
@given(st.integers(1, len(GRID)), st.integers(0, 2**32 - 1))
def test_as_many_points_as_asked_for_and_none_twice(trials, seed):
    made, seen = search(trials, f"{seed:08x}")
    assert len(seen) == trials
    assert all(seen.count(point) == 1 and point in GRID for point in seen)
    assert made.best() == max(seen, key=lambda p: (score(p), -GRID.index(p)))


def test_the_same_scores_lead_to_the_same_points():
    assert search()[1] == search()[1]
    assert search()[1] != search(name="fedcba98")[1]


def test_scores_decide_what_comes_next():
    _, seen = search(16)
    _, other = search(16, tell=lambda point: -score(point))
    assert seen[:5] == other[:5]  # drawn at random
    assert seen[5:] != other[5:]


def test_scores_lead_to_better_points_than_chance():
    later = [score(p) for n in range(12) for p in search(16, f"{n:08x}")[1][5:12]]
    assert sum(later) / len(later) > sum(map(score, GRID)) / len(GRID)


def test_a_small_grid_is_tried_whole_in_its_order():
    assert search(50, points=GRID[:5])[1] == GRID[:5]
    assert search(5, points=GRID[:5])[1] == GRID[:5]


def test_a_point_that_failed_is_not_the_best():
    made, seen = search(6, tell=lambda point: None if point["targets"] == ["query", "value"] else score(point))
    assert len(seen) == 6
    assert made.best() in [p for p in seen if p["targets"] == ["query"]]
    made, _ = search(6, tell=lambda point: None)
    assert made.best() is None


def test_of_equal_scores_the_first_of_the_grid_wins():
    made, seen = search(6, tell=lambda point: 1.0)
    assert made.best() == min(seen, key=GRID.index)


def test_points_with_settings_of_their_own_are_searched_too():
    points = [{"rate": 0.1, "r": 4}, {"rate": 0.1, "r": 9, "extra": 1}, {"rate": 0.2, "r": 4}, {"rate": 0.3, "r": 2}]
    _, seen = search(3, points=points, tell=lambda point: point["rate"])
    assert len(seen) == 3 and all(p in points for p in seen)


def test_without_optuna_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'multitune\[compare\]'"):
        Search(NAME, GRID, 3)
    assert Search(NAME, GRID[:3], 3).propose() == GRID[0]  # nothing to sample, nothing needed
