"""`multitune train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from multitune.cli import shared
from multitune.cli.data import remarks, task_data
from multitune.cli.options import SETTINGS, TASK_PANEL, with_options
from multitune.cli.recipe import chosen_options, flat_settings, read_method
from multitune.cli.shared import AsJson, app, count, note, print_json, score, show, size
from multitune.methods import Method, make_method
from multitune.tasks import TaskData
from multitune.training import TrainConfig, TrainResult, train
from multitune.training.checkpoints import Checkpoints
from multitune.training.written import judge_of_run


@app.command("train")
@with_options
def train_command(
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options by name; what is given here overrides it.",
            rich_help_panel=TASK_PANEL,
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train an adapter for one task with one method, and write it to a folder."""
    chosen = chosen_options(recipe, options)
    config = TrainConfig.from_dict({f.name: chosen[f.name] for f in SETTINGS if f.name in chosen})
    name, inline = read_method(chosen["method"])
    method = make_method(name, {**inline, **flat_settings(chosen.get("set", {}))})
    data = task_data(chosen, config.seed)
    place = {key: str(chosen[key]) for key in ("device", "dtype") if key in chosen}
    backbone = shared.load_backbone(str(chosen.get("backbone", "minilm")), **place)
    out = Path(str(chosen["out"]))
    _announce(chosen, data, method, config)
    try:
        result = train(
            backbone,
            data,
            method,
            out,
            config=config,
            name=out.resolve().name,
            overwrite=chosen.get("overwrite", False),
            report=note,
        )
    except KeyboardInterrupt:
        steps = Checkpoints(out).steps
        last = f"the last checkpoint is step {steps[-1]} in {out}" if steps else "there was no checkpoint yet"
        note(f"interrupted; {last}; give the same command to go on")
        raise typer.Exit(130) from None
    _show_result(method, result, out, as_json)


def _announce(chosen: Mapping[str, Any], data: TaskData, method: Method, config: TrainConfig) -> None:
    """Say what is about to be trained, and what of a table was guessed."""
    task = data.task
    if "train" in chosen and not {"text", "label"} <= set(chosen):
        labels = f" ({len(task.labels)} labels: {', '.join(task.labels[:8])})" if task.labels else ""
        note(f"reading the text from {' | '.join(task.template.parts)} and the answer from {task.label}{labels}")
    judge = judge_of_run(task, config)
    note(
        f"training {method.name} for {task.name} ({task.kind}) on {count(len(data.train))} rows, judged by {judge} on "
        f"{count(len(data.validation))}"
    )
    if judge == "perplexity" != task.metric:
        note(
            f"{task.metric} is of written texts: `multitune generate` judges the adapter by it; --eval-texts "
            f"50 has it choose the best tensors too, and takes longer"
        )
    for line in remarks(data, own="train" in chosen):
        note(line)


def _show_result(method: Method, result: TrainResult, out: Path, as_json: bool) -> None:
    """What came of a training run, as one line of a table."""
    facts: dict[str, Any] = {
        "method": method.name,
        "parameters": result.num_method_parameters,
        "with_head": result.num_method_parameters + result.num_head_parameters,
        "metric": result.metric,
        "score": result.best_metric,
        "best_step": result.best_step,
        "steps": result.num_steps,
        "seconds": round(result.seconds, 1),
        "bytes": shared.adapter_size(out),
        "adapter": str(out),
    }
    if as_json:
        print_json(facts)
        return
    kept = f"step {count(result.best_step)} of {count(result.num_steps)}"
    cells = (count(facts["parameters"]), count(facts["with_head"]), score(facts["score"]), kept)
    columns = ("method", "parameters", "with head", result.metric, "kept", "seconds", "size", "adapter")
    more = (f"{facts['seconds']:.1f}", size(facts["bytes"]), out)
    show(shared.table([(method.name, *cells, *more)], columns, right=columns[1:7]))
