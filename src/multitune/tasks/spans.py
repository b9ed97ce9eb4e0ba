"""Entities in BIO tags: "B-x" begins one of type x, "I-x" goes on with it, "O" is outside."""

from collections.abc import Iterable, Sequence


def is_bio(labels: Sequence[str]) -> bool:
    """Whether label names are BIO tags: "O", and at least one of "B-x" and "I-x", and nothing else."""
    inside = [label for label in labels if label != "O"]
    return "O" in labels and bool(inside) and all(label[:2] in ("B-", "I-") and label[2:] for label in inside)


def spans(tags: Iterable[str]) -> list[tuple[int, int, str]]:
    """The entities in a sequence of BIO tags, as (first word, word after the last, type).

    As in the CoNLL evaluation, an "I-x" that follows another type or "O" begins an entity too.
    """
    found: list[tuple[int, int, str]] = []
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        position, _, new = tag.partition("-")
        if kind and (position != "I" or new != kind):
            found.append((start, i, kind))
            kind = ""
        if new and not kind:
            start, kind = i, new
    return found
