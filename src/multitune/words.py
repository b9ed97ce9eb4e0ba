"""Types in words, for messages and help."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def in_words(hint: Any) -> str:
    """A type as the reader of a command line understands it."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(in_words(option) for option in options)
    if origin is Literal:
        return ", ".join(map(str, options))
    if origin is tuple:
        return f"list of {in_words(options[0])}s"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
