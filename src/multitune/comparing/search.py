"""Looking for a method's settings: Optuna over its grid, the same number of trials for every method.

The sampler's seed follows from what is searched, and proposals from the scores told so far alone. So a search that was
killed is gone through again from its first proposal, with the scores in the store, and arrives at the same trials.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from multitune.comparing.extras import require
from multitune.comparing.recipe_entries import Point

if TYPE_CHECKING:
    import optuna

#: Trials of a search that are drawn at random, before its scores guide it; half of them where there are few.
_AT_RANDOM = 5
#: Proposals that were made before are asked for again so often; then the first that is left is taken.
_PATIENCE = 20


class Search:
    """Proposes points of a grid, one after the other, each once."""

    def __init__(self, name: str, points: Sequence[Point], trials: int) -> None:
        """
        Args:
            name: seeds the sampler.
            points: the grid, in its order.
            trials: how many to propose; all of a grid that has no more, in its order.

        Raises:
            ConfigError: Optuna is not installed.
        """
        self.points = list(points)
        self.trials = min(trials, len(self.points))
        self._scores: dict[int, float | None] = {}
        self._study: optuna.Study | None = None
        if self.trials < len(self.points):
            self._study = _study(name, self.trials)
            self._distributions, self._places = _axes(self.points)
            order = np.random.default_rng(_seed(name)).permutation(len(self.points))
            self._order: list[int] = order.tolist()
        self._asked: Any = None
        self._proposed: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all trials have been told."""
        return len(self._scores) == self.trials

    def propose(self) -> Point:
        """The next point; `tell` its score before asking for another."""
        assert not self.finished and self._proposed is None
        self._proposed = len(self._scores) if self._study is None else self._ask(self._study)
        return self.points[self._proposed]

    def tell(self, score: float | None) -> None:
        """The score of the point proposed last, higher is better; none where the trial failed."""
        assert self._proposed is not None
        if self._study is not None:
            _tell(self._study, self._asked, score)
        self._scores[self._proposed] = score
        self._proposed = None

    def best(self) -> Point | None:
        """The point with the highest score, of equal ones the first of the grid; none if all failed."""
        good = {i: s for i, s in self._scores.items() if s is not None}
        return self.points[min(good, key=lambda i: (-good[i], i))] if good else None

    def _ask(self, study: optuna.Study) -> int:
        for _ in range(_PATIENCE):
            self._asked = study.ask(self._distributions)
            place = self._places.get(tuple(self._asked.params.values()))
            if place is not None and place not in self._scores:
                return place
            _tell(study, self._asked, None if place is None else self._scores[place])
        left = next(i for i in self._order if i not in self._scores)
        axes = next(axes for axes, i in self._places.items() if i == left)
        study.enqueue_trial(dict(zip(self._distributions, axes, strict=True)))
        self._asked = study.ask(self._distributions)
        return left


def _study(name: str, trials: int) -> optuna.Study:
    optuna = require("optuna", "compare", "a search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=_seed(name), n_startup_trials=min(_AT_RANDOM, max(1, trials // 2)))
    return optuna.create_study(direction="maximize", sampler=sampler)


def _tell(study: optuna.Study, asked: Any, score: float | None) -> None:
    from optuna.trial import TrialState

    if score is None:
        study.tell(asked, state=TrialState.FAIL)
    else:
        study.tell(asked, score)


def _seed(name: str) -> int:
    return int(name[:8], 16)


def _axes(points: Sequence[Point]) -> tuple[dict[str, Any], dict[tuple[Any, ...], int]]:
    """A grid as Optuna takes it, and the number of each point by its place on the axes.

    Numbers become their rank, so that the sampler knows that 8 lies between 4 and 16; anything else is a category.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    names = list(dict.fromkeys(itertools.chain.from_iterable(points)))
    values = {name: _distinct([p.get(name) for p in points]) for name in names}
    values = {name: found for name, found in values.items() if len(found) > 1}
    distributions: dict[str, Any] = {}
    for name, found in values.items():
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found):
            found.sort()
            distributions[name] = IntDistribution(0, len(found) - 1)
        else:
            distributions[name] = CategoricalDistribution(list(range(len(found))))
    places = {tuple(values[n].index(p.get(n)) for n in values): i for i, p in enumerate(points)}
    return distributions, places


def _distinct(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def best_of(searches: Mapping[str, Search]) -> dict[str, list[Point]]:
    """By name the best point of every search that found one, as a list of one."""
    return {name: [best] for name, search in searches.items() if (best := search.best()) is not None}
