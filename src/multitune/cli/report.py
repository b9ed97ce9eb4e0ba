"""`multitune report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from multitune.cli.shared import AsJson, Overhead, app, note, print_json
from multitune.comparing.overhead import read_overhead
from multitune.comparing.recipe import Recipe
from multitune.comparing.records import Record
from multitune.comparing.report import write_report
from multitune.comparing.store import FILE, RECIPE_FILE, Store
from multitune.errors import ConfigError, DataError, suggest, suggest_file


@app.command("report")
def report_command(
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Folders of comparisons, or stores; the runs of several are reported together.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the report goes; by default the first folder.", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Report this task only; may be repeated.", show_default=False),
    ] = None,
    overhead: Overhead = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Heading of the page.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a comparison: one HTML page, Markdown, CSV; and recommend a method."""
    files = [_store_file(path) for path in stores]
    records = read_stores(stores)
    measured = [row for file in overhead or [] for row in read_overhead(file)]
    place = files[0].parent
    others = _of_other_recipes(place / RECIPE_FILE, records) if len(files) == 1 else ""
    if others:
        note(
            f"{place / RECIPE_FILE} is of the last comparison alone, and these runs are of {others} too: the report "
            f"shows a recipe for each row instead"
        )
    whole = len(files) == 1 and not others
    written = write_report(
        _of_tasks(records, task),
        out or place,
        overhead=measured,
        recipe_text=_recipe(files[0]) if whole else None,
        command=command_of(place) if whole else None,
        title=title,
    )
    advice = written.recommendation
    if as_json:
        paths = {name: str(getattr(written, name)) for name in ("html", "markdown", "csv")}
        print_json({**paths, "recommendation": asdict(advice)})
        return
    print(f"recommended: {advice.candidate or 'none'}")
    for reason in advice.reasons:
        print(f"- {reason}")
    note(f"wrote {written.html}, and report.md and report.csv beside it")


def command_of(folder: Path) -> str | None:
    """The command that runs a comparison again, from the recipe that lies in its folder."""
    file = folder / RECIPE_FILE
    return f"multitune compare {quote(str(file))} --out {quote(str(folder))}" if file.is_file() else None


def _of_other_recipes(file: Path, records: list[Record]) -> str:
    """The methods, seeds and tasks that runs have and the recipe in their folder has not, in words; empty if there are
    none, or no recipe that can be read."""
    try:
        recipe = Recipe.read(file)
    except ConfigError:
        return ""
    methods = sorted({r.trial.method for r in records} - {m.name for m in recipe.methods})
    seeds = sorted({r.trial.seed for r in records} - set(recipe.seeds))
    sources = {entry.source.get("task") or entry.source["data"] for entry in recipe.tasks}
    tasks = sorted({r.trial.task for r in records if _source(r) not in sources})
    said = [", ".join(methods)] if methods else []
    said += [f"seed {', '.join(map(str, seeds))}"] if seeds else []
    return " and ".join(said + ([f"task {', '.join(tasks)}"] if tasks else []))


def _source(record: Record) -> str:
    """Where a run's rows come from: a known task, or the file of a table, whatever name was given to its task."""
    return str(record.trial.data.get("task") or record.trial.data.get("data") or record.trial.task)


def read_stores(paths: list[Path]) -> list[Record]:
    """The records of all these folders or stores.

    Raises:
        DataError: there is no such store, or there is nothing in them.
    """
    files = [_store_file(path) for path in paths]
    records = [r for file in files for r in Store(file).records()]
    if not records:
        raise DataError(f"{files[0]} holds no finished trial yet; run `multitune compare` first")
    return records


def _store_file(path: Path) -> Path:
    """The store that a path means; opening a `Store` would make one."""
    file = path / FILE if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        raise DataError(f"{path} holds no {FILE}; give the folder that `multitune compare --out FOLDER` wrote to")
    raise DataError(f"there is no {path}.{suggest_file(path)} Give the folder of a comparison, or its {FILE}")


def _of_tasks(records: list[Record], wanted: list[str] | None) -> list[Record]:
    if not wanted:
        return records
    known = sorted({r.trial.task for r in records})
    for name in wanted:
        if name not in known:
            raise ConfigError(f"no run has the task '{name}'.{suggest(name, known)} Tasks: {', '.join(known)}")
    return [r for r in records if r.trial.task in wanted]


def _recipe(store: Path) -> str | None:
    """The recipe beside a store, if it is there."""
    file = store.parent / RECIPE_FILE
    return file.read_text("utf-8") if file.is_file() else None
