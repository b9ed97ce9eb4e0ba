"""What serving each method costs in time over the bare backbone, by rows and tokens of the batch.

    python benchmarks/overhead.py [--methods lora,aot_fc] [--rows 1,16,64] [--lengths 16,64,128,384]
    multitune report FOLDER --overhead benchmarks/results/overhead.jsonl

For every method, number of rows and length, in one process and in turn on the same token ids:

- `backbone`: the bare transformers model, which shares its weights with multitune's;
- `alone`: every row the same adapter (of a method that computes token rows `factors`, and `fused` from a stored table);
- `mixed`: half of the rows this method, each with another adapter, the others other methods' adapters in turn;
- `merged`: a copy of the backbone with the adapter in its weights, where the method merges.

Each batch is a new one: making the plan is part of the time. Before anything is timed, rows of the mixed batch are
compared with the same rows alone, and merged or fused outputs with the adapter's. Every measurement is a line of JSON;
a run that was stopped goes on where it was, and lines of another machine or number of threads are left alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import torch
import yaml
from _harness import machine
from _store import append, environment
from _systems import Batch, Setup, Steps, bare_model, difference
from torch import Tensor
from transformers.utils import logging

from multitune import Adapter, Backbone, Bank, DeltaSet, Head, Method, Plan, Task, make_method, method_names
from multitune.comparing.overhead import OverheadRow, read_overhead
from multitune.errors import ConfigError, MultituneError
from multitune.merging import merge_deltas, why_not_mergeable

#: The suite `overhead`: rows of a batch, tokens of a row, backbone.
GRID = yaml.safe_load((resources.files("multitune.comparing") / "suites" / "overhead.yaml").read_text("utf-8"))
OUT = Path(__file__).parent / "results" / "overhead.jsonl"
TASK = Task(name="overhead", kind="classification", template=("text",), labels=("no", "yes"))
#: Largest difference of a row in a batch from that row alone; hidden states are of the order of one.
TOLERANCE = 1e-4
#: The same of a table in bfloat16 from its factors.
TABLE_TOLERANCE = 0.05


class Served(Setup):
    """A setup whose adapters are what training leaves: smaller where a method drops what only training needs."""

    def adapter(self, method: Method) -> Adapter:
        generator = torch.Generator().manual_seed(self.seed())
        expected = method.expected(self.backbone)
        tensors = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) if expected.trains(name) else tensor
            for name, tensor in expected.init(self.backbone, generator).items()
        }
        finished, params = expected.finish(tensors, self.backbone)
        head = Head.for_task(TASK)
        return Adapter(
            name=method.name,
            method=finished,
            params=dict(params),
            head=head,
            head_params=head.init(self.backbone, generator),
            task=TASK,
            backbone=self.backbone.describe(),
        )


@dataclass(frozen=True)
class Case:
    """One method with what it is served by."""

    method: Method
    setup: Served
    others: Sequence[Method]
    most_rows: int

    @cached_property
    def bank(self) -> Bank:
        """Adapters of the method, half as many as the widest batch has rows, and one of every other method."""
        bank = Bank(self.setup.backbone)
        for i in range(max(1, self.most_rows // 2)):
            bank.add(f"own-{i}", self.setup.adapter(self.method))
        for other in self.others:
            bank.add(f"other-{other.name}", self.setup.adapter(other))
        return bank

    @cached_property
    def fused(self) -> Bank:
        """The first adapter with its table in memory."""
        bank = Bank(self.setup.backbone, aot_store="ram")
        adapter = self.bank.adapter("own-0").save(self.setup.folder / self.method.name)
        bank.add("own-0", adapter.fuse(self.setup.backbone, torch.bfloat16))
        return bank

    @cached_property
    def merged(self) -> Backbone | None:
        """The backbone with the first adapter in its weights, if it merges."""
        adapter, backbone = self.bank.adapter("own-0"), self.setup.backbone
        params = {k: t.to(backbone.device) for k, t in adapter.params.items()}
        deltas = DeltaSet(adapter.method.deltas(params, backbone))
        return merge_deltas(backbone, deltas) if why_not_mergeable(backbone, deltas) is None else None

    def names(self, num_rows: int) -> list[str]:
        """Adapters of a mixed batch, shuffled."""
        half = (num_rows + 1) // 2
        own = [f"own-{i % max(1, self.most_rows // 2)}" for i in range(half)]
        rest = [f"other-{self.others[i % len(self.others)].name}" for i in range(num_rows - half)]
        return self.setup.rng.sample(own + rest, num_rows)

    def systems(self, num_rows: int) -> dict[str, Callable[[Batch], object]]:
        """What is timed, the reference first."""
        found: dict[str, Callable[[Batch], object]] = {"backbone": self.setup.run_bare}
        if num_rows > 1 and self.others:
            found["mixed"] = lambda batch: self.run(self.bank, batch.names, batch.ids)
        if self.method.fuses_to_table:
            found["fused"] = lambda batch: self.run(self.fused, ["own-0"] * num_rows, batch.ids)
        merged = self.merged
        if merged is not None:
            found["merged"] = lambda batch: merged.run(Plan([None] * num_rows), batch.ids)
        found[last_form(self.method)] = lambda batch: self.run(self.bank, ["own-0"] * num_rows, batch.ids)
        return found

    def run(self, bank: Bank, names: Sequence[str], ids: Tensor) -> Tensor:
        """Hidden states of a new batch."""
        return Steps(bank).once(Batch(names=list(names), ids=ids))

    def check(self) -> None:
        """Rows of a mixed batch are those rows alone; a table and merged weights give what the adapter gives."""
        ids = self.setup.ids(4, 16)
        names = self.names(4)
        mixed = self.run(self.bank, names, ids)
        alone = torch.cat([self.run(self.bank, [name], ids[i : i + 1]) for i, name in enumerate(names)])
        own = self.run(self.bank, ["own-0"] * 4, ids)
        pairs = [("mixed", mixed, alone, TOLERANCE)]
        if self.method.fuses_to_table:
            pairs.append(("fused", self.run(self.fused, ["own-0"] * 4, ids), own, TABLE_TOLERANCE))
        if self.merged is not None:
            pairs.append(("merged", self.merged.run(Plan([None] * 4), ids), own, 10 * TOLERANCE))
        for form, found, expected, most in pairs:
            worst = difference(found, expected)
            assert worst <= most, f"{self.method.name}, {form}: differs by {worst}, more than {most}"


def last_form(method: Method) -> str:
    """The form whose line is written last, and says that the others are there."""
    return "factors" if method.fuses_to_table else "alone"


def key_of(row: Mapping[str, object]) -> str:
    """What a measurement is of, and where."""
    where = row["environment"]
    assert isinstance(where, Mapping)
    parts = [row["method"], row["settings"], row["rows"], row["length"], row["backbone"]]
    return json.dumps([*parts, where.get("machine"), where.get("threads"), where.get("device")], sort_keys=True)


def measure(of: Case, num_rows: int, length: int, about: dict[str, object], backbone: str) -> list[OverheadRow]:
    """Time all systems on batches of this shape."""
    setup = of.setup
    times = setup.time(of.systems(num_rows), lambda: Batch(names=of.names(num_rows), ids=setup.ids(num_rows, length)))
    bare = times.pop("backbone")
    found = []
    for form, values in times.items():
        ratios = [v / b for v, b in zip(values, bare, strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        found.append(
            OverheadRow(
                method=of.method.name,
                form=form,  # type: ignore[arg-type]
                rows=num_rows,
                length=length,
                ratio=statistics.median(ratios),
                milliseconds=statistics.median(values),
                quartiles=(first, third),
                rounds=len(values),
                backbone=backbone,
                settings=json.loads(json.dumps(of.method.settings())),
                environment=about,
            )
        )
    return found


def chosen(names: str | None) -> list[Method]:
    """The methods asked for; by default all whose adapters share the backbone."""
    asked = names.split(",") if names else [n for n in method_names() if not make_method(n).changes_weights]
    methods = [make_method(name.strip()) for name in asked]
    for method in methods:
        if method.changes_weights:
            raise ConfigError(f"'{method.name}' is served by a backbone of its own, whose time is the bare backbone's")
    return methods


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(word) for word in text.split(",")]


def main() -> None:
    """Parse the options, measure what is missing, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="with commas between (default: all that share the backbone)")
    parser.add_argument("--rows", type=numbers, default=GRID["rows"], help="rows of a batch (default: %(default)s)")
    parser.add_argument("--lengths", type=numbers, default=GRID["lengths"], help="tokens (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="time for one measurement (default: %(default)s)")
    parser.add_argument("--least-rounds", type=int, default=9, help="fewest rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--backbone", default=GRID["backbone"], help="a name, folder or hub id (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default: benchmarks/results)")
    options = parser.parse_args()
    try:
        methods = chosen(options.methods)
        rows = read_overhead(options.out) if options.out.exists() else []
        backbone = Backbone.load(options.backbone, device=options.device)
    except MultituneError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    known = {key_of(row.to_dict()) for row in rows if row.form == last_form(make_method(row.method))}
    about = {**environment(options.threads), "device": _device(backbone)}
    print(machine(options.threads, backbone.device))
    with tempfile.TemporaryDirectory(prefix="multitune-bench-") as folder, torch.no_grad():
        setup = Served(
            backbone=backbone,
            bare=bare_model(backbone),
            device=backbone.device,
            rng=random.Random(0),
            folder=Path(folder),
            quick=False,
            seconds=options.seconds,
            least_rounds=options.least_rounds,
            warm_up=2,
        )
        for method in methods:
            others = [m for m in methods if m.name != method.name]
            of = Case(method, setup, others, max(options.rows))
            run_method(of, options.rows, options.lengths, known, about, options)


def run_method(
    of: Case,
    rows: Sequence[int],
    lengths: Sequence[int],
    known: set[str],
    about: dict[str, object],
    options: argparse.Namespace,
) -> None:
    """Measure what is missing of one method; its adapters and copies are made once, and dropped with it."""
    settings = json.loads(json.dumps(of.method.settings()))
    missing = []
    for num_rows, length in itertools.product(rows, lengths):
        cell = {"method": of.method.name, "settings": settings, "rows": num_rows, "length": length}
        if key_of({**cell, "backbone": options.backbone, "environment": about}) not in known:
            missing.append((num_rows, length))
    if missing:
        of.check()
    for num_rows, length in missing:
        for row in measure(of, num_rows, length, about, options.backbone):
            append(options.out, row.to_dict())
            assert row.quartiles is not None
            spread = "{:.3f} .. {:.3f}".format(*row.quartiles)
            print(
                f"  {row.method:14} {row.form:8} {num_rows:3} x {length:3}  {row.milliseconds:8.2f} ms  "
                f"{row.ratio:.3f}  ({spread}, {row.rounds} rounds)",
                flush=True,
            )


def _device(backbone: Backbone) -> str:
    device = backbone.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    main()
