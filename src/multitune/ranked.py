"""Rows whose answers are texts: what a language model reads of such a row, and where it says how likely they are.

A causal model reads the prompt and an answer behind it; a masked one reads the pattern with as many masks as the answer
has tokens; an encoder-decoder reads the prompt with its encoder and an answer with its decoder. Answers that need the
same input share it: one pass over the prompt ranks any number of single tokens.

Legend: R rows, S sequences, C choices of all rows, N tokens of all choices.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multitune.batching import Encoded
from multitune.errors import BackboneError, DataError, DataWarning
from multitune.language_head import AnyLanguageHead
from multitune.language_loss import losses_of
from multitune.tasks import Task

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: Columns of `index_of`: the row, its text, the sequence, the token whose logits are read, the text's token, and the
#: label or choice that the text says.
ROW, TEXT, SEQUENCE, PLACE, TOKEN, CHOICE = range(6)

_SHOWN = 5
_NO_PROMPT = "the prompt has no tokens, so that nothing stands in front of the answer; fill it in"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One possible answer of a row."""

    sequence: int
    """Which of the row's sequences it is read from."""
    places: tuple[int, ...]
    """The positions there whose logits are about its tokens."""
    tokens: tuple[int, ...]
    """Its token ids."""


@dataclass(frozen=True, kw_only=True)
class RankedRow:
    """One row."""

    sequences: tuple[Encoded, ...]
    """What the model reads; seldom as many as there are choices."""
    choices: tuple[Choice, ...]
    """In the order of labels or choices; the texts that say one label side by side."""
    texts: tuple[int, ...] = ()
    """How many of them say each label; empty where each is said by one."""

    def means(self, scores: Sequence[Tensor]) -> Tensor:
        """`[labels]`: of every label the mean over its texts, whose scores are scalars in the order of `choices`."""
        stacked = torch.stack(list(scores))
        return torch.stack([s.mean() for s in stacked.split(self.texts)]) if self.texts else stacked


def index_of(rows: Sequence[RankedRow]) -> Tensor:
    """Where the tokens of all choices stand when the sequences of all rows are stacked, row after row.

    Returns:
        int64 `[N, 6]`, in the order of rows, texts and tokens: row, text within the row, sequence `< S`, position whose
        logits are read, token, label or choice that the text says.
    """
    found, before = [], 0
    for row, ranked in enumerate(rows):
        counts = ranked.texts or (1,) * len(ranked.choices)
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        for number, (choice, label) in enumerate(zip(ranked.choices, labels, strict=True)):
            pairs = zip(choice.places, choice.tokens, strict=True)
            found += [(row, number, before + choice.sequence, place, token, label) for place, token in pairs]
        before += len(ranked.sequences)
    return torch.tensor(found)


def choice_log_probs(head: AnyLanguageHead, hidden: Tensor, index: Tensor) -> Tensor:
    """log p of every token of every choice, given what its model has read by then.

    Semantics: `out[n] = log_softmax(head(hidden[s, p]))[t]` with `s, p, t = index[n, 2:]`.

    Args:
        hidden: last hidden states `[S, T, D]`.
        index: int64 `[N, 6]` as `index_of` makes it; its first five columns are enough.

    Returns:
        float32 `[N]`; differentiable.
    """
    index = index.to(hidden.device)
    return -losses_of(head, hidden[index[:, SEQUENCE], index[:, PLACE]], index[:, TOKEN])


