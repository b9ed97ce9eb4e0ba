"""Does a stream of tasks keep what it learnt?  The ten intent domains one after another, all classes told apart.

    export MULTITUNE_DATA=/path/to/data    # intent/clinc_<domain>/<split>.parquet
    python benchmarks/continual_intents.py --threads 2 --write docs/continual.md
    python benchmarks/continual_intents.py --tasks 3      # the first three domains
    python benchmarks/continual_intents.py --quick        # two domains, few rows: does everything run?

After every domain a text of any domain so far must get its class among the classes of all domains so far. Compared:

    backbone      class means of the frozen backbone's features; nothing is trained
    sotu          a sparse update per domain, added up; class means are kept as they were when their domain came
    sotu/anew     the same, with the class means of all domains so far taken anew (needs their rows)
    sequential    every weight is trained on domain after domain; heads side by side
    seq./means    the same weights, read by class means kept as they were

What a domain leaves is kept in --work (some 100 MB for each domain of minilm, to be deleted at the end) and its scores
in --store, so that a killed benchmark goes on with the domain it was at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _store import Row, append, check_markers, environment, find, read, write_between
from torch import Tensor

import multitune
from multitune import Adapter, Backbone, SoTU
from multitune.continual import Prototypes, cosine_of_updates, features, sum_of_updates
from multitune.files import replace_folder
from multitune.tasks import TaskData

NAME = "continual_intents"
DOMAINS = (
    "auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining", "meta", "small_talk", "travel",
    "utility", "work",
)  # fmt: skip
SYSTEMS = ("backbone", "sotu", "sotu/anew", "sequential", "seq./means")
ROWS_OF_MEANS = 20
"""Training rows per class for class means."""


@dataclass
class Stream:
    """What the systems know after the domains so far."""

    backbone: Backbone
    tuned: Backbone
    """The sequentially tuned copy."""
    data: list[TaskData] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)
    heads: list[dict[str, Tensor]] = field(default_factory=list)
    kept: dict[str, Prototypes] = field(default_factory=dict)
    """Class means by system, as they were when their domain came."""


def main() -> None:
    args = _arguments()
    check_markers(args.write, NAME)
    torch.set_num_threads(args.threads)
    for seed in [] if args.table else args.seeds:
        _run(args, seed)
    text = render(args)
    print(text)
    if args.write:
        write_between(args.write, NAME, text)


def cells_of(args: argparse.Namespace, seed: int) -> list[Row]:
    """For each domain of a stream all that its row depends on: the domains so far and the settings."""
    names = ("backbone", "density", "targets", "rate", "full_rate", "epochs", "rows")
    settings = {name: getattr(args, name) for name in names} | {"seed": seed}
    return [settings | {"domains": args.domains[: n + 1]} for n in range(len(args.domains))]


def _run(args: argparse.Namespace, seed: int) -> None:
    """The domains of one stream that have not been run; what a domain has left is always read from its folder."""
    store = args.store / f"{NAME}.jsonl"
    cells = cells_of(args, seed)
    if all(find(read([store]), cell) is not None for cell in cells):
        return
    backbone = multitune.Backbone.load(args.backbone)
    stream = Stream(backbone, backbone)
    for cell in cells:
        data = _task(cell["domains"][-1], args)
        folder = args.work / hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]
        if not folder.exists():
            _learn(stream, data, cell, folder)
        _enter(stream, data, folder)
        if find(read([store]), cell) is not None:
            continue
        others = stream.adapters[:-1]
        cosine = max((abs(cosine_of_updates(backbone, stream.adapters[-1], a)) for a in others), default=0.0)
        found = {"classes": len(stream.kept["sotu"].labels), "accuracy": _scores(stream), "largest_cosine": cosine}
        append(store, {"cell": cell, **found, "environment": environment(args.threads)})
        scores = ", ".join(f"{name} {value:.3f}" for name, value in found["accuracy"].items())
        print(f"[{len(cell['domains'])}/{len(cells)}] {cell['domains'][-1]}: {scores}", flush=True)


def render(args: argparse.Namespace) -> str:
    """The table of the finished rows, the mean over the seeds."""
    rows = read([args.store / f"{NAME}.jsonl"])
    stages = list(zip(*(cells_of(args, seed) for seed in args.seeds), strict=True))
    lines = ["| after | classes | " + " | ".join(SYSTEMS) + " | largest cosine |"]
    lines.append("|---|---:|" + "---:|" * (len(SYSTEMS) + 1))
    done: list[Row] = []
    for cells in stages:
        found = [row for cell in cells if (row := find(rows, cell)) is not None]
        done += found
        if found:
            scores = [f"{100 * statistics.mean(r['accuracy'][s] for r in found):.1f}" for s in SYSTEMS]
            cosine = max(r["largest_cosine"] for r in found)
            first = [cells[0]["domains"][-1], str(found[0]["classes"])]
            lines.append("| " + " | ".join([*first, *scores, f"{cosine:.4f}"]) + " |")
    if not done:
        return "Not run yet."
    last = max((row["environment"] for row in done), key=lambda e: e["date"])
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("torch", "transformers"))
    missing = len(stages) * len(args.seeds) - len(done)
    rows_used = "all rows" if args.rows is None else f"{args.rows} rows a split"
    seeds = ", ".join(map(str, args.seeds))
    lines += [
        "",
        f"- Percent of the test rows of all domains so far whose class is found, the mean over the seeds {seeds}; the "
        f"largest cosine of the domain's update with an earlier one.",
        f"- {args.backbone}, {args.epochs:g} epochs a domain, {rows_used}; SoTU trains {100 * args.density:g} % of the "
        f"weights of {', '.join(args.targets)} at {args.rate:g}, sequential tuning all weights at {args.full_rate:g}.",
        f"- {last['machine']}, {last['threads']} thread(s), Python {last['python']}, {versions}; {last['date']}.",
        *([f"- {missing} of {missing + len(done)} domains are still to be run."] if missing else []),
    ]
    return "\n".join(lines)


def _task(domain: str, args: argparse.Namespace) -> TaskData:
    """A domain whose classes carry its name, so that no two domains share one."""
    data = multitune.load_task(f"intent/clinc_{domain}")
    labels = tuple(f"{domain}/{label}" for label in data.task.labels)

    def cut(table: Any, rows: int | None) -> list[dict[str, Any]]:
        chosen = list(table)
        if rows is not None:
            order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:rows]
            chosen = [chosen[i] for i in order.tolist()]
        column = data.task.label
        return [dict(row) | {column: _renamed(row[column], data.task.labels, labels)} for row in chosen]

    tables = {"train": cut(data.train, args.rows), "validation": cut(data.validation, args.rows)}
    return replace(data, task=replace(data.task, labels=labels), test=cut(data.test, args.rows), **tables)


def _renamed(value: Any, before: tuple[str, ...], after: tuple[str, ...]) -> str:
    return after[value if isinstance(value, int) else before.index(value)]


def _learn(stream: Stream, data: TaskData, cell: Row, folder: Path) -> None:
    """Train a domain's update and the weights that go on from the domain before, and take its class means."""
    settings = dict(epochs=cell["epochs"], seed=cell["seed"], pooling="mean", max_length=32, progress=False)
    number = len(cell["domains"]) - 1
    method = SoTU(density=cell["density"], targets=tuple(cell["targets"]), mask_seed=1000 * cell["seed"] + number)
    update = multitune.train(stream.backbone, data, method, learning_rate=cell["rate"], **settings).adapter
    full = multitune.train(stream.tuned, data, "full", learning_rate=cell["full_rate"], **settings).adapter
    total = sum_of_updates(stream.backbone, [*stream.adapters, update])
    tuned = stream.tuned.with_weights(full.params)
    ways = {"backbone": (stream.backbone, None), "sotu": (stream.backbone, total), "seq./means": (tuned, None)}

    def write(temporary: Path) -> None:
        update.save(temporary / "update")
        full.save(temporary / "tuned")
        for name, (model, deltas) in ways.items():
            _means(model, deltas, data).save(temporary / "means" / name.replace("/", "-"))

    replace_folder(folder, write)


