"""From records to a summary: which runs belong to one candidate, and which to one task."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from multitune.comparing.overhead import OverheadRow, mean_ratio, usual_places
from multitune.comparing.records import Record
from multitune.comparing.statistics import mean_over_tasks
from multitune.comparing.summary import Candidate, Cell, Summary, draw_of
from multitune.training.config import LATER

#: What makes two tasks of one: which rows they have, and how long the judged texts may be.
_CONDITIONS = ("per_class", "train_rows", "validation_rows", "max_new_tokens")


def summarise(records: Sequence[Record], overhead: Sequence[OverheadRow] = ()) -> Summary:
    """What a report of these records shows, see `that_count`."""
    counted = list({r.trial.key + str(r.budget): r for r in that_count(records)}.values())
    tasks = _task_names(counted)
    found = _candidates(counted, tasks)
    order = tuple(dict.fromkeys(tasks[r.trial.key] for r in sorted(counted, key=lambda r: tasks[r.trial.key])))
    metrics = {tasks[r.trial.key]: r.outcome.metric for r in counted}
    places = usual_places(overhead)
    here = [row for row in overhead if row.place == places[row.backbone]]
    candidates = [_candidate(name, of, order, tasks, here) for name, of in found.items()]
    candidates.sort(key=lambda c: (c.overall is None, -c.overall.mean if c.overall else 0.0, c.name))
    return Summary(
        tasks=order,
        metrics=metrics,
        candidates=tuple(candidates),
        records=tuple(counted),
        num_search=sum(r.purpose == "search" for r in records),
        only_search=bool(records) and not any(r.purpose == "final" for r in records),
        overhead=tuple(overhead),
    )


def that_count(records: Sequence[Record]) -> list[Record]:
    """The final records, and one that says so of every search that found nothing; without a final one those of the
    search.
    """
    final = [r for r in records if r.purpose == "final"]
    return [*final, *_lost(records, {_cell(r) for r in final})] if final else list(records)


def _lost(records: Sequence[Record], done: set[str]) -> Iterator[Record]:
    """A failed record for every method on a task under a budget of which all trials of the search failed."""
    searched: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        if _cell(r) not in done:
            searched[_cell(r)].append(r)
    for of in searched.values():
        if all(r.outcome.status == "failed" for r in of):
            said = f"the search found no setting, for all of its {len(of)} trials failed; the first: "
            yield replace(of[0], outcome=replace(of[0].outcome, error=f"{said}{of[0].outcome.error}"))


def _cell(record: Record) -> str:
    """What a search looks for settings for: task with its number of rows, method, budget; whichever draw of rows."""
    trial = record.trial
    conditions = {k: trial.data.get(k) for k in _CONDITIONS}
    return _json([trial.task, conditions, *weights_of(record), trial.method, record.budget])


def weights_of(record: Record) -> tuple[str, str]:
    """Name and fingerprint of the backbone: a new revision on the hub, or a folder written anew, keeps its name."""
    return record.trial.backbone, record.trial.backbone_fingerprint


def backbone_names(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """What to call the backbones of these records, by name and fingerprint of the weights: by their names, and where a
    name stands for several by their fingerprints too.
    """
    known = sorted({weights_of(r) for r in records})
    times = Counter(name for name, _ in known)
    return {(name, of): f"{name} (weights {of[:6]})" if times[name] > 1 else name for name, of in known}


def _task_names(records: Sequence[Record]) -> dict[str, str]:
    """Name of the task under its condition, by the key of the trial."""
    conditions: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    prints: dict[tuple[str, str, int], dict[str, None]] = defaultdict(dict)
    for r in records:
        condition = {k: r.trial.data.get(k) for k in _CONDITIONS}
        conditions[r.trial.task][_json(condition)] = condition
        prints[r.trial.task, _json(condition), draw_of(r)][_fingerprint(r)] = None
    names = {}
    for r in records:
        of_task = conditions[r.trial.task]
        key = _json({k: r.trial.data.get(k) for k in _CONDITIONS})
        varying = {k for k in of_task[key] if len({_json(c[k]) for c in of_task.values()}) > 1}
        said = [_in_words(k, of_task[key][k]) for k in of_task[key] if k in varying]
        versions = list(prints[r.trial.task, key, draw_of(r)])
        if len(versions) > 1:
            said.append(f"rows {_fingerprint(r)[:6]}")
        names[r.trial.key] = ", ".join([r.trial.task, *said])
    return names


def _in_words(name: str, value: Any) -> str:
    if name == "per_class":
        return "all rows" if value is None else f"{value} per class"
    if name == "max_new_tokens":
        return "texts of the usual length" if value is None else f"texts of {value:,} tokens"
    which = "training" if name == "train_rows" else "validation"
    return f"all {which} rows" if value is None else f"{value:,} {which} rows"


def _fingerprint(record: Record) -> str:
    """Of the rows the run had."""
    return str(record.trial.data.get("fingerprint", ""))


def _json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _settings(record: Record) -> dict[str, str]:
    """What may tell candidates of one method and budget apart, as text; the method's own settings first."""
    training = {k: v for k, v in {**LATER, **record.trial.training}.items() if k != "seed"}
    return {k: _json(v) for k, v in {**training, **record.trial.settings}.items()}


