"""How much memory does training a sparse update take?  Peak of SIFT beside LoRA, full fine-tuning and the head alone.

    export MULTITUNE_DATA=/path/to/data    # glue/mrpc/<split>.parquet
    python benchmarks/sift.py --write docs/results.md

Each run is a process of its own, kept in a store: a killed benchmark goes on when the command is given again. It loads
the backbone, trains one step of two rows to warm up, then some steps on rows of MRPC, and reports by how much its peak
of memory grew meanwhile: the weights are there before (full fine-tuning trains a copy, which counts), what is trained,
its gradients, the optimiser's state and the activations come on top. On the CPU the peak is the process's (Linux), with
the system's allocator told to give large blocks back at once (glibc); on a GPU that of torch's allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from dataclasses import replace
from typing import Any

from _cells import about, draw, go, parser
from _memory import peak_memory, reset_peak_memory
from _store import Row

import multitune

NAME = "sift"
BACKBONE, TASK = "minilm", "glue/mrpc"
METHODS = ("head", "lora", "sift", "full")
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def run(cell: Row) -> Row:
    """Train one cell and measure by how much its peak grew."""
    import torch

    on_gpu = torch.device(cell["device"]).type == "cuda"
    if not on_gpu and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 65536)
    backbone = multitune.Backbone.load(cell["backbone"], device=cell["device"])
    data = multitune.load_task(cell["task"])
    data = replace(data, train=draw(data.train, cell["rows"]), validation=draw(data.validation, 32))
    method = multitune.make_method(cell["method"], cell["settings"])
    settings: dict[str, Any] = cell["training"]
    multitune.train(backbone, data, method, **{**settings, "batch_size": 2, "max_steps": 1})
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(backbone.device)
        before = torch.cuda.memory_allocated(backbone.device)
    else:
        reset_peak_memory()
        before = peak_memory() or 0
    start = time.perf_counter()
    result = multitune.train(backbone, data, method, **settings)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(backbone.device) if on_gpu else peak_memory() or 0
    found = {"parameters": result.num_method_parameters, "growth": peak - before, "seconds": seconds}
    return found | {"scores": dict(result.adapter.metrics)}


def cells_of(args: argparse.Namespace) -> list[Row]:
    """Every run asked for."""
    cells = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for name in args.methods:
            method = multitune.make_method(name)
            training = {
                "learning_rate": method.recipe.learning_rate,
                "max_steps": 2 if args.quick else args.steps,
                "batch_size": args.batch,
                "max_length": 128,
                "seed": seed,
                "progress": False,
            }
            cell = {"method": name, "settings": method.settings(), "task": TASK, "backbone": BACKBONE}
            rows = args.batch * (2 if args.quick else args.steps)
            cells.append(cell | {"training": training, "rows": rows, "device": args.device})
    return cells


def render(args: argparse.Namespace, done: list[Row], missing: int) -> str:
    """The table of the finished runs."""
    lines = ["| method | trained parameters | peak grows by, MB | of full | seconds |", "|---|---:|---:|---:|---:|"]
    by_method = {name: [r for r in done if r["cell"]["method"] == name] for name in args.methods}
    full = max((r["growth"] for r in by_method.get("full", ())), default=0)
    for name, runs in by_method.items():
        if runs:
            growth = max(r["growth"] for r in runs)
            share = f"{100 * growth / full:.0f} %" if full else ""
            cells = [multitune.get_method(name).title, f"{runs[0]['parameters']:,}", f"{growth / 1e6:,.0f}", share]
            lines.append("| " + " | ".join([*cells, f"{statistics.mean(r['seconds'] for r in runs):,.0f}"]) + " |")
    what = (
        f"- {BACKBONE} on {args.device}, {args.steps} steps of {args.batch} rows of MRPC, cut to 128 tokens, the "
        f"largest of {len(args.seeds)} seed(s); backbone and libraries are not counted, activations are."
    )
    return "\n".join([*lines, "", what, *about(done, missing, "python benchmarks/sift.py")])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=multitune.method_names(), metavar="NAME")
    made.add_argument("--steps", type=int, default=100, help="optimizer steps of a run")
    made.add_argument("--batch", type=int, default=32, help="rows in a batch")
    made.add_argument("--device", default="cpu", help="where to train: cpu, cuda")
    args = made.parse_args()

    def describe(row: Row) -> str:
        return f"{row['cell']['method']}: peak grows by {row['growth'] / 1e6:,.0f} MB, {row['seconds']:.0f} s"

    go(NAME, args, cells_of(args), run, describe, lambda done, missing: render(args, done, missing))


if __name__ == "__main__":
    main()
