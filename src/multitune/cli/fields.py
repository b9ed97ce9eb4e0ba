"""What a dataclass says about its fields: the string under each, its type in words, its default."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from multitune.words import in_words


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a dataclass."""

    name: str
    """Its name."""
    hint: Any
    """Its type."""
    default: Any
    """Its default; `dataclasses.MISSING` where it has none."""
    doc: str
    """The string under it, in one line."""

    @property
    def given(self) -> Any:
        """Its type, `None` left out: that of a value that someone gives."""
        if get_origin(self.hint) not in (Union, UnionType):
            return self.hint
        (given,) = (option for option in get_args(self.hint) if option is not NoneType)
        return given

    @property
    def type(self) -> str:
        """Its type in words."""
        return in_words(self.hint)


def fields_of(cls: type[Any]) -> tuple[Field, ...]:
    """The fields of a dataclass with their documentation, inherited ones included."""
    docs = {name: doc for base in reversed(cls.__mro__) for name, doc in _docs(base)}
    hints = get_type_hints(cls)
    return tuple(
        Field(name=f.name, hint=hints[f.name], default=_default(f), doc=docs.get(f.name, ""))
        for f in dataclasses.fields(cls)
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _docs(cls: type[Any]) -> Iterator[tuple[str, str]]:
    """Names and documentation of the fields that a class itself declares."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):  # a class without Python source, such as `object`
        return
    assert isinstance(body, ast.ClassDef)
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                yield name, " ".join(doc.split())
