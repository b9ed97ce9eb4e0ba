"""Chains of thought: one per answer (CoT), several in one response (DCoT), or several drawn and voted on.

DCoT is Puerto et al. 2024 (arXiv 2407.03181): an example asks for k answers, and its response holds k different right
chains, then the final answer. Chain of thought is Wei et al. 2022 (arXiv 2201.11903), zero-shot Kojima et al. 2022
(arXiv 2205.11916), self-consistency Wang et al. 2022 (arXiv 2203.11171).
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitune.answers import PromptFormat, settle_format
from multitune.errors import ConfigError, DataError
from multitune.generation.prompts import AnySettings, settings_per_row
from multitune.generation.settings import GenerationSettings
from multitune.prompting.judged import JudgedRow, save_judged
from multitune.tasks import Task, TaskData, Template
from multitune.tasks.final_answers import marked_from, read_answer, same_answer
from multitune.tasks.reasoning import Question, written
from multitune.tasks.schema import Format

if TYPE_CHECKING:
    from multitune.bank import Bank

#: Zero-shot triggers of which Kojima et al. 2022 (table 4) report the accuracies; four, as DCoT's chains are made with.
TRIGGERS = (
    "Let's think step by step.",
    "Let's think about this logically.",
    "Let's solve this problem by splitting it into steps.",
    "Let's be realistic and think step by step.",
)

FINAL = "[Final answer]"
_SENTENCE_END = re.compile(r"[.!?]\s+|\n")
_ANSWER_FORM = 'End with "The answer is", followed by the answer alone.'


def prompt(question: Question, k: int = 1) -> str:
    """A question that asks for k chains, up to where the first begins, as the paper's repository writes it."""
    _check_k(k)
    letters = " ".join(f"{chr(ord('A') + i)}) {option}" for i, option in enumerate(question.options))
    options = f"[Options] {letters}\n" if letters else ""
    return f"[Question] {question.text}\n{options}[Number of answers] {k}\n[Answer 1]"


def response(chains: Sequence[str], answer: str) -> str:
    """What follows `prompt`: the chains one after the other, then the final answer."""
    _check_k(len(chains))
    first, *others = chains
    more = "".join(f"\n[Answer {i}] {chain}" for i, chain in enumerate(others, start=2))
    return f"{first}{more}\n\n{FINAL} {answer}"


