"""Claims of papers, judged by the runs of a store: our figure with its interval, and a verdict.

A claim is read as differences of mean scores between two methods on one suite. The interval is Student's over seeds of
the paired difference of official scores, averaged over tasks. Both methods are on the same backbone: each that was run
is judged by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from multitune.comparing.gathering import summarise
from multitune.comparing.papers import CLAIMS, COLLECTIONS, MARGIN, MOST, Claim, Part
from multitune.comparing.records import Record
from multitune.comparing.statistics import Estimate, estimate, mean_over_tasks
from multitune.comparing.summary import Candidate, Summary
from multitune.comparing.wording import interval, listed, points

Verdict = Literal["holds here", "does not hold here", "cannot be told here", "not run yet"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the runs say about one part on one suite."""

    part: Part
    suite: str
    verdict: Verdict
    ours: str
    """Our figure, or what is missing."""
    command: str


def judge(records: Sequence[Record], claim: Claim) -> list[Finding]:
    """What these runs say about a claim, for every suite, part and backbone."""
    return [finding for suite in claim.suites for part in claim.parts for finding in _judge(records, part, suite)]


def _judge(records: Sequence[Record], part: Part, suite: str) -> list[Finding]:
    """A finding for each backbone that has runs of the two methods, or one that says that there is none."""
    by_backbone: dict[str, list[Record]] = {}
    for r in records:
        of_suite = r.trial.task.startswith(f"{COLLECTIONS[suite]}/") and r.purpose == "final"
        if of_suite and r.trial.method in (part.method, part.other):
            by_backbone.setdefault(r.trial.backbone, []).append(r)
    if not by_backbone:
        return [_on_backbone("", [], part, suite)]
    return [_on_backbone(backbone, of, part, suite) for backbone, of in sorted(by_backbone.items())]


def _on_backbone(backbone: str, records: Sequence[Record], part: Part, suite: str) -> Finding:
    command = f"multitune compare {suite} --out compare-{suite} && multitune claims compare-{suite}"
    summary = summarise(records)

    def found(verdict: Verdict, ours: str) -> Finding:
        return Finding(part=part, suite=suite, verdict=verdict, ours=ours, command=command)

    one, other = (_best(summary, name) for name in (part.method, part.other))
    lacking = [name for name, c in ((part.method, one), (part.other, other)) if c is None]
    if one is None or other is None:
        where = f"every task of {suite} that was run on {backbone}" if summary.tasks else f"any task of {suite}"
        return found("not run yet", f"no score of {listed(lacking, most=2)} on {where}")
    difference = _difference(summary, one, other, MOST if part.relation == "most of" else 1.0)
    if difference is None:
        return found("cannot be told here", "the two have no two seeds in common on some task, so no interval")
    assert one.overall is not None and other.overall is not None and difference.interval is not None
    ours = (
        f"{points(one.overall.mean)} against {points(other.overall.mean)}"
        f"{_share(one, other)}; {_named(part)} {points(difference.mean)} ({interval(difference.interval)}), "
        f"{len(summary.tasks)} task{'s' if len(summary.tasks) > 1 else ''}, {difference.n} seeds, {backbone}"
    )
    return found(_verdict(part, difference, one, other), ours)


def _best(summary: Summary, method: str) -> Candidate | None:
    """The candidate of a method with the highest mean: several settings compete on both sides."""
    return next((c for c in summary.complete if c.method == method), None)


def _difference(summary: Summary, one: Candidate, other: Candidate, factor: float) -> Estimate | None:
    """Paired difference of official scores, the other's times `factor`; none where a task lacks two common units."""
    of_tasks = []
    for task in summary.tasks:
        left, right = one.cells[task].scores, other.cells[task].scores
        of_tasks.append([left[unit] - factor * right[unit] for unit in left if unit in right])
    if any(len(values) < 2 for values in of_tasks):
        return None
    return mean_over_tasks([estimate(values) for values in of_tasks])


def _named(part: Part) -> str:
    return f"above {MOST:.0%} of it by" if part.relation == "most of" else "difference"


def _share(one: Candidate, other: Candidate) -> str:
    """Trained parameters of a method as a share of full tuning's."""
    mine, full = one.mean("parameters"), other.mean("parameters")
    return f" with {mine / full:.3%} of its parameters" if other.method == "full" and mine is not None and full else ""


def _verdict(part: Part, difference: Estimate, one: Candidate, other: Candidate) -> Verdict:
    assert difference.interval is not None
    low, high = difference.interval
    if part.most_parameters is not None:
        mine, whole = one.mean("parameters"), other.mean("parameters")
        if mine is None or not whole:
            return "cannot be told here"
        if mine / whole >= part.most_parameters:
            return "does not hold here"
    least = -MARGIN if part.relation == "on par" else 0.0
    if low > least:
        return "holds here"
    return "does not hold here" if high < least else "cannot be told here"


# ------------------------------------------------------------------------ as a document


def as_markdown(records: Sequence[Record]) -> str:
    """All claims with what these runs say, for between the markers of a document."""
    parts = []
    for claim in CLAIMS:
        parts.append(f"### {claim.number}. {claim.statement}")
        parts.append(f"{claim.source}. The paper's figure: {claim.figure}.")
        if not claim.parts:
            parts.append(f"**Not run yet**: {claim.missing}.")
            continue
        findings = judge(records, claim)
        lines = ["| suite | read as | ours: points, 95 % interval | verdict |", "|---|---|---|---|"]
        lines += [f"| {f.suite} | {f.part.words} | {f.ours} | **{f.verdict}** |" for f in findings]
        parts += ["\n".join(lines), "\n".join(f"- `{c}`" for c in dict.fromkeys(f.command for f in findings))]
    return "\n\n".join(parts)
