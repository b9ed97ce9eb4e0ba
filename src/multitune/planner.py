"""What each method would cost on a backbone: parameters, files, memory of training and serving, time in a batch.

Parameters and files are counted; a size that training decides counts as the settings aim at (`Method.expected`).
Training memory is estimated from the tensors that autograd keeps in three tiny passes, extrapolated to the batch asked
for. Time is measured: batches of the method and of the bare backbone, in turn. `benchmarks/planner.py` compares the
estimates with measured runs. Scores are those that `benchmarks/real_data.py --write-planner` has written.

Legend: B rows in a batch, T tokens in a row, K tasks.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from multitune.backbone import Backbone
from multitune.deltas import InputScale, LowRank, SparseWeight
from multitune.errors import ConfigError, PlanError
from multitune.merging import why_not_mergeable
from multitune.methods import Method
from multitune.methods.yielded import check_deltas
from multitune.plan import DeltaSet, Plan
from multitune.pruned import Flops, flops
from multitune.quantized import bytes_of, check_trains, plain_tensors
from multitune.workspace import Workspace

#: Lengths of the three passes that the estimate of activations is fitted to.
_PROBES = (8, 16, 24)
_FLOAT = 4
#: A trained float32 value, its gradient and AdamW's two moments.
_TRAINED_BYTES = 4 * _FLOAT


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be trained and served."""

    rows: int = 32
    """Rows in one batch, B."""
    length: int = 64
    """Tokens in a row, T; an encoder-decoder writes as many as it reads."""
    tasks: int = 10
    """Tasks that one copy of the backbone serves, K."""
    memory: int | None = None
    """Bytes that training, and serving, may take."""
    latency: float | None = None
    """Most that a batch may take, as a multiple of the bare backbone's time; 1.1 is ten percent more."""
    must_merge: bool = False
    """Whether a task must become an ordinary checkpoint of its own."""

    def __post_init__(self) -> None:
        for name in ("rows", "length", "tasks"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value} is not possible; give at least 1")
        if self.memory is not None and self.memory < 1:
            raise ConfigError(f"memory={self.memory} is not possible; give a number of bytes, such as 8GB")
        if self.latency is not None and not self.latency > 1:
            raise ConfigError(
                f"latency={self.latency} is not possible: it is a multiple of the bare backbone's time, which no "
                f"adapter undercuts; give for example 1.1 for ten percent more"
            )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method costs."""

    method: str
    """Its name."""
    parameters: int
    """Trained parameters without the head."""
    file_bytes: int
    """A task's file of tensors, with a head of two outputs; an encoder-decoder's tasks have none."""
    training_bytes: int
    """Estimated memory of training one task: weights, trained values with their optimiser, activations."""
    serving_bytes: int
    """Memory of the backbone and all tasks."""
    latency: float | None
    """Time of a mixed batch by the bare backbone's; `None` where it was not measured or does not mix."""
    merges: bool
    """Whether it can be folded into a checkpoint of its own."""
    mixes: bool
    """Whether its rows share a batch with other methods'."""
    accuracy: float | None = None
    """The score of `scores()` for this method with these settings, in percent; `None` where it was not measured."""
    flops: Flops | None = None
    """What zeros of a pruned backbone, and heads that the method shuts, would save in one row on kernels that skip
    them; `None` where there are neither, or where what the method adds is not counted."""
    problems: tuple[str, ...]
    """Why it does not meet the workload; empty where it does."""


def cost_of(
    backbone: Backbone, method: Method, workload: Workload, *, rounds: int = 3, generator: torch.Generator | None = None
) -> Cost:
    """What `method` costs for a workload.

    Args:
        rounds: measured batches of the method and of the bare backbone, in turn; 0 measures no time.

    Raises:
        ConfigError: the method does not fit the backbone, or the rows do not fit its positions.
    """
    if workload.length > backbone.max_length:
        raise ConfigError(f"length={workload.length} is not possible; the backbone has {backbone.max_length} positions")
    check_trains(backbone, method)
    generator = generator or torch.Generator().manual_seed(0)
    tensors = method.init(backbone, generator)
    yielded = method.deltas({k: t.to(backbone.device) for k, t in tensors.items()}, backbone)
    check_deltas(method, yielded, backbone)
    deltas = DeltaSet(yielded)
    weights = bytes_of(backbone.model, buffers=False)
    head = 0 if backbone.decodes else 2 * (backbone.hidden_size + 1)
    trained = method.num_parameters(backbone)
    finished_method, finished = _left(backbone, method, generator)
    stored = sum(t.numel() * t.element_size() for t in finished.values())
    training = weights + _TRAINED_BYTES * (trained + head) + activation_bytes(backbone, method, tensors, workload)
    training += sum(t.numel() * t.element_size() for name, t in tensors.items() if not method.trains(name))
    if method.changes_weights:  # trained and served on a copy of the backbone
        serving = (1 + workload.tasks) * weights
        training += weights
    else:
        served = DeltaSet(finished_method.deltas({k: t.to(backbone.device) for k, t in finished.items()}, backbone))
        serving = weights + workload.tasks * (served.fused(backbone.dtype, backbone.device).nbytes() + head * _FLOAT)
    latency = None
    if rounds and not method.changes_weights:
        latency = measure_latency(backbone, method, workload, rounds, generator)
    cost = Cost(
        method=method.name,
        parameters=trained,
        file_bytes=stored + head * _FLOAT,
        training_bytes=training,
        serving_bytes=serving,
        latency=latency,
        merges=why_not_mergeable(backbone, deltas) is None,
        mixes=not method.changes_weights,
        accuracy=scores().of(method),
        flops=_flops(backbone, method, deltas, workload),
        problems=(),
    )
    return Cost(**{**cost.__dict__, "problems": problems_of(cost, workload)})


