"""`multitune layers`: where hidden states turn, and which layers to train.

A layer's gain is how much closer it brings them to the last hidden state. The layer with the largest gain is frozen
with all below it. `train` does the same with `--set layers=semantic` (method freeze: `--set first=semantic`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multitune.cli import shared
from multitune.cli.data import task_data
from multitune.cli.shared import AsJson, BackboneName, Device, Dtype, app, note, print_json, show
from multitune.layers import NUM_ROWS, choose_layers_for, write_plot

_OWN = "Your own data, instead of --task"


def _own(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_OWN, show_default=False)


@app.command()
def layers(
    task: Annotated[str | None, typer.Option(help="Task by name, as `multitune tasks` lists them.")] = None,
    train: Annotated[str | None, _own("Rows: a file, a folder, or a hub data set.")] = None,
    text: Annotated[str | None, _own("Column of the text.")] = None,
    text_pair: Annotated[str | None, _own("Column of a second text.")] = None,
    label: Annotated[str | None, _own("Column of the answer.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to, special tokens included.")] = 128,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the gains as a PNG.", show_default=False)
    ] = None,
    backbone: BackboneName = "minilm",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure on a task's rows where hidden states turn, and choose the layers to train."""
    given = {"task": task, "train": train, "text": text, "text_pair": text_pair, "label": label}
    data = task_data({key: value for key, value in given.items() if value is not None}, 0)
    on = shared.load_backbone(backbone, device, dtype)
    choice = choose_layers_for(on, data.task, data.train, max_length=max_length)
    if plot is not None:
        write_plot(plot, choice, f"{data.task.name} on {on.name}")
    if as_json:
        print_json({"task": data.task.name, "backbone": on.name, "turn": choice.turn} | choice.to_dict())
        return
    rows = [("embeddings", f"{choice.deviations[0]:.4f}", "", "")]
    for i, gain in enumerate(choice.gains):
        role = "trained" if i in choice.trained else "turns most" if i == choice.turn else ""
        rows.append((str(i), f"{choice.deviations[i + 1]:.4f}", f"{gain:.4f}", role))
    show(shared.table(rows, ("layer", "deviation", "gain", ""), right=("deviation", "gain")))
    first, numbers = choice.trained[0], ",".join(map(str, choice.trained))
    measured = min(NUM_ROWS, len(data.train))
    note(
        f"measured on at most {measured} training rows of {data.task.name}; to train these layers: --method freeze "
        f"--set first={first}, or --method lora --set layers={numbers}"
    )
