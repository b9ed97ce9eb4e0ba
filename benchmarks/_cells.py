"""A benchmark as cells, each all that a run depends on: run once, kept in a store, shown in a document's table."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # runs are forked

from _store import Row, append, check_markers, environment, find, read, write_between

SUBSET_SEED = 2305
"""Draws the subsets of rows, once and for all runs alike."""


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that all these benchmarks have."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="default: 0")
    made.add_argument("--quick", action="store_true", help="a few rows and two steps: does everything run?")
    made.add_argument("--threads", type=int, default=1, help="torch threads")
    made.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="run the I-th of N shares")
    made.add_argument("--minutes", type=float, help="start no run after this time")
    made.add_argument("--store", type=Path, default=Path(__file__).parent / "results", help="folder of the stores")
    made.add_argument("--table", action="store_true", help="run nothing; print the tables of all stores")
    made.add_argument("--write", type=Path, metavar="FILE", help="put the tables between this document's markers")
    return made


def go(
    name: str,
    args: argparse.Namespace,
    cells: list[Row],
    work: Callable[[Row], Row],
    describe: Callable[[Row], str],
    render: Callable[[list[Row], int], str],
) -> None:
    """Run the cells of this shard that no store has, then show the tables.

    Args:
        work: runs a cell in a process of its own, and returns what goes into its row beside cell and environment.
        describe: one line about a row.
        render: the tables of the finished rows, and of how many cells are missing.
    """
    number, count = args.shard
    if args.write and not args.table and count > 1:
        raise SystemExit(f"--write {args.write}: one shard is not the whole table; give --table --write at the end")
    check_markers(args.write, name)
    begin = time.monotonic()
    mine = [] if args.table else cells[number - 1 :: count]
    for position, cell in enumerate(mine, start=1):
        if find(_finished(args.store, name), cell) is not None:
            continue
        if args.minutes and time.monotonic() - begin > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over; give the command again to go on", flush=True)
            break
        row = {"cell": cell, **_alone(work, cell, args.threads), "environment": environment(args.threads)}
        append(args.store / f"{name}-{number}of{count}.jsonl", row)
        print(f"[{position}/{len(mine)}] {describe(row)}", flush=True)
    if args.table or count == 1:
        found = [find(_finished(args.store, name), cell) for cell in cells]
        done = [row for row in found if row is not None]
        text = render(done, len(cells) - len(done)) if done else "Not run yet."
        print(text)
        if args.write:
            write_between(args.write, name, text)


def draw(table: Any, num_rows: int) -> Any:
    """Some rows of a table, the same ones every time, in the table's order."""
    if num_rows >= len(table):
        return table
    return table.select(sorted(random.Random(SUBSET_SEED).sample(range(len(table)), num_rows)))


def by_chance(rows: int) -> int:
    """Points of 100 up to which two shares of right answers to so many rows differ by chance alone.

    The half-width of the 95 % interval of such a difference where it is widest, at shares of a half.
    """
    return round(100 * 1.96 * math.sqrt(0.5 / rows))


def about(done: list[Row], missing: int, command: str) -> list[str]:
    """Lines on where and how the rows of a table were measured."""
    last = max((row["environment"] for row in done), key=lambda e: e["date"])
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("torch", "transformers"))
    python = f"Python {last['python']}"
    lines = [
        f"- {last['machine']}, {last['threads']} thread(s) per run, {python}, {versions}; {last['date']}.",
        f"- Command: `{command}`.",
    ]
    return [*lines, *([f"- {missing} runs of {missing + len(done)} are still missing."] if missing else [])]


def _finished(store: Path, name: str) -> list[Row]:
    return read(sorted(store.glob(f"{name}-*.jsonl")))


def _alone(work: Callable[[Row], Row], cell: Row, threads: int) -> Row:
    """What `work` returns, from a process of its own, so that one run's memory and state are not another's."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        import torch

        torch.set_num_threads(threads)
        sender.send(work(cell))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        found: Row = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the run {cell} died with exit code {process.exitcode}; see the message above") from None
    process.join()
    return found


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is no shard; the first of two is 1/2")
    return int(number), int(count)
