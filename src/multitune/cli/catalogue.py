"""`multitune methods` and `multitune tasks`: what there is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from multitune.backbone import Backbone
from multitune.cli import shared
from multitune.cli.fields import fields_of
from multitune.cli.shared import AsJson, BackboneName, app, count, pairs, print_json, show, written
from multitune.errors import ConfigError
from multitune.merging import why_not_mergeable
from multitune.methods import Method, get_method, method_names
from multitune.plan import DeltaSet
from multitune.tasks import list_tasks, load_task

MethodName = Annotated[str | None, typer.Argument(help="A method: print its hyper-parameters.", show_default=False)]


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """What a method is on one backbone, with its default hyper-parameters."""

    name: str
    title: str
    deltas: tuple[str, ...]
    """Kinds of delta that it yields; empty where it only trains the head, or the weights themselves."""
    parameters: int | None
    """Trainable parameters without the head; `None` where it does not fit the backbone."""
    percent: float | None
    """The same, in percent of the backbone's."""
    merges: bool
    """Whether it can be folded into a checkpoint of its own."""
    mixes: bool
    """Whether its rows can share a batch with other methods'."""
    learning_rate: float
    paper: str
    problem: str = ""
    """Why it does not fit the backbone."""


def facts(cls: type[Method], backbone: Backbone) -> MethodFacts:
    """Read from the code what a method is: its tensors and its deltas are made, and looked at."""
    deltas, parameters, percent, problem = DeltaSet({}), None, None, ""
    try:
        method = cls()
        tensors = method.init(backbone, torch.Generator().manual_seed(0))
        deltas = DeltaSet(method.deltas({k: t.to(backbone.device) for k, t in tensors.items()}, backbone))
        parameters = sum(t.numel() for name, t in tensors.items() if method.trains(name))
        percent = 100 * parameters / backbone.num_parameters
    except ConfigError as error:
        problem = str(error)
    return MethodFacts(
        name=cls.name,
        title=cls.title,
        deltas=tuple(dict.fromkeys(delta.kind for of_site in deltas.by_site.values() for delta in of_site)),
        parameters=parameters,
        percent=percent,
        merges=not problem and why_not_mergeable(backbone, deltas) is None,
        mixes=not cls.changes_weights,
        learning_rate=cls.recipe.learning_rate,
        paper=cls.paper,
        problem=problem,
    )


@app.command()
def methods(name: MethodName = None, backbone: BackboneName = "minilm", as_json: AsJson = False) -> None:
    """List the tuning methods, or print the hyper-parameters of one."""
    if name is not None:
        _one(get_method(name), backbone, as_json)
        return
    loaded = shared.load_backbone(backbone)
    found = [facts(get_method(each), loaded) for each in method_names()]
    if as_json:
        print_json([asdict(f) for f in found])
        return
    columns = ("method", "title", "deltas", "parameters", "%", "merges", "mixes", "rate")
    rows = [
        (
            f.name,
            f.title,
            " ".join(f.deltas) or ("weights" if not f.mixes else "none"),
            "does not fit" if f.parameters is None else count(f.parameters),
            "" if f.percent is None else f"{f.percent:.2f}",
            "yes" if f.merges else "no",
            "yes" if f.mixes else "no",
            _power(f.learning_rate),
        )
        for f in found
    ]
    show(
        shared.table(rows, columns, right=("parameters", "%", "rate")),
        "",
        shared.table([(f.name, f.paper) for f in found], ("method", "paper")),
    )
    shared.note(
        f"parameters: with the default settings, without the head; of {count(loaded.num_parameters)} in {backbone}. "
        f"`multitune methods NAME` prints a method's settings"
    )
    for f in found:
        if f.problem:
            shared.note(f"{f.name} does not fit {backbone}: {f.problem}")


def _power(rate: float) -> str:
    """A learning rate as `3e-3`."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _one(cls: type[Method], backbone: str, as_json: bool) -> None:
    found, recipe, fields = facts(cls, shared.load_backbone(backbone)), cls.recipe, fields_of(cls)
    if as_json:
        settings = [{"name": f.name, "type": f.type, "default": f.default, "doc": f.doc} for f in fields]
        print_json(asdict(found) | {"recipe": asdict(recipe), "settings": settings})
        return
    parameters = "does not fit" if found.parameters is None else f"{count(found.parameters)} ({found.percent:.2f} %)"
    show(
        pairs(
            [
                ("method", f"{found.name}: {found.title}"),
                ("paper", found.paper),
                ("deltas", ", ".join(found.deltas) or ("weights" if not found.mixes else "none")),
                (f"parameters on {backbone}", parameters),
                ("merges", "yes" if found.merges else "no"),
                ("mixes", "yes" if found.mixes else "no"),
                ("learning rate", f"{recipe.learning_rate:g} ({recipe.source})"),
            ]
        ),
        "",
        shared.table(
            [(f.name, f.type, written(f.default), f.doc) for f in fields],
            ("setting", "type", "default", "what it is"),
        )
        if fields
        else "It has no settings.",
    )
    if found.problem:
        shared.note(f"{found.name} does not fit {backbone}: {found.problem}")


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="A task: print what it holds.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of public suites; by default what MULTITUNE_DATA names.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks that can be trained by name, or print what one holds."""
    if name is None:
        names = list_tasks(data)
        print_json(names) if as_json else print("\n".join(names))
        return
    found = load_task(name, data)
    tables = {"train": found.train, "validation": found.validation} | ({"test": found.test} if found.test else {})
    rows = {split: len(table) for split, table in tables.items()}
    first = next(table[0] for table in tables.values() if len(table))
    if as_json:
        print_json(found.task.to_dict() | {"rows": rows, "first": first})
        return
    show(
        pairs(
            [
                ("task", found.task.name),
                ("kind", found.task.kind),
                ("text", " | ".join(found.task.template.parts)),
                *([("choices", " | ".join(found.task.choices))] if found.task.choices else []),
                ("label", found.task.label),
                *([("labels", ", ".join(found.task.labels))] if found.task.labels else []),
                ("metric", found.task.metric),
                ("rows", ", ".join(f"{count(number)} {split}" for split, number in rows.items())),
                ("first row", json.dumps(first, ensure_ascii=False, default=str)),
            ]
        )
    )
