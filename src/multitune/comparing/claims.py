"""Claims of papers, judged by runs: our figure with its interval, and a verdict.

A claim is read as parts, each decided by one kind of result (`parts`). Scores of suites are compared as the paired
difference of official scores with Student's interval over seeds, averaged over tasks; both methods are on the same
backbone, and each backbone that was run is judged by itself. Rows of benchmarks are compared in the same way. Times of
serving are compared as ratios, with Student's interval over the shapes of batches; each machine is judged by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from multitune.comparing.evidence import Row, pairs_of
from multitune.comparing.gathering import backbone_names, summarise, that_count, weights_of
from multitune.comparing.overhead import OverheadRow
from multitune.comparing.papers import CLAIMS, Claim
from multitune.comparing.parts import (
    COLLECTIONS,
    MARGIN,
    MOST,
    NEGLIGIBLE,
    AnyPart,
    Part,
    Size,
    Stored,
    Timed,
    Untested,
)
from multitune.comparing.records import Record
from multitune.comparing.statistics import Estimate, estimate, mean_over_tasks
from multitune.comparing.summary import Candidate, Summary
from multitune.comparing.wording import count, interval, listed, points, ratio
from multitune.yaml_file import read_yaml

Verdict = Literal["holds here", "does not hold here", "cannot be told here", "cannot be tested here", "not run yet"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the runs say about one part."""

    part: AnyPart
    runs: str
    """The suite or benchmark that decides."""
    verdict: Verdict
    ours: str
    """Our figure, or what is missing."""
    command: str = ""
    """What makes the runs and judges them; none where no run can."""


def judge(
    records: Sequence[Record],
    claim: Claim,
    *,
    overhead: Sequence[OverheadRow] = (),
    results: Mapping[str, Sequence[Row]] | None = None,
) -> list[Finding]:
    """What runs say about a claim, for every suite, part and backbone.

    Args:
        records: of comparisons.
        overhead: measured times of serving.
        results: rows of benchmarks, see `read_results`.
    """
    found: list[Finding] = []
    for suite in dict.fromkeys(s for part in claim.parts for s in _suites(part, claim)):
        for part in claim.parts:
            if isinstance(part, (Part, Size)) and suite in _suites(part, claim):
                found += _on_suite(records, part, suite)
    for part in claim.parts:
        if isinstance(part, Timed):
            found += _timed(overhead, part)
        elif isinstance(part, Stored):
            found += _stored((results or {}).get(part.store, ()), part)
        elif isinstance(part, Untested):
            found.append(Finding(part=part, runs="", verdict="cannot be tested here", ours=part.reason))
    return found


def _suites(part: AnyPart, claim: Claim) -> tuple[str, ...]:
    return part.suites or claim.suites if isinstance(part, (Part, Size)) else ()


# ------------------------------------------------------------------------ comparisons


def _on_suite(records: Sequence[Record], part: Part | Size, suite: str) -> Iterator[Finding]:
    """A finding for each backbone that has runs of the two methods, or one that says that there is none."""
    of_suite = [r for r in records if r.trial.task.startswith(f"{COLLECTIONS[suite]}/")]
    # what a search lost counts as failed, and a search that is not through as nothing
    counted = that_count(of_suite) if any(r.purpose == "final" for r in of_suite) else []
    names = backbone_names(counted)
    by_backbone: dict[str, list[Record]] = {}
    for r in counted:
        if r.trial.method in (part.method, _other(part)) and _in_budget(r, part):
            by_backbone.setdefault(names[weights_of(r)], []).append(r)
    # other methods or budgets have a folder of their own: a comparison's recipe and report are of what it ran last
    folder = f"compare-{suite}-{part.method}" if part.options else f"compare-{suite}"
    command = f"multitune compare {suite}{part.options} --out {folder} && multitune claims {folder}"
    for backbone, of in sorted(by_backbone.items()) or [("", [])]:
        verdict, ours = _on_backbone(backbone, of, part, suite)
        yield Finding(part=part, runs=suite, verdict=verdict, ours=ours, command=command)


def _other(part: Part | Size) -> str:
    return part.other if isinstance(part, Part) else "full"


def _in_budget(record: Record, part: Part | Size) -> bool:
    return not isinstance(part, Part) or part.budget is None or record.budget == part.budget


