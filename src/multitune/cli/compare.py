"""`multitune compare`."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from multitune.cli import shared
from multitune.cli.data import remarks
from multitune.cli.shared import AsJson, app, count, note, print_json, score, show, written
from multitune.comparing.estimate import Spent, estimate
from multitune.comparing.gathering import that_count
from multitune.comparing.records import Record, Trial
from multitune.comparing.run import (
    Comparison,
    Progress,
    as_yaml,
    load,
    number_known,
    number_of_trials,
    run_plan,
    with_choices,
)
from multitune.comparing.runners import make_runner
from multitune.comparing.sources import recipe_of, suites
from multitune.comparing.store import FILE, RECIPE_FILE, Store
from multitune.comparing.trials import Job, Plan, name_of
from multitune.errors import ConfigError, MultituneError
from multitune.methods import make_method
from multitune.yaml_file import read_names

if TYPE_CHECKING:
    from multitune.comparing.runners import Runner

_DATA = "Your own table"


@app.command("compare")
def compare_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|SUITE|TABLE",
            help=f"YAML recipe, name of a suite that ships with multitune ({', '.join(suites())}), or a table of your "
            "own rows (CSV, TSV, JSON lines, Parquet).",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Folder of store and report. \\[default: compare-NAME]", show_default=False
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="These methods instead of the recipe's.", show_default=False)
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Numbers of trained parameters that every method is brought to, such as 0.1% or 50000.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Look for each method's settings with so many trials; where its recipe varies none, for its learning "
            "rate (a third of the usual, that, three times it).",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|A,B,...", help="So many seeds, or just these (a comma behind one).", show_default=False
        ),
    ] = None,
    runner: Annotated[
        str, typer.Option(metavar="WORD", help="Where trials run: packed (one process), processes, or ray (a cluster).")
    ] = "packed",
    workers: Annotated[
        int | None, typer.Option(help="Processes of the runners processes and ray.", show_default=False)
    ] = None,
    max_jobs: Annotated[
        int | None,
        typer.Option(
            help="Packed: trials that share passes, whose times are then not comparable; with 1 each is exactly what "
            "`train` gives. \\[default: 1]",
            show_default=False,
        ),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Packed, several trials at a time: most tokens of a pass. \\[default: 512]", show_default=False
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            help="Packed, several trials at a time: passes that run side by side, each on its share of the threads. "
            "\\[default: 2 on a CPU with more than one thread]",
            show_default=False,
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run the trials again that failed in an earlier run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials, their number and about how long they take, and stop.")
    ] = False,
    print_recipe: Annotated[
        bool,
        typer.Option("--print-recipe", help="Print the recipe as YAML, to edit and to give instead, and stop."),
    ] = False,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Backbone; by default the recipe's, or minilm.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Where the backbone runs, as torch names devices.", show_default=False),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Column of the text, or a template.", rich_help_panel=_DATA, show_default=False
        ),
    ] = None,
    text_pair: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of a second text.", rich_help_panel=_DATA, show_default=False),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of the answer.", rich_help_panel=_DATA, show_default=False),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="WORD", help="Kind of task.", rich_help_panel=_DATA, show_default=False)
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,…",
            help="Names of the labels in the order of their ids, with commas between them or one a time.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN,…",
            help="Multiple choice: the columns that hold the choices, with commas between them or one a time, or one "
            "column of lists.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SHARE",
            help="Rows to judge by, or the share of the rows to hold out, such as 0.3. \\[default: a tenth]",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods on tasks or on your own table: scores over seeds, a report, and a recommendation."""
    own: dict[str, Any] = {"text": text, "text_pair": text_pair, "label": label, "kind": kind, "validation": validation}
    own |= {"labels": _names(labels, "labels"), "choices": _names(choices, "choices")}
    found = recipe_of(what, **{k: v for k, v in own.items() if v is not None})
    recipe = with_choices(
        replace(found, backbone=backbone or found.backbone, device=device or found.device),
        methods=None if methods is None else _words(methods, "methods"),
        budgets=None if budgets is None else _words(budgets, "budgets"),
        seeds=_seeds(seeds),
        trials=trials,
    )
    if print_recipe:
        # a suite that nothing was changed of comes with its comments
        print(suites()[what].read_text("utf-8") if recipe == found and what in suites() else as_yaml(recipe), end="")
        return
    folder = Path(out or f"compare-{recipe.name}")
    plan = load(recipe)
    for line in plan.left_out:
        note(line)
    if dry_run:
        _describe_tables(plan)
        _dry(plan, as_json)
        return
    place = make_runner(
        runner,
        plan.backbone,
        recipe.backbone,
        workers=workers,
        max_jobs=max_jobs,
        token_budget=token_budget,
        passes=passes,
    )
    try:
        _announce(plan, folder, retry_failed)
        comparison = _run(plan, folder, place, retry_failed)
    finally:
        place.close()
    _finish(comparison, as_json)


