"""From texts to padded tensors.   Legend: B sequences, T tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from multitune.errors import BackboneError
from multitune.inputs import Batch
from multitune.tasks.templates import SlottedText

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One tokenized sequence."""

    input_ids: list[int]
    token_type_ids: list[int] | None = None
    word_starts: tuple[int, ...] = ()
    """Tagging: the position of each word's first token; words cut off by truncation are missing at the end."""
    slots: tuple[int, ...] = ()
    """For each slot of the template the position of the token that it stands in front of, in order."""

    decoder_ids: list[int] | None = None
    """Encoder-decoders: what the decoder reads, its start included, where it is known by then."""
    cut: bool = False
    """Whether the text had more tokens, as far as the tokenizer tells: a slow one does not."""

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(
    backbone: Backbone, sequences: Sequence[tuple[str, ...]], *, max_length: int, words: bool = False
) -> list[Encoded]:
    """Tokenize sequences, each a text, a pair of texts, or (with `words`) a list of words.

    Args:
        max_length: tokens, special tokens included; longer sequences are cut, the longer text of a pair first.

    Raises:
        BackboneError: the backbone has no tokenizer, or one that cannot align words.
    """
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise BackboneError(
            f"backbone '{backbone.name}' has no tokenizer, so it takes token ids only; "
            f"give one: Backbone(model, tokenizer)"
        )
    if not sequences:
        return []
    if words:
        texts: list[Any] = [list(s) for s in sequences]
        return _call(backbone, texts, None, max_length, words=True)
    out: list[Encoded | None] = [None] * len(sequences)
    for parts in sorted({len(s) for s in sequences}):  # the tokenizer takes pairs and single texts apart
        where = [i for i, s in enumerate(sequences) if len(s) == parts]
        first = [sequences[i][0] for i in where]
        second = [sequences[i][1] for i in where] if parts > 1 else None
        for i, encoded in zip(where, _call(backbone, first, second, max_length, words=False), strict=True):
            out[i] = encoded
    return [e for e in out if e is not None]


def _call(
    backbone: Backbone, first: list[Any], second: list[Any] | None, max_length: int, words: bool
) -> list[Encoded]:
    tokenizer = backbone.tokenizer
    assert tokenizer is not None
    slots = (
        [_slots_of(texts) for texts in zip(first, second, strict=True)] if second else [_slots_of((t,)) for t in first]
    )
    slotted = not words and any(map(any, slots))
    if (words or slotted) and not tokenizer.is_fast:
        what = "token tagging" if words else "a template with slots"
        raise BackboneError(f"{what} needs a fast tokenizer, which backbone '{backbone.name}' lacks")
    with backbone.tokenizer_lock:  # truncation is state of a fast tokenizer, which two threads must not set at once
        result = tokenizer(
            first,
            second,
            truncation=True,
            max_length=max_length,
            is_split_into_words=words,
            return_attention_mask=False,
            **({"return_offsets_mapping": True} if slotted else {}),
        )
    types = result.get("token_type_ids") if backbone.takes_token_types else None
    whole = result.encodings
    return [
        Encoded(
            input_ids=ids,
            token_type_ids=None if types is None else types[i],
            word_starts=_word_starts(result.word_ids(i)) if words else (),
            slots=_slot_places(slots[i], result.sequence_ids(i), result["offset_mapping"][i]) if slotted else (),
            cut=whole is not None and len(ids) >= max_length and bool(whole[i].overflowing),
        )
        for i, ids in enumerate(result["input_ids"])
    ]


def _word_starts(word_ids: list[int | None]) -> tuple[int, ...]:
    starts: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            starts.setdefault(word, position)
    # A word without tokens (spaces, say) reads where the next one starts, so that place i stays word i.
    out: list[int] = []
    for word in range(max(starts, default=-1), -1, -1):
        out.append(starts.get(word, out[-1] if out else 0))
    return tuple(reversed(out))


def _slots_of(texts: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Per text the characters in front of each of its slots."""
    return tuple(text.slots if isinstance(text, SlottedText) else () for text in texts)


def _slot_places(
    slots: tuple[tuple[int, ...], ...], texts: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """The token in front of which each slot stands.

    Args:
        slots: per text the characters in front of each slot.
        texts: per token the text it is of, `None` for special ones.
        offsets: per token its first character and its end in that text.
    """
    places = []
    for number, of_text in enumerate(slots):
        own = [i for i, text in enumerate(texts) if text == number]
        # A text without tokens stands in front of the special token that ends it.
        end = own[-1] + 1 if own else next((i for i, text in enumerate(texts) if text is None and i > 0), len(texts))
        places += [next((i for i in own if offsets[i][0] >= slot), end) for slot in of_text]
    return tuple(places)


def pad(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad sequences on the right to the longest of them; and so what decoders read, which all of them have or none."""
    width = max(len(e) for e in encoded)
    lengths = [len(e) for e in encoded]
    ids = torch.tensor([e.input_ids + [pad_id] * (width - n) for e, n in zip(encoded, lengths, strict=True)])
    mask = None
    if min(lengths) < width:
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    types = None
    if any(e.token_type_ids is not None for e in encoded):
        filled = [(e.token_type_ids or [0] * len(e)) for e in encoded]
        types = torch.tensor([t + [0] * (width - len(t)) for t in filled])
    slots, most = None, max(len(e.slots) for e in encoded)
    if most:
        slots = torch.tensor([[*e.slots, *[-1] * (most - len(e.slots))] for e in encoded])
    written = None
    if read := [e.decoder_ids for e in encoded if e.decoder_ids is not None]:
        longest = max(map(len, read))
        written = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in read])
    return Batch(input_ids=ids, attention_mask=mask, token_type_ids=types, slots=slots, decoder_input_ids=written)
