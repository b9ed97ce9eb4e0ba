"""Which method to take, and why, in sentences; and when the runs cannot tell.

The rule is the one-standard-error rule (Breiman et al. 1984, section 3.4.3) with costs in place of the size of a tree:
among the methods whose mean lies within one standard error of the best one's, the error being that of the paired
difference to it, and that no test tells from it, the cheapest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multitune.comparing.gathering import summarise
from multitune.comparing.method_facts import MethodFacts, facts_of
from multitune.comparing.overhead import OverheadRow
from multitune.comparing.records import Record
from multitune.comparing.statistics import ALPHA, Difference
from multitune.comparing.summary import Candidate, Summary, compare
from multitune.comparing.wording import count, listed, of_bytes, points, seconds

FEW_ROWS = 100
"""Validation rows below which a task's score is called coarse."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One method to take."""

    candidate: str | None
    """The method with its budget and settings as the report calls it; none where no method has a score."""
    method: str | None
    """Its name alone."""
    reasons: tuple[str, ...]
    """Sentences, the weightiest first."""
    tied: tuple[str, ...]
    """Other candidates that the runs cannot tell from the best."""
    settled: bool
    """Whether every candidate that is not tied was shown to be worse, and there is none that is tied."""

    def __str__(self) -> str:
        return " ".join(self.reasons)


def recommend(records: Sequence[Record], *, overhead: Sequence[OverheadRow] = ()) -> Recommendation:
    """The method to take according to these runs.

    Args:
        records: those of a store; the final ones count.
        overhead: measured times of serving, which break ties and are named as reasons.
    """
    return recommend_from(summarise(records, overhead))


def recommend_from(summary: Summary) -> Recommendation:
    """`recommend` from a summary."""
    if not summary.complete:
        return Recommendation(candidate=None, method=None, reasons=(_nothing(summary),), tied=(), settled=False)
    best = summary.complete[0]
    differences = {c.name: compare(best, c, summary.tasks) for c in summary.complete[1:]}
    tied = [c for c in summary.complete[1:] if not summary.differ(best.name, c.name)]
    near = [c for c in tied if _within_one_error(differences[c.name])]
    chosen = min([best, *near], key=_cost)
    reasons = [_score_reason(summary, best, chosen, differences)]
    reasons += _certainty(summary, best, tied, differences)
    reasons += _cost_reasons(summary, chosen, [best, *near], summary.seconds.get(chosen.name))
    return Recommendation(
        candidate=chosen.name,
        method=chosen.method,
        reasons=tuple(reasons),
        tied=tuple(c.name for c in [best, *tied] if c is not chosen),
        settled=not tied and len(summary.complete) > 1,
    )


def _nothing(summary: Summary) -> str:
    if not any(cell.finished for c in summary.candidates for cell in c.cells.values()):
        number = sum(len(cell.failed) for c in summary.candidates for cell in c.cells.values())
        runs = f"none of the {number} runs" if number > 1 else "the only run has not"
        return f"No method can be recommended: {runs} finished."
    return (
        f"No method can be recommended yet: none has a score on each of the {len(summary.tasks)} tasks. Run the "
        f"missing trials, or look at some of the tasks alone."
    )


def _within_one_error(difference: Difference) -> bool:
    """Whether a candidate's mean is within one standard error of the best; without an error only if it is equal."""
    return difference.mean <= (difference.error or 0.0)


def _cost(candidate: Candidate) -> tuple[bool, float, float, bool]:
    """What a candidate costs to serve and keep, cheapest first: a model of its own weighs most."""
    facts = facts_of(candidate.method)
    parameters = candidate.mean("parameters")
    return (
        facts.mixes is False,
        float("inf") if parameters is None else parameters,
        candidate.overhead_mixed or candidate.overhead_alone or 1.0,
        facts.merges is False,
    )


# ------------------------------------------------------------------------ sentences


def _score_reason(summary: Summary, best: Candidate, chosen: Candidate, differences: dict[str, Difference]) -> str:
    assert best.overall is not None and chosen.overall is not None
    where = f"over {len(summary.tasks)} tasks" if len(summary.tasks) > 1 else f"on {summary.tasks[0]}"
    if len(summary.complete) == 1:
        return f"{chosen.name} is the only method with scores: {points(chosen.overall.mean)} points {where}."
    equal = [c.name for c in summary.complete if c is not chosen and _mean(c) == _mean(best)]
    if equal and _mean(chosen) == _mean(best):
        return (
            f"{chosen.name} ties with {listed(equal, most=6)} for the highest mean score {where}: "
            f"{points(chosen.overall.mean)} points{', and costs least' if len(equal) > 1 else ', and costs less'}."
        )
    if chosen is best:
        return f"{chosen.name} has the highest mean score {where}: {points(chosen.overall.mean)} points."
    difference = differences[chosen.name]
    return (
        f"{chosen.name} scores {points(chosen.overall.mean)} points {where}; the highest mean is {best.name}'s with "
        f"{points(best.overall.mean)}, a difference within one standard error ({points(difference.error or 0.0)} "
        f"points), and {chosen.name} costs less."
    )


