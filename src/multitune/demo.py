"""The demo: eight methods learn six small tasks, then answer one batch together, offline, in minutes.

Every row of that batch is answered a second time by a bank that holds nothing but its own adapter. The two
answers must agree, or the demo fails: sharing a batch with other tasks and other methods changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from multitune.adapter import CONFIG_FILE, TENSOR_FILE, UNFINISHED, Adapter
from multitune.backbone import Backbone
from multitune.bank import Bank
from multitune.errors import ConfigError, MultituneError
from multitune.methods import Method, get_method
from multitune.prediction import Prediction
from multitune.tasks import Task, compute, load_task
from multitune.training import TrainConfig, evaluate, train

TOLERANCE = 1e-4
"""Largest difference between a row's answer in the mixed batch and its answer alone: float32 arithmetic."""

BARE_TEXT = "A row without an adapter gets the embedding of the bare backbone."


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One adapter of the demo: a task and how it is learnt."""

    task: str
    """Name of the task behind "demo/"."""
    method: str
    """Name of the method."""
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    """Its hyper-parameters, where they are not the usual ones."""

    @property
    def name(self) -> str:
        """What the adapter is called."""
        return f"{self.task}-{self.method}"


TRAINING: Mapping[str, Any] = {"epochs": 6, "pooling": "mean", "progress": False}
"""Training settings of all lessons; the rest are the usual ones."""

LESSONS = (
    Lesson(task="sentiment", method="lora"),
    Lesson(task="topic", method="aot_fc"),
    Lesson(task="intent", method="ptuning_v2"),
    Lesson(task="urgency", method="ia3"),
    Lesson(task="acceptability", method="bitfit"),
    Lesson(task="paraphrase", method="houlsby"),
    Lesson(task="sentiment", method="layernorm"),
    Lesson(task="intent", method="prompt"),
)


@dataclass(frozen=True, kw_only=True)
class DemoAdapter:
    """One trained adapter."""

    name: str
    task: str
    method: str
    parameters: int
    """Trained parameters without the head."""
    with_head: int
    """The same, and those of the head."""
    num_bytes: int
    """Size of its two files."""
    metric: str
    score: float
    """On the held-out rows."""
    baseline: float
    """The same metric for the answer that is most frequent in training; for amounts, their mean."""
    seconds: float | None
    """Training time, of a resumed run since it was resumed; `None` if an earlier demo had trained it."""
    path: Path


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One row of the mixed batch."""

    text: str
    adapter: str | None
    """The adapter that answered; `None` for the bare backbone."""
    answer: str | float | None
    """Label or amount; `None` for the bare backbone."""
    probability: float | None
    """Of the label; `None` for an amount."""
    expected: str | float | None
    difference: float
    """Largest absolute difference of logits, or of the embedding, from running the row's task alone."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found."""

    adapters: tuple[DemoAdapter, ...]
    rows: tuple[DemoRow, ...]
    backbone_bytes: int
    """Memory of the frozen backbone."""
    bank_bytes: int
    """Memory of all adapters beside it."""
    seconds: float
    """Wall time of everything."""

    @property
    def max_difference(self) -> float:
        """The largest difference of any row."""
        return max(row.difference for row in self.rows)

    @property
    def agrees(self) -> bool:
        """Whether every row got the answer it gets alone; not so if a difference is not a number."""
        return all(row.difference <= TOLERANCE for row in self.rows)


