"""Instrumenting a model: thin wrappers at its sites, which ask the current call for their deltas.

The module tree, its `state_dict` keys and its bits stay as they were; taking the wrappers off leaves nothing
behind. Busy sites (linears, norms, sub-layer outputs) get a `forward` of their own as an instance attribute,
because a module with torch hooks takes a slower path that costs several percent of a one-token batch; the few
others are torch hooks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multitune.call import Call, Section
from multitune.current import current_call, recompute_context
from multitune.deltas import Bottleneck
from multitune.deltas.base import weight_of
from multitune.frozen import frozen_view
from multitune.plan import Plan, Step
from multitune.sites import Site

Undo = Callable[[], None]
Forward = Callable[..., Any]
NameAt = Callable[[Call], str]


def install(model: nn.Module, sites: tuple[Site, ...]) -> list[Undo]:
    """Instrument every site except attention; the returned calls, run last to first, take everything off again."""
    undo: list[Undo] = []
    for (kind, path), here in by_module(sites).items():
        if kind in _INSTALLERS:
            undo += _INSTALLERS[kind](model, model.get_submodule(path), here)
    return undo


def by_module(sites: Sequence[Site]) -> dict[tuple[str, str], list[Site]]:
    """Sites by kind and module: several where one module runs as several layers."""
    found: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in sites:
        found[site.kind, site.module].append(site)
    return found


def name_at(sites: Sequence[Site]) -> NameAt:
    """Which of one module's sites a call is at: it has several where the module runs as several layers."""
    if len(sites) == 1:
        only = sites[0].name
        return lambda call: only
    names = {site.layer: site.name for site in sites}
    return lambda call: names[call.layer]


def wrap_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> Undo:
    """Give `module` the forward that `make` builds around its present one; the returned call puts that back."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = make(module.forward)

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    return undo


def strip(model: nn.Module) -> None:
    """Take hooks and wrappers off a deep copy of an instrumented model, which has copies of them; other hooks stay."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__module__", None) == __name__:
            del module.__dict__["forward"]  # it would run the original's weights
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            registered, with_kwargs = getattr(module, name), getattr(module, f"{name}_with_kwargs")
            for key in [k for k, f in registered.items() if getattr(f, "func", f).__module__ == __name__]:
                del registered[key]
                with_kwargs.pop(key, None)


def _run(steps: list[Step], x: Tensor, y: Tensor, module: nn.Module, num_rows: int) -> Tensor:
    if x.ndim == 2:  # some models flatten rows and tokens in front of a linear map
        x, y = (t.unflatten(0, (num_rows, -1)) for t in (x, y))
        return _run(steps, x, y, module, num_rows).flatten(0, 1)
    if x.shape[0] == 1 and num_rows > 1 and steps[0].group.rows is not None:
        # A projection that the model applies once for all rows (DeBERTa's relative embeddings) differs by row here.
        x, y = (t.expand(num_rows, *t.shape[1:]).contiguous() for t in (x, y))
    for step in steps:
        y = step(x, y, module)
    return y


def _change_input(steps: list[Step], x: Tensor, frozen: nn.Module, num_rows: int, owns_input: bool) -> Tensor:
    if not owns_input and not torch.is_grad_enabled():
        x = x.clone()  # somebody else reads this tensor too, and serving works in place
    return _run(steps, x, x, frozen, num_rows)