def _enter(stream: Stream, data: TaskData, folder: Path) -> None:
    """Add what a domain has left to the stream."""
    stream.data.append(data)
    stream.adapters.append(Adapter.load(folder / "update"))
    full = Adapter.load(folder / "tuned")
    stream.tuned = stream.tuned.with_weights(full.params)
    stream.heads.append(dict(full.head_params))
    for name in ("backbone", "sotu", "seq./means"):
        fresh = Prototypes.load(folder / "means" / name.replace("/", "-"))
        stream.kept[name] = stream.kept[name].extended(fresh) if name in stream.kept else fresh


def _means(backbone: Backbone, deltas: Any, data: TaskData) -> Prototypes:
    seen: dict[Any, int] = {}
    rows = []
    for row in data.train:
        label = row[data.task.label]
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= ROWS_OF_MEANS:
            rows.append(row)
    return Prototypes.of(*features(backbone, deltas, data.task, rows, max_length=32))


def _scores(stream: Stream) -> dict[str, float]:
    """Accuracy on the test rows of all domains so far, by system."""
    total = sum_of_updates(stream.backbone, stream.adapters)
    anew = _means(stream.backbone, total, stream.data[0])
    for data in stream.data[1:]:
        anew = anew.extended(_means(stream.backbone, total, data))
    weight = torch.cat([h["weight"] for h in stream.heads])
    bias = torch.cat([h["bias"] for h in stream.heads])
    names = [label for data in stream.data for label in data.task.labels]
    right = dict.fromkeys(SYSTEMS, 0)
    count = 0
    for data in stream.data:
        bare, targets = features(stream.backbone, None, data.task, data.test, max_length=32)
        summed, _ = features(stream.backbone, total, data.task, data.test, max_length=32)
        tuned, _ = features(stream.tuned, None, data.task, data.test, max_length=32)
        answers = {
            "backbone": stream.kept["backbone"].predict(bare),
            "sotu": stream.kept["sotu"].predict(summed),
            "sotu/anew": anew.predict(summed),
            "sequential": [names[i] for i in (tuned @ weight.T + bias).argmax(1).tolist()],
            "seq./means": stream.kept["seq./means"].predict(tuned),
        }
        count += len(targets)
        for name, given in answers.items():
            right[name] += sum(a == b for a, b in zip(given, targets, strict=True))
    return {name: hits / count for name, hits in right.items()}


