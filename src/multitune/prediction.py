"""Rows to their answers, each by the adapter it names: tokenized, packed by length, run together, and read.

Legend: S sequences of one forward pass, T tokens, D width, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multitune import heads, passes
from multitune.adapter import Adapter
from multitune.backbone import Backbone
from multitune.batching import Encoded, encode, pad
from multitune.errors import DataError, MultituneError, PlanError
from multitune.inputs import Batch
from multitune.plan import DeltaSet, Plan
from multitune.ranked import PatternReader, RankedRow, choice_log_probs
from multitune.sharing import find_cut, run_cut
from multitune.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one row."""

    adapter: str | None
    """The adapter that answered, `None` for the bare backbone."""
    label: str | float | tuple[str, ...] | None
    """Label name; number; names of the labels that hold; tag per word. `None` for a bare row, and for logits
    that are not finite."""
    probabilities: dict[str, float]
    """Per label name (multiple choice: "0", "1", ...); empty for regression, tagging and bare rows."""
    logits: Tensor | None
    """float32 `[C]`, multiple choice `[choices]`, tagging `[words, C]`; of a task with a pattern the choices' mean
    log-probability per token; `None` where there is an embedding."""
    embedding: Tensor | None = None
    """float32 `[D]`, mean over tokens; for a bare row, and for an adapter whose task is an embedding."""

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        out: dict[str, Any] = {"adapter": self.adapter}
        if self.embedding is not None:
            # Nine digits say any float32; those of the double that it becomes in Python would follow otherwise.
            return out | {"embedding": [float(f"{value:.9g}") for value in self.embedding.tolist()]}
        label = list(self.label) if isinstance(self.label, tuple) else self.label
        return out | {"label": label, "probabilities": self.probabilities}


@dataclass(frozen=True, eq=False)
class Served:
    """One adapter in memory, as a running batch sees it."""

    name: str
    adapter: Adapter
    delta_set: DeltaSet
    head_params: dict[str, Tensor]
    touched: int
    """The first layer that its deltas touch."""

    @property
    def num_positions(self) -> int:
        """Positions that it takes in a row beside the tokens."""
        return self.delta_set.num_positions

    def nbytes(self) -> int:
        """Bytes in memory: deltas and head."""
        return self.delta_set.nbytes() + sum(t.numel() * t.element_size() for t in self.head_params.values())

    def texts(self, row: Any) -> tuple[tuple[str, ...], ...]:
        """The sequences of a row; its label, if it has one, is not read."""
        task = self.adapter.task
        assert task.pattern is None, "rows of a pattern are read by a PatternReader"
        if task.kind == "generation":
            raise DataError(
                f"adapter '{self.name}' writes texts and predicts no label; use Bank.generate (multitune generate)"
            )
        if isinstance(row, dict) and task.label in row:
            row = {k: v for k, v in row.items() if k != task.label}
        return task.encode(row).texts

    def room(self, backbone: Backbone) -> int:
        """Tokens that a sequence may have."""
        return min(self.adapter.max_length, backbone.max_length - self.num_positions)


