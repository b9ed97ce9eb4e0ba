"""Every method on real data, and beside it Hugging Face PEFT where PEFT has the method.

    export MULTITUNE_DATA=/path/to/data    # <collection>/<task>/<split>.parquet
    python benchmarks/real_data.py --shard 1/2 & python benchmarks/real_data.py --shard 2/2 & wait
    python benchmarks/real_data.py --table --write docs/results.md
    python benchmarks/real_data.py --table --write-planner src/multitune/planner_scores.json

One run is a system, a method, a task and a seed. Each finished run is kept in a store and never run again, so a
killed benchmark goes on when the command is given again; every shard writes a store of its own and reads all.

Both systems get the same tokens, the same batches in the same order, the same steps, AdamW, learning rate,
schedule, weight decay, clipping, dropout, frozen pretrained pooler and a linear head that starts with the same
values; both report the epoch with the best validation score. What differs is the implementation of the method
and the numbers drawn for its start and for dropout.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # runs are forked

import torch
import torch.nn.functional as F
from _memory import peak_memory, reset_peak_memory
from _store import Row, append, check_markers, environment, find, read, write_between
from torch import Tensor
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

import multitune
from multitune.tasks import TaskData, compute
from multitune.training.config import TrainConfig
from multitune.training.data import BatchOrder, Collator, TaskRows

SUBSET_SEED = 2305  # draws the subsets of rows, once and for all runs alike


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one task is run."""

    title: str
    max_length: int
    scores: tuple[str, ...]
    """Names of the scores to report."""
    num_rows: int | None = None
    """Training rows to draw; none stands for all."""
    seeds: tuple[int, ...] = (0, 1, 2)


TASKS = {
    "glue/sst2": Setting(title="SST-2", max_length=64, scores=("accuracy",), num_rows=4000),
    "glue/mrpc": Setting(title="MRPC", max_length=128, scores=("f1", "accuracy")),
    "glue/rte": Setting(title="RTE", max_length=128, scores=("accuracy",), seeds=(0,)),
}
#: The methods of the table; others may be asked for by name.
METHODS = (
    "aot_fc", "aot_kronecker", "bitfit", "full", "head", "houlsby", "ia3", "layernorm", "lora", "pfeiffer", "prompt",
    "ptuning_v2",
)  # fmt: skip
PEFT_METHODS = ("ia3", "layernorm", "lora", "prompt")
BACKBONE = "minilm"
EPOCHS = 2
BATCH_SIZE = 32
POOLING = "pooler"
DOCUMENT_PART = "real_data"


# -------------------------------------------------------------------- one run


