"""`multitune methods` and `multitune tasks`: what there is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from multitune.backbone import Backbone
from multitune.cli import app as shared
from multitune.cli.app import AsJson, BackboneName, app, count, pairs, print_json, show
from multitune.cli.fields import fields_of
from multitune.errors import ConfigError
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
        parameters = sum(t.numel() for t in tensors.values())
        percent = 100 * parameters / backbone.num_parameters
    except ConfigError as error:
        problem = str(error)
    found = [delta for of_site in deltas.by_site.values() for delta in of_site]
    return MethodFacts(
        name=cls.name,
        title=cls.title,
        deltas=tuple(dict.fromkeys(delta.kind for delta in found)),
        parameters=parameters,
        percent=percent,
        merges=not problem and all(delta.cannot_merge is None for delta in found),
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
    columns = ("method", "title", "deltas", "parameters", "percent", "merges", "mixes", "rate")
    rows = [
        (
            f.name,
            f.title,
            ", ".join(f.deltas) or ("all weights" if not f.mixes else "none"),
            "does not fit" if f.parameters is None else count(f.parameters),
            "" if f.percent is None else f"{f.percent:.2f}",
            "yes" if f.merges else "no",
            "yes" if f.mixes else "no",
            f"{f.learning_rate:g}",
        )
        for f in found
    ]
    show(
        shared.table(rows, columns, right=("parameters", "percent", "rate")),
        "",
        shared.table([(f.name, f.paper) for f in found], ("method", "paper")),
    )
    shared.note(
        f"parameters: trained with the default settings, without the head; percent: of the {count(loaded.num_parameters)} "
        f"in {backbone}; merges: can be folded into a checkpoint; mixes: shares a batch with other methods; rate: "
        f"default learning rate. `multitune methods NAME` prints a method's settings"
    )
    for f in found:
        if f.problem:
            shared.note(f"{f.name} does not fit {backbone}: {f.problem}")


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
                ("deltas", ", ".join(found.deltas) or ("all weights" if not found.mixes else "none")),
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


def written(value: object) -> str:
    """A value as `--set` takes it."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@app.command()
def tasks(
    data: Annotated[
        str | None,
        typer.Option(help="Folder of public suites; by default what MULTITUNE_DATA names.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks that can be trained by name."""
    names = list_tasks(data)
    if as_json:
        print_json([_task(name, data) for name in names] if data is None else list(names))
        return
    print("\n".join(names))
