"""The demo of writing: three methods learn to put facts into sentences, then write one batch together.

Every row of that batch is written a second time by a bank that holds nothing but its own adapter, and the texts must be
equal, token for token: sharing a batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from multitune.backbone import Backbone
from multitune.bank import Bank
from multitune.errors import ConfigError
from multitune.generation import Generation, TextEvaluation, evaluate_texts
from multitune.methods import get_method
from multitune.tasks import TaskData, load_task
from multitune.training import train

TASK = "demo/trails"
SETTINGS: Mapping[str, Any] = {"max_new_tokens": 48}
"""How everything is decoded: greedily."""

TRAINING: Mapping[str, Any] = {"epochs": 3, "batch_size": 8, "max_length": 96, "progress": False}
"""Training settings of all adapters; the rest are the usual ones."""

BARE_PROMPT = "Put these facts into a sentence. {facts}\n"
"""What the bare backbone is asked, which was not trained to do it."""


@dataclass(frozen=True, kw_only=True)
class Author:
    """One adapter of the demo: how it learns to write."""

    method: str
    """Name of the method."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its hyper-parameters, where they are not the usual ones."""
    learning_rate: float | None = None
    """Where it is not the method's own."""


AUTHORS = (
    Author(method="prefix"),
    Author(method="lora"),
    Author(method="aot_fc"),
)


@dataclass(frozen=True, kw_only=True)
class WritingAdapter:
    """One trained adapter, judged on rows that it has not seen."""

    method: str
    parameters: int
    """Trained parameters."""
    perplexity: float
    """Of the references, on the held-out rows."""
    evaluation: TextEvaluation
    seconds: float
    """Training time, evaluation on the validation rows included."""
    path: Path


@dataclass(frozen=True, kw_only=True)
class WrittenRow:
    """One row of the mixed batch."""

    facts: str
    adapter: str | None
    """Who wrote it; `None` for the bare backbone."""
    text: str
    reference: str
    agrees: bool
    """Whether it is the text that its adapter writes alone."""


@dataclass(frozen=True, kw_only=True)
class WritingResult:
    """What the demo found."""

    adapters: tuple[WritingAdapter, ...]
    rows: tuple[WrittenRow, ...]
    seconds: float
    """Wall time of everything."""

    @property
    def agrees(self) -> bool:
        """Whether every row got the text it gets alone."""
        return all(row.agrees for row in self.rows)


def run_writing_demo(
    out: str | Path,
    *,
    quick: bool = False,
    threads: int = 2,
    backbone: Backbone | None = None,
    authors: Sequence[Author] = AUTHORS,
    report: Callable[[str], None] = lambda line: None,
) -> WritingResult:
    """Train an adapter per author, and have all of them and the bare backbone write one batch.

    Args:
        out: folder for the adapters and what they wrote, one folder each; adapters there are replaced.
        quick: a few steps and rows, to see that everything runs; the texts mean nothing then.
        threads: CPU threads.
        backbone: by default "smollm2".
        report: called with a line of progress now and then.

    Raises:
        ConfigError: an impossible number of threads, or something in `out` that is not an adapter stands in the way.
    """
    if threads < 1:
        raise ConfigError(f"threads={threads} is not possible; give at least 1")
    start = perf_counter()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backbone = backbone or Backbone.load("smollm2")
        report(f"backbone {backbone.name}: {backbone.num_parameters:,} frozen parameters")
        data = load_task(TASK)
        if quick:
            data = replace(data, train=data.train.select(range(16)), validation=data.validation.select(range(4)))
        adapters = [_learn(backbone, author, data, Path(out), quick, report) for author in authors]
        rows = _write_together(backbone, adapters, data)
    finally:
        torch.set_num_threads(threads_before)
    return WritingResult(adapters=tuple(adapters), rows=tuple(rows), seconds=perf_counter() - start)


def _learn(
    backbone: Backbone, author: Author, data: TaskData, out: Path, quick: bool, report: Callable[[str], None]
) -> WritingAdapter:
    method = get_method(author.method).from_settings(author.settings)
    # The held-out rows choose nothing: a tenth of the training rows says which epoch is kept.
    cut = data.train.train_test_split(test_size=0.1, seed=0)
    inner = replace(data, train=cut["train"], validation=cut["test"])
    chosen = dict(TRAINING) | ({"max_steps": 2} if quick else {})
    if author.learning_rate is not None:
        chosen["learning_rate"] = author.learning_rate
    result = train(
        backbone,
        inner,
        method,
        out / author.method,
        name=author.method,
        overwrite=True,
        report=lambda line: report(f"{author.method}: {line}"),
        **chosen,
    )
    bank = Bank(backbone)
    bank.add(author.method, out / author.method)
    evaluation = evaluate_texts(bank, author.method, data.validation, SETTINGS, batch_size=16)
    evaluation.save(out / f"{author.method}-written")
    shown = ", ".join(f"{name} {value:.1f}" for name, value in evaluation.scores.items())
    report(f"{author.method}: {shown} on {len(evaluation.rows)} held-out rows, trained in {result.seconds:.0f} s")
    return WritingAdapter(
        method=author.method,
        parameters=result.num_method_parameters,
        perplexity=result.best_metric,
        evaluation=evaluation,
        seconds=result.seconds,
        path=out / author.method,
    )


def _write_together(backbone: Backbone, adapters: Sequence[WritingAdapter], data: TaskData) -> list[WrittenRow]:
    """Two held-out rows by every adapter and one by the bare backbone, in one batch and each alone."""
    table = [dict(row) for row in data.validation]
    asked: list[tuple[str | None, dict[str, Any]]] = [
        (adapter.method, table[(2 * i + k) % len(table)]) for i, adapter in enumerate(adapters) for k in range(2)
    ]
    asked.append((None, table[0]))
    rows: list[tuple[str | None, Any]] = [
        (name, row if name is not None else BARE_PROMPT.format(**row)) for name, row in asked
    ]
    bank = Bank(backbone)
    for adapter in adapters:
        bank.add(adapter.method, adapter.path)
    together = bank.generate(rows, SETTINGS, batch_size=len(rows))
    return [
        WrittenRow(
            facts=row["facts"],
            adapter=name,
            text=written.text.strip(),
            reference=row["text"],
            agrees=written.token_ids == _alone(backbone, adapters, pair).token_ids,
        )
        for (name, row), pair, written in zip(asked, rows, together, strict=True)
    ]


def _alone(backbone: Backbone, adapters: Sequence[WritingAdapter], pair: tuple[str | None, Any]) -> Generation:
    bank = Bank(backbone)
    for adapter in adapters:
        if adapter.method == pair[0]:
            bank.add(adapter.method, adapter.path)
    return bank.generate([pair], SETTINGS)[0]