def run(cell: Row, threads: int) -> Row:
    """Train and score one cell in a process of its own, so that its peak of memory is its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(cell, threads, sender))
    child.start()
    sender.close()
    try:
        row: Row = receiver.recv()
    except EOFError:
        child.join()
        raise SystemExit(f"the run {cell} died with exit code {child.exitcode}; see the message above") from None
    child.join()
    return row


def _work(cell: Row, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Unsupported layer type")  # PEFT of layer norms, which it does train
    data = load(cell["task"], cell["train_rows"], cell["validation_rows"])
    train = {"multitune": train_multitune, "peft": train_peft}[cell["system"]]
    sender.send({"cell": cell, **train(cell, data), "environment": environment(threads)})


def load(task: str, train_rows: int | None, validation_rows: int | None) -> TaskData:
    """A task with some rows of its tables, the same ones every time."""
    data = multitune.load_task(task)

    def draw(table: Any, count: int | None) -> Any:
        if count is None or count >= len(table):
            return table
        return table.select(sorted(random.Random(SUBSET_SEED).sample(range(len(table)), count)))

    return replace(data, train=draw(data.train, train_rows), validation=draw(data.validation, validation_rows))


def train_multitune(cell: Row, data: TaskData) -> Row:
    """One run of this library."""
    backbone = multitune.Backbone.load(cell["backbone"])
    method = multitune.get_method(cell["method"]).from_settings(cell["settings"])
    reset_peak_memory()
    clock = Clock()
    result = multitune.train(backbone, data, method, config=config_of(cell))
    times = clock.read()
    with tempfile.TemporaryDirectory() as folder:
        saved = result.adapter.save(Path(folder) / "adapter")
        size = _weight_bytes(saved.path)
    return {
        "scores": dict(result.adapter.metrics),
        "parameters": result.num_method_parameters,
        "head_parameters": result.num_head_parameters,
        "file_bytes": size,
        **times,
        "peak_memory": peak_memory(),
    }


def train_peft(cell: Row, data: TaskData) -> Row:
    """One run of PEFT: a plain loop over the same batches."""
    config = config_of(cell)
    backbone = multitune.Backbone.load(cell["backbone"])
    splits = {"train": data.train, "validation": data.validation}
    tokenizing = Clock()
    rows = {
        split: TaskRows(backbone, data.task, table, max_length=config.max_length, split=split)
        for split, table in splits.items()
    }
    before = tokenizing.read()
    collate = Collator(data.task.kind, backbone.pad_id)
    head = multitune.Head.for_task(data.task, pooling=POOLING, dropout=config.head_dropout)
    model = peft_model(cell, backbone, head, config.seed)
    num_head = sum(t.numel() for t in head.init(backbone, torch.Generator()).values())
    del backbone
    reset_peak_memory()
    clock = Clock()

    assert not config.weight_decay, "PEFT would decay vectors towards 0 that ours decays towards the backbone's"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    order = BatchOrder(
        [len(item) for item in rows["train"].items],
        config.batch_size,
        accumulation=1,
        seed=config.seed,
        grouped=config.length_grouped,
    )
    num_steps = len(order) * int(config.epochs)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(num_steps * config.warmup_ratio), num_steps)
    best: Row = {}
    for epoch in range(int(config.epochs)):
        model.train()
        order.set_epoch(epoch)
        for numbers in order:
            batch = collate([rows["train"].items[i] for i in numbers])
            targets = batch.pop("targets")
            F.cross_entropy(model(**_with_mask(batch)).logits, targets).backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        scores = evaluate(model, data, rows["validation"], collate, config.eval_batch_size)
        if not best or scores[data.task.metric] > best[data.task.metric]:
            best = scores
    times = {name: value + before[name] for name, value in clock.read().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = _weight_bytes(Path(folder))
    return {
        "scores": best,
        "parameters": sum(p.numel() for p in trained) - num_head,
        "head_parameters": num_head,
        "file_bytes": size,
        **times,
        "peak_memory": peak_memory(),
    }


def peft_model(cell: Row, backbone: multitune.Backbone, head: multitune.Head, seed: int) -> Any:
    """The sequence classifier of transformers with PEFT's form of a method, its head started like ours."""
    from peft import get_peft_model

    source = backbone.model.config.name_or_path
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=head.num_outputs, classifier_dropout=head.dropout
    )
    start = head.init(backbone, torch.Generator().manual_seed(seed + 2**32))  # as multitune.train does
    with torch.no_grad():
        model.classifier.weight.copy_(start["weight"])
        model.classifier.bias.copy_(start["bias"])
    return get_peft_model(model, peft_config(cell["method"], cell["settings"]))


def peft_config(method: str, settings: Row) -> Any:
    """PEFT's configuration that is the same function as our method with these hyper-parameters."""
    import peft

    layer = r".*\.layer\.\d+"
    match method:
        case "lora":
            return peft.LoraConfig(
                task_type="SEQ_CLS",
                r=settings["r"],
                lora_alpha=settings["alpha"],
                lora_dropout=settings["dropout"],
                use_rslora=settings["rank_stabilised"],
                target_modules=list(settings["targets"]),
            )
        case "ia3":  # `output.dense` alone would also match the attention's output
            return peft.IA3Config(
                task_type="SEQ_CLS",
                target_modules=rf"{layer}\.(attention\.self\.(key|value)|output\.dense)",
                feedforward_modules=rf"{layer}\.output\.dense",
            )
        case "layernorm":
            return peft.LNTuningConfig(
                task_type="SEQ_CLS", target_modules=rf"{layer}\.(attention\.output|output)\.LayerNorm"
            )
        case "prompt":
            return peft.PromptTuningConfig(
                task_type="SEQ_CLS",
                num_virtual_tokens=settings["length"],
                prompt_tuning_init="SAMPLE_VOCAB" if settings["start"] == "vocabulary" else "RANDOM",
            )
    raise ValueError(f"no PEFT form of '{method}' is known here; there are {', '.join(PEFT_METHODS)}")


