"""Mixtures of instructions on the command line: what a recipe says of one, and the scores of its held-out tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitune.adapter import Adapter
from multitune.cli import shared
from multitune.cli.shared import note, print_json, score, show
from multitune.errors import ConfigError
from multitune.generation.pages import PAGE_FILE
from multitune.yaml_file import read_yaml

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.prompting import Mixture, TaskScore


def read_mixture(given: Any) -> Mixture:
    """A mixture from a YAML file, or from what a recipe holds in place of its name.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key that a mixture has not.
    """
    from multitune.prompting import Mixture

    if isinstance(given, Mapping):
        return Mixture.read(given)
    path = Path(str(given))
    values = read_yaml(path, "mixture")
    if not isinstance(values, Mapping):
        raise ConfigError(f"mixture {path} is a mapping, such as 'tasks: [glue/rte, super_glue/copa]'")
    return Mixture.read(values)


def judge_held_out(
    backbone: Backbone,
    adapters: Mapping[str, Adapter],
    mixture: Mixture,
    rows: int,
    batch_size: int,
    as_json: bool,
    out: Path | None = None,
) -> None:
    """Print the zero-shot scores of the held-out tasks, of the bare backbone and of every adapter.

    Args:
        out: a folder for what each chose or wrote, in a folder of its own named in order, such as `0-bare` and
            `1-instructed`.
    """
    from multitune.prompting import save_scores, score_tasks

    if not mixture.held:
        raise ConfigError("the mixture holds no task out; name some in 'held_out'")
    found: dict[str, list[TaskScore]] = {}
    for number, (name, adapter) in enumerate({"bare backbone": None, **adapters}.items()):
        note(f"judging {name} on {len(mixture.held)} held-out tasks")
        found[name] = score_tasks(backbone, mixture.held, adapter, num_rows=rows, batch_size=batch_size)
        if out is not None:
            short = "bare" if adapter is None else Path(name).resolve().name
            place = save_scores(out / f"{number}-{short}", found[name], f"{name}, zero-shot")
            note(f"answers stand in {place / PAGE_FILE}")
    if as_json:
        print_json(
            [
                {"adapter": name, "task": s.task, "metric": s.metric, "score": s.score, "rows": s.num_rows}
                | ({} if s.chance is None else {"chance": s.chance})
                for name, scores in found.items()
                for s in scores
            ]
        )
        return
    lines = []
    for i, task in enumerate(mixture.held):
        first = next(iter(found.values()))[i]
        chance = "" if first.chance is None else score(first.chance)
        lines.append((task.name, first.metric, chance, *(score(scores[i].score) for scores in found.values())))
    columns = ("task", "metric", "chance", *found)
    show(shared.table(lines, columns, right=columns[2:]))
