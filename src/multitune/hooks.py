"""Instrumenting a model: forward hooks at its sites, which ask the current call for their deltas.

The module tree, its `state_dict` keys and its bits stay as they were; taking the hooks off leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from multitune.call import current_call
from multitune.deltas import Bottleneck
from multitune.plan import Step
from multitune.sites import Site

Undo = Callable[[], None]


def install(model: nn.Module, sites: tuple[Site, ...]) -> list[Undo]:
    """Put hooks on every site except attention; the returned calls take them off again."""
    undo: list[Undo] = []
    for site in sites:
        module = model.get_submodule(site.module)
        handles = _INSTALLERS[site.kind](model, module, site) if site.kind in _INSTALLERS else []
        undo += [handle.remove for handle in handles]
    return undo


def _run(steps: list[Step], x: Tensor, y: Tensor, module: nn.Module, num_rows: int) -> Tensor:
    if x.shape[0] == 1 and num_rows > 1 and steps[0].group.rows is not None:
        # A projection that the model applies once for all rows (DeBERTa's relative embeddings) differs by row here.
        x, y = (t.expand(num_rows, *t.shape[1:]).contiguous() for t in (x, y))
    for step in steps:
        y = step(x, y, module)
    return y


def _linear(model: nn.Module, module: nn.Module, site: Site) -> list[RemovableHandle]:
    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = current_call()
        steps = call.steps(site.name)
        return None if steps is None else _run(steps, args[0], output, module, call.plan.num_rows)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = current_call()
        steps = call.plan.input_steps.get(site.name)
        if steps is None:
            return None
        x = args[0]
        if not site.owns_input and not torch.is_grad_enabled():
            x = x.clone()  # somebody else reads this tensor too, and serving works in place
        return (_run(steps, x, x, module, call.plan.num_rows), *args[1:])

    return [module.register_forward_hook(after), module.register_forward_pre_hook(before)]


def _norm(model: nn.Module, module: nn.Module, site: Site) -> list[RemovableHandle]:
    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = current_call()
        steps = call.steps(site.name)
        return None if steps is None else _run(steps, args[0], output, module, call.plan.num_rows)

    return [module.register_forward_hook(after)]


def _sublayer(model: nn.Module, module: nn.Module, site: Site) -> list[RemovableHandle]:
    assert site.enters is not None

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = current_call()
        steps = call.steps(site.name)
        if steps and any(isinstance(s.delta, Bottleneck) and s.delta.placement == "parallel" for s in steps):
            call.captured[site.name] = args[0] if args else kwargs["hidden_states"]

    def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = current_call()
        steps = call.steps(site.name)
        if steps is None:
            return None
        return _run(steps, call.captured.pop(site.name, output), output, module, call.plan.num_rows)

    entry = model.get_submodule(site.enters)
    return [entry.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]


def _embedding(model: nn.Module, module: nn.Module, site: Site) -> list[RemovableHandle]:
    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        prompts = current_call().prompts
        return None if prompts is None else prompts.insert(output)

    return [module.register_forward_hook(after)]


def _layers(model: nn.Module, module: nn.Module, site: Site) -> list[RemovableHandle]:
    def before(
        index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = current_call()
        if not call.has_token_bias:
            return None
        if args:
            return (call.add_token_bias(index, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": call.add_token_bias(index, kwargs["hidden_states"])}

    assert isinstance(module, nn.ModuleList)
    return [layer.register_forward_pre_hook(partial(before, i), with_kwargs=True) for i, layer in enumerate(module)]


_INSTALLERS: dict[str, Callable[[nn.Module, nn.Module, Site], list[RemovableHandle]]] = {
    "linear": _linear,
    "norm": _norm,
    "sublayer": _sublayer,
    "embedding": _embedding,
    "layers": _layers,
}