def run_demo(
    out: str | Path,
    *,
    quick: bool = False,
    threads: int = 2,
    backbone: Backbone | None = None,
    lessons: Sequence[Lesson] = LESSONS,
    report: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Train the adapters of `lessons`, save them under `out`, and answer one batch that mixes all of them.

    Args:
        out: folder for the adapters, one folder each. What an earlier demo of equal settings finished there is
            used again, and what it left unfinished goes on; other adapters are replaced.
        quick: one epoch on a few rows, to see that everything runs; the scores mean nothing then.
        threads: CPU threads. The scores depend on their number in the last digits; and on a machine that has
            other work, one is faster than two.
        backbone: by default "minilm".
        report: called with a line of progress now and then.

    Raises:
        ConfigError: something in `out` that is not an adapter stands where one would go.
    """
    start = perf_counter()
    if threads < 1:
        raise ConfigError(f"threads={threads} is not possible; give at least 1")
    for folder in (Path(out) / lesson.name for lesson in lessons):
        if folder.exists() and not any((folder / file).exists() for file in (CONFIG_FILE, UNFINISHED)):
            raise ConfigError(f"{folder} would be replaced, and is not an adapter; give another folder with --out")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backbone = backbone or Backbone.load("minilm")
        report(f"backbone {backbone.name}: {backbone.num_parameters:,} frozen parameters")
        adapters = _learn_all(backbone, lessons, Path(out), quick, report)
        rows = [question for lesson in lessons for question in _questions(lesson)]
        rows.append(_Question(adapter=None, row=BARE_TEXT, text=BARE_TEXT, expected=None))
        report(f"one batch: {len(rows)} rows, {len(adapters)} adapters and the bare backbone, loaded from {out}")
        bank = Bank(backbone)
        for adapter in adapters:
            bank.add(adapter.name, adapter.path)
        together = bank.predict([(q.adapter, q.row) for q in rows], batch_size=len(rows))
        alone = _alone(backbone, {adapter.name: adapter.path for adapter in adapters}, rows)
    finally:
        torch.set_num_threads(threads_before)
    return DemoResult(
        adapters=tuple(adapters),
        rows=tuple(_compare(q, a, b) for q, a, b in zip(rows, together, alone, strict=True)),
        backbone_bytes=sum(p.numel() * p.element_size() for p in backbone.model.parameters()),
        bank_bytes=bank.resident_bytes,
        seconds=perf_counter() - start,
    )


def _learn_all(
    backbone: Backbone, lessons: Sequence[Lesson], out: Path, quick: bool, report: Callable[[str], None]
) -> list[DemoAdapter]:
    adapters = []
    for number, lesson in enumerate(lessons, start=1):
        what = f"[{number}/{len(lessons)}] {lesson.task} with {lesson.method}"
        made = _learn(backbone, lesson, out, quick, lambda line, what=what: report(f"{what}: {_marked(line)}"))  # type: ignore[misc]
        adapters.append(made)
        how = "trained by an earlier demo" if made.seconds is None else f"in {made.seconds:.1f} s"
        report(f"{what}: {made.metric} {made.score:.3f} on held-out rows, {how}")
    return adapters


def _marked(line: str) -> str:
    """A line of training's progress; where it has scores, with the rows they are of."""
    return f"{line}, both on the training rows" if line.startswith("step ") else line


def _learn(backbone: Backbone, lesson: Lesson, out: Path, quick: bool, report: Callable[[str], None]) -> DemoAdapter:
    """Train one adapter, judge it on the held-out rows, save it."""
    data = load_task(f"demo/{lesson.task}")
    rows, held_out, chosen = data.train, data.validation, dict(TRAINING)
    if quick:
        rows, held_out, chosen = rows.select(range(16)), held_out.select(range(16)), chosen | {"epochs": 1}
    method = get_method(lesson.method).from_settings(lesson.method_settings)
    # The best epoch is chosen by the training rows: the held-out rows are looked at once, here, and choose nothing.
    path, seconds = out / lesson.name, None
    adapter = _earlier(backbone, path, data.task, method, TrainConfig(**chosen), len(rows))
    if adapter is None:
        both = replace(data, train=rows, validation=rows)
        result = train(backbone, both, method, path, name=lesson.name, overwrite=True, report=report, **chosen)
        adapter, seconds = result.adapter, result.seconds
    scores = evaluate(backbone, adapter, held_out)
    if adapter.metrics != scores:
        adapter = replace(adapter, metrics=scores).save(path)
    return DemoAdapter(
        name=lesson.name,
        task=data.task.name,
        method=method.name,
        parameters=adapter.num_method_parameters,
        with_head=adapter.num_method_parameters + adapter.num_head_parameters,
        num_bytes=sum((path / file).stat().st_size for file in (CONFIG_FILE, TENSOR_FILE)),
        metric=data.task.metric,
        score=scores[data.task.metric],
        baseline=_baseline(data.task, rows, held_out),
        seconds=seconds,
        path=path,
    )


def _earlier(
    backbone: Backbone, path: Path, task: Task, method: Method, config: TrainConfig, num_train: int
) -> Adapter | None:
    """The adapter in a folder if it is what training there would give, else `None`."""
    try:
        adapter = Adapter.load(path, backbone)
    except MultituneError:
        return None
    wanted = config.resolve(method).identity() | {"num_train": num_train}
    same = (adapter.task, adapter.method) == (task, method) and {k: adapter.recipe.get(k) for k in wanted} == wanted
    return adapter if same else None


def _baseline(task: Task, rows: Any, held_out: Any) -> float:
    """The metric of one and the same answer to every row: the commonest label in training, or the mean."""
    seen: list[Any] = [example.target for example in task.examples(rows)]
    constant = sum(seen) / len(seen) if task.kind == "regression" else Counter(seen).most_common(1)[0][0]
    targets: list[Any] = [example.target for example in task.examples(held_out)]
    return compute(task.metric, [constant] * len(targets), targets, task.labels)[task.metric]


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One row of the mixed batch before it is answered."""

    adapter: str | None
    row: Any
    text: str
    expected: str | float | None


def _questions(lesson: Lesson) -> Iterator[_Question]:
    """Two held-out rows of a task: the first, and the next whose answer differs."""
    data = load_task(f"demo/{lesson.task}")
    rows = [dict(row) for row in data.validation]
    label = data.task.label
    other = next(row for row in rows if row[label] != rows[0][label])
    for row in (rows[0], other):
        text = " | ".join(data.task.encode(row).texts[0])
        yield _Question(adapter=lesson.name, row=row, text=text, expected=row[label])


def _alone(backbone: Backbone, paths: Mapping[str, Path], rows: Sequence[_Question]) -> list[Prediction]:
    """Every row answered by a bank that holds its own adapter only, in a batch of that adapter's rows only."""
    found: dict[int, Prediction] = {}
    for name in dict.fromkeys(q.adapter for q in rows):
        bank = Bank(backbone)
        if name is not None:
            bank.add(name, paths[name])
        places = [i for i, q in enumerate(rows) if q.adapter == name]
        found |= zip(places, bank.predict([(name, rows[i].row) for i in places]), strict=True)
    return [found[i] for i in range(len(rows))]


def _compare(question: _Question, together: Prediction, alone: Prediction) -> DemoRow:
    a, b = (p.embedding if question.adapter is None else p.logits for p in (together, alone))
    assert a is not None and b is not None and not isinstance(together.label, tuple)
    label = together.label
    return DemoRow(
        text=question.text,
        adapter=question.adapter,
        answer=label,
        probability=together.probabilities.get(label) if isinstance(label, str) else None,
        expected=question.expected,
        difference=float((a - b).abs().max()),
    )
