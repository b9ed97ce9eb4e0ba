"""Batches of several runs in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from multitune.backbone import Backbone
from multitune.errors import MultituneError
from multitune.joint import JointBatch
from multitune.plan import Plan
from multitune.training.failures import as_ours
from multitune.training.stepped import SteppedRun

#: A run joins a pass only if the pass is then at most this many times the tokens of its runs by themselves: beyond
#: that, the padding costs more than sharing a pass gains.
MOST_PADDING = 1.125


def pack(runs: Sequence[SteppedRun], token_budget: int) -> list[list[SteppedRun]]:
    """Which runs' next batches share a pass: of like precision and like length, as many as the budget holds.

    Depends on the shapes of the batches alone. A batch that exceeds the budget by itself is a pass by itself.

    Args:
        token_budget: most tokens of a pass, padding and prompts included.
    """
    alike: dict[tuple[object, ...], list[SteppedRun]] = {}
    for run in runs:
        alike.setdefault(_kind(run), []).append(run)
    passes: list[list[SteppedRun]] = []
    for same in alike.values():
        rows = own = 0
        passes.append([])
        for run in sorted(same, key=lambda run: run.width):  # stable: of equal widths in the order given
            count = len(run.batch["input_ids"])
            rows, own = rows + count, own + count * run.width
            padded = rows * run.width
            if passes[-1] and padded > min(token_budget, MOST_PADDING * own):
                passes.append([])
                rows, own = count, count * run.width
            passes[-1].append(run)
    return passes


def _kind(run: SteppedRun) -> tuple[object, ...]:
    """What the runs of one pass share; those that train a head alone need no gradients through the backbone."""
    tuned, config = run.trainer.tuned, run.trainer.config
    alone = None if run.apart is None else id(run)
    return tuned.autocast, config.gradient_checkpointing, tuned.num_trained > 0, alone


def needs_process(run: SteppedRun) -> bool:
    """Whether a pass of such runs needs the process for itself, so that none may run beside it.

    Layers are recomputed because of a switch on the backbone, and with random numbers that are set for all threads.
    Mixed precision keeps its casts in a table of the process, which whoever ends a pass empties.
    """
    return run.trainer.config.gradient_checkpointing or run.trainer.tuned.autocast is not None


def run_pass(runs: Sequence[SteppedRun]) -> list[tuple[SteppedRun, Tensor | MultituneError]]:
    """Add the gradients of every run's batch to its tensors.

    Returns:
        With each run its loss, or the error that ends it; such a run has no part in the backward pass.

    Raises:
        Exception: what the pass itself failed of; nobody can tell whose fault that is, and gradients may be half added.
    """
    backbone = runs[0].trainer.tuned.backbone
    backbone.model.train()
    # Whether gradients are taken is a matter of the thread, and so of the lane.
    with torch.enable_grad(), _checkpointing(backbone, runs[0].trainer.config.gradient_checkpointing):
        found = _losses(backbone, runs)
        good = [loss for _, loss in found if isinstance(loss, Tensor)]
        if good:
            torch.autograd.backward(good)
    return [(run, loss.detach() if isinstance(loss, Tensor) else loss) for run, loss in found]


@contextmanager
def _checkpointing(backbone: Backbone, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    backbone.enable_gradient_checkpointing()
    try:
        yield
    finally:
        backbone.disable_gradient_checkpointing()


def _losses(backbone: Backbone, runs: Sequence[SteppedRun]) -> list[tuple[SteppedRun, Tensor | MultituneError]]:
    batches: list[JointBatch] = []
    failed: dict[SteppedRun, MultituneError] = {}
    for run in runs:
        try:
            plan = _plan(run)
        except Exception as error:
            # Its rows stay, without deltas: the pass has the shape, and the others the bits, that they would have.
            failed[run] = as_ours(error)
            plan = Plan([None] * len(run.batch["input_ids"]))
        batches.append(_joint_batch(run, plan))
    with runs[0].trainer.tuned.arithmetic():
        hidden = backbone.run_joint(batches)
    found: list[tuple[SteppedRun, Tensor | MultituneError]] = []
    for run, batch, own in zip(runs, batches, hidden, strict=True):
        if run in failed:
            found.append((run, failed[run]))
            continue
        tuned, targets = run.trainer.tuned, run.batch["targets"]
        tuned.training = True  # an evaluation may have switched it off; the backbone is switched on above
        more = (run.batch.get(name) for name in ("index", "teacher"))
        try:
            with run.stream.drawing_all() if tuned.head.drops else nullcontext():
                outputs = tuned.read(own, batch.attention_mask, targets, *more)
            with run.stream.drawing_all():  # a method's penalty may draw
                found.append((run, run.trainer.share_of_loss(outputs, targets, run.num_items)))
        except Exception as error:
            found.append((run, as_ours(error)))
    return found


def _plan(run: SteppedRun) -> Plan:
    tuned = run.trainer.tuned
    with tuned.arithmetic(), run.stream.drawing_all():
        return tuned.plan(len(run.batch["input_ids"]))


def _joint_batch(run: SteppedRun, plan: Plan) -> JointBatch:
    device, inputs = run.trainer.tuned.backbone.device, run.batch
    given = (inputs.get(name) for name in ("input_ids", "attention_mask", "token_type_ids", "slots", "pieces"))
    ids, mask, types, slots, pieces = (None if t is None else t.to(device) for t in given)
    assert ids is not None
    return JointBatch(
        plan=plan,
        input_ids=ids,
        attention_mask=mask,
        token_type_ids=types,
        slots=slots,
        pieces=pieces,
        stream=run.stream,
    )
