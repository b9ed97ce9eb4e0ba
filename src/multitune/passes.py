"""Forward passes of a backbone: whole, in pieces, cut in two, of several batches together.

Legend: B rows, T tokens, T' positions with what is inserted, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multitune.batch_checks import check_batch, check_ids
from multitune.call import Call, Section
from multitune.current import active
from multitune.errors import PlanError
from multitune.inputs import Batch
from multitune.joint import JointBatch, JointCall
from multitune.plan import Plan

if TYPE_CHECKING:
    from multitune.backbone import Backbone


def run(backbone: Backbone, plan: Plan, batch: Batch) -> Tensor:
    """`Backbone.run`: the last hidden states `[B, T, D]`."""
    backbone.check_attached()
    check_batch(backbone, batch)
    if plan.parts:
        return _run_parts(backbone, plan, batch)
    call = Call(backbone, plan, batch)
    with active(call):
        compiled = backbone.compiled
        hidden = compiled(call) if compiled else backbone.running(**call.inputs).last_hidden_state
    return call.restore(hidden)


def _run_parts(backbone: Backbone, plan: Plan, batch: Batch) -> Tensor:
    """`run` for a plan in pieces."""
    check_ids(plan, backbone, batch.input_ids)
    pieces = [run(backbone, part, batch.rows(rows)) for rows, part in plan.parts]
    order = torch.tensor([row for rows, _ in plan.parts for row in rows], device=batch.input_ids.device)
    return torch.cat(pieces).index_select(0, order.argsort())


def run_below(backbone: Backbone, plan: Plan, layer: int, batch: Batch) -> Tensor:
    """`Backbone.run_below`: what goes into a layer, `[B, T', D]`."""
    section = Section(stop=layer)
    call = _call_in(backbone, section, plan, layer, batch)
    with active(call):
        backbone.running(**call.inputs)
    assert section.reached is not None
    inverse = plan.inverse
    return section.reached if inverse is None else section.reached.index_select(0, inverse.to(backbone.device))


def run_above(backbone: Backbone, plan: Plan, layer: int, states: Tensor, batch: Batch) -> Tensor:
    """`Backbone.run_above`: the last hidden states `[B, T, D]` from what goes into a layer, `[B, T', D]`."""
    ordered = states if plan.order is None else states.index_select(0, plan.order.to(states.device))
    section = Section(stop=backbone.num_layers, first=layer, states=ordered)
    call = _call_in(backbone, section, plan, layer, batch)
    with active(call):
        output = backbone.running(**call.inputs)
    return call.restore(output.last_hidden_state)


def _call_in(backbone: Backbone, section: Section, plan: Plan, layer: int, batch: Batch) -> Call:
    """A call that runs the layers of a section."""
    backbone.check_attached()
    backbone.refuse_decoder("a pass is not cut in two", "run it whole: Backbone.run")
    if plan.parts or not 0 < layer < backbone.num_layers:
        problem = "a plan in pieces" if plan.parts else f"layer {layer} of {backbone.num_layers}"
        raise PlanError(
            f"a pass cannot be cut at {problem}; cut between layer 1 and {backbone.num_layers - 1}, or run()"
        )
    check_batch(backbone, batch)
    call = Call(backbone, plan, batch)
    call.section = section
    return call


def run_joint(backbone: Backbone, batches: Sequence[JointBatch]) -> list[Tensor]:
    """`Backbone.run_joint`: per batch the last hidden states `[K, W, D]`."""
    backbone.check_attached()
    backbone.refuse_decoder("batches are not joined", "train its adapters one by one: train")
    for b in batches:
        check_batch(backbone, b.batch)
    call = JointCall(backbone, batches)
    with active(call):
        output = backbone.running(**call.inputs)
    return call.split(output.last_hidden_state)


def keys_and_values(backbone: Backbone, token_ids: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """`Backbone.keys_and_values`: by attention site what one row attends to, `[T, H, K]` each."""
    backbone.check_attached()
    backbone.refuse_decoder("a text alone gives no keys and values", "leave the start text out")
    ids = torch.tensor([list(token_ids)], device=backbone.device)
    call = Call(backbone, Plan([None]), Batch(input_ids=ids))
    call.recorded = {}
    with torch.no_grad(), active(call):
        backbone.running(**call.inputs)
    return call.recorded
