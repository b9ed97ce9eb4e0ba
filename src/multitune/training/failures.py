"""What is left of a run that failed: an error of ours, and nothing that holds the run's tensors."""

from __future__ import annotations

import traceback

from multitune.errors import MultituneError


def as_ours(error: BaseException) -> MultituneError:
    """The error that ended a run, whoever raised it, without the frames that would keep the run's tensors.

    One of another library is the cause of the error returned, which has its traceback as text among its notes.
    """
    if isinstance(error, MultituneError):
        ours = error
    else:
        ours = MultituneError(_message(error))
        ours.add_note("".join(traceback.format_exception(error)).rstrip())
        ours.__cause__ = error
    left: list[BaseException] = [ours]
    seen: set[int] = set()
    while left:
        each = left.pop()
        seen.add(id(each))
        each.__traceback__ = None
        left += [e for e in (each.__cause__, each.__context__) if e is not None and id(e) not in seen]
    return ours


def _message(error: BaseException) -> str:
    """An error of another library in one line, with its kind, without which some say little."""
    first = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {first}"
