"""From tokens to text as they come: pieces that never change again, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What a decoder puts where the bytes of a character are not all there yet.
_INCOMPLETE = "�"


class TextStream:
    """The text of one row as it grows."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """
        Args:
            decode: text of token ids, special ones left out.
            stop: strings that end the text.
        """
        self._decode = decode
        self._stop = tuple(stop)
        self._given = 0

    def stopped(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens holds a stop string."""
        return bool(self._stop) and any(s in self._decode(token_ids) for s in self._stop)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens up to the first stop string."""
        whole = self._decode(token_ids)
        ends = [end for s in self._stop if (end := whole.find(s)) >= 0]
        return whole[: min(ends)] if ends else whole

    def piece(self, token_ids: Sequence[int], *, last: bool) -> str:
        """What is new and certain in the text of these tokens, all those so far; all of the rest with `last`.

        A character whose bytes are not all there waits, and so does what may be the beginning of a stop string.
        """
        whole = self.text(token_ids)
        if not last:
            whole = whole.rstrip(_INCOMPLETE)
            waiting = max((_overlap(whole, s) for s in self._stop), default=0)
            whole = whole[: len(whole) - waiting]
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        return piece


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
