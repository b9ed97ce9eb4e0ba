"""Rows of a generation task as token ids: the prompt, then the answer, then the token that ends a text.

An encoder-decoder reads the prompt with its encoder and writes the answer with its decoder, so that each has all
positions to itself, and both have the special tokens that its tokenizer gives a text.

Prompt and answer are tokenized apart, so that generation starts from the very ids that training saw in front of an
answer. An answer is never cut; a prompt that is too long loses words at its front.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from multitune.errors import BackboneError, ConfigError, DataError, DataWarning
from multitune.tasks import Example, Task

if TYPE_CHECKING:
    from multitune.backbone import Backbone

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One row with one of its answers."""

    input_ids: list[int]
    """Prompt, answer and the end of text."""
    num_answer: int
    """How many of these, at the end, are the answer and the end of text."""
    row: int
    """Number of the row in its table, from 0; a row with several answers is there several times."""


def settle_format(backbone: Backbone, task: Task) -> Task:
    """The task with "auto" replaced by the format that suits the backbone's tokenizer.

    Raises:
        ConfigError: a chat, and the tokenizer has no template to write it out.
    """
    if task.kind != "generation":
        return task
    has_template = bool(getattr(backbone.tokenizer, "chat_template", None))
    if task.format == "auto":
        chat = has_template
        return replace(task, format="chat" if chat else "plain", system=task.system if chat else "")
    if task.format == "chat" and not has_template:
        raise ConfigError(
            f"task '{task.name}' is in chat format, but the tokenizer of backbone '{backbone.name}' has no chat "
            f"template; set format='plain' (--format plain), or give the tokenizer one"
        )
    return task


def write_chat(backbone: Backbone, messages: Sequence[Mapping[str, str]], *, opens: bool) -> str:
    """Messages as the tokenizer's chat template writes them; with `opens` up to where an answer begins.

    Raises:
        DataError: messages that the template refuses.
    """
    tokenizer: Any = backbone.tokenizer
    try:
        return str(
            tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=opens, tokenize=False)
        )
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(
            f"the chat template of backbone '{backbone.name}' refuses messages of {roles}: {error}. Most templates "
            f"take those of user and assistant in turn, and some none of system"
        ) from error