def _words(given: str, option: str) -> list[str]:
    found = [word.strip() for word in given.split(",") if word.strip()]
    if not found:
        such = {"budgets": "0.1%,50000", "seeds": "0,1,2"}.get(option, "lora,bitfit")
        raise ConfigError(f"--{option} takes values with commas between them, such as {such}, not '{given}'")
    return found


def _names(given: list[str] | None, option: str) -> list[str] | None:
    return [name for each in given for name in read_names(each, f"--{option}")] if given else None


def _seeds(given: str | None) -> int | list[int] | None:
    if given is None:
        return None
    try:
        return [int(word) for word in _words(given, "seeds")] if "," in given else int(given)
    except ValueError:
        raise ConfigError(f"--seeds takes a number of seeds, or a list such as 0,1,2, not '{given}'") from None


# ------------------------------------------------------------------- before


def _dry(plan: Plan, as_json: bool) -> None:
    """Every trial, or with a search the grids."""
    total = number_of_trials(plan)
    if as_json:
        print_json({"trials": total, "final": [job.trial.to_dict() for job in _finals(plan)]})
        return
    rows = [
        (name_of(job.trial), job.trial.method, job.budget or "", _settings(job.trial),
         job.trial.seed, len(job.data.train), len(job.data.validation))
        for job in _finals(plan)
    ]  # fmt: skip
    columns = ("task", "method", "budget", "settings", "seed", "rows", "judged on")
    show(shared.table(rows, columns, right=("seed", "rows", "judged on")))
    if plan.recipe.search is not None:
        print(
            f"of each grid above {plan.recipe.search.trials} settings with seed {plan.search_seed()}, then the best "
            f"with {_several(len(plan.recipe.seeds), 'seed')}"
        )
    most = " at most" if plan.recipe.search is not None else ""
    print(f"{_several(total, 'trial')}{most}; {in_words(estimate(plan))}")


def _finals(plan: Plan) -> list[Job]:
    """The trials of a dry run; of a search each setting once."""
    jobs = plan.finals()
    return jobs if plan.recipe.search is None else [j for j in jobs if j.trial.seed == plan.search_seed()]


def _describe_tables(plan: Plan) -> None:
    """What was taken for text and answer of every table, which of one's own is partly guessed."""
    for cell in {id(cell.draws[0]): cell for cell in plan.cells}.values():
        task, data = cell.draws[0].data.task, cell.draws[0].data
        labels = f", {len(task.labels)} labels" if task.labels else ""
        note(
            f"{cell.draws[0].task}: {task.kind}{labels}, text from {' | '.join(task.template.parts)}, answer from "
            f"{task.label}; {count(len(data.train))} rows to learn from, {count(len(data.validation))} to judge by"
        )
        if "data" in cell.draws[0].facts:
            for line in remarks(data, own=True):
                note(line)


def _announce(plan: Plan, folder: Path, retry_failed: bool) -> None:
    tasks = list(dict.fromkeys(cell.draws[0].task for cell in plan.cells))
    methods = list(dict.fromkeys(cell.method.name for cell in plan.cells))
    _describe_tables(plan)
    total, known = number_of_trials(plan), number_known(plan, folder, retry_failed=retry_failed)
    what = f"{_several(len(methods), 'method')} on {_several(len(tasks), 'task')}, "
    what += _several(len(plan.recipe.seeds), "seed")
    if known:
        what += f"; {count(known)} are in the store"
    if known < total:
        what += f"; {in_words(estimate(plan), 1 - known / total)}"
    note(f"{_several(total, 'trial')}: {what}; results go to {folder}")


def _several(number: int, what: str) -> str:
    return f"{count(number)} {what}" + ("" if number == 1 else "s")


def in_words(spent: Spent | MultituneError, share: float = 1.0) -> str:
    """A share of an estimate; where others use the machine too, what it would be without them stands beside it."""
    if isinstance(spent, MultituneError):
        return f"how long is not known, for a run that would tell it failed: {spent}"
    spent = spent * share
    about = f"about {duration(spent.seconds)} in one process"
    if not spent.is_waiting:
        return about
    return f"{about} while this machine is as busy as now, {duration(spent.processor)} of processor time"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return _several(max(1, round(seconds)), "second")
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"


# ------------------------------------------------------------------- while


def _run(plan: Plan, folder: Path, place: Runner, retry_failed: bool) -> Comparison:
    start = time.perf_counter()
    with _Screen() as screen:
        try:
            found = run_plan(plan, folder, place, screen.watch, retry_failed=retry_failed)
        except KeyboardInterrupt:
            screen.stop()
            note(f"interrupted; {screen.done} of {screen.total} trials are in {folder}; the same command goes on")
            raise typer.Exit(130) from None
    earlier = f", {count(screen.known)} of them from earlier runs," if screen.known else ""
    note(f"{_several(screen.total, 'trial')}{earlier} in {duration(time.perf_counter() - start)}")
    return found


