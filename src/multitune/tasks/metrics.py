"""Metrics, on plain numpy and for texts on the usual libraries, in one table. `compute` is the only way in.

Degenerate inputs give a number, never NaN, so that runs can be ranked: a correlation with constant or
non-finite predictions is 0, the error of non-finite predictions is infinite, and a class that is neither
predicted nor present leaves the mean of macro F1.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from multitune.errors import DataError, TaskError, suggest
from multitune.tasks import final_answers, text_metrics
from multitune.tasks.spans import is_bio, spans

Array = NDArray[Any]
Scores = dict[str, float]
"""Names to values; the first is the headline."""

_ID_KINDS = ("classification", "multiple_choice")
_TEXT_KINDS = ("generation",)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the table of metrics."""

    compute: Callable[..., Scores]
    """(predictions, targets, labels) to named values, the headline first; where it is grouped, `groups` too: int64
    `[N]`, equal for rows of one group."""
    kinds: tuple[str, ...]
    """Kinds of task that it judges."""
    higher_is_better: bool = True
    """False for errors."""
    binary: bool = False
    """Whether it needs exactly two labels, of which id 1 is the positive one."""
    grouped: bool = False
    """Whether it judges groups of rows, such as all answers to one question."""
    of_choices: bool = False
    """Whether it compares the texts of choices instead of their ids."""

    @property
    def of_texts(self) -> bool:
        """Whether predictions and targets are texts."""
        return self.kinds == _TEXT_KINDS or self.of_choices


def compute(
    metric: str,
    predictions: Any,
    targets: Any,
    labels: Sequence[str] = (),
    *,
    groups: Sequence[Hashable] | None = None,
) -> Scores:
    """Judge predictions.

    predictions, targets:
        classification, multiple choice: [N] int, label or choice ids
        regression: [N] float
        multilabel: [N, L] of 0 and 1
        tagging: N sequences of int tag ids, each as long as its words (padding taken off)
        generation, and metrics of the texts of choices: N texts; N texts, or tuples of all texts that are right
    groups: for a metric that judges groups of rows: N values, equal for the rows of one group.
    labels: names in id order; tag_f1 needs them, for classification and tagging they bound the ids.

    Returns names to values; the first key is the name of `metric`, its value the headline, and the parts of a
    composite metric follow. Raises TaskError for an unknown metric, DataError for empty, misshapen or
    out-of-range input, and for groups that are missing or that the metric does not read.
    """
    entry = lookup(metric)
    if entry.of_texts:
        return entry.compute(*text_metrics.check_texts(predictions, targets), labels)
    check: Callable[..., tuple[Any, Any]] = _tag_sequences if "tagging" in entry.kinds else _arrays
    more = _groups(metric, entry, groups, len(predictions))
    scores = entry.compute(*check(predictions, targets, labels, entry), labels, **more)
    return {name: float(value) for name, value in scores.items()}


def higher_is_better(metric: str) -> bool:
    """Whether a greater value of the metric is better. Raises TaskError for an unknown metric."""
    return lookup(metric).higher_is_better


def judge_of_training(metric: str, *, by_texts: bool = False) -> str:
    """The metric by which a training run keeps its best tensors: the task's, or perplexity where that judges texts.

    by_texts: whether the run has texts written (`TrainConfig.eval_texts`), so that their metric can choose.
    """
    return "perplexity" if lookup(metric).kinds == _TEXT_KINDS and not by_texts else metric


def lookup(metric: str) -> Metric:
    """The metric of that name; TaskError with the known names when there is none."""
    if metric not in METRICS:
        raise TaskError(f"no metric {metric!r}; there are {', '.join(METRICS)}.{suggest(metric, METRICS)}")
    return METRICS[metric]


def _arrays(predictions: ArrayLike, targets: ArrayLike, labels: Sequence[str], entry: Metric) -> tuple[Array, Array]:
    """Both inputs as arrays of one shape, checked: [N, L] for multilabel, else [N]."""
    p, t = np.asarray(predictions), np.asarray(targets)
    dims = 2 if "multilabel" in entry.kinds else 1
    if p.shape != t.shape or p.ndim != dims or p.size == 0:
        raise DataError(
            f"predictions of shape {list(p.shape)} and targets of shape {list(t.shape)} cannot be "
            f"compared; both need the shape {'[N, L]' if dims == 2 else '[N]'}, N at least 1"
        )
    if "regression" in entry.kinds:
        p, t = p.astype(np.float64), t.astype(np.float64)
        if not np.isfinite(t).all():
            raise DataError(f"target {int(np.argmin(np.isfinite(t)))} is not a finite number")
        return p, t
    limit = 2 if dims == 2 or entry.binary else len(labels)
    return _ids("prediction", p, limit), _ids("target", t, limit)


