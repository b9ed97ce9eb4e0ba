"""The statistics of a comparison: intervals over seeds, paired tests, corrections for many tests, fronts and ranks.

Legend: S seeds (or subsets), R validation rows, K tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

LEVEL = 0.95
"""Of every interval."""
ALPHA = 0.05
"""Largest p-value, corrected, that counts as a difference."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and how well it is known."""

    mean: float
    n: int
    """Runs it is the mean of; of a mean over tasks the fewest of a task."""
    sd: float | None = None
    """Standard deviation of the runs; none of one run, and of a mean over tasks."""
    error: float | None = None
    """Standard error of the mean; none where there was one run."""
    df: float | None = None
    """Degrees of freedom of the standard error."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval; none where there was one run."""
        if self.error is None or self.df is None:
            return None
        half = float(special.stdtrit(self.df, (1 + LEVEL) / 2)) * self.error
        return self.mean - half, self.mean + half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent runs with Student's interval."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Estimate(mean=mean, n=n)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Estimate(mean=mean, n=n, sd=sd, error=sd / math.sqrt(n), df=n - 1)


def mean_over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of the means of K tasks, whose runs are independent; degrees of freedom by Welch and Satterthwaite."""
    k = len(estimates)
    mean, n = math.fsum(e.mean for e in estimates) / k, min(e.n for e in estimates)
    if k == 1:
        return estimates[0]
    if n < 2:
        return Estimate(mean=mean, n=n)
    parts = [((e.error or 0.0) ** 2 / k**2, e.df or 1.0) for e in estimates]
    error, df = _satterthwaite(parts)
    return Estimate(mean=mean, n=n, error=error, df=df)


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of a sum of independent parts given by variance and degrees of freedom, and its own."""
    total = math.fsum(v for v, _ in parts)
    below = math.fsum(v**2 / df for v, df in parts)
    return math.sqrt(total), total**2 / below if below > 0 else math.fsum(df for _, df in parts)


# ------------------------------------------------------------------------ two methods


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much one method is better than another, on the same tasks, seeds and rows."""

    mean: float
    error: float | None
    """Standard error; none where one run without row scores says nothing about it."""
    df: float | None
    p: float | None
    """Two-sided, not corrected; none where there is nothing to judge by."""


def paired_difference(tasks: Sequence[NDArray[np.float64]]) -> Difference:
    """The paired test of two methods.

    Seeds and rows are both samples, and crossed: all rows of a seed share its model, and a row is as hard in every
    seed. With `d[s, r] = mu + seed_s + row_r + error_sr` the variance of the mean over a task is

        (MS_seed + max(MS_row - MS_error, 0)) / (S R),

    the form in which Hillis (Statistics in Medicine 26, 2007, pages 596 to 619, for readers by cases) tests it, with
    Satterthwaite's degrees of freedom. One seed leaves the paired t test over rows, and no row scores (R = 1) that
    over seeds.

    Simulated with three seeds, 5 % tests of equal methods reject in 4.8 to 5.9 %. Resampling three seeds would give
    too small an error (a bootstrap's is 2/3 of the variance), and swapping them no p below 1/4.

    Args:
        tasks: for each task the differences `[S, R]`; rows in the same order for every seed.

    Returns:
        The difference of the mean over tasks.
    """
    k = len(tasks)
    mean = math.fsum(float(d.mean()) for d in tasks) / k
    parts: list[tuple[float, float]] = []
    for d in tasks:
        of_task = _variance_parts(d)
        if of_task is None:
            return Difference(mean=mean, error=None, df=None, p=None)
        parts += [(variance / k**2, df) for variance, df in of_task]
    error, df = _satterthwaite(parts)
    if error > 1e-12:
        return Difference(mean=mean, error=error, df=df, p=2 * float(special.stdtr(df, -abs(mean) / error)))
    # Every run differs by the same amount, so that there is no spread; what is left is the test of signs.
    units = sum(max(d.shape) for d in tasks)
    return Difference(mean=mean, error=0.0, df=df, p=1.0 if abs(mean) < 1e-12 else min(1.0, 2.0 ** (1 - units)))


def _variance_parts(d: NDArray[np.float64]) -> list[tuple[float, float]] | None:
    """What adds up to the variance of a task's mean difference, each with its degrees of freedom."""
    num_seeds, num_rows = d.shape
    if num_seeds == num_rows == 1:
        return None
    by_seed, by_row = d.mean(axis=1), d.mean(axis=0)
    seed = num_rows * float(by_seed.var(ddof=1)) if num_seeds > 1 else 0.0
    row = num_seeds * float(by_row.var(ddof=1)) if num_rows > 1 else 0.0
    if num_seeds > 1 and num_rows > 1:
        rest = d - by_seed[:, None] - by_row[None, :] + d.mean()
        error = float((rest**2).sum()) / ((num_seeds - 1) * (num_rows - 1))
        row = max(row - error, 0.0)
    size = d.size
    parts = [(seed / size, num_seeds - 1.0)] if num_seeds > 1 else []
    return parts + ([(row / size, num_rows - 1.0)] if num_rows > 1 else [])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979): p-values that hold for all tests."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def letters(order: Sequence[str], different: Mapping[frozenset[str], bool]) -> dict[str, str]:
    """Letters such that two names share one exactly where they do not differ (Piepho 2004, insert and absorb).

    Args:
        order: the names, best first; the best gets "a".
        different: by pair; a pair that is not there does not differ.
    """
    columns: list[set[str]] = [set(order)]
    for pair, differs in different.items():
        if not differs:
            continue
        one, other = pair
        split: list[set[str]] = []
        for column in columns:
            split += [column - {one}, column - {other}] if {one, other} <= column else [column]
        columns = []
        for column in split:  # absorb what another column holds
            if column and not any(column <= kept for kept in columns):
                columns = [kept for kept in columns if not kept <= column] + [column]
    place = {name: i for i, name in enumerate(order)}
    columns.sort(key=lambda column: sorted(place[name] for name in column))
    return {name: "".join(_letter(i) for i, column in enumerate(columns) if name in column) for name in order}


def _letter(i: int) -> str:
    """a to z, A to Z, then with a number behind."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return alphabet[i % 52] + (str(i // 52) if i >= 52 else "")


# ------------------------------------------------------------------------ many methods


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points `(cost, score)` that no other one beats, cheapest first.

    A point is beaten by one that costs at most as much and scores at least as much, and is better in one of the two.
    """
    front: list[str] = []
    best = -math.inf
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1])):
        cost, score = points[name]
        if score > best or (front and points[front[-1]] == (cost, score)):
            front.append(name)
            best = score
    return front


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """Rank of every score, 1 is the highest; equal scores share the mean of their ranks."""
    found = stats.rankdata([-score for score in scores.values()])
    return dict(zip(scores, map(float, found), strict=True))
