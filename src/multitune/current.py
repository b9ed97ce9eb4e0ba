"""Which call a running forward pass belongs to.

The call is found by the sites through a context variable that is set for the duration of the forward pass and
reset in a `finally`, so that other threads, a failed batch, and the next batch never see it. Layers that are
recomputed in the backward pass get their own call back (`recompute_context`), because that runs later and
perhaps on another thread.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from multitune.errors import PlanError

if TYPE_CHECKING:
    from multitune.call import Call

_CURRENT: ContextVar[Call] = ContextVar("multitune_call")


class _Traced:
    """Where the call stands for the compiler, which cannot follow a context variable.

    It is written at the top of the function that is compiled and read by the sites inside it, so that the compiler
    replaces what they read by that function's argument: no compiled code holds a call, and none reads this one.
    """

    call: Call | None = None


_TRACED = _Traced()


def current_call() -> Call:
    """The call that the running forward pass belongs to.

    Raises:
        PlanError: the model was called directly, around the backbone that instruments it.
    """
    if torch.compiler.is_compiling() and _TRACED.call is not None:
        return _TRACED.call
    call = _CURRENT.get(None)
    if call is None:
        raise PlanError(
            "this model is instrumented by multitune, but its forward pass was called without a plan; call "
            "Backbone.run(plan, ...) or Bank.predict(...), or Backbone.detach() to get the bare model back"
        )
    return call


def run_traced(running: nn.Module, call: Call) -> Tensor:
    """The forward pass as `torch.compile` follows it: the last hidden states `[B, T', D]` of one call."""
    _TRACED.call = call
    try:
        hidden: Tensor = running(**call.inputs).last_hidden_state
        return hidden
    finally:
        _TRACED.call = None


class active:
    """Make `call` the current one for this thread until the block ends, however it ends.

    May be entered again: a graph that is kept recomputes its layers in every backward pass.
    """

    def __init__(self, call: Call, *, again: bool = False) -> None:
        """
        Args:
            again: for recomputation: each time, a fresh copy of the call as it stands now.
        """
        self._call = call.snapshot() if again else call
        self._again = again
        self._tokens: list[Token[Call]] = []

    def __enter__(self) -> None:
        call = self._call.snapshot() if self._again else self._call
        self._tokens.append(_CURRENT.set(call))
        call.enter()

    def __exit__(self, *exception: object) -> None:
        current_call().leave()
        _CURRENT.reset(self._tokens.pop())


def recompute_context() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For `torch.utils.checkpoint(context_fn=...)`: the recomputed forward runs under the call of the first one.

    That includes how often each shared module had run by then: by the backward pass the call itself is past its last
    layer.
    """
    return contextlib.nullcontext(), active(current_call(), again=True)
