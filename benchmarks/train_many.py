"""Is training many adapters together faster than one after the other, and how much memory does it take?

    python benchmarks/train_many.py [--jobs 16] [--steps 40] [--threads 2] [--rounds 1] [--write docs/results.md]

Jobs of 8 methods on 4 tasks of short texts are trained on minilm, each by itself with `train` and all together with
`train_many`, from the same settings. Each system is a process of its own, which loads the backbone and trains one step
before its clock starts. All are under way at once, but only one runs at a time: they take turns of `--turn` seconds,
stopped and continued by signals, and a clock counts its own turns only. So what else goes on in the machine, which can
change its speed from one minute to the next, meets all of them alike. Peak memory is that of the process, libraries and
backbone included; a single run is the largest of `--singles` of the jobs, each in a process of its own. The curves of
both are compared too: the largest difference of a logged loss stands in the last column. Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from _store import environment

import multitune
from multitune.training.results import peak_memory

BEGIN, END = "<!-- train_many:begin -->", "<!-- train_many:end -->"
METHODS = ("lora", "bitfit", "ia3", "ptuning_v2", "prompt", "houlsby", "aot_fc", "adalora")
TASKS = ("demo/sentiment", "demo/topic", "demo/urgency", "demo/paraphrase")
#: (tokens of a pass) of the systems in which all jobs train together.
BUDGETS = (512, 1024)
#: (passes at a time)
PASSES = (1, 2)


def jobs_of(count: int, steps: int) -> list[multitune.TrainJob]:
    """So many jobs: every method in turn, and with each round of them the next task."""
    data = {name: multitune.load_task(name) for name in TASKS}
    return [
        multitune.TrainJob(
            data=data[TASKS[(i + i // len(METHODS)) % len(TASKS)]],
            method=METHODS[i % len(METHODS)],
            settings={"seed": i, "max_steps": steps, "max_length": 64, "progress": False},
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class Found:
    """What a process sends back."""

    peak_bytes: int
    losses: list[list[float]]
    """Of every job, as logged."""


def run(system: str, count: int, steps: int, threads: int, parent: Connection) -> None:
    """Load, say that all is ready, wait for an answer, train, and send a `Found`.

    Args:
        system: "alone", "alone:I" for job I only, or "together:BUDGETxPASSES".
    """
    torch.set_num_threads(threads)
    backbone = multitune.Backbone.load("minilm")
    jobs = jobs_of(count, steps)
    what, _, number = system.partition(":")
    if what == "alone" and number:
        jobs = [jobs[int(number)]]
    warm = dict(jobs[0].settings) | {"max_steps": 1}
    multitune.train(backbone, jobs[0].data, "lora", **warm)
    parent.send("ready")
    parent.recv()
    results: list[multitune.TrainResult | multitune.FailedJob]
    if what == "alone":
        results = [multitune.train(backbone, job.data, job.method, **job.settings) for job in jobs]
    else:
        budget, passes = (int(part) for part in number.split("x"))
        results = multitune.train_many(backbone, jobs, token_budget=budget, passes=passes)
    losses = [[entry["loss"] for entry in result.history if "loss" in entry] for result in results]
    parent.send(Found(peak_memory(backbone.device), losses))


def start(system: str, options: argparse.Namespace) -> tuple[BaseProcess, Connection]:
    """`run` in a process of its own, once it is ready."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (system, options.jobs, options.steps, options.threads, there)
    process = context.Process(target=run, args=arguments, daemon=True)
    process.start()
    there.close()
    here.recv()
    return process, here


def in_turns(systems: Sequence[str], options: argparse.Namespace) -> dict[str, tuple[float, Found]]:
    """Seconds that each was running, and what it sent."""
    running = {system: start(system, options) for system in systems}
    seconds = dict.fromkeys(systems, 0.0)
    found: dict[str, Found] = {}
    for process, connection in running.values():
        _signal(process, signal.SIGSTOP)
        connection.send("go")
    try:
        while running:
            for system, (process, connection) in list(running.items()):
                began = time.perf_counter()
                _signal(process, signal.SIGCONT)
                ended = connection.poll(options.turn)
                if not ended:
                    _signal(process, signal.SIGSTOP)
                seconds[system] += time.perf_counter() - began
                if ended:
                    found[system] = connection.recv()
                    process.join()
                    del running[system]
    finally:
        for process, _ in running.values():
            process.kill()
    return {system: (seconds[system], found[system]) for system in systems}


def _signal(process: BaseProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per system."""
    systems = ["alone", *(f"together:{b}x{p}" for p in options.passes for b in options.budgets)]
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    memory: dict[str, list[int]] = {system: [] for system in systems}
    losses: dict[str, list[list[float]]] = {}
    for _ in range(options.rounds):
        for system, (took, found) in in_turns(systems, options).items():
            seconds[system].append(took)
            memory[system].append(found.peak_bytes)
            losses[system] = found.losses
    singles = [f"alone:{i}" for i in range(min(options.jobs, options.singles))]
    single = max(in_turns([name], options)[name][1].peak_bytes for name in singles)
    ratios = {
        system: [mine / alone for mine, alone in zip(seconds[system], seconds["alone"], strict=True)]
        for system in systems
    }
    return [
        {
            "system": system,
            "seconds": statistics.median(seconds[system]),
            "ratio": statistics.median(ratios[system]),
            "lowest_ratio": min(ratios[system]),
            "highest_ratio": max(ratios[system]),
            "peak_bytes": max(memory[system]),
            "peak_ratio": max(memory[system]) / single,
            "largest_difference": max(
                abs(a - b)
                for mine, alone in zip(losses[system], losses["alone"], strict=True)
                for a, b in zip(mine, alone, strict=True)
            ),
        }
        for system in systems
    ]


def name(system: str) -> str:
    """A system as a reader would call it."""
    what, _, limits = system.partition(":")
    return f"{what}, token_budget={limits.replace('x', ', passes=')}" if limits else what


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| system | seconds | of alone | peak memory, MB | of the largest single run | largest difference of a loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio, low, high = (f"{row[key]:.2f}" for key in ("ratio", "lowest_ratio", "highest_ratio"))
        spread = "" if low == high else f" ({low} to {high})"
        lines.append(
            f"| {name(row['system'])} | {row['seconds']:.1f} | {ratio}{spread} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['peak_ratio']:.2f} | {row['largest_difference']:.1e} |"
        )
    return "\n".join(lines)


def write(file: Path, text: str) -> None:
    """Put the text between the document's markers."""
    document = file.read_text("utf-8")
    before, begin, rest = document.partition(BEGIN)
    if not begin or END not in rest:
        raise SystemExit(f"{file} has no markers {BEGIN} and {END} to write between")
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")


def main() -> None:
    """Parse the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each job")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="how often all is measured")
    parser.add_argument("--turn", type=float, default=1.0, metavar="SECONDS", help="of a system before the next one's")
    parser.add_argument("--singles", type=int, default=len(METHODS), help="jobs whose memory is measured by itself")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="TOKENS")
    parser.add_argument("--passes", type=int, nargs="+", default=PASSES, metavar="N", help="passes at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    options = parser.parse_args()
    rows = compare(options)
    where = environment(options.threads)
    text = (
        f"{options.jobs} jobs of {options.steps} steps, {options.threads} threads, {options.rounds} "
        f"{'round' if options.rounds == 1 else 'rounds, of which medians'}, {where['machine']}.\n\n{table(rows)}"
    )
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n", "utf-8")
    if options.write:
        write(options.write, text)


if __name__ == "__main__":
    main()