class PatternReader:
    """Puts rows of one task to one backbone."""

    def __init__(self, backbone: Backbone, task: Task) -> None:
        """
        Args:
            task: with a pattern.

        Raises:
            BackboneError: the backbone has no head for tokens, no tokenizer, or a masked one no mask.
            TaskError: a pattern that is not for this kind of model.
        """
        assert task.pattern is not None
        _ = backbone.token_head
        self.backbone, self.task, self.pattern = backbone, task, task.pattern
        self._tokenizer: Any = backbone.tokenizer
        if self._tokenizer is None:
            raise BackboneError(
                f"backbone '{backbone.name}' has no tokenizer, so that it cannot read texts; "
                f"give one: Backbone(model, tokenizer)"
            )
        self._answer_ids: dict[str, list[int]] = {}
        if backbone.writes:
            self.pattern.check_end()
        else:
            self.pattern.check_mask()
            self._check_mask_token()
        self._front = text_ids(backbone, self.pattern.prefix(task, ()), first=True) if backbone.causal else []
        self._build = self._behind if backbone.causal else self._two_sided if backbone.decodes else self._masked

    def _check_mask_token(self) -> None:
        for problem in (
            "has no mask token" if self._tokenizer.mask_token_id is None else "",
            "" if self._tokenizer.is_fast else "is not a fast one, which says where its tokens stand",
        ):
            if problem:
                raise BackboneError(
                    f"the tokenizer of backbone '{self.backbone.name}' {problem}, so that a pattern with {{mask}} "
                    f"cannot be read; give the tokenizer that the masked language model was trained with"
                )

    def read(self, row: Any, room: int) -> tuple[RankedRow, int]:
        """One row.

        Args:
            row: columns to values, or what `Task.as_mapping` takes.
            room: most tokens of a prompt with an answer; of an encoder-decoder, of prompt and of answer. In a row that
                needs more, the longest columns of the prompt lose words at their ends; pattern and answers are never
                cut.

        Returns:
            The row, and how many tokens it needed uncut.

        Raises:
            DataError: pattern and answers alone are too long, a column is missing, or an answer has no tokens.
        """
        values = self.task.as_mapping(row)
        said = self.pattern.wordings(self.task, values)
        counts = tuple(map(len, said)) if any(len(texts) > 1 for texts in said) else ()
        build = partial(self._build, [self._ids_of(text) for texts in said for text in texts])
        found, needed = build(values)
        if needed <= room:
            return replace(found, texts=counts), needed
        low, high = 1, max((len(str(values[column])) for column in self.pattern.columns), default=1)
        best: RankedRow | None = None
        while low < high:  # the most characters of a column with which the row fits
            middle = (low + high) // 2
            shorter, length = build({k: _clipped(v, middle) for k, v in values.items()})
            if length <= room:
                best, low = shorter, middle + 1
            else:
                high = middle
        if best is None:
            raise DataError(
                f"pattern and answers alone take more than the {room} tokens there are (the whole row takes {needed}); "
                f"raise max_length, or shorten the instruction, the pattern or the answers"
            )
        return replace(best, texts=counts), needed

    def _ids_of(self, answer: str) -> list[int]:
        ids = self._answer_ids.get(answer)
        if ids is None:
            ids = self._answer_ids[answer] = answer_ids(self.backbone, answer)
            if len(self._answer_ids) > 10_000:  # a multiple choice has new texts in every row
                self._answer_ids.clear()
        if not ids:
            raise DataError(f"the answer {answer!r} has no tokens, so that nothing says how likely it is; fill it in")
        return ids

    def _behind(self, answers: Sequence[list[int]], values: Mapping[str, Any]) -> tuple[RankedRow, int]:
        """A causal model: every answer behind the prompt; one whose input is the beginning of another's shares it."""
        prompt = [*self._front, *text_ids(self.backbone, self.pattern.text(values), first=not self._front)]
        if not prompt:
            raise DataError(_NO_PROMPT)
        inputs, choices = _continued(prompt, answers)
        sequences = tuple(Encoded(input_ids=ids) for ids in inputs)
        return RankedRow(sequences=sequences, choices=choices), len(prompt) + max(map(len, answers))

    def _two_sided(self, answers: Sequence[list[int]], values: Mapping[str, Any]) -> tuple[RankedRow, int]:
        """An encoder-decoder: the prompt for the encoder, and for the decoder its start and every answer behind it."""
        text = self.pattern.prefix(self.task, ()) + self.pattern.text(values)
        if not text.strip():
            raise DataError(_NO_PROMPT)
        prompt = prompt_ids(self.backbone, text)
        inputs, choices = _continued(list(self.backbone.start_ids), answers)
        sequences = tuple(Encoded(input_ids=prompt, decoder_ids=ids) for ids in inputs)
        return RankedRow(sequences=sequences, choices=choices), max(len(prompt), *map(len, answers))

    def _masked(self, answers: Sequence[list[int]], values: Mapping[str, Any]) -> tuple[RankedRow, int]:
        """A masked model: the pattern with as many masks as an answer has tokens; answers of one length share it."""
        before, after = self.pattern.parts(values)
        before = self.pattern.prefix(self.task, ()) + before
        if self.pattern.spaced:
            before += " "
        lengths = sorted({len(ids) for ids in answers})
        made = [self._with_masks(before, after, count) for count in lengths]
        choices = [
            Choice(sequence=lengths.index(len(ids)), places=made[lengths.index(len(ids))][1], tokens=tuple(ids))
            for ids in answers
        ]
        row = RankedRow(sequences=tuple(encoded for encoded, _ in made), choices=tuple(choices))
        return row, max(len(encoded) for encoded, _ in made)

    def _with_masks(self, before: str, after: str, count: int) -> tuple[Encoded, tuple[int, ...]]:
        """The text with so many masks, and where these stand: by their characters, for a text may hold a mask too."""
        word = str(self._tokenizer.mask_token)
        start, end = len(before), len(before) + count * len(word)
        with self.backbone.tokenizer_lock:
            made = self._tokenizer(
                before + word * count + after,
                truncation=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
            )
        ids, offsets, mask = list(made["input_ids"]), made["offset_mapping"], self._tokenizer.mask_token_id
        places = tuple(i for i, (_, stop) in enumerate(offsets) if ids[i] == mask and start < stop <= end)
        assert len(places) == count, "a tokenizer keeps its mask token in one piece"
        types = list(made["token_type_ids"]) if self.backbone.takes_token_types and "token_type_ids" in made else None
        return Encoded(input_ids=ids, token_type_ids=types), places


