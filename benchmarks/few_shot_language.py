"""Few labelled rows and a small language model: prompting, pattern-based fine-tuning and T-Few on RTE, CB and COPA.

    export MULTITUNE_DATA=/path/to/data    # <collection>/<task>/<split>.parquet
    python benchmarks/few_shot_language.py --threads 2 --write docs/language-tasks.md

Each finished run is kept in the store (--store) and never run again, so a killed benchmark goes on when the command is
given again. All systems answer the same rows in the same pattern. Those that train see the same training rows, the same
number of optimizer steps, and no row that is judged: the tensors of the last step are judged, and nothing is chosen.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
from _store import Row, append, check_markers, environment, find, read, write_between

import multitune
from multitune import Backbone, Pattern
from multitune.errors import DataWarning
from multitune.prompting import RandomExamples, rank
from multitune.tasks import TaskData

SUBSET_SEED = 2205  # draws the rows that are judged, once and for all runs alike
PART = "few_shot_language"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One task, its pattern, and how many of its validation rows are judged."""

    title: str
    pattern: Pattern
    num_judged: int


_NLI = "{premise}\nQuestion: {hypothesis} "
TASKS = {
    "super_glue/rte": Setting(
        title="RTE",
        pattern=Pattern(f"{_NLI}True or False?\nAnswer: {{mask}}", {"entailment": "True", "not_entailment": "False"}),
        num_judged=100,
    ),
    "super_glue/cb": Setting(
        title="CB",
        pattern=Pattern(
            f"{_NLI}True, False or Neither?\nAnswer: {{mask}}",
            {"entailment": "True", "contradiction": "False", "neutral": "Neither"},
        ),
        num_judged=56,
    ),
    "super_glue/copa": Setting(title="COPA", pattern=Pattern("{begun} {mask}"), num_judged=100),
}
NUM_TRAIN = 32
"""Labelled rows, those of T-Few's experiments on RTE, CB and COPA; the examples of a prompt are drawn from them."""
NUM_EXAMPLES = 4
STEPS = 25
BATCH_SIZE = 8
MAX_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to answer."""

    title: str
    method: str = ""
    """Tuning method; none for prompting."""
    examples: int = 0
    pattern: bool = True
    """Whether the language model's own head ranks the answers; a classification head otherwise."""
    config: Mapping[str, Any]
    """Settings of the training run beside those that all share."""


SYSTEMS = {
    "zero": System(title="prompt, zero-shot", config={}),
    "few": System(title=f"prompt, {NUM_EXAMPLES} examples", examples=NUM_EXAMPLES, config={}),
    "head": System(title="LoRA, classification head", method="lora", pattern=False, config={}),
    "pbft": System(title="PBFT: LoRA, cross-entropy over the choices", method="lora", config={"losses": "choice"}),
    "language": System(title="(IA)³, language loss alone", method="ia3", config={"losses": "language"}),
    "tfew": System(
        title="T-Few: (IA)³, three losses",
        method="ia3",
        config={"losses": "language+unlikelihood+choice", "learning_rate": 3e-3},
    ),
    "distilled": System(
        title=f"LoRA, distilled from {NUM_EXAMPLES} examples",
        method="lora",
        config={"losses": "choice", "distill_examples": NUM_EXAMPLES},
    ),
}
DEFAULT = ("zero", "few", "head", "pbft", "tfew")


# -------------------------------------------------------------------- rows


def load(task: str, num_train: int, num_judged: int, seed: int) -> TaskData:
    """A task with few training rows, drawn by seed, and some rows to judge, the same ones for every seed."""
    data = multitune.load_task(task)
    if data.task.kind == "multiple_choice":
        data = replace(data, train=data.train.map(begun), validation=data.validation.map(begun))
    judged = _draw(data.validation, num_judged, SUBSET_SEED)
    return replace(data, train=_draw(data.train, num_train, SUBSET_SEED + 1 + seed), validation=judged)


def begun(row: dict[str, Any]) -> dict[str, Any]:
    """COPA as text that goes on: "... because" or "... so", and each choice as what follows."""
    joint = {"cause": "because", "effect": "so"}[row["question"]]
    text = row["premise"].strip().rstrip(".")
    lowered = {name: row[name][:1].lower() + row[name][1:] for name in ("choice1", "choice2")}
    return {"begun": f"{text} {joint}", **lowered}


def _draw(table: Any, count: int, seed: int) -> Any:
    if count >= len(table):
        return table
    return table.select(sorted(random.Random(seed).sample(range(len(table)), count)))


# -------------------------------------------------------------------- one run


def run(cell: Row, backbone: Backbone, system: System, setting: Setting, threads: int) -> Row:
    """Train if the system does, and judge."""
    data = load(cell["task"], cell["num_train"], cell["num_judged"], cell["seed"])
    start = time.perf_counter()
    answer = prompt if not system.method else tune
    scores, parameters = answer(cell, backbone, system, setting, data)
    return {
        "cell": cell,
        "scores": scores,
        "parameters": parameters,
        "seconds": time.perf_counter() - start,
        "environment": environment(threads),
    }


def prompt(
    cell: Row, backbone: Backbone, system: System, setting: Setting, data: TaskData
) -> tuple[dict[str, float], int]:
    """Rank the answers of the bare backbone."""
    chosen = RandomExamples(data.train, system.examples, seed=cell["seed"]) if system.examples else None
    found = rank(backbone, data.task, setting.pattern, data.validation, examples=chosen, batch_size=16)
    return found.metrics, 0


