"""What a method's class docstring says: a summary, then named sections that become its page in docs/methods/."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass

from multitune.errors import ConfigError, suggest
from multitune.methods import Method

#: Section in the docstring -> heading on the page, in the page's order.
SECTIONS = {
    "Shapes": "Shapes",
    "Parameters": "Parameter count",
    "Use it when": "When to use it",
    "Pitfalls": "Pitfalls",
    "Published": "Published numbers",
}

_HEADER = re.compile(r"^(\w[\w ]*):$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Sections:
    """A class docstring taken apart."""

    summary: str
    """What stands before the first section."""
    texts: dict[str, str]
    """Section name of `SECTIONS` -> its Markdown, in their order; those that the docstring has."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The sections that the docstring lacks."""
        return tuple(name for name in SECTIONS if name not in self.texts)


def sections_of(cls: type[Method]) -> Sections:
    """Take a method's docstring apart. A section is a line `Name:` at the margin with an indented text below it.

    Raises:
        ConfigError: a section that is not in `SECTIONS`, one without text, or one that stands there twice.
    """
    summary, *rest = _HEADER.split(inspect.cleandoc(cls.__doc__ or ""))
    texts: dict[str, str] = {}
    for name, body in zip(rest[::2], rest[1::2], strict=True):
        where = f"the docstring of {cls.__qualname__} has a section '{name}:'"
        if name not in SECTIONS:
            raise ConfigError(f"{where}, which no page has.{suggest(name, SECTIONS)} Sections: {', '.join(SECTIONS)}")
        text = textwrap.dedent(body).strip()
        if not text or name in texts:
            raise ConfigError(f"{where} {'twice; join them' if name in texts else 'without a text; write it'}")
        texts[name] = text
    return Sections(summary=summary.strip(), texts={name: texts[name] for name in SECTIONS if name in texts})
