"""Refusing a batch that does not fit its plan and its backbone, before anything runs.   Legend: B rows, T tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from multitune.errors import PlanError, suggest
from multitune.inputs import Batch
from multitune.plan import Plan

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def check_sites(plan: Plan, backbone: Backbone) -> None:
    """Raise `PlanError` where the plan names a site that the backbone lacks; names it."""
    unknown = sorted((plan.steps.keys() | plan.input_steps.keys()) - backbone.site_names)
    if unknown:
        raise PlanError(
            f"the plan has deltas at '{unknown[0]}', but backbone '{backbone.name}' has no such site."
            f"{suggest(unknown[0], backbone.site_names)} Its sites: Backbone.sites"
        )


def check_batch(backbone: Backbone, batch: Batch) -> None:
    """Raise `PlanError` for a batch whose tensors do not go together, or are not where the backbone is."""
    for name in ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "pieces"):
        given = getattr(batch, name)
        if given is not None and given.device != backbone.device:
            raise PlanError(
                f"{name} is on {given.device}, but backbone '{backbone.name}' is on {backbone.device}; move it there: "
                f"{name}.to(backbone.device)"
            )
    check_beside_ids(backbone, batch)
    if batch.pieces is not None:
        check_pieces(backbone, batch.pieces, batch.attention_mask)


def check_pieces(backbone: Backbone, pieces: Tensor, mask: Tensor | None) -> None:
    """Raise `PlanError` unless rows of several texts, `pieces [B, T]` of a batch with `mask [B, T]`, can be kept apart.

    Names the row whose texts do not stand one behind the other, or whose padding is not behind them.
    """
    if not backbone.causal:
        raise PlanError(
            f"pieces puts several texts into one row, which needs a causal backbone, and '{backbone.name}' "
            f"({backbone.model.config.model_type}) is none; give every text a row of its own"
        )
    for name, given, rises, fix in (
        ("pieces", pieces, True, "number a row's texts in the order in which they stand, each one's tokens together"),
        ("attention_mask", mask, False, "where a row holds several texts, put all of its padding behind the last one"),
    ):
        if given is None:
            continue
        steps = given.long().diff(dim=1)
        wrong = steps < 0 if rises else steps > 0
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0])
            how = "falls" if rises else "rises"
            raise PlanError(f"row {row}: {name} {how} from position {column} to {column + 1}; {fix}")


def check_beside_ids(backbone: Backbone, batch: Batch) -> None:
    """Raise `PlanError` unless what stands beside `input_ids [B, T]` has their rows and tokens, and known token types.

    Not for a pass that continues from another library's cache, whose mask is longer than its ids.
    """
    shape, slots = tuple(batch.input_ids.shape), batch.slots
    for name in ("attention_mask", "token_type_ids", "pieces"):
        given = getattr(batch, name)
        if given is not None and tuple(given.shape) != shape:
            raise PlanError(
                f"{name} has shape {tuple(given.shape)}, but input_ids has shape {shape}; give it one entry per token, "
                f"or leave it out"
            )
    if slots is not None and (slots.ndim != 2 or slots.shape[0] != shape[0]):
        raise PlanError(f"slots has shape {tuple(slots.shape)}, but there are {shape[0]} rows; give [rows, slots]")
    types, count = batch.token_type_ids, int(getattr(backbone.model.config, "type_vocab_size", 0) or 0)
    if types is None or not backbone.takes_token_types:
        return
    if (found := _outside(types, count)) is not None:
        row, column, wrong = found
        raise PlanError(
            f"row {row}: token type {wrong} at position {column} is outside 0..{count - 1}, which are those of "
            f"backbone '{backbone.name}'; encode the text with this backbone's own tokenizer, or leave token_type_ids "
            f"out"
        )


def _outside(t: Tensor, count: int) -> tuple[int, int, int] | None:
    """Row, column and value of the first entry of `t [B, T]` that is not one of 0, 1, ..., count - 1, if any is."""
    if not t.numel():
        return None
    low, high = t.aminmax()
    if int(low) >= 0 and int(high) < count:
        return None
    row, column = (int(i) for i in ((t < 0) | (t >= count)).nonzero()[0])
    return row, column, int(t[row, column])


def check_ids(plan: Plan, backbone: Backbone, input_ids: Tensor) -> None:
    """Raise `PlanError` unless `input_ids [B, T]` has the plan's rows and ids of the vocabulary; names the row."""
    if input_ids.ndim != 2 or input_ids.shape[0] != plan.num_rows:
        raise PlanError(
            f"the plan is for {plan.num_rows} rows, but input_ids has shape {tuple(input_ids.shape)}; "
            f"make a plan with one entry per row of the batch"
        )
    if (found := _outside(input_ids, backbone.vocab_size)) is not None:
        row, column, wrong = found
        raise PlanError(
            f"row {row}: token id {wrong} at position {column} is outside the vocabulary "
            f"0..{backbone.vocab_size - 1}; encode the text with this backbone's own tokenizer"
        )
