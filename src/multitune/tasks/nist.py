"""NIST (Doddington 2002): n-grams of a text that its references hold, each by what its last word tells.

NLTK's `corpus_nist` is equal where every text has one reference. Of several it takes one per length of n-gram, where
the NIST's own script, whose numbers are published, clips counts by the reference that has most and compares lengths
with their mean; and it divides by zero where no text has five words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import mean

Words = Sequence[str]
Counts = Counter[tuple[str, ...]]

LONGEST = 5
#: The penalty is a half where texts are two thirds as long as their references.
_STEEPNESS = -math.log(2) / math.log(1.5) ** 2


def nist_score(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Corpus NIST of tokenized texts, by n-grams of up to 5 words.

    Semantics (eq. 3 there):  `Σ_n [Σ Info(w_1 … w_n) / (n-grams of all texts)] · exp(β log² min(L / L_ref, 1))`, where
    the inner sum runs over the n-grams that a text shares with its references, each as often as the reference that has
    it most often, `Info(w_1 … w_n) = log2(count(w_1 … w_(n-1)) / count(w_1 … w_n))` in all references, L the words of
    the texts and L_ref those of their references, the mean of each text's.

    Args:
        references: of every text at least one.
    """
    info = _information(reference for of_text in references for reference in of_text)
    total = 0.0
    for n in range(1, LONGEST + 1):
        gained, count = 0.0, 0
        for text, of_text in zip(texts, references, strict=True):
            ours, most = _ngrams(text, n), Counter[tuple[str, ...]]()
            for reference in of_text:
                most |= _ngrams(reference, n)
            gained += sum(info[ngram] * times for ngram, times in (ours & most).items())
            count += ours.total()
        total += gained / max(count, 1)
    written, wanted = sum(map(len, texts)), sum(mean(map(len, of_text)) for of_text in references)
    ratio = min(written / wanted, 1.0) if wanted else 1.0
    return total * math.exp(_STEEPNESS * math.log(ratio) ** 2) if ratio else 0.0


def _information(references: Iterable[Words]) -> dict[tuple[str, ...], float]:
    """Of every n-gram of the references, in bits, what its last word tells behind the others."""
    counts: Counts = Counter()
    num_words = 0
    for reference in references:
        num_words += len(reference)
        for n in range(1, LONGEST + 1):
            counts.update(_ngrams(reference, n))
    return {ngram: math.log2((counts[ngram[:-1]] if ngram[1:] else num_words) / c) for ngram, c in counts.items()}


def _ngrams(words: Words, n: int) -> Counts:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
