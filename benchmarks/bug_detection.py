"""Is a Java method buggy or fixed? Half the layers frozen, or LoRA, with full and with LSG attention.

    export MULTITUNE_DATA=/path/to/data    # code/bug_detection_java/<split>.parquet
    python benchmarks/bug_detection.py
    python benchmarks/bug_detection.py --table --write docs/lsg.md

What is compared follows experiments that are known by their abstract alone (code models tuned with frozen layers or
with LoRA, with variants of LSG attention); their data, settings and scores are not known, and no number here reproduces
one.

The task is weak by construction. Of each pair of a buggy method and its fix one was picked at random, names are
replaced by numbers, and the two differ by a few tokens: naive Bayes over tokens reaches 53 percent and a threshold on
the length 54 percent where chance is 50. The backbone was not trained on code. The methods are short (the table says
how long the longest is), so that nothing is cut at 512 and there is no length for LSG to win: blocks of 16 show
what its sparsity costs, blocks of 128 what its global token does. Rows are in no order of time.

One run is a way of tuning, an attention and a seed. Finished runs are kept in a store and never run again, so a killed
benchmark goes on when the command is given again. Scores are those of the test split, by the epoch that was best on
validation.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _memory import peak_memory, reset_peak_memory
from _store import Row, append, check_markers, environment, find, read, write_between
from real_data import Clock, load
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

import multitune

NAME = "bug_detection"
TASK = "code/bug_detection_java"
BACKBONE = "minilm"
MAX_LENGTH = 512
POSITIVE = "buggy"
#: Name in the table -> backbone.
ATTENTIONS = {
    "full": BACKBONE,
    "LSG norm, block 128": f"{BACKBONE}+lsg",
    "LSG norm, block 16": f"{BACKBONE}+lsg:block=16,sparse=16",
    "LSG pooling, block 16": f"{BACKBONE}+lsg:block=16,sparse=16,kind=pooling",
    "LSG block_stride, block 16": f"{BACKBONE}+lsg:block=16,sparse=16,kind=block_stride",
    "LSG lsh, block 16": f"{BACKBONE}+lsg:block=16,sparse=16,kind=lsh,sparsity=4",
}
#: Name in the table -> method and settings. minilm has six layers.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "upper half trained": ("top_layers", {"count": 3}),
    "LoRA": ("lora", {"r": 8, "targets": ("query", "value")}),
}
QUICK_ROWS = 32
SCORES = ("f1", "auc", "mcc")


def run(cell: Row, threads: int, sender: Any) -> None:
    """Train one cell and score it on the test split."""
    torch.set_num_threads(threads)
    data = load(TASK, cell["train_rows"], cell["validation_rows"])
    assert data.test is not None, f"{TASK} has a test split"
    test = data.test if cell["test_rows"] is None else data.test.select(range(cell["test_rows"]))
    backbone = multitune.Backbone.load(cell["backbone"])
    assert backbone.tokenizer is not None
    method = multitune.make_method(cell["method"], cell["settings"])
    reset_peak_memory()
    clock = Clock()
    result = multitune.train(backbone, data, method, **cell["training"])
    times, peak = clock.read(), peak_memory()
    bank = multitune.Bank(backbone)
    bank.add("bugs", result.adapter)
    answers = bank.predict([("bugs", dict(row)) for row in test], batch_size=32)
    buggy = [a.probabilities[POSITIVE] for a in answers]
    truth = [data.task.labels[row[data.task.label]] == POSITIVE for row in test]
    row = {
        "cell": cell,
        "scores": scores(truth, buggy),
        "validation": dict(result.adapter.metrics),
        "parameters": result.num_method_parameters,
        "longest": max(len(ids) for ids in backbone.tokenizer(list(test["func"]))["input_ids"]),
        **times,
        "peak_memory": peak,
        "environment": environment(threads),
    }
    sender.send(row)


def scores(truth: list[bool], probability: list[float]) -> dict[str, float]:
    """F1 of the buggy class, area under the ROC curve, Matthews correlation."""
    found = [p >= 0.5 for p in probability]
    return {
        "f1": float(f1_score(truth, found, zero_division=0)),
        "auc": float(roc_auc_score(truth, probability)) if len(set(truth)) > 1 else 0.5,
        "mcc": float(matthews_corrcoef(truth, found)),
    }


def cells_of(args: argparse.Namespace) -> list[Row]:
    """Every run asked for."""
    limit = QUICK_ROWS if args.quick else None
    cells = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for label in args.methods:
            name, settings = METHODS[label]
            method = multitune.make_method(name, settings)
            training = {
                "learning_rate": method.recipe.learning_rate,
                "weight_decay": method.recipe.weight_decay,
                "epochs": 1.0 if args.quick else args.epochs,
                "batch_size": 16,
                "max_length": MAX_LENGTH,
                "seed": seed,
                "length_grouped": True,
                "pooling": "mean",
                "progress": False,
            }
            for attention in args.attentions:
                cell = {"method": name, "settings": method.settings(), "backbone": ATTENTIONS[attention]}
                rows = {f"{split}_rows": limit for split in ("train", "validation", "test")}
                rows["train_rows"] = limit or args.train_rows
                cells.append(cell | rows | {"training": training})
    return cells


def render(args: argparse.Namespace, rows: list[Row]) -> str:
    """The table of the finished runs, mean and standard deviation over seeds, and what to know of it."""
    heads = ["method", "attention", "parameters", *map(str.upper, SCORES), "train, s", "peak memory, MB", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    cells = cells_of(args)
    for label in args.methods:
        for attention in args.attentions:
            mine = [c for c in cells if (c["method"], c["backbone"]) == (METHODS[label][0], ATTENTIONS[attention])]
            done = [row for cell in mine if (row := find(rows, cell)) is not None]
            if not done:
                continue
            values = [label, attention, f"{done[0]['parameters']:,}"]
            values += [_spread([r["scores"][s] for r in done]) for s in SCORES]
            peaks = [r["peak_memory"] for r in done if r["peak_memory"]]
            values += [f"{statistics.mean(r['seconds'] for r in done):,.0f}"]
            values += [f"{max(peaks) / 1e6:,.0f}" if peaks else "", str(len(done))]
            lines.append("| " + " | ".join(values) + " |")
    if len(lines) == 2:
        return "Not run yet."
    longest = max((row["longest"] for cell in cells if (row := find(rows, cell)) is not None), default=0)
    notes = [
        "",
        f"{TASK}, {args.train_rows or 'all'} training rows, {args.epochs:g} epochs, seeds "
        f"{', '.join(map(str, args.seeds))}; test split, {BACKBONE}, at most {MAX_LENGTH} tokens, pooling the mean, "
        f"{args.threads} thread(s). The task is weak by "
        "construction: 53 percent by naive Bayes, 54 by length alone, 50 by chance. The longest row has "
        f"{longest} tokens, so this says what LSG's sparsity costs, not what its length gains.",
    ]
    return "\n".join(lines + notes)


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    args = _arguments()
    check_markers(args.write, NAME)
    store = args.store / ("bug_detection_quick.jsonl" if args.quick else "bug_detection.jsonl")
    todo = [] if args.table else cells_of(args)
    context = torch.multiprocessing.get_context("spawn")
    for position, cell in enumerate(todo, start=1):
        if find(read([store]), cell) is not None:
            continue
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=run, args=(cell, args.threads, sender))  # a peak of memory of its own
        child.start()
        sender.close()
        try:
            row = receiver.recv()
        except EOFError:
            raise SystemExit(f"the run {cell} died; see the message above") from None
        child.join()
        append(store, row)
        shown = ", ".join(f"{s} {100 * row['scores'][s]:.1f}" for s in SCORES)
        print(
            f"[{position}/{len(todo)}] {cell['method']} on {cell['backbone']}: {shown}, {row['seconds']:.0f} s",
            flush=True,
        )
    text = render(args, read([store]))
    print(text)
    if args.write:
        write_between(args.write, NAME, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--attentions", nargs="+", default=list(ATTENTIONS), choices=list(ATTENTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--train-rows", type=int, metavar="N", help="rows to learn from; by default all")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--quick", action="store_true", help="32 rows, one epoch, one seed: does everything run?")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table of the store")
    parser.add_argument("--store", type=Path, default=Path(__file__).parent / "results", help="folder of the store")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