def _candidates(records: Sequence[Record], tasks: Mapping[str, str]) -> dict[str, list[Record]]:
    """Records by the name of their candidate.

    What differs *within* a task tells candidates apart. What differs only between tasks does not: a search chooses the
    learning rate of each task for itself, and the candidate is then the method with its search.
    """
    backbones = backbone_names(records)
    groups: dict[tuple[tuple[str, str], str, str | None], list[Record]] = defaultdict(list)
    for r in records:
        groups[weights_of(r), r.trial.method, r.budget].append(r)
    found: dict[str, list[Record]] = defaultdict(list)
    for (backbone, method, budget), of in groups.items():
        differing = _differing(of, tasks)
        for r in of:
            settings = _settings(r)
            said = [method] + ([budget] if budget is not None else [])
            said += [f"{k}={settings.get(k, 'unset').strip(chr(34))}" for k in differing]
            found[", ".join(said) + (f" on {backbones[backbone]}" if len(backbones) > 1 else "")].append(r)
    return found


def _differing(records: Iterable[Record], tasks: Mapping[str, str]) -> list[str]:
    by_task: dict[str, list[dict[str, str]]] = defaultdict(list)
    for r in records:
        by_task[tasks[r.trial.key]].append(_settings(r))
    names = dict.fromkeys(name for of in by_task.values() for settings in of for name in settings)
    return [n for n in names if any(len({s.get(n) for s in of}) > 1 for of in by_task.values())]


def _candidate(
    name: str,
    records: Sequence[Record],
    tasks: Sequence[str],
    names: Mapping[str, str],
    overhead: Sequence[OverheadRow],
) -> Candidate:
    cells = {}
    for task in tasks:
        of = [r for r in records if names[r.trial.key] == task]
        if of:
            finished = [r for r in of if _gave_a_score(r)]
            cells[task] = Cell(tuple(finished), tuple(r for r in of if not _gave_a_score(r)))
    known = [cells[t].score for t in tasks if t in cells]
    scores = [s for s in known if s is not None]
    first = records[0]
    return Candidate(
        name=name,
        method=first.trial.method,
        budget=first.budget,
        backbone=first.trial.backbone,
        cells=cells,
        overall=mean_over_tasks(scores) if len(scores) == len(tasks) else None,
        overhead_alone=_ratio(records, overhead, ("alone", "factors", "fused")),
        overhead_mixed=_ratio(records, overhead, ("mixed",)),
    )


def _gave_a_score(record: Record) -> bool:
    score = record.outcome.score
    return record.outcome.status == "finished" and score is not None and math.isfinite(score)


def _ratio(records: Sequence[Record], overhead: Sequence[OverheadRow], forms: Sequence[str]) -> float | None:
    """Mean ratio of the first of these forms that was measured, over the shapes that every method of it has.

    Only what was measured with a run's own settings counts: a rank of 64 takes longer than one of 8.
    """
    first = records[0].trial
    wanted = {_json(r.trial.settings) for r in records}
    here = [row for row in overhead if row.backbone == first.backbone]
    for form in forms:
        by_settings: dict[tuple[str, str], list[OverheadRow]] = defaultdict(list)
        for row in here:
            if row.form == form:
                by_settings[row.method, _json(row.settings)].append(row)
        mine = [by_settings[first.method, settings] for settings in wanted if (first.method, settings) in by_settings]
        if len(mine) == len(wanted):
            shapes = set.intersection(*({(row.rows, row.length) for row in of} for of in by_settings.values()))
            ratios = [ratio for of in mine if (ratio := mean_ratio(of, sorted(shapes))) is not None]
            return math.prod(ratios) ** (1 / len(ratios)) if ratios else None
    return None
