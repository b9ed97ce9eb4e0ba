"""The rows that a training run is told to learn from: a task's by name, a mixture's, or the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from multitune.cli.mixtures import read_mixture
from multitune.cli.options import LISTS, OWN_DATA, OWN_PATTERN
from multitune.errors import ConfigError
from multitune.tasks import Pattern, TaskData, load_table, load_task
from multitune.yaml_file import read_names

#: Under so many rows to judge by, it is said how much one of them moves the score.
FEW_ROWS = 50
#: Above this share of the rows to judge by that are among those to learn from, it is said how many.
_SHARED = 0.1
#: From this share of the table on, a larger one is not advised.
_LARGE = 0.25


def task_data(chosen: Mapping[str, Any], seed: int) -> TaskData:
    """The task and its tables, with examples in its prompts where they are asked for.

    Raises:
        ConfigError: no task or more than one is given, or a number of examples that is none.
    """
    data = _in_pattern(_data_alone(chosen, seed), chosen)
    if "examples" not in chosen:
        return data
    k = chosen["examples"]
    if not isinstance(k, int) or isinstance(k, bool):
        raise ConfigError(f"examples={k!r} is not possible; give a whole number, such as 2")
    from multitune.prompting import with_examples

    return with_examples(data, k, seed=seed)


def _data_alone(chosen: Mapping[str, Any], seed: int) -> TaskData:
    """The task and its tables, by name, as a mixture, or from the user's own files."""
    own: dict[str, Any] = {
        key: read_names(chosen[key], f"'{key}' in the recipe") if key in LISTS else str(chosen[key])
        for key in OWN_DATA
        if key in chosen
    }
    named = [key for key in ("task", "mixture") if key in chosen]
    if named:
        others = [*named[1:], *own]
        if others:
            flag = others[0].replace("_", "-")
            raise ConfigError(
                f"--{named[0]} brings its own data, so --{flag} cannot be honoured; give --task, --mixture or --train "
                f"FILE"
            )
        return load_task(str(chosen["task"])) if named == ["task"] else read_mixture(chosen["mixture"]).data()
    if "train" not in own:
        raise ConfigError(
            "train needs data: --task NAME (`multitune tasks` lists them), --train FILE, or --mixture FILE"
        )
    return load_table(own.pop("train"), **own, seed=seed)


def remarks(data: TaskData, *, own: bool) -> list[str]:
    """What makes a score say less than it seems to, in sentences: few rows to judge by, or rows that were learnt.

    own: whether the rows are a table of the user's, who can choose others.
    """
    judged, found = len(data.validation), []
    if data.task.kind in ("classification", "multiple_choice") and 0 < judged < FEW_ROWS:
        share = " or --validation 0.3" if judged < _LARGE * (judged + len(data.train)) else ""
        more = f"; give more with --validation FILE{share} before relying on the score" if own else ""
        only = f"only {judged} rows" if judged > 1 else "only one row"
        found.append(f"judged by {only}: one row more or less is {100 / judged:.1f} points of accuracy{more}")
    learnt = _learnt(data) if own else 0
    if learnt > max(1, _SHARED * judged):
        found.append(
            f"{learnt} of the {judged} rows to judge by have the texts of rows to learn from, so that the score is of "
            f"rows learnt by heart too; drop doubles from the table, or give rows of their own with --validation FILE"
        )
    return found


def _learnt(data: TaskData) -> int:
    """How many rows to judge by have the same texts as one to learn from."""

    def texts(table: Any) -> Iterator[str]:
        return map(repr, zip(*(table[column] for column in data.task.columns), strict=True))

    seen = set(texts(data.train))
    return sum(row in seen for row in texts(data.validation))


def _in_pattern(data: TaskData, chosen: Mapping[str, Any]) -> TaskData:
    """The data in the pattern that was chosen, if one was.

    Raises:
        ConfigError: what only a pattern has, without one; or a verbalizer of another form.
        TaskError: a pattern that does not fit the task.
    """
    if "pattern" not in chosen:
        lone = [key for key in OWN_PATTERN if key in chosen]
        if lone:
            raise ConfigError(f"--{lone[0]} belongs to a pattern; give --pattern too, such as --pattern '{{text}}'")
        return data
    said = chosen.get("verbalizer", {})
    if not isinstance(said, Mapping):
        raise ConfigError(f"'verbalizer' in the recipe maps labels to texts, such as {{yes: 'True'}}, not {said!r}")
    for label, text in said.items():
        texts = text if isinstance(text, list) else [text]
        # YAML makes bools of yes, no, true and false.
        if isinstance(label, bool) or not all(isinstance(t, str) for t in texts):
            raise ConfigError(f"'verbalizer' in the recipe: {label!r}: {text!r} is no text; put quotes around it")
    words = {str(label): text for label, text in said.items()}
    instruction = str(chosen.get("instruction", ""))
    return data.with_pattern(Pattern(str(chosen["pattern"]), words, instruction=instruction))
