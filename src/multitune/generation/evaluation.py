"""What an adapter writes beside what it should have written: scores, a file of JSON lines, and a page to browse."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitune.answers import settle_format
from multitune.errors import ConfigError, DataError
from multitune.generation.pages import cell, listed, save_answers, table_page
from multitune.generation.prompts import encode_rows, settings_per_row
from multitune.generation.settings import GenerationSettings
from multitune.tasks import Example, Task, compute
from multitune.tasks.text_metrics import Interval, bleu_interval

if TYPE_CHECKING:
    from multitune.bank import Bank
    from multitune.generation.prompts import AnySettings

BARE = "bare"
"""What the backbone without an adapter is called."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """One row of an evaluation."""

    prompt: str
    """The prompt as the template renders it."""
    text: str
    """What was written."""
    references: tuple[str, ...]
    """What is right: the answers of all rows with this prompt."""
    finish_reason: str
    """As `Generation.finish_reason`."""


@dataclass(frozen=True, kw_only=True)
class TextEvaluation:
    """Texts of one adapter, judged."""

    adapter: str
    """Its name in the bank; "bare" for the backbone alone."""
    task: Task
    """What was asked of it."""
    scores: dict[str, float]
    """By the task's metric, its parts after it; of a task that names perplexity, by ROUGE-L."""
    interval: Interval | None
    """BLEU with a bootstrap confidence interval, where BLEU is the metric."""
    rows: tuple[Written, ...]
    settings: GenerationSettings
    """How the texts were decoded."""
    seconds: float
    """Time it took to write."""
    num_tokens: int
    """Tokens written."""

    def save(self, folder: str | Path) -> Path:
        """Write predictions.jsonl, predictions.html (one file that needs no other) and scores.json into a folder."""
        facts = {"adapter": self.adapter, "task": self.task.name, "rows": len(self.rows), "scores": self.scores}
        facts |= {"interval": None if self.interval is None else asdict(self.interval)}
        facts |= {"settings": asdict(self.settings)}
        facts |= {"seconds": round(self.seconds, 2), "tokens": self.num_tokens}
        return save_answers(folder, map(asdict, self.rows), facts, page(self))


def evaluate_texts(
    bank: Bank,
    name: str | None,
    table: Any,
    settings: AnySettings | None = None,
    *,
    task: Task | None = None,
    batch_size: int = 32,
    num_rows: int | None = None,
    metric: str | None = None,
) -> TextEvaluation:
    """Have an adapter, or the bare backbone, write for the rows of a table, and judge what it writes.

    Rows with one prompt are one row, all of whose answers are right.

    Args:
        bank: holds the adapter under `name`; a task of kind generation. `None` asks the bare backbone.
        table: labelled rows, as `Task.examples` takes them.
        task: how rows are put and judged; by default the adapter's own. The bare backbone needs one.
        settings: how to decode; by default greedily.
        num_rows: judge the first so many prompts only, at least 1.
        metric: what judges the texts; by default the task's own.

    Raises:
        TaskError: an unknown metric, or one that judges no texts.
        DataError: the adapter does not write, there are no rows, or one does not fit its task.
        ConfigError: an impossible number of rows; or the library that computes the metric is not installed.
    """
    if num_rows is not None and num_rows < 1:
        raise ConfigError(f"num_rows={num_rows} is not possible; give at least 1")
    own = task is None
    if task is None:
        if name is None:
            raise DataError("the bare backbone has no task of its own; give task=…, such as load_task(NAME).task")
        task = bank.adapter(name).task
    task = settle_format(bank.backbone, task)
    if task.kind != "generation":
        who = f"adapter '{name}' is for" if own else f"task '{task.name}' is of kind"
        raise DataError(f"{who} {task.kind} and writes nothing; judge it with evaluate")
    task = task if metric is None else replace(task, metric=metric)
    wanted = references_by_prompt(task, table)
    prompts = list(wanted)[:num_rows]
    if not prompts:
        raise DataError(f"there are no rows to judge adapter '{name or BARE}' by; give a table with at least one")
    rows = {prompt: wanted[prompt][0] for prompt in prompts}
    judge = "rouge_l" if task.metric == "perplexity" else task.metric
    references = [wanted[prompt][1] for prompt in prompts]
    # Says now, and not after an hour of writing, that a library is missing or a reference cannot be judged by.
    compute(judge, ["1"] * len(references), references)
    (decoding,) = settings_per_row(settings, 1)
    start = time.perf_counter()
    asked: Sequence[Any] = list(rows.values()) if own else _encoded(bank, name, task, rows, decoding)
    found = bank.generate([(name, row) for row in asked], decoding, batch_size=batch_size)
    seconds = time.perf_counter() - start
    texts = [g.text.strip() for g in found]
    return TextEvaluation(
        adapter=name or BARE,
        task=task,
        scores=compute(judge, texts, references),
        interval=bleu_interval(texts, references) if judge == "bleu" and len(texts) > 1 else None,
        rows=tuple(
            Written(prompt=p, text=t, references=r, finish_reason=g.finish_reason)
            for p, t, r, g in zip(prompts, texts, references, found, strict=True)
        ),
        settings=decoding,
        seconds=seconds,
        num_tokens=sum(len(g.token_ids) for g in found),
    )


