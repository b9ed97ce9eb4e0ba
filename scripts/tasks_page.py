"""The page of tasks and suites: tasks as they load from the folder that MULTITUNE_DATA names, suites as they ship."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from multitune.tasks import TaskData, list_tasks, load_task
from multitune.tasks.metrics import METRICS
from multitune.tasks.schema import usual_metric
from multitune.tasks.specs import SPECS, find_spec

INTRODUCTION = """\
# Tasks and suites

`mt.load_task(NAME)` and `multitune train --task NAME` read a task by its name; `multitune tasks` lists those at hand,
and `multitune tasks NAME` shows one. Tasks named `demo/` ship with the library. The others are read from the folder
that the environment variable `MULTITUNE_DATA` names, or `data_dir=`, which holds
`<collection>/<task>/<split>.parquet`. Where neither is given, a task with a data set in the last column is read from
the Hugging Face hub; its columns are those of the folder, its rows may be more.

- **Rows** are those to learn from, to judge by, and of the test split where its labels are published, in the folder
  that this page was built with. Where a data set has no validation split, a tenth of the rows to learn from is held
  out, the same every time; of the fifty rows of a RAFT task half. `glue/mnli` is judged by the matched rows,
  `glue/mnli_mismatched` by the others, where folder or hub have them.
- Tasks without rows to learn from are published for judging alone: `evaluate(backbone, adapter, load_task(NAME),
  split="test")`. The makers of `bbh/` ask that it never be trained on.
- **Metrics** named with *and* are means of the parts, which are reported too. `f1a_and_em` (MultiRC) counts a
  question when all of its answers are right, and `choice_f1_and_em` (ReCoRD) compares the chosen entity with the
  right one that it is most like. Both are SuperGLUE's ([Wang et al. 2019](https://arxiv.org/abs/1905.00537)).
- Some tables get columns as they are read: `query_start` and `query_end` of ReCoRD, `marked` of WSC (the text with
  stars around the pronoun that is meant), `context` of PubMedQA, `right` of AQuA. Rows that such an adapter is to
  answer need them too.

## A table of your own

`multitune train --train FILE` and `mt.load_table(FILE)` read a CSV, TSV, JSONL, JSON or Parquet file, a folder with one
such file a split (`train.csv`, `validation.csv`), or a data set of the hub; `multitune compare` a file or a folder.
Columns of usual names are found; `--text`, `--text-pair` and `--label` name others, and a text may be a template over
several columns, `--text "{title} {body}"`. Without validation rows a tenth is held out (`--validation 0.3` holds
out more). Lists need JSONL or Parquet.

{kinds}
The numbers of a regression may be shares, grades or prices: an adapter learns them less their mean, over their standard
deviation, both of its training rows, and answers in their own unit. They train alike with one learning rate, and on a
backbone in bfloat16 an answer is good to about a hundredth of the deviation. The loss that is shown counts in variances
of the training rows: 1 is what their mean would get as the answer to each. `mse` and `mae` are in the numbers' own
unit. Numbers whose deviation is below a hundred-thousandth of their size (times in seconds since 1970, some minutes
apart) are refused: take their mean off first.

Label names are the values of the column, sorted, unless `--labels` gives them in an order; a whole number may stand
for a name by its place, where no name is a number. `tag_f1` is for tags such as `B-PER`; others are judged by
`token_accuracy`.

### Choices that are a list

A choice whose options differ from row to row is a `Task` whose one choice is a column of lists:

```python
import multitune as mt

task = mt.Task(name="capital", kind="multiple_choice", template=("question",), choices=("options",), label="answer")
row = {"question": "The capital of Peru?", "options": ["Lima", "Quito", "La Paz"], "answer": "Lima"}
print(task.encode(row).target)  # (0,): the places of all options that are right
```

`multitune train --train FILE --text question --choices options --label answer` and `mt.load_table(FILE,
text="question", choices=("options",), label="answer")` read such rows from a table of your own.
"""

SUITES = """\
## Suites

A suite is a recipe that ships with the library: tasks with the part of their rows that is used and why, methods, seeds
and settings. They are sized for two CPU cores; their files say what to take out for all rows. `multitune compare NAME`
runs one and goes on where it was stopped, `multitune compare NAME --print-recipe` prints it to be edited; `overhead`
trains nothing and is the grid of `benchmarks/overhead.py`. `glue` and `superglue` read the hub's tables where
`MULTITUNE_DATA` names no folder; the others need the folder.

