"""Questions that take several steps, with worked solutions where the data set has them or a rule gives them.

The sets stand in the folder of suites, `data_dir` or MULTITUNE_DATA, as <folder>/reasoning/<name>/<split>.parquet.
Chains are the data set's own solutions, and others made by rule from what it says; these are kept only where their
arithmetic, or what they spell, ends in the row's own answer.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitune.errors import DataError, suggest
from multitune.tasks.readers import read_table
from multitune.tasks.schema import Task
from multitune.tasks.suites import data_root
from multitune.tasks.templates import Template
from multitune.tasks.text_metrics import last_number

_MARKUP = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_FLIP = re.compile(r"(\w+) (flips|does not flip) the coin\.")
_OPTION = re.compile(r"^\(?([A-Z])\)\s*")
_LETTERS = "ABCDEFGHIJ"

#: Longest single expression, in characters: longer ones are harder to follow than the steps they are made of.
_EXPRESSION = 80


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, what is right, and ways to get there."""

    text: str
    """The question itself."""
    answer: str
    """A number, yes or no, a word, or the letter of an option."""
    options: tuple[str, ...] = ()
    """What may be chosen, in the order of their letters from A."""
    chains: tuple[str, ...] = ()
    """Worked solutions, each of which ends in the answer."""


def load_questions(name: str, split: str = "test", data_dir: str | Path | None = None) -> list[Question]:
    """A set of questions by name, such as "gsm8k".

    Raises:
        DataError: an unknown name or split, or a folder that is not set.
    """
    short = name.removeprefix("reasoning/")
    if short not in READERS:
        raise DataError(f"no questions '{name}'; there are {', '.join(READERS)}.{suggest(short, READERS)}")
    return [READERS[short](row) for row in read_table(data_root(data_dir) / "reasoning" / short, split=split)]


def question_rows(
    name: str, split: str = "test", data_dir: str | Path | None = None
) -> tuple[Task, list[dict[str, str]]]:
    """A set of questions as rows to judge by: the task that reads them, by their final answers, and its rows.

    Options stand below the question, each with its letter.

    Raises:
        DataError: see `load_questions`.
    """
    short = name.removeprefix("reasoning/")
    rows = [{"question": written(q), "answer": q.answer} for q in load_questions(short, split, data_dir)]
    task = Task(
        name=f"reasoning/{short}",
        kind="generation",
        template=Template(("{question}",)),
        label="answer",
        metric="answer_match",
        format="auto",
    )
    return task, rows


def written(question: Question) -> str:
    """A question with its options below it, each with its letter."""
    options = zip(_LETTERS, question.options, strict=False)
    return "\n".join([question.text, *(f"({letter}) {option}" for letter, option in options)])


def _plain(row: Mapping[str, Any]) -> Question:
    return Question(text=row["question"].strip(), answer=row["answer"].strip())


def _gsm8k(row: Mapping[str, Any]) -> Question:
    solution, _, answer = row["answer"].partition("####")
    answer = answer.strip()
    steps = [(e.replace("$", "").replace(",", "").strip(), r.strip("$ ")) for e, r in _MARKUP.findall(solution)]
    found = [_MARKUP.sub("", solution).strip()]
    wanted = last_number(answer)
    if steps and wanted is not None and all(_holds(e, r) for e, r in steps) and last_number(steps[-1][1]) == wanted:
        found.append("\n".join(f"{e} = {r}" for e, r in steps))
        whole = _substituted(steps)
        value = _value(whole)
        if len(steps) > 1 and len(whole) <= _EXPRESSION and value is not None and abs(value - wanted) < 1e-6:
            found.append(f"{whole} = {answer}")
    return Question(text=row["question"].strip(), answer=answer, chains=tuple(dict.fromkeys(found)))


