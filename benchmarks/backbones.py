"""One mixed batch on minilm held and run in several ways: memory of the weights, difference of the output, time.

    python benchmarks/backbones.py [--rounds 20] [--write docs/backbones.md]

Each batch has rows of LoRA, (IA)³ and AoT adapters with random tensors and a row of the bare backbone. The difference
is the largest of the last hidden states from float32's, by the largest of those. Times are medians of interleaved
rounds, as multiples of float32's own, so that what else the machine does meanwhile matters less. `compiled` is machine
code (`backbone.compile()`), for whose making the first batch waits: the seconds are in the last column. Below the table
stands how long `smollm2` takes to load the second time, once its package's file is unpacked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from pathlib import Path

import torch
from _store import check_markers, environment, write_between

import multitune as mt

DOCUMENT_PART = "backbones"
FORMS = {
    "float32": {},
    "float32, compiled": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "int8, compiled": {"quantize": "int8"},
}
METHODS = (mt.LoRA(), mt.IA3(), mt.AoTFC(r=16))


def sets_of(backbone: mt.Backbone) -> list[mt.DeltaSet]:
    """Adapters in which nothing is an identity, the same for every backbone."""
    found = []
    for seed, method in enumerate(METHODS):
        generator = torch.Generator().manual_seed(seed)
        fresh = method.init(backbone, generator)
        params = {k: t + 0.02 * torch.randn(t.shape, generator=generator) for k, t in fresh.items()}
        found.append(mt.DeltaSet(method.deltas(params, backbone)).fused(backbone.dtype, backbone.device))
    return found


def seconds_to_load_again(name: str) -> float:
    """Seconds that a backbone takes to load when it has been loaded before."""
    mt.Backbone.load(name)
    start = time.perf_counter()
    mt.Backbone.load(name)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    args = _arguments()
    check_markers(args.write, DOCUMENT_PART)
    torch.set_num_threads(args.threads)
    ids = torch.randint(1000, 30000, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    runs, first = {}, {}
    for name, settings in FORMS.items():
        backbone = mt.Backbone.load("minilm", **settings)
        sets: list[mt.DeltaSet | None] = [*sets_of(backbone), None]
        with torch.no_grad():
            plan = mt.Plan([sets[i % len(sets)] for i in range(args.rows)])
        if name.endswith("compiled"):
            backbone.compile()
        runs[name] = (backbone, plan)
        start = time.perf_counter()
        with torch.no_grad():
            backbone.run(plan, ids)
        first[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    outputs = {}
    with torch.no_grad():
        for _ in range(args.rounds):
            for name, (backbone, plan) in runs.items():
                start = time.perf_counter()
                outputs[name] = backbone.run(plan, ids).float()
                times[name].append(time.perf_counter() - start)
    true = outputs["float32"]
    base = statistics.median(times["float32"])
    where = environment(args.threads)
    lines = [
        f"{args.rows} rows of {args.length} tokens; {args.rounds} rounds, {args.threads} threads; {where['machine']}, "
        f"torch {where['versions']['torch']}, torchao {importlib.metadata.version('torchao')}, {where['date']}.",
        "",
        "| backbone | weights | largest difference | time of a batch | first batch |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (backbone, _) in runs.items():
        off = float((outputs[name] - true).abs().max() / true.abs().max())
        ratio = statistics.median(times[name]) / base
        lines.append(f"| {name} | {backbone.nbytes / 1e6:.1f} MB | {off:.1e} | {ratio:.2f} | {first[name]:.1f} s |")
    lines += ["", f"`smollm2` loads in {seconds_to_load_again('smollm2'):.1f} s, the first time aside."]
    print("\n".join(lines))
    if args.write:
        write_between(args.write, DOCUMENT_PART, "\n".join(lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
