"""Metrics of written texts, each text judged by all references of its row; the arithmetic is the libraries'.

BLEU and chrF are sacreBLEU's and run from 0 to 100; NIST has no upper end; everything else runs from 0 to 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import mean
from typing import Any

from multitune.errors import ConfigError, DataError
from multitune.tasks.nist import nist_score

Texts = Sequence[str]
References = Sequence[Sequence[str]]
Scores = dict[str, float]

BOOTSTRAP_SAMPLES = 1000
"""Samples drawn for an interval, as sacreBLEU does by default; it always draws the same ones."""

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A score and what it may be on other rows like these: a 95 % bootstrap confidence interval."""

    score: float
    low: float
    high: float


def bleu(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Corpus BLEU (Papineni et al. 2002) and chrF (Popović 2015), by sacreBLEU with its usual settings."""
    streams = _streams(references)
    found = {"bleu": _sacrebleu().corpus_bleu(list(texts), streams).score}
    return found | chrf(texts, references)


def chrf(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Corpus chrF (Popović 2015), by sacreBLEU."""
    return {"chrf": _sacrebleu().corpus_chrf(list(texts), _streams(references)).score}


def nist(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Corpus NIST (Doddington 2002) of lower-case words, split as by sacreBLEU, as mteval-v13a counts."""
    _sacrebleu()
    split = import_module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()

    def words(text: str) -> list[str]:
        return str(split(text.lower())).split()

    return {"nist": nist_score([words(t) for t in texts], [[words(r) for r in of_row] for of_row in references])}


def bleu_interval(texts: Texts, references: References, num_samples: int = BOOTSTRAP_SAMPLES) -> Interval:
    """Corpus BLEU with a bootstrap confidence interval (Koehn 2004), by sacreBLEU.

    Raises:
        DataError: no texts, or not as many rows of references.
        ConfigError: sacreBLEU is not installed.
    """
    check_texts(texts, references)
    _sacrebleu()
    metric = import_module("sacrebleu.metrics").BLEU()
    found = metric.corpus_score(list(texts), _streams(references), n_bootstrap=num_samples)
    return Interval(score=found.score, low=found._mean - found._ci, high=found._mean + found._ci)


def rouge(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Mean F1 of ROUGE-L, -1 and -2 (Lin 2004) with stemming, by rouge-score; of several references the best one's."""
    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL", "rouge1", "rouge2"], True)
    by_row = [scorer.score_multi(list(r), text) for text, r in zip(texts, references, strict=True)]
    names = {"rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}
    return {name: mean(row[theirs].fmeasure for row in by_row) for name, theirs in names.items()}


def exact_match(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Share of texts that equal a reference, case, punctuation, articles and runs of spaces aside (as SQuAD's do)."""
    return {"exact_match": _best(texts, references, lambda a, b: float(normalised(a) == normalised(b)))}


def token_f1(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Mean F1 of words between a text and its best reference (Rajpurkar et al. 2016), and exact match."""
    return {"token_f1": _best(texts, references, _word_f1), **exact_match(texts, references)}


def number_match(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Share of texts whose last number equals that of a reference, such as the one behind GSM8K's "####"."""

    def same(text: str, reference: str) -> float:
        wanted, found = last_number(reference), last_number(text)
        if wanted is None:
            raise DataError(f"the reference {reference[:60]!r} holds no number; judge this task by exact_match")
        return float(found == wanted)

    return {"number_match": _best(texts, references, same)}


def last_number(text: str) -> float | None:
    """The last number in a text; commas between thousands are read over."""
    found = NUMBER.findall(text)
    return as_number(found[-1]) if found else None


def as_number(text: str) -> float:
    """The value of what `NUMBER` matches."""
    return float(text.replace(",", ""))


def normalised(text: str) -> str:
    """A text in lower case without punctuation, articles and runs of spaces (Rajpurkar et al. 2016)."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def not_of_texts(texts: Texts, references: References, labels: Sequence[str] = ()) -> Scores:
    """Perplexity is measured by running the model over the references, not read from texts."""
    raise DataError("perplexity is no metric of texts; evaluate(backbone, adapter, data) measures it")


def check_texts(texts: Any, references: Any) -> tuple[list[str], list[tuple[str, ...]]]:
    """Both as lists; DataError unless there is a text and a non-empty tuple of references for every row."""
    found, wanted = list(texts), [(r,) if isinstance(r, str) else tuple(r) for r in references]
    if not found or len(found) != len(wanted) or not all(wanted):
        raise DataError(
            f"{len(found)} texts and references for {len(wanted)} rows cannot be compared; give at least one text, and "
            f"one reference or a list of them for each"
        )
    return found, wanted


def _word_f1(text: str, reference: str) -> float:
    ours, theirs = normalised(text).split(), normalised(reference).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:  # both without a word are equal
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))


def _best(texts: Texts, references: References, score: Callable[[str, str], float]) -> float:
    return mean(max(score(text, r) for r in of_row) for text, of_row in zip(texts, references, strict=True))


def _streams(references: References) -> list[list[str | None]]:
    """References as sacreBLEU takes them: the first ones of all rows, the second ones, None where a row has no more."""
    most = max(len(r) for r in references)
    return [[r[i] if i < len(r) else None for r in references] for i in range(most)]


def _sacrebleu() -> Any:
    return _library("sacrebleu", "sacrebleu")


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"this metric is computed by {package}, which is not installed: pip install 'multitune[generation]'"
        ) from error