def _coin_flip(row: Mapping[str, Any]) -> Question:
    question = _plain(row)
    turns = [verb == "flips" for _, verb in _FLIP.findall(question.text)]
    names = [name for name, _ in _FLIP.findall(question.text)]
    if not turns or ("no" if sum(turns) % 2 else "yes") != question.answer:
        return question
    up, steps = True, []
    for name, flips in zip(names, turns, strict=True):
        up ^= flips
        done = "flips the coin" if flips else "does not flip it"
        steps.append(f"{name} {done}: {'heads' if up else 'tails'} up.")
    count, side = sum(turns), "heads" if up else "tails"
    flippers = [name for name, flips in zip(names, turns, strict=True) if flips]
    parity = "odd, so the coin is no longer" if count % 2 else "even, so the coin is still"
    by_count = f"The coin is flipped by {_listed(flippers)}: {count} times. {count} is {parity} heads up."
    left = "one flip is left" if count % 2 else "no flip is left"
    pairs = f"Two flips undo each other. Of {count} in all {left} when pairs are taken off, so it is {side} up."
    chains = (" ".join(["It starts heads up.", *steps]), by_count, pairs)
    return Question(text=question.text, answer=question.answer, chains=chains)


def _last_letters(row: Mapping[str, Any]) -> Question:
    question = _plain(row)
    quoted = re.search(r'"(.*)"', question.text)
    words = quoted[1].split() if quoted else []
    if not words or "".join(w[-1] for w in words) != question.answer:  # names of two words count as one there
        return question
    each = " ".join(f'The last letter of "{w}" is "{w[-1]}".' for w in words)
    grown = [f'"{w}" ends in "{w[-1]}": {question.answer[: i + 1]}.' for i, w in enumerate(words)]
    spelled = " ".join(f"{w}: {'-'.join(w)}, so {w[-1]}." for w in words)
    joined = f'Together they are "{question.answer}".'
    chains = (f"{each} {joined}", " ".join(grown), f"{spelled} {joined}")
    return Question(text=question.text, answer=question.answer, chains=chains)


def _aqua_rat(row: Mapping[str, Any]) -> Question:
    options = tuple(_OPTION.sub("", option).strip() for option in row["options"])
    lines = row["rationale"].strip().splitlines()
    steps = [line for line in lines if not re.match(r"\s*(correct )?(answer|option)\b", line, re.IGNORECASE)]
    chains = ("\n".join(steps).strip(),) if "".join(steps).strip() else ()
    return Question(text=row["question"].strip(), options=options, answer=row["correct"], chains=chains)


def _strategyqa(row: Mapping[str, Any]) -> Question:
    answer = "yes" if row["label"] else "no"
    return Question(text=row["question"].strip(), answer=answer, chains=(row["explanation"].strip(),))


def _commonsense_qa(row: Mapping[str, Any]) -> Question:
    return Question(text=row["question"].strip(), options=tuple(row["choices"]), answer=_LETTERS[row["label"]])


READERS: dict[str, Callable[[Mapping[str, Any]], Question]] = {
    "gsm8k": _gsm8k,
    "svamp": _plain,
    "multiarith": _plain,
    "addsub": _plain,
    "singleeq": _plain,
    "aqua_rat": _aqua_rat,
    "coin_flip": _coin_flip,
    "last_letters": _last_letters,
    "strategyqa": _strategyqa,
    "commonsense_qa": _commonsense_qa,
}
"""By name how a row of the set is read."""


# ---------------------------------------------------------------- arithmetic of worked solutions

_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(expression: str) -> float | None:
    """The value of sums, products and brackets; `None` for anything else."""
    try:
        return _evaluated(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _evaluated(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError(ast.dump(node))


def _holds(expression: str, result: str) -> bool:
    value, wanted = _value(expression), last_number(result)
    return value is not None and wanted is not None and abs(value - wanted) < 1e-6


def _substituted(steps: list[tuple[str, str]]) -> str:
    """The last step with every number that an earlier step gave replaced by that step, in brackets."""
    known: dict[float, str] = {}
    whole = ""
    for expression, result in steps:
        whole = _NUMBER.sub(lambda m: f"({known[float(m[0])]})" if float(m[0]) in known else m[0], expression)
        value = last_number(result)
        if value is not None and _NUMBER.fullmatch(whole) is None:
            known[value] = whole
    return whole


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names or ["nobody"])