| suite | backbone | tasks | methods | seeds | rows |
|---|---|---|---|---|---|
"""


#: Kind of task -> how its text and its label stand in a row.
KINDS = {
    "classification": ("a text, or a pair", "a name, or a whole number"),
    "regression": ("a text, or a pair", "a number (whole ones: `--kind regression`)"),
    "multilabel": ("a text, or a pair", "a list of names, or `a|b` in one text (`--kind multilabel`)"),
    "multiple_choice": (
        "a text, and `--choices` with a column for each choice, or one column of lists",
        "the number of the right choice from 0, or the name of its column",
    ),
    "tagging": ("a list of words", "a list with a tag for each word"),
    "generation": ("a prompt; `--kind generation`", "a text, or a list of texts all of which are right"),
}


def kinds_table() -> str:
    """What a row of each kind holds, and every metric that judges it, the usual one first."""
    lines = ["| kind | text | label column | `--metric`, the usual one first |", "|---|---|---|---|"]
    for kind, (text, label) in KINDS.items():
        usual = usual_metric(kind, ("O", "B-PER"))  # labels matter to tags alone
        others = [name for name, metric in METRICS.items() if kind in metric.kinds and name != usual]
        metrics = ", ".join(f"`{name}`" for name in (usual, *others))
        lines.append(f"| {kind} | {text} | {label} | {metrics} |".replace("a|b", "a\\|b"))
    return "\n".join(lines) + "\n"


def tasks_page() -> str:
    """The page, without the line that says that it is generated."""
    suites = SUITES + "\n".join(map(_suite, _suites())) + "\n"
    lines = [INTRODUCTION.replace("{kinds}", kinds_table()), suites, "## Tasks\n"]
    for collection, names in groupby(_ordered(list_tasks()), key=lambda name: name.partition("/")[0]):
        lines += [f"### {collection}\n", "| task | kind | labels | rows | metric | source |"]
        lines.append("|---|---|---|---|---|---|")
        lines += [_row(name, load_task(name)) for name in names]
        lines.append("")
    return "\n".join(lines)


def _ordered(names: tuple[str, ...]) -> list[str]:
    """Collection by collection: first those of the table of tasks in its order, then the others by name."""
    table = list(dict.fromkeys(name.partition("/")[0] for name in SPECS))
    places = {name: place for place, name in enumerate(SPECS)}

    def place(name: str) -> tuple[Any, ...]:
        collection = name.partition("/")[0]
        known = table.index(collection) if collection in table else len(table)
        return known, collection, places.get(name, len(places)), name

    return sorted(names, key=place)


def _row(name: str, data: TaskData) -> str:
    spec, task = find_spec(name), data.task
    tables = (data.train, data.validation, data.test)
    rows = " / ".join("–" if not table else f"{len(table):,}" for table in tables)
    hub = spec.hub.format(task=name.partition("/")[2]) if spec is not None and spec.hub else ""
    shown = f"`{hub}`" if hub else "ships" if spec is not None and spec.shipped else "folder"
    kind = task.kind.replace("_", " ")
    return f"| `{name}` | {kind} | {len(task.labels) or '–'} | {rows} | `{task.metric}` | {shown} |"


def _suites() -> Iterator[tuple[str, dict[str, Any]]]:
    folder = Path(str(resources.files("multitune.comparing"))) / "suites"
    for file in sorted(folder.glob("*.yaml")):
        yield file.stem, yaml.safe_load(file.read_text("utf-8"))


def _suite(item: tuple[str, dict[str, Any]]) -> str:
    name, suite = item
    link = f"[{name}](../src/multitune/comparing/suites/{name}.yaml)"
    if "tasks" not in suite:
        grid = f"batches of {_listed(suite['rows'])} rows of {_listed(suite['lengths'])} tokens"
        return f"| {link} | {suite['backbone']} | – | all that mix | – | {grid} |"
    tasks = [{"task": task} if isinstance(task, str) else task for task in suite["tasks"]]
    few = suite.get("few_shot")
    if few is not None:
        rows = f"{_listed(few['per_class'])} a label, each drawn {few['subset_seeds']} times"
    else:
        most = max(task.get("train_rows", 0) for task in tasks)
        rows = f"at most {most:,} to learn from" if most else "all"
    named = ", ".join(task["task"].partition("/")[2] for task in tasks)
    return f"| {link} | {suite['backbone']} | {named} | {len(suite['methods'])} | {suite['seeds']} | {rows} |"


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
