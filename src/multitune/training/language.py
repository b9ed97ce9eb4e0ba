"""Judging an adapter that writes: how likely it finds the answers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from multitune.adapter import Adapter
from multitune.answers import Answered, encode_answered
from multitune.backbone import Backbone
from multitune.batching import Encoded
from multitune.errors import DataError
from multitune.language_loss import per_row, perplexity_of, token_losses
from multitune.plan import DeltaSet, Plan
from multitune.training.data import Collator, Item


def answer_scores(
    backbone: Backbone, adapter: Adapter, table: Any, *, batch_size: int, drop_layers: Sequence[int] = ()
) -> dict[str, float]:
    """Mean loss per token of the answers (their end of text included) and perplexity, by the path that serves.

    Raises:
        DataError: no rows, or a row that does not fit the adapter's task.
    """
    examples = adapter.task.examples(table)
    if not examples:
        raise DataError(f"there are no rows to judge adapter '{adapter.name}' by; give a table with at least one")
    on, deltas = served(backbone, adapter, drop_layers)
    room = adapter.max_length if deltas is None else min(adapter.max_length, on.max_length - deltas.num_positions)
    answered = encode_answered(on, adapter.task, examples, max_length=room, split="given")
    losses = [loss for loss, _ in answer_losses(on, deltas, answered, batch_size=batch_size)]
    return perplexity_of(sum(losses) / sum(a.num_answer for a in answered))


def answer_losses(
    backbone: Backbone, deltas: DeltaSet | None, answered: Sequence[Answered], *, batch_size: int
) -> list[tuple[float, int]]:
    """Per row the sum of its answer's losses, and how many tokens that is of; rows of similar length run together."""
    order = sorted(range(len(answered)), key=lambda i: len(answered[i].input_ids), reverse=True)
    collate = Collator("generation", backbone.pad_id, start_ids=backbone.start_ids)
    found: list[tuple[float, int]] = [(0.0, 0)] * len(answered)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        rows = [answered[i] for i in picked]
        batch = collate([Item(sequences=(Encoded(input_ids=a.input_ids),), target=a.num_answer) for a in rows])
        batch = {name: t.to(backbone.device) for name, t in batch.items()}
        targets = batch.pop("targets")
        with torch.no_grad():
            hidden = backbone.run(Plan([deltas] * len(rows)), **batch)
            sums, counts = per_row(token_losses(backbone.lm_head, hidden, targets), targets)
        for i, total, count in zip(picked, sums.tolist(), counts.tolist(), strict=True):
            found[i] = total, count
    return found


def served(backbone: Backbone, adapter: Adapter, drop_layers: Sequence[int] = ()) -> tuple[Backbone, DeltaSet | None]:
    """The backbone to run, and the deltas to run it with; a fully tuned adapter has a backbone of its own."""
    if adapter.method.changes_weights:
        adapter.check_backbone(backbone)
        return backbone.with_weights(adapter.params), None
    return backbone, adapter.delta_set(backbone, drop_layers=drop_layers)