def _mean(candidate: Candidate) -> float:
    """A complete candidate's mean to the digits that hold of a sum of rounded numbers."""
    assert candidate.overall is not None
    return round(candidate.overall.mean, 9)


def _few_rows(summary: Summary) -> list[str]:
    """A warning where a task is judged by so few rows that each of them moves the score."""
    judged: dict[str, int] = {}
    limits: dict[str, int | None] = {}
    for record in summary.records:
        if record.outcome.row_scores is not None:
            judged[record.trial.task] = len(record.outcome.row_scores)
            limits[record.trial.task] = record.trial.data.get("validation_rows")
    few = {task: number for task, number in judged.items() if number < FEW_ROWS}
    if not few:
        return []
    task = min(few, key=lambda name: few[name])
    others = f", and {len(few) - 1} other tasks by fewer than {FEW_ROWS}" if len(few) > 1 else ""
    said = f"{task} is judged by only {few[task]} rows{others}: one row more or less is {100 / few[task]:.1f} points. "
    if few[task] == limits[task]:
        said += f"Before relying on the order, judge by more than the recipe's validation_rows: {few[task]}."
    else:
        said += "Hold out more rows before relying on the order (of a table of your own: --validation 0.3)."
    return [said]


def _certainty(
    summary: Summary, best: Candidate, tied: Sequence[Candidate], differences: dict[str, Difference]
) -> list[str]:
    others = summary.complete[1:]
    if not others:
        return ["There is nothing to compare it with."]
    found = []
    untestable = [c for c in others if differences[c.name].p is None]
    if untestable:
        found.append(
            "With one run of each method and no scores of single rows nothing says how large the chance in these "
            "numbers is; run at least three seeds before relying on the order."
        )
    elif not tied:
        found.append(
            f"Its lead over every other method is larger than chance explains (paired tests over tasks, seeds and "
            f"rows, Holm-corrected, p < {ALPHA:g})."
            if len(others) > 1
            else f"The difference is larger than chance explains (paired test, p < {ALPHA:g})."
        )
    elif len(tied) == len(others):
        found.append(
            f"These runs cannot tell the {len(others) + 1} methods apart: no difference to {best.name} is larger than "
            f"chance explains (Holm-corrected paired tests, p < {ALPHA:g})."
        )
    else:
        names = listed([c.name for c in tied], most=6)
        found.append(
            f"These runs cannot tell {best.name} from {names}; the other {len(others) - len(tied)} are worse "
            f"by more than chance explains (Holm-corrected paired tests, p < {ALPHA:g})."
        )
    if summary.num_units[:1] == [1] and not untestable:
        found.append(
            "Some methods ran with one seed only, so that chance in training is not allowed for; another seed may "
            "change the order."
        )
    found += _few_rows(summary)
    if summary.only_search:
        found.append("All runs are of the search for hyper-parameters, so the scores are those that were searched by.")
    return found


def _cost_reasons(summary: Summary, chosen: Candidate, among: Sequence[Candidate], training: float | None) -> list[str]:
    facts, found = facts_of(chosen.method), []
    parameters, file_bytes = chosen.mean("parameters"), chosen.mean("file_bytes")
    if parameters is not None:
        size = f"It trains {count(parameters) if parameters else 'no'} parameters beside the head"
        size += f" and its file takes {of_bytes(file_bytes)}" if file_bytes else ""
        fewest = len(among) > 1 and all((c.mean("parameters") or float("inf")) >= parameters for c in among)
        found.append(size + (f", the fewest of the {len(among)} methods that come into question." if fewest else "."))
    found += _serving(facts)
    ratio = chosen.overhead_mixed or chosen.overhead_alone
    if ratio is not None:
        kind = "in a mixed batch" if chosen.overhead_mixed is not None else "served alone"
        found.append(f"A batch takes {ratio:.2f} times the bare backbone's time {kind}.")
    if training is not None:
        found.append(f"Training took {seconds(training)} a run on average.")
    number = sum(len(cell.failed) for cell in chosen.cells.values())
    if number:
        found.append(f"Mind that {number} of its runs failed.")
    lacking = [c.name for c in summary.candidates if c.overall is None]
    if lacking:
        found.append(f"Not considered, for they lack a score on some task: {listed(lacking, most=6)}.")
    return found


def _serving(facts: MethodFacts) -> list[str]:
    if facts.mixes is None:
        return []
    if not facts.mixes:
        return ["It changes the backbone's own weights: every task needs a model of its own, and no batch is shared."]
    if facts.merges:
        return ["Its rows share batches with other tasks' and methods', and it can be folded into the weights."]
    return ["Its rows share batches with other tasks' and methods'; it cannot be folded into the weights."]