def costs_of(
    backbone: Backbone, methods: Iterable[Method], workload: Workload, *, rounds: int = 3
) -> tuple[list[Cost], dict[str, str]]:
    """What each method costs, as `cost_of` says, and by name why others do not fit the backbone."""
    costs, misfits = [], {}
    for method in methods:
        try:
            costs.append(cost_of(backbone, method, workload, rounds=rounds))
        except (ConfigError, PlanError) as error:
            misfits[method.name] = str(error)
    return costs, misfits


def _left(backbone: Backbone, method: Method, generator: torch.Generator) -> tuple[Method, Mapping[str, Tensor]]:
    """What a run of `method` is expected to leave, untrained."""
    served = method.expected(backbone)
    return served.finish(served.init(backbone, generator), backbone)


def _flops(backbone: Backbone, method: Method, deltas: DeltaSet, workload: Workload) -> Flops | None:
    """`Cost.flops`."""
    pruned_heads = float(getattr(method, "pruned_heads", 0.0))
    if backbone.decodes or not (backbone.pruned or pruned_heads):
        return None
    update = 0
    for delta in (d for of_site in deltas.by_site.values() for d in of_site):
        if isinstance(delta, LowRank):
            update += delta.A.numel() + delta.B.numel()
        elif isinstance(delta, SparseWeight):
            update += delta.values.numel()
        elif not isinstance(delta, InputScale):  # that of shut heads, which would be cut out
            return None
    return flops(backbone, workload.length, pruned_heads=pruned_heads, update=update)


def problems_of(cost: Cost, workload: Workload) -> tuple[str, ...]:
    """The limits of a workload that a cost exceeds, in words."""
    found = []
    if workload.memory is not None:
        for what, needed in (("training", cost.training_bytes), ("serving", cost.serving_bytes)):
            if needed > workload.memory:
                found.append(f"{what} needs {needed / 1e9:.3f} GB of {workload.memory / 1e9:g} GB")
    if workload.tasks > 1 and not cost.mixes:
        found.append("changes the backbone's weights, so every task needs a backbone and batches of its own")
    if workload.latency is not None and cost.latency is not None and cost.latency > workload.latency:
        found.append(f"a batch takes {cost.latency:.3f} times the bare backbone's time, limit {workload.latency:g}")
    if workload.must_merge and not cost.merges:
        found.append("cannot be folded into a checkpoint")
    return tuple(found)


# ---------------------------------------------------------------- memory


def activation_bytes(backbone: Backbone, method: Method, tensors: dict[str, Tensor], workload: Workload) -> int:
    """Estimated bytes that autograd keeps between the forward and the backward pass of one batch.

    Three passes of one row give a parabola in its length, because attention may keep values per pair of positions;
    the batch keeps that for each of its rows. LSG attention pads to blocks and is another function of short rows, so
    there a row of the whole length is run.
    """
    if backbone.lsg is not None:
        return workload.rows * _kept(backbone, method, tensors, workload.length)
    lengths = [min(t, backbone.max_length) for t in _PROBES]
    kept = torch.tensor([_kept(backbone, method, tensors, t) for t in lengths], dtype=torch.float64)
    powers = torch.tensor([[1.0, t, t * t] for t in lengths], dtype=torch.float64)
    a, b, c = torch.linalg.solve(powers, kept).tolist()
    return int(workload.rows * max(0.0, a + b * workload.length + c * workload.length**2))


