"""The parts of a report that HTML and Markdown share: which columns and sentences there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from multitune.comparing.overhead import usual_places
from multitune.comparing.records import Record
from multitune.comparing.report.tables import ALL_TASKS, Row
from multitune.comparing.statistics import ALPHA
from multitune.comparing.summary import Summary, draw_of, uses_rows
from multitune.comparing.wording import MISSING, count, listed, of_bytes, points, ratio, seconds


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table of all candidates."""

    name: str
    """In the CSV."""
    heading: str
    say: Callable[[str], str]
    """A value of the CSV as the page shows it."""
    numeric: bool = True
    help: str = ""
    also: str | None = None
    """A second column of the CSV that stands in the same place, as the end of a range."""


def _number(say: Callable[[float], str]) -> Callable[[str], str]:
    return lambda text: say(float(text)) if text else MISSING


_COLUMNS = (
    Column(name="score", heading="Score", say=_number(points), help="mean over tasks, points of 100"),
    Column(name="low", also="high", heading="95 % interval", say=_number(points), help="of the mean over tasks"),
    Column(name="letters", heading="Group", say=lambda t: t or MISSING, numeric=False,
           help="methods that share a letter cannot be told apart"),
    Column(name="tied", heading="As the best", say=lambda t: t or MISSING, numeric=False,
           help="whether no test tells it from the method with the highest mean"),
    Column(name="rank", heading="Rank", say=_number("{:.1f}".format), help="mean over tasks of the rank; 1 is best"),
    Column(name="parameters", heading="Parameters", say=_number(count), help="trained, without the head's"),
    Column(name="file_bytes", heading="File", say=_number(of_bytes), help="weights of the adapter without its head"),
    Column(name="seconds", heading="Training", say=_number(seconds), help="wall time of a run"),
    Column(name="peak_memory", heading="Memory", say=_number(of_bytes), help="peak of the process in training"),
    Column(name="overhead_alone", heading="Alone", say=_number(ratio),
           help="time of a batch by the bare backbone's, every row this method"),
    Column(name="overhead_mixed", heading="Mixed", say=_number(ratio),
           help="the same where half of the rows are of this method, and the others of others"),
    Column(name="merges", heading="Merges", say=lambda t: t or MISSING, numeric=False, help="folds into the weights"),
    Column(name="mixes", heading="Mixes", say=lambda t: t or MISSING, numeric=False,
           help="shares a batch with other methods"),
)  # fmt: skip


#: Longest group that is shown as letters.
_MOST_LETTERS = 4


def columns(table: Sequence[Row]) -> list[Column]:
    """The columns that say something here. Where many methods overlap, letters become words that nobody can read."""
    whole = [row for row in table if row["task"] == ALL_TASKS]
    longest = max((len(row["letters"]) for row in whole), default=0)
    alone = sum(bool(row["letters"]) for row in whole) < 2
    left_out = {"letters", "tied", "rank"} if alone else {"letters"} if longest > _MOST_LETTERS else {"tied"}
    return [c for c in _COLUMNS if c.name not in left_out and any(row[c.name] for row in whole)]


def in_short(summary: Summary) -> str:
    """What was compared, one line."""
    methods, tasks = len(summary.candidates), len(summary.tasks)
    finished = sum(r.outcome.status == "finished" for r in summary.records)
    said = [_some(methods, "candidate"), _some(tasks, "task"), runs_per_cell(summary), _some(finished, "finished run")]
    failed = len(summary.records) - finished
    return " · ".join(said + ([f"{failed} failed"] if failed else []))