@dataclass(eq=False)
class _Sequence:
    """One sequence of one row on its way through a batch."""

    row: int
    served: Served | None
    encoded: Encoded
    values: Tensor | None = None
    ranked: RankedRow | None = None
    """The row of which this is a sequence, where its answers are texts."""
    part: int = 0
    """Which sequence of that row it is."""

    @property
    def reads(self) -> list[tuple[int, int]]:
        """Where the tokens of the choices that are read from this sequence stand, and which they are."""
        assert self.ranked is not None
        own = [choice for choice in self.ranked.choices if choice.sequence == self.part]
        return [pair for choice in own for pair in zip(choice.places, choice.tokens, strict=True)]

    @property
    def length(self) -> int:
        """Positions it takes, its prompt included."""
        return len(self.encoded) + (self.served.num_positions if self.served is not None else 0)

    @property
    def text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What goes into the model: token ids and types."""
        return tuple(self.encoded.input_ids), tuple(self.encoded.token_type_ids or ())


def predict(
    backbone: Backbone,
    rows: Sequence[Any],
    found: Sequence[Served | None],
    batch_size: int,
    workspace: Workspace,
    first: int = 0,
) -> list[Prediction]:
    """The answers to rows, in the order given.

    Args:
        rows: as `Bank.predict` takes them, without their adapters' names.
        found: each row's adapter, `None` for the bare backbone.
        batch_size: most sequences in one forward pass.
        workspace: as `Plan` takes it.
        first: what messages number the rows from.

    Raises:
        DataError, PlanError: before any forward pass, naming the row.
    """
    sequences = _encode(backbone, rows, found, first)
    # By length, so that little is padded; then by text, so that rows of one text meet in one batch.
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].length, sequences[i].text), reverse=True)
    for start in range(0, len(order), batch_size):
        _forward(backbone, [sequences[i] for i in order[start : start + batch_size]], workspace)
    per_row: list[list[_Sequence]] = [[] for _ in rows]
    for s in sequences:
        per_row[s.row].append(s)
    return [_read(served, parts) for served, parts in zip(found, per_row, strict=True)]


def _encode(backbone: Backbone, rows: Sequence[Any], found: Sequence[Served | None], first: int) -> list[_Sequence]:
    """Tokenize all rows, those of equal settings in one call."""
    pending: dict[tuple[int, bool], list[tuple[int, Served | None, tuple[str, ...]]]] = {}
    readers: dict[str, PatternReader] = {}
    out: list[_Sequence] = []
    for i, (row, served) in enumerate(zip(rows, found, strict=True)):
        try:
            if served is not None and served.adapter.task.pattern is not None:
                out += _ranked(backbone, i, row, served, readers)
                continue
            if served is None:
                backbone.refuse_decoder("a row without an adapter has no embedding", "name an adapter")
            texts = _bare_texts(row) if served is None else served.texts(row)
        except MultituneError as error:
            raise type(error)(f"row {first + i}: {error}") from error
        length = backbone.max_length if served is None else served.room(backbone)
        words = served is not None and served.adapter.task.kind == "tagging"
        pending.setdefault((length, words), []).extend((i, served, t) for t in texts)
    for (length, words), items in pending.items():
        encoded = encode(backbone, [t for _, _, t in items], max_length=length, words=words)
        for (i, served, _), e in zip(items, encoded, strict=True):
            if len(e) > length:  # not even the special tokens fit
                raise PlanError(
                    f"row {first + i}: {len(e)} tokens cannot be cut to the {length} that the backbone's "
                    f"{backbone.max_length} positions, the prompt and max_length leave; shorten the prompt"
                )
            out.append(_Sequence(i, served, e))
    return out


def _ranked(
    backbone: Backbone, row: int, values: Any, served: Served, readers: dict[str, PatternReader]
) -> list[_Sequence]:
    """The sequences of a row whose answers are texts, each with the tokens that are read from it."""
    if served.name not in readers:
        readers[served.name] = PatternReader(backbone, served.adapter.task)
    ranked, _ = readers[served.name].read(values, served.room(backbone))
    return [_Sequence(row, served, e, ranked=ranked, part=k) for k, e in enumerate(ranked.sequences)]


def _forward(backbone: Backbone, sequences: Sequence[_Sequence], workspace: Workspace) -> None:
    """One forward pass; leaves each sequence its logits or embedding on the CPU."""
    backbone.check_idle()
    batch = pad([s.encoded for s in sequences], backbone.pad_id).to(backbone.device)
    with torch.no_grad():
        hidden = _hidden(backbone, sequences, batch, workspace)
        own = [
            (s.served.adapter.head, s.served.head_params) if s.served and s.ranked is None else None for s in sequences
        ]
        values = heads.mixed_logits(backbone, own, hidden, batch.attention_mask)
        ranked = [i for i, s in enumerate(sequences) if s.ranked is not None]
        for i, log_probs in zip(
            ranked, _log_probs(backbone, [sequences[i] for i in ranked], hidden[ranked]), strict=True
        ):
            values[i] = log_probs
        bare = [i for i, s in enumerate(sequences) if s.served is None]
        if bare:
            mask = None if batch.attention_mask is None else batch.attention_mask[bare]
            pooled = heads.pool(backbone, hidden[bare], mask, "mean")
            for i, embedding in zip(bare, pooled, strict=True):
                values[i] = embedding
    found = [v for v in values if v is not None]
    whole = torch.cat([v.flatten() for v in found]).float().cpu()  # one copy off the device for all
    for s, v, piece in zip(sequences, found, whole.split([v.numel() for v in found]), strict=True):
        s.values = piece.view(v.shape)


def _log_probs(backbone: Backbone, sequences: Sequence[_Sequence], hidden: Tensor) -> list[Tensor]:
    """Per sequence, of `hidden [S, T, D]`, log p of the tokens that are read from it: one product for them all."""
    if not sequences:
        return []
    index = [(0, 0, row, place, token) for row, s in enumerate(sequences) for place, token in s.reads]
    found = choice_log_probs(backbone.token_head, hidden, torch.tensor(index))
    return list(found.split([len(s.reads) for s in sequences]))


def _hidden(backbone: Backbone, sequences: Sequence[_Sequence], batch: Batch, workspace: Workspace) -> Tensor:
    """The last hidden states `[B, T, D]`; what rows of one text have in common runs once."""
    rows = [s.served.delta_set if s.served else None for s in sequences]
    plan = Plan(rows, workspace)
    cut = None
    if not plan.parts and not backbone.decodes:
        touched = [s.served.touched if s.served else backbone.num_layers for s in sequences]
        cut = find_cut([s.text for s in sequences], touched, backbone.num_layers)
    if cut is None:
        return passes.run(backbone, plan, batch)
    return run_cut(backbone, cut, plan, rows, batch, workspace)


def _bare_texts(row: Any) -> tuple[tuple[str, ...], ...]:
    parts = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, (tuple, list)) else ()
    if not 1 <= len(parts) <= 2 or not all(isinstance(p, str) for p in parts):
        raise DataError(f"a row without an adapter is a text or a pair of texts, not {type(row).__name__}")
    return (parts,)


def _read(served: Served | None, parts: Sequence[_Sequence]) -> Prediction:
    values = [p.values for p in parts if p.values is not None]
    if served is None:
        return Prediction(adapter=None, label=None, probabilities={}, logits=None, embedding=values[0])
    task = served.adapter.task
    if task.kind == "embedding":
        return Prediction(adapter=served.name, label=None, probabilities={}, logits=None, embedding=values[0])
    if task.pattern is not None:
        logits = _scores(parts)
        read = heads.answer(task, logits)
        return Prediction(adapter=served.name, label=read.label, probabilities=read.probabilities, logits=logits)
    starts = parts[0].encoded.word_starts
    logits = torch.cat(values) if task.kind == "multiple_choice" else values[0]
    read = heads.answer(task, logits, starts)
    if task.kind == "tagging":
        logits = logits[list(starts)]
    return Prediction(adapter=served.name, label=read.label, probabilities=read.probabilities, logits=logits)


def _scores(parts: Sequence[_Sequence]) -> Tensor:
    """The scores per token of a row's choices `[choices]`, from the log-probabilities of all its sequences."""
    left = {s.part: s.values for s in parts}
    scores = []
    ranked = parts[0].ranked
    assert ranked is not None
    for choice in ranked.choices:
        values = left[choice.sequence]
        assert values is not None
        scores.append(values[: len(choice.tokens)].mean())
        left[choice.sequence] = values[len(choice.tokens) :]
    return ranked.means(scores)
