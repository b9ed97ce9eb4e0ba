"""The results of a mixed batch as the tables that docs/results.md shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _harness import Result
from _store import environment

INTRODUCTION = """\
Medians of rounds in which the systems take turns in one process on the same inputs; banks of 128 adapters, those of a
batch drawn at random; "new batch" makes the plan anew each time; "of rounds" is the median of ratios within a round.
PEFT is its LoRA with `adapter_names` per row, on the same tensors.
{machine}, {threads} threads, Python {python}, {versions}, {date}; `python benchmarks/mixed_batch.py`."""


def markdown(rows: Sequence[Result], titles: Mapping[str, str], threads: int) -> str:
    """All tables, with how they were measured."""
    about = environment(threads)
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers", "peft"))
    parts = [INTRODUCTION.format(**{**about, "versions": versions})]
    timed = [r for r in rows if r.median_ms is not None]
    heads = ("case", "system", "median ms", "ratio to the bare backbone", "of rounds", "limit we set")
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---:|---:|---:|---:|"]
    lines += [_time_row(r) for r in timed]
    parts += [*(f"({case}) {title}." for case, title in titles.items() if any(r.case == case for r in timed))]
    parts[1:] = ["\n".join(f"- {line}" for line in parts[1:]), "\n".join(lines)]
    memory = [r for r in rows if r.resident_bytes is not None]
    if memory:
        parts.append("\n".join([*_MEMORY_HEADS, *map(_memory_row, memory)]))
    return "\n\n".join(parts)


def _time_row(r: Result) -> str:
    limit = "" if r.limit is None else f"{r.limit}{', **missed**' if r.verdict == 'MISSED' else ''}"
    note = f" ({r.note})" if r.note else ""
    by_first = " of the 1st" if r.ratio_to_first is not None else ""
    return (
        f"| {r.case} | {r.system}{note} | {r.median_ms:.1f} | {r.ratio:.3f}{by_first} | {r.median_of_ratios:.3f} "
        f"| {limit} |"
    )


_MEMORY_HEADS = (
    "(g) memory for each adapter in a bank:\n",
    "| method | trained numbers | the bank says, kB | the process grows by, kB |",
    "|---|---:|---:|---:|",
)


def _memory_row(r: Result) -> str:
    assert r.resident_bytes is not None and r.growth_bytes is not None
    return f"| {r.system} | {r.parameters:,} | {r.resident_bytes / 1e3:.1f} | {r.growth_bytes / 1e3:.1f} |"