class _Screen:
    """A bar on a terminal, or a line for each trial elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[line]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._shown = console.is_terminal
        self._trials = self._bar.add_task("trials", total=None, line="")
        self.done = self.total = self.known = 0

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def watch(self, progress: Progress) -> None:
        """Show what happened."""
        self.done, self.total = progress.done, progress.total
        self.known += progress.known
        failed = f"trials ({progress.failed} failed)" if progress.failed else "trials"
        self._bar.update(self._trials, completed=progress.done, total=progress.total, description=failed)
        if progress.line is not None:
            self._bar.update(self._trials, line=escape(_short(progress.line)))
        record = progress.record
        if record is None or progress.known:
            return
        line = f"{name_of(record.trial)}  {record.trial.method}  seed {record.trial.seed}  {_result(record)}"
        if self._shown:
            self._bar.console.print(escape(line), highlight=False)
        else:
            note(f"{progress.done} of {progress.total}: {line}")


def _short(line: str) -> str:
    """A line of a running trial without its key."""
    return line.partition(": ")[2] or line


def _result(record: Record) -> str:
    outcome = record.outcome
    if outcome.score is None:
        return f"failed: {outcome.error}"
    seconds = "" if outcome.seconds is None else f", {outcome.seconds:.1f} s"
    return f"{outcome.metric} {score(outcome.score)}{seconds}"


# ------------------------------------------------------------------- after


def _finish(comparison: Comparison, as_json: bool) -> None:
    """The table, the report and the recommendation."""
    from multitune.cli.report import command_of
    from multitune.comparing.report import write_report

    folder, records = comparison.folder, (*comparison.searched, *comparison.records)
    recipe_text = (folder / RECIPE_FILE).read_text("utf-8")
    files = write_report(records, folder, recipe_text=recipe_text, command=command_of(folder))
    advice, lines = files.recommendation, summary(that_count(records))
    if as_json:
        said = {"method": advice.method, "reasons": list(advice.reasons)}
        print_json({"results": lines, "recommendation": said, "folder": str(comparison.folder)})
    else:
        _show(lines)
        print(f"\nrecommended: {advice.candidate or 'none'}", *advice.reasons, sep="\n- ")
        print(f"\nreport: {comparison.folder / 'report.html'}")
    others = _others(comparison)
    if others:
        note(
            f"{folder} holds {_several(others, 'trial')} of other comparisons, which this report leaves out; "
            f"`multitune report {quote(str(folder))}` writes one of all"
        )
    if comparison.failed:
        first = comparison.failed[0].outcome.error
        note(f"{_several(len(comparison.failed), 'trial')} failed (--retry-failed runs them again); the first: {first}")
    if not any(r.outcome.score is not None for r in comparison.records):
        raise typer.Exit(1)


def _others(comparison: Comparison) -> int:
    """How many trials stand in the store that this comparison did not ask for."""
    own = {r.trial.key for r in (*comparison.searched, *comparison.records)}
    return len({r.trial.key for r in Store(comparison.folder / FILE).records()} - own)


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A line for every task, budget and setting, the best of a task first: mean and deviation over its trials."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        trial = record.trial
        groups[name_of(trial), record.budget or "", trial.method, _settings(trial)].append(record)
    lines = []
    for (task, budget, method, settings), own in groups.items():
        scores = [r.outcome.score for r in own if r.outcome.score is not None]
        first = own[0].outcome
        lines.append(
            {
                "task": task,
                "budget": budget,
                "method": method,
                "settings": settings,
                "parameters": next((r.outcome.parameters for r in own if r.outcome.parameters is not None), None),
                "metric": first.metric,
                "score": statistics.fmean(scores) if scores else None,
                "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                "trials": len(scores),
                "failed": len(own) - len(scores),
            }
        )
    tasks = list(dict.fromkeys(line["task"] for line in lines))

    def place(line: Mapping[str, Any]) -> tuple[int, float]:
        return tasks.index(line["task"]), math.inf if line["score"] is None else -line["score"]

    return sorted(lines, key=place)


def _settings(trial: Trial) -> str:
    """In what a trial differs from the method's defaults, and its learning rate."""
    usual = make_method(trial.method).settings()
    own = [f"{key}={written(value)}" for key, value in trial.settings.items() if value != usual[key]]
    return " ".join([*own, f"learning_rate={trial.training['learning_rate']:g}"])


def _show(lines: Sequence[Mapping[str, Any]]) -> None:
    columns = ["task", "budget", "method", "settings", "parameters", "metric", "score", "±", "trials"]
    if not any(line["budget"] for line in lines):
        columns.remove("budget")
    rows = []
    for line in lines:
        cells = dict(line) | {"score": "failed" if line["score"] is None else score(line["score"])}
        cells["parameters"] = "" if line["parameters"] is None else count(line["parameters"])
        cells["±"] = "" if line["deviation"] is None else score(line["deviation"])
        rows.append([cells[column] for column in columns])
    show(shared.table(rows, columns, right=("parameters", "score", "±", "trials")))
