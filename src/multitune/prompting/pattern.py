"""Patterns and verbalisers: a row as a text with a place for the answer, and a label as the text that stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from multitune.errors import DataError, TaskError, suggest
from multitune.tasks import Task, Template
from multitune.tasks.targets import label_id

_KINDS = ("classification", "multiple_choice")


@dataclass(frozen=True)
class Pattern:
    """How rows of a classification or a multiple choice are put to a language model (Schick and Schütze 2020)."""

    prompt: str
    """A template over columns, which ends where the answer begins."""
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    """Label name to the text that says it; by default the name itself. A multiple choice has its choices instead."""
    instruction: str = ""
    """What stands in front of everything, examples included."""
    separator: str = "\n\n"
    """What stands between the instruction, the examples and the row."""

    @cached_property
    def _template(self) -> Template:
        return Template((self.prompt,))

    def check(self, task: Task) -> None:
        """Raise `TaskError` unless this pattern puts rows of the task."""
        if task.kind not in _KINDS:
            raise TaskError(
                f"task '{task.name}' is of kind {task.kind}; a pattern ranks the answers of {' or '.join(_KINDS)}"
            )
        if self._template.num_slots or task.label in self._template.columns:
            raise TaskError(f"pattern {self.prompt!r} reads the answer, or has a slot; leave it out")
        unknown = [name for name in self.verbalizer if name not in task.labels]
        if unknown:
            raise TaskError(
                f"the verbalizer has the label {unknown[0]!r}, which task '{task.name}' has not."
                f"{suggest(unknown[0], task.labels)} It has: {', '.join(task.labels) or 'its choices, no labels'}"
            )
        said = [self._said(name) for name in task.labels]
        twice = [text for text in said if said.count(text) > 1]
        if twice or not all(text.strip() for text in said):
            raise TaskError(f"the verbalizer says {(twice or [''])[0]!r} for two labels, or nothing; give each its own")

    def text(self, row: Mapping[str, Any]) -> str:
        """A row's prompt."""
        return self._template.render(row)[0]

    def answers(self, task: Task, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts among which the model chooses, in the order of labels or choices, each as it follows the prompt."""
        if task.kind == "multiple_choice":
            texts = tuple(texts[-1] for texts in task.encode({k: row[k] for k in row if k != task.label}).texts)
        else:
            texts = tuple(self._said(name) for name in task.labels)
        space = "" if self.prompt[-1:].isspace() else " "
        return tuple(space + text.strip() for text in texts)

    def example(self, task: Task, row: Mapping[str, Any]) -> str:
        """A row with its right answer."""
        return self.text(row) + self.answers(task, row)[self.target(task, row)]

    def target(self, task: Task, row: Mapping[str, Any]) -> int:
        """Which of `answers` is right.

        Raises:
            DataError: the row has no answer, or an unknown one.
        """
        if task.label not in row:
            raise DataError(f"the row has no column {task.label!r} with its answer")
        if task.kind == "multiple_choice":
            right = task.encode(row).target
            assert right is not None  # the row has the label's column
            return int(right[0] if isinstance(right, tuple) else right)
        return label_id(row[task.label], task.labels)

    def prefix(self, task: Task, examples: Sequence[Mapping[str, Any]]) -> str:
        """What stands in front of a row's own prompt: the instruction and the examples; "" for neither."""
        parts = [self.instruction] if self.instruction else []
        parts += [self.example(task, row) for row in examples]
        return "".join(part + self.separator for part in parts)

    def _said(self, name: str) -> str:
        return self.verbalizer.get(name, name)