def evaluate(model: Any, data: TaskData, rows: TaskRows, collate: Collator, batch_size: int) -> dict[str, float]:
    """Scores of a PEFT model on some rows, by this library's metrics."""
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda i: len(rows.items[i]))
    predictions = [0] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            numbers = by_length[start : start + batch_size]
            batch = collate([rows.items[i] for i in numbers])
            del batch["targets"]
            for i, answer in zip(numbers, model(**_with_mask(batch)).logits.argmax(-1).tolist(), strict=True):
                predictions[i] = answer
    return compute(data.task.metric, predictions, [item.target for item in rows.items], data.task.labels)


def config_of(cell: Row) -> TrainConfig:
    """The training settings of a cell."""
    return TrainConfig(**cell["training"])


class Clock:
    """Wall time and processor time from here on."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both, as a row names them."""
        return {
            "seconds": time.perf_counter() - self.wall,
            "processor_seconds": time.process_time() - self.processor,
        }


def _with_mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with a mask: PEFT's prompt tuning lengthens the one it is given."""
    return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}


def _weight_bytes(folder: Path | None) -> int:
    assert folder is not None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# -------------------------------------------------------------------- which runs


def cells_of(args: argparse.Namespace) -> list[Row]:
    """Every run that the arguments ask for, most wanted first, so that a benchmark cut short is of use."""
    pairs = [(seed, task) for task in args.tasks for seed in _seeds(args, task)]
    pairs.sort(key=lambda pair: (len(TASKS[pair[1]].seeds) == 1, pair[0]))  # seed by seed, single seeds last
    return [
        cell_of(args, system, method, task, seed)
        for seed, task in pairs
        for method in args.methods
        for system in args.systems
        if system == "multitune" or method in PEFT_METHODS
    ]


def cell_of(args: argparse.Namespace, system: str, method: str, task: str, seed: int) -> Row:
    """All that a run depends on."""
    setting = TASKS[task]
    instance = multitune.get_method(method)()
    recipe = instance.recipe
    training = {
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "warmup_ratio": recipe.warmup_ratio,
        "epochs": 1.0 if args.quick else float(EPOCHS),
        "batch_size": BATCH_SIZE,
        "max_length": setting.max_length,
        "seed": seed,
        "length_grouped": True,
        "pooling": POOLING,
        "progress": False,
    }
    limits = [n for n in (args.limit_rows, 64 if args.quick else None) if n is not None]
    return {
        "system": system,
        "method": method,
        "settings": instance.settings(),
        "task": task,
        "backbone": BACKBONE,
        "training": training,
        "train_rows": min([*limits, *([setting.num_rows] if setting.num_rows else [])], default=None),
        "validation_rows": min(limits, default=None),
    }


def mine(cells: list[Row], shard: tuple[int, int]) -> list[Row]:
    """The runs of one shard; a method changes shards with the seed, so that slow methods are shared out."""
    number, count = shard
    return [c for i, c in enumerate(cells) if (i + c["training"]["seed"]) % count == number - 1]


def _seeds(args: argparse.Namespace, task: str) -> tuple[int, ...]:
    given: tuple[int, ...] = tuple(args.seeds) if args.seeds else TASKS[task].seeds
    return given[:1] if args.quick else given


# -------------------------------------------------------------------- the table


def columns_of(tasks: list[str]) -> list[tuple[str, str, str]]:
    """(task, score, heading) of every column of scores."""
    names = {"f1": "F1", "accuracy": "accuracy"}
    return [(t, s, f"{TASKS[t].title} {names[s]}") for t in tasks for s in TASKS[t].scores]


def render(args: argparse.Namespace, rows: list[Row]) -> str:
    """All tables and notes as markdown."""
    done = [row for cell in cells_of(args) if (row := find(rows, cell)) is not None]
    if not done:
        return "No finished run is in the store."
    return "\n\n".join([_main_table(args, done), _peft_table(args, done), _notes(args, done)])