def _groups(metric: str, entry: Metric, groups: Sequence[Hashable] | None, num_rows: int) -> dict[str, Array]:
    """The groups numbered, as a keyword of the metric's function; none where it judges row by row."""
    if groups is None and not entry.grouped:
        return {}
    if groups is None or not entry.grouped:
        say = "needs groups=…, one for each row" if groups is None else "judges row by row; leave groups out"
        raise DataError(f"metric {metric!r} {say}")
    if len(groups) != num_rows:
        raise DataError(f"{num_rows} predictions and {len(groups)} groups do not fit; give one group for each row")
    numbers: dict[Hashable, int] = {}
    return {"groups": np.array([numbers.setdefault(group, len(numbers)) for group in groups])}


def _ids(what: str, values: Array, limit: int) -> Array:
    """Checked ids: integers from 0, and below `limit` unless that is 0."""
    if values.dtype.kind not in "iub":
        raise DataError(f"a {what} is an integer id, not {values.dtype}; take the argmax of scores first")
    if values.size and (values.min() < 0 or (limit and values.max() >= limit)):
        bad = values.min() if values.min() < 0 else values.max()
        ids = f"0 to {limit - 1}" if limit else "0 up"
        raise DataError(f"{what} {bad} is out of range; ids run from {ids}")
    return values.astype(np.int64)


def _tag_sequences(
    predictions: Any, targets: Any, labels: Sequence[str], entry: Metric
) -> tuple[list[list[int]], list[list[int]]]:
    """Both inputs as lists of equally long lists of ids."""
    p, t = [list(row) for row in predictions], [list(row) for row in targets]
    if [len(row) for row in p] != [len(row) for row in t] or not any(t):
        raise DataError("predictions and targets must be as many sequences of tags, of the same lengths, not all empty")
    for what, rows in (("prediction", p), ("target", t)):
        _ids(what, np.asarray([tag for row in rows for tag in row]), len(labels))
    return p, t