def _on_backbone(backbone: str, records: Sequence[Record], part: Part | Size, suite: str) -> tuple[Verdict, str]:
    summary = summarise(records)
    one, other = (_best(summary, name) for name in (part.method, _other(part)))
    if one is None or other is None:
        lacking = [name for name, c in ((part.method, one), (_other(part), other)) if c is None]
        return _lacking(summary, lacking, backbone, suite)
    if isinstance(part, Size):
        return _size(one, other, part, backbone)
    paired = _paired(summary, one, other, MOST if part.relation == "most of" else 1.0)
    if paired is None:
        return "cannot be told here", "the two have no two seeds in common on some task, so no interval"
    mine, theirs, difference = paired
    said = [_in_points(part, mine, theirs, difference), _how_many(summary, suite), f"{difference.n} seeds", backbone]
    for c in (one, other):
        failed = sum(len(cell.failed) for cell in c.cells.values())
        said += [f"{failed} run{'s' if failed > 1 else ''} of {c.name} failed"] if failed else []
    return _verdict(part, difference), ", ".join(said)


def _best(summary: Summary, method: str) -> Candidate | None:
    """The candidate of a method with the highest mean: several settings compete on both sides."""
    return next((c for c in summary.complete if c.method == method), None)


def _lacking(summary: Summary, methods: Sequence[str], backbone: str, suite: str) -> tuple[Verdict, str]:
    """Why methods have no mean: runs are missing, or on some task all failed, which running again does not mend."""
    for c in summary.candidates:
        for task, cell in c.cells.items():
            if c.method in methods and cell.failed and not cell.finished:
                return "cannot be told here", f"every run of {c.name} on {task} failed, {backbone}"
    where = f"every task of {suite} that was run on {backbone}" if summary.tasks else f"any task of {suite}"
    return "not run yet", f"no score of {listed(methods, most=2)} on {where}"


def _how_many(summary: Summary, suite: str) -> str:
    """On how many tasks a difference stands, and of how many where it is part of a suite."""
    run, all_of_it = {r.trial.task for r in summary.records}, _tasks_of(suite)
    if not all_of_it <= run:
        return f"{len(run)} of {len(all_of_it | run)} tasks"
    return f"{len(summary.tasks)} tasks"


@cache
def _tasks_of(suite: str) -> frozenset[str]:
    """The tasks of a suite; read without what a recipe needs, which takes seconds to load."""
    file = Path(str(resources.files("multitune.comparing"))) / "suites" / f"{suite}.yaml"
    entries = read_yaml(file, "suite")["tasks"]
    return frozenset(entry if isinstance(entry, str) else entry["task"] for entry in entries)


def _paired(summary: Summary, one: Candidate, other: Candidate, factor: float) -> tuple[float, float, Estimate] | None:
    """Both means and the paired difference of official scores, the other's times `factor`, on the units that both have;
    none where a task lacks two of them.
    """
    of_tasks = []
    for task in summary.tasks:
        left, right = one.cells[task].scores, other.cells[task].scores
        of_tasks.append([(left[unit], right[unit]) for unit in left if unit in right])
    if any(len(pairs) < 2 for pairs in of_tasks):
        return None
    mine, theirs = _means(of_tasks)
    return mine, theirs, mean_over_tasks([estimate([a - factor * b for a, b in pairs]) for pairs in of_tasks])


