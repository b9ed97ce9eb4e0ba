"""What the benchmarks share: results kept as JSON lines, so that a killed run goes on where it stopped."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PACKAGES = ("multitune", "torch", "transformers", "peft", "tokenizers", "safetensors")


def read(files: Iterable[Path]) -> list[Row]:
    """Every whole row of some stores; a line cut off by a kill is skipped, for its cell is run again."""
    rows = []
    for file in files:
        for line in file.read_text("utf-8").splitlines() if file.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def append(file: Path, row: Row) -> None:
    """Add one row and wait until the disk has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        if out.tell() > 0:
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":  # the line before was cut off
                out.write(b"\n")
        out.write(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def find(rows: Iterable[Row], cell: Row) -> Row | None:
    """The finished row of a cell: the last one whose `cell` has exactly these settings."""
    wanted = json.loads(json.dumps(cell))
    return next((row for row in reversed(list(rows)) if row["cell"] == wanted), None)


def check_markers(file: Path | None, name: str) -> None:
    """Stop with a message unless a document to be written to has the markers of a table; before the work, not after."""
    if file is None:
        return
    if not file.is_file():
        raise SystemExit(f"--write {file}: no such file; give a document with markers, such as docs/results.md")
    document = file.read_text("utf-8")
    begin, end = _markers(name)
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise SystemExit(f"--write {file}: it needs the lines {begin} and {end}, once each, where the table goes")


def write_between(file: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of a document."""
    check_markers(file, name)
    begin, end = _markers(name)
    before, _, rest = file.read_text("utf-8").partition(begin)
    file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", "utf-8")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def environment(threads: int) -> Row:
    """Machine, versions and date, for the record."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": threads,
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if s.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or "unknown processor"