def _accuracy(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    return {"accuracy": np.mean(p == t)}


def _f1(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    from sklearn.metrics import f1_score

    return {"f1": f1_score(t, p, pos_label=1, zero_division=0)}


def _macro_f1(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    from sklearn.metrics import f1_score

    return {"macro_f1": f1_score(t, p, average="macro", zero_division=0)}


def _stance_f1(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    from sklearn.metrics import f1_score

    rest = range(1, max(len(labels), int(t.max()) + 1, 2))
    return {"stance_f1": f1_score(t, p, labels=list(rest), average="macro", zero_division=0)}


def _f1a_and_em(p: Array, t: Array, labels: Sequence[str], groups: Array) -> Scores:
    # MultiRC (Khashabi et al. 2018): F1 over all answers, and the share of questions all of whose answers are right
    wrong = np.bincount(groups, weights=p != t)
    parts = {"f1a": float(_f1(p, t, labels)["f1"]), "question_em": float(np.mean(wrong == 0))}
    return {"f1a_and_em": sum(parts.values()) / 2, **parts}


def _choice_f1_and_em(texts: list[str], references: list[tuple[str, ...]], labels: Sequence[str]) -> Scores:
    # ReCoRD (Zhang et al. 2018): the choice against the right one that it is most like
    scores = text_metrics.token_f1(texts, references)
    return {"choice_f1_and_em": sum(scores.values()) / 2, **scores}


def _micro_f1(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    # 2 TP / (2 TP + FP + FN) over all cells; sklearn would read an [N, 1] indicator as single labels
    hits, stated = np.sum(p * t), np.sum(p) + np.sum(t)
    return {"micro_f1": 2 * hits / stated if stated else 0.0}


def _matthews(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    from sklearn.metrics import matthews_corrcoef

    constant = np.ptp(p) == 0 or np.ptp(t) == 0
    return {"matthews": 0.0 if constant else matthews_corrcoef(t, p)}


def _correlation(p: Array, t: Array) -> float:
    """Pearson's r; 0 where it is undefined."""
    if not np.isfinite(p).all():
        return 0.0
    unit = []
    for x in (p, t):
        x = x / (np.abs(x).max() or 1.0)  # first: the squares of huge or tiny numbers leave the range of floats
        x = x - x.mean()
        unit.append(x / (np.linalg.norm(x) if np.ptp(x) else np.inf))
    return float(np.clip(unit[0] @ unit[1], -1.0, 1.0))


def _pearson(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    return {"pearson": _correlation(p, t)}


def _spearman(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    from scipy.stats import rankdata

    return {"spearman": _correlation(rankdata(p), rankdata(t)) if np.isfinite(p).all() else 0.0}


def _mse(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    with np.errstate(over="ignore"):  # an infinite error is the right answer to a huge one
        return {"mse": np.mean((p - t) ** 2) if np.isfinite(p).all() else np.inf}


def _mae(p: Array, t: Array, labels: Sequence[str]) -> Scores:
    return {"mae": np.mean(np.abs(p - t)) if np.isfinite(p).all() else np.inf}


def _token_accuracy(p: list[list[int]], t: list[list[int]], labels: Sequence[str]) -> Scores:
    hits = [a == b for row in zip(p, t, strict=True) for a, b in zip(*row, strict=True)]
    return {"token_accuracy": sum(hits) / len(hits)}


def _tag_f1(p: list[list[int]], t: list[list[int]], labels: Sequence[str]) -> Scores:
    if not is_bio(labels):
        raise TaskError('tag_f1 needs BIO tags ("O", "B-x", "I-x"); for other tags set metric="token_accuracy"')
    found = {(n, *span) for n, row in enumerate(p) for span in spans([labels[tag] for tag in row])}
    gold = {(n, *span) for n, row in enumerate(t) for span in spans([labels[tag] for tag in row])}
    hits = len(found & gold)
    f1 = 2 * hits / (len(found) + len(gold)) if found or gold else 0.0
    parts = {"precision": hits / len(found) if found else 0.0, "recall": hits / len(gold) if gold else 0.0}
    return {"tag_f1": f1, **parts, **_token_accuracy(p, t, labels)}


def _mean(name: str, *parts: Callable[[Array, Array, Sequence[str]], Scores]) -> Callable[..., Scores]:
    """The metric that is the mean of several, and reports them too."""

    def mean(p: Array, t: Array, labels: Sequence[str]) -> Scores:
        scores = {key: value for part in parts for key, value in part(p, t, labels).items()}
        return {name: sum(scores.values()) / len(scores), **scores}

    return mean


METRICS: dict[str, Metric] = {
    "accuracy": Metric(compute=_accuracy, kinds=_ID_KINDS),
    "f1": Metric(compute=_f1, kinds=("classification",), binary=True),
    "macro_f1": Metric(compute=_macro_f1, kinds=("classification",)),
    "stance_f1": Metric(compute=_stance_f1, kinds=("classification",)),
    "matthews": Metric(compute=_matthews, kinds=("classification",)),
    "accuracy_and_f1": Metric(compute=_mean("accuracy_and_f1", _accuracy, _f1), kinds=("classification",), binary=True),
    "accuracy_and_macro_f1": Metric(
        compute=_mean("accuracy_and_macro_f1", _accuracy, _macro_f1), kinds=("classification",)
    ),
    "f1a_and_em": Metric(compute=_f1a_and_em, kinds=("classification",), binary=True, grouped=True),
    "choice_f1_and_em": Metric(compute=_choice_f1_and_em, kinds=("multiple_choice",), of_choices=True),
    "pearson": Metric(compute=_pearson, kinds=("regression",)),
    "spearman": Metric(compute=_spearman, kinds=("regression",)),
    "pearson_spearman": Metric(compute=_mean("pearson_spearman", _pearson, _spearman), kinds=("regression",)),
    "mse": Metric(compute=_mse, kinds=("regression",), higher_is_better=False),
    "mae": Metric(compute=_mae, kinds=("regression",), higher_is_better=False),
    "micro_f1": Metric(compute=_micro_f1, kinds=("multilabel",)),
    "tag_f1": Metric(compute=_tag_f1, kinds=("tagging",)),
    "token_accuracy": Metric(compute=_token_accuracy, kinds=("tagging",)),
    "perplexity": Metric(compute=text_metrics.not_of_texts, kinds=_TEXT_KINDS, higher_is_better=False),
    "bleu": Metric(compute=text_metrics.bleu, kinds=_TEXT_KINDS),
    "chrf": Metric(compute=text_metrics.chrf, kinds=_TEXT_KINDS),
    "nist": Metric(compute=text_metrics.nist, kinds=_TEXT_KINDS),
    "rouge_l": Metric(compute=text_metrics.rouge, kinds=_TEXT_KINDS),
    "exact_match": Metric(compute=text_metrics.exact_match, kinds=_TEXT_KINDS),
    "token_f1": Metric(compute=text_metrics.token_f1, kinds=_TEXT_KINDS),
    "number_match": Metric(compute=text_metrics.number_match, kinds=_TEXT_KINDS),
    "answer_match": Metric(compute=final_answers.answer_match, kinds=_TEXT_KINDS),
}
"""Every metric. macro_f1 is the mean over labels predicted or present; stance_f1 is macro F1 over all labels
but the first (TweetEval stance leaves out "none"); f1a_and_em and choice_f1_and_em are the means that SuperGLUE
reports for MultiRC and ReCoRD (Wang et al. 2019)."""