def tune(
    cell: Row, backbone: Backbone, system: System, setting: Setting, data: TaskData
) -> tuple[dict[str, float], int]:
    """Train on the few rows and judge the last tensors."""
    if system.pattern:
        data = data.with_pattern(setting.pattern)
    training = cell["training"]
    # As often as the run reads them, so that it is one epoch: it evaluates once, at its end, and chooses nothing.
    needed = training["max_steps"] * training["batch_size"]
    rows = data.train.select([i % len(data.train) for i in range(needed)])
    few = data.train.select(range(min(4, len(data.train))))
    settings = {**training, "seed": cell["seed"], "length_grouped": False, "progress": False}
    result = multitune.train(backbone, replace(data, train=rows, validation=few), system.method, **settings)
    scores = multitune.evaluate(backbone, result.adapter, data, batch_size=16)
    return scores, result.num_method_parameters + result.num_head_parameters


def cells_of(args: argparse.Namespace) -> list[Row]:
    """Every run, those of prompting without settings of training."""
    shared = {"max_steps": args.steps, "batch_size": BATCH_SIZE, "max_length": MAX_LENGTH, "epochs": 1.0}
    found = []
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.systems:
                system, setting = SYSTEMS[name], TASKS[task]
                if name == "zero" and seed != args.seeds[0]:
                    continue  # nothing of it is drawn
                found.append(
                    {
                        "backbone": args.backbone,
                        "task": task,
                        "system": name,
                        "seed": 0 if name == "zero" else seed,
                        "pattern": asdict(setting.pattern),
                        "num_train": args.num_train,
                        "num_judged": min(args.limit_rows or setting.num_judged, setting.num_judged),
                        "examples": system.examples,
                        "training": {**shared, **system.config} if system.method else None,
                    }
                )
    return found


# -------------------------------------------------------------------- tables


def render(args: argparse.Namespace, rows: list[Row]) -> str:
    """The table of all finished runs, and how they were measured."""
    cells = cells_of(args)
    found = [row for row in (find(rows, cell) for cell in cells) if row is not None]
    if not found:
        return "No run has finished yet."
    about = found[-1]["environment"]
    tasks = [task for task in args.tasks if any(r["cell"]["task"] == task for r in found)]
    titles = [f"{TASKS[t].title} ({_judged(found, t)} rows)" for t in tasks]
    lines = [f"| system | trained | {' | '.join(titles)} | seconds |", f"|---|---:|{'---:|' * len(tasks)}---:|"]
    for name in args.systems:
        own = [r for r in found if r["cell"]["system"] == name]
        if own:
            cellwise = [_score([r for r in own if r["cell"]["task"] == task]) for task in tasks]
            parameters = " / ".join(f"{n:,}" for n in sorted({r["parameters"] for r in own}))
            seconds = sum(r["seconds"] for r in own)
            lines.append(f"| {SYSTEMS[name].title} | {parameters} | {' | '.join(cellwise)} | {seconds:.0f} |")
    missing = len(cells) - len(found)
    notes = [
        f"Accuracy in percent on `{args.backbone}`, one figure per seed (seeds {_words(args.seeds)}); an accuracy on "
        f"100 rows has a standard error of up to 5 points. {args.num_train} training rows by seed, {args.steps} steps "
        f"of {BATCH_SIZE} rows, texts cut to {MAX_LENGTH} tokens with the answer (prompts without training are not "
        f"cut). Seconds are of all tasks and seeds together.",
        f"{about['machine']}, {about['threads']} threads, Python {about['python']}, torch "
        f"{about['versions']['torch']}, {about['date']}; `python benchmarks/few_shot_language.py`.",
    ]
    if missing:
        notes.append(f"{missing} of {len(cells)} runs are still to come.")
    return "\n\n".join(["\n".join(lines), *notes])


def _judged(found: Iterable[Row], task: str) -> str:
    counts = sorted({r["cell"]["num_judged"] for r in found if r["cell"]["task"] == task})
    return " or ".join(map(str, counts))


def _score(rows: list[Row]) -> str:
    values = [100 * row["scores"]["accuracy"] for row in rows]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ({', '.join(f'{v:.0f}' for v in values)})"


def _words(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


# -------------------------------------------------------------------- the command


def work(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Run what has not been run."""
    store = args.store / f"{PART}.jsonl"
    todo = [cell for cell in cells_of(args) if find(read([store]), cell) is None]
    if not todo:
        return
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=DataWarning)  # that texts are cut stands under the table
    backbone = Backbone.load(args.backbone)
    begin = time.monotonic()
    for number, cell in enumerate(todo, start=1):
        if args.minutes and time.monotonic() - begin > 60 * args.minutes:
            say(f"{args.minutes:g} minutes are over; give the command again to go on")
            return
        row = run(cell, backbone, SYSTEMS[cell["system"]], TASKS[cell["task"]], args.threads)
        assert all(map(math.isfinite, row["scores"].values()))
        append(store, row)
        accuracy = 100 * row["scores"]["accuracy"]
        where = f"{cell['system']:9s} {cell['task']:16s} seed {cell['seed']}"
        say(f"[{number}/{len(todo)}] {where}  accuracy {accuracy:.1f}  {row['seconds']:.0f} s")


def main() -> None:
    args = _arguments()
    check_markers(args.write, PART)
    if not args.table:
        work(args, lambda line: print(line, flush=True))
    text = render(args, read([args.store / f"{PART}.jsonl"]))
    print(text)
    if args.write:
        write_between(args.write, PART, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all")
    parser.add_argument(
        "--systems", nargs="+", default=list(DEFAULT), choices=list(SYSTEMS), help=f"default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, metavar="N", help="labelled rows")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="optimizer steps")
    parser.add_argument("--limit-rows", type=int, metavar="N", help="judge N rows at most (trials)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--store", type=Path, default=Path(__file__).parent / "results", help="folder of the store")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table of the store")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