def _linear(model: nn.Module, module: nn.Module, sites: list[Site]) -> list[Undo]:
    if sites[0].part is not None:
        return _linear_parts(model, module, sites)
    here, owns_input = name_at(sites), sites[0].owns_input
    frozen = frozen_view(model, sites[0])

    def make(original: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            call = current_call()
            plan, name = call.plan, here(call)
            before = plan.input_steps.get(name)
            if before is not None:
                x = _change_input(before, x, frozen, plan.num_rows, owns_input)
            y: Tensor = original(x)
            after = plan.steps.get(name)
            return y if after is None else _run(after, x, y, frozen, plan.num_rows)

        return forward

    return [wrap_forward(module, make)]


@dataclass(frozen=True)
class _Part:
    """One part of a module's output: one site, or several where the module runs as several layers."""

    here: NameAt
    frozen: nn.Module
    own: slice
    blocks: int
    bias_apart: bool
    """Whether the model adds this part's bias later."""

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site]) -> _Part:
        first = sites[0]
        assert first.part is not None
        frozen = frozen_view(model, first)
        return cls(name_at(sites), frozen, slice(*first.part), first.blocks, first.bias_path is not None)

    def take(self, y: Tensor) -> Tensor:
        """This part `[..., O]` of the module's output: a view, or a copy where it takes turns with others."""
        if self.blocks == 1:
            return y[..., self.own]
        return y.unflatten(-1, (self.blocks, -1))[..., self.own].flatten(-2)

    def put(self, y: Tensor, new: Tensor) -> Tensor:
        """`y` with this part replaced; in place when gradients are off."""
        start, stop = self.own.start, self.own.stop
        if self.blocks > 1:
            y, new = (t.unflatten(-1, (self.blocks, -1)) for t in (y, new))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            y = y.slice_scatter(new.to(y.dtype), -1, start, stop)
        elif new.data_ptr() != y[..., self.own].data_ptr():
            y[..., self.own] = new
        return y if self.blocks == 1 else y.flatten(-2)

    def changed(self, x: Tensor, y: Tensor, original: Forward, plan: Plan, name: str) -> Tensor:
        """This part with its deltas applied; in place in `y` where they work so."""
        before, after = plan.input_steps.get(name), plan.steps.get(name)
        if before is not None:
            x = _change_input(before, x, self.frozen, plan.num_rows, owns_input=False)
            y = original(x)  # only this part reads the changed input
        piece = self.take(y)
        if after is None:
            return piece
        if not self.bias_apart:
            return _run(after, x, piece, self.frozen, plan.num_rows)
        # The deltas act on the map's output with its bias, which is not there yet: what they change is added to the
        # output without it, so that deltas that change nothing leave every bit.
        full = piece + weight_of(self.frozen, "bias")
        return piece + (_run(after, x, full.clone(), self.frozen, plan.num_rows) - full)


