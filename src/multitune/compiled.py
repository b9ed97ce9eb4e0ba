"""The forward pass under `torch.compile`.

The compiler gets a function of the running module and the call, so that a plan's tensors are inputs of the compiled
graph and its structure is guarded: another structure is compiled anew, and other tensors of the same structure are
not. One graph takes in the whole forward pass; where that cannot be, it is refused rather than run in pieces.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported, UserError

from multitune.call import Call
from multitune.current import run_traced
from multitune.errors import BackboneError, ConfigError


class Compiled:
    """One backbone's compiled forward pass."""

    def __init__(self, running: nn.Module, name: str, max_graphs: int, **options: Any) -> None:
        """
        Args:
            running: the part of the model that is run.
            name: what messages call the backbone.
            max_graphs: how many structures of plans are compiled; others run uncompiled.
            options: what else `torch.compile` takes.

        Raises:
            ConfigError: max_graphs is not at least 1.
        """
        if max_graphs < 1:
            raise ConfigError(f"compile: max_graphs={max_graphs} is not possible; give at least 1")
        own = {"recompile_limit": max_graphs, "isolate_recompiles": True}  # since torch 2.13
        known = inspect.signature(torch.compile).parameters
        self._running = running
        self._name = name
        options |= {key: value for key, value in own.items() if key in known}
        self._function = torch.compile(run_traced, fullgraph=True, **options)

    def __call__(self, call: Call) -> Tensor:
        """The last hidden states `[B, T', D]` of a call, which must be the active one.

        Raises:
            BackboneError: the model does something that cannot be compiled.
        """
        try:
            hidden: Tensor = self._function(self._running, call)
        except FailOnRecompileLimitHit:
            hidden = self._running(**call.inputs).last_hidden_state
        except (Unsupported, UserError) as error:
            raise BackboneError(
                f"backbone '{self._name}' cannot be compiled: {str(error).splitlines()[0]}. Run it as it is: "
                f"Backbone.uncompile()"
            ) from error
        return hidden
