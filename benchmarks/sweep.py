"""Which learning rate is a method's default?  Every method, a few rates, three demo tasks; mean validation score.

    python benchmarks/sweep.py --threads 2 --json benchmarks/results/sweep.json

Needs no data and no network. Each finished cell is kept in the store (--store) and never run again; a killed
sweep goes on when the command is given again, and two with other --methods may share one store. The demo tasks
are small (some 170 rows, 55 steps): they tell a method's region of useful rates, not a difference of one point.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from _store import Row, append, environment, find, read

import multitune

TASKS = ("demo/sentiment", "demo/intent", "demo/topic")  # two, eight and six labels

MIDDLE = (3e-4, 1e-3, 3e-3, 1e-2)
HIGH = (1e-3, 3e-3, 1e-2, 3e-2)
HIGHEST = (3e-3, 1e-2, 3e-2, 1e-1)
GRIDS = {
    "aot_fc": MIDDLE,
    "aot_kronecker": HIGH,
    "bitfit": HIGH,
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
    "head": HIGH,
    "houlsby": MIDDLE,
    "ia3": HIGHEST,
    "layernorm": HIGH,
    "lora": MIDDLE,
    "pfeiffer": MIDDLE,
    "prompt": HIGHEST,
    "ptuning_v2": HIGHEST,
}
"""Rates to try; a method that the table lacks is tried around its recipe's rate."""

NEAR = 0.01
"""Means this close to the best count as good: one validation row of one task is 0.006 of the mean."""


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    backbone = multitune.Backbone.load(args.backbone)
    cells = [
        _cell(args, method, rate, task)
        for task in args.tasks
        for method in args.methods
        for rate in args.rates or GRIDS.get(method) or _around_recipe(method)
    ]
    for number, cell in enumerate(cells, start=1):
        if args.table or find(read([args.store]), cell) is not None:
            continue
        row = run(backbone, cell, args.threads)
        append(args.store, row)
        name = f"{cell['method']:14s} {cell['learning_rate']:<7g} {cell['task']:18s}"
        print(f"[{number}/{len(cells)}] {name} {row['score']:.4f}  {row['seconds']:.1f} s", flush=True)
    rows = read([args.store])
    found = {_key(cell): row for cell in cells if (row := find(rows, cell)) is not None}
    table = summarise(found)
    print(render(table))
    if args.json:
        out = {"settings": _settings(args), "environment": environment(args.threads), "methods": table}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(out, indent=2) + "\n", "utf-8")


def run(backbone: multitune.Backbone, cell: Row, threads: int) -> Row:
    """Train one cell; a run that diverges scores 0."""
    data = multitune.load_task(cell["task"])
    method = multitune.get_method(cell["method"])()
    begin = time.perf_counter()
    try:
        result = multitune.train(
            backbone,
            data,
            method,
            learning_rate=cell["learning_rate"],
            epochs=cell["epochs"],
            batch_size=cell["batch_size"],
            pooling=cell["pooling"],
            seed=cell["seed"],
            progress=False,
        )
        score, metrics = result.best_metric, dict(result.adapter.metrics)
    except multitune.ConfigError as error:
        if "diverged" not in str(error):
            raise
        score, metrics = 0.0, {}
    return {
        "cell": cell,
        "score": score,
        "metrics": metrics,
        "seconds": time.perf_counter() - begin,
        "environment": environment(threads),
    }


def summarise(found: dict[tuple[str, float, str], Row]) -> Row:
    """Per method and rate the score of each task and their mean, and the rate to take."""
    scores: dict[str, dict[float, dict[str, float]]] = {}
    for (method, rate, task), row in sorted(found.items()):
        scores.setdefault(method, {}).setdefault(rate, {})[task] = row["score"]
    table: Row = {}
    for method, rates in scores.items():
        most = max(len(tasks) for tasks in rates.values())  # a rate whose tasks are not all done has to wait
        means = {rate: statistics.mean(tasks.values()) for rate, tasks in rates.items() if len(tasks) == most}
        table[method] = {
            "mean": {f"{rate:g}": mean for rate, mean in means.items()},
            "tasks": {f"{rate:g}": tasks for rate, tasks in rates.items()},
            "choice": choose(means),
        }
    return table


def choose(means: dict[float, float]) -> float:
    """The middle of the run of good rates around the best one; of two in the middle, the smaller."""
    rates = sorted(means)
    good = [means[r] >= max(means.values()) - NEAR for r in rates]
    first = last = rates.index(max(rates, key=lambda r: (means[r], -r)))
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(rates) - 1 and good[last + 1]:
        last += 1
    return rates[(first + last) // 2]


def render(table: Row) -> str:
    """The table as markdown: the chosen rate stands in bold."""
    rates = sorted({float(r) for entry in table.values() for r in entry["mean"]})
    lines = [
        "| method | " + " | ".join(f"{r:g}" for r in rates) + " | choice |",
        "|---|" + "---:|" * (len(rates) + 1),
    ]
    for method, entry in table.items():
        cells = []
        for rate in rates:
            mean = entry["mean"].get(f"{rate:g}")
            text = "" if mean is None else f"{100 * mean:.1f}"
            cells.append(f"**{text}**" if text and rate == entry["choice"] else text)
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {entry['choice']:g} |")
    return "\n".join(lines)


def _cell(args: argparse.Namespace, method: str, rate: float, task: str) -> Row:
    return {"method": method, "learning_rate": rate, "task": task, **_settings(args)}


def _settings(args: argparse.Namespace) -> Row:
    return {k: getattr(args, k) for k in ("backbone", "epochs", "batch_size", "pooling", "seed")}


def _key(cell: Row) -> tuple[str, float, str]:
    return cell["method"], cell["learning_rate"], cell["task"]


def _around_recipe(method: str) -> tuple[float, ...]:
    rate = multitune.get_method(method).recipe.learning_rate
    return tuple(float(f"{rate * factor:.1g}") for factor in (0.1, 0.3, 1, 3))


def _arguments() -> argparse.Namespace:
    names = multitune.method_names()
    here = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="NAME", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--rates", nargs="+", type=float, metavar="RATE", help="default: a table per method")
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--store", type=Path, default=here / "sweep.jsonl", help="finished cells, one a line")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--table", action="store_true", help="run nothing; print what the store holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