class PromptFormat:
    """How one task's prompts and answers are written out for one backbone."""

    def __init__(self, backbone: Backbone, task: Task) -> None:
        """
        Args:
            task: of kind generation, its format settled.

        Raises:
            BackboneError: the backbone has no tokenizer, no language-model head, or no token that ends a text.
        """
        assert task.kind == "generation" and task.format in ("plain", "chat"), "settle_format comes first"
        _ = backbone.lm_head
        if backbone.tokenizer is None:
            raise BackboneError(
                f"backbone '{backbone.name}' has no tokenizer, so that it cannot read texts; "
                f"give one: Backbone(model, tokenizer)"
            )
        if not backbone.eos_ids:
            raise BackboneError(
                f"backbone '{backbone.name}' has no token that ends a text, so that an answer would have no end; set "
                f"eos_token_id in its generation_config or config"
            )
        self.backbone = backbone
        self.task = task
        self._tokenizer: Any = backbone.tokenizer

    @property
    def _chat(self) -> bool:
        return self.task.format == "chat"

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer: in a chat the one that the template puts there, if it ends a text."""
        ends = self.backbone.eos_ids
        if not self._chat:
            return ends[0]
        opening = self._written("x")
        whole = self._template([*self._messages("x"), {"role": "assistant", "content": "y"}], opens=False)
        behind = whole.removeprefix(opening + "y") if whole.startswith(opening + "y") else ""
        return next((i for i in self._ids([behind], special=False)[0] if i in ends), ends[0])

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts, up to where the answer begins."""
        return self._ids([self._written(text) for text in texts], special=not self._chat)

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of answers, each with the end of text."""
        if self.backbone.decodes:
            found = self._ids(texts, special=True)
            return [ids if ids and ids[-1] in self.backbone.eos_ids else [*ids, self.end_id] for ids in found]
        return [[*ids, self.end_id] for ids in self._ids(texts, special=False)]

    def cut(self, text: str, room: int) -> list[int] | None:
        """Ids of a prompt without as few words at its front as leave at most `room`; `None` where no word fits.

        A text without white space is cut between characters.
        """
        for pattern in (r"\S+", r"\S"):
            starts = [found.start() for found in re.finditer(pattern, text)]
            low, high = 0, len(starts)
            while low < high:
                middle = (low + high) // 2
                fits = len(self.prompts([text[starts[middle] :]])[0]) <= room
                low, high = (low, middle) if fits else (middle + 1, high)
            for start in starts[low:]:  # a word more may cost a token less, so that what was found is tried
                ids = self.prompts([text[start:]])[0]
                if len(ids) <= room:
                    return ids
        return None

    def _written(self, text: str) -> str:
        if self._chat:
            return self._template(self._messages(text), opens=True)
        return text if text[-1:].isspace() or self.backbone.decodes else f"{text}\n"

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.task.system}] if self.task.system else []
        return [*system, {"role": "user", "content": text.strip()}]

    def _template(self, messages: list[dict[str, str]], *, opens: bool) -> str:
        return write_chat(self.backbone, messages, opens=opens)

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        with self.backbone.tokenizer_lock:  # truncation is state of a fast tokenizer
            found = self._tokenizer(
                list(texts), add_special_tokens=special, truncation=False, return_attention_mask=False
            )
        return [list(ids) for ids in found["input_ids"]]


def encode_answered(
    backbone: Backbone,
    task: Task,
    examples: Sequence[Example],
    *,
    max_length: int,
    split: str,
    answers: Sequence[Sequence[int]] | None = None,
) -> list[Answered]:
    """Every row with every one of its answers.

    Args:
        task: of kind generation, its format settled.
        max_length: most tokens of prompt, answer and end of text together; of an encoder-decoder, of prompt and of
            answer.
        split: what messages call the rows.
        answers: the token ids of one answer per row, in place of those that the rows hold.

    Raises:
        DataError: answers that leave no room for a word of their prompt; says which, and how much they need.
    """
    writer = PromptFormat(backbone, task)
    prompts = writer.prompts([e.texts[0][0] for e in examples])
    pairs = _references(writer, examples) if answers is None else list(enumerate(answers))
    found: list[Answered] = []
    too_long: list[tuple[int, int]] = []
    shortened: list[tuple[int, int]] = []
    for row, answer in pairs:
        prompt: list[int] | None = prompts[row]
        assert prompt is not None
        beside = 0 if backbone.decodes else len(answer)
        whole = max(len(prompt) + beside, len(answer))
        if whole > max_length:
            fits = len(answer) <= max_length
            prompt = writer.cut(examples[row].texts[0][0], max_length - beside) if fits else None
            (too_long if prompt is None else shortened).append((row, whole))
        if prompt is not None:
            found.append(Answered(input_ids=[*prompt, *answer], num_answer=len(answer), row=row))
    if too_long:
        most = max(length for _, length in too_long)
        raise DataError(
            f"{split} rows of task '{task.name}': the answers of {len(too_long)} of {len(pairs)} leave no room for a "
            f"word of their prompts (rows {_shown(too_long)}, counted from 0), and an answer is never cut. Set "
            f"max_length={most} (--max-length {most}) instead of {max_length}, or drop these rows"
        )
    _warn_of_cut(task, split, shortened, len(pairs), max_length)
    empty = next((a for a in found if len(a.input_ids) == a.num_answer), None)
    if empty is not None:
        raise DataError(f"{split} row {empty.row} of task '{task.name}': its prompt has no tokens; fill it in")
    return found


def _references(writer: PromptFormat, examples: Sequence[Example]) -> list[tuple[int, Sequence[int]]]:
    """Every answer that the rows hold: the row's number, and the answer's token ids."""
    targets = [e.target for e in examples]
    texts = [(row, str(text)) for row, t in enumerate(targets) if isinstance(t, tuple) for text in t]
    return list(zip([row for row, _ in texts], writer.answers([text for _, text in texts]), strict=True))


def _warn_of_cut(task: Task, split: str, cut: list[tuple[int, int]], count: int, max_length: int) -> None:
    if cut:
        warnings.warn(
            f"task '{task.name}': {len(cut)} of {count} {split} rows are longer than max_length={max_length}, and the "
            f"front of their prompts is cut off (rows {_shown(cut)}, counted from 0; the longest needs "
            f"{max(length for _, length in cut)})",
            DataWarning,
            stacklevel=5,
        )


def _shown(rows: list[tuple[int, int]]) -> str:
    numbers = list(dict.fromkeys(row for row, _ in rows))
    return ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
