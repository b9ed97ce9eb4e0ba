"""The answer at the end of a chain of thought, and whether it is the right one.

A reference says what kind of answer is asked for: a number, the letter of an option, yes or no, or a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean

from multitune.tasks.text_metrics import NUMBER, References, Scores, Texts, as_number, normalised

#: What stands in front of an answer, the surest first; of one marker the last place counts.
_MARKERS = (
    re.compile(r"\[final answer\]:?", re.IGNORECASE),
    re.compile(r"####"),
    re.compile(r"\banswer(?: is|:)[ :]*", re.IGNORECASE),
)
_LETTER = re.compile(r"(?<![A-Za-z'])\(?([A-Z])\)?(?![A-Za-z'])")
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def final_answer(text: str) -> str:
    """What follows the last "[Final answer]", else "####", else "answer is" or "answer:", else the last line.

    One line of it, without a full stop; "" for a text without a word.
    """
    found, _ = _marked(text)
    return found


def same_answer(text: str, reference: str) -> bool:
    """Whether a text ends with the answer that the reference ends with.

    For a number: the first one behind the marker, or without a marker the text's last one (Kojima et al. 2022, arXiv
    2205.11916, appendix A.6, read the texts likewise). Letters of options, and yes or no, by the same rule; "A" may
    stand in brackets. Else both answers as `exact_match` compares texts.
    """
    return read_answer(text, reference) == read_answer(reference, reference)


def read_answer(text: str, like: str) -> float | str | None:
    """The final answer of a text, of the kind that the final answer of `like` is; `None` where there is no such.

    Returns:
        A number, a letter, "yes" or "no", or a text in lower case without punctuation and articles, where it has more.
    """
    wanted = final_answer(like).strip()
    if NUMBER.fullmatch(wanted.strip("$% ")):
        found = _pick(NUMBER, text)
        return None if found is None else as_number(found)
    if re.fullmatch(r"\(?[A-Z]\)?", wanted):
        return _pick(_LETTER, text)
    if _YES_OR_NO.fullmatch(wanted):
        said = _pick(_YES_OR_NO, text)
        return None if said is None else said.lower()
    answer = final_answer(text)
    return normalised(answer) or answer.lower() or None  # an article may be the answer


def answer_match(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Share of texts whose final answer is that of a reference."""
    hits = [any(same_answer(text, r) for r in of_row) for text, of_row in zip(texts, references, strict=True)]
    return {"answer_match": mean(map(float, hits))}


def _pick(pattern: re.Pattern[str], text: str) -> str | None:
    """The first match behind the marker, or without a marker the last one of all."""
    answer, marked = _marked(text)
    found = pattern.findall(answer if marked else text)
    return None if not found else str(found[0] if marked else found[-1])


def marked_from(text: str) -> int | None:
    """Where the marker of the final answer begins; `None` for a text without one."""
    found = _last_marker(text)
    return None if found is None else found.start()


def _last_marker(text: str) -> re.Match[str] | None:
    for marker in _MARKERS:
        matches = list(marker.finditer(text))
        if matches:
            return matches[-1]
    return None


def _marked(text: str) -> tuple[str, bool]:
    """The final answer, and whether a marker says that it is one."""
    marker = _last_marker(text)
    if marker is not None:
        behind = text[marker.end() :].strip().splitlines()
        return (_bare(behind[0]) if behind else ""), True
    lines = [line for line in text.splitlines() if line.strip()]
    return (_bare(lines[-1]) if lines else ""), False


def _bare(line: str) -> str:
    return line.strip().removesuffix(".").strip()