def _main_table(args: argparse.Namespace, done: list[Row]) -> str:
    columns = columns_of(args.tasks)
    heads = ["method", "system", "parameters", "file, kB", *(c[2] for c in columns)]
    heads += [f"{TASKS[t].title} CPU s" for t in args.tasks] + ["peak memory, MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for method in args.methods:
        for system in args.systems:
            runs = [r for r in done if (r["cell"]["method"], r["cell"]["system"]) == (method, system)]
            if not runs:
                continue
            size = min(r["file_bytes"] for r in runs) / 1000
            cells = [multitune.get_method(method).title, "PEFT" if system == "peft" else "multitune"]
            cells += [f"{runs[0]['parameters']:,}", f"{size:,.0f}"]
            cells += [_spread(_scores(runs, task, score)) for task, score, _ in columns]
            cells += [_seconds(runs, task) for task in args.tasks]
            peaks = [r["peak_memory"] for r in runs if r["peak_memory"]]
            lines.append("| " + " | ".join([*cells, f"{max(peaks) / 1e6:,.0f}" if peaks else ""]) + " |")
    return "\n".join(lines)


def _peft_table(args: argparse.Namespace, done: list[Row]) -> str:
    lines = ["| method | score | multitune | PEFT | difference | verdict |", "|---|---|---:|---:|---:|---|"]
    for method in args.methods:
        for task, score, heading in columns_of(args.tasks):
            ours, theirs = (
                _scores([r for r in done if (r["cell"]["method"], r["cell"]["system"]) == (method, s)], task, score)
                for s in ("multitune", "peft")
            )
            shared = sorted(ours.keys() & theirs.keys())
            if not shared:
                continue
            ours, theirs = ({s: scores[s] for s in shared} for scores in (ours, theirs))
            difference = statistics.mean(ours.values()) - statistics.mean(theirs.values())
            title = multitune.get_method(method).title
            lines.append(
                f"| {title} | {heading} | {_spread(ours)} | {_spread(theirs)} | {100 * difference:+.1f} | "
                f"{verdict(list(ours.values()), list(theirs.values()))} |"
            )
    return "\n".join(lines)


def verdict(ours: list[float], theirs: list[float]) -> str:
    """Ours against PEFT's, by the pooled standard deviation over the seeds."""
    if len(ours) < 2:
        return "one seed: no verdict"
    deviation = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 2)
    difference = statistics.mean(ours) - statistics.mean(theirs)
    if abs(difference) <= deviation:
        return f"within one standard deviation ({100 * deviation:.1f})"
    side = "above" if difference > 0 else "**below**"
    return f"{side}, by {abs(difference) / deviation:.1f} standard deviations" if deviation else f"{side}, no spread"


def _notes(args: argparse.Namespace, done: list[Row]) -> str:
    last = max((r["environment"] for r in done), key=lambda e: e["date"])
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    used = ", ".join(f"{TASKS[t].title} {_listed(_seeds(args, t))}" for t in args.tasks)
    rates = {r["cell"]["method"]: r["cell"]["training"]["learning_rate"] for r in done}
    missing = len(cells_of(args)) - len(done)
    epochs = _listed(sorted({r["cell"]["training"]["epochs"] for r in done}))
    drawn = sorted({(TASKS[r["cell"]["task"]].title, r["cell"]["train_rows"]) for r in done if r["cell"]["train_rows"]})
    subsets = [f"{count:,} training rows of {title}" for title, count in drawn]
    lines = [
        f"- Mean ± standard deviation over seeds, in percent, with the number of seeds in brackets; seeds: {used}.",
        f"- Backbone `{BACKBONE}`, {epochs} epochs, batches of {BATCH_SIZE}, frozen pretrained pooler, linear head; "
        "the better epoch by validation score. Whole public training and validation splits"
        + (f", but {', '.join(subsets)} (drawn once, seed {SUBSET_SEED})." if subsets else "."),
        "- Hyper-parameters are each method's defaults, with the learning rates "
        + ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
        + ".",
        "- Parameters are those trained without the head; the file is the saved tensors with the head.",
        "- PEFT's prompt tuning is not the same function: the pooler reads position 0, which is PEFT's first prompt "
        "vector, while multitune pools on the real first token.",
        f"- CPU s is the processor time of training with its evaluations on {last['machine']}, {last['threads']} "
        "thread(s) per run; peak memory is the process's, libraries included.",
        f"- Python {last['python']}, {versions}; {last['date']}.",
        f"- Command: `python benchmarks/real_data.py{_command(args)}`, then the same with `--table`.",
    ]
    if missing:
        lines.append(f"- {missing} runs of {missing + len(done)} are still missing.")
    return "\n".join(lines)


def _command(args: argparse.Namespace) -> str:
    parts = [" --threads 1 --shard I/2"]
    for name, default in (("methods", METHODS), ("tasks", tuple(TASKS)), ("seeds", None)):
        given = getattr(args, name)
        if given is not None and tuple(given) != tuple(default or ()):
            parts.append(f" --{name} {' '.join(map(str, given))}")
    if args.limit_rows:
        parts.append(f" --limit-rows {args.limit_rows}")
    return "".join(parts) + (" --quick" if args.quick else "")