def _linear_parts(model: nn.Module, module: nn.Module, sites: list[Site]) -> list[Undo]:
    """One wrapper for all sites that are parts of `module`'s output."""
    by_part: dict[tuple[int, int], list[Site]] = defaultdict(list)
    for site in sites:
        assert site.part is not None
        by_part[site.part].append(site)
    parts = [_Part.of(model, of_part) for of_part in by_part.values()]

    def make(original: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            y: Tensor = original(x)
            call = current_call()
            plan = call.plan
            for part in parts:
                name = part.here(call)
                if name in plan.steps or name in plan.input_steps:
                    y = part.put(y, part.changed(x, y, original, plan, name))
            return y

        return forward

    return [wrap_forward(module, make)]


def _norm(model: nn.Module, module: nn.Module, sites: list[Site]) -> list[Undo]:
    here, frozen = name_at(sites), frozen_view(model, sites[0])

    def make(original: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            y: Tensor = original(x)
            call = current_call()
            steps = call.plan.steps.get(here(call))
            return y if steps is None else _run(steps, x, y, frozen, call.plan.num_rows)

        return forward

    return [wrap_forward(module, make)]


def prepend(module: nn.Module, states: Tensor) -> Undo:
    """Put `states [G, E]` in front of every row `[B, T, E]` that `module` is called with."""

    def make(original: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            y: Tensor = original(torch.cat([states.to(x.dtype).expand(len(x), -1, -1), x], dim=1))
            return y

        return forward

    return wrap_forward(module, make)


def note_decoding(decoder: nn.Module) -> Undo:
    """Have the call know when an encoder-decoder's decoder begins."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current_call().decoding = True

    return decoder.register_forward_pre_hook(before, with_kwargs=True).remove


def place_rows(table: nn.Module) -> Undo:
    """Have a table of learned positions read the call's own, where it has some."""

    def make(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            positions = current_call().decoder_positions
            if positions is None:
                placed: Tensor = original(*args, **kwargs)
                return placed
            weight, offset = weight_of(table, "weight"), table.offset
            return F.embedding(positions + offset, weight)  # type: ignore[operator]

        return forward

    return wrap_forward(table, make)


def _reads_input(steps: list[Step]) -> bool:
    return any(isinstance(s.delta, Bottleneck) and s.delta.reads_input for s in steps)


def _block(module: nn.Module, here: NameAt) -> list[Undo]:
    """A whole layer as one operation: hidden states are its first argument, and its output or the first of several."""

    def make(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = current_call()
            plan, name = call.plan, here(call)
            output = original(*args, **kwargs)
            steps = plan.steps.get(name)
            if steps is None:
                return output
            x = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, Tensor):
                return _run(steps, x, output, module, plan.num_rows)
            return (_run(steps, x, output[0], module, plan.num_rows), *output[1:])

        return forward

    return [wrap_forward(module, make)]


def _sublayer(model: nn.Module, module: nn.Module, sites: list[Site]) -> list[Undo]:
    assert sites[0].enters is not None
    here = name_at(sites)
    if sites[0].enters == sites[0].module:
        return _block(module, here)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = current_call()
        name = here(call)
        steps = call.plan.steps.get(name)
        if steps and _reads_input(steps):
            call.captured[name] = args[0] if args else kwargs["hidden_states"]

    def make(original: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            y: Tensor = original(x)
            call = current_call()
            name = here(call)
            steps = call.plan.steps.get(name)
            if steps is None:
                return y
            x = call.captured.pop(name) if _reads_input(steps) else y
            return _run(steps, x, y, module, call.plan.num_rows)

        return forward

    entry = model.get_submodule(sites[0].enters)
    handle = entry.register_forward_pre_hook(enter, with_kwargs=True)
    return [handle.remove, wrap_forward(module, make)]


def _embedding(model: nn.Module, module: nn.Module, sites: list[Site]) -> list[Undo]:
    (site,) = sites
    name = site.name

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        call = current_call()
        for step in call.plan.steps.get(name, ()):
            output = step(args[0], output, module)
        return output if site.stack == "decoder" else call.insert_prompts(output)

    return [module.register_forward_hook(after).remove]


def _layers(model: nn.Module, module: nn.Module, sites: list[Site]) -> list[Undo]:
    def before(
        indices: tuple[int, ...], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = current_call()
        index = call.enter_layer(indices)
        if call.section is None and not call.has_token_bias:
            return None
        given = args[0] if args else kwargs["hidden_states"]
        into = call.into_layer(index, given)
        if into is given:
            return None
        return ((into, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": into})

    indices: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for i, path in enumerate(sites[0].layers):
        indices[path] += (i,)
    undo: list[Undo] = [
        model.get_submodule(path).register_forward_pre_hook(partial(before, of), with_kwargs=True).remove
        for path, of in indices.items()
    ]
    passing = _Passing()
    return undo + [wrap_forward(model.get_submodule(path), passing.wrap) for path in indices]


class _Passing:
    """Layers outside a call's section return the hidden states they are given, in the form in which layers do.

    That form is learned from the first layer that runs in a section: hidden states alone, or a tuple with more behind
    them. Where that is a tensor that later layers need (T5's position bias), the first layer of every pass runs.
    """

    def __init__(self) -> None:
        self.extras: tuple[Any, ...] | None = None
        """What layers return beside hidden states, a marker for each tensor; `None` while no layer has run."""
        self.alone = False
        """Whether they return hidden states by themselves."""

    def wrap(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = current_call()
            section = call.section
            if section is None:
                return original(*args, **kwargs)
            known = self.extras is not None and (section.extras is not None or True not in self.extras)
            if section.runs(call.layer) or not known:
                output = original(*args, **kwargs)
                self._learn(output, section)
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.alone:
                return hidden
            assert self.extras is not None
            return (hidden, *(section.extras if section.extras is not None else self.extras))

        return forward

    def _learn(self, output: Any, section: Section) -> None:
        self.alone = isinstance(output, Tensor)
        section.extras = () if self.alone else tuple(output[1:])
        self.extras = tuple(True if isinstance(extra, Tensor) else extra for extra in section.extras)


def checkpoint_layers(model: nn.Module, layers: Sequence[str]) -> list[Undo]:
    """Have the layers at these paths recomputed in the backward pass, for models that cannot do so themselves."""

    def make(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return checkpoint(original, *args, use_reentrant=False, context_fn=recompute_context, **kwargs)

        return forward

    return [wrap_forward(model.get_submodule(path), make) for path in dict.fromkeys(layers)]


_INSTALLERS: dict[str, Callable[[nn.Module, nn.Module, list[Site]], list[Undo]]] = {
    "linear": _linear,
    "norm": _norm,
    "sublayer": _sublayer,
    "embedding": _embedding,
    "layers": _layers,
}