def _arguments() -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="minilm", help="backbone (default minilm)")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="the stream, in order")
    parser.add_argument("--tasks", type=int, metavar="N", help="only the first N domains")
    parser.add_argument("--density", type=float, default=0.1, help="share of the target weights that SoTU trains")
    parser.add_argument("--targets", nargs="+", default=["query", "key", "value", "attention_output"])
    parser.add_argument(
        "--rate",
        type=float,
        help="learning rate of SoTU; by default that of sequential fine-tuning, so that entries move as far",
    )
    parser.add_argument("--full-rate", type=float, default=1e-4, help="learning rate of sequential fine-tuning")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=None, help="rows per split and domain; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="default: 0")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--quick", action="store_true", help="two domains, 60 rows each, one epoch")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table of the store")
    parser.add_argument("--store", type=Path, default=here / "results", help="folder of the store")
    parser.add_argument("--work", type=Path, default=here / "results" / NAME, help="folder of what domains leave")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.rows, args.epochs = args.tasks or 2, args.rows or 60, 1.0
    if args.tasks is not None and not 0 < args.tasks <= len(args.domains):
        parser.error(f"--tasks {args.tasks}: there are {len(args.domains)} domains")
    args.domains = args.domains[: args.tasks]
    args.rate = args.full_rate if args.rate is None else args.rate
    return args


if __name__ == "__main__":
    main()
