"""Are the memory estimates of `multitune plan` right? Each method is trained for a few steps and its peak measured.

    python benchmarks/planner.py [--methods NAME ...] [--rows 32] [--length 64] [--write docs/results.md]

Every run is a process of its own: it loads the backbone, trains three steps on rows of exactly the asked length, and
reports the most memory it held beyond what it held before training (Linux). The estimate is the planner's, without
the backbone's weights, which are there before. The system's allocator is told to give large blocks back at once
(`MALLOC_MMAP_THRESHOLD_`, glibc); without that a process may hold up to twice what is in use.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from _memory import peak_memory, reset_peak_memory
from _store import check_markers, environment, write_between
from datasets import Dataset

import multitune
from multitune import planner
from multitune.tasks import TaskData

DOCUMENT_PART = "planner"
STEPS = 3


def measure(method: str, rows: int, length: int, sender: Any) -> None:
    """Train a few steps and send the growth of the peak in bytes, and the estimate."""
    torch.set_num_threads(1)
    backbone = multitune.Backbone.load("minilm")
    workload = planner.Workload(rows=rows, length=length, tasks=1)
    instance = multitune.get_method(method)()
    cost = planner.cost_of(backbone, instance, workload, rounds=0)
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    task = multitune.Task(name="words", kind="classification", template=("{text}",), label="label", labels=("a", "b"))
    text = " ".join(["word"] * (length - 2))  # one token each, and two special ones
    table = Dataset.from_list([{"text": text, "label": "ab"[i % 2]} for i in range(rows * STEPS)])
    data = TaskData(task=task, train=table, validation=table.select(range(2)), test=None)
    multitune.train(backbone, data, instance, batch_size=2, max_steps=1, max_length=length, progress=False)  # warm up
    reset_peak_memory()
    before = peak_memory() or 0
    multitune.train(backbone, data, instance, batch_size=rows, max_steps=STEPS, max_length=length, progress=False)
    sender.send(((peak_memory() or 0) - before, cost.training_bytes - weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=multitune.method_names(), metavar="NAME")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    args = parser.parse_args()
    check_markers(args.write, DOCUMENT_PART)
    lines = ["| method | estimated, MB | measured, MB | estimate / measured |", "|---|---:|---:|---:|"]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by glibc when a child starts
    context = multiprocessing.get_context("spawn")
    for method in args.methods:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=measure, args=(method, args.rows, args.length, sender))
        child.start()
        sender.close()
        measured, estimated = receiver.recv()
        child.join()
        ratio = f"{estimated / measured:.2f}" if measured > 0 else ""
        lines.append(f"| {method} | {estimated / 1e6:,.0f} | {measured / 1e6:,.0f} | {ratio} |")
        print(lines[-1], flush=True)
    facts = environment(1)
    lines += [
        "",
        f"{args.rows} rows of {args.length} tokens on minilm, without the backbone's weights; {facts['machine']}.",
    ]
    if args.write:
        write_between(args.write, DOCUMENT_PART, "\n".join(lines))


if __name__ == "__main__":
    main()