def dcot_rows(questions: Iterable[Question], *, most: int = 4, draws: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    """Training rows of DCoT: for a question with c chains c rows, which ask for 1 to c of them, each in a random order.

    Args:
        questions: those without a chain are left out.
        most: at most so many chains in a row; a question with more has fewer rows.
        draws: how often every question is drawn anew. The paper draws for every epoch: give the number of epochs
            here, and train for one.

    Raises:
        ConfigError: `most` or `draws` below 1.
    """
    _check_counts(most, draws)
    rng, asked = random.Random(seed), list(questions)
    return [
        _row(question, rng.sample(question.chains, k), k)
        for _ in range(draws)
        for question in asked
        for k in range(1, min(len(question.chains), most) + 1)
    ]


def cot_rows(questions: Iterable[Question], *, most: int = 4, draws: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    """Training rows of the baseline: the same questions as often as in `dcot_rows`, each time with one of its chains.

    So both see as many rows and, over a draw, every chain of a question that has at most `most`.

    Raises:
        ConfigError: `most` or `draws` below 1.
    """
    _check_counts(most, draws)
    rng, asked = random.Random(seed), list(questions)
    return [
        _row(question, [chain], 1)
        for _ in range(draws)
        for question in asked
        for chain in rng.sample(question.chains, min(len(question.chains), most))
    ]


def chain_data(
    name: str, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], *, format: Format = "auto"
) -> TaskData:
    """Rows of `dcot_rows` or `cot_rows` as a task that `train` takes, judged by the final answer.

    Raises:
        DataError: no rows to learn from or to judge by.
    """
    from datasets import Dataset

    if not train or not validation:
        raise DataError(f"'{name}' needs rows to learn from and to judge by; questions without chains give none")
    task = Task(
        name=name,
        kind="generation",
        template=Template(("{prompt}",)),
        label="response",
        metric="answer_match",
        format=format,
    )
    return TaskData(task=task, train=Dataset.from_list(list(train)), validation=Dataset.from_list(list(validation)))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was answered to some questions."""

    questions: tuple[Question, ...]
    texts: tuple[tuple[str, ...], ...]
    """Per question what was written: one text, or one per sample."""
    answers: tuple[float | str | None, ...]
    """Per question the final answer; `None` where no text has one."""
    right: tuple[bool, ...]
    num_tokens: int
    """Tokens written, for all questions."""
    num_unfinished: int
    """Texts that ended because they were as long as allowed."""
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of questions that were answered rightly."""
        return sum(self.right) / len(self.right)

    @property
    def rows(self) -> tuple[JudgedRow, ...]:
        """Every question with what was written, and the answer in it ("" for none)."""
        found = zip(self.questions, self.texts, self.answers, self.right, strict=True)
        return tuple(
            JudgedRow(
                prompt=written(question),
                answer="" if chosen is None else f"{chosen:.15g}" if isinstance(chosen, float) else chosen,
                answers=(question.answer,),
                right=right,
                texts=texts,
            )
            for question, texts, chosen, right in found
        )

    def save(self, folder: str | Path, title: str = "answers") -> Path:
        """Write predictions.jsonl, predictions.html (one file that needs no other) and scores.json into a folder."""
        return save_judged(folder, self.rows, title=title, scores={"accuracy": self.accuracy})


def answer(
    bank: Bank,
    adapter: str | None,
    questions: Sequence[Question],
    *,
    k: int = 1,
    samples: int = 1,
    settings: AnySettings | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Answers:
    """Have questions answered by chains of thought.

    Args:
        adapter: trained on rows of this module; `None` has the bare model answer zero-shot, by the first of `TRIGGERS`.
        k: chains in one response (DCoT).
        samples: texts drawn per question, whose most frequent answer counts, of equal ones the first (self-consistency,
            at about the cost of k chains in one response where it equals k). Above 1 `settings` need a temperature.
        settings: how to decode; by default greedily.
        seed: makes the seeds of what is drawn, one per text; of one text per question `settings` may have a seed, which
            then is that of all.

    Raises:
        ConfigError: an impossible k or number of samples, samples that would all be equal, or k without an adapter.
        DataError: no questions, or an adapter that was not trained to answer such.
    """
    (decoding,) = settings_per_row(settings, 1)
    _check_asked(adapter, questions, k, samples, decoding)
    _check_reads_chains(bank, adapter)
    rows = [(adapter, _asked(bank, adapter, q, k)) for q in questions for _ in range(samples)]
    seeds = [seed * 1_000_003 + i for i in range(len(rows))]
    own = [replace(decoding, seed=s) if decoding.samples and decoding.seed is None else decoding for s in seeds]
    start = time.perf_counter()
    found = bank.generate(rows, own, batch_size=batch_size)
    seconds = time.perf_counter() - start
    texts = [tuple(g.text.strip() for g in found[i : i + samples]) for i in range(0, len(found), samples)]
    chosen = tuple(vote([read_answer(t, q.answer) for t in of]) for of, q in zip(texts, questions, strict=True))
    return Answers(
        questions=tuple(questions),
        texts=tuple(texts),
        answers=chosen,
        right=tuple(a == read_answer(q.answer, q.answer) for a, q in zip(chosen, questions, strict=True)),
        num_tokens=sum(len(g.token_ids) for g in found),
        num_unfinished=sum(g.finish_reason == "length" for g in found),
        seconds=seconds,
    )


def vote(answers: Sequence[float | str | None]) -> float | str | None:
    """The most frequent answer, of equally frequent ones that which came first; texts without one have no voice."""
    voices = Counter(a for a in answers if a is not None)
    return voices.most_common(1)[0][0] if voices else None


def sample_chains(
    bank: Bank,
    questions: Sequence[Question],
    *,
    triggers: Sequence[str] = TRIGGERS,
    settings: AnySettings | None = None,
    batch_size: int = 32,
) -> list[Question]:
    """The questions with chains that the bare model wrote added to their own: one per trigger whose answer is right.

    So are the training sets of the paper made, by a far larger model. The sentence that states the answer is cut off.

    Raises:
        DataError: no questions.
    """
    if not questions:
        raise DataError("there are no questions to write chains for; give at least one")
    rows = [(None, _zero_shot(bank, q, trigger)) for q in questions for trigger in triggers]
    found = iter(bank.generate(rows, settings, batch_size=batch_size))
    made = []
    for question in questions:
        texts = [next(found).text for _ in triggers]
        right = [_without_answer(text) for text in texts if same_answer(text, question.answer)]
        chains = dict.fromkeys([*question.chains, *(chain for chain in right if chain)])
        made.append(replace(question, chains=tuple(chains)))
    return made


def _row(question: Question, chains: Sequence[str], k: int) -> dict[str, Any]:
    return {"prompt": prompt(question, k), "response": response(chains, question.answer)}


def _asked(bank: Bank, adapter: str | None, question: Question, k: int) -> Any:
    return _zero_shot(bank, question, TRIGGERS[0]) if adapter is None else {"prompt": prompt(question, k)}


def _zero_shot(bank: Bank, question: Question, trigger: str) -> tuple[int, ...]:
    """Token ids of a question in words and of the trigger, with which the answer begins; a chat where there can be.

    Of an encoder-decoder, the trigger ends the question.
    """
    text = f"{written(question)}\n{_ANSWER_FORM}"
    task = settle_format(
        bank.backbone, Task(name="zero-shot", kind="generation", template=Template(("{question}",)), format="auto")
    )
    writer = PromptFormat(bank.backbone, task)
    if bank.backbone.decodes:  # what the decoder begins with is not the caller's, so that the encoder reads the trigger
        return tuple(writer.prompts([f"{text}\n{trigger}"])[0])
    return (*writer.prompts([text])[0], *writer.answers([trigger])[0][:-1])  # without the end of text


def _without_answer(text: str) -> str:
    """A chain without the sentence that states its answer, where a marker says which one that is."""
    place = marked_from(text)
    if place is None:
        return text.strip()
    ends = [m.end() for m in _SENTENCE_END.finditer(text, 0, place)]
    return text[: ends[-1]].strip() if ends else ""


def _check_asked(
    adapter: str | None, questions: Sequence[Question], k: int, samples: int, decoding: GenerationSettings
) -> None:
    if not questions:
        raise DataError("there are no questions to answer; give at least one")
    _check_k(k)
    if samples < 1:
        raise ConfigError(f"samples={samples} is not possible; give at least 1")
    if samples > 1 and not decoding.samples:
        raise ConfigError(
            f"samples={samples} of greedy decoding are all the same; give settings with a temperature, such as "
            f'{{"temperature": 0.7}}'
        )
    if samples > 1 and decoding.seed is not None:
        raise ConfigError(
            f"samples={samples} with one seed of settings are all the same; give the seed beside settings: "
            f"answer(..., seed={decoding.seed})"
        )
    if adapter is None and k > 1:
        raise ConfigError(f"k={k}: the bare model was not trained to give several chains; give an adapter, or samples")


def _check_reads_chains(bank: Bank, adapter: str | None) -> None:
    """Raise `DataError` for an adapter of another task; one that the bank lacks is named when rows are written for."""
    if adapter is None or adapter not in bank:
        return
    task = bank.adapter(adapter).task
    if task.kind != "generation" or set(task.columns) != {"prompt"}:
        raise DataError(
            f"adapter '{adapter}' was trained on task '{task.name}' of kind {task.kind}, which reads "
            f"{', '.join(task.columns)}, and not on chains; give one trained on chain_data(...), or have its texts "
            f"judged with evaluate_texts"
        )


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k={k} chains are not possible; give at least 1")


def _check_counts(most: int, draws: int) -> None:
    for name, value in (("most", most), ("draws", draws)):
        if value < 1:
            raise ConfigError(f"{name}={value} is not possible; give at least 1")
