"""What frozen lower layers save: in training, when what they give is kept, and in a batch, when tasks share a text.

    python benchmarks/frozen_layers.py [--cases NAME ...] [--task glue/rte] [--rows 64] [--write docs/layers.md]

epochs: processor time of an epoch (its evaluation included) with and without `cache_frozen`, on the first rows of a
    task. The first epoch with it includes the one pass that fills the cache.
shared: one text asked of sixteen tasks in `Bank.predict`, with lower layers shared and not, in turn.
choice: freezing where hidden states turn (`first=semantic`) beside freezing by halves: score and processor time. Its
    runs are kept in a store (--store) and never run again; `multitune claims --results` judges a claim by them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from _cells import draw
from _harness import interleave
from _store import Row, append, check_markers, environment, find, read, write_between

import multitune as mt
from multitune import sharing
from multitune.tasks import TaskData

DOCUMENT_PART = "frozen_layers"
EPOCHS = 3
NUM_TASKS = 16
SEEDS = (0, 1, 2)

#: What is trained on minilm's six layers, by its name in the tables.
TRAINED = {
    "head": mt.HeadOnly(),
    "top layer": mt.TopLayers(count=1),
    "upper half": mt.TopLayers(count=3),
    "LoRA, top layer": mt.LoRA(layers=(5,)),
    "LoRA, upper half": mt.LoRA(layers=(3, 4, 5)),
}


def first_rows(task: str, rows: int) -> TaskData:
    """A task with its first training rows, and a quarter as many validation rows."""
    data = mt.load_task(task)
    train, validation = (
        table.select(range(min(n, len(table)))) for table, n in ((data.train, rows), (data.validation, rows // 4))
    )
    return TaskData(task=data.task, train=train, validation=validation, test=None)


def epoch_seconds(data: TaskData, method: mt.Method, cached: bool) -> tuple[list[float], int]:
    """Processor seconds of each epoch with its evaluation, and the bytes that were kept."""
    marks = []
    backbone = mt.Backbone.load("minilm")

    def note(line: str) -> None:
        if line.startswith("step "):
            marks.append(time.process_time())

    start = time.process_time()
    where = "memory" if cached else None
    result = mt.train(
        backbone, data, method, epochs=EPOCHS, batch_size=16, progress=False, report=note, cache_frozen=where
    )
    return [b - a for a, b in zip([start, *marks], marks, strict=False)], result.cached_bytes


def epochs(task: str, rows: int) -> Iterator[str]:
    """Rows of the table of training times."""
    data = first_rows(task, rows)
    yield f"Epochs on {len(data.train)} rows of {task}, at most 128 tokens, in batches of 16; CPU seconds:"
    yield ""
    yield "| trained | epoch, uncached | first epoch, cached | later epochs, cached | uncached / later | kept, MB |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, method in TRAINED.items():
        plain, _ = epoch_seconds(data, method, cached=False)
        kept, nbytes = epoch_seconds(data, method, cached=True)
        before, later = statistics.median(plain[1:]), statistics.median(kept[1:])
        yield f"| {name} | {before:.2f} | {kept[0]:.2f} | {later:.2f} | {before / later:.1f} | {nbytes / 1e6:.1f} |"


@contextmanager
def sharing_off() -> Iterator[None]:
    """No batch is worth cutting."""
    before, sharing.WORTH = sharing.WORTH, math.inf
    try:
        yield
    finally:
        sharing.WORTH = before


def random_adapter(backbone: mt.Backbone, data: TaskData, method: mt.Method, seed: int) -> mt.Adapter:
    """An adapter whose every tensor is random, so that none of its work can be left out."""
    generator = torch.Generator().manual_seed(seed)
    head = mt.Head.for_task(data.task, pooling="cls")

    def drawn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: torch.randn(t.shape, generator=generator) * 0.02 for k, t in tensors.items()}

    params, head_params = drawn(method.init(backbone, generator)), drawn(head.init(backbone, generator))
    return mt.Adapter(
        name=f"task {seed}", method=method, params=params, head=head, head_params=head_params, task=data.task,
        backbone=backbone.describe(), max_length=128,
    )  # fmt: skip


def shared(task: str, rows: int) -> Iterator[str]:
    """Rows of the table of a text that many tasks share."""
    data, backbone = first_rows(task, rows), mt.Backbone.load("minilm")
    texts = iter([row for row in data.train if row] * 100)
    yield f"One row of {task} asked of {NUM_TASKS} tasks, `Bank.predict`, one thread, milliseconds (medians):"
    yield ""
    yield "| trained | each row alone | lower layers shared | ratio |"
    yield "|---|---:|---:|---:|"
    for name, method in {k: m for k, m in TRAINED.items() if not m.changes_weights}.items():
        bank = mt.Bank(backbone)
        for i in range(NUM_TASKS):
            bank.add(f"task {i}", random_adapter(backbone, data, method, i))

        def ask(row: dict[str, object], bank: mt.Bank = bank) -> object:
            return bank.predict([(task_name, row) for task_name in bank.names])

        def ask_apart(row: dict[str, object], bank: mt.Bank = bank) -> object:
            with sharing_off():
                return ask(row, bank)

        systems = {"apart": ask_apart, "shared": ask}
        times = interleave(systems, lambda: dict(next(texts)), device=backbone.device, seconds=3, least_rounds=15)
        apart, together = (statistics.median(times[key]) for key in systems)
        yield f"| {name} | {apart:.1f} | {together:.1f} | {apart / together:.1f} |"


def choice(task: str, rows: int | None, store: Path) -> Iterator[str]:
    """Rows of the table of where to cut; every run is also kept in the store, by which claims are judged."""
    data = mt.load_task(task)
    if rows is not None:
        data = replace(data, train=draw(data.train, rows))
    kinds = {
        "every layer": mt.Freeze(first=0),
        "lower half": mt.Freeze(first=0, last=2),
        "upper half": mt.Freeze(first=3),
        "semantic": mt.Freeze(first="semantic"),
        "LoRA, every layer": mt.LoRA(),
        "LoRA, upper half": mt.LoRA(layers=(3, 4, 5)),
        "LoRA, semantic": mt.LoRA(layers="semantic"),
    }
    metric = data.task.metric
    yield f"Where to cut on {task} ({len(data.train)} rows), 5 epochs, seeds {SEEDS}, `cache_frozen=auto`:"
    yield ""
    yield f"| trained | layers | parameters | {metric} | CPU s |"
    yield "|---|---|---:|---:|---:|"
    for name, method in kinds.items():
        cell = {"backbone": "minilm", "task": task, "rows": len(data.train), "trained": name}
        runs = [_trained(data, method, cell | {"seed": seed}, store / f"{DOCUMENT_PART}.jsonl") for seed in SEEDS]
        scores, layers = [run["score"] for run in runs], runs[0]["layers"]
        spread = f"{100 * statistics.mean(scores):.1f} ± {100 * statistics.stdev(scores):.1f}"
        shown = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        seconds = statistics.median(run["seconds"] for run in runs)
        yield f"| {name} | {shown} | {runs[0]['parameters']:,} | {spread} | {seconds:.1f} |"


def _trained(data: TaskData, method: mt.Method, cell: Row, store: Path) -> Row:
    """One run of `choice`, from the store where that has it."""
    done = find(read([store]), cell)
    if done is not None:
        return done
    backbone, start = mt.Backbone.load(cell["backbone"]), time.process_time()
    found = mt.train(backbone, data, method, epochs=5, seed=cell["seed"], cache_frozen="auto", progress=False)
    seconds = time.process_time() - start
    used = found.adapter.method
    layers = used.trained_layers(backbone) if isinstance(used, mt.Freeze) else used.layers or range(backbone.num_layers)
    row = {
        "cell": cell,
        "score": found.best_metric,
        "metric": data.task.metric,
        "seconds": seconds,
        "layers": list(layers),
        "parameters": found.num_method_parameters,
        "environment": environment(1),
    }
    append(store, row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=["epochs", "shared", "choice"], choices=["epochs", "shared", "choice"]
    )
    parser.add_argument("--task", default="glue/rte", help="task of the times")
    parser.add_argument("--rows", type=int, default=64, help="training rows of the times")
    parser.add_argument("--choice-task", default="demo/topic", help="task of the scores")
    parser.add_argument("--choice-rows", type=int, metavar="N", help="its training rows, drawn; by default all")
    parser.add_argument("--store", type=Path, default=Path(__file__).parent / "results", help="folder of the scores")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between this document's markers")
    args = parser.parse_args()
    check_markers(args.write, DOCUMENT_PART)
    torch.set_num_threads(1)
    tables = {
        "epochs": (epochs, args.task, args.rows),
        "shared": (shared, args.task, args.rows),
        "choice": (choice, args.choice_task, args.choice_rows, args.store),
    }
    lines = []
    for case in args.cases:
        run, *given = tables[case]
        for line in run(*given):
            print(line, flush=True)
            lines.append(line)
        lines.append("")
    facts = environment(1)
    lines.append(f"Backbone minilm; {facts['machine']}, 1 thread, torch {facts['versions']['torch']}.")
    if args.write:
        write_between(args.write, DOCUMENT_PART, "\n".join(lines))


if __name__ == "__main__":
    main()