def _kept(backbone: Backbone, method: Method, tensors: dict[str, Tensor], length: int) -> int:
    """Bytes autograd keeps for one row of `length` tokens, the weights and the method's own tensors left out."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        for plain in plain_tensors(t):
            storage = plain.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    model, own = backbone.model, list(backbone.model.parameters())
    params = {
        k: t.detach().to(backbone.device).requires_grad_(method.trains(k) and t.is_floating_point())
        for k, t in tensors.items()
    }
    if method.changes_weights:
        params = {}
    ids = torch.arange(length, device=backbone.device).remainder(backbone.vocab_size).unsqueeze(0)
    trained = [p for name, p in model.named_parameters() if method.changes_weights and name in tensors]
    try:
        for p in trained:
            p.requires_grad_(True)
        model.train()  # with dropout, whose masks are kept too
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            deltas = DeltaSet(method.deltas(params, backbone)) if not method.changes_weights else DeltaSet({})
            hidden = backbone.run(Plan([deltas]), ids, decoder_input_ids=_written(backbone, ids))
        del hidden
    finally:
        model.eval()
        for p in trained:
            p.requires_grad_(False)
    held = [*own, *model.buffers(), *params.values()]
    known = {t.untyped_storage().data_ptr() for whole in held for t in plain_tensors(whole)}
    return sum(size for pointer, size in seen.items() if pointer not in known)


def _written(backbone: Backbone, ids: Tensor) -> Tensor | None:
    """What the decoder of an encoder-decoder reads: as many tokens as its encoder."""
    return ids if backbone.decodes else None


# ---------------------------------------------------------------- time


def measure_latency(
    backbone: Backbone, method: Method, workload: Workload, rounds: int, generator: torch.Generator
) -> float:
    """Time of a new mixed batch of the workload's tasks by the bare backbone's; the median of interleaved rounds."""
    num_tasks = min(workload.tasks, workload.rows)
    sets = []
    for _ in range(num_tasks):
        finished, smaller = _left(backbone, method, generator)
        smaller = {k: t.to(backbone.device) for k, t in smaller.items()}
        sets.append(DeltaSet(finished.deltas(smaller, backbone)).fused(backbone.dtype, backbone.device))
    rows: Sequence[DeltaSet | None] = [sets[i % num_tasks] for i in range(workload.rows)]
    longest = max(s.num_positions for s in sets)
    length = min(workload.length, backbone.max_length - longest)
    workspace = Workspace()
    times: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for turn in range(rounds + 1):
            ids = torch.randint(backbone.vocab_size, (workload.rows, length), generator=generator)
            ids = ids.to(backbone.device)
            for bare in (True, False):
                start = time.perf_counter()
                plan = Plan([None] * workload.rows if bare else rows, workspace)
                backbone.run(plan, ids, decoder_input_ids=_written(backbone, ids))
                if backbone.device.type == "cuda":
                    torch.cuda.synchronize(backbone.device)
                if turn:  # the first round warms up
                    times[bare].append(time.perf_counter() - start)
    return statistics.median(times[False]) / statistics.median(times[True])


# ---------------------------------------------------------------- recommendation

#: Beside this module: measured scores.
SCORES_FILE = "planner_scores.json"

#: Scores closer than this, in points, are no reason to prefer one method.
_TIE = 1.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Measured scores of methods: one small backbone and one task, a reason to try a method first and no more."""

    task: str
    """What the task is called, and by which score it is judged."""
    backbone: str
    """Name of the backbone."""
    methods: Mapping[str, Mapping[str, Any]]
    """By method: `percent`, the mean over `seeds` runs, and the method's `settings` in them."""

    def of(self, method: Method) -> float | None:
        """The score of a method with exactly these settings, in percent, if it was measured."""
        found = self.methods.get(method.name)
        if found is None or found["settings"] != method.settings():
            return None
        return float(found["percent"])


@functools.cache
def scores() -> Scores:
    """The scores that ship with the package."""
    return Scores(**json.loads(resources.files("multitune").joinpath(SCORES_FILE).read_text("utf-8")))


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One method to try, and why."""

    method: str
    reason: str


def recommend(costs: Sequence[Cost]) -> list[Recommendation]:
    """Methods to try first among those that meet the workload: the most accurate, the smallest, the fastest.

    The last two are taken from those that scored about as well as the most accurate. Methods without a measured score
    are advised only where none of those that fit has one, by size and time alone.
    """
    fit = [c for c in costs if not c.problems]
    close, among = fit, "that fit; how well they do was not measured"
    found = []
    if any(c.accuracy is not None for c in fit):
        best = max(fit, key=lambda c: c.accuracy or 0.0)
        top = best.accuracy or 0.0
        close = [c for c in fit if c.accuracy is not None and c.accuracy >= top - _TIE]
        among = f"within {_TIE:g} point"
        reason = f"the most accurate on {scores().task} with {scores().backbone} ({top:.1f} %)"
        found.append(Recommendation(method=best.method, reason=reason))
    if close:
        smallest = min(close, key=lambda c: c.file_bytes)
        reason = f"the smallest file ({smallest.file_bytes / 1e3:,.0f} kB a task) of those {among}"
        found.append(Recommendation(method=smallest.method, reason=reason))
    timed = [c for c in close if c.latency is not None]
    if timed:
        fastest = min(timed, key=lambda c: c.latency or 0.0)
        times = f"{fastest.latency:.2f} times the bare backbone's"
        reason = f"the least time in a mixed batch ({times}) of the same"
        found.append(Recommendation(method=fastest.method, reason=reason))
    return found