def _means(of_tasks: Collection[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Means of both sides over the tasks, each with the same weight."""
    one, other = (math.fsum(math.fsum(p[i] for p in of) / len(of) for of in of_tasks) for i in (0, 1))
    return one / len(of_tasks), other / len(of_tasks)


def _size(one: Candidate, full: Candidate, part: Size, backbone: str) -> tuple[Verdict, str]:
    mine, whole = one.mean("parameters"), full.mean("parameters")
    if mine is None or not whole:
        return "cannot be told here", f"no number of parameters on {backbone}"
    ours = f"{count(mine)} of {count(whole)}, {mine / whole:.3%}, {backbone}"
    if mine / whole < part.most:
        return "holds here", ours
    if whole < part.paper_size:
        return "cannot be tested here", f"{ours}, which is smaller than the paper's: the share shrinks with the width"
    return "does not hold here", ours


# ------------------------------------------------------------------------ benchmarks


def _stored(rows: Sequence[Row], part: Stored) -> Iterator[Finding]:
    """A finding for every group of rows that are alike."""
    command = f"{part.command} && multitune claims --results benchmarks/results"
    groups = pairs_of(rows, part)
    if not groups:
        ours = f"no rows of {part.one.title} and {part.other.title}"
        yield Finding(part=part, runs=part.store, verdict="not run yet", ours=ours, command=command)
    factor = MOST if part.relation == "most of" else 1.0
    for alike, by_task in groups:
        difference = mean_over_tasks([estimate([a - factor * b for a, b in of]) for of in by_task.values()])
        ours = _in_points(part, *_means(by_task.values()), difference)
        ours += f", {listed(list(by_task), most=4)}" if any(by_task) else ""
        ours += f", {difference.n} seed{'s' if difference.n > 1 else ''}, {alike}"
        yield Finding(part=part, runs=part.store, verdict=_verdict(part, difference), ours=ours, command=command)


def _timed(rows: Sequence[OverheadRow], part: Timed) -> Iterator[Finding]:
    """A finding for every backbone that was timed, in every place where it was."""
    command = "python benchmarks/overhead.py && multitune claims --overhead benchmarks/results/overhead.jsonl"
    places = {row.place for row in rows}
    for backbone, place in sorted({(row.backbone, row.place) for row in rows}) or [("", "")]:
        here = [row for row in rows if (row.backbone, row.place) == (backbone, place)]
        mine, bound = _ratios(here, part.method, part.form), None
        if part.other is not None:
            bound = _ratios(here, *part.other)
        shapes = sorted(mine) if bound is None else sorted(set(mine) & set(bound))
        verdict, ours = _by_time([mine[s] for s in shapes], None if bound is None else [bound[s] for s in shapes])
        ours = ", ".join(said for said in (ours, backbone, place if len(places) > 1 else "") if said)
        yield Finding(part=part, runs="overhead", verdict=verdict, ours=ours, command=command)


def _ratios(rows: Sequence[OverheadRow], method: str, form: str) -> dict[tuple[int, int], float]:
    """Ratios of a method by rows and length; of several settings those that were timed most."""
    by_settings: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        if (row.method, row.form) == (method, form):
            by_settings.setdefault(repr(sorted(row.settings.items())), {})[row.rows, row.length] = row.ratio
    return max(by_settings.values(), key=len, default={})


def _by_time(mine: Sequence[float], others: Sequence[float] | None) -> tuple[Verdict, str]:
    if not mine:
        return "not run yet", "no times of it"
    bounds = others if others is not None else [1.0] * len(mine)
    over = estimate([math.log(a / b) for a, b in zip(mine, bounds, strict=True)])
    said = f"{ratio(_geometric(mine))} the bare backbone's time"
    said += "" if others is None else f" against {ratio(_geometric(others))}"
    if over.interval is None:
        return "cannot be told here", f"{said}, one shape of batch"
    low, high = (math.exp(end) for end in over.interval)
    limit = 1.0 if others is not None else 1.0 + NEGLIGIBLE
    said += f" ({low:.2f} to {high:.2f} times it), {len(mine)} shapes of batches"
    return ("holds here" if high < limit else "does not hold here" if low > limit else "cannot be told here"), said


def _geometric(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


# ------------------------------------------------------------------------ verdicts


def _in_points(part: Part | Stored, one: float, other: float, difference: Estimate) -> str:
    named = f"above {MOST:.0%} of it by" if part.relation == "most of" else "difference"
    return f"{points(one)} against {points(other)}; {named} {points(difference.mean)} ({interval(difference.interval)})"


def _verdict(part: Part | Stored, difference: Estimate) -> Verdict:
    if difference.interval is None:
        return "cannot be told here"
    low, high = difference.interval
    least = -MARGIN if part.relation == "on par" else 0.0
    if low > least:
        return "holds here"
    return "does not hold here" if high < least else "cannot be told here"


# ------------------------------------------------------------------------ as a document


def as_markdown(
    records: Sequence[Record],
    *,
    overhead: Sequence[OverheadRow] = (),
    results: Mapping[str, Sequence[Row]] | None = None,
) -> str:
    """All claims with what these runs say, for between the markers of a document."""
    parts = []
    for claim in CLAIMS:
        parts.append(f"### {claim.number}. {claim.statement}")
        parts.append(f"{claim.source}. The paper's figure: {claim.figure}.")
        findings = judge(records, claim, overhead=overhead, results=results)
        lines = ["| runs | read as | ours: points or times, 95 % interval | verdict |", "|---|---|---|---|"]
        lines += [f"| {f.runs} | {f.part.words} | {f.ours} | **{f.verdict}** |" for f in findings]
        commands = dict.fromkeys(f.command for f in findings if f.command)
        parts += ["\n".join(lines), "\n".join(f"- `{c}`" for c in commands)]
    return "\n\n".join(parts)
