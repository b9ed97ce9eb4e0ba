"""From a prompt as the user gives it to token ids, and from settings for all rows to settings per row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from multitune.answers import PromptFormat, write_chat
from multitune.errors import BackboneError, ConfigError, DataError, DataWarning
from multitune.generation.sequences import BeamSequence, SingleSequence
from multitune.generation.settings import GenerationSettings, setting_names, suggest_setting
from multitune.generation.text import TextStream
from multitune.plan import DeltaSet
from multitune.tasks import Task

if TYPE_CHECKING:
    from multitune.backbone import Backbone

#: A text, the messages of a chat (each with `role` and `content`), or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
#: What `settings` arguments take: settings for all rows, or one per row, each as an object or by name.
AnySettings = GenerationSettings | Mapping[str, Any]
#: Special tokens by tokenizer, and how many tokens it had: to list the thousands of some takes longer than a step.
_SPECIAL: MutableMapping[Any, tuple[int, dict[str, int]]] = WeakKeyDictionary()
#: What every message of a chat has.
_OF_MESSAGE = ("role", "content")


def prompt_room(backbone: Backbone, inserted: int, new_tokens: int, max_length: int) -> int:
    """Most tokens of a prompt with which an adapter writes, none of which training had longer; maybe less than 1.

    Args:
        inserted: positions that the adapter takes.
        new_tokens: most tokens to write; an encoder-decoder has other positions for them.
        max_length: that of training, which counted an answer of at least a token and its end where it stands behind.
    """
    if backbone.decodes:
        return min(backbone.max_length - inserted, max_length)
    return min(backbone.max_length - inserted - new_tokens, max_length - 2)


def room_limit(backbone: Backbone, room: int, new_tokens: int, max_length: int) -> str:
    """What limits `prompt_room`, in brackets for a message; arguments as there."""
    if room == (max_length if backbone.decodes else max_length - 2):
        return f" (it was trained with max_length={max_length})"
    beside = "" if backbone.decodes else f", of which max_new_tokens={new_tokens} takes as many"
    return f" (backbone '{backbone.name}' has {backbone.max_length} positions{beside})"


def encode_for_task(
    backbone: Backbone, task: Task, row: Any, room: int, where: str, limit: str = ""
) -> tuple[int, ...]:
    """Token ids of a row of a generation task, written out as in training; one too long loses words at its front.

    Args:
        row: a text or a mapping with the task's columns; an answer in it is not read.
        room: most tokens.
        where: what messages call the row.
        limit: what messages say of the room, of `room_limit`.

    Raises:
        DataError: a row that does not fit the task, or of whose prompt not a word fits.
        BackboneError: the backbone has no tokenizer, or no token that ends a text.
    """
    if isinstance(row, Mapping):
        row = {column: value for column, value in row.items() if column != task.label}
    writer = PromptFormat(backbone, task)
    text = task.encode(row).texts[0][0]
    ids = writer.prompts([text])[0]
    if len(ids) <= room:
        return tuple(ids)
    kept = writer.cut(text, room) if room > 0 else None
    if kept is None:
        raise DataError(
            f"not a word of its prompt fits into the {max(room, 0)} tokens left{limit}; lower max_new_tokens (in "
            f"training eval_new_tokens) or, where that of training is the limit, train with a larger max_length"
        )
    warnings.warn(
        f"{where}: its prompt has {len(ids)} tokens and there is room for {room}{limit}, so words at "
        f"its front are cut off",
        DataWarning,
        stacklevel=5,
    )
    return tuple(kept)


def encode_rows(backbone: Backbone, task: Task, rows: Iterable[Any], room: int, name: str) -> list[tuple[int, ...]]:
    """`encode_for_task` of every row; messages call them by a name and their numbers, from 0."""
    found = []
    for number, row in enumerate(rows):
        where = f"{name} {number}"
        try:
            found.append(encode_for_task(backbone, task, row, room, where))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return found


def encode_prompt(backbone: Backbone, prompt: Any) -> tuple[int, ...]:
    """Token ids of a prompt; a chat is written out by the tokenizer's template, up to where the answer begins.

    Raises:
        DataError: no prompt, or a chat that the tokenizer has no template for, or whose template refuses it.
        BackboneError: the backbone has no tokenizer.
    """
    if not isinstance(prompt, str) and isinstance(prompt, Sequence) and prompt:
        if all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
            return tuple(prompt)
        if all(isinstance(m, Mapping) and all(isinstance(m.get(k), str) for k in _OF_MESSAGE) for m in prompt):
            return _encode_chat(backbone, prompt)
    if not isinstance(prompt, str):
        raise DataError(
            f"a prompt is a text, a list of messages with the texts 'role' and 'content', or a list of token ids, not "
            f"{prompt!r}"
        )
    tokenizer = _tokenizer(backbone)
    with backbone.tokenizer_lock:
        return tuple(tokenizer(prompt, return_attention_mask=False, truncation=False)["input_ids"])


def _encode_chat(backbone: Backbone, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    tokenizer = _tokenizer(backbone)
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of backbone '{backbone.name}' has no chat template; write the conversation out as a text"
        )
    with backbone.tokenizer_lock:
        text = write_chat(backbone, messages, opens=True)
        return tuple(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])


def _tokenizer(backbone: Backbone) -> Any:
    if backbone.tokenizer is None:
        raise BackboneError(
            f"backbone '{backbone.name}' has no tokenizer, so it takes token ids only; "
            f"give one: Backbone(model, tokenizer)"
        )
    return backbone.tokenizer


def settings_per_row(settings: AnySettings | Sequence[AnySettings] | None, num_rows: int) -> list[GenerationSettings]:
    """Settings of every row.

    Raises:
        ConfigError: an unknown setting, one that is not possible, or settings for another number of rows.
    """
    if not isinstance(settings, Sequence) or isinstance(settings, str):
        return [_one(settings)] * num_rows
    if len(settings) != num_rows:
        raise ConfigError(f"there are {num_rows} rows, but settings for {len(settings)}; give one per row, or one")
    found = []
    for row, own in enumerate(settings):
        try:
            found.append(_one(own))
        except ConfigError as error:
            raise ConfigError(f"row {row}: {error}") from error
    return found


def _one(settings: AnySettings | None) -> GenerationSettings:
    if settings is None:
        return GenerationSettings()
    if isinstance(settings, GenerationSettings):
        return settings
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"generation settings are GenerationSettings or a mapping, such as {{'temperature': 0.7}}, not {settings!r}"
        )
    known = setting_names()
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"generation has no setting '{name}'.{suggest_setting(str(name), known)} It has: {', '.join(known)}"
            )
    return GenerationSettings(**settings)


def make_sequence(
    backbone: Backbone,
    prompt: tuple[int, ...],
    deltas: DeltaSet | None,
    settings: GenerationSettings,
    adapter: str | None = None,
) -> SingleSequence | BeamSequence:
    """One request, ready to enter a batch.

    Raises:
        BackboneError: stop strings without a tokenizer to find them with.
        ConfigError: one that holds a special token and more.
    """
    special = _special_stops(backbone, settings.stop)
    kind = SingleSequence if settings.num_beams == 1 else BeamSequence
    return kind(
        prompt=prompt,
        deltas=deltas,
        settings=settings,
        eos_ids=frozenset(backbone.eos_ids),
        stream=TextStream(_decoder(backbone), [text for text in settings.stop if text not in special]),
        adapter=adapter,
        stop_ids=frozenset(special.values()),
        before=backbone.start_ids if backbone.decodes else None,
    )


def _special_stops(backbone: Backbone, stop: Sequence[str]) -> dict[str, int]:
    """The stop strings that are special tokens, with their ids: a text leaves these out, and never holds one.

    Raises:
        BackboneError: there is no tokenizer.
        ConfigError: a stop string that holds a special token and more.
    """
    if not stop:
        return {}
    special = _special_tokens(_tokenizer(backbone))
    for text in stop:
        inside = None if text in special else next((token for token in special if token in text), None)
        if inside is not None:
            raise ConfigError(
                f"stop={text!r} holds the special token {inside!r}, which is left out of texts, so that none would "
                f"ever hold both; give stop=({inside!r},)"
            )
    return {text: special[text] for text in stop if text in special}


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """A tokenizer's special tokens with their ids."""
    size, known = _SPECIAL.get(tokenizer, (0, {}))
    if size != len(tokenizer):  # one was added since
        size = len(tokenizer)
        known = {t.content: number for number, t in tokenizer.added_tokens_decoder.items() if t.special}
        _SPECIAL[tokenizer] = size, known
    return known


def _decoder(backbone: Backbone) -> Callable[[Sequence[int]], str]:
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        return lambda ids: ""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode
