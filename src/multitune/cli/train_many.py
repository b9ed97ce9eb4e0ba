"""`multitune train-many`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from multitune.cli import shared
from multitune.cli.data import task_data
from multitune.cli.options import OPTIONS, OWN_DATA, OWN_PATTERN, SETTINGS
from multitune.cli.recipe import check_forms, flat_settings, override, read_method, read_recipe
from multitune.cli.shared import AsJson, app, count, note, print_json, score, show
from multitune.errors import ConfigError, MultituneError, suggest
from multitune.methods import make_method
from multitune.tasks import TaskData
from multitune.training import FailedJob, TrainConfig, TrainingInterrupted, TrainJob, TrainResult, train_many
from multitune.training.config import ALSO_CALLED

#: Keys that say where and how all jobs run, and so cannot differ between them.
_COMMON = {"backbone": str, "device": str, "dtype": str}
_LIMITS = ("max_jobs", "token_budget", "passes", "alone")
_USUAL = {"max_jobs": 16, "token_budget": 512, "passes": 2}
_OF_ALL = (*_COMMON, *_LIMITS, "out", "jobs")
_OF_A_JOB = tuple(key for key in OPTIONS if key not in _COMMON)


@app.command("train-many")
def train_many_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="YAML file: options of `multitune train` for all jobs, and under `jobs` a list of each job's own.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of all adapters, each in one of its own.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train many adapters together on one backbone, and write each to a folder of its own."""
    given = _read(recipe)
    folder = out or given.get("out")
    if folder is None:
        raise ConfigError("train-many needs --out, or 'out' in the recipe; for example --out adapters")
    shared_options = {key: value for key, value in given.items() if key not in _OF_ALL}
    data: dict[str, TaskData] = {}
    limits = {key: _limit(key, given[key]) for key in _LIMITS if key in given}
    jobs = [_job(number, shared_options, entry, data) for number, entry in enumerate(given["jobs"], start=1)]
    jobs = _with_names(jobs)
    place = {key: str(given[key]) for key in ("device", "dtype") if key in given}
    backbone = shared.load_backbone(str(given.get("backbone", "minilm")), **place)
    try:
        found = train_many(backbone, jobs, str(folder), report=note, **limits)
    except TrainingInterrupted as stop:
        note(f"interrupted; {len(stop.results)} of {len(jobs)} jobs had ended; give the same command to go on")
        raise typer.Exit(130) from None
    lines = [_line(result, Path(str(folder))) for result in found]
    if as_json:
        print_json(lines)
    else:
        _show(lines)
    failed = [result.name for result in found if isinstance(result, FailedJob)]
    if failed:
        note(f"error: {len(failed)} of {len(found)} jobs failed: {', '.join(failed)}")
        raise typer.Exit(1)


def _read(recipe: Path) -> dict[str, Any]:
    """The recipe, its keys checked."""
    given = read_recipe(recipe, (*OPTIONS, *_LIMITS, "jobs"))
    entries = given.get("jobs")
    if not isinstance(entries, list) or not entries or not all(isinstance(e, Mapping) for e in entries):
        raise ConfigError(
            f"recipe {recipe} needs 'jobs', a list of mappings of options to values, such as "
            f"[{{task: demo/topic, method: lora}}, {{task: demo/sentiment, method: bitfit}}]"
        )
    given["jobs"] = [{str(k).replace("-", "_"): v for k, v in e.items() if v is not None} for e in entries]
    for number, entry in enumerate(given["jobs"], start=1):
        for key in (key for key in entry if key not in _OF_A_JOB):
            raise ConfigError(
                f"recipe {recipe}, job {number}: key '{key}' is unknown, or the same for all jobs."
                f"{suggest(ALSO_CALLED.get(key, key), _OF_A_JOB)} A job's keys: {', '.join(_OF_A_JOB)}"
            )
    return given


def _limit(key: str, value: Any) -> Any:
    """What a recipe says about how all jobs run; its range is checked where it is used."""
    if key == "alone":
        return str(value)
    try:
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise ConfigError(f"'{key}' in the recipe is a whole number, such as {key}: {_USUAL[key]}, not {value!r}")


def _with_names(jobs: list[TrainJob]) -> list[TrainJob]:
    """Jobs that have a folder are called as it is; by all of its path where folders of one name lie apart.

    Where a path joined by dashes is the name of another (a-b/c and a/b/c), the slashes stay.
    """
    folders = [None if job.output_dir is None else Path(job.output_dir) for job in jobs]
    often = Counter(folder.name for folder in folders if folder is not None)
    names = [
        "" if folder is None else folder.name if often[folder.name] == 1 else "-".join(_below_root(folder))
        for folder in folders
    ]
    twice = Counter(names)
    return [
        job if folder is None else replace(job, name=name if twice[name] == 1 else str(folder))
        for job, folder, name in zip(jobs, folders, names, strict=True)
    ]


def _below_root(folder: Path) -> list[str]:
    return [part for part in folder.parts if part != folder.anchor]


def _job(number: int, common: dict[str, Any], entry: dict[str, Any], data: dict[str, TaskData]) -> TrainJob:
    """One entry of the list, with what it shares with the others."""
    try:
        check_forms(entry)
        chosen = override(common, entry)
        if "name" in entry and "train" not in chosen:
            raise ConfigError(
                f"'name' is what a table of your own is called, which needs 'train'; a job is called as its folder: "
                f"give out: FOLDER/{entry['name']}"
            )
        if "method" not in chosen:
            raise ConfigError("it names no method; give 'method: lora'")
        name, inline = read_method(chosen["method"])
        method = make_method(name, {**inline, **flat_settings(chosen.get("set", {}))})
        settings = {f.name: chosen[f.name] for f in SETTINGS if f.name in chosen}
        seed = TrainConfig.from_dict(settings).seed
        told = ("task", "mixture", "examples", *OWN_DATA, "pattern", *OWN_PATTERN)
        own = {key: str(chosen[key]) for key in told if key in chosen}
        key = repr((own, seed if "train" in own else 0))  # the seed holds rows out of the user's own
        if key not in data:  # jobs of one task share its rows
            data[key] = task_data(chosen, seed)
    except MultituneError as error:
        raise type(error)(f"job {number}: {error}") from error
    folder = chosen.get("out")
    return TrainJob(
        data=data[key],
        method=method,
        settings=settings,
        output_dir=None if folder is None else str(folder),
        overwrite=chosen.get("overwrite", False),
    )


def _line(result: TrainResult | FailedJob, folder: Path) -> dict[str, Any]:
    if isinstance(result, FailedJob):
        return {"job": result.name, "error": str(result.error), "steps": result.step}
    adapter = result.adapter
    return {
        "job": adapter.name,
        "task": adapter.task.name,
        "method": adapter.method.name,
        "parameters": result.num_method_parameters,
        "metric": result.metric,
        "score": result.best_metric,
        "best_step": result.best_step,
        "steps": result.num_steps,
        "adapter": str(adapter.path or folder / adapter.name),
    }


def _show(lines: list[dict[str, Any]]) -> None:
    columns = ("job", "task", "method", "parameters", "metric", "score", "kept", "adapter")
    rows = []
    for line in lines:
        if "error" in line:
            rows.append((line["job"], "", "", "", "", "failed", f"none in {count(line['steps'])} steps", ""))
            continue
        kept = f"step {count(line['best_step'])} of {count(line['steps'])}"
        cells = (line["job"], line["task"], line["method"], count(line["parameters"]), line["metric"])
        rows.append((*cells, score(line["score"]), kept, line["adapter"]))
    show(shared.table(rows, columns, right=("parameters", "score", "kept")))