def _encoded(
    bank: Bank, name: str | None, task: Task, rows: Mapping[str, Any], settings: GenerationSettings
) -> Sequence[Any]:
    """Token ids of rows that a task other than the adapter's own puts."""
    backbone = bank.backbone
    room = backbone.max_length - (0 if backbone.decodes else settings.max_new_tokens)
    if name is not None and not bank.adapter(name).method.changes_weights:
        (deltas,) = bank.delta_sets([name])
        room -= 0 if deltas is None else deltas.num_positions
    return encode_rows(backbone, task, rows.values(), room, "row")


def references_by_prompt(task: Task, table: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """By prompt a row that has it, and the answers of all rows that have it, each once, in order."""
    examples = task.examples(table)
    answers = examples_by_prompt(examples)
    rows: dict[str, Any] = {}
    for row, example in zip(table, examples, strict=True):
        rows.setdefault(example.texts[0][0], row)
    return {prompt: (row, answers[prompt]) for prompt, row in rows.items()}


def examples_by_prompt(examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """By prompt the answers of all examples that have it, each once, in order."""
    found: dict[str, tuple[str, ...]] = {}
    for example in examples:
        assert isinstance(example.target, tuple)
        prompt = example.texts[0][0]
        found[prompt] = tuple(dict.fromkeys([*found.get(prompt, ()), *map(str, example.target)]))
    return found


def page(evaluation: TextEvaluation) -> str:
    """The evaluation as one HTML page without anything from elsewhere."""
    e = evaluation
    shown = ", ".join(f"{name} {value:.4g}" for name, value in e.scores.items())
    if e.interval is not None:
        shown += f" (95 % interval of bleu: {e.interval.low:.1f} to {e.interval.high:.1f})"
    return table_page(
        f"{e.adapter} on {e.task.name}",
        f"{len(e.rows)} rows, {shown}; {e.num_tokens} tokens in {e.seconds:.1f} s; {_decoded(e.settings)}",
        ("prompt", "written", "references"),
        ([cell(row.prompt), cell(row.text, _cut(row)), listed(row.references)] for row in e.rows),
    )


def _decoded(settings: GenerationSettings) -> str:
    """How texts were decoded: their length, and what is not as usual."""
    usual = GenerationSettings(max_new_tokens=settings.max_new_tokens)
    changed = {f.name: getattr(settings, f.name) for f in fields(settings)}
    changed = {name: value for name, value in changed.items() if value != getattr(usual, name)}
    more = "".join(f", {name} {list(v) if isinstance(v, tuple) else v}" for name, v in changed.items())
    return f"at most {settings.max_new_tokens} tokens each{more}"


def _cut(row: Written) -> str:
    """Why the text ended, where that is worth a note."""
    return "" if row.finish_reason in ("eos", "stop") else row.finish_reason
