"""LSG attention against full attention: time and peak memory of one batch by its length.

    python benchmarks/lsg.py [--lengths 256 512 1024 2048 4096] [--kinds norm pooling] [--write docs/lsg.md]
    python benchmarks/lsg.py --task raft/terms_of_service     # texts of a task in the folder that MULTITUNE_DATA names

Every line is a process of its own that loads minilm, converts it, or for full attention repeats its position table to
the same length, and runs rows of exactly that many tokens: serving (no gradients, the median of several passes) and
training (LoRA of query and value, forward and backward). The tokens are random, or with --task the texts of a task's
training rows, joined until a row is full; which they are changes what `norm` and `lsh` choose, and no shape. Memory is
the most the process held beyond what it held before the batch (Linux). The system's allocator is told to give large
blocks back at once (`MALLOC_MMAP_THRESHOLD_`, glibc). The model's attention function is torch's fused one, which never
holds all scores, so that full attention too needs memory in proportion to the length; `--attention eager` has both
sides compute scores plainly.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _memory import peak_memory, reset_peak_memory
from _store import check_markers, environment, write_between

import multitune

DOCUMENT_PART = "lsg"
FULL = "full"


def measure(system: str, length: int, args: argparse.Namespace, sender: Any) -> None:
    """Seconds and bytes of serving and of training."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    backbone = backbone_of(system, length, args)
    ids = tokens_of(backbone, length, args)
    served = multitune.Plan([None] * args.rows)
    lora = multitune.LoRA()
    params = {k: t.requires_grad_() for k, t in lora.init(backbone, torch.Generator().manual_seed(0)).items()}

    def serve() -> None:
        with torch.no_grad():
            backbone.run(served, ids)

    def train() -> None:
        deltas = multitune.DeltaSet(lora.deltas(params, backbone))
        backbone.run(multitune.Plan([deltas] * args.rows), ids).square().mean().backward()

    sender.send({"serve": timed(serve, args.rounds), "train": timed(train, args.rounds)})


def backbone_of(system: str, length: int, args: argparse.Namespace) -> multitune.Backbone:
    """minilm with positions for `length` tokens, with full or LSG attention."""
    loaded = multitune.Backbone.load("minilm")
    if args.attention != "sdpa":
        loaded.detach()
        loaded.model.set_attn_implementation(args.attention)
        loaded.attach()
    longest = max(length, loaded.max_length)
    if system != FULL:
        return multitune.convert_to_lsg(
            loaded, max_length=longest, kind=system, block=args.block, sparse=args.sparse, sparsity=args.sparsity
        )
    # One block for all and no global token is full attention, by the model's own attention function.
    return multitune.convert_to_lsg(loaded, max_length=longest, block=longest, sparsity=1, kind="none", num_global=0)


def tokens_of(backbone: multitune.Backbone, length: int, args: argparse.Namespace) -> torch.Tensor:
    """Rows of exactly `length` token ids: random ones, or a task's texts one after another between special tokens."""
    if args.task is None:
        return torch.randint(1000, backbone.vocab_size, (args.rows, length))
    tokenizer: Any = backbone.tokenizer
    data = multitune.load_task(args.task)
    first, last = tokenizer("").input_ids
    inside: list[int] = []
    needed = args.rows * (length - 2)
    for example in data.task.examples(data.train):
        text = " ".join(" ".join(texts) for texts in example.texts)
        inside += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(inside) >= needed:
            break
    else:
        raise SystemExit(f"{args.task} has {len(inside):,} tokens to learn from, and {needed:,} are needed")
    parts = torch.tensor(inside[:needed]).view(args.rows, length - 2)
    ends = torch.tensor([[first, last]]).expand(args.rows, -1)
    return torch.cat([ends[:, :1], parts, ends[:, 1:]], dim=1)


def timed(run: Any, rounds: int) -> tuple[float, int]:
    """Median seconds, and bytes of the peak beyond what was there before."""
    run()
    reset_peak_memory()
    before = peak_memory() or 0
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), (peak_memory() or 0) - before


def main() -> None:
    args = _arguments()
    check_markers(args.write, DOCUMENT_PART)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by glibc when a child starts
    context = multiprocessing.get_context("spawn")
    heads = ["tokens", "attention", "serve, ms", "serve, peak MB", "train, ms", "train, peak MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---:|---|---:|---:|---:|---:|"]
    print("\n".join(lines), flush=True)
    for length in args.lengths:
        for system in (FULL, *args.kinds):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=measure, args=(system, length, args, sender))
            child.start()
            sender.close()
            try:
                found = receiver.recv()
            except EOFError:
                raise SystemExit(f"{system} at {length} tokens died; see the message above") from None
            child.join()
            cells = [f"{length:,}", system if system == FULL else f"LSG {system}"]
            for use in ("serve", "train"):
                seconds, peak = found[use]
                cells += [f"{1e3 * seconds:,.0f}", f"{peak / 1e6:,.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    lines += ["", _note(args)]
    print("\n" + lines[-1])
    if args.write:
        write_between(args.write, DOCUMENT_PART, "\n".join(lines))


def _note(args: argparse.Namespace) -> str:
    where = environment(args.threads)
    versions = ", ".join(
        f"{k} {v}" for k, v in where["versions"].items() if k in ("multitune", "torch", "transformers")
    )
    return (
        f"Batches of {args.rows} row(s) of {args.task or 'random tokens'}, minilm, attention function "
        f"{args.attention}, block {args.block}, "
        f"{args.sparse} sparse keys a side, sparsity {args.sparsity}, one global token; median of {args.rounds} "
        f"passes; {where['machine']}, {args.threads} thread(s); Python {where['python']}, {versions}; {where['date']}."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--kinds", nargs="+", default=["norm"], metavar="KIND")
    parser.add_argument("--task", metavar="NAME", help="read texts of this task; by default random tokens")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--sparse", type=int, default=128)
    parser.add_argument("--sparsity", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
