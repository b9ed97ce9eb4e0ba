"""Does a stream of tasks keep what it learnt?  The ten intent domains one after another, all classes told apart.

    python benchmarks/continual_intents.py --threads 2 --json benchmarks/results/continual_intents.json
    python benchmarks/continual_intents.py --quick        # two domains, few rows: minutes, says nothing

After every domain a text of any domain so far must get its class among the classes of all domains so far. Compared:

    backbone      class means of the frozen backbone's features; nothing is trained
    sotu          a sparse update per domain, added up; class means are kept as they were when their domain came
    sotu/anew     the same, with the class means of all domains so far taken anew (needs their rows)
    sequential    every weight is trained on domain after domain; heads side by side
    seq./means    the same weights, read by class means kept as they were

Needs the folder of public suites (MULTITUNE_DATA).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _store import environment
from torch import Tensor

import multitune
from multitune import Adapter, Backbone, SoTU
from multitune.continual import Prototypes, cosine_of_updates, features, sum_of_updates
from multitune.tasks import TaskData

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
    data: list[TaskData]
    adapters: list[Adapter]
    heads: list[dict[str, Tensor]]
    kept: dict[str, Prototypes]
    """Class means by system, as they were when their domain came."""


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    backbone = multitune.Backbone.load(args.backbone)
    stream = Stream(backbone, backbone, [], [], [], {})
    results = []
    print(f"{'after':20}{'classes':>8}" + "".join(f"{name:>12}" for name in SYSTEMS) + f"{'|cosine|':>10}", flush=True)
    for number, domain in enumerate(args.domains):
        _learn(stream, _task(domain, args), number, args)
        scores = _scores(stream)
        cosine = max(
            (abs(cosine_of_updates(backbone, stream.adapters[-1], a)) for a in stream.adapters[:-1]), default=0
        )
        classes = len(stream.kept["sotu"].labels)
        line = "".join(f"{scores[name]:12.3f}" for name in SYSTEMS)
        print(f"{domain:20}{classes:8}{line}{cosine:10.4f}", flush=True)
        results.append({"after": domain, "classes": classes, "accuracy": scores, "largest_cosine": cosine})
    if args.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        text = json.dumps({"environment": environment(), "settings": settings, "results": results}, indent=1)
        args.json.write_text(text + "\n", "utf-8")


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


def _learn(stream: Stream, data: TaskData, number: int, args: argparse.Namespace) -> None:
    settings = dict(epochs=args.epochs, pooling="mean", max_length=32, progress=False)
    method = SoTU(density=args.density, targets=tuple(args.targets), mask_seed=number)
    trained = multitune.train(stream.backbone, data, method, learning_rate=args.rate, **settings)
    stream.adapters.append(trained.adapter)
    full = multitune.train(stream.tuned, data, "full", learning_rate=args.full_rate, **settings)
    stream.tuned = stream.tuned.with_weights(full.adapter.params)
    stream.heads.append(dict(full.adapter.head_params))
    stream.data.append(data)
    total = sum_of_updates(stream.backbone, stream.adapters)
    ways = {"backbone": (stream.backbone, None), "sotu": (stream.backbone, total), "seq./means": (stream.tuned, None)}
    for name, (model, deltas) in ways.items():
        fresh = _means(model, deltas, data)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="minilm", help="backbone (default minilm)")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="the stream, in order")
    parser.add_argument("--density", type=float, default=0.1, help="share of the target weights that SoTU trains")
    parser.add_argument("--targets", nargs="+", default=["query", "key", "value", "attention_output"])
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of SoTU")
    parser.add_argument("--full-rate", type=float, default=1e-4, help="learning rate of sequential fine-tuning")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=None, help="rows per split and domain; by default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    parser.add_argument("--quick", action="store_true", help="two domains, 60 rows each")
    args = parser.parse_args()
    if args.quick:
        args.domains, args.rows, args.epochs = args.domains[:2], args.rows or 60, 1.0
    return args


if __name__ == "__main__":
    main()
