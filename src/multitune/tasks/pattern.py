"""Patterns and verbalisers: a row as a text with a place for the answer, and a label as the text that stands there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from multitune.errors import DataError, TaskError, suggest
from multitune.tasks.targets import label_id
from multitune.tasks.templates import Template

if TYPE_CHECKING:
    from multitune.tasks.schema import Task

MASK = "mask"
"""The field `{mask}` of a prompt: the place of the answer."""

_KINDS = ("classification", "multiple_choice")
_PLACE = re.compile(r"(?<!\{)\{" + MASK + r"\}(?!\})")


@dataclass(frozen=True)
class Pattern:
    """How rows of a classification or a multiple choice are put to a language model (Schick and Schütze 2020).

    Raises:
        TaskError: a prompt that names no column or has several `{mask}`, or a field of another form.
    """

    prompt: str
    """A template over columns. `{mask}` says where the answer stands: anywhere for a masked language model, at the end
    for a causal one or an encoder-decoder; without it that is the end."""
    verbalizer: Mapping[str, str | Sequence[str]] = field(default_factory=dict, hash=False)
    """Label name to the text that says it, or to several, over which its score is the mean; by default the name itself.
    A multiple choice has its choices instead."""
    instruction: str = ""
    """What stands in front of everything, examples included."""
    separator: str = "\n\n"
    """What stands between the instruction, the examples and the row."""

    def __post_init__(self) -> None:
        for name in ("prompt", "instruction", "separator"):
            if not isinstance(getattr(self, name), str):
                raise TaskError(f"{name} of a pattern is a text, not {getattr(self, name)!r}")
        said = self.verbalizer
        if not isinstance(said, Mapping) or not all(isinstance(n, str) and _are_texts(t) for n, t in said.items()):
            raise TaskError(
                f"a verbalizer maps label names to texts or lists of them, such as {{'good': ['great', 'fine']}}, not "
                f"{said!r}"
            )
        own = {name: text if isinstance(text, str) else tuple(text) for name, text in said.items()}
        object.__setattr__(self, "verbalizer", own)
        if len(_PLACE.findall(self.prompt)) > 1:
            raise TaskError(f"pattern {self.prompt!r} has {{mask}} more than once; a row has one answer")
        if "{" not in self.prompt:  # a template would take it for a column's name, and what writes rows out for a text
            raise TaskError(
                f"pattern {self.prompt!r} has no column in braces, so that all rows would read alike; write columns "
                f"into it, such as '{{{self.prompt.strip() or 'COLUMN'}}}'"
            )
        _ = self.columns  # a malformed template is reported here, not at the first row

    @cached_property
    def _template(self) -> Template:
        return Template((self.prompt,))

    @cached_property
    def _ends(self) -> tuple[str, str]:
        """What stands in front of the answer and behind it, as templates; a space in front of it is the answer's."""
        before, *after = _PLACE.split(self.prompt)
        return (before.removesuffix(" "), after[0]) if after else (before, "")

    @property
    def has_mask(self) -> bool:
        """Whether the prompt says where the answer stands."""
        return _PLACE.search(self.prompt) is not None

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the prompt reads."""
        return tuple(column for column in self._template.columns if column != MASK)

    @cached_property
    def spaced(self) -> bool:
        """Whether a space stands between the prompt and the answer."""
        if self.has_mask:
            return _PLACE.split(self.prompt)[0].endswith(" ")
        return not self.prompt[-1:].isspace()

    def check(self, task: Task) -> None:
        """Raise `TaskError` unless this pattern puts rows of the task."""
        if task.kind not in _KINDS:
            raise TaskError(
                f"task '{task.name}' is of kind {task.kind}; a pattern ranks the answers of {' or '.join(_KINDS)}"
            )
        if self._template.num_slots or task.label in self._template.columns:
            raise TaskError(f"pattern {self.prompt!r} reads the answer, or has a slot; leave it out")
        if not self.columns and task.kind == "classification":
            raise TaskError(
                f"pattern {self.prompt!r} reads no column, so that all rows would read alike; write the text's into "
                f"it, such as {'{text} ' + self.prompt!r}"
            )
        unknown = [name for name in self.verbalizer if name not in task.labels]
        if unknown:
            raise TaskError(
                f"the verbalizer has the label {unknown[0]!r}, which task '{task.name}' has not."
                f"{suggest(unknown[0], task.labels)} It has: {', '.join(task.labels) or 'its choices, no labels'}"
            )
        said = [text.strip() for name in task.labels for text in self._said(name)]  # as `wordings` gives them
        twice = [text for text in said if said.count(text) > 1]
        if twice or not all(said):
            raise TaskError(
                f"the verbalizer says {(twice or [''])[0]!r} twice, or nothing; give each label texts of its own"
            )

    def check_end(self) -> None:
        """Raise `TaskError` unless the answer stands at the end, where a language model that writes can give it."""
        if self._ends[1].strip():
            raise TaskError(
                f"pattern {self.prompt!r} has text behind {{mask}}, which a language model that writes has not read "
                f"when it answers; end the prompt with {{mask}}, or take a masked language model"
            )

    def check_mask(self) -> None:
        """Raise `TaskError` unless the prompt says where the answer stands, as a masked language model needs it."""
        if not self.has_mask:
            raise TaskError(
                f"pattern {self.prompt!r} has no {{mask}}, and a masked language model answers where its mask stands; "
                f"write it where the answer belongs, such as {self.prompt.rstrip() + ' {mask}.'!r}"
            )

    def text(self, row: Mapping[str, Any]) -> str:
        """A row's prompt, up to where the answer begins."""
        return self.parts(row)[0]

    def parts(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """A row's text in front of the answer, and behind it."""
        before, after = (_render(part, row) for part in self._ends)
        return before, after

    def answers(self, task: Task, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts among which the model chooses, in the order of labels or choices, each as it follows the prompt.

        Of a label that several texts say, the first.
        """
        return tuple(texts[0] for texts in self.wordings(task, row))

    def wordings(self, task: Task, row: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
        """All texts that say each label or choice, in the order of `answers`."""
        if task.kind == "multiple_choice":
            said: tuple[tuple[str, ...], ...] = tuple((text,) for text in task.choice_texts(row))
        else:
            said = tuple(self._said(name) for name in task.labels)
        return tuple(tuple(" " * self.spaced + text.strip() for text in texts) for texts in said)

    def example(self, task: Task, row: Mapping[str, Any]) -> str:
        """A row with its right answer."""
        before, after = self.parts(row)
        return before + self.answers(task, row)[self.target(task, row)] + after

    def target(self, task: Task, row: Mapping[str, Any]) -> int:
        """Which of `answers` is right.

        Raises:
            DataError: the row has no answer, or an unknown one.
        """
        if task.label not in row:
            raise DataError(f"the row has no column {task.label!r} with its answer")
        if task.kind == "multiple_choice":
            return task.right_choice(row)
        return label_id(row[task.label], task.labels)

    def prefix(self, task: Task, examples: Sequence[Mapping[str, Any]]) -> str:
        """What stands in front of a row's own prompt: the instruction and the examples; "" for neither."""
        parts = [self.instruction] if self.instruction else []
        parts += [self.example(task, row) for row in examples]
        return "".join(part + self.separator for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """The pattern as JSON values; `from_dict` gives back an equal one."""
        words = {name: text if isinstance(text, str) else list(text) for name, text in self.verbalizer.items()}
        return {**asdict(self), "verbalizer": words}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Pattern:
        """The pattern that `to_dict` wrote. Raises TaskError for unknown, missing and malformed fields."""
        known = [each.name for each in fields(cls)]
        for key in values:
            if key not in known:
                raise TaskError(f"a pattern has no field {key!r}; it has {', '.join(known)}.{suggest(str(key), known)}")
        if "prompt" not in values:
            raise TaskError(f"a pattern needs its prompt; got {', '.join(values) or 'nothing'}")
        return cls(**values)

    def _said(self, name: str) -> tuple[str, ...]:
        said = self.verbalizer.get(name, name)
        return (said,) if isinstance(said, str) else tuple(said)


def _are_texts(said: Any) -> bool:
    """Whether this is a text, or a list of at least one."""
    return isinstance(said, str) or (
        isinstance(said, (list, tuple)) and bool(said) and all(isinstance(text, str) for text in said)
    )


def _render(part: str, row: Mapping[str, Any]) -> str:
    """A piece of a prompt for a row; one without braces is a text, where a whole template would be a column's name."""
    return Template((part,)).render(row)[0] if "{" in part or "}" in part else part