def _continued(lead: list[int], answers: Sequence[list[int]]) -> tuple[list[list[int]], tuple[Choice, ...]]:
    """What is read to find every token of answers behind a lead, and where; one that begins another's shares it."""
    inputs: list[list[int]] = []
    homes: dict[int, int] = {}
    for i in sorted(range(len(answers)), key=lambda i: -len(answers[i])):
        own = [*lead, *answers[i][:-1]]
        home = next((k for k, other in enumerate(inputs) if other[: len(own)] == own), len(inputs))
        if home == len(inputs):
            inputs.append(own)
        homes[i] = home
    first = len(lead) - 1
    return inputs, tuple(
        Choice(sequence=homes[i], places=tuple(range(first, first + len(ids))), tokens=tuple(ids))
        for i, ids in enumerate(answers)
    )


def answer_ids(backbone: Backbone, answer: str) -> list[int]:
    """Token ids of an answer as training has it: behind a prompt the text alone.

    The decoder of an encoder-decoder has an answer to itself: with the special tokens of the tokenizer and the end of
    text, which count among its tokens, as in transformers' `labels`.

    Returns:
        None where the answer has no text.
    """
    if not backbone.decodes:
        return text_ids(backbone, answer, first=False)
    text, ends = answer.strip(), backbone.eos_ids
    ids = prompt_ids(backbone, text) if text else []
    return [*ids, ends[0]] if ids and ends and ids[-1] not in ends else ids


def prompt_ids(backbone: Backbone, text: str) -> list[int]:
    """Token ids of a whole text, with the special tokens that the tokenizer gives one."""
    tokenizer: Any = backbone.tokenizer
    with backbone.tokenizer_lock:
        return list(tokenizer(text, truncation=False, return_attention_mask=False)["input_ids"])


def text_ids(backbone: Backbone, text: str, *, first: bool) -> list[int]:
    """Token ids of a text; with the token that begins one, if the tokenizer has it and this comes `first`."""
    tokenizer: Any = backbone.tokenizer
    if not text:
        return []
    with backbone.tokenizer_lock:
        own = text[1:] if not first and text.startswith(" ") and _doubles_spaces(tokenizer) else text
        found = tokenizer(own, add_special_tokens=False, truncation=False, return_attention_mask=False)
        begins = tokenizer("", truncation=False, return_attention_mask=False)["input_ids"][:1] if first else []
    starts = begins if begins == [tokenizer.bos_token_id] else []
    return [*starts, *found["input_ids"]]


def _doubles_spaces(tokenizer: Any) -> bool:
    """Whether it puts a space in front of every text, even of one that begins with a space, as Llama 2's does.

    What follows a prompt with a space would have two of them there, which no text that the model has read has.
    """
    bare, spaced = (tokenizer.tokenize(text) for text in ("a", " a"))
    return bool(bare) and bare[0].startswith("▁") and len(spaced) > len(bare)


def encode_ranked(
    backbone: Backbone, task: Task, table: Sequence[Mapping[str, Any]], *, max_length: int, split: str
) -> list[RankedRow]:
    """Every row of a table.

    Args:
        max_length: most tokens of a prompt with an answer; of an encoder-decoder, of prompt and of answer.
        split: what messages call the rows.

    Raises:
        DataError: a row that cannot be read; names it, counted from 0.
    """
    reader = PatternReader(backbone, task)
    found: list[RankedRow] = []
    cut: list[tuple[int, int]] = []
    for number, row in enumerate(table):
        try:
            ranked, needed = reader.read(row, max_length)
        except DataError as error:
            raise DataError(f"{split} row {number} of task '{task.name}': {error}") from error
        found.append(ranked)
        if needed > max_length:
            cut.append((number, needed))
    if cut:
        shown = ", ".join(str(row) for row, _ in cut[:_SHOWN]) + (", ..." if len(cut) > _SHOWN else "")
        warnings.warn(
            f"task '{task.name}': {len(cut)} of {len(found)} {split} rows are longer than max_length={max_length}, and "
            f"their longest columns lose words at the end (rows {shown}, counted from 0; the longest needs "
            f"{max(needed for _, needed in cut)})",
            DataWarning,
            stacklevel=4,
        )
    return found


def _clipped(value: Any, most: int) -> Any:
    """A value of at most so many characters; a text loses whole words where it has several."""
    text = str(value)
    if len(text) <= most:
        return value
    kept = text[:most]
    words = kept.rsplit(None, 1)
    return words[0] if len(words) > 1 and not text[most].isspace() else kept