def _some(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"


def runs_per_cell(summary: Summary) -> str:
    """How many runs an interval stands on."""
    numbers = summary.num_units
    if not numbers:
        return "no finished run"
    units = {unit[0] for c in summary.candidates for cell in c.cells.values() for unit in cell.scores}
    name = "draws of rows" if units == {"draw"} else "seeds and draws of rows" if len(units) > 1 else "seeds"
    if numbers == [1]:
        return "one seed"
    return f"{numbers[0]} {name}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} {name}"


def how_to_read(summary: Summary) -> list[str]:
    """What the numbers mean, in sentences."""
    numbers, found = summary.num_units, []
    metrics = dict.fromkeys(summary.metrics.values())
    if summary.only_search:
        found.append("No final run has finished yet: these are runs of the search for hyper-parameters.")
    found.append(
        f"Scores are points of 100 on the validation rows, higher is better ({listed(list(metrics), most=9)})"
        + (", and the mean over tasks gives each task the same weight." if len(summary.tasks) > 1 else ".")
        + " Each run keeps the step that was best on these very rows, which flatters every method a little."
    )
    if numbers[:1] == [1] and numbers[-1:] == [1]:
        found.append("There is one seed, so there are no intervals: how much another seed would change is not known.")
    elif numbers:
        found.append(
            f"Intervals are 95 % t intervals over {runs_per_cell(summary)}; they say how much another training run "
            f"would change, and not how much other validation rows would."
            + (" Where one run finished there is none." if numbers[0] == 1 else "")
        )
    found += not_there(summary)
    lacking = [c.name for c in summary.candidates if c.overall is None]
    if lacking:
        found.append(f"Without a score on every task, so without a mean and a rank: {listed(lacking, most=8)}.")
    incomparable = [
        n for n, s in summary.seconds.items() if s is None and summary.by_name[n].mean("seconds") is not None
    ]
    if incomparable:
        found.append(
            f"Times are given only for runs that had their process to themselves on one kind of machine; without one: "
            f"{listed(incomparable, most=6)}."
        )
    if len({row.place for row in summary.overhead}) > 1:
        usual = usual_places(summary.overhead)
        said = dict.fromkeys(usual[backbone] or "a place not known" for backbone in sorted(usual))
        found.append(f"Serving was timed in several places; Alone and Mixed are of {'; '.join(said)}.")
    measured = {(row.method, row.backbone) for row in summary.overhead}
    otherwise = [
        c.name
        for c in summary.candidates
        if c.overhead_alone is None and c.overhead_mixed is None and (c.method, c.backbone) in measured
    ]
    if otherwise:
        found.append(
            f"Serving was timed with other settings than these have, so they have no time of it: "
            f"{listed(otherwise, most=6)}."
        )
    return found


def not_there(summary: Summary) -> list[str]:
    """A sentence where candidates lack runs that others have: a comparison that was stopped, or asked for fewer seeds.

    A run is a task, a draw of its rows and a seed. A cell all of whose runs failed lacks nothing: no more may be tried.
    """
    if summary.only_search:
        return []
    runs: dict[str, dict[str, set[tuple[int, int]]]] = {task: {} for task in summary.tasks}
    for c in summary.candidates:
        for task in summary.tasks:
            cell = c.cells.get(task)
            if cell is None or cell.finished or not cell.failed:
                records = () if cell is None else (*cell.finished, *cell.failed)
                runs[task][c.name] = {(draw_of(r), r.trial.seed) for r in records}
    wanted = {task: set().union(*of.values()) for task, of in runs.items()}
    missing: Counter[str] = Counter()
    for task, of in runs.items():
        missing.update({name: len(wanted[task] - has) for name, has in of.items()})
    total = missing.total()
    if not total:
        return []
    behind = listed([f"{c.name} ({missing[c.name]})" for c in summary.candidates if missing[c.name]], most=8)
    return [
        f"Not every candidate has every run that others have: {_some(total, 'run')} {'is' if total == 1 else 'are'} "
        f"not there, of {behind}. The same command goes on with a comparison that was stopped."
    ]


def about_tests(summary: Summary) -> list[str]:
    """How the differences were tested, and what came out, in sentences."""
    pairs = summary.differences
    if not pairs:
        return ["There are no two candidates with a score on every task, so there is nothing to test."]
    testable = [p for _, p in pairs.values() if p is not None]
    if not testable:
        return ["One run of each method and no scores of single rows: there is nothing to test a difference by."]
    different = sum(p < ALPHA for p in testable)
    by_rows = [t for t in summary.tasks if uses_rows(summary, t)]
    others = [t for t in summary.tasks if t not in by_rows]
    found = [
        f"Of {count(len(testable))} pairs, {count(different)} differ by more than chance explains (p < {ALPHA:g} after "
        f"Holm's correction for all pairs). That two were not shown to differ does not show that they are equal."
    ]
    if by_rows:
        found.append(
            f"On {listed(by_rows, most=6)} each pair is compared on the same seeds and validation rows, both as "
            f"samples: the runs of a seed share a model, and rows are hard or easy for all (analysis of variance "
            f"of seeds by rows)." + _judged_otherwise(summary, by_rows)
        )
    if others:
        found.append(f"On {listed(others, most=6)} main scores are compared seed by seed, without single rows.")
    if summary.num_units[:1] == [1]:
        found.append("Where there is one seed, only the choice of rows is allowed for, and another seed may differ.")
    return found


def _judged_otherwise(summary: Summary, tasks: Sequence[str]) -> str:
    """A warning where the mean over rows is not the score in the tables."""
    found = []
    for task in tasks:
        cells = [c.cells[task] for c in summary.complete]
        runs = [r for cell in cells for r in cell.finished if r.outcome.row_scores]
        if any(not math.isclose(_row_mean(r), r.outcome.score or 0.0, abs_tol=1e-6) for r in runs):
            found.append(f"{task} ({summary.metrics[task]})")
    if not found:
        return ""
    return f" There the share of right rows is tested, which is not the score in the tables on {listed(found, most=6)}."


def _row_mean(record: Record) -> float:
    rows = record.outcome.row_scores or ()
    return math.fsum(rows) / len(rows)


def failures(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Candidate, task, seeds and message of the failed runs, those of one message together."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for c in summary.candidates:
        for task, cell in c.cells.items():
            for r in cell.failed:
                message = r.outcome.error or "the score is not a number"
                found.setdefault((c.name, task, message), []).append(r.trial.seed)
    return [(c, t, ", ".join(map(str, sorted(set(seeds)))), error) for (c, t, error), seeds in found.items()]


def how_it_ran(summary: Summary, command: str | None) -> list[tuple[str, str]]:
    """Machine, versions and the rest, as pairs."""
    environments = [r.outcome.environment for r in summary.records if r.outcome.environment]
    found = [("backbone", ", ".join(sorted({f"{c.backbone}" for c in summary.candidates})))]
    seeds = sorted({r.trial.seed for r in summary.records})
    found.append(("seeds", ", ".join(map(str, seeds))))
    found += [] if command is None else [("command", command)]
    found.append(("runs", f"{count(len(summary.records))} shown, {count(summary.num_search)} of the search"))
    together = Counter(r.outcome.together for r in summary.records)
    if set(together) != {1}:
        found.append(
            ("in one process", "; ".join(f"{n} runs at a time: {count(k)}" for n, k in sorted(together.items())))
        )
    names = dict.fromkeys(name for e in environments for name in e if name != "date")
    for name in names:
        values = dict.fromkeys(_said(e[name]) for e in environments if name in e)
        found.append((name, "; ".join(values)))
    dates = sorted({str(e["date"]) for e in environments if "date" in e})
    if dates:
        found.append(("date", dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"))
    return found


def _said(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def rows_of_tasks(summary: Summary) -> list[tuple[str, str, str]]:
    """Task, score and the rows it was trained and judged on."""
    found = []
    for task in summary.tasks:
        records = [
            r for c in summary.candidates if task in c.cells for r in (*c.cells[task].finished, *c.cells[task].failed)
        ]
        data = records[0].trial.data
        rows = [r.outcome.row_scores for r in records if r.outcome.row_scores]
        drawn = "all training rows" if data.get("train_rows") is None else f"{data['train_rows']:,} training rows"
        drawn = drawn if data.get("per_class") is None else f"{data['per_class']} training rows per class"
        judged = len(rows[0]) if rows else data.get("validation_rows")  # there may be fewer than were asked for
        drawn += ", all validation rows" if judged is None else f", {judged:,} validation rows"
        most = data.get("max_new_tokens")
        drawn += "" if most is None else f", texts of at most {most:,} tokens"
        found.append((task, summary.metrics[task], drawn))
    return found
