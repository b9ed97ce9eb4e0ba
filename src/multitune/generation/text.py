"""From tokens to text as they come: pieces that never change again, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Tokens whose text is certain are not decoded again once they are so many, but for a few that the next ones need:
#: decoders of some models drop the space in front of a text's first word.
_WINDOW, _CONTEXT = 32, 4

#: What a decoder puts where the bytes of a character are not all there yet.
_INCOMPLETE = "�"

#: A character has at most so many bytes.
_BYTES = 4


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
        self._settled = ""
        self._settled_tokens = 0
        self._context_from = 0

    def stopped(self, token_ids: Sequence[int], *, grows: bool = False) -> bool:
        """Whether the text of these tokens holds a stop string; `grows`: they begin with those of the last call."""
        if not self._stop:
            return False
        whole = self._grown(token_ids) if grows else self._decode(token_ids)
        return any(s in whole for s in self._stop)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens up to the first stop string."""
        return self._cut(self._whole(token_ids))

    def _whole(self, token_ids: Sequence[int]) -> str:
        """`decode`, where the first bytes of a last character change nothing of the characters in front of it.

        Decoders that know bytes as tokens (Llama's, Gemma's) read a run of them at once, and none of a run that breaks
        off within a character.
        """
        whole = self._decode(token_ids)
        if not whole.endswith(_INCOMPLETE):
            return whole
        for own in range(1, min(_BYTES, len(token_ids) + 1)):
            front = self._decode(token_ids[:-own])
            if not front.endswith(_INCOMPLETE):
                return whole if whole.startswith(front) else front + self._decode(token_ids[-own:])
        return whole

    def _grown(self, token_ids: Sequence[int]) -> str:
        """`decode` for tokens that begin with those of the last call, in time that does not grow with them."""
        done = self._settled_tokens
        context = token_ids[self._context_from : done]
        known = len(self._decode(context)) if context else 0
        whole = self._settled + self._decode([*context, *token_ids[done:]])[known:]
        if len(token_ids) - done >= _WINDOW and not whole.endswith(_INCOMPLETE):
            self._settled, self._settled_tokens = whole, len(token_ids)
            self._context_from = self._context_of(token_ids)
        return whole

    def _context_of(self, token_ids: Sequence[int]) -> int:
        """Where the few last of these tokens begin, with which the next are decoded: not within a character, or a
        decoder that reads a run of bytes at once would find none in those of the run that follow."""
        start = max(0, len(token_ids) - _CONTEXT)
        while start and self._decode(token_ids[start:]).startswith(_INCOMPLETE):
            start -= 1
        return start

    def _cut(self, whole: str) -> str:
        ends = [end for s in self._stop if (end := whole.find(s)) >= 0]
        return whole[: min(ends)] if ends else whole

    def piece(self, token_ids: Sequence[int], *, last: bool) -> str:
        """What is new and certain in the text of these tokens, all those so far; with `last` all that is left.

        A character whose bytes are not all there waits, and so does what may be the beginning of a stop string.
        """
        whole = self.text(token_ids) if last else self._cut(self._grown(token_ids))
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
