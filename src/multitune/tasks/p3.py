"""Prompts of the Public Pool of Prompts (Bach et al. 2022, arXiv 2202.01279): a row as an instruction and its answer.

The templates stand in <folder>/p3_templates/templates.parquet. They are jinja written by others, so they run in jinja's
sandbox and see nothing but the row and its answer choices. A template whose columns a row lacks does not fit its task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from multitune.errors import DataError
from multitune.tasks.readers import read_table
from multitune.tasks.suites import data_root

_BETWEEN = "|||"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One row put as an instruction."""

    prompt: str
    answers: tuple[str, ...]
    """The texts that are right."""
    options: tuple[str, ...] = ()
    """The texts among which to choose, the right ones among them; none where the answer is free."""


@dataclass(frozen=True, kw_only=True)
class P3Template:
    """One template."""

    name: str
    jinja: str
    """The prompt, "|||", the answer."""
    answer_choices: str
    """Jinja too: the options with "|||" between them; "" for a free answer."""
    original: bool
    """Whether it asks what the data set asks, and not, say, for the text that has a given label."""

    def put(self, row: Mapping[str, Any]) -> Asked | None:
        """The row as this template puts it; `None` where it is not for such a row.

        Raises:
            DataError: the row lacks a column, or the template is at odds with it.
        """
        try:
            options = [o.strip() for o in self._choices.render(row).split(_BETWEEN)] if self.answer_choices else []
            whole = self._body.render(row, answer_choices=options) if options else self._body.render(row)
        except Exception as error:  # the template's own, from jinja or from what it does to the row
            raise DataError(f"template '{self.name}' does not fit the row: {error}") from error
        prompt, _, answer = (part.strip() for part in whole.partition(_BETWEEN))
        if not prompt or not answer:
            return None
        distinct = tuple(dict.fromkeys(o for o in options if o))
        return Asked(prompt=prompt, answers=(answer,), options=distinct if answer in distinct else ())

    @cached_property
    def _body(self) -> Any:
        return _environment().from_string(self.jinja)

    @cached_property
    def _choices(self) -> Any:
        return _environment().from_string(self.answer_choices)


def p3_templates(
    dataset: str, subset: str = "", *, original: bool = True, data_dir: str | Path | None = None
) -> tuple[P3Template, ...]:
    """The templates of a data set by its names there, such as "super_glue", "copa"; none where there are none.

    Args:
        original: leave out those that ask for something else than the data set does.
        data_dir: the folder of data; by default the one that `MULTITUNE_DATA` names.

    Raises:
        DataError: no folder of data, or one without `p3_templates/templates.parquet`.
    """
    table = read_table(data_root(data_dir) / "p3_templates" / "templates.parquet")
    return tuple(
        P3Template(
            name=row["name"], jinja=row["jinja"], answer_choices=row["answer_choices"], original=row["original_task"]
        )
        for row in table
        if (row["dataset"], row["subset"]) == (dataset, subset) and (row["original_task"] or not original)
    )


def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    made.globals.update(zip=zip, enumerate=enumerate)
    return made