def _scores(runs: list[Row], task: str, score: str) -> dict[int, float]:
    """Seed to score."""
    return {r["cell"]["training"]["seed"]: r["scores"][score] for r in runs if r["cell"]["task"] == task}


def _spread(scores: dict[int, float]) -> str:
    values = [100 * v for v in scores.values()]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def _seconds(runs: list[Row], task: str) -> str:
    values = [r["processor_seconds"] for r in runs if r["cell"]["task"] == task]
    return f"{statistics.mean(values):.0f}" if values else ""


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


# -------------------------------------------------------------------- what `multitune plan` advises by

PLANNED = ("glue/sst2", "accuracy")


def planner_scores(args: argparse.Namespace, rows: list[Row]) -> Row:
    """Mean scores of this library's methods on one task, as `multitune.planner.scores` reads them."""
    task, score = PLANNED
    done = [row for cell in cells_of(args) if (row := find(rows, cell)) is not None]
    methods: dict[str, Row] = {}
    for name in args.methods:
        runs = [r for r in done if (r["cell"]["method"], r["cell"]["system"]) == (name, "multitune")]
        values = _scores(runs, task, score)
        if values:
            settings = multitune.get_method(name)().settings()  # those of the cells that were looked for
            percent = round(100 * statistics.mean(values.values()), 1)
            methods[name] = {"percent": percent, "seeds": len(values), "settings": settings}
    return {"task": f"{TASKS[task].title} {score}", "backbone": BACKBONE, "methods": methods}


# -------------------------------------------------------------------- command line


def main() -> None:
    args = _arguments()
    number, count = args.shard
    if args.write and not args.table and count > 1:
        raise SystemExit(f"--write {args.write}: one shard is not the whole table; give --table --write at the end")
    if args.write_planner and (args.quick or args.limit_rows or not args.table):
        raise SystemExit(
            "--write-planner goes with --table and the runs of the table, not with --quick or --limit-rows"
        )
    check_markers(args.write, DOCUMENT_PART)
    own = args.store / f"real_data-{number}of{count}.jsonl"
    todo = [] if args.table else mine(cells_of(args), args.shard)
    begin = time.monotonic()
    for position, cell in enumerate(todo, start=1):
        if find(_finished(args.store), cell) is not None:
            continue
        if args.minutes and time.monotonic() - begin > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over; give the command again to go on", flush=True)
            break
        row = run(cell, args.threads)
        append(own, row)
        scores = ", ".join(f"{name} {100 * row['scores'][name]:.1f}" for name in TASKS[cell["task"]].scores)
        name = f"{cell['system']:9s} {cell['method']:14s} {cell['task']:10s} seed {cell['training']['seed']}"
        print(f"[{position}/{len(todo)}] {name}  {scores}  {row['seconds']:.0f} s", flush=True)
    if args.table or count == 1:
        text = render(args, _finished(args.store))
        print(text)
        if args.write:
            write_between(args.write, DOCUMENT_PART, text)
    if args.write_planner:
        text = json.dumps(planner_scores(args, _finished(args.store)), indent=2, ensure_ascii=False)
        args.write_planner.write_text(text + "\n", "utf-8")


def _finished(store: Path) -> list[Row]:
    """The rows of every shard."""
    return read(sorted(store.glob("real_data*.jsonl")))


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is no shard; the first of two is 1/2")
    return int(number), int(count)


def _arguments() -> argparse.Namespace:
    names = multitune.method_names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=names,
        metavar="NAME",
        help=f"default: {' '.join(METHODS)}",
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all")
    parser.add_argument("--systems", nargs="+", default=["multitune", "peft"], choices=["multitune", "peft"])
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: a table per task")
    parser.add_argument("--limit-rows", type=int, metavar="N", help="use N rows of each split (trials)")
    parser.add_argument("--quick", action="store_true", help="64 rows, one epoch, one seed: does everything run?")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="run the I-th of N shares")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--store", type=Path, default=Path(__file__).parent / "results", help="folder of the stores")
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables of all stores")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between this document's markers")
    parser.add_argument("--write-planner", type=Path, metavar="FILE", help="with --table: what `multitune plan` reads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
