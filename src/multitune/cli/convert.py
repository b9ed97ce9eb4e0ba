"""`multitune import` and `multitune export`: other libraries' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multitune.adapter import Adapter
from multitune.cli import shared
from multitune.cli.shared import (
    AdapterFolder,
    AsJson,
    BackboneName,
    Device,
    OptionalBackboneName,
    app,
    note,
    print_json,
    show,
)
from multitune.convert import FORMATS, Check, export_adapter, import_adapter
from multitune.errors import ConfigError

CheckWith = Annotated[
    Path | None,
    typer.Option(metavar="PYTHON", help="Python of an environment with the library adapters, to compare outputs with."),
]


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and would be replaced; choose another --out, or give --overwrite")


def _facts(check: Check | None, unchecked: str) -> dict[str, Any]:
    """What a check found, under the names of `--json`."""
    if check is None:
        note(f"outputs were not compared: {unchecked}")
        return {"compared": None, "with": None, "max_difference": None, "max_magnitude": None}
    return {
        "compared": check.outputs,
        "with": check.by,
        "max_difference": check.max_difference,
        "max_magnitude": check.max_magnitude,
    }


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    compared = "nothing" if facts["compared"] is None else f"{facts['compared']} with {facts['with']}"
    difference = "" if facts["max_difference"] is None else f"{facts['max_difference']:.1e}"
    magnitude = "" if facts["max_magnitude"] is None else f"{facts['max_magnitude']:.1f}"
    columns = ("folder", "method", "head", "compared", "largest difference", "of values up to")
    cells = (facts["folder"], facts["method"], facts["head"], compared, difference, magnitude)
    show(shared.table([cells], columns, right=columns[4:]))


@app.command("import")
def import_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The checkpoint.", show_default=False)],
    backbone: BackboneName,
    out: Annotated[Path, typer.Option(help="Folder to write the adapter to.", show_default=False)],
    source: Annotated[
        str, typer.Option("--from", metavar="WORD", help=f"Library that wrote it: {', '.join(FORMATS['import'])}.")
    ] = "peft",
    name: Annotated[str | None, typer.Option(help="What to call it; by default the name of the folder --out.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of task; by default classification, or regression for one output.")
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            help="Label names in the order of the outputs, such as no,yes; by default the checkpoint's, or LABEL_0, …"
        ),
    ] = "",
    template: Annotated[
        list[str] | None,
        typer.Option(help="Text of a row, such as '{text}', its default; twice for a pair of texts."),
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the answer, to evaluate on tables.")] = "",
    fresh_head: Annotated[
        bool, typer.Option("--fresh-head", help="Draw a new head for --labels, which has yet to be trained.")
    ] = False,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to; checkpoints do not say.")] = 128,
    check_with: CheckWith = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in that folder.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Take over another library's checkpoint as an adapter, and compare what both compute."""
    _refuse_existing(out, overwrite)
    done = import_adapter(
        folder,
        shared.load_backbone(backbone, device),
        out,
        source=source,
        name=name or out.resolve().name,
        kind=kind,
        labels=tuple(part.strip() for part in labels.split(",")) if labels else (),
        template=tuple(template) if template else ("{text}",),
        label=label,
        fresh_head=fresh_head,
        max_length=max_length,
        check_with=check_with,
    )
    if done.head == "fresh":
        note("its head is new and has yet to be trained: its answers mean nothing so far")
    facts = {"folder": str(out), "method": done.adapter.method.name, "head": done.head}
    _print(facts | _facts(done.check, done.unchecked), as_json)


@app.command("export")
def export_command(
    folder: AdapterFolder,
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.", show_default=False)],
    target: Annotated[
        str, typer.Option("--to", metavar="WORD", help=f"Library to write for: {', '.join(FORMATS['export'])}.")
    ] = "peft",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in that folder.")] = False,
    check_with: CheckWith = None,
    backbone: OptionalBackboneName = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write an adapter as another library's checkpoint, and compare what both compute."""
    _refuse_existing(out, overwrite)
    adapter = Adapter.load(folder)
    on = shared.backbone_of(adapter, backbone, device)
    done = export_adapter(Adapter.load(folder, on), on, out, target=target, overwrite=overwrite, check_with=check_with)
    facts = {"folder": str(done.path), "method": adapter.method.name, "task": done.task, "head": done.head}
    _print(facts | _facts(done.check, done.unchecked), as_json)
